"""From the mask logits of the kept queries to one panoptic id map.

Two merges: `upstream_panoptic_merge` gives what facebookresearch/detr and transformers 4.x give, flaws included;
`panoptic_merge` is the corrected one, for data sets. Both evaluate only the pixels that the output keeps. Upstream
resizes the logits to the processed image, takes the argmax, and resizes that to the target with PIL's NEAREST; NEAREST
is a choice of rows and of columns, so the logits are needed there only, as a separable bilinear sum of four taps.
No softmax: it keeps the order of the logits, and its rounding can tie two only if they differ by less than 1e-6.
A query that is removed changes the winner only where it won, so the merge is redone at those pixels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IsThing = Callable[[int], Any] | Mapping[int, Any]

SMALLEST_AREA = 4  # pixels; a segment must be larger
BLOCK_PIXELS = 1 << 19  # pixels evaluated at once: about six maps of 2 MiB in float32, for any number of queries
BLOCK_VALUES = 1 << 21  # logits evaluated at once where a merge is redone: about 50 MiB in float32


def pil_nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """The source index of each of `size_out` pixels when PIL resizes `size_in` pixels with NEAREST, int64 [size_out].

    Pillow's ImagingScaleAffine (libImaging/Geometry.c): it starts at half a step, adds a step per pixel in float64,
    and truncates. The running sum matters: `(i + 0.5) * step` rounds differently.
    """
    steps = np.full(size_out, size_in / size_out)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)


class Taps(NamedTuple):
    """One axis of a bilinear resize at n output positions: two source indices and their weights, each [n]."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor

    def at(self, positions: Tensor | slice) -> Taps:
        return Taps(*(tap[positions] for tap in self))


def bilinear_weights(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size_in,size_out], what each input adds to each output of `F.interpolate(mode="bilinear", align_corners=False)`
    along one axis.

    Read off what it does to the unit vectors: its source coordinates are float32 and may be rounded once or twice
    (with or without fused multiply-add), and at coordinate 200 one rounding already moves a weight by 1e-5.
    """
    unit = torch.eye(size_in, dtype=dtype, device=device)[None, :, None]
    return F.interpolate(unit, size=(1, size_out), mode="bilinear", align_corners=False)[0, :, 0]


def bilinear_taps(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Taps:
    """`bilinear_weights` as the two inputs of each output and their weights."""
    weights = bilinear_weights(size_in, size_out, dtype, device)
    low = (weights != 0).to(torch.uint8).argmax(0)
    high = (low + 1).clamp(max=size_in - 1)
    low_weight, high_weight = weights.gather(0, low[None])[0], weights.gather(0, high[None])[0]
    return Taps(low, high, low_weight, torch.where(high > low, high_weight, 0))


@lru_cache(maxsize=256)
def _axis(
    mask: int, padded: int, processed: int, target: int, dtype: torch.dtype, device: torch.device
) -> tuple[Taps, Tensor]:
    """Taps of the distinct pixels that the target picks along one axis, and which of them each target pixel takes."""
    distinct, position = np.unique(pil_nearest_indices(processed, target), return_inverse=True)
    taps = bilinear_taps(mask, padded, dtype, device).at(torch.from_numpy(distinct).to(device))
    return taps, torch.from_numpy(position).to(device)


def argmax_of_planes(planes: Iterable[Tensor], count: int) -> Tensor:
    """Index of the largest of `count` planes [H,W] at each pixel, ties to the lower index, in a small integer dtype.

    Holds one plane at a time; `Tensor.argmax(0)` over a stack is also several times slower on a CPU.
    """
    iterator = iter(planes)
    best = next(iterator).clone()
    index, wins = torch.zeros_like(best), torch.empty_like(best)
    for k, plane in enumerate(iterator, start=1):
        # k only grows, so a maximum writes it; in floats, exact here, a CPU is 7 times faster than in bool and uint8
        torch.maximum(index, torch.gt(plane, best, out=wins).mul_(k), out=index)
        torch.maximum(best, plane, out=best)
    return index.to(torch.uint8 if count <= 256 else torch.int32)


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as int32, for an index map of a small integer dtype (torch would read uint8 as a mask)."""
    return table.int().index_select(0, index.flatten().int()).view(index.shape)


class _Logits:
    """Mask logits [K,h,w] seen through a bilinear resize, at R chosen rows and C chosen columns of it."""

    def __init__(self, masks: Tensor, padded: Sequence[int], processed: Sequence[int], target: Sequence[int]) -> None:
        self.masks = masks
        self.dtype = torch.promote_types(masks.dtype, torch.float32)
        axes = zip(masks.shape[1:], padded, processed, target, strict=True)
        (self.rows, self.row_of), (self.columns, self.column_of) = (
            _axis(*axis, self.dtype, masks.device) for axis in axes
        )

    def winners(self) -> Tensor:
        """The query with the largest logit at each pixel, ties to the lower index, [R,C]."""
        step = max(1, BLOCK_PIXELS // len(self.columns.low))
        starts = range(0, len(self.rows.low), step)
        blocks = [argmax_of_planes(self._planes(self.rows.at(slice(i, i + step))), len(self.masks)) for i in starts]
        return torch.cat(blocks)

    def _planes(self, rows: Taps) -> Iterator[Tensor]:
        """Each query's logits at `rows` and all columns: across the few source rows first, then down.

        Every plane is the same buffer, written anew: on a CPU a fresh one costs more page faults than arithmetic.
        """
        first, last = int(rows.low[0]), int(rows.high[-1]) + 1
        low, high = rows.low - first, rows.high - first
        low_weight, high_weight = rows.low_weight[:, None], rows.high_weight[:, None]
        width = len(self.columns.low)
        left, right = (index.expand(last - first, width) for index in self.columns[:2])
        across, term = (torch.empty(left.shape, dtype=self.dtype, device=low.device) for _ in range(2))
        plane, below = (torch.empty((len(low), width), dtype=self.dtype, device=low.device) for _ in range(2))
        for mask in self.masks[:, first:last]:
            mask = mask.to(self.dtype)
            torch.gather(mask, 1, left, out=across).mul_(self.columns.low_weight)  # index_select is far slower here
            across.addcmul_(torch.gather(mask, 1, right, out=term), self.columns.high_weight)
            torch.index_select(across, 0, low, out=plane).mul_(low_weight)
            yield plane.addcmul_(torch.index_select(across, 0, high, out=below), high_weight)

    def winners_at(self, pixels: Tensor, alive: Tensor) -> Tensor:
        """The same at P chosen pixels [P,2] (row, column) and among the queries of `alive` [K], [P]."""
        parts = pixels.split(max(1, BLOCK_VALUES // len(self.masks)))
        values = (self._at(*part.unbind(1)).masked_fill_(~alive[:, None], -torch.inf) for part in parts)
        return torch.cat([value.argmax(0) for value in values])

    def _at(self, row: Tensor, column: Tensor) -> Tensor:
        rows, columns = self.rows.at(row), self.columns.at(column)

        def across(y: Tensor) -> Tensor:
            left = self.masks[:, y, columns.low].to(self.dtype).mul_(columns.low_weight)
            return left.addcmul_(self.masks[:, y, columns.high].to(self.dtype), columns.high_weight)

        return across(rows.low).mul_(rows.low_weight).addcmul_(across(rows.high), rows.high_weight)

    def spread(self, picked: Tensor) -> Tensor:
        """A map of the distinct picked pixels [R,C] as the target shows it [H,W]."""
        if len(self.row_of) > len(picked):
            picked = picked.index_select(0, self.row_of)
        if len(self.column_of) > picked.shape[1]:
            picked = picked.gather(1, self.column_of.expand(len(picked), -1))
        return picked

    def boxes(self, ids: Tensor, count: int) -> list[list[int]]:
        """Tight boxes [x, y, width, height] in the target of ids 1..count in a map of the picked pixels [R,C]."""
        spans = []
        for dim, position in ((1, self.column_of), (0, self.row_of)):
            size = ids.shape[dim]
            line = torch.arange(size, dtype=torch.int32, device=ids.device).unsqueeze(1 - dim)
            pixels = torch.bincount((ids * size + line).flatten(), minlength=(count + 1) * size)
            seen = (pixels.view(count + 1, size)[1:] > 0).to(torch.uint8)
            first = torch.searchsorted(position, seen.argmax(1))
            end = torch.searchsorted(position, size - 1 - seen.flip(1).argmax(1), right=True)
            spans.append((first, end - first))
        (x, width), (y, height) = spans
        return torch.stack([x, y, width, height], dim=1).tolist()


def _settle(logits: _Logits, first_of: Tensor, *, merge_for_good: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Merge, remove the segments of at most SMALLEST_AREA target pixels, and redo until none is left.

    Arguments:
        first_of: [K], the query whose segment each query joins (itself, or the first of its stuff class).
        merge_for_good: queries that joined a segment live and die with it. Otherwise, as upstream, they count 0 pixels
            themselves, and so are removed in the first round and lose their pixels, to any query.

    Returns:
        The winning query at each picked pixel [R,C], meaningless if no query is left; the queries left, bool [K];
        the target pixels of each query's segment, int64 [K].
    """
    count = len(first_of)
    alive = torch.ones_like(first_of, dtype=torch.bool)
    winners = logits.winners()
    while True:
        pixels = torch.bincount(logits.spread(winners).flatten(), minlength=count)
        area = torch.zeros_like(pixels).index_add_(0, first_of, pixels)
        if merge_for_good:
            area = area[first_of]
        small = alive & (area <= SMALLEST_AREA)
        alive = alive & ~small
        if not small.any() or not alive.any():
            return winners, alive, area
        lost = small[winners.long()].nonzero()
        winners[lost[:, 0], lost[:, 1]] = logits.winners_at(lost, alive).to(winners.dtype)


def is_thing(isthing: IsThing, label: int) -> Any:
    """Look `label` up in `isthing`, a function or a mapping; ValueError if the mapping lacks it."""
    if callable(isthing):
        return isthing(label)
    try:
        return isthing[label]
    except (KeyError, IndexError):
        raise ValueError(f"is_thing_map has no entry for class {label}, which was detected") from None


def _first_of_class(labels: list[int], isthing: IsThing, device: torch.device) -> Tensor:
    """For each query the first query of its class if that is stuff, else itself, int64 [K]."""
    first: dict[int, int] = {}
    stuff = {label: not is_thing(isthing, label) for label in set(labels)}
    return torch.tensor([first.setdefault(c, k) if stuff[c] else k for k, c in enumerate(labels)], device=device)


def pair(name: str, value: Any) -> tuple[int, int]:
    """`value` as (height, width) in pixels, ints of at least 1. Raises TypeError or ValueError with `name`."""
    items = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if not isinstance(items, tuple | list) or len(items) != 2:
        raise ValueError(f"{name} must be (height, width), got {value!r}")
    if not all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items):
        raise TypeError(f"{name} must hold two integers, got {value!r}")
    height, width = (item.__index__() for item in items)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1 x 1, got {height} x {width}")
    return height, width


def _check(pred_masks: Tensor, scores: Tensor, labels: Tensor) -> None:
    for name, value in (("pred_masks", pred_masks), ("scores", scores), ("labels", labels)):
        if not isinstance(value, Tensor) or value.is_floating_point() != (name != "labels"):
            kind = "an integer" if name == "labels" else "a floating point"
            raise TypeError(f"{name} must be {kind} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if pred_masks.ndim != 3 or 0 in pred_masks.shape[1:]:
        raise ValueError(f"pred_masks must be [K, h, w], got {list(pred_masks.shape)}")
    if tuple(scores.shape) != tuple(labels.shape) or tuple(labels.shape) != (len(pred_masks),):
        raise ValueError(
            f"scores and labels must be [{len(pred_masks)}], one for each of pred_masks, "
            f"got {list(scores.shape)} and {list(labels.shape)}"
        )


@torch.no_grad()
def upstream_panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: IsThing,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The panoptic merge of facebookresearch/detr's PostProcessPanoptic (models/segmentation.py), flaws included.

    Padding is not cropped: the logits are resized straight to the processed size. Stuff segments of one class are
    merged only to count the first areas: all but the first are then removed, and their pixels go to the next best
    query; the first is removed too if it is left with at most 4 pixels. Ids start at 0, which is also the id where
    nothing is found.

    Arguments:
        pred_masks: mask logits of the kept queries [K,h,w].
        scores, labels: of the kept queries, [K]; upstream's result does not depend on the scores.
        processed_size, target_size: (height, width) of the image as the model saw it, and of the result.
        isthing: mapping or function from class to whether it is a thing.

    Returns:
        Ids int32 [H,W], and a list of {"id", "isthing", "category_id", "area"} in order of the ids.

    Raises:
        TypeError, ValueError: shapes that do not fit, or a class that `isthing` lacks.
    """
    _check(pred_masks, scores, labels)
    processed, target = pair("processed_size", processed_size), pair("target_size", target_size)
    classes = labels.tolist()
    first_of = _first_of_class(classes, isthing, pred_masks.device)
    nothing = torch.zeros(target, dtype=torch.int32, device=pred_masks.device)
    if not classes:
        return nothing, []
    logits = _Logits(pred_masks, processed, processed, target)
    winners, alive, area = _settle(logits, first_of, merge_for_good=False)
    if not alive.any():
        return nothing, []
    kept, areas = alive.nonzero().flatten().tolist(), area.tolist()
    return logits.spread(take(alive.cumsum(0) - 1, winners)), [
        {"id": i, "isthing": is_thing(isthing, classes[k]), "category_id": classes[k], "area": areas[k]}
        for i, k in enumerate(kept)
    ]


@torch.no_grad()
def panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    padded_size: Sequence[int],
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: IsThing,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The corrected panoptic merge: padding cropped, one segment for each stuff class, ids from 1 and 0 for void.

    Every pixel of the processed image goes to the query with the largest logit, ties to the lower index; the target
    takes its pixels as PIL's NEAREST resize does. Segments of at most 4 target pixels are removed and their pixels go
    to the next best query, until none is left. 0 appears only where nothing is kept at all. Memory: a few integer maps
    of the target or the processed image, whichever is smaller, and floats within BLOCK_PIXELS and BLOCK_VALUES.

    Arguments:
        pred_masks: mask logits of the kept queries [K,h,w], over the whole padded image.
        scores, labels: of the kept queries, [K].
        padded_size: (height, width) of the batch that the model saw.
        processed_size: (height, width) of this image in it, at its top left.
        target_size: (height, width) of the result.
        isthing: mapping or function from class to whether it is a thing.

    Returns:
        Ids int32 [H,W], on the device of `pred_masks`, and a list of
        {"id", "category_id", "isthing", "score", "area", "bbox"} in order of the ids: the score of a merged segment is
        the largest of its queries', area counts target pixels, bbox is their tight [x, y, width, height].

    Raises:
        TypeError, ValueError: shapes that do not fit, or a class that `isthing` lacks.
    """
    _check(pred_masks, scores, labels)
    padded, processed = pair("padded_size", padded_size), pair("processed_size", processed_size)
    target = pair("target_size", target_size)
    if processed[0] > padded[0] or processed[1] > padded[1]:
        raise ValueError(f"processed_size must lie within padded_size {padded}, got {processed}")
    classes = labels.tolist()
    first_of = _first_of_class(classes, isthing, pred_masks.device)
    nothing = torch.zeros(target, dtype=torch.int32, device=pred_masks.device)
    if not classes:
        return nothing, []
    logits = _Logits(pred_masks, padded, processed, target)
    winners, alive, area = _settle(logits, first_of, merge_for_good=True)
    if not alive.any():
        return nothing, []
    leads = alive & (first_of == torch.arange(len(classes), device=first_of.device))
    ids, kept = take(leads.cumsum(0)[first_of], winners), leads.nonzero().flatten().tolist()
    best = torch.zeros_like(scores).scatter_reduce_(0, first_of, scores, "amax", include_self=False).tolist()
    areas, boxes = area.tolist(), logits.boxes(ids, len(kept))
    return logits.spread(ids), [
        {
            "id": i,
            "category_id": classes[k],
            "isthing": bool(is_thing(isthing, classes[k])),
            "score": best[k],
            "area": areas[k],
            "bbox": box,
        }
        for i, (k, box) in enumerate(zip(kept, boxes, strict=True), start=1)
    ]
