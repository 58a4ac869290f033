"""The interface of a label format.

A format is one object: it writes a file for each image, at once, and files of all images, at the end, or one of both.
No torch here: the processes that encode labels need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class ImageLabels:
    """The labels of one image, without the segments that are not wanted.

    Attributes:
        file: the image, relative to the folder of images.
        ids: [H, W] integers: each pixel's segment id, 0 = void.
        segments_info: a dict for each segment, as in `PanopticResult`.
        num_classes: of the model; category ids are below it.
    """

    file: str
    ids: np.ndarray
    segments_info: list[dict[str, Any]]
    num_classes: int


class Writer:
    """Writes a format's files of all images, of which one at a time is in memory."""

    def add(self, image_id: int, file: str, record: dict[str, Any]) -> None:
        """Takes an image, in the order of the listing.

        Args:
            image_id: counts from 1.
            file: the image, relative to the folder of images.
            record: its line of the manifest: "width", "height", "segments_info", and the formats' own fields.
        """

    def end(self, categories: list[dict[str, Any]]) -> None:
        """Called after the last image, with the model's categories and any other that was found."""


class Format:
    """A label format. A subclass defines the parts that the format has.

    Attributes:
        name: in the option `formats`.
        folder: the folder below the output folder that holds a file for each image; None: there are no such files.
        results: names of the files that are written at the end, in the output folder.
        fields: the type of each field that `record` gives.
    """

    name: str
    folder: str | None = None
    results: tuple[str, ...] = ()
    fields: Mapping[str, type] = {}

    def path(self, file: str) -> str:
        """The path of an image's file, relative to the output folder; it lies in `folder`."""
        raise NotImplementedError

    def encode(self, labels: ImageLabels) -> bytes:
        """The content of an image's file."""
        raise NotImplementedError

    def record(self, labels: ImageLabels) -> dict[str, Any]:
        """Fields of the image's line in the manifest, as JSON has them; no other format uses their names."""
        return {}

    def writer(self, out: Path) -> AbstractContextManager[Writer]:
        """Opens `results` in the output folder; they take their names when the context is left without an error."""
        return nullcontext(Writer())


class JsonList:
    """Writes a list as `json.dumps` does, one value after the other."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._separator = b"["

    def add(self, value: Any) -> None:
        self._file.write(self._separator + json.dumps(value).encode())
        self._separator = b", "

    def end(self) -> None:
        self._file.write(b"[]" if self._separator == b"[" else b"]")
