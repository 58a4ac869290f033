"""Normalisations with their neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Scale
from bench.operations.case import BRAIN, CHUNK_QUERIES, HALF, NAMES, SINGLE, Case, Draw, both_layouts, kernel, trained
from detr_fast import ops, reference


def on_gpu(s: Scale) -> Iterator[Case]:
    yield from group_norm_relu_upsample(s)
    yield from add_layer_norm(s)


def on_cpu(s: Scale) -> Iterator[Case]:
    for divisor, stride in ((4, 16), (16, 4)):
        yield group_norm_relu_case(s, s.dim // divisor, stride)


def group_norm_relu_upsample(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    wide = s.dim + s.heads
    # (channels, stride, stride that it is upsampled to): gn1 to gn5 of the mask head
    layers = ((wide, 32, 32), (s.dim // 2, 32, 16), (s.dim // 4, 16, 8), (s.dim // 8, 8, 4), (s.dim // 16, 4, 4))
    for layer in layers:
        yield group_norm_case(s, some, layer, HALF)
    yield group_norm_case(s, one, layers[3], HALF)
    yield group_norm_case(s, many, layers[3], HALF)
    yield group_norm_case(s, some, layers[3], BRAIN)
    yield group_norm_case(s, some, layers[3], SINGLE)


def group_norm_case(s: Scale, batch: int, layer: tuple[int, int, int], dtype: torch.dtype) -> Case:
    channels, stride, new_stride = layer
    low, high, count = s.level(stride), s.level(new_stride), s.kept * batch
    upsampled = stride != new_stride

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x = draw.image_layout(count, channels, *low, dtype=dtype)
        weight, bias = 1 + draw.normal(channels) / 4, draw.normal(channels) / 4
        shared = draw.image_layout(batch, channels, *high, dtype=dtype) if upsampled else None
        image = torch.arange(batch, device=draw.device).repeat_interleave(s.kept) if upsampled else None
        return x, weight, bias, min(8, channels), 1e-5, shared, image, *high

    read = count * math.prod(low) + upsampled * batch * math.prod(high)
    written = count * math.prod(high)
    size = "x".join(map(str, low)) + (f" to {'x'.join(map(str, high))}" if upsampled else "")
    return Case(
        op="group_norm_relu_upsample",
        name=f"{s.kept} x {channels} x {size}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=inputs,
        ours=kernel("group_norm_relu_upsample"),
        plain=defined_group_norm,
        bytes=channels * dtype.itemsize * (read + written),
        flops=channels * (8 * count * math.prod(low) + upsampled * written),
        dtype=dtype,
        rivals={"PyTorch": eager_group_norm},
    )


def defined_group_norm(*arguments: Any) -> Tensor:
    *others, height, width = arguments
    return reference.group_norm_relu_upsample(*others, (height, width))


def eager_group_norm(
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
    y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps).relu()
    if shared is None:
        return y
    return F.interpolate(y, size=(height, width)) + shared[image]


def add_layer_norm(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    for batch, tokens, dtype in (
        (some, s.tokens, HALF),
        (many, s.tokens, HALF),
        (one, s.tokens, HALF),
        (some, s.queries, HALF),
        (some, s.tokens, BRAIN),
        (some, s.tokens, SINGLE),
    ):
        yield add_layer_norm_case(s, batch, tokens, dtype)
    yield add_layer_norm_training(s, some)


def layer_norm_inputs(s: Scale, draw: Draw, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, update = draw.normal(batch, tokens, s.dim), draw.normal(batch, tokens, s.dim, dtype=dtype)
    return x, update, 1 + draw.normal(s.dim) / 4, draw.normal(s.dim) / 4, 1e-5


def add_layer_norm_case(s: Scale, batch: int, tokens: int, dtype: torch.dtype) -> Case:
    numbers = batch * tokens * s.dim
    return Case(
        op="add_layer_norm",
        name=f"{tokens} x {s.dim}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=lambda draw: layer_norm_inputs(s, draw, batch, tokens, dtype),
        ours=kernel("add_layer_norm"),
        plain=reference.add_layer_norm,
        bytes=numbers * (8 + dtype.itemsize),
        flops=8 * numbers,
        dtype=dtype,
    )


def add_layer_norm_training(s: Scale, batch: int) -> Case:
    numbers = batch * s.tokens * s.dim

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(batch, s.tokens, s.dim), *layer_norm_inputs(s, draw, batch, s.tokens, HALF)

    return Case(
        op="add_layer_norm",
        name=f"{s.tokens} x {s.dim}, B {batch}, fp16, forward and backward",
        batch=batch,
        inputs=inputs,
        ours=trained(kernel("add_layer_norm"), 4),
        plain=trained(reference.add_layer_norm, 4),
        bytes=numbers * (10 + 4 + 6 + 6),  # forward; the gradient, x and update read; two gradients written
        flops=22 * numbers,
        dtype=HALF,
        graph=False,
    )


def group_norm_relu_case(s: Scale, channels: int, stride: int) -> Case:
    size, groups = s.level(stride), min(8, channels)
    numbers = CHUNK_QUERIES * channels * math.prod(size)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        norm = nn.GroupNorm(groups, channels).requires_grad_(False)
        norm.weight.copy_(1 + draw.normal(channels) / 4)
        norm.bias.copy_(draw.normal(channels) / 4)
        return *both_layouts(draw, CHUNK_QUERIES, channels, *size), norm

    def plain(_: Tensor, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        return reference.group_norm_relu_upsample(x, norm.weight, norm.bias, groups, norm.eps, None, None, size)

    return Case(
        op="group norm and ReLU",
        name=f"{CHUNK_QUERIES} x {channels} x {'x'.join(map(str, size))}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _, norm: ops.group_norm_relu(x, norm),
        plain=plain,
        bytes=8 * numbers,
        flops=8 * numbers,
        dtype=SINGLE,
    )
