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
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from detr_fast.reference import SMALLEST_AREA, Taps, bilinear_taps
from detr_fast.resampling import pil_nearest_indices

IsThing = Callable[[int], Any] | Mapping[int, Any]

BLOCK_PIXELS = 1 << 19  # pixels evaluated at once: about six maps of 2 MiB in float32, for any number of queries
BLOCK_VALUES = 1 << 21  # logits evaluated at once where they are few: about 50 MiB in float32
LEVELS = 32_000  # steps from 0 to the largest logit, in int16, by which queries are told apart
SCATTERED = 4  # a logit at a pixel that was chosen takes so many times as long as one of a whole plane


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


def argmax_of_planes(planes: Iterable[Tensor], count: int) -> Tensor:
    """Index of the largest of `count` planes [H,W] at each pixel, ties to the lower index, in a small integer dtype.

    Holds one plane at a time; `Tensor.argmax(0)` over a stack is also several times slower on a CPU.
    """
    iterator = iter(planes)
    best = next(iterator).clone()
    exact = torch.promote_types(best.dtype, torch.float32)  # to all of them; 16 bits are not
    index, wins = torch.zeros_like(best, dtype=exact), torch.empty_like(best, dtype=exact)
    for k, plane in enumerate(iterator, start=1):
        # k only grows, so a maximum writes it; in floats, exact here, a CPU is 7 times faster than in bool and uint8
        torch.maximum(index, torch.gt(plane, best, out=wins).mul_(k), out=index)
        torch.maximum(best, plane, out=best)
    return index.to(_index_dtype(count))


def _index_dtype(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


def take(table: np.ndarray, index: Tensor) -> Tensor:
    """table[index] as int32, for an index map of a small integer dtype (torch would read uint8 as a mask)."""
    entries = torch.from_numpy(table.astype(np.int32)).to(index.device)
    return entries.index_select(0, index.flatten().int()).view(index.shape)


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


class _Logits:
    """Mask logits [K,h,w] seen through a bilinear resize, at R chosen rows and C chosen columns of it."""

    def __init__(self, masks: Tensor, padded: Sequence[int], processed: Sequence[int], target: Sequence[int]) -> None:
        self.masks = masks
        self.dtype = torch.promote_types(masks.dtype, torch.float32)
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
        """A map of the distinct picked pixels [R,C], as the target shows it.

        By NumPy, on the host: smooth masks leave a few thousand runs, and torch takes four times as long to find them.
        """
        values = won.cpu().numpy()
        begins = np.ones(values.shape, dtype=bool)
        np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
        places = np.flatnonzero(begins)
        row, column = np.divmod(places, values.shape[1])
        end = np.append(column[1:], 0)
        end[end == 0] = values.shape[1]
        x, y = self.column_edges, self.row_edges
        return Runs(values.ravel()[places], x[column], y[row], x[end], y[row + 1])


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

    def boxes(self, count: int) -> list[list[int]]:
        """Tight boxes [x, y, width, height] of `count` labels; nonsense of one without pixels."""
        low, high = np.full((2, count), np.iinfo(np.int64).max), np.zeros((2, count), dtype=np.int64)
        for axis, (first, last) in enumerate(((self.left, self.right), (self.top, self.bottom))):
            np.minimum.at(low[axis], self.label, first)
            np.maximum.at(high[axis], self.label, last)
        return np.concatenate([low, high - low]).T.tolist()


class Settled(NamedTuple):
    """What is left of some labels: the label of each picked pixel [R,C], in a small integer dtype and meaningless if no
    label is left; the labels that are, bool [S]; the target pixels that each counts, int64 [S]; all as rectangles."""

    won: Tensor
    alive: np.ndarray
    area: np.ndarray
    runs: Runs


def _settle(logits: _Logits, label: np.ndarray, counts_for: np.ndarray) -> Settled:
    """Merge, remove the labels of at most SMALLEST_AREA target pixels, and redo until none is left.

    Arguments:
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


def is_thing(isthing: IsThing, label: int) -> Any:
    """Look `label` up in `isthing`, a function or a mapping; ValueError if the mapping lacks it."""
    if callable(isthing):
        return isthing(label)
    try:
        return isthing[label]
    except (KeyError, IndexError):
        raise ValueError(f"is_thing_map has no entry for class {label}, which was detected") from None


def _first_of_class(labels: list[int], isthing: IsThing) -> np.ndarray:
    """For each query the first query of its class if that is stuff, else itself, int64 [K]."""
    first: dict[int, int] = {}
    stuff = {label: not is_thing(isthing, label) for label in set(labels)}
    return np.array([first.setdefault(c, k) if stuff[c] else k for k, c in enumerate(labels)], dtype=np.int64)


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
    first_of = _first_of_class(classes, isthing)
    nothing = torch.zeros(target, dtype=torch.int32, device=pred_masks.device)
    if not classes:
        return nothing, []
    logits = _Logits(pred_masks, processed, processed, target)
    # the parts of one stuff class but the first count no pixels themselves, and so are removed in the first round
    settled = _settle(logits, np.arange(len(classes)), first_of)
    if not settled.alive.any():
        return nothing, []
    areas = settled.area.tolist()
    return _ids(logits, settled, 0), [
        {"id": i, "isthing": is_thing(isthing, classes[k]), "category_id": classes[k], "area": areas[k]}
        for i, k in enumerate(np.flatnonzero(settled.alive).tolist())
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
    first_of = _first_of_class(classes, isthing)
    nothing = torch.zeros(target, dtype=torch.int32, device=pred_masks.device)
    if not classes:
        return nothing, []
    logits = _Logits(pred_masks, padded, processed, target)
    leads, segment = np.unique(first_of, return_inverse=True)
    settled = _settle(logits, segment, np.arange(len(leads)))
    if not settled.alive.any():
        return nothing, []
    best, values = [-math.inf] * len(leads), scores.tolist()
    for k, s in enumerate(segment.tolist()):
        best[s] = max(best[s], values[k])
    areas, boxes = settled.area.tolist(), settled.runs.boxes(len(leads))
    return _ids(logits, settled, 1), [
        {
            "id": i,
            "category_id": classes[leads[s]],
            "isthing": bool(is_thing(isthing, classes[leads[s]])),
            "score": best[s],
            "area": areas[s],
            "bbox": boxes[s],
        }
        for i, s in enumerate(np.flatnonzero(settled.alive).tolist(), start=1)
    ]


def _ids(logits: _Logits, settled: Settled, first: int) -> Tensor:
    """The map of the labels that are left, counted from `first`, int32 [H,W]."""
    won = settled.won
    ids = won.int().add_(first) if settled.alive.all() else take(settled.alive.cumsum() - 1 + first, won)
    return logits.spread(ids)
