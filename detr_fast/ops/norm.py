"""Normalisations fused with their neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops.policy import on_cpu, trains, uses_kernels

LAYER_NORM_CHANNELS = 2048  # the widest row of Triton's kernel


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x), in the dtype of x [...,C]."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def add_layer_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x + update), in the dtype of the residual stream x [...,C]."""
    if uses_kernels(x) and x.shape[-1] <= LAYER_NORM_CHANNELS:
        return torch.ops.detr_fast.add_layer_norm(x, update, norm.weight, norm.bias, norm.eps)
    return layer_norm(x + update, norm)


def group_norm_relu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """relu(norm(x)) for x [N,C,H,W], which may be overwritten; statistics in float32 at least."""
    if uses_kernels(x):
        arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps, None, None, x.shape[2], x.shape[3])
        return torch.ops.detr_fast.group_norm_relu_upsample(x, *arguments)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    here = on_cpu(x.device)
    if here and trains(x, weight):
        x = x.contiguous()  # PyTorch's gradient in NHWC takes 5 to 30 times as long
    if not here or x.dtype in (torch.bfloat16, torch.float16) or x.is_contiguous():
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps).relu_()
    return _two_pass_group_norm(x, norm.num_groups, norm.eps, weight, bias).relu_()


def _two_pass_group_norm(x: Tensor, num_groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """GroupNorm of x [N,C,H,W] in NHWC, which is overwritten.

    PyTorch's own CPU kernel for NHWC takes E[x^2] - E[x]^2, with errors 100 times those of its kernel for NCHW. Two
    passes, each a sum of sums, are as exact as the latter, and faster than the former.
    """
    n, channels, height, width = x.shape

    def group_mean(x: Tensor) -> Tensor:
        """[N,C,1,1]: the mean over pixels and the channels of the group."""
        rows = x.permute(0, 2, 3, 1).reshape(n, height, width * channels)  # adds long rows: a quarter of the time
        columns = rows.sum(1).view(n, width, channels)
        sums = columns.sum(1, dtype=torch.float64).unflatten(1, (num_groups, -1))
        mean = sums.mean(2, keepdim=True).expand_as(sums) / (height * width)
        return mean.reshape(n, channels, 1, 1).to(x.dtype)

    x = x.sub_(group_mean(x))
    scale = (group_mean(x * x) + eps).rsqrt() * weight[:, None, None]
    return torch.addcmul(bias[:, None, None], x, scale)
