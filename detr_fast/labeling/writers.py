"""The files of a labelled data set: COCO panoptic JSON, COCO results, and the list of failures.

Source of the formats: https://cocodataset.org/#format-data (panoptic) and #format-results.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
    with open_atomic(path) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its name, and the place of what had it, when all has gone well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Removes what `open_atomic` left behind in a process that was killed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(".tmp") and len(name) == len(f".{uuid.uuid4().hex}.tmp"):
                Path(parent, name).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, safe from a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value).encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    with open_atomic(path) as file:
        for value in values:
            file.write(f"{json.dumps(value)}\n".encode())


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
