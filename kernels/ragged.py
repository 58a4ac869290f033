"""What kernels share whose launches hold many images of different sizes and numbers of queries.

A launch has a header, one row of numbers an image, and tables of bilinear taps, which images of one size share; all of
it travels to the device in one pinned tensor. Taps come from the host, read off `F.interpolate` itself
(`reference.bilinear_taps`): its float32 coordinates are rounded in ways that a formula here might miss.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import DTYPES

Size = tuple[int, int]  # height, width

# ---- in kernels ----


@triton.jit
def image_of(header_ptr, images, tile, FIELDS: tl.constexpr):
    """The image that program `tile` belongs to: the last one whose first tile, its first field, is not above it."""
    low = tile * 0
    high = low + images
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(header_ptr + middle * FIELDS) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def plane_offset(plane, stride):
    """Where a plane starts, in int64: a batch of planes can pass 2^31 elements, one plane cannot."""
    return plane.to(tl.int64) * stride


@triton.jit
def load_taps(tables_ptr, weights_ptr, table, size, index, mask):
    """Bilinear taps at positions `index` of a table of `size`: two source indices and their weights."""
    low = tl.load(tables_ptr + table + index, mask=mask, other=0)
    low_weight = tl.load(weights_ptr + table + size + index, mask=mask, other=0.0)
    high_weight = tl.load(weights_ptr + table + 2 * size + index, mask=mask, other=0.0)
    high = low + (high_weight != 0).to(tl.int32)  # without weight there may be no such row
    return low, high, low_weight, high_weight


@triton.jit
def sample(plane_ptr, top, bottom, left, right, top_weight, bottom_weight, left_weight, right_weight, mask):
    """A plane at a tile of bilinear positions [BLOCK_H, BLOCK_W], in float32, across and then down.

    top and bottom are offsets [BLOCK_H, 1], left and right [1, BLOCK_W].
    """
    top_left = tl.load(plane_ptr + (top + left), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_W]
    top_right = tl.load(plane_ptr + (top + right), mask=mask, other=0.0).to(tl.float32)
    bottom_left = tl.load(plane_ptr + (bottom + left), mask=mask, other=0.0).to(tl.float32)
    bottom_right = tl.load(plane_ptr + (bottom + right), mask=mask, other=0.0).to(tl.float32)
    above = top_left * left_weight + top_right * right_weight  # [BLOCK_H, BLOCK_W]
    below = bottom_left * left_weight + bottom_right * right_weight
    return above * top_weight + below * bottom_weight


# ---- tables ----


@lru_cache(maxsize=256)
def taps_table(size_in: int, size_out: int) -> np.ndarray:
    """The taps of one axis of a bilinear resize, int32 [3, size_out]: the lower index, and the bits of both weights."""
    taps = reference.bilinear_taps(size_in, size_out, torch.float32, torch.device("cpu"))
    weights = (weight.numpy().view(np.int32) for weight in (taps.low_weight, taps.high_weight))
    return np.stack([taps.low.numpy().astype(np.int32), *weights])


class Tables:
    """The tables of a batch, packed, each different one once, so that they reach the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._offsets: dict[Hashable, int] = {}
        self._size = 0

    def place(self, key: Hashable, array: np.ndarray) -> int:
        """The offset of an int32 array, added if `key` is new."""
        if key not in self._offsets:
            self._offsets[key] = self._size
            self._arrays.append(array.ravel())
            self._size += array.size
        return self._offsets[key]

    def send(self, header: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The header as int64, and the tables as int32 and, the same memory, as float32: views of one tensor."""
        fields = np.asarray(header, np.int64).ravel().view(np.int32)
        packed = torch.from_numpy(np.concatenate([fields, *self._arrays]))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        tables = packed[fields.size :]
        return packed[: fields.size].view(torch.int64), tables, tables.view(torch.float32)


# ---- arguments of launchers ----


def pairs(name: str, sizes: Sequence[int], count: int) -> list[Size]:
    """[h0, w0, h1, w1, ...] as pairs.

    Raises:
        ValueError: not `count` of them, a side below 1, or more than 2^31 - 1 pixels.
    """
    found = list(zip(sizes[::2], sizes[1::2], strict=False))
    if len(sizes) != 2 * count or not all(h >= 1 and w >= 1 and h * w < 2**31 for h, w in found):
        raise ValueError(f"{name} must be {count} times height, width of 1 to 2^31 - 1 pixels, got {list(sizes)}")
    return found


def check_masks(masks: Tensor, counts: Sequence[int]) -> None:
    """Raises ValueError if masks are not [N,h,w] with N queries in `counts`, one number for each image."""
    if masks.ndim != 3 or min(counts, default=0) < 0 or sum(counts) != len(masks) or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be [{sum(counts)}, h, w], one for each of counts, got {list(masks.shape)}")


def check_crop(name: str, size: Size, source: Size) -> None:
    """Raises ValueError if an image, `source`, is larger than the `size` that it is at the top left of."""
    if source[0] > size[0] or source[1] > size[1]:
        raise ValueError(f"processed must lie within {name} {size}, got {source}")


def strided_masks(masks: Tensor) -> Tensor:
    """`masks` if the kernels can read them as they lie: offsets within a plane are int32.

    Raises:
        TypeError: a dtype that the kernels do not compute in.
    """
    if masks.dtype not in DTYPES:
        raise TypeError(f"masks must be float16, bfloat16 or float32, got {masks.dtype}")
    _, height, width = masks.shape
    within = (height - 1) * masks.stride(1) + (width - 1) * masks.stride(2) < 2**31
    return masks if within else masks.contiguous()


def tiles_of(height: int, width: int, block_h: int, block_w: int) -> int:
    return triton.cdiv(height, block_h) * triton.cdiv(width, block_w)
