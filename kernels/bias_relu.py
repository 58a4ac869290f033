"""What follows a convolution, fused: + bias, + residual, ReLU, and float16's largest number as a limit.

PyTorch's convolutions on CUDA leave all of it to one kernel each: for a residual block's last convolution that is four
passes over the map, 8 transfers a number. Here the map and the residual are read and the outcome is written: 3. A few
FLOP a number, so memory is all that counts.

Everything is channels_last, so a program is a stretch of memory, and a number's channel its place modulo C.

Source: He et al. 2016, figure 5, with the normalisation folded into the convolution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import Build, Target, build, check_dtypes, dtypes_on, operation

LARGEST = tl.constexpr(reference.LARGEST_FLOAT16)

# Numbers a program, and its warps: 16 a thread are two 16-byte loads in flight in 16 bits. Untimed until a GPU is at
# hand, and the same for all targets, as nothing but the transfers matters.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def bias_relu_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    numel,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of x [..., CHANNELS]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)  # [BLOCK], a batch of maps can pass 2^31 numbers
    mask = i < numel
    first = 0 if BLOCK % CHANNELS == 0 else (start % CHANNELS).to(tl.int32)
    channel = (first + tl.arange(0, BLOCK)) % CHANNELS  # [BLOCK]
    y = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + channel).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # as torch's ReLU, and unlike a maximum, this keeps NaN
    if LIMIT:
        y = tl.where(y > LARGEST, LARGEST, y)
        y = tl.where(y < -LARGEST, -LARGEST, y)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch_bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Runs the kernel. Arguments, outcome and errors as `bias_relu`'s."""
    check_dtypes(x=x)
    _check(x, bias, residual)
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        bias_relu_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            *(x, bias.contiguous(), residual, out, x.numel()),
            CHANNELS=x.shape[1],
            RELU=relu,
            LIMIT=x.dtype == torch.float16,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


def _check(x: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be channels_last [N,C,H,W], got {list(x.shape)} with strides {list(x.stride())}")
    if bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be [{x.shape[1]}], got {list(bias.shape)}")
    if residual is not None and (
        residual.shape != x.shape or not residual.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"residual must be channels_last {list(x.shape)}, "
            f"got {list(residual.shape)} with strides {list(residual.stride())}"
        )


# ---- operation ----


@operation("bias_relu", launch_bias_relu)
def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """x + bias + residual, then its ReLU where `relu`, in float32 at least; float16 stays within its range.

    Not differentiable.

    Args:
        x: [N,C,H,W], channels_last.
        bias: [C].
        residual: as x, or None.

    Returns: [N,C,H,W] in the dtype of x, channels_last.

    Raises:
        TypeError, ValueError: a dtype, a shape or a layout other than these.
    """
    _check(x, bias, residual)
    return reference.bias_relu(x, bias, residual, relu).contiguous(memory_format=torch.channels_last)


@bias_relu.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x)


# ---- builds ----

# (channels, residual, ReLU): a ResNet's stem, a block's last convolution, its shortcut
LAYERS = ((64, False, True), (256, True, True), (2048, False, False))


def builds(target: Target) -> list[Build]:
    """Every kind of layer of a ResNet-50."""
    found = []
    for dtype, kind in dtypes_on(target).items():
        for channels, residual, relu in LAYERS:
            options = {"CHANNELS": channels, "RELU": relu, "LIMIT": dtype == torch.float16, "BLOCK": BLOCK}
            absent = {} if residual else {"residual_ptr": None}
            types = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "out_ptr"), f"*{kind}")
            name = f"{kind}-{channels}{'-residual' if residual else ''}"
            # channels of ResNets are multiples of 16, and so is the number of numbers
            aligned = ("numel",)
            constexprs = {**options, **absent}
            found.append(build(name, bias_relu_kernel, types, constexprs, num_warps=NUM_WARPS, aligned=aligned))
    return found
