"""From the mask logits of the kept queries to one panoptic id map.

Two merges: `upstream_panoptic_merge` gives what facebookresearch/detr and transformers 4.x give, flaws included;
`panoptic_merge` is the corrected one, for data sets. Both evaluate only the pixels that the output keeps. Upstream
resizes the logits to the processed image, takes the argmax, and resizes that to the target with PIL's NEAREST; NEAREST
is a choice of rows and of columns, so the logits are needed there only, as a separable bilinear sum of four taps.
No softmax: it keeps the order of the logits, and its rounding can tie two only if they differ by less than 1e-6.
A bilinear sum stays between its taps. So where the four taps of one query are all above those of every other, it wins
each pixel between them, and nothing is summed: of smooth masks a seventh of the pixels is left.
A query that is removed changes the winner only where it won, so the merge is redone at those pixels alone.
"""

from __future__ import annotations

import math
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
BLOCK_VALUES = 1 << 21  # logits evaluated at once where they are few: about 50 MiB in float32
LEVELS = 32_000  # steps from 0 to the largest logit, in int16, by which queries are told apart
SCATTERED = 4  # a logit at a pixel that was chosen takes so many times as long as one of a whole plane


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


class Cells(NamedTuple):
    """One axis of the n cells between neighbouring source pixels, each with at least one of the picked pixels.

    Attributes:
        first: the source pixel at which the first cell begins.
        of: the cell of each picked pixel.
        pixels: the picked pixels of each cell [m,n], m the most that one has; those with fewer repeat their last.
        low_weight, high_weight: the weights of a cell's two source pixels there, [m,n].
    """

    first: int
    of: Tensor
    pixels: Tensor
    low_weight: Tensor
    high_weight: Tensor

    @property
    def number(self) -> int:
        return self.pixels.shape[1]


def _cells(taps: Taps) -> Cells | None:
    """None if there are none, or some have no pixel."""
    first, count = int(taps.low[0]), int(taps.high[-1] - taps.low[0])
    if count < 1:
        return None
    of = (taps.low - first).clamp(max=count - 1)
    filled = torch.bincount(of, minlength=count)
    if not filled.all():
        return None
    start = filled.cumsum(0) - filled
    pixels = start + torch.minimum(torch.arange(int(filled.max()), device=of.device)[:, None], filled - 1)
    last = taps.low == taps.high  # its two taps are one pixel: the high one of the cell
    low_weight = torch.where(last, 0, taps.low_weight)[pixels]
    high_weight = torch.where(last, taps.low_weight, taps.high_weight)[pixels]
    return Cells(first, of, pixels, low_weight, high_weight)


@lru_cache(maxsize=256)
def _axis(
    mask: int, padded: int, processed: int, target: int, dtype: torch.dtype, device: torch.device
) -> tuple[Taps, Cells | None, Tensor, np.ndarray]:
    """Taps and cells of the distinct pixels that the target picks along one axis, which of them each target pixel
    takes, and where in the target each begins."""
    distinct, position = np.unique(pil_nearest_indices(processed, target), return_inverse=True)
    taps = bilinear_taps(mask, padded, dtype, device).at(torch.from_numpy(distinct).to(device))
    edges = np.searchsorted(position, np.arange(len(distinct) + 1))
    return taps, _cells(taps), torch.from_numpy(position).to(device), edges


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
    return index.to(_index_dtype(count))


def _at_cells(table: Tensor, cells: Tensor) -> Tensor:
    """table[:, cells] of [m,n]; 20 times faster on a CPU than `index_select`."""
    return table.gather(1, cells.expand(len(table), -1))


def _index_dtype(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as int32, for an index map of a small integer dtype (torch would read uint8 as a mask)."""
    return table.int().index_select(0, index.flatten().int()).view(index.shape)


class Candidates(NamedTuple):
    """The queries that may win in each cell, int16 [C], row by row; the last cell of each row wraps and means nothing.

    May win: the largest of its four taps comes within one level of the least tap of the query whose least is largest;
    rounding moves a sum by far less.

    Attributes:
        number: how many.
        first, last: of them, if they are at most two.
        largest: tap of each query, [K,C].
        bound: the least that it must be.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    largest: Tensor
    bound: Tensor

    def all_of(self, cells: Tensor, most: int) -> Tensor:
        """The queries of some cells [U], of which none has more than `most`, in rising order, the last one repeated:
        int64 [most,U]."""
        queries = torch.arange(len(self.largest), device=cells.device)[:, None].expand(-1, len(cells))
        may_win = self.largest.gather(1, cells.expand(len(queries), -1)) >= self.bound[cells]
        place = torch.where(may_win, may_win.cumsum(0) - 1, most)
        return self.last[cells].long().repeat(most + 1, 1).scatter_(0, place, queries)[:most]


class _Logits:
    """Mask logits [K,h,w] seen through a bilinear resize, at R chosen rows and C chosen columns of it."""

    def __init__(self, masks: Tensor, padded: Sequence[int], processed: Sequence[int], target: Sequence[int]) -> None:
        self.masks = masks
        self.dtype = torch.promote_types(masks.dtype, torch.float32)
        axes = zip(masks.shape[1:], padded, processed, target, strict=True)
        rows, columns = (_axis(*axis, self.dtype, masks.device) for axis in axes)
        self.rows, self.row_cells, self.row_of, self.row_edges = rows
        self.columns, self.column_cells, self.column_of, self.column_edges = columns

    def winners(self) -> Tensor:
        """The query with the largest logit at each pixel, ties to the lower index, [R,C]."""
        winners = self._winners_of_cells()
        return self._winners_of_planes() if winners is None else winners

    def _winners_of_planes(self) -> Tensor:
        """From every logit."""
        step = max(1, BLOCK_PIXELS // len(self.columns.low))
        starts = range(0, len(self.rows.low), step)
        blocks = [argmax_of_planes(self._planes(self.rows.at(slice(i, i + step))), len(self.masks)) for i in starts]
        return torch.cat(blocks)

    def _winners_of_cells(self) -> Tensor | None:
        """The same from the few logits that leave a doubt; None where there are many, or few pixels to a cell."""
        rows, columns, count = self.row_cells, self.column_cells, len(self.masks)
        if rows is None or columns is None or len(rows.of) * len(columns.of) < 2 * rows.number * columns.number:
            return None
        lowest, highest = (float(value) for value in self.masks.aminmax())
        largest, numbers = max(-lowest, highest), torch.finfo(self.dtype)
        if not numbers.tiny / numbers.eps < largest < math.inf:  # nor is NaN: sums of such taps may be NaN
            return None
        found = self._candidates(rows, columns, LEVELS / largest)
        pairs, crowds = (where.nonzero()[:, 0] for where in (found.number == 2, found.number > 2))
        most = int(found.number.max())
        if SCATTERED * (2 * len(pairs) + most * len(crowds)) > count * rows.number * columns.number:
            return None
        winners = found.last.view(rows.number, -1).to(_index_dtype(count)).index_select(0, rows.of)
        winners = winners.gather(1, columns.of.expand(len(rows.of), -1))
        self._settle_cells(winners, rows, columns, pairs, torch.stack([found.first[pairs], found.last[pairs]]).long())
        self._settle_cells(winners, rows, columns, crowds, found.all_of(crowds, most))
        return winners

    def _candidates(self, rows: Cells, columns: Cells, levels: float) -> Candidates:
        """In int16 and along one line, which wraps from row to row, a plane of 800 x 1066 takes 0.05 ms."""
        height, width = rows.number, columns.number + 1
        taps = self.masks[:, rows.first : rows.first + height + 1, columns.first : columns.first + width]
        device, size = taps.device, height * width
        scaled = torch.empty((height + 1, width), dtype=self.dtype, device=device)
        level = torch.empty(scaled.shape, dtype=torch.int16, device=device)
        upper, lower = level.flatten()[:-width], level.flatten()[width:]
        down, flag = (torch.empty(size, dtype=torch.int16, device=device) for _ in range(2))
        bound = torch.full_like(down, -LEVELS)
        most = torch.empty((len(self.masks), size), dtype=torch.int16, device=device)
        for mask, largest in zip(taps, most, strict=True):
            level.copy_(torch.mul(mask.to(self.dtype), levels, out=scaled))
            torch.minimum(upper, lower, out=down)
            torch.maximum(bound[:-1], torch.minimum(down[:-1], down[1:], out=flag[:-1]), out=bound[:-1])
            torch.maximum(upper, lower, out=down)
            torch.maximum(down[:-1], down[1:], out=largest[:-1])
        bound -= 1
        count, total, last = (torch.zeros_like(bound) for _ in range(3))
        for k, largest in enumerate(most):
            count += torch.ge(largest, bound, out=flag)
            total += flag.mul_(k)
            torch.maximum(last, flag, out=last)
        count.view(height, width)[:, -1] = 1
        return Candidates(count, total - last, last, most, bound)

    def _settle_cells(self, winners: Tensor, rows: Cells, columns: Cells, cells: Tensor, queries: Tensor) -> None:
        """Writes the winners of some cells [U], of which each has its own candidates, [N,U] in rising order."""
        width = columns.number + 1
        step = max(1, BLOCK_VALUES // (len(queries) * len(rows.pixels) * len(columns.pixels)))
        for some, candidates in zip(cells.split(step), queries.split(step, dim=1), strict=True):
            y = some.div(width, rounding_mode="floor")
            x = some - y * width
            values = self._in_cells(rows, columns, y, x, candidates)
            index = argmax_of_planes(values, len(values)).long()
            found = candidates.gather(0, index.flatten(0, 1)).to(winners.dtype)
            place = _at_cells(rows.pixels, y)[:, None] * winners.shape[1] + _at_cells(columns.pixels, x)
            winners.view(-1).scatter_(0, place.flatten(), found.flatten())

    def _in_cells(self, rows: Cells, columns: Cells, y: Tensor, x: Tensor, queries: Tensor) -> Tensor:
        """Logits of queries [N,U] at the pixels of the cells (y, x), each [U]: [N,m,n,U], summed as `_planes` does."""
        _, height, width = self.masks.shape
        corner = (queries * height + y + rows.first) * width + x + columns.first
        left_weight, right_weight = (_at_cells(weight, x) for weight in columns[3:])
        upper_weight, lower_weight = (_at_cells(weight, y)[:, None] for weight in rows[3:])

        def across(left: Tensor) -> Tensor:
            row = self.masks.take(left).to(self.dtype)[:, None] * left_weight
            return row.addcmul_(self.masks.take(left + 1).to(self.dtype)[:, None], right_weight)[:, None]

        return (across(corner) * upper_weight).addcmul_(across(corner + width), lower_weight)

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

    def runs(self, winners: Tensor) -> Runs:
        """A map of the distinct picked pixels [R,C], as the target shows it.

        By NumPy, on the host: smooth masks leave a few thousand runs, and torch takes four times as long to find them.
        """
        values = winners.cpu().numpy()
        begins = np.ones(values.shape, dtype=bool)
        np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
        places = np.flatnonzero(begins)
        row, column = np.divmod(places, values.shape[1])
        end = np.append(column[1:], 0)
        end[end == 0] = values.shape[1]
        x, y = self.column_edges, self.row_edges
        return Runs(values.ravel()[places], x[column], y[row], x[end], y[row + 1])


class Runs(NamedTuple):
    """Rectangles of target pixels that one query won, each [N]: the pixels of one picked row between two changes."""

    query: np.ndarray
    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray

    def areas(self, count: int) -> np.ndarray:
        """Target pixels of each of `count` queries, int64 [K]."""
        pixels = (self.right - self.left) * (self.bottom - self.top)
        return np.bincount(self.query, weights=pixels, minlength=count).astype(np.int64)

    def boxes(self, segment: np.ndarray, count: int) -> list[list[int]]:
        """Tight boxes [x, y, width, height] of segments 0 to `count` - 1, to which the queries [K] belong."""
        own = segment[self.query]
        low, high = np.full((2, count), np.iinfo(np.int64).max), np.zeros((2, count), dtype=np.int64)
        for axis, (first, last) in enumerate(((self.left, self.right), (self.top, self.bottom))):
            np.minimum.at(low[axis], own, first)
            np.maximum.at(high[axis], own, last)
        return np.concatenate([low, high - low]).T.tolist()


def _settle(logits: _Logits, first_of: Tensor, *, merge_for_good: bool) -> tuple[Tensor, Tensor, Tensor, Runs]:
    """Merge, remove the segments of at most SMALLEST_AREA target pixels, and redo until none is left.

    Arguments:
        first_of: [K], the query whose segment each query joins (itself, or the first of its stuff class).
        merge_for_good: queries that joined a segment live and die with it. Otherwise, as upstream, they count 0 pixels
            themselves, and so are removed in the first round and lose their pixels, to any query.

    Returns:
        The winning query at each picked pixel [R,C], meaningless if no query is left; the queries left, bool [K];
        the target pixels of each query's segment, int64 [K]; the winners as runs.
    """
    count = len(first_of)
    alive = torch.ones_like(first_of, dtype=torch.bool)
    winners = logits.winners()
    while True:
        runs = logits.runs(winners)
        pixels = torch.from_numpy(runs.areas(count)).to(first_of.device)
        area = torch.zeros_like(pixels).index_add_(0, first_of, pixels)
        if merge_for_good:
            area = area[first_of]
        small = alive & (area <= SMALLEST_AREA)
        alive = alive & ~small
        if not small.any() or not alive.any():
            return winners, alive, area, runs
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
    winners, alive, area, _ = _settle(logits, first_of, merge_for_good=False)
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
    of the target or the processed image, whichever is smaller, the masks in int16, and floats within BLOCK_PIXELS and
    BLOCK_VALUES.

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
    winners, alive, area, runs = _settle(logits, first_of, merge_for_good=True)
    if not alive.any():
        return nothing, []
    leads = alive & (first_of == torch.arange(len(classes), device=first_of.device))
    id_of, kept = leads.cumsum(0)[first_of], leads.nonzero().flatten().tolist()
    best = torch.zeros_like(scores).scatter_reduce_(0, first_of, scores, "amax", include_self=False).tolist()
    areas, boxes = area.tolist(), runs.boxes(id_of.cpu().numpy() - 1, len(kept))
    return logits.spread(take(id_of, winners)), [
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
