"""The operations of `detr_fast.ops` as a CPU runs DETR-R50 panoptic with them: one image, float32, fast and defined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import gpu_cases
from bench.cases import REAL, Scale
from bench.gpu_cases import SINGLE, Case, Draw
from detr_fast import ops, reference
from detr_fast.detr.backbone import FoldedConv, FrozenBatchNorm2d
from detr_fast.postprocess import binary_masks

CHUNK = 4  # queries that a CPU takes through the mask head at once


def op_cases(scale: Scale = REAL) -> list[Case]:
    families = (convolutions, projection, attentions, mask_head, merges)
    return [case for family in families for case in family(scale)]


def both_layouts(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """A feature map in NHWC, for ours, and in NCHW, for the definition, which knows no other."""
    x = draw.image_layout(*shape, dtype=SINGLE)
    return x, x.contiguous()


# ---- convolutions ----


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
        y = reference.frozen_batch_norm(y, norm)
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
        plain=lambda _, x, weight, bias: F.conv2d(x, weight, bias, padding=side // 2),
        bytes=4 * (pixels * (channels + out) + channels * out * side**2),
        flops=2 * pixels * channels * out * side**2,
        dtype=SINGLE,
    )


# ---- transformer ----


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


def attentions(s: Scale) -> Iterator[Case]:
    for lengths in ((s.tokens, s.tokens), (s.queries, s.tokens), (s.queries, s.queries)):
        case = gpu_cases.attention_case(s, 1, lengths, SINGLE, padded=False)
        yield replace(case, ours=ops.attention, rivals={})
    case = gpu_cases.attention_map_case(s, 1, SINGLE, padded=False)
    yield replace(case, ours=lambda q, k, _, nheads, padding: ops.attention_map(q, k[0], nheads, padding))


# ---- mask head ----


def mask_head(s: Scale) -> Iterator[Case]:
    for divisor, stride in ((4, 16), (8, 8), (16, 4)):
        yield upsample_case(s, s.dim // (divisor // 2), s.dim // divisor, stride)
    for divisor, stride in ((4, 16), (16, 4)):
        yield group_norm_case(s, s.dim // divisor, stride)


def upsample_case(s: Scale, channels: int, out: int, stride: int) -> Case:
    low, high = s.level(2 * stride), s.level(stride)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(out, channels, 3, 3) / math.sqrt(9 * channels)
        return *both_layouts(draw, CHUNK, channels, *low), weight, ops.image_layout(ops.phase_kernels(weight))

    return Case(
        op="upsampling and convolution",
        name=f"{CHUNK} x {channels} to {out}, {'x'.join(map(str, low))} to {'x'.join(map(str, high))}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _, weight, phases: ops.upsample_conv(x, weight, phases, high),
        plain=lambda _, x, weight, _phases: reference.upsample_conv(x, weight, high),
        bytes=4 * (CHUNK * (channels * math.prod(low) + out * math.prod(high)) + 9 * channels * out),
        flops=18 * CHUNK * channels * out * math.prod(high),
        dtype=SINGLE,
    )


def group_norm_case(s: Scale, channels: int, stride: int) -> Case:
    size, groups = s.level(stride), min(8, channels)
    numbers = CHUNK * channels * math.prod(size)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        norm = nn.GroupNorm(groups, channels).requires_grad_(False)
        norm.weight.copy_(1 + draw.normal(channels) / 4)
        norm.bias.copy_(draw.normal(channels) / 4)
        return *both_layouts(draw, CHUNK, channels, *size), norm

    def plain(_: Tensor, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        return F.group_norm(x, groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).relu()

    return Case(
        op="group norm and ReLU",
        name=f"{CHUNK} x {channels} x {'x'.join(map(str, size))}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _, norm: ops.group_norm_relu(x, norm),
        plain=plain,
        bytes=8 * numbers,
        flops=8 * numbers,
        dtype=SINGLE,
    )


# ---- masks ----


def merges(s: Scale) -> Iterator[Case]:
    for merge_for_good in (True, False):
        case = gpu_cases.panoptic_merge_case(s, 1, s.kept, merge_for_good)
        yield replace(case, ours=case.rivals["detr_fast.merge"], rivals={})

    yield replace(gpu_cases.mask_upsample_case(s, 1, s.kept), ours=upsampled)


def upsampled(masks: Tensor, counts: list[int], padded: Any, processed: Any, target: Any, threshold: float) -> Tensor:
    """`kernels/mask_upsample.py`'s operation, as a CPU computes it."""
    parts = []
    for index, logits in enumerate(masks.split(counts)):
        sizes = (tuple(padded), *(tuple(sides[2 * index :][:2]) for sides in (processed, target)))
        parts += [part.flatten() for part in binary_masks(logits, *sizes, threshold)]
    return torch.cat(parts)
