"""COCO panoptic: a PNG of segment ids for each image, and panoptic.json.

Source: https://cocodataset.org/#format-data, panoptic segmentation.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detr_fast import __version__
from detr_fast.files import open_atomic
from detr_fast.images import panoptic_png
from detr_fast.labeling.formats.format import Format, ImageLabels, JsonList, Writer
from detr_fast.labeling.listing import png_name


class Panoptic(Format):
    name = "panoptic"
    folder = "panoptic"
    results = ("panoptic.json",)

    def path(self, file: str) -> str:
        return f"{self.folder}/{png_name(file)}"

    def encode(self, labels: ImageLabels) -> bytes:
        return panoptic_png(labels.ids)

    @contextmanager
    def writer(self, out: Path) -> Iterator[Writer]:
        with open_atomic(out / "panoptic.json") as file, tempfile.TemporaryFile(dir=out) as later:
            yield _PanopticJson(file, later)


class _PanopticJson(Writer):
    """The images go straight to the file; the annotations, which follow them, wait in another."""

    def __init__(self, file: IO[bytes], later: IO[bytes]) -> None:
        self._file, self._later = file, later
        info = {"description": "panoptic labels", "version": __version__, "contributor": "detr_fast"}
        file.write(b'{"info": ' + json.dumps(info).encode() + b', "images": ')
        self._images, self._annotations = JsonList(file), JsonList(later)

    def add(self, image_id: int, file: str, record: dict[str, Any]) -> None:
        size = {"width": record["width"], "height": record["height"]}
        self._images.add({"id": image_id, "file_name": file, **size})
        self._annotations.add(
            {"image_id": image_id, "file_name": png_name(file), "segments_info": record["segments_info"]}
        )

    def end(self, categories: list[dict[str, Any]]) -> None:
        self._images.end()
        self._annotations.end()
        self._later.seek(0)
        self._file.write(b', "annotations": ')
        shutil.copyfileobj(self._later, self._file)
        self._file.write(b', "categories": ' + json.dumps(categories).encode() + b"}")


PANOPTIC = Panoptic()
