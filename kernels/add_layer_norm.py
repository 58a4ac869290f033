"""The residual sum and LayerNorm after it, fused: LayerNorm(x + update).

Post-norm transformers do this after every block, so DETR 12 times an image in the encoder, over all its tokens, and 18
times in the decoder. A program holds whole rows in registers and takes mean and variance in two passes over them.

What it saves: PyTorch adds the 16-bit update to the float32 residual, then normalises, 18 bytes moved a number;
here x and update are read and the outcome written once, 10 bytes. 8 FLOP a number, so memory is all that counts.
Backward reads x and update again and computes the statistics anew instead of saving them. The weight's gradients sum
over rows: each program sums its own, and the partial sums are added in one order, so that they are deterministic.

Source: Carion et al. 2020, section A.3; facebookresearch/detr, models/transformer.py (`forward_post`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import Build, Target, build, check_dtypes, dtypes_on, operation

MAX_CHANNELS = 2048  # a row must fit the registers of a program


@triton.jit
def normalise_rows(x_ptr, update_ptr, rows, cols, mask, stride_xm, stride_um, eps, CHANNELS: tl.constexpr):
    """x + update of `rows` [BLOCK_M] with mean 0 and variance 1, and the factor that did it [BLOCK_M]; 0 off `mask`."""
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    update = tl.load(update_ptr + rows.to(tl.int64)[:, None] * stride_um + cols[None, :], mask=mask, other=0.0)
    z = x.to(tl.float32) + update.to(tl.float32)  # [BLOCK_M, BLOCK_C]
    z = tl.where(mask, z - (tl.sum(z, 1) / CHANNELS)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1) / CHANNELS + eps)  # [BLOCK_M]
    return z * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_xm,
    stride_um,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M rows."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (m < rows)[:, None] & (c < CHANNELS)[None, :]  # [BLOCK_M, BLOCK_C]
    z, _ = normalise_rows(x_ptr, update_ptr, m, c, mask, stride_xm, stride_um, eps, CHANNELS)  # [BLOCK_M, BLOCK_C]
    weight = tl.load(weight_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)  # [BLOCK_C]
    bias = tl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)  # [BLOCK_C]
    out = z * weight[None, :] + bias[None, :]  # [BLOCK_M, BLOCK_C]
    tile = m.to(tl.int64)[:, None] * CHANNELS + c[None, :]  # [BLOCK_M, BLOCK_C]
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "blocks"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    update_ptr,
    weight_ptr,
    dx_ptr,
    dupdate_ptr,
    sums_ptr,
    stride_gm,
    stride_xm,
    stride_um,
    rows,
    blocks,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`blocks` times BLOCK_M rows: dx, dupdate, and this program's part of dweight and dbias, sums [programs, 2, C]."""
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    weight = tl.load(weight_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)  # [BLOCK_C]
    dweight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)  # [BLOCK_M, BLOCK_C]
    dbias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)  # [BLOCK_M, BLOCK_C]
    for block in range(blocks):
        m = (pid * blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (m < rows)[:, None] & (c < CHANNELS)[None, :]  # [BLOCK_M, BLOCK_C]
        z, rstd = normalise_rows(x_ptr, update_ptr, m, c, mask, stride_xm, stride_um, eps, CHANNELS)
        grad = tl.load(grad_ptr + m.to(tl.int64)[:, None] * stride_gm + c[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)  # [BLOCK_M, BLOCK_C]
        dweight += grad * z
        dbias += grad
        dz = grad * weight[None, :]  # [BLOCK_M, BLOCK_C]
        along = tl.sum(dz * z, 1) / CHANNELS  # [BLOCK_M]
        dz = (dz - (tl.sum(dz, 1) / CHANNELS)[:, None] - z * along[:, None]) * rstd[:, None]  # [BLOCK_M, BLOCK_C]
        tile = m.to(tl.int64)[:, None] * CHANNELS + c[None, :]  # [BLOCK_M, BLOCK_C]
        tl.store(dx_ptr + tile, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dupdate_ptr + tile, dz.to(dupdate_ptr.dtype.element_ty), mask=mask)
    sums_ptr += pid.to(tl.int64) * 2 * CHANNELS
    tl.store(sums_ptr + c, tl.sum(dweight, 0), mask=c < CHANNELS)
    tl.store(sums_ptr + CHANNELS + c, tl.sum(dbias, 0), mask=c < CHANNELS)


# ---- configuration ----

# Chosen from ahead-of-time builds, without a spill for any width up to MAX_CHANNELS on any target; untimed until a GPU
# is at hand. 8 numbers a thread: a 16-byte load of 16-bit ones, two of float32.
TILE = 1024  # numbers in a program's registers: rows times channels, the latter rounded up to a power of 2
NUM_WARPS = 4
BACKWARD_BLOCKS = 8  # of rows that a program of the backward kernel works through


# ---- launchers ----


def launch_add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Runs the forward kernel. Arguments, outcome and errors as `add_layer_norm`'s."""
    _check(x, update, weight, bias)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, update = _rows(x), _rows(update)
    blocks = _blocks(x.shape[1])
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(x.shape[0], blocks["BLOCK_M"]),)](
            *(x, update, weight.contiguous(), bias.contiguous(), out),
            *(x.stride(0), update.stride(0), x.shape[0], eps),
            **blocks,
            num_warps=NUM_WARPS,
        )
    return out


def launch_add_layer_norm_backward(
    grad: Tensor, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the backward kernel. Arguments, outcome and errors as `add_layer_norm_backward`'s."""
    _check(x, update, weight, bias)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dupdate = torch.empty(update.shape, dtype=update.dtype, device=update.device)
    if dx.numel() == 0:
        return dx, dupdate, torch.zeros_like(weight), torch.zeros_like(bias)
    grad, x, update = _rows(grad), _rows(x), _rows(update)
    blocks = _blocks(x.shape[1])
    programs = triton.cdiv(x.shape[0], blocks["BLOCK_M"] * BACKWARD_BLOCKS)
    sums = torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            *(grad, x, update, weight.contiguous(), dx, dupdate, sums),
            *(grad.stride(0), x.stride(0), update.stride(0), x.shape[0], BACKWARD_BLOCKS, eps),
            **blocks,
            num_warps=NUM_WARPS,
        )
    dweight, dbias = sums[:, 0].sum(0), sums[:, 1].sum(0)  # apart: outputs of an operation share no storage
    return dx, dupdate, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _blocks(channels: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "BLOCK_M": max(1, TILE // block_c), "BLOCK_C": block_c}


def _check(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_dtypes(x=x, update=update, weight=weight, bias=bias)
    if update.shape != x.shape:
        raise ValueError(f"update must have the shape of x, {list(x.shape)}, got {list(update.shape)}")
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x must have at most {MAX_CHANNELS} channels, got {channels}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be [{channels}], got {list(weight.shape)} and {list(bias.shape)}")


def _rows(x: Tensor) -> Tensor:
    """x [...,C] as [rows,C] with C contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# ---- operations ----


@operation("add_layer_norm", launch_add_layer_norm)
def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + update) over the last dimension, in float32 at least, differentiable once.

    Args:
        x: [...,C], the residual stream, of any strides (no copy is made where the rows are evenly spaced).
        update: [...,C], what a block adds to it, in 16 or 32 bits.
        weight, bias: [C].

    Returns: [...,C] in the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: on CUDA, a dtype, a shape or a width that the kernel does not take.
    """
    return reference.add_layer_norm(x, update, weight, bias, eps).contiguous()


@add_layer_norm.register_fake
def _(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operation("add_layer_norm_backward", launch_add_layer_norm_backward)
def add_layer_norm_backward(
    grad: Tensor, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, update, weight and bias from that of `add_layer_norm`'s outcome [...,C]."""
    dtype = reference.at_least_float32(x.dtype)
    z = x.to(dtype) + update
    z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = z * rstd
    grad = grad.to(dtype)
    rows = tuple(range(grad.dim() - 1))
    dweight, dbias = ((grad * z).sum(rows), grad.sum(rows)) if rows else (grad * z, grad.clone())
    dz = grad * weight
    dz = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
    dx = dz.to(x.dtype).contiguous()
    return dx, dz.to(update.dtype, copy=True).contiguous(), dweight.to(weight.dtype), dbias.to(bias.dtype)


@add_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dupdate = x.new_empty(x.shape), update.new_empty(update.shape)
    return dx, dupdate, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *add_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


add_layer_norm.register_autograd(_backward, setup_context=_setup_context)


# ---- builds ----

WIDTHS = (256, 264, MAX_CHANNELS)  # DETR's hidden_dim, one that is no power of 2, the widest


def builds(target: Target) -> list[Build]:
    """Both kernels for `WIDTHS`, a float32 residual and updates of all dtypes, and for a residual of 16 bits."""
    cases = [("fp32", dtype, width) for dtype in dtypes_on(target).values() for width in WIDTHS]
    found = []
    for kernel, label in ((forward_kernel, "forward"), (backward_kernel, "backward")):
        for residual, update, width in [*cases, ("fp16", "fp16", WIDTHS[0])]:
            types = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "dx_ptr"), f"*{residual}")
            types |= {"update_ptr": f"*{update}", "dupdate_ptr": f"*{update}", "eps": "fp32"}
            aligned = [name for name in kernel.arg_names if name.startswith("stride_") and width % 16 == 0]
            name = f"{label}-{residual}-{update}-{width}"
            found.append(build(name, kernel, types, _blocks(width), num_warps=NUM_WARPS, aligned=aligned))
    return found
