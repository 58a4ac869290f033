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
    height, width = ids.shape
    colors = np.zeros((height, width, 3), dtype=np.uint8)
    for channel in range(min(3, ids.dtype.itemsize)):
        colors[:, :, channel] = ids if channel == 0 and ids.itemsize == 1 else (ids >> 8 * channel) & 255
    return _png(colors.reshape(height, 3 * width), width, RGB, 8)


def grey_png(values: np.ndarray) -> bytes:
    """A grey PNG of [H, W] uint8 or uint16."""
    height, width = values.shape
    rows = values.astype(values.dtype.newbyteorder(">")).view(np.uint8)
    return _png(rows.reshape(height, -1), width, GREY, 8 * values.itemsize)


def _png(rows: np.ndarray, width: int, color_type: int, depth: int) -> bytes:
    """uint8 [H, bytes a row].

    Each row is stored as its difference to the one above (filter "up"), which is 0 wherever a segment goes on, and
    zlib looks for repeats of one byte only. A map of 640 x 480 with 15 segments, measured: 1.9 ms and 18.5 KB; Pillow
    takes 6.2 ms for 26.8 KB at level 1 and 8.7 ms for 18.2 KB at level 6.
    """
    filtered = np.empty((len(rows), 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[:1, 1:] = rows[:1]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    data = compressor.compress(filtered.data) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
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
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, ends = np.append(0, changes), np.append(changes, flat.size)
    values = flat[starts]
    encoded = []
    for segment in wanted:
        own = values == segment
        edges = np.stack([starts[own], ends[own]], axis=1).ravel()  # where the mask begins and ends, in turn
        counts = np.diff(edges, prepend=0, append=flat.size)
        encoded.append(_compress(counts[:-1] if len(edges) and counts[-1] == 0 else counts))
    return encoded


def _compress(counts: np.ndarray) -> str:
    """Counts as text: from the fourth on less the one two before, in groups of 5 bits, the lowest first.

    Source: rleToString in cocodataset/cocoapi's maskApi.c.
    """
    numbers = counts.astype(np.int64)
    numbers[3:] -= counts[1:-2]
    groups, present = [], []
    going = np.ones(len(numbers), dtype=bool)
    while going.any():
        group = numbers & 0x1F
        numbers >>= 5
        more = numbers != np.where(group & 0x10, -1, 0)
        groups.append(group | np.where(more, 0x20, 0))
        present.append(going)
        going = going & more
    letters = np.stack(groups, axis=1)[np.stack(present, axis=1)] + 48
    return letters.astype(np.uint8).tobytes().decode("ascii")
