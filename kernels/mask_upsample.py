"""Mask logits [N,h,w] to larger masks: binary ones of many images of different sizes in one launch, or float ones.

Binary: facebookresearch/detr resizes the logits to the padded batch, takes sigmoid > threshold, crops each image's
padding and resizes to its original size with torch's "nearest" (models/segmentation.py, PostProcessSegm). The last
resize picks pixels, so only those are computed: a program holds a tile of one image's target pixels, loads the bilinear
taps of its rows and columns once, and walks over the image's queries with four loads, a comparison and one byte written
for each.

What it saves: for K masks at 800x1066 the plain definition writes and reads K * 3.4 MB of float logits, again for the
sigmoid, K * 0.85 MB of booleans, and all that again for the crop and the resize; about 17 MB a mask. Here a mask costs
its logits, 107 KB in 16 bits at 200x267, and its target, 307 KB at 640x480. 11 FLOP a pixel: bound by loads from L1.
The sigmoid is not computed: it rises, so it exceeds t where the logit exceeds log(t / (1 - t)).

Float: the same kernel for `pred_masks` at the image's size, forward, and a backward that gathers (each input pixel sums
over the output pixels that it was a tap of), so that its sums have one order where PyTorch's use atomics.

Taps come from the host, read off `F.interpolate` itself (`reference.bilinear_taps`): its float32 coordinates are rounded
in ways that a formula here might miss. All tables and sizes of a batch travel in one pinned tensor.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.build import Build

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
    """A plane at a tile of bilinear positions, in float32, across and then down as `detr_fast.merge` does.

    top and bottom are offsets [BLOCK_H, 1], left and right [1, BLOCK_W].
    """
    top_left = tl.load(plane_ptr + (top + left), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_W]
    top_right = tl.load(plane_ptr + (top + right), mask=mask, other=0.0).to(tl.float32)
    bottom_left = tl.load(plane_ptr + (bottom + left), mask=mask, other=0.0).to(tl.float32)
    bottom_right = tl.load(plane_ptr + (bottom + right), mask=mask, other=0.0).to(tl.float32)
    above = top_left * left_weight + top_right * right_weight  # [BLOCK_H, BLOCK_W]
    below = bottom_left * left_weight + bottom_right * right_weight
    return above * top_weight + below * bottom_weight


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
    BINARY: tl.constexpr,
):
    """A tile of target pixels of up to PLANES queries of one image: its logits, or whether they are above cutoff."""
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
        if BINARY:
            value = (value > cutoff).to(tl.uint8)
        # `first * 0` makes k a tensor: in Triton's interpreter a loop counts in Python's integers
        plane_ptr = out_ptr + plane_offset(first * 0 + k, height * width)
        tl.store(plane_ptr + pixel, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["planes", "height", "width", "out_height", "out_width", "row_span", "column_span"])
def resize_backward_kernel(
    grad_ptr,
    tables_ptr,
    weights_ptr,
    out_ptr,
    planes,
    height,
    width,
    out_height,
    out_width,
    row_span,
    column_span,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PLANES: tl.constexpr,
):
    """A tile of the gradient at the low resolution [planes, out_height, out_width], from that at [height, width].

    Tables for rows, then columns: for each index the first position that it is a tap of, and `span` weights from there.
    """
    pid = tl.program_id(0)
    across = tl.cdiv(out_width, BLOCK_W)
    down = tl.cdiv(out_height, BLOCK_H)
    row = pid // across % down * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = pid % across * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row_mask = row < out_height
    column_mask = column < out_width
    start = pid // (across * down) * PLANES
    columns_table = out_height * (1 + row_span)
    top = tl.load(tables_ptr + row, mask=row_mask, other=0)  # [BLOCK_H]
    left = tl.load(tables_ptr + columns_table + column, mask=column_mask, other=0)  # [BLOCK_W]
    row_table = out_height + row * row_span  # [BLOCK_H]
    column_table = columns_table + out_width + column * column_span  # [BLOCK_W]
    pixel = row[:, None] * out_width + column[None, :]  # [BLOCK_H, BLOCK_W]

    for plane in range(start, tl.minimum(start + PLANES, planes)):
        plane_ptr = grad_ptr + plane_offset(start * 0 + plane, height * width)
        total = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)  # [BLOCK_H, BLOCK_W]
        for i in range(row_span):
            row_weight = tl.load(weights_ptr + (row_table + i), mask=row_mask, other=0.0)  # [BLOCK_H]
            line = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)  # [BLOCK_H, BLOCK_W]
            for j in range(column_span):
                column_weight = tl.load(weights_ptr + (column_table + j), mask=column_mask, other=0.0)  # [BLOCK_W]
                inside = (row_weight != 0)[:, None] & (column_weight != 0)[None, :]  # no weight: perhaps outside
                offset = (top + i)[:, None] * width + (left + j)[None, :]  # [BLOCK_H, BLOCK_W]
                grad = tl.load(plane_ptr + offset, mask=inside, other=0.0).to(tl.float32)
                line += grad * column_weight[None, :]
            total += line * row_weight[:, None]
        out = out_ptr + plane_offset(start * 0 + plane, out_height * out_width) + pixel
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


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
CONFIGS: dict[int | str, Config] = {
    70: Config(8, 64, 16, 4),
    75: Config(8, 64, 16, 4),
    80: Config(8, 64, 16, 4),
    86: Config(8, 64, 16, 4),
    89: Config(8, 64, 16, 4),
    90: Config(8, 64, 16, 4),
    100: Config(8, 64, 16, 4),
    "gfx942": Config(8, 64, 16, 2),
}
# The gradient sums over a window at each pixel: with four of those a thread Triton 3.6 spills, with two none does.
GRADIENT_CONFIGS = {target: config._replace(block_h=4) for target, config in CONFIGS.items()}


def config_for(target: int | str, configs: dict[int | str, Any] = CONFIGS) -> Any:
    """The configuration of the nearest target that is not newer: a capability as 80, or a gfx architecture."""
    if isinstance(target, str):
        return configs["gfx942"]
    known = sorted(key for key in configs if isinstance(key, int))
    return configs[max([key for key in known if key <= target], default=known[0])]


def target_of(device: torch.device) -> int | str:
    """The capability of a CUDA device as 80, the architecture of a ROCm device; 80 for the interpreter on a CPU."""
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# ---- tables ----


@lru_cache(maxsize=256)
def taps_table(size_in: int, size_out: int) -> np.ndarray:
    """The taps of one axis of a bilinear resize, int32 [3, size_out]: the lower index, and the bits of both weights."""
    taps = reference.bilinear_taps(size_in, size_out, torch.float32, torch.device("cpu"))
    weights = (weight.numpy().view(np.int32) for weight in (taps.low_weight, taps.high_weight))
    return np.stack([taps.low.numpy().astype(np.int32), *weights])


@lru_cache(maxsize=256)
def nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """The source index of each pixel under torch's "nearest" resize, int64 [size_out]."""
    index = torch.arange(size_in, dtype=torch.float32, device="cpu")
    return F.interpolate(index[None, None], size=size_out, mode="nearest")[0, 0].long().numpy()


@lru_cache(maxsize=256)
def reverse_taps_table(size_in: int, size_out: int) -> tuple[np.ndarray, int]:
    """The taps of one axis, seen from the input: int32 [size_in * (1 + span)], and span.

    For each input index the first output position that it is a tap of; then for each, the bits of the `span` weights
    that it has from there on, 0 where it is no tap.
    """
    low, *weights = taps_table(size_in, size_out)
    low_weight, high_weight = (weight.view(np.float32) for weight in weights)
    dense = np.zeros((size_in, size_out), np.float32)
    positions = np.arange(size_out)
    dense[low, positions] = low_weight
    dense[np.minimum(low + 1, size_in - 1), positions] += high_weight
    seen = dense != 0
    start = seen.argmax(1)
    span = int((size_out - seen[:, ::-1].argmax(1) - start)[seen.any(1)].max())
    columns = start[:, None] + np.arange(span)
    values = np.where(columns < size_out, np.take_along_axis(dense, np.minimum(columns, size_out - 1), 1), 0)
    return np.concatenate([start.astype(np.int32), values.astype(np.float32).view(np.int32).ravel()]), span


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


# ---- launchers ----

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pairs(name: str, sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
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


def check_crop(name: str, size: tuple[int, int], source: tuple[int, int]) -> None:
    """Raises ValueError if an image, `source`, is larger than the `size` that it is at the top left of."""
    if source[0] > size[0] or source[1] > size[1]:
        raise ValueError(f"processed must lie within {name} {size}, got {source}")


Size = tuple[int, int]


def _check(
    masks: Tensor,
    counts: Sequence[int],
    padded: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    threshold: float,
) -> tuple[Size, list[Size], list[Size]]:
    """`mask_upsample`'s sizes in pairs. Raises what that says."""
    check_masks(masks, counts)
    (sides,) = pairs("padded", padded, 1)
    sources, targets = pairs("processed", processed, len(counts)), pairs("target", target, len(counts))
    for source in sources:
        check_crop("padded", sides, source)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return sides, sources, targets


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


def tiles_of(height: int, width: int, config: Any) -> int:
    return triton.cdiv(height, config.block_h) * triton.cdiv(width, config.block_w)


def cutoff_of(threshold: float) -> float:
    """The logit whose sigmoid is `threshold`."""
    if threshold in (0, 1):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1 - threshold))


def mask_upsample_size(counts: Sequence[int], targets: Sequence[tuple[int, int]]) -> int:
    return sum(count * height * width for count, (height, width) in zip(counts, targets, strict=True))


def launch_mask_upsample(
    masks: Tensor,
    counts: Sequence[int],
    padded: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    threshold: float,
) -> Tensor:
    """`mask_upsample` by the kernel, on a GPU or in Triton's interpreter."""
    sides, sources, targets = _check(masks, counts, padded, processed, target, threshold)
    masks = strided_masks(masks)
    out = torch.empty(mask_upsample_size(counts, targets), dtype=torch.uint8, device=masks.device)
    config = config_for(target_of(masks.device))
    tables, header, tiles, first, offset = Tables(), [], 0, 0, 0
    for count, source, size in zip(counts, sources, targets, strict=True):
        places = []
        for axis in zip(masks.shape[1:], sides, source, size, strict=True):
            mask_side, padded_side, source_side, target_side = axis
            picked = taps_table(mask_side, padded_side)[:, nearest_indices(source_side, target_side)]
            places.append(tables.place(axis, picked))
        header.append([tiles, count, first, *size, *places, offset])
        tiles += tiles_of(*size, config) * triton.cdiv(count, config.planes)
        first, offset = first + count, offset + count * size[0] * size[1]
    _upsample(masks, tables, header, tiles, out, cutoff_of(threshold), config, binary=True)
    return out


def launch_bilinear_resize(masks: Tensor, height: int, width: int) -> Tensor:
    """`bilinear_resize` by the kernel, on a GPU or in Triton's interpreter."""
    check_masks(masks, [len(masks)])
    pairs("height, width", [height, width], 1)
    masks = strided_masks(masks)
    out = torch.empty((len(masks), height, width), dtype=masks.dtype, device=masks.device)
    config = config_for(target_of(masks.device))
    tables = Tables()
    axes = zip(masks.shape[1:], (height, width), strict=True)
    places = [tables.place(axis, taps_table(*axis)) for axis in axes]
    tiles = tiles_of(height, width, config) * triton.cdiv(len(masks), config.planes)
    header = [[0, len(masks), 0, height, width, *places, 0]]
    _upsample(masks, tables, header, tiles, out, 0.0, config, binary=False)
    return out


def _upsample(
    masks: Tensor,
    tables: Tables,
    header: list[list[int]],
    tiles: int,
    out: Tensor,
    cutoff: float,
    config: Config,
    *,
    binary: bool,
) -> None:
    if tiles == 0:
        return
    with torch.cuda.device_of(masks):
        upsample_kernel[(tiles,)](
            masks,
            *tables.send(header, masks.device),
            out,
            *masks.stride(),
            len(header),
            cutoff,
            **config.blocks,
            BINARY=binary,
            num_warps=config.num_warps,
        )


def launch_bilinear_resize_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """`bilinear_resize_backward` by the kernel, on a GPU or in Triton's interpreter."""
    check_masks(grad, [len(grad)])
    grad = strided_masks(grad).contiguous()
    out = torch.empty((len(grad), height, width), dtype=grad.dtype, device=grad.device)
    config = config_for(target_of(grad.device), GRADIENT_CONFIGS)
    tiles = tiles_of(height, width, config) * triton.cdiv(len(grad), config.planes)
    if tiles == 0:
        return out
    (rows, row_span), (columns, column_span) = (
        reverse_taps_table(*axis) for axis in zip((height, width), grad.shape[1:], strict=True)
    )
    tables = Tables()
    tables.place("rows", rows)
    tables.place("columns", columns)
    _, integers, floats = tables.send([], grad.device)
    with torch.cuda.device_of(grad):
        resize_backward_kernel[(tiles,)](
            grad,
            integers,
            floats,
            out,
            *grad.shape,
            height,
            width,
            row_span,
            column_span,
            **config.blocks,
            num_warps=config.num_warps,
        )
    return out


# ---- operations ----


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, in float32 at least."""
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    return F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@torch.library.custom_op("detr_fast::mask_upsample", mutates_args=())
def mask_upsample(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    """Binary masks at each image's original size: `PostProcessSegm` of facebookresearch/detr.

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
            large = _resized(logits, sides)
            above = (large.sigmoid() > threshold)[:, : source[0], : source[1]].to(torch.uint8)
            parts.append(F.interpolate(above[:, None], size=size, mode="nearest").flatten())
    return torch.cat(parts)


mask_upsample.register_kernel("cuda")(launch_mask_upsample)


@mask_upsample.register_fake
def _(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    return masks.new_empty(mask_upsample_size(counts, pairs("target", target, len(counts))), dtype=torch.uint8)


@torch.library.custom_op("detr_fast::bilinear_resize", mutates_args=())
def bilinear_resize(masks: Tensor, height: int, width: int) -> Tensor:
    """`F.interpolate(mode="bilinear", align_corners=False)` of masks [N,h,w] to [N,height,width], in float32 inside.

    Raises:
        TypeError, ValueError: shapes or sizes that do not fit; on a GPU, another dtype than float16, bfloat16, float32.
    """
    check_masks(masks, [len(masks)])
    if len(masks) == 0:
        return masks.new_empty((0, height, width))
    return _resized(masks, (height, width)).to(masks.dtype).contiguous()


bilinear_resize.register_kernel("cuda")(launch_bilinear_resize)


@bilinear_resize.register_fake
def _(masks: Tensor, height: int, width: int) -> Tensor:
    return masks.new_empty((masks.shape[0], height, width))


@torch.library.custom_op("detr_fast::bilinear_resize_backward", mutates_args=())
def bilinear_resize_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """The gradient [N,height,width] of what `bilinear_resize` read, from that of what it returned, [N,H,W]."""
    if len(grad) == 0:
        return grad.new_empty((0, height, width))
    size, dtype = [1, len(grad), height, width], torch.promote_types(grad.dtype, torch.float32)
    large = grad.to(dtype).contiguous()
    low = torch.ops.aten.upsample_bilinear2d_backward(large[None], list(grad.shape[1:]), size, False)[0]
    return low.to(grad.dtype).contiguous()


bilinear_resize_backward.register_kernel("cuda")(launch_bilinear_resize_backward)


@bilinear_resize_backward.register_fake
def _(grad: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty((grad.shape[0], height, width))


def _save_size(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.size = inputs[0].shape[1:]


def _resize_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return bilinear_resize_backward(grad, *ctx.size), None, None


bilinear_resize.register_autograd(_resize_gradient, setup_context=_save_size)


# ---- builds ----


def dtypes_of(target: int | str) -> tuple[str, ...]:
    """bfloat16 needs sm_80."""
    return ("fp16", "fp32") if isinstance(target, int) and target < 80 else ("fp16", "bf16", "fp32")


def builds(target: int | str) -> list[Build]:
    """Every configuration that the launchers choose on `target`."""
    config, gradient = config_for(target), config_for(target, GRADIENT_CONFIGS)
    found = []
    for dtype in dtypes_of(target):
        tables = {"tables_ptr": "*i32", "weights_ptr": "*fp32"}
        for binary in (True, False):
            constexprs = {**config.blocks, "BINARY": binary}
            signature = {
                "masks_ptr": f"*{dtype}",
                "header_ptr": "*i64",
                **tables,
                "out_ptr": "*u8" if binary else f"*{dtype}",
                "stride_mn": "i32",
                "stride_mh": "i32",
                "stride_mw": "i32",
                "images": "i32",
                "cutoff": "fp32",
                **{name: "constexpr" for name in constexprs},
            }
            pointers = tuple(name for name in signature if name.endswith("_ptr"))
            name = f"{'mask_upsample' if binary else 'bilinear_resize'}-{dtype}"
            found.append(Build(name, upsample_kernel, signature, constexprs, config.num_warps, 3, pointers, False))
        sizes = ("planes", "height", "width", "out_height", "out_width", "row_span", "column_span")
        signature = {
            "grad_ptr": f"*{dtype}",
            **tables,
            "out_ptr": f"*{dtype}",
            **{name: "i32" for name in sizes},
            **{name: "constexpr" for name in gradient.blocks},
        }
        pointers = tuple(name for name in signature if name.endswith("_ptr"))
        name = f"bilinear_resize_backward-{dtype}"
        found.append(
            Build(name, resize_backward_kernel, signature, gradient.blocks, gradient.num_warps, 3, pointers, False)
        )
    return found
