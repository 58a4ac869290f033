"""The largest of K bilinearly resized mask logits at the few pixels that a panoptic map needs, on a CPU.

Only pixels that the output keeps are evaluated. Upstream resizes the logits to the processed image, takes the argmax,
and resizes that to the target with PIL's NEAREST; NEAREST is a choice of rows and of columns, so the logits are needed
there only, as a separable bilinear sum of four taps.
No softmax: it keeps the order of the logits, and its rounding can tie two only if they differ by less than 1e-6.
A bilinear sum stays between its taps. So where the four taps of one query are all above those of every other, it wins
each pixel between them, and nothing is summed: of smooth masks a seventh of the pixels is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from detr_fast.reference import NOWHERE, Taps, at_least_float32, bilinear_taps
from detr_fast.resampling import pil_nearest_indices

BLOCK_PIXELS = 1 << 19  # pixels evaluated at once: about six maps of 2 MiB in float32, for any number of queries
BLOCK_VALUES = 1 << 21  # logits evaluated at once where they are few: about 50 MiB in float32
LEVELS = 32_000  # steps from 0 to the largest logit, in int16, by which queries are told apart
SCATTERED = 4  # a logit at a pixel that was chosen takes so many times as long as one of a whole plane


def argmax_of_planes(planes: Iterable[Tensor], count: int) -> Tensor:
    """Index of the largest of `count` planes [H,W] at each pixel, ties to the lower index, in a small integer dtype.

    Holds one plane at a time; `Tensor.argmax(0)` over a stack is also several times slower on a CPU.
    """
    iterator = iter(planes)
    best = next(iterator).clone()
    exact = at_least_float32(best.dtype)  # to all of them; 16 bits are not
    index, wins = torch.zeros_like(best, dtype=exact), torch.empty_like(best, dtype=exact)
    for k, plane in enumerate(iterator, start=1):
        # k only grows, so a maximum writes it; in floats, exact here, a CPU is 7 times faster than in bool and uint8
        torch.maximum(index, torch.gt(plane, best, out=wins).mul_(k), out=index)
        torch.maximum(best, plane, out=best)
    return index.to(_index_dtype(count))


def _index_dtype(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


def take(table: np.ndarray, index: Tensor) -> Tensor:
    """table[index], in a small integer dtype, for an index map of one (torch would read uint8 as a mask)."""
    entries = torch.from_numpy(table.astype(np.uint8 if table.max(initial=0) < 256 else np.int32)).to(index.device)
    return entries.index_select(0, index.flatten().int()).view(index.shape)


class Cells(NamedTuple):
    """One axis of the cells that the intervals between neighbouring source pixels are, each with at least one of the
    picked pixels. Those of an image's first and last interval that lie beyond a source pixel are a cell of their own:
    else these intervals alone would have half as many again, and every cell as many places.

    Attributes:
        first: the source pixel at which the first interval begins.
        intervals: how many there are.
        of: the interval of each picked pixel.
        interval: that of each of the n cells.
        pixels: the picked pixels of each cell [m,n], m the most that one has; those with fewer repeat their last.
        low_weight, high_weight: the weights of an interval's two source pixels there, [m,n].
    """

    first: int
    intervals: int
    of: np.ndarray
    interval: np.ndarray
    pixels: np.ndarray
    low_weight: np.ndarray
    high_weight: np.ndarray

    def weights(self, cells: np.ndarray) -> tuple[Tensor, Tensor]:
        """`low_weight` and `high_weight` of N cells, [m,N]."""
        low, high = (weight.take(cells, axis=1) for weight in (self.low_weight, self.high_weight))
        return torch.from_numpy(low), torch.from_numpy(high)


def _cells(taps: Taps) -> Cells | None:
    """None if there are none, or some have no pixel."""
    first, intervals = int(taps.low[0]), int(taps.high[-1] - taps.low[0])
    if intervals < 1:
        return None
    before = (first == 0) & (taps.low == 0) & (taps.high_weight == 0)
    after = taps.low == taps.high  # both are the last source pixel: the high one of the interval
    of = (taps.low - first).clamp(max=intervals - 1)
    cell = of - before.long() + after.long()
    filled = torch.bincount(cell - cell[0])
    if not filled.all():
        return None
    start = filled.cumsum(0) - filled
    pixels = start + torch.minimum(torch.arange(int(filled.max()), device=of.device)[:, None], filled - 1)
    low_weight = torch.where(after, 0, taps.low_weight)[pixels]
    high_weight = torch.where(after, taps.low_weight, taps.high_weight)[pixels]
    return Cells(first, intervals, *(x.numpy() for x in (of, of[start], pixels, low_weight, high_weight)))


@lru_cache(maxsize=256)
def _axis(
    mask: int, padded: int, processed: int, target: int, dtype: torch.dtype, device: torch.device
) -> tuple[Taps, Cells | None, Tensor, np.ndarray]:
    """Taps and cells of the distinct pixels that the target picks along one axis, which of them each target pixel
    takes, and where in the target each begins."""
    distinct, position = np.unique(pil_nearest_indices(processed, target), return_inverse=True)
    taps = bilinear_taps(mask, padded, dtype, device).at(torch.from_numpy(distinct).to(device))
    edges = np.searchsorted(position, np.arange(len(distinct) + 1))
    cells = _cells(taps) if device.type == "cpu" else None  # GPUs have a kernel
    return taps, cells, torch.from_numpy(position).to(device), edges


class Candidates(NamedTuple):
    """The queries that may win in each interval of rows and columns, row by row, [C]; the last interval of each row
    wraps and means nothing.

    May win: the largest of its four taps comes within one level of the least tap of the query whose least is largest;
    rounding moves a sum by far less.

    Attributes:
        number: how many.
        first: of them, where they are two.
        last: of them.
        largest: tap of each query, int16 [K,C].
        bound: the least that it must be.
    """

    number: np.ndarray
    first: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    bound: np.ndarray

    def both_of(self, intervals: np.ndarray) -> np.ndarray:
        """The queries of N intervals that have two, in rising order: [2,N]."""
        return np.stack([self.first[intervals], self.last[intervals]])

    def all_of(self, intervals: np.ndarray) -> np.ndarray:
        """The queries of N intervals in rising order, the last one repeated: [M,N], M the most that one has."""
        number, last = self.number[intervals].astype(np.int64), self.last[intervals]
        of, query = (self.largest.take(intervals, axis=1) >= self.bound[intervals]).T.nonzero()
        queries = last[None].repeat(number.max(initial=1), axis=0)
        queries[np.arange(len(of)) - (number.cumsum() - number)[of], of] = query
        return queries


def _candidates(masks: Iterable[np.ndarray], number: int, rows: Cells, columns: Cells, levels: float) -> Candidates:
    """In int16 and along one line, which wraps from row to row, and by NumPy, as torch takes twice as long for views
    that are not aligned: a plane of 200 x 267 takes 0.06 ms."""
    height, width = rows.intervals, columns.intervals + 1
    taps = np.s_[rows.first : rows.first + height + 1, columns.first : columns.first + width]
    level = np.empty((height + 1, width), np.int16)
    upper, lower = level[:-1].ravel(), level[1:].ravel()
    down, across = np.empty_like(upper), np.empty_like(upper)
    bound = np.full_like(upper, -LEVELS)
    most = np.zeros((number, len(bound)), np.int16)
    for mask, largest in zip(masks, most, strict=True):
        level[:] = mask[taps] * mask.dtype.type(levels)
        np.minimum(upper, lower, out=down)
        np.maximum(bound[:-1], np.minimum(down[:-1], down[1:], out=across[:-1]), out=bound[:-1])
        np.maximum(upper, lower, out=down)
        np.maximum(down[:-1], down[1:], out=largest[:-1])
    bound -= 1
    count, total, last, query = np.zeros((4, len(bound)), np.uint8 if number < 256 else np.int32)
    flag = np.empty(len(bound), bool)
    for k, largest in enumerate(most):
        wins = np.greater_equal(largest, bound, out=flag).view(np.uint8)
        count += wins
        np.multiply(wins, count.dtype.type(k), out=query)
        total += query  # may overflow, and comes back when `last` is taken from it
        np.maximum(last, query, out=last)
    return Candidates(count, total - last, last, most, bound)


class Logits:
    """Mask logits [K,h,w] seen through a bilinear resize, at R chosen rows and C chosen columns of it."""

    def __init__(self, masks: Tensor, padded: Sequence[int], processed: Sequence[int], target: Sequence[int]) -> None:
        self.masks = masks
        self.dtype = at_least_float32(masks.dtype)
        axes = zip(masks.shape[1:], padded, processed, target, strict=True)
        rows, columns = (_axis(*axis, self.dtype, masks.device) for axis in axes)
        self.rows, self.row_cells, self.row_of, self.row_edges = rows
        self.columns, self.column_cells, self.column_of, self.column_edges = columns

    def winners(self, label: np.ndarray) -> Tensor:
        """The label [K] of the query with the largest logit at each pixel, ties to the lower index, [R,C]."""
        winners = self._winners_of_cells(label)
        return take(label, self._winners_of_planes()) if winners is None else winners

    def _winners_of_planes(self) -> Tensor:
        """The query, from every logit."""
        step = max(1, BLOCK_PIXELS // len(self.columns.low))
        starts = range(0, len(self.rows.low), step)
        blocks = [argmax_of_planes(self._planes(self.rows.at(slice(i, i + step))), len(self.masks)) for i in starts]
        return torch.cat(blocks)

    def _winners_of_cells(self, label: np.ndarray) -> Tensor | None:
        """The same from the few logits that leave a doubt; None where there are many, or few pixels to a cell."""
        rows, columns, count = self.row_cells, self.column_cells, len(self.masks)
        if rows is None or columns is None or len(rows.of) * len(columns.of) < 2 * rows.intervals * columns.intervals:
            return None
        masks = self.masks.detach()
        lowest, highest = (float(limit) for limit in masks.aminmax())
        largest, numbers = max(-lowest, highest), torch.finfo(self.dtype)
        if not numbers.tiny / numbers.eps < largest < math.inf:  # nor is NaN: sums of such taps may be NaN
            return None
        planes = (mask.to(self.dtype).numpy() for mask in masks)
        found = _candidates(planes, count, rows, columns, LEVELS / largest)
        number = found.number.reshape(rows.intervals, -1).take(columns.interval, axis=1).take(rows.interval, axis=0)
        pairs, crowds = np.flatnonzero(number == 2), np.flatnonzero(number > 2)
        if SCATTERED * (2 * len(pairs) + int(number.max()) * len(crowds)) > count * number.size:
            return None
        label = label.astype(found.last.dtype)
        won = label.take(found.last).reshape(rows.intervals, -1).take(columns.of, axis=1).take(rows.of, axis=0)
        for cells, queries_of in ((pairs, found.both_of), (crowds, found.all_of)):
            y, x = np.divmod(cells, len(columns.interval))
            queries = queries_of(rows.interval[y] * (columns.intervals + 1) + columns.interval[x])
            step = max(1, BLOCK_VALUES // (len(queries) * len(rows.pixels) * len(columns.pixels)))
            for some in (slice(start, start + step) for start in range(0, len(cells), step)):
                self._settle_cells(won, label, y[some], x[some], queries[:, some])
        return torch.from_numpy(won)

    def _settle_cells(
        self, won: np.ndarray, label: np.ndarray, y: np.ndarray, x: np.ndarray, queries: np.ndarray
    ) -> None:
        """Writes who won the pixels of the cells (y, x), each [N], of which each has its own candidates, [M,N] in
        rising order."""
        rows, columns = cast(Cells, self.row_cells), cast(Cells, self.column_cells)
        values = self._in_cells(rows, columns, y, x, queries.astype(np.int64))
        labels = label[queries]
        best, found = values[0], labels[0]
        for value, challenger in zip(values[1:], labels[1:], strict=True):
            found = found + (value > best).view(np.uint8) * (challenger - found)  # `np.where` takes 20 times as long
            np.maximum(best, value, out=best)
        place = rows.pixels.take(y, axis=1)[:, None] * won.shape[1] + columns.pixels.take(x, axis=1)
        won.reshape(-1)[place] = found

    def _in_cells(self, rows: Cells, columns: Cells, y: np.ndarray, x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Logits of queries [M,N] at the pixels of the cells (y, x), each [N]: [M,m,n,N], summed as `_planes` does."""
        _, height, width = self.masks.shape
        top, left = rows.interval[y] + rows.first, columns.interval[x] + columns.first
        corner = torch.from_numpy((queries * height + top) * width + left)
        left_weight, right_weight = columns.weights(x)
        upper_weight, lower_weight = (weight[:, None] for weight in rows.weights(y))

        def across(left: Tensor) -> Tensor:
            row = self.masks.take(left).to(self.dtype)[:, None] * left_weight
            return row.addcmul_(self.masks.take(left + 1).to(self.dtype)[:, None], right_weight)[:, None]

        return (across(corner) * upper_weight).addcmul_(across(corner + width), lower_weight).numpy()

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

    def runs(self, won: Tensor) -> Runs:
        """A map of the distinct picked pixels [R,C], as the target shows it."""
        return runs(won, self.row_edges, self.column_edges)


class Runs(NamedTuple):
    """Rectangles of target pixels of one label, each [N]: the pixels of one picked row between two changes."""

    label: np.ndarray
    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray

    def areas(self, count: int) -> np.ndarray:
        """Target pixels of each of `count` labels, int64."""
        pixels = (self.right - self.left) * (self.bottom - self.top)
        return np.bincount(self.label, weights=pixels, minlength=count).astype(np.int64)

    def boxes(self, count: int) -> np.ndarray:
        """Tight boxes (left, top, right, bottom) of `count` labels, as `reference.Merged` has them: int32 [count,4]."""
        low, high = np.full((2, count), NOWHERE, dtype=np.int64), np.zeros((2, count), dtype=np.int64)
        for axis, (first, last) in enumerate(((self.left, self.right), (self.top, self.bottom))):
            np.minimum.at(low[axis], self.label, first)
            np.maximum.at(high[axis], self.label, last)
        return np.concatenate([low, high]).T.astype(np.int32)


def runs(won: Tensor, row_edges: np.ndarray, column_edges: np.ndarray) -> Runs:
    """A map [R,C], whose rows and columns begin at the target's pixels row_edges [R+1] and column_edges [C+1].

    By NumPy, on the host: smooth masks leave a few thousand runs, and torch takes four times as long to find them.
    """
    values = won.cpu().numpy()
    begins = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    places = np.flatnonzero(begins)
    row, column = np.divmod(places, values.shape[1])
    end = np.append(column[1:], 0)
    end[end == 0] = values.shape[1]
    labels = values.ravel()[places]
    return Runs(labels, column_edges[column], row_edges[row], column_edges[end], row_edges[row + 1])
