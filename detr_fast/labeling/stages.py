"""The stages of an image before and after the model, as plain functions of picklable values.

`decode` -> the model (`Predictor.start_segments`) -> `encode` -> `Encoded.write`. Nothing here needs torch, holds state
or knows who calls it: the functions at the end run the same stages on a slot of shared memory.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr_fast.files import sync, write_atomic
from detr_fast.images import Pixels, prepare, read_image
from detr_fast.labeling.formats import FORMATS, ImageLabels
from detr_fast.labeling.workers import SharedMemory, WorkerDied

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of an image, which is Pillow's limit
UNREADABLE = (ValueError, OSError, MemoryError, WorkerDied)  # exceptions of reading an image


@dataclass(frozen=True)
class Reading:
    """How images are read and resized.

    Attributes:
        exif: turn them the way their EXIF orientation says.
        size, max_size, on_device: as for `images.prepare`.
    """

    exif: bool
    size: int
    max_size: int
    on_device: bool


@dataclass(frozen=True)
class Writing:
    """Which labels are written, and how.

    Attributes:
        out: the folder.
        formats: names in `FORMATS`.
        classes: ids of the classes that are wanted; None for all. The pixels of others become void.
        min_area: segments of fewer pixels become void.
        num_classes: of the model; category ids are below it.
    """

    out: Path
    formats: tuple[str, ...]
    classes: frozenset[int] | None
    min_area: int
    num_classes: int


@dataclass(frozen=True)
class Encoded:
    """The labels of an image as bytes.

    Attributes:
        files: the content of each file, by its path below the output folder.
        record: the line of the manifest: "bytes", the length of the file of each format that writes one; "width",
            "height", "segments_info" as COCO has it, and the formats' fields.
    """

    files: dict[str, bytes]
    record: dict[str, Any]

    def write(self, out: Path) -> list[Path]:
        """Writes the files, each complete or not at all, though not yet safe from a loss of power (see `sync`)."""
        paths = [out / name for name in self.files]
        for path, data in zip(paths, self.files.values(), strict=True):
            write_atomic(path, data)
        return paths


def decode(path: Path, reading: Reading, allocate: Callable[..., np.ndarray] = np.empty) -> Pixels:
    """Reads an image.

    Args:
        allocate: makes the array from its shape and dtype.

    Raises:
        ValueError, OSError: it cannot be read, or is too thin to be resized.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device could keep the reader waiting for ever
        raise ValueError("not a regular file")
    picture = read_image(path, exif=reading.exif)
    return prepare(picture, reading.size, reading.max_size, reading.on_device, allocate)


def encode(file: str, ids: np.ndarray, segments_info: list[dict[str, Any]], writing: Writing) -> Encoded:
    """The labels of an image, in the formats of `writing`.

    Args:
        file: the image's path, relative to the folder of images.
        ids: [H, W] integers.
        segments_info: as in `PanopticResult`.
    """
    kept = [
        info
        for info in segments_info
        if info["area"] >= writing.min_area and (writing.classes is None or info["category_id"] in writing.classes)
    ]
    if len(kept) < len(segments_info):
        table = np.zeros(1 + int(ids.max()), dtype=ids.dtype)
        for info in kept:
            table[info["id"]] = info["id"]
        ids = table[ids]
    lengths: dict[str, int] = {}
    record: dict[str, Any] = {"bytes": lengths, "width": ids.shape[1], "height": ids.shape[0]}
    keys = ("id", "category_id", "area", "bbox", "score")
    record["segments_info"] = [{**{key: info[key] for key in keys if key in info}, "iscrowd": 0} for info in kept]
    labels, files = ImageLabels(file, ids, kept, writing.num_classes), {}
    for format in (FORMATS[name] for name in writing.formats):
        record |= format.record(labels)
        if format.folder is not None:
            files[format.path(file)] = data = format.encode(labels)
            lengths[format.name] = len(data)
    return Encoded(files, record)


def sync_written(paths: list[Path]) -> None:
    """Makes written files safe from a loss of power."""
    for path in [*paths, *{path.parent for path in paths}]:
        sync(path)


def why_unreadable(error: BaseException, path: Path) -> str:
    """The reason that is recorded of an image whose reading raised one of `UNREADABLE`."""
    return str(error).removeprefix(f"{path}: ") or type(error).__name__


def why_unwritable(error: OSError | WorkerDied) -> str:
    """The reason that is recorded of an image whose labels could not be written.

    Raises:
        OSError: `error`, if it is no fault of the image, as a full disk.
    """
    if isinstance(error, WorkerDied):
        return str(error)
    if error.errno == errno.ENAMETOOLONG:
        return "the path of its PNG is too long"
    raise error


# ---- the same on shared memory ----


@dataclass(frozen=True)
class Slot:
    """A place in shared memory that holds the `Pixels` of an image.

    Attributes:
        number: of the slot.
        shape: of the array, uint8 [rows, columns, 3].
        size, target: as `Pixels` has them.
    """

    number: int
    shape: tuple[int, ...]
    size: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def of(cls, number: int, pixels: Pixels) -> Slot:
        """The slot whose array `pixels` has."""
        return cls(number, pixels.array.shape, pixels.size, pixels.target)

    def pixels(self, memory: SharedMemory) -> Pixels:
        """The pixels, which are the slot's own memory and no copy."""
        return Pixels(memory.array(self.number, self.shape, np.uint8), self.size, self.target)

    @property
    def end(self) -> int:
        """The byte of the slot behind the pixels."""
        return -(-math.prod(self.shape) // 64) * 64


@dataclass(frozen=True)
class Found:
    """The segments of an image whose ids lie in a slot, or why there are none.

    Attributes:
        shape, dtype: of the ids, [H, W].
        offset: the byte of the slot at which they begin: behind the pixels, as these are read again if the model's
            process dies.
        segments_info: as in `PanopticResult`.
        error: the reason of a failure.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    segments_info: list[dict[str, Any]]
    error: str | None = None

    def ids(self, memory: SharedMemory, slot: int) -> np.ndarray:
        """The ids, which are the slot's own memory and no copy."""
        return memory.array(slot, self.shape, self.dtype, self.offset)


_memory: SharedMemory


def attach(slots: int, slot_bytes: int, descriptor: int) -> None:
    """The first call of a worker."""
    global _memory
    _memory = SharedMemory(slots, slot_bytes, descriptor)


def decode_into(slot: int, path: Path, reading: Reading) -> Slot:
    """`decode` into a slot."""
    return Slot.of(slot, decode(path, reading, partial(_memory.array, slot)))


def encode_from(slot: int, found: Found, file: str, writing: Writing) -> tuple[dict[str, Any], list[Path]]:
    """`encode` of the segments in a slot, and `Encoded.write`; gives the record and the files that were written."""
    encoded = encode(file, found.ids(_memory, slot), found.segments_info, writing)
    return encoded.record, encoded.write(writing.out)
