"""Convolutions with what follows them, and projections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Scale
from bench.operations.case import BRAIN, HALF, NAMES, SINGLE, Case, Draw, both_layouts, kernel
from detr_fast import ops, reference
from detr_fast.detr.backbone import FoldedConv, FrozenBatchNorm2d


def on_gpu(s: Scale) -> Iterator[Case]:
    yield from bias_relu(s)


def on_cpu(s: Scale) -> Iterator[Case]:
    yield from convolutions(s)
    yield from projection(s)


def bias_relu(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    # (channels, stride, residual): the last convolutions of a ResNet-50's first and third stage, and its stem
    block, deep, stem = (s.dim, 4, True), (4 * s.dim, 16, True), (s.dim // 4, 2, False)
    for batch, layer, dtype in (
        (some, block, HALF),
        (some, deep, HALF),
        (some, stem, HALF),
        (one, block, HALF),
        (many, block, HALF),
        (some, block, BRAIN),
        (some, block, SINGLE),
    ):
        yield bias_relu_case(s, batch, layer, dtype)


def bias_relu_case(s: Scale, batch: int, layer: tuple[int, int, bool], dtype: torch.dtype) -> Case:
    channels, stride, residual = layer
    size = s.level(stride)
    numbers = batch * channels * math.prod(size)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x, more = (draw.image_layout(batch, channels, *size, dtype=dtype) for _ in range(2))
        return x, draw.normal(channels, dtype=dtype), more if residual else None, True

    return Case(
        op="bias_relu",
        name=f"{channels} x {'x'.join(map(str, size))}{', residual' if residual else ''}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=inputs,
        ours=kernel("bias_relu"),
        plain=reference.bias_relu,
        bytes=(2 + residual) * numbers * dtype.itemsize,
        flops=(2 + residual) * numbers,
        dtype=dtype,
        rivals={"PyTorch": eager_bias_relu},
    )


def eager_bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = x + bias[:, None, None]
    return (y if residual is None else y + residual).relu()


def convolutions(s: Scale) -> Iterator[Case]:
    yield folded_case(s, "3x3", 2 * s.width, 2 * s.width, 3, 8, residual=False)
    yield folded_case(s, "3x3", 8 * s.width, 8 * s.width, 3, 32, residual=False)
    yield folded_case(s, "1x1, residual", s.width, 4 * s.width, 1, 4, residual=True)
    yield wide_case(s, 32 * s.width, s.dim, 1)
    yield wide_case(s, s.dim, s.dim + s.heads, 3)


def folded_case(s: Scale, name: str, channels: int, out: int, side: int, stride: int, residual: bool) -> Case:
    size = s.level(stride)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        conv = nn.Conv2d(channels, out, side, padding=side // 2, bias=False).requires_grad_(False)
        norm = FrozenBatchNorm2d(out)
        conv.weight.copy_(draw.normal(*conv.weight.shape) / math.sqrt(channels * side**2))
        norm.running_var.copy_(1 + draw.normal(out) ** 2)
        norm.bias.copy_(draw.normal(out))
        x, more = both_layouts(draw, 1, channels, *size), both_layouts(draw, 1, out, *size)
        folded = FoldedConv.of(conv, norm, SINGLE)
        return *x, *(more if residual else (None, None)), conv, norm, folded

    def ours(x: Tensor, _x: Tensor, more: Tensor | None, _more: Any, _conv: Any, _norm: Any, folded: Any) -> Tensor:
        return folded(x, relu=True, residual=more)

    def plain(_x: Tensor, x: Tensor, _more: Any, more: Tensor | None, conv: Any, norm: Any, _folded: Any) -> Tensor:
        y = F.conv2d(x, conv.weight.to(x.dtype), padding=side // 2)
        y = norm(y)
        return (y if more is None else y + more).relu()

    pixels = math.prod(size)
    return Case(
        op="convolution, frozen batch norm, ReLU",
        name=f"{name}, {channels} to {out}, {'x'.join(map(str, size))}",
        batch=1,
        inputs=inputs,
        ours=ours,
        plain=plain,
        bytes=4 * (pixels * (channels + out * (2 if residual else 1)) + channels * out * side**2),
        flops=2 * pixels * channels * out * side**2,
        dtype=SINGLE,
    )


def wide_case(s: Scale, channels: int, out: int, side: int) -> Case:
    size = s.level(32)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(out, channels, side, side) / math.sqrt(channels * side**2)
        return *both_layouts(draw, 1, channels, *size), weight, draw.normal(out)

    pixels = math.prod(size)
    return Case(
        op="convolution of many channels",
        name=f"{side}x{side}, {channels} to {out}, {'x'.join(map(str, size))}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _, weight, bias: ops.conv2d(x, weight, bias, padding=side // 2),
        plain=lambda _, x, weight, bias: reference.conv2d(x, weight, bias, padding=side // 2),
        bytes=4 * (pixels * (channels + out) + channels * out * side**2),
        flops=2 * pixels * channels * out * side**2,
        dtype=SINGLE,
    )


def projection(s: Scale) -> Iterator[Case]:
    tokens, d = s.tokens, s.dim

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x, pos, weight = draw.normal(1, tokens, d), draw.normal(1, tokens, d), draw.normal(3 * d, d) / math.sqrt(d)
        bias = draw.normal(3 * d)
        position = F.linear(pos, weight, bias)
        position[..., 2 * d :] = bias[2 * d :]
        return x, pos, weight, bias, position

    def plain(x: Tensor, pos: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
        parts = zip((x + pos, x + pos, x), weight.chunk(3), bias.chunk(3), strict=True)
        return torch.cat([F.linear(*part) for part in parts], -1)

    yield Case(
        op="Q, K and V",
        name=f"{tokens} x {d}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _pos, weight, _bias, position: ops.project(x, weight, position),
        plain=plain,
        bytes=4 * (tokens * (d + 3 * d + 3 * d) + 3 * d * d),
        flops=6 * tokens * d * d,
        dtype=SINGLE,
    )
