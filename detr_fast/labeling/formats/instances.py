"""COCO results with compressed run lengths of the segments that are things: instances.json.

Source: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detr_fast.files import open_atomic
from detr_fast.images import run_lengths
from detr_fast.labeling.formats.format import Format, ImageLabels, JsonList, Writer


class Instances(Format):
    name = "instances"
    results = ("instances.json",)
    fields: Mapping[str, type] = {"rle": dict}

    def record(self, labels: ImageLabels) -> dict[str, Any]:
        """ "rle": the run lengths of each thing by its segment id."""
        things = [info["id"] for info in labels.segments_info if info["isthing"]]
        return {"rle": dict(zip(map(str, things), run_lengths(labels.ids, things), strict=True))}

    @contextmanager
    def writer(self, out: Path) -> Iterator[Writer]:
        with open_atomic(out / "instances.json") as file:
            yield _InstancesJson(file)


class _InstancesJson(Writer):
    def __init__(self, file: IO[bytes]) -> None:
        self._results = JsonList(file)

    def add(self, image_id: int, file: str, record: dict[str, Any]) -> None:
        for info in record["segments_info"]:
            if (counts := record["rle"].get(str(info["id"]))) is not None:
                shared = {key: info[key] for key in ("category_id", "score", "bbox", "area") if key in info}
                segmentation = {"size": [record["height"], record["width"]], "counts": counts}
                self._results.add({"image_id": image_id, **shared, "segmentation": segmentation})

    def end(self, categories: list[dict[str, Any]]) -> None:
        self._results.end()


INSTANCES = Instances()
