"""What happens to an image before and after the model, as plain functions of picklable values.

`decode` -> the model (`Predictor.start_segments`) -> `encode` -> `Encoded.write`. Nothing here needs torch, holds state
or knows who calls it: the functions at the end run the same stages on a slot of shared memory.
"""

from __future__ import annotations

import errno
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
from detr_fast.images import grey_png, panoptic_png, pixels_of, read_image, resized_for_normalise, run_lengths
from detr_fast.labeling import writers
from detr_fast.labeling.workers import RESIDENT, SharedMemory, WorkerDied
from detr_fast.resampling import resized_size

FORMATS = ("panoptic", "instances", "semantic")
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of an image, which is Pillow's limit
UNREADABLE = (ValueError, OSError, MemoryError, WorkerDied)  # what reading an image may raise


@dataclass(frozen=True)
class Reading:
    """How images become what the model reads.

    Attributes:
        exif: turn them the way their EXIF orientation says.
        size, max_size: pixels of the short side and the most of the long side, as `Predictor` has them.
        raw: leave resizing to the device, except for images that are too large to be sent there.
    """

    exif: bool
    size: int
    max_size: int
    raw: bool


@dataclass(frozen=True)
class Writing:
    """Which labels are written, and how.

    Attributes:
        out: the folder.
        formats: of `FORMATS`.
        classes: ids of the classes that are wanted; None for all. The pixels of others become void.
        min_area: segments of fewer pixels become void.
        semantic_bits: 8 or 16, for the largest class id.
    """

    out: Path
    formats: tuple[str, ...]
    classes: frozenset[int] | None
    min_area: int
    semantic_bits: int


@dataclass(frozen=True)
class Encoded:
    """The labels of an image as bytes.

    Attributes:
        files: the PNGs by their path below the output folder.
        record: what the manifest holds: "width", "height", "segments_info" as COCO has it, and "rle" by segment id.
    """

    files: dict[str, bytes]
    record: dict[str, Any]

    def write(self, out: Path) -> list[Path]:
        """Writes the PNGs, each complete or not at all, though not yet safe from a loss of power (see `sync`)."""
        paths = [out / name for name in self.files]
        for path, data in zip(paths, self.files.values(), strict=True):
            write_atomic(path, data)
        return paths


@dataclass(frozen=True)
class Decoded:
    """What the device is sent of an image, as in `predictor.Pixels`."""

    pixels: np.ndarray
    size: tuple[int, int]
    target: tuple[int, int]


def decode(path: Path, reading: Reading, allocate: Callable[..., np.ndarray] = np.empty) -> Decoded:
    """Reads an image.

    Args:
        allocate: makes the array from its shape and dtype.

    Raises:
        ValueError, OSError: it cannot be read, or is too thin to be resized.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device could keep the reader waiting for ever
        raise ValueError("not a regular file")
    picture = read_image(path, exif=reading.exif)
    target = (picture.height, picture.width)
    width, height = resized_size(*picture.size, reading.size, reading.max_size)
    if not reading.raw:
        return Decoded(resized_for_normalise(picture, width, height, allocate), (height, width), target)
    if 3 * picture.width * picture.height > RESIDENT:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return Decoded(pixels_of(picture, allocate), (height, width), target)


def encode(file: str, ids: np.ndarray, segments_info: list[dict[str, Any]], writing: Writing) -> Encoded:
    """The labels of an image, in the formats that are wanted.

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
    record: dict[str, Any] = {"width": ids.shape[1], "height": ids.shape[0]}
    keys = ("id", "category_id", "area", "bbox", "score")
    record["segments_info"] = [{**{key: info[key] for key in keys if key in info}, "iscrowd": 0} for info in kept]
    files = {}
    if "panoptic" in writing.formats:
        files[f"panoptic/{writers.png_name(file)}"] = panoptic_png(ids)
    if "semantic" in writing.formats:
        classes = np.zeros(1 + int(ids.max()), dtype=np.uint8 if writing.semantic_bits == 8 else np.uint16)
        for info in kept:
            classes[info["id"]] = info["category_id"]
        files[f"semantic/{writers.png_name(file)}"] = grey_png(classes[ids])
    if "instances" in writing.formats:
        things = [info["id"] for info in kept if info["isthing"]]
        record["rle"] = dict(zip(map(str, things), run_lengths(ids, things), strict=True))
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


# ---- the same on shared memory, in a worker ----

_memory: SharedMemory


def attach(slots: int, slot_bytes: int, descriptor: int) -> None:
    """What a worker does first."""
    global _memory
    _memory = SharedMemory(slots, slot_bytes, descriptor)


def decode_into(
    slot: int, path: Path, reading: Reading
) -> tuple[tuple[int, ...], str, tuple[int, int], tuple[int, int]]:
    """`decode` into a slot; gives the array's shape and dtype there, `size` and `target`."""
    decoded = decode(path, reading, partial(_memory.array, slot))
    return decoded.pixels.shape, decoded.pixels.dtype.str, decoded.size, decoded.target


def encode_from(
    slot: int,
    shape: tuple[int, int],
    dtype: str,
    offset: int,
    file: str,
    segments_info: list[dict[str, Any]],
    writing: Writing,
) -> tuple[dict[str, Any], list[Path]]:
    """`encode` of the ids in a slot, and `Encoded.write`; gives the record and what was written."""
    encoded = encode(file, _memory.array(slot, shape, dtype, offset), segments_info, writing)
    return encoded.record, encoded.write(writing.out)
