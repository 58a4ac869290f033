"""The files of a labelled data set: COCO panoptic PNGs and JSON, COCO results, and the list of failures.

Source of the formats: https://cocodataset.org/#format-data (panoptic) and #format-results.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

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


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file, and the folders above it, so that nobody ever sees a part of it under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value).encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    write_atomic(path, "".join(f"{json.dumps(value)}\n" for value in values).encode())


def panoptic_annotation(image_id: int, file_name: str, segments_info: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's annotation of one image, with a score for each segment.

    Args:
        file_name: the image's, relative to the folder of images.
        segments_info: `PanopticResult.segments_info`.
    """
    keys = ("id", "category_id", "area", "bbox", "score")
    return {
        "image_id": image_id,
        "file_name": png_name(file_name),
        "segments_info": [{**{key: info[key] for key in keys}, "iscrowd": 0} for info in segments_info],
    }


def instance_results(
    image_id: int, segmentation: np.ndarray, segments_info: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """COCO results (compressed RLE) of the segments that are things.

    Args:
        segmentation: int32 [H, W] ids.
    """
    from pycocotools import mask as coco_mask

    results = []
    for info in segments_info:
        if not info["isthing"]:
            continue
        rle = coco_mask.encode(np.asfortranarray(segmentation == info["id"], dtype=np.uint8))
        results.append(
            {
                "image_id": image_id,
                "category_id": info["category_id"],
                "score": info["score"],
                "bbox": info["bbox"],
                "area": info["area"],
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return results
