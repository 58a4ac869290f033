"""The mask head's upsampling, and masks at the size of the image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Scale
from bench.operations.case import CHUNK_QUERIES, SINGLE, Case, Draw, both_layouts, flat, kernel, pairs, ragged
from detr_fast import ops, reference


def on_gpu(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    yield mask_upsample_case(s, some, s.kept)
    yield mask_upsample_case(s, some, s.queries)
    yield mask_upsample_case(s, one, s.queries)
    yield mask_upsample_case(s, many, s.kept)


def on_cpu(s: Scale) -> Iterator[Case]:
    for divisor, stride in ((4, 16), (8, 8), (16, 4)):
        yield upsample_conv_case(s, s.dim // (divisor // 2), s.dim // divisor, stride)
    yield replace(mask_upsample_case(s, 1, s.kept), ours=upsampled)


def mask_upsample_case(s: Scale, batch: int, queries: int) -> Case:
    processed, targets = ragged(s.image, batch), ragged(s.target, batch)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        masks = draw.masks(batch * queries, s.level(4))
        return masks, [queries] * batch, list(s.image), flat(processed), flat(targets), 0.5

    written = sum(queries * math.prod(target) for target in targets)
    return Case(
        op="mask_upsample",
        name=f"{queries} of {'x'.join(map(str, s.level(4)))} to about {'x'.join(map(str, s.target))}, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=kernel("mask_upsample"),
        plain=defined_mask_upsample,
        bytes=4 * batch * queries * math.prod(s.level(4)) + written,
        flops=11 * written,
        dtype=SINGLE,
        graph=False,
    )


def defined_mask_upsample(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    """`reference.mask_upsample`, image by image."""
    images = zip(masks.split(counts), pairs(processed), pairs(target), strict=True)
    return torch.cat([reference.mask_upsample(m, padded, *sizes, threshold).flatten() for m, *sizes in images])


def upsampled(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    """`ops.mask_upsample` of a batch, flat."""
    height, width = padded
    sizes = ((height, width), pairs(processed), pairs(target))
    return torch.cat([part.flatten() for part in ops.mask_upsample(masks.split(counts), *sizes, threshold)])


def upsample_conv_case(s: Scale, channels: int, out: int, stride: int) -> Case:
    low, high = s.level(2 * stride), s.level(stride)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(out, channels, 3, 3) / math.sqrt(9 * channels)
        return *both_layouts(draw, CHUNK_QUERIES, channels, *low), weight, ops.image_layout(ops.phase_kernels(weight))

    return Case(
        op="upsampling and convolution",
        name=f"{CHUNK_QUERIES} x {channels} to {out}, {'x'.join(map(str, low))} to {'x'.join(map(str, high))}",
        batch=1,
        inputs=inputs,
        ours=lambda x, _, weight, phases: ops.upsample_conv(x, weight, phases, high),
        plain=lambda _, x, weight, _phases: reference.upsample_conv(x, weight, high),
        bytes=4 * (CHUNK_QUERIES * (channels * math.prod(low) + out * math.prod(high)) + 9 * channels * out),
        flops=18 * CHUNK_QUERIES * channels * out * math.prod(high),
        dtype=SINGLE,
    )
