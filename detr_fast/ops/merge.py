"""The panoptic merges of a batch: Triton's kernels on a GPU, the logits at the kept pixels alone on a CPU.

A query that is removed changes the winner only where it won, so the CPU redoes the merge at those pixels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.cells import Logits, Runs, argmax_of_planes, runs, take
from detr_fast.ops.policy import uses_kernels
from detr_fast.reference import NOWHERE, SMALLEST_AREA, Merged, at_least_float32, weighted_segments

Size = tuple[int, int]  # (height, width)


class Merges(NamedTuple):
    """The merges of B images, one after the other; on the masks' device, which may not be done yet.

    Attributes:
        ids: of all pixels, [H_i,W_i] of each image, flat, in a small integer dtype.
        segment, area, box: [N], [N] and [N,4] of the kept queries, as in `reference.Merged`.
    """

    ids: Tensor
    segment: Tensor
    area: Tensor
    box: Tensor

    def images(self, counts: Sequence[int], targets: Sequence[Size]) -> list[Merged]:
        """One for each image, of so many kept queries and of that size."""
        ids = self.ids.split([height * width for height, width in targets])
        queries = zip(*(x.split(list(counts)) for x in self[1:]), strict=True)
        return [Merged(map_.view(size), *parts) for map_, size, parts in zip(ids, targets, queries, strict=True)]


def panoptic_merge(
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    isthing: Tensor,
    resized: Sequence[Size],
    processed: Sequence[Size],
    targets: Sequence[Size],
    merge_for_good: bool,
) -> Merges:
    """`reference.panoptic_merge` of B images.

    Args:
        masks, labels: of each image's kept queries, [K_i,h,w] and [K_i].
        isthing: bool [C], on the masks' device.
        resized, processed, targets: of each image.
    """
    if uses_kernels(masks[0]):
        queries = (torch.cat(list(parts)) for parts in (masks, labels))
        sizes = (_flat(sizes) for sizes in (resized, processed, targets))
        merge = torch.ops.detr_fast.panoptic_merge
        return Merges(*merge(*queries, isthing, _counts(masks), *sizes, merge_for_good))
    images = zip(masks, labels, resized, processed, targets, strict=True)
    return _joined([_merged(m, c, isthing, r, p, t, merge_for_good) for m, c, r, p, t in images])


def weighted_merge(
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    fuse: Tensor,
    targets: Sequence[Size],
    mask_threshold: float,
    overlap_threshold: float,
) -> Merges:
    """`reference.weighted_merge` of B images; arguments as for `panoptic_merge`, fuse bool [C]."""
    if len({image.shape[1:] for image in masks}) > 1:  # cropped from a padded batch
        images = zip(*([[x] for x in parts] for parts in (masks, scores, labels)), ([x] for x in targets), strict=True)
        merges = [weighted_merge(m, s, c, fuse, t, mask_threshold, overlap_threshold) for m, s, c, t in images]
        return _joined([Merged(*merge) for merge in merges])
    if uses_kernels(masks[0]):
        queries = (torch.cat(list(parts)) for parts in (masks, scores, labels))
        merge = torch.ops.detr_fast.weighted_merge
        return Merges(*merge(*queries, fuse, _counts(masks), _flat(targets), mask_threshold, overlap_threshold))
    images = zip(masks, scores, labels, targets, strict=True)
    return _joined([_weighted(*image, fuse, mask_threshold, overlap_threshold) for image in images])


def _flat(sizes: Sequence[Size]) -> list[int]:
    return [side for size in sizes for side in size]


def _counts(masks: Sequence[Tensor]) -> list[int]:
    return [len(image) for image in masks]


def _joined(images: list[Merged]) -> Merges:
    if len(images) == 1:
        (image,) = images
        return Merges(image.ids.flatten(), *image[1:])
    dtype = max((image.ids.dtype for image in images), key=lambda dtype: dtype.itemsize)
    ids = torch.cat([image.ids.flatten().to(dtype) for image in images])
    return Merges(ids, *(torch.cat(parts) for parts in list(zip(*images, strict=True))[1:]))


def _nothing(target: Size, labels: Tensor) -> Merged:
    """No query has a segment."""
    area = torch.zeros(len(labels), dtype=torch.int32, device=labels.device)
    ids = torch.zeros(target, dtype=torch.uint8, device=labels.device)
    return Merged(ids, area - 1, area, area[:, None].expand(-1, 4))


# ---- by the largest logit ----


def _merged(
    masks: Tensor,
    labels: Tensor,
    isthing: Tensor,
    resized: Size,
    processed: Size,
    target: Size,
    merge_for_good: bool,
) -> Merged:
    """One image's."""
    count = len(labels)
    if count == 0:
        return _nothing(target, labels)
    lead = _first_of_class(labels, isthing)
    logits = Logits(masks, resized, processed, target)
    if merge_for_good:  # a label is a segment, of the queries that join
        leads, label = np.unique(lead, return_inverse=True)
        settled = _settle(logits, label, np.arange(len(leads)))
    else:  # a label is a query; the parts of a stuff class but the first count no pixels, and go in the first round
        leads, label = np.arange(count), np.arange(count)
        settled = _settle(logits, label, lead)
    if not settled.alive.any():
        return _nothing(target, labels)
    first_id = int(merge_for_good)
    number = np.where(settled.alive, settled.alive.cumsum() - 1 + first_id, -1)
    area, box = np.zeros(count, dtype=np.int32), np.full((count, 4), [NOWHERE, NOWHERE, 0, 0], dtype=np.int32)
    area[leads], box[leads] = settled.area, settled.runs.boxes(len(leads))
    queries = (torch.from_numpy(x).to(masks.device) for x in (number[label].astype(np.int32), area, box))
    return Merged(_ids(logits, settled, number, first_id), *queries)


def _first_of_class(labels: Tensor, isthing: Tensor) -> np.ndarray:
    """The first query of each one's class if that is stuff, else itself, int64 [K]."""
    first: dict[int, int] = {}
    things = isthing[labels].tolist()
    pairs = enumerate(zip(labels.tolist(), things, strict=True))
    return np.array([k if thing else first.setdefault(label, k) for k, (label, thing) in pairs], dtype=np.int64)


class Settled(NamedTuple):
    """The labels that are left.

    Attributes:
        won: the label of each picked pixel [R,C], in a small integer dtype; meaningless if no label is left.
        alive: the labels that are left, bool [S].
        area: the target pixels that each label counts, int64 [S].
        runs: `won` as rectangles.
    """

    won: Tensor
    alive: np.ndarray
    area: np.ndarray
    runs: Runs


def _settle(logits: Logits, label: np.ndarray, counts_for: np.ndarray) -> Settled:
    """Merges, removes the labels of at most SMALLEST_AREA target pixels, and redoes both until none is left.

    Args:
        label: [K], of each query.
        counts_for: [S], the label to whose area the pixels of each label are added.
    """
    alive = np.ones(len(counts_for), dtype=bool)
    won = logits.winners(label)
    while True:
        runs = logits.runs(won)
        pixels = runs.areas(len(alive))
        area = np.bincount(counts_for, weights=pixels, minlength=len(alive)).astype(np.int64)
        small = alive & (area <= SMALLEST_AREA)
        alive = alive & ~small
        if not alive.any() or not pixels[small].any():
            return Settled(won, alive, area, runs)
        device = won.device
        lost = torch.from_numpy(small).to(device)[won.long()].nonzero()
        queries = logits.winners_at(lost, torch.from_numpy(alive[label]).to(device))
        won[lost[:, 0], lost[:, 1]] = torch.from_numpy(label).to(device)[queries].to(won.dtype)


def _ids(logits: Logits, settled: Settled, number: np.ndarray, first_id: int) -> Tensor:
    """The map of the labels that are left, in a small integer dtype [H,W]."""
    won = settled.won
    if not settled.alive.all():
        won = take(number.clip(min=0), won)
    elif first_id:
        won = won.to(torch.uint8 if len(number) < 256 else torch.int32) + first_id
    return logits.spread(won)


# ---- by the largest weighted probability ----


def _weighted(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    target: Size,
    fuse: Tensor,
    mask_threshold: float,
    overlap_threshold: float,
) -> Merged:
    """One image's."""
    if len(labels) == 0:
        return _nothing(target, labels)
    weighted = masks.to(at_least_float32(masks.dtype)).sigmoid()
    if target != tuple(masks.shape[-2:]):
        weighted = F.interpolate(weighted[None], size=target, mode="bilinear", align_corners=False)[0]
    weighted *= scores[:, None, None]
    winners = argmax_of_planes(weighted, len(weighted))
    found = runs(winners, *(np.arange(side + 1) for side in target))
    area = torch.from_numpy(found.areas(len(labels)))
    own = torch.stack([(mask >= mask_threshold).sum() for mask in weighted])
    segment = torch.tensor(weighted_segments(area, own.cpu(), labels, fuse, overlap_threshold), dtype=torch.int32)
    box = torch.from_numpy(found.boxes(len(labels)))
    queries = (x.int().to(masks.device) for x in (segment, area, box))
    return Merged(take(segment.clamp(min=0).numpy(), winners), *queries)
