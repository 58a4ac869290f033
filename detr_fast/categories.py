"""The categories of COCO.

`COCO_PANOPTIC`: the 133 of its panoptic task, dicts with "id", "name", "isthing" (1 or 0) and "color" (R, G, B), as in
cocodataset/panopticapi's panoptic_coco_categories.json.
`COCO_CLASSES`: names of the 80 things by id, "N/A" at the 11 ids that COCO left out, as in facebookresearch/detr's
notebooks.
"""

from __future__ import annotations

import colorsys
import json
from functools import cache
from importlib.resources import files
from typing import Any

from detr_fast.config import DetrConfig

Category = dict[str, Any]

COCO_PANOPTIC: list[Category]
COCO_CLASSES: list[str]


@cache
def _coco_panoptic() -> list[Category]:
    return json.loads((files("detr_fast") / "coco_panoptic_categories.json").read_text(encoding="utf-8"))


@cache
def _coco_classes() -> list[str]:
    names = {category["id"]: category["name"] for category in _coco_panoptic() if category["isthing"]}
    return [names.get(index, "N/A") for index in range(max(names) + 1)]


def __getattr__(name: str) -> Any:
    if name == "COCO_PANOPTIC":
        return _coco_panoptic()
    if name == "COCO_CLASSES":
        return _coco_classes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def categories_for(config: DetrConfig, categories: list[Category] | None) -> list[Category]:
    """The categories of a model: its own if the checkpoint has them, else COCO's if the number of classes is
    COCO's (250 for panoptic, 91 for things), else made up: "class 0", "class 1" and so on.

    Returns:
        dicts with "id", "name", "isthing" and "color", new ones at each call.
    """
    if categories is None and config.num_classes == 250:
        categories = _coco_panoptic()
    elif categories is None and config.num_classes == 91:
        categories = [category for category in _coco_panoptic() if category["isthing"]]
    elif categories is None:
        categories = [
            {"id": index, "name": f"class {index}", "isthing": 1, "color": palette_color(index)}
            for index in range(config.num_classes)
        ]
    return [dict(category) for category in categories]


def palette_color(index: int) -> list[int]:
    """Hues a golden ratio apart stay distinct however many are taken."""
    return [round(255 * channel) for channel in colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 0.95)]
