"""Maps of segment ids as bytes: PNG and COCO's compressed run lengths.

No torch here: the processes that write for `detr-fast label` need none.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

RGB, GREY = 2, 0  # PNG colour types


def panoptic_png(ids: np.ndarray) -> bytes:
    """COCO's panoptic PNG: id = R + 256 G + 65536 B.

    Args:
        ids: [H, W] integers.

    Raises:
        ValueError: an id below 0 or of 2^24 or more, which has no colour.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 24:
        raise ValueError(f"ids must be in [0, 2**24), got {ids.min()} to {ids.max()}")
    used = min(3, ids.itemsize)
    planes = [ids if ids.itemsize == 1 else (ids >> 8 * place) & 255 for place in range(used)]
    return _png(planes, 3, RGB, 8)


def grey_png(values: np.ndarray) -> bytes:
    """A grey PNG of [H, W] uint8 or uint16."""
    planes = [values] if values.itemsize == 1 else [values >> 8, values & 255]
    return _png(planes, values.itemsize, GREY, 8 * values.itemsize)


def _png(planes: list[np.ndarray], samples: int, color_type: int, depth: int) -> bytes:
    """From the first of the bytes [H, W] that each pixel has, in their order; the others are 0.

    Each row is stored as its difference to the one above (filter "up"), which is 0 wherever a segment goes on, and
    zlib looks for repeats of one byte only. A map of 640 x 480 with 15 segments, measured: 1.9 ms and 18.5 KB; Pillow
    takes 6.2 ms for 26.8 KB at level 1 and 8.7 ms for 18.2 KB at level 6.
    """
    height, width = planes[0].shape
    filtered = np.zeros((height, 1 + samples * width), dtype=np.uint8)
    filtered[:, 0] = 2
    for first, plane in enumerate(planes, start=1):
        rows, plane = filtered[:, first::samples], plane.astype(np.uint8, copy=False)
        rows[:1] = plane[:1]
        np.subtract(plane[1:], plane[:-1], out=rows[1:])
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    data = compressor.compress(filtered.data) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def run_lengths(ids: np.ndarray, wanted: Sequence[int]) -> list[str]:
    """COCO's compressed run lengths of some of the segments, as `pycocotools.mask.encode` gives for each one's mask.

    All from one pass over the map, without a mask for each.

    Args:
        ids: [H, W] integers.
        wanted: the segments' ids.
    """
    flat = ids.T.ravel()  # COCO counts down the columns
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    runs = np.stack([starts, np.append(starts[1:], flat.size)], axis=1)[order]  # segment by segment: begin and end
    bounds = (np.searchsorted(values[order], wanted, side).tolist() for side in ("left", "right"))
    own = [runs[first:last].ravel() for first, last in zip(*bounds, strict=True)]
    return _compress([np.diff(edges, prepend=0, append=flat.size) for edges in own])


def _compress(masks: list[np.ndarray]) -> list[str]:
    """Each mask's counts as text: from the fourth on less the one two before, in groups of 5 bits, the lowest first. A
    0 at the end, of a mask that has the last pixel, is left out.

    All masks at once, as each of NumPy's calls costs more than the counts of one. Source: rleToString in
    cocodataset/cocoapi's maskApi.c.
    """
    masks = [counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts for counts in masks]
    ends = np.cumsum([len(counts) for counts in masks], dtype=np.int64)
    numbers = np.concatenate([*masks, np.empty(0, dtype=np.int64)])
    for counts, end in zip(masks, ends.tolist(), strict=True):
        numbers[end - len(counts) + 3 : end] -= counts[1:-2]
    letters, length = np.zeros((len(numbers), 8), dtype=np.uint8), np.zeros(len(numbers), dtype=np.int64)
    going = np.arange(len(numbers))  # the numbers that are not written in full
    while len(going):
        group = numbers & 0x1F
        numbers = numbers >> 5
        more = numbers != -(group >> 4)
        letters[going, length[going]] = 48 + group + (more << 5)
        length[going] += 1
        going, numbers = going[more], numbers[more]
    text = letters[letters > 0].tobytes().decode("ascii")
    stops = [0, *np.cumsum(length)[ends - 1].tolist()]
    return [text[start:stop] for start, stop in zip(stops, stops[1:], strict=False)]
