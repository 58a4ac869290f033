"""Mask logits [N,h,w] to the binary masks of many images of different sizes, at their original sizes, in one launch.

facebookresearch/detr resizes the logits to the padded batch, takes sigmoid > threshold, crops each image's padding and
resizes to its original size with torch's "nearest" (models/segmentation.py, PostProcessSegm). The last resize picks
pixels, so only those are computed: a program holds a tile of one image's target pixels, loads the bilinear taps of its
rows and columns once, and walks over the image's queries with four loads, a comparison and one byte written for each.

What it saves: for K masks at 800x1066 the plain definition writes and reads K * 3.4 MB of float logits, again for the
sigmoid, K * 0.85 MB of booleans, and all that again for the crop and the resize; about 17 MB a mask. Here a mask costs
its logits, 107 KB in 16 bits at 200x267, and its target, 307 KB at 640x480. 11 FLOP a pixel: bound by loads from L1.
The sigmoid is not computed: it rises, so it exceeds t where the logit exceeds log(t / (1 - t)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import Build, Target, build, config_for, device_of, dtypes_on, operation
from detr_fast.kernels.ragged import (
    Size,
    Tables,
    check_crop,
    check_masks,
    image_of,
    load_taps,
    pairs,
    plane_offset,
    sample,
    strided_masks,
    taps_table,
    tiles_of,
)

# Fields of an image in the header, int64 [images, FIELDS]. Tables are int32, and these their offsets.
FIELDS = tl.constexpr(8)
FIRST_TILE = tl.constexpr(0)  # of the image among all programs
COUNT = tl.constexpr(1)  # queries
FIRST = tl.constexpr(2)  # the first of them
HEIGHT = tl.constexpr(3)  # of the target
WIDTH = tl.constexpr(4)
ROWS = tl.constexpr(5)  # table: taps of the target's rows
COLUMNS = tl.constexpr(6)  # table: taps of its columns
OUT = tl.constexpr(7)  # offset of its masks in the output


# gathers gain nothing from what is known of strides and sizes, and each fact would be one more build
@triton.jit(do_not_specialize=["images", "stride_mn", "stride_mh", "stride_mw"])
def upsample_kernel(
    masks_ptr,
    header_ptr,
    tables_ptr,
    weights_ptr,
    out_ptr,
    stride_mn,
    stride_mh,
    stride_mw,
    images,
    cutoff,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PLANES: tl.constexpr,
):
    """A tile of target pixels of up to PLANES queries of one image: whether their logits are above cutoff."""
    pid = tl.program_id(0)
    image = image_of(header_ptr, images, pid, FIELDS)
    header_ptr += image * FIELDS
    tile = pid - tl.load(header_ptr + FIRST_TILE).to(tl.int32)
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    height = tl.load(header_ptr + HEIGHT).to(tl.int32)
    width = tl.load(header_ptr + WIDTH).to(tl.int32)
    across = tl.cdiv(width, BLOCK_W)
    down = tl.cdiv(height, BLOCK_H)
    start = tile // (across * down) * PLANES

    row = tile // across % down * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row_table = tl.load(header_ptr + ROWS).to(tl.int32)
    column_table = tl.load(header_ptr + COLUMNS).to(tl.int32)
    top, bottom, top_weight, bottom_weight = load_taps(
        tables_ptr, weights_ptr, row_table, height, row, row < height
    )  # [BLOCK_H]
    left, right, left_weight, right_weight = load_taps(
        tables_ptr, weights_ptr, column_table, width, column, column < width
    )  # [BLOCK_W]
    mask = (row < height)[:, None] & (column < width)[None, :]  # [BLOCK_H, BLOCK_W]
    pixel = row[:, None] * width + column[None, :]  # [BLOCK_H, BLOCK_W]
    out_ptr += tl.load(header_ptr + OUT)
    for k in range(start, tl.minimum(start + PLANES, count)):
        value = sample(
            masks_ptr + plane_offset(first + k, stride_mn),
            top[:, None] * stride_mh,
            bottom[:, None] * stride_mh,
            left[None, :] * stride_mw,
            right[None, :] * stride_mw,
            top_weight[:, None],
            bottom_weight[:, None],
            left_weight[None, :],
            right_weight[None, :],
            mask,
        )  # [BLOCK_H, BLOCK_W]
        # `first * 0` makes k a tensor: in Triton's interpreter a loop counts in Python's integers
        plane_ptr = out_ptr + plane_offset(first * 0 + k, height * width)
        tl.store(plane_ptr + pixel, (value > cutoff).to(tl.uint8), mask=mask)


# ---- configurations ----


class Config(NamedTuple):
    """A tile of BLOCK_H x BLOCK_W target pixels for up to `planes` queries."""

    block_h: int
    block_w: int
    planes: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_H": self.block_h, "BLOCK_W": self.block_w, "PLANES": self.planes}


# Read off builds, untimed until a GPU is at hand: four pixels a thread keep the 16 loads of a query in flight in at
# most 80 registers, which leaves room for 6 blocks a multiprocessor; 64 columns of a byte are whole sectors. A
# wavefront of gfx942 is 64 lanes, so that two hold the same tile.
CONFIGS: dict[Target, Config] = {70: Config(8, 64, 16, 4), "gfx942": Config(8, 64, 16, 2)}


# ---- launcher ----


@lru_cache(maxsize=256)
def nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """The source index of each pixel under torch's "nearest" resize, int64 [size_out]."""
    index = torch.arange(size_in, dtype=torch.float32, device="cpu")
    return F.interpolate(index[None, None], size=size_out, mode="nearest")[0, 0].long().numpy()


def cutoff_of(threshold: float) -> float:
    """The logit whose sigmoid is `threshold`."""
    if threshold in (0, 1):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1 - threshold))


def mask_upsample_size(counts: Sequence[int], targets: Sequence[Size]) -> int:
    return sum(count * height * width for count, (height, width) in zip(counts, targets, strict=True))


def launch_mask_upsample(
    masks: Tensor,
    counts: Sequence[int],
    padded: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    threshold: float,
) -> Tensor:
    """Runs the kernel. Arguments, outcome and errors as `mask_upsample`'s."""
    sides, sources, targets = _check(masks, counts, padded, processed, target, threshold)
    masks = strided_masks(masks)
    out = torch.empty(mask_upsample_size(counts, targets), dtype=torch.uint8, device=masks.device)
    if out.numel() == 0:
        return out
    config = config_for(CONFIGS, device_of(masks.device).target)
    tables, header, tiles, first, offset = Tables(), [], 0, 0, 0
    for count, source, size in zip(counts, sources, targets, strict=True):
        places = []
        for axis in zip(masks.shape[1:], sides, source, size, strict=True):
            mask_side, padded_side, source_side, target_side = axis
            picked = taps_table(mask_side, padded_side)[:, nearest_indices(source_side, target_side)]
            places.append(tables.place(axis, picked))
        header.append([tiles, count, first, *size, *places, offset])
        tiles += tiles_of(*size, config.block_h, config.block_w) * triton.cdiv(count, config.planes)
        first, offset = first + count, offset + count * size[0] * size[1]
    with torch.cuda.device_of(masks):
        upsample_kernel[(tiles,)](
            *(masks, *tables.send(header, masks.device), out),
            *(*masks.stride(), len(header), cutoff_of(threshold)),
            **config.blocks,
            num_warps=config.num_warps,
        )
    return out


def _check(
    masks: Tensor,
    counts: Sequence[int],
    padded: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    threshold: float,
) -> tuple[Size, list[Size], list[Size]]:
    """`mask_upsample`'s sizes in pairs, and its errors."""
    check_masks(masks, counts)
    (sides,) = pairs("padded", padded, 1)
    sources, targets = pairs("processed", processed, len(counts)), pairs("target", target, len(counts))
    for source in sources:
        check_crop("padded", sides, source)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return sides, sources, targets


# ---- operation ----


@operation("mask_upsample", launch_mask_upsample)
def mask_upsample(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    """Binary masks at each image's original size: `reference.mask_upsample` of each image.

    Args:
        masks: mask logits [N,h,w] over the padded batch, the queries of image 0 first.
        counts: queries of each of the B images, N in sum.
        padded: [height, width] of the batch, to which the logits are resized.
        processed: [h0, w0, h1, w1, ...], each image without its padding.
        target: [H0, W0, ...], the original sizes.
        threshold: probability above which a pixel belongs to the mask.

    Returns: uint8 of 0 and 1: [counts[i], H_i, W_i] of each image, flat, one after the other.

    Raises:
        TypeError, ValueError: shapes or sizes that do not fit; on a GPU, another dtype than float16, bfloat16, float32.
    """
    sides, sources, targets = _check(masks, counts, padded, processed, target, threshold)
    parts = [masks.new_empty(0, dtype=torch.uint8)]
    for logits, source, size in zip(masks.split(list(counts)), sources, targets, strict=True):
        if len(logits):
            parts.append(reference.mask_upsample(logits, sides, source, size, threshold).flatten())
    return torch.cat(parts)


@mask_upsample.register_fake
def _(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    return masks.new_empty(mask_upsample_size(counts, pairs("target", target, len(counts))), dtype=torch.uint8)


# ---- builds ----


def builds(target: Target) -> list[Build]:
    """The configuration that the launcher chooses on `target`, for each dtype."""
    config = config_for(CONFIGS, target)
    integers = {"header_ptr": "*i64", "tables_ptr": "*i32", "out_ptr": "*u8", "cutoff": "fp32"}
    return [
        build(
            f"mask_upsample-{dtype}",
            upsample_kernel,
            {"masks_ptr": f"*{dtype}", **integers},
            config.blocks,
            num_warps=config.num_warps,
        )
        for dtype in dtypes_on(target).values()
    ]
