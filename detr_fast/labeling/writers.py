"""The files of a labelled data set: COCO panoptic JSON, COCO results, and the list of failures.

Source of the formats: https://cocodataset.org/#format-data (panoptic) and #format-results.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def png_name(file_name: str) -> str:
    """Where, below panoptic/, the PNG of an image goes; different images never share a name.

    `sub/a.jpg` becomes `sub/a.png`, as in COCO. Any other image keeps its extension (`sub/a.png` becomes
    `sub/a.png.png`), so that neighbours with the same stem stay apart whatever else the folder holds now or later.
    """
    path = PurePosixPath(file_name)
    if path.suffix == ".jpg" and PurePosixPath(path.stem).suffix.lower() not in IMAGE_SUFFIXES:
        return str(path.with_suffix(".png"))
    return f"{file_name}.png"


def panoptic_annotation(image_id: int, file_name: str, record: dict[str, Any]) -> dict[str, Any]:
    """COCO's annotation of one image, with a score for each segment, from `stages.Encoded.record`."""
    return {"image_id": image_id, "file_name": png_name(file_name), "segments_info": record["segments_info"]}


def instance_results(image_id: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """COCO results (compressed RLE) of the segments that are things, from `stages.Encoded.record`."""
    for info in record["segments_info"]:
        if (counts := record["rle"].get(str(info["id"]))) is not None:
            shared = {key: info[key] for key in ("category_id", "score", "bbox", "area") if key in info}
            segmentation = {"size": [record["height"], record["width"]], "counts": counts}
            yield {"image_id": image_id, **shared, "segmentation": segmentation}
