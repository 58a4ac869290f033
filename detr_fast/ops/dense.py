"""Convolutions and linear layers: oneDNN's fused ones on a CPU, cuDNN and cuBLAS with fused epilogues on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import reference
from detr_fast.ops.cache import kept
from detr_fast.ops.policy import is_plain, on_cpu, trains, uses_kernels

# oneDNN convolutions that add the bias, the residual and the ReLU before they write: what torch.compile emits on a CPU.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
# bfloat16 needs AVX-512 or AVX-NE-CONVERT; without them PyTorch's own convolution computes it
HAS_ONEDNN_BF16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_ONEDNN_BF16 else (torch.float32,)
CHAIN = 576  # products that such a convolution adds up one after the other


def image_layout(x: Tensor) -> Tensor:
    """x [B,C,H,W] in the memory layout that the convolutions are fastest in: NHWC."""
    return x if is_plain("channels_last") else x.contiguous(memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """relu(conv(x) + bias + residual): x [B,C,H,W], weight [O,C,k,k]; the outcome may overwrite residual."""
    if _fuses_convolutions(x, weight):
        geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, 1)
        *first, last = _chains(x, weight)
        for part in first:
            residual, bias = _fused_conv2d(*part, bias, geometry, False, residual), None
        return _fused_conv2d(*last, bias, geometry, relu, residual)
    fuses_bias = bias is not None and uses_kernels(x) and not is_plain("channels_last")  # the kernel's layout is NHWC
    if fuses_bias and not trains(x, weight, bias, residual):
        y = image_layout(F.conv2d(x, weight, None, stride, padding, dilation))
        residual = None if residual is None else image_layout(residual)
        return torch.ops.detr_fast.bias_relu(y, bias, residual, relu)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return reference.conv2d(x, weight, bias, **options, relu=relu, residual=residual)


def _fused_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], relu: bool, residual: Tensor | None
) -> Tensor:
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, *geometry, "add", 1.0, "relu" if relu else None, [], None
    )


def _chains(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x [B,C,H,W] and weight [O,C,k,k] in parts of some input channels, whose convolutions are to be added.

    A 3x3 convolution in NHWC has oneDNN add up all products of an output one after the other in float32. Over the 2304
    of the mask head's first layer, whose normalisation enlarges the error, that cost three times the error of NCHW, and
    over the 4608 of the backbone's last stage nine times. Chains of 576 keep to the contract, for 3 % more time.
    """
    taps = weight.shape[2] * weight.shape[3]
    if x.dtype != torch.float32 or taps == 1:
        return [(x, weight)]
    return list(zip(*(tensor.split(max(1, CHAIN // taps), 1) for tensor in (x, weight)), strict=True))


def _fuses_convolutions(x: Tensor, weight: Tensor) -> bool:
    """Static facts, and no gradient: oneDNN's fused convolutions have none."""
    return (
        HAS_ONEDNN
        and on_cpu(x.device)
        and x.dtype in ONEDNN_DTYPES
        and not torch.compiler.is_compiling()
        and not trains(x, weight)
    )


def cast(owner: nn.Module, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weights `tensors` of `owner` in `dtype`."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    return kept(owner, "cast", dtype, tensors, lambda: tuple(tensor.to(dtype) for tensor in tensors))


def weights(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The layer's weight and bias in `dtype`."""
    assert layer.bias is not None
    weight, bias = cast(layer, (layer.weight, layer.bias), dtype)
    return weight, bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), computed in the dtype of x [...,C]."""
    return reference.finite(F.linear(x, *weights(layer, x.dtype)))


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight^T + bias for x [B,L,C], weight [O,C] and a bias for each position: [L,O] or [B,L,O]."""
    return reference.finite(F.linear(x, weight).add_(bias))
