"""The panoptic merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Scale
from bench.operations.case import SINGLE, Case, Draw, flat, kernel, pairs, ragged
from detr_fast import ops, reference
from detr_fast.categories import COCO_PANOPTIC

CLASSES = 250
THINGS = [index <= 90 for index in range(CLASSES)]


def on_gpu(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    yield panoptic_merge_case(s, some, s.kept, True)
    yield panoptic_merge_case(s, some, s.kept, False)
    yield panoptic_merge_case(s, one, s.kept, True)
    yield panoptic_merge_case(s, many, s.kept, True)
    yield panoptic_merge_case(s, one, s.queries, True)
    yield weighted_merge_case(s, some)


def on_cpu(s: Scale) -> Iterator[Case]:
    for merge_for_good in (True, False):
        yield replace(panoptic_merge_case(s, 1, s.kept, merge_for_good), ours=merged, rivals={})


def merge_bytes_and_flops(s: Scale, counts: int, targets: list[tuple[int, int]]) -> tuple[int, int]:
    """Logits read and ids, one byte, written; each query's logit, 11 FLOP and 3 of the argmax, at each pixel kept."""
    pixels = [min(math.prod(target), math.prod(s.image)) for target in targets]
    moved = 4 * counts * len(targets) * math.prod(s.level(4)) + sum(math.prod(target) for target in targets)
    return moved, 14 * counts * sum(pixels)


def panoptic_merge_case(s: Scale, batch: int, queries: int, merge_for_good: bool) -> Case:
    processed, targets = ragged(s.image, batch), ragged(s.target, batch)
    resized = [s.image] * batch if merge_for_good else processed
    classes = torch.tensor([category["id"] for category in COCO_PANOPTIC])

    def inputs(draw: Draw) -> tuple[Any, ...]:
        masks, count = draw.masks(batch * queries, s.level(4)), batch * queries
        labels = classes.to(draw.device)[draw.integers(len(classes), count)]
        isthing = torch.tensor(THINGS, device=draw.device)
        sizes = (flat(resized), flat(processed), flat(targets))
        return masks, labels, isthing, [queries] * batch, *sizes, merge_for_good

    moved, flops = merge_bytes_and_flops(s, queries, targets)
    return Case(
        op="panoptic_merge",
        name=f"{'ours' if merge_for_good else 'upstream'}, {queries} queries, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=lambda *arguments: kernel("panoptic_merge")(*arguments)[0],
        plain=defined_merge,
        bytes=moved,
        flops=flops,
        dtype=SINGLE,
        graph=False,
        rivals={"PyTorch, kept pixels": without_kernels(merged)},
    )


def defined_merge(masks: Tensor, labels: Tensor, isthing: Tensor, counts: list[int], *sizes_and_mode: Any) -> Tensor:
    """The ids of `reference.panoptic_merge`, image by image, flat."""
    *sizes, merge_for_good = sizes_and_mode
    images = zip(masks.split(counts), labels.split(counts), *map(pairs, sizes), strict=True)
    merges = [reference.panoptic_merge(m, c, isthing, *own, merge_for_good) for m, c, *own in images]
    return torch.cat([image.ids.flatten() for image in merges])


def merged(masks: Tensor, labels: Tensor, isthing: Tensor, counts: list[int], *sizes_and_mode: Any) -> Tensor:
    """The ids of `ops.panoptic_merge`, flat."""
    *sizes, merge_for_good = sizes_and_mode
    images = (masks.split(counts), labels.split(counts))
    return ops.panoptic_merge(*images, isthing, *map(pairs, sizes), merge_for_good).ids.int()


def without_kernels(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        with ops.plain("kernels"):
            return call(*arguments)

    return run


def weighted_merge_case(s: Scale, batch: int) -> Case:
    targets = ragged(s.target, batch)

    counts = [s.kept] * batch

    def inputs(draw: Draw) -> tuple[Any, ...]:
        scores, labels = (draw.normal(batch * s.kept, CLASSES) * 2).softmax(-1).max(-1)
        masks = draw.masks(batch * s.kept, s.level(4))
        return masks, scores, labels, ~torch.tensor(THINGS, device=draw.device), counts, flat(targets), 0.5, 0.8

    def plain(masks: Tensor, scores: Tensor, labels: Tensor, fuse: Tensor, counts: list[int], *rest: Any) -> Tensor:
        target, *thresholds = rest
        images = zip(*(x.split(counts) for x in (masks, scores, labels)), pairs(target), strict=True)
        merges = [reference.weighted_merge(*queries, fuse, size, *thresholds) for *queries, size in images]
        return torch.cat([image.ids.flatten() for image in merges])

    moved, flops = merge_bytes_and_flops(s, s.kept, targets)
    return Case(
        op="panoptic_merge",
        name=f"transformers, {s.kept} queries, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=lambda *arguments: kernel("weighted_merge", "panoptic_merge")(*arguments)[0],
        plain=plain,
        bytes=moved,
        flops=flops,
        dtype=SINGLE,
        graph=False,
    )
