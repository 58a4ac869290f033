"""The mask head between two convolutions, fused: relu(GroupNorm(x)), upsampled, plus the image's feature map.

Everything is channels_last, as the convolutions leave it. Three kernels. Statistics: a program walks down a strip of
pixels with Welford's update (1962), never E[x^2] - E[x]^2, for each channel by itself, as the channels of a group lie
too close together to be loaded apart. Combine: strips and channels to the mean and deviation of each group (Chan et
al. 1979), in one order whatever the batch, so that an image's masks do not depend on its neighbours. Apply: a program
loads a tile of pixels once, and stores each at its four positions in the upsampled map, added to the feature map
there, which all queries of an image share.

What it saves: the plain definition writes and reads the normalised map, the rectified, the upsampled, and the feature
map repeated for each query; for K queries at 134x134 to 267x267 and 32 channels in 16 bits, 1.1 MB a query low and 4.6
high, that is 23 MB a query. Here x is read twice, once from L2 if K is small, the feature map comes from L2, and the
outcome is written once: 7 MB. 10 FLOP a number, so memory is all that counts.

Source: Carion et al. 2020, figure 8; facebookresearch/detr, models/segmentation.py (`MaskHeadSmallConv.forward`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import Build, Target, build, check_dtypes, dtypes_on, operation


@triton.jit
def plane_offset(plane, pixels, CHANNELS: tl.constexpr):
    """Where plane `plane` starts, in int64: a batch of planes can pass 2^31 numbers, one plane cannot."""
    return plane.to(tl.int64) * pixels * CHANNELS


@triton.jit(do_not_specialize=["pixels", "strips"])
def statistics_kernel(
    x_ptr,
    parts_ptr,
    pixels,
    strips,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean and sum of squared deviations of BLOCK_C channels over a strip of pixels: parts [N, strips, 2, C]."""
    pid = tl.program_id(0)
    blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = pid // blocks  # n * strips + strip
    first = part % strips * (BLOCK_P * STEPS)
    p = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x_ptr += plane_offset(part // strips, pixels, CHANNELS) + first.to(tl.int64) * CHANNELS
    left = pixels - first

    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)  # [BLOCK_P, BLOCK_C]
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)  # [BLOCK_P, BLOCK_C]
    for step in range(STEPS):
        row = step * BLOCK_P + p  # [BLOCK_P]
        mask = (row < left)[:, None] & (c < CHANNELS)[None, :]  # [BLOCK_P, BLOCK_C]
        x = tl.load(x_ptr + row[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0).to(tl.float32)
        change = tl.where(mask, x - mean, 0.0)  # [BLOCK_P, BLOCK_C]
        mean += change * (1.0 / (step + 1))  # a row that is masked stays masked, so others were seen at every step
        squares += change * (x - mean)

    count = tl.minimum(tl.maximum((left - p + BLOCK_P - 1) // BLOCK_P, 0), STEPS).to(tl.float32)  # [BLOCK_P]
    total = tl.sum(count, 0)
    near = tl.sum(mean * count[:, None], 0) / total  # [BLOCK_C], the mean but for the rounding of a large sum
    apart = mean - near[None, :]  # [BLOCK_P, BLOCK_C]
    rest = tl.sum(apart * count[:, None], 0) / total  # [BLOCK_C]
    channel_mean = near + rest  # [BLOCK_C]
    channel_squares = tl.sum(squares + apart * apart * count[:, None], 0) - rest * rest * total  # [BLOCK_C]
    parts_ptr += part.to(tl.int64) * 2 * CHANNELS
    tl.store(parts_ptr + c, channel_mean, mask=c < CHANNELS)
    tl.store(parts_ptr + CHANNELS + c, channel_squares, mask=c < CHANNELS)


@triton.jit
def load_parts(
    parts_ptr,
    pixels,
    strips,
    start,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Of BLOCK_S strips: means, sums of squared deviations, counts of pixels (0 off the parts) [BLOCK_S, BLOCK_G]."""
    s = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    c = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    mask = (s < strips)[:, None] & (c < GROUP)[None, :]  # [BLOCK_S, BLOCK_G]
    ptrs = parts_ptr + s[:, None] * (2 * CHANNELS) + c[None, :]  # [BLOCK_S, BLOCK_G]
    mean = tl.load(ptrs, mask=mask, other=0.0)
    squares = tl.load(ptrs + CHANNELS, mask=mask, other=0.0)
    count = tl.minimum(pixels - s * STRIP, STRIP).to(tl.float32)  # [BLOCK_S]
    return mean, squares, tl.where(mask, count[:, None], 0.0)


@triton.jit(do_not_specialize=["pixels", "strips"])
def combine_kernel(
    parts_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    strips,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group of GROUP channels from its parts; strips have STRIP pixels."""
    pid = tl.program_id(0)  # n * groups + group
    groups: tl.constexpr = CHANNELS // GROUP
    parts_ptr += plane_offset(pid // groups, strips * 2, CHANNELS) + pid % groups * GROUP
    size = pixels.to(tl.float32) * GROUP

    total = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)  # [BLOCK_S, BLOCK_G]
    for start in range(0, strips, BLOCK_S):
        part, _, count = load_parts(parts_ptr, pixels, strips, start, CHANNELS, GROUP, STRIP, BLOCK_S, BLOCK_G)
        total += part * count
    near = tl.sum(tl.sum(total, 1), 0) / size  # the mean but for the rounding of a large sum

    rest = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)  # [BLOCK_S, BLOCK_G]
    total = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)  # [BLOCK_S, BLOCK_G]
    for start in range(0, strips, BLOCK_S):
        part, squares, count = load_parts(parts_ptr, pixels, strips, start, CHANNELS, GROUP, STRIP, BLOCK_S, BLOCK_G)
        rest += (part - near) * count
        total += squares + (part - near) * (part - near) * count
    shift = tl.sum(tl.sum(rest, 1), 0) / size
    variance = tl.sum(tl.sum(total, 1), 0) / size - shift * shift
    tl.store(mean_ptr + pid, near + shift)
    tl.store(rstd_ptr + pid, tl.rsqrt(variance + eps))


@triton.jit(do_not_specialize=["pixels", "source_width", "height", "width"])
def apply_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    shared_ptr,
    image_ptr,
    out_ptr,
    pixels,
    source_width,
    height,
    width,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_P source pixels, each stored UP x UP times where the target [height, width] has a place for it."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(pixels, BLOCK_P)
    n = pid // (blocks * tiles)
    p = pid // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channel = c < CHANNELS  # [BLOCK_C]
    mask = (p < pixels)[:, None] & channel[None, :]  # [BLOCK_P, BLOCK_C]
    x_ptr += plane_offset(n, pixels, CHANNELS)
    x = tl.load(x_ptr + p[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]

    group = n * (CHANNELS // GROUP) + c // GROUP  # [BLOCK_C]
    mean = tl.load(mean_ptr + group, mask=channel, other=0.0)  # [BLOCK_C]
    rstd = tl.load(rstd_ptr + group, mask=channel, other=0.0)  # [BLOCK_C]
    weight = tl.load(weight_ptr + c, mask=channel, other=0.0).to(tl.float32)  # [BLOCK_C]
    bias = tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)  # [BLOCK_C]
    y = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]  # [BLOCK_P, BLOCK_C]
    y = tl.where(y < 0, 0.0, y)  # as torch's ReLU, and unlike a maximum, this keeps NaN

    out_ptr += plane_offset(n, height * width, CHANNELS)
    if shared_ptr is not None:
        shared_ptr += plane_offset(tl.load(image_ptr + n), height * width, CHANNELS)
    for phase in tl.static_range(UP * UP):
        row = p // source_width * UP + phase // UP  # [BLOCK_P]
        column = p % source_width * UP + phase % UP  # [BLOCK_P]
        inside = mask & (row < height)[:, None] & (column < width)[:, None]  # [BLOCK_P, BLOCK_C]
        tile = (row * width + column)[:, None] * CHANNELS + c[None, :]  # [BLOCK_P, BLOCK_C]
        value = y
        if shared_ptr is not None:
            value += tl.load(shared_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + tile, value.to(out_ptr.dtype.element_ty), mask=inside)


# ---- configuration ----

# Chosen from ahead-of-time builds, without a spill on any target; untimed until a GPU is at hand. 16 numbers a thread
# are two 16-byte loads in flight in 16 bits, four in float32.
TILE = 2048  # numbers in a program's registers: pixels times channels
MAX_CHANNELS = 64  # of them at once: 128 bytes in 16 bits
STEPS = 8  # tiles in a strip of the statistics
COMBINE_TILE = 512  # strips times channels of a group
NUM_WARPS = 4


class Blocks(NamedTuple):
    """The tiles of each kernel for `channels` in groups of `group`."""

    statistics: dict[str, int]
    combine: dict[str, int]
    apply: dict[str, int]


def blocks_for(channels: int, group: int, up: int) -> Blocks:
    block_c = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    block_p = TILE // block_c
    block_g = triton.next_power_of_2(group)
    tile = {"CHANNELS": channels, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return Blocks(
        statistics=tile | {"STEPS": STEPS},
        combine={
            "CHANNELS": channels,
            "GROUP": group,
            "STRIP": block_p * STEPS,
            "BLOCK_S": max(1, COMBINE_TILE // block_g),
            "BLOCK_G": block_g,
        },
        apply=tile | {"GROUP": group, "UP": up},
    )


# ---- launcher ----


def launch_group_norm_relu_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shared: Tensor | None,
    image: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """Runs the kernels. Arguments, outcome and errors as `group_norm_relu_upsample`'s."""
    check_dtypes(x=x, weight=weight, bias=bias, shared=shared)
    up = _checked_factor(x, weight, bias, num_groups, shared, image, height, width)
    n, channels, *size = x.shape
    out = torch.empty((n, height, width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    if out.numel() == 0:
        return out
    blocks = blocks_for(channels, channels // num_groups, up)
    x = x.contiguous(memory_format=torch.channels_last)
    if shared is not None:
        shared = shared.contiguous(memory_format=torch.channels_last)
    if image is not None:
        image = image.contiguous()
    pixels = size[0] * size[1]
    strips = triton.cdiv(pixels, blocks.combine["STRIP"])
    block_c = blocks.apply["BLOCK_C"]
    programs = n * triton.cdiv(channels, block_c)
    parts = torch.empty((n, strips, 2, channels), dtype=torch.float32, device=x.device)
    mean = torch.empty((n, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty((n, num_groups), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        statistics_kernel[(programs * strips,)](
            *(x, parts, pixels, strips),
            **blocks.statistics,
            num_warps=NUM_WARPS,
        )
        combine_kernel[(n * num_groups,)](
            *(parts, mean, rstd, pixels, strips, eps),
            **blocks.combine,
            num_warps=NUM_WARPS,
        )
        apply_kernel[(programs * triton.cdiv(pixels, blocks.apply["BLOCK_P"]),)](
            *(x, mean, rstd, weight.contiguous(), bias.contiguous(), shared, image, out),
            *(pixels, size[1], height, width),
            **blocks.apply,
            num_warps=NUM_WARPS,
        )
    return out


def _checked_factor(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    shared: Tensor | None,
    image: Tensor | None,
    height: int,
    width: int,
) -> int:
    """By how much to upsample, 1 or 2.

    Raises:
        ValueError: shapes and sizes other than `group_norm_relu_upsample` takes.
    """
    n, channels, *size = x.shape
    if channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be [{channels}], got {list(weight.shape)} and {list(bias.shape)}")
    if (shared is None) != (image is None):
        raise ValueError("shared and image must be given together")
    if shared is not None and shared.shape[1:] != (channels, height, width):
        raise ValueError(f"shared must be [B, {channels}, {height}, {width}], got {list(shared.shape)}")
    if image is not None and (image.shape != (n,) or image.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"image must be int32 or int64 [{n}], got {image.dtype} {list(image.shape)}")
    if [height, width] == size:
        return 1
    if all(target in (2 * source, 2 * source - 1) for target, source in zip((height, width), size, strict=True)):
        return 2
    raise ValueError(f"height and width must be {size}, or 2n or 2n - 1 of each n of them, got {[height, width]}")


# ---- operation ----


@operation("group_norm_relu_upsample", launch_group_norm_relu_upsample)
def group_norm_relu_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shared: Tensor | None,
    image: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """relu(GroupNorm(x)), upsampled by torch's "nearest" to (height, width), plus shared[image], differentiable once.

    In float32 at least, rounded once at the end.

    Args:
        x: [N,C,h,w]; other layouts than channels_last are copied, and so for `shared`.
        weight, bias: [C], float32 or as x.
        shared: [B,C,height,width], a feature map for each image, or None.
        image: int32 or int64 [N], which of B each of N belongs to (not checked, and not negative), or None.
        height, width: h and w, or for each n of the two 2n or 2n - 1.

    Returns: [N,C,height,width] in the dtype of x, channels_last.

    Raises:
        TypeError, ValueError: a dtype, shape or size other than these.
    """
    _checked_factor(x, weight, bias, num_groups, shared, image, height, width)
    x = x.contiguous()  # PyTorch's own GroupNorm in channels_last takes E[x^2] - E[x]^2 on a CPU
    y = reference.group_norm_relu_upsample(x, weight, bias, num_groups, eps, shared, image, (height, width))
    return y.contiguous(memory_format=torch.channels_last)


@group_norm_relu_upsample.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shared: Tensor | None,
    image: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    return x.new_empty((x.shape[0], height, width, x.shape[1])).permute(0, 3, 1, 2)


def _normalise(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [N,C,h,w] with mean 0 and variance 1 in each group, in float32 at least, and the factors that did it."""
    groups = x.to(reference.at_least_float32(x.dtype)).unflatten(1, (num_groups, -1))
    groups = groups - groups.mean((2, 3, 4), keepdim=True)
    rstd = (groups.square().mean((2, 3, 4), keepdim=True) + eps).rsqrt()
    return (groups * rstd).flatten(1, 2), rstd.expand(-1, -1, groups.shape[2], 1, 1).flatten(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.num_groups, ctx.eps, shared, image, *_ = inputs
    ctx.save_for_backward(x, weight, bias, shared, image)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In PyTorch: it is the forward that a labeller runs all day."""
    x, weight, bias, shared, image = ctx.saved_tensors
    z, rstd = _normalise(x, ctx.num_groups, ctx.eps)
    grad = grad.to(z.dtype)
    dshared = None
    if shared is not None:
        dshared = grad.new_zeros(shared.shape).index_add(0, image, grad).to(shared.dtype)
    low = torch.ops.aten.upsample_nearest2d_backward(grad, grad.shape[-2:], x.shape)
    weights, biases = (parameter.to(z.dtype)[:, None, None] for parameter in (weight, bias))
    low = torch.where(z * weights + biases > 0, low, 0)

    def group_mean(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (ctx.num_groups, -1))
        return groups.mean((2, 3, 4), keepdim=True).expand(-1, -1, groups.shape[2], 1, 1).flatten(1, 2)

    dz = low * weights
    dx = rstd * (dz - group_mean(dz) - z * group_mean(dz * z))
    dweight, dbias = (low * z).sum((0, 2, 3)), low.sum((0, 2, 3))
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, dshared, None, None, None


group_norm_relu_upsample.register_autograd(_backward, setup_context=_setup_context)


# ---- builds ----

# DETR's mask head: (channels, upsampled), normalised in 8 groups
LAYERS = ((264, False), (128, True), (64, True), (32, True), (16, False))


def builds(target: Target) -> list[Build]:
    """The three kernels at every layer of DETR's mask head, with weights in float32."""
    found = []
    for channels, upsampled in LAYERS:
        blocks = blocks_for(channels, channels // 8, 2 if upsampled else 1)
        absent = {} if upsampled else {"shared_ptr": None, "image_ptr": None}
        launch = {"num_warps": NUM_WARPS}
        found.append(build(f"combine-{channels}", combine_kernel, {"eps": "fp32"}, blocks.combine, **launch))
        for kind in dtypes_on(target).values():
            types = dict.fromkeys(("x_ptr", "out_ptr", "shared_ptr"), f"*{kind}") | {"image_ptr": "*i64"}
            name = f"{kind}-{channels}"
            found.append(build(f"statistics-{name}", statistics_kernel, types, blocks.statistics, **launch))
            found.append(build(f"apply-{name}", apply_kernel, types, {**blocks.apply, **absent}, **launch))
    return found
