"""Panoptic merge of a batch: from the mask logits of kept queries to one id map an image, without a host round trip.

Images of different sizes and numbers of queries share each launch. The last resize of the merge, PIL's NEAREST, picks
rows and columns, so `winners_kernel` samples the bilinear logits of every query only at the pixels that it picks (never
more than the target has, never more than the processed image has), keeps the argmax in registers (ties to the lower
index), writes one byte, and counts areas and boxes, each picked pixel as often as the target repeats it. `write_kernel`
spreads the bytes over the target as ids.

Small segments. The definition removes the segments of at most 4 pixels and merges anew "until none is left", a loop
with a round trip for each turn. It needs no loop. A query that is removed changes the winner only where it won, so a
query that stays never loses a pixel: what has more than 4 pixels when a round ends keeps them for good.
 - Merge for good (ours): a stuff class lives and dies as one segment. All small ones are removed in the first round,
   and those that stay only grow: one round.
 - facebookresearch's: the first round counts each stuff class as one segment, then undoes that: it removes all of a
   class but its first query, and only then does each query stand for itself. What that leaves with at most 4 pixels
   goes in a second round, and those that stay only grow: two rounds.
So the number of launches is fixed (4 and 6). Where nothing was removed a redo reads one byte a pixel and no logits.
Areas and boxes are integer atomics, whose sum, minimum and maximum do not depend on the order: the same bits each run.
No kernel reads a count that it, or another program of its launch, adds to.

What it saves: with K queries of 800x1066 shown at 640x480 the plain definition writes and reads K * 3.4 MB of resized
logits, 2 more for a softmax, and again in each round; here K * 107 KB of logits in 16 bits, 0.3 MB of winners and 0.3
MB of ids. 14 FLOP a query and picked pixel: bound by loads from L1.

`weighted_merge` is transformers' merge: probabilities times scores, an overlap check in place of the small segments,
and its own numbering. Sources: Carion et al. 2020, section 4.2; facebookresearch/detr, models/segmentation.py
(PostProcessPanoptic); transformers, DetrImageProcessor.post_process_panoptic_segmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import Build, Target, build, config_for, device_of, dtypes_on, operation
from detr_fast.kernels.ragged import (
    Size,
    Tables,
    check_crop,
    check_masks,
    image_of,
    load_taps,
    pairs,
    plane_offset,
    sample,
    strided_masks,
    taps_table,
    tiles_of,
)
from detr_fast.resampling import pil_nearest_indices

SMALL = tl.constexpr(reference.SMALLEST_AREA)
NOWHERE = tl.constexpr(reference.NOWHERE)  # left and top of the box of no pixels

# Counts of a query, int32 [N, STATS].
STATS = tl.constexpr(5)
AREA = tl.constexpr(0)
LEFT = tl.constexpr(1)
TOP = tl.constexpr(2)
RIGHT = tl.constexpr(3)  # exclusive
BOTTOM = tl.constexpr(4)  # exclusive

# Fields of an image in the header, int64 [images, FIELDS]. Tables are int32, and these their offsets.
FIELDS = tl.constexpr(14)
PICKED_TILE = tl.constexpr(0)  # first tile of the image in a launch over picked pixels
TARGET_TILE = tl.constexpr(1)  # the same over target pixels
COUNT = tl.constexpr(2)  # queries
FIRST = tl.constexpr(3)  # the first of them
PICKED_HEIGHT = tl.constexpr(4)
PICKED_WIDTH = tl.constexpr(5)
HEIGHT = tl.constexpr(6)  # of the target
WIDTH = tl.constexpr(7)
# an axis table, for n picked of m target positions: taps [3 * n], the first target position of each [n + 1], and the
# picked position of each target position [m]
ROWS = tl.constexpr(8)
COLUMNS = tl.constexpr(9)
WINNERS = tl.constexpr(10)  # offset of its picked pixels
OUT = tl.constexpr(11)  # offset of its target pixels
# two fields are left free: a header of 16-byte rows keeps the tables behind it aligned


@triton.jit
def best_query(
    masks_ptr,
    allowed_ptr,
    scores_ptr,
    own_ptr,
    first,
    count,
    stride_mn,
    top,
    bottom,
    left,
    right,
    top_weight,
    bottom_weight,
    left_weight,
    right_weight,
    mask,
    mask_threshold,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The query with the largest value at a tile of pixels, ties to the lower index; -1 if none may win.

    Among those that are not negative in allowed_ptr, if given. With scores_ptr values are multiplied by their query's
    score, and own_ptr counts those of at least mask_threshold.
    """
    best = tl.full([BLOCK_H, BLOCK_W], float("-inf"), tl.float32)  # [BLOCK_H, BLOCK_W]
    winner = tl.full([BLOCK_H, BLOCK_W], -1, tl.int32)  # [BLOCK_H, BLOCK_W]
    for k in range(count):
        allowed = True
        if allowed_ptr is not None:
            allowed = tl.load(allowed_ptr + first + k) >= 0
        if allowed:
            value = sample(
                masks_ptr + plane_offset(first + k, stride_mn),
                top,
                bottom,
                left,
                right,
                top_weight,
                bottom_weight,
                left_weight,
                right_weight,
                mask,
            )  # [BLOCK_H, BLOCK_W]
            if scores_ptr is not None:
                value = value * tl.load(scores_ptr + first + k)
                own = tl.sum(tl.sum((mask & (value >= mask_threshold)).to(tl.int32), 1), 0)
                tl.atomic_add(own_ptr + first + k, own, mask=own > 0, sem="relaxed")
            better = (value > best) | (winner < 0)
            best = tl.where(better, value, best)
            winner = tl.where(better, k, winner)
    return winner


@triton.jit
def count_winners(stats_ptr, winner, mask, count, area, left, right, top, bottom):
    """Add a tile of winners, where mask, to the counts of an image: target pixels and boxes.

    One turn for each query that won there, of which there are few; winners rise from turn to turn, so it ends.

    area [BLOCK_H, BLOCK_W] is how many target pixels each pixel is; they end before column right and row bottom.
    """
    rest = tl.where(mask, winner, count)  # [BLOCK_H, BLOCK_W]
    k = tl.min(tl.min(rest, 1), 0)
    while k < count:
        won = rest == k  # [BLOCK_H, BLOCK_W]
        k_ptr = stats_ptr + k * STATS
        tl.atomic_add(k_ptr + AREA, tl.sum(tl.sum(tl.where(won, area, 0), 1), 0), sem="relaxed")
        tl.atomic_min(k_ptr + LEFT, tl.min(tl.min(tl.where(won, left, NOWHERE), 1), 0), sem="relaxed")
        tl.atomic_min(k_ptr + TOP, tl.min(tl.min(tl.where(won, top, NOWHERE), 1), 0), sem="relaxed")
        tl.atomic_max(k_ptr + RIGHT, tl.max(tl.max(tl.where(won, right, 0), 1), 0), sem="relaxed")
        tl.atomic_max(k_ptr + BOTTOM, tl.max(tl.max(tl.where(won, bottom, 0), 1), 0), sem="relaxed")
        rest = tl.where(won, count, rest)
        k = tl.min(tl.min(rest, 1), 0)


@triton.jit
def start_kernel(
    labels_ptr, isthing_ptr, lead_ptr, stats_ptr, own_ptr, header_ptr, LEADS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One image: no counts yet; and the query that each joins, itself or, if it is stuff, the first of its class."""
    header_ptr += tl.program_id(0) * FIELDS
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask = k < count
        zero = tl.zeros([BLOCK_K], tl.int32)
        k_ptr = stats_ptr + (first + k) * STATS
        tl.store(k_ptr + AREA, zero, mask=mask)
        tl.store(k_ptr + LEFT, zero + NOWHERE, mask=mask)
        tl.store(k_ptr + TOP, zero + NOWHERE, mask=mask)
        tl.store(k_ptr + RIGHT, zero, mask=mask)
        tl.store(k_ptr + BOTTOM, zero, mask=mask)
        if LEADS:
            label = tl.load(labels_ptr + first + k, mask=mask, other=0)  # [BLOCK_K]
            stuff = tl.load(isthing_ptr + label, mask=mask, other=1) == 0
            lead = k
            for j in range(count):
                same = stuff & (label == tl.load(labels_ptr + first + j))
                lead = tl.where(same, tl.minimum(lead, j), lead)
            tl.store(lead_ptr + first + k, lead, mask=mask)
        else:
            tl.store(own_ptr + first + k, zero, mask=mask)


@triton.jit(do_not_specialize=["images", "stride_mn", "stride_mh", "stride_mw"])
def winners_kernel(
    masks_ptr,
    scores_ptr,
    lead_ptr,
    winners_ptr,
    stats_ptr,
    own_ptr,
    header_ptr,
    tables_ptr,
    weights_ptr,
    stride_mn,
    stride_mh,
    stride_mw,
    images,
    mask_threshold,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A tile of picked pixels of one image: which query wins each, and the counts.

    With lead_ptr a pixel goes to the query that its winner joins.
    """
    pid = tl.program_id(0)
    header_ptr += image_of(header_ptr + PICKED_TILE, images, pid, FIELDS) * FIELDS
    tile = pid - tl.load(header_ptr + PICKED_TILE).to(tl.int32)
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    height = tl.load(header_ptr + PICKED_HEIGHT).to(tl.int32)
    width = tl.load(header_ptr + PICKED_WIDTH).to(tl.int32)
    rows = tl.load(header_ptr + ROWS).to(tl.int32)
    columns = tl.load(header_ptr + COLUMNS).to(tl.int32)
    across = tl.cdiv(width, BLOCK_W)
    row = tile // across * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row_mask = row < height
    column_mask = column < width
    mask = row_mask[:, None] & column_mask[None, :]  # [BLOCK_H, BLOCK_W]
    top, bottom, top_weight, bottom_weight = load_taps(tables_ptr, weights_ptr, rows, height, row, row_mask)
    left, right, left_weight, right_weight = load_taps(tables_ptr, weights_ptr, columns, width, column, column_mask)
    winner = best_query(
        masks_ptr,
        None,
        scores_ptr,
        own_ptr,
        first,
        count,
        stride_mn,
        top[:, None] * stride_mh,
        bottom[:, None] * stride_mh,
        left[None, :] * stride_mw,
        right[None, :] * stride_mw,
        top_weight[:, None],
        bottom_weight[:, None],
        left_weight[None, :],
        right_weight[None, :],
        mask,
        mask_threshold,
        BLOCK_H,
        BLOCK_W,
    )  # [BLOCK_H, BLOCK_W]
    if lead_ptr is not None:
        winner = tl.load(lead_ptr + first + winner, mask=mask, other=0)
    pixel = row[:, None] * width + column[None, :]  # [BLOCK_H, BLOCK_W]
    winners_ptr += tl.load(header_ptr + WINNERS)
    tl.store(winners_ptr + pixel, winner.to(winners_ptr.dtype.element_ty), mask=mask)
    shown_from_row = tl.load(tables_ptr + rows + 3 * height + row, mask=row_mask, other=0)  # [BLOCK_H]
    shown_to_row = tl.load(tables_ptr + rows + 3 * height + row + 1, mask=row_mask, other=0)
    shown_from_column = tl.load(tables_ptr + columns + 3 * width + column, mask=column_mask, other=0)  # [BLOCK_W]
    shown_to_column = tl.load(tables_ptr + columns + 3 * width + column + 1, mask=column_mask, other=0)
    count_winners(
        stats_ptr + first * STATS,
        winner,
        mask,
        count,
        (shown_to_row - shown_from_row)[:, None] * (shown_to_column - shown_from_column)[None, :],
        shown_from_column[None, :],
        shown_to_column[None, :],
        shown_from_row[:, None],
        shown_to_row[:, None],
    )


@triton.jit
def unmerge_kernel(lead_ptr, stats_ptr, alive_ptr, header_ptr, BLOCK_K: tl.constexpr):
    """One image, facebookresearch's first round: the first query of each stuff class stays, if the class is large.

    Writes the query that each query's pixels count for from now on, itself, or -1 if it is removed.
    """
    header_ptr += tl.program_id(0) * FIELDS
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        lead = tl.load(lead_ptr + first + k, mask=k < count, other=-1)
        area = tl.zeros([BLOCK_K], tl.int32)  # [BLOCK_K], of the class
        for j in range(count):
            joins = lead == tl.load(lead_ptr + first + j)
            area += tl.where(joins, tl.load(stats_ptr + (first + j) * STATS + AREA), 0)
        tl.store(alive_ptr + first + k, tl.where((lead == k) & (area > SMALL), k, -1), mask=k < count)


@triton.jit(do_not_specialize=["images", "stride_mn", "stride_mh", "stride_mw"])
def settle_kernel(
    masks_ptr,
    alive_ptr,
    winners_ptr,
    stats_ptr,
    header_ptr,
    tables_ptr,
    weights_ptr,
    stride_mn,
    stride_mh,
    stride_mw,
    images,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A tile of picked pixels of one image: those whose winner was removed go to the best query left, and count."""
    pid = tl.program_id(0)
    header_ptr += image_of(header_ptr + PICKED_TILE, images, pid, FIELDS) * FIELDS
    tile = pid - tl.load(header_ptr + PICKED_TILE).to(tl.int32)
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    height = tl.load(header_ptr + PICKED_HEIGHT).to(tl.int32)
    width = tl.load(header_ptr + PICKED_WIDTH).to(tl.int32)
    across = tl.cdiv(width, BLOCK_W)
    row = tile // across * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row_mask = row < height
    column_mask = column < width
    mask = row_mask[:, None] & column_mask[None, :]  # [BLOCK_H, BLOCK_W]
    pixel = row[:, None] * width + column[None, :]  # [BLOCK_H, BLOCK_W]
    winners_ptr += tl.load(header_ptr + WINNERS)
    winner = tl.load(winners_ptr + pixel, mask=mask, other=0).to(tl.int32)  # [BLOCK_H, BLOCK_W]
    lost = mask & (tl.load(alive_ptr + first + winner, mask=mask, other=0) < 0)
    if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
        rows = tl.load(header_ptr + ROWS).to(tl.int32)
        columns = tl.load(header_ptr + COLUMNS).to(tl.int32)
        top, bottom, top_weight, bottom_weight = load_taps(tables_ptr, weights_ptr, rows, height, row, row_mask)
        left, right, left_weight, right_weight = load_taps(tables_ptr, weights_ptr, columns, width, column, column_mask)
        winner = best_query(
            masks_ptr,
            alive_ptr,
            None,
            None,
            first,
            count,
            stride_mn,
            top[:, None] * stride_mh,
            bottom[:, None] * stride_mh,
            left[None, :] * stride_mw,
            right[None, :] * stride_mw,
            top_weight[:, None],
            bottom_weight[:, None],
            left_weight[None, :],
            right_weight[None, :],
            lost,
            0.0,
            BLOCK_H,
            BLOCK_W,
        )  # [BLOCK_H, BLOCK_W]
        found = lost & (winner >= 0)
        tl.store(winners_ptr + pixel, winner.to(winners_ptr.dtype.element_ty), mask=found)
        shown_from_row = tl.load(tables_ptr + rows + 3 * height + row, mask=row_mask, other=0)  # [BLOCK_H]
        shown_to_row = tl.load(tables_ptr + rows + 3 * height + row + 1, mask=row_mask, other=0)
        shown_from_column = tl.load(tables_ptr + columns + 3 * width + column, mask=column_mask, other=0)  # [BLOCK_W]
        shown_to_column = tl.load(tables_ptr + columns + 3 * width + column + 1, mask=column_mask, other=0)
        count_winners(
            stats_ptr + first * STATS,
            winner,
            found,
            count,
            (shown_to_row - shown_from_row)[:, None] * (shown_to_column - shown_from_column)[None, :],
            shown_from_column[None, :],
            shown_to_column[None, :],
            shown_from_row[:, None],
            shown_to_row[:, None],
        )


@triton.jit(do_not_specialize=["first_id"])
def number_kernel(counts_for_ptr, stats_ptr, segment_ptr, header_ptr, first_id, BLOCK_K: tl.constexpr):
    """One image: the id of each query's segment, -1 if it is removed or at most SMALL pixels large.

    counts_for_ptr has the query that each query's pixels count for, -1 if it is removed. Ids are in their order.
    """
    header_ptr += tl.program_id(0) * FIELDS
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        lead = tl.load(counts_for_ptr + first + k, mask=k < count, other=-1)
        area = tl.load(stats_ptr + (first + lead) * STATS + AREA, mask=lead >= 0, other=0)
        before = tl.zeros([BLOCK_K], tl.int32)  # [BLOCK_K], segments before it
        for j in range(count):
            leads = tl.load(counts_for_ptr + first + j) == j
            large = tl.load(stats_ptr + (first + j) * STATS + AREA) > SMALL
            before += ((j < lead) & leads & large).to(tl.int32)
        tl.store(segment_ptr + first + k, tl.where(area > SMALL, first_id + before, -1), mask=k < count)


@triton.jit
def accept_kernel(
    labels_ptr, fuse_ptr, stats_ptr, own_ptr, segment_ptr, header_ptr, overlap_threshold, BLOCK_K: tl.constexpr
):
    """One image, transformers' numbering: the id of each query's segment, -1 if too little of its mask is left.

    A query of a fused class takes the id of the accepted one before it, and the next new id counts on from that.
    """
    header_ptr += tl.program_id(0) * FIELDS
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = k < count
    label = tl.load(labels_ptr + first + k, mask=mask, other=0)
    fuse = tl.load(fuse_ptr + label, mask=mask, other=0) != 0
    won = tl.load(stats_ptr + (first + k) * STATS + AREA, mask=mask, other=0)
    own = tl.load(own_ptr + first + k, mask=mask, other=0)
    # rounded as PyTorch rounds it: 4 / 5 is above 0.8 in float32, and that is what upstream tests
    ratio = tl.math.div_rn(won.to(tl.float32), tl.maximum(own, 1).to(tl.float32))
    accepted = ((won > 0) & (own > 0) & (ratio > overlap_threshold)).to(tl.int32)  # [BLOCK_K]
    segment = tl.full([BLOCK_K], -1, tl.int32)  # [BLOCK_K]
    current = count * 0
    for j in range(count):
        here = k == j  # [BLOCK_K]
        if tl.sum(tl.where(here, accepted, 0), 0) > 0:
            same = fuse & (label == tl.load(labels_ptr + first + j))
            earlier = tl.max(tl.where(same, segment, -1), 0)
            current = tl.where(earlier > 0, earlier, current + 1)
            segment = tl.where(here, current, segment)
    tl.store(segment_ptr + first + k, segment, mask=mask)


@triton.jit(do_not_specialize=["images", "stride_mn", "stride_mh", "stride_mw"])
def write_kernel(
    masks_ptr,
    segment_ptr,
    winners_ptr,
    stats_ptr,
    out_ptr,
    header_ptr,
    tables_ptr,
    weights_ptr,
    stride_mn,
    stride_mh,
    stride_mw,
    images,
    REDO: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A tile of target pixels of one image: the id of the picked pixel that each shows, 0 if it has none.

    With REDO those whose winner was removed go to the best query left, and count.
    """
    pid = tl.program_id(0)
    header_ptr += image_of(header_ptr + TARGET_TILE, images, pid, FIELDS) * FIELDS
    tile = pid - tl.load(header_ptr + TARGET_TILE).to(tl.int32)
    count = tl.load(header_ptr + COUNT).to(tl.int32)
    first = tl.load(header_ptr + FIRST).to(tl.int32)
    picked_height = tl.load(header_ptr + PICKED_HEIGHT).to(tl.int32)
    picked_width = tl.load(header_ptr + PICKED_WIDTH).to(tl.int32)
    height = tl.load(header_ptr + HEIGHT).to(tl.int32)
    width = tl.load(header_ptr + WIDTH).to(tl.int32)
    rows = tl.load(header_ptr + ROWS).to(tl.int32)
    columns = tl.load(header_ptr + COLUMNS).to(tl.int32)
    across = tl.cdiv(width, BLOCK_W)
    row = tile // across * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row_mask = row < height
    column_mask = column < width
    mask = row_mask[:, None] & column_mask[None, :]  # [BLOCK_H, BLOCK_W]
    picked_row = tl.load(tables_ptr + rows + 4 * picked_height + 1 + row, mask=row_mask, other=0)  # [BLOCK_H]
    picked_column = tl.load(
        tables_ptr + columns + 4 * picked_width + 1 + column, mask=column_mask, other=0
    )  # [BLOCK_W]
    # a comparison of blocks: Triton 3.9's interpreter takes no mask made with a scalar one
    has_winner = mask & (tl.zeros([BLOCK_H, BLOCK_W], dtype=tl.int32) < count)  # [BLOCK_H, BLOCK_W]
    picked = picked_row[:, None] * picked_width + picked_column[None, :]  # [BLOCK_H, BLOCK_W]
    winners_ptr += tl.load(header_ptr + WINNERS)
    winner = tl.load(winners_ptr + picked, mask=has_winner, other=0).to(tl.int32)  # [BLOCK_H, BLOCK_W]
    segment = tl.load(segment_ptr + first + winner, mask=has_winner, other=0)  # [BLOCK_H, BLOCK_W]
    if REDO:
        lost = mask & (segment < 0)
        if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
            top, bottom, top_weight, bottom_weight = load_taps(
                tables_ptr, weights_ptr, rows, picked_height, picked_row, row_mask
            )
            left, right, left_weight, right_weight = load_taps(
                tables_ptr, weights_ptr, columns, picked_width, picked_column, column_mask
            )
            winner = best_query(
                masks_ptr,
                segment_ptr,
                None,
                None,
                first,
                count,
                stride_mn,
                top[:, None] * stride_mh,
                bottom[:, None] * stride_mh,
                left[None, :] * stride_mw,
                right[None, :] * stride_mw,
                top_weight[:, None],
                bottom_weight[:, None],
                left_weight[None, :],
                right_weight[None, :],
                lost,
                0.0,
                BLOCK_H,
                BLOCK_W,
            )  # [BLOCK_H, BLOCK_W]
            found = lost & (winner >= 0)
            segment = tl.where(found, tl.load(segment_ptr + first + winner, mask=found, other=0), segment)
            ones = tl.full([BLOCK_H, BLOCK_W], 1, tl.int32)
            count_winners(
                stats_ptr + first * STATS,
                winner,
                found,
                count,
                ones,
                column[None, :],
                column[None, :] + 1,
                row[:, None],
                row[:, None] + 1,
            )
    out_ptr += tl.load(header_ptr + OUT)
    pixel = row[:, None] * width + column[None, :]  # [BLOCK_H, BLOCK_W]
    tl.store(out_ptr + pixel, tl.maximum(segment, 0).to(out_ptr.dtype.element_ty), mask=mask)


# ---- configurations ----


class Config(NamedTuple):
    """A tile of BLOCK_H x BLOCK_W pixels; kernels over an image's queries take BLOCK_K at once."""

    block_h: int
    block_w: int
    num_warps: int
    block_k: int = 128


# Read off builds, untimed until a GPU is at hand: two pixels a thread. With four the redo takes 128 registers and
# spills on sm_70; with two all kernels stay within 80 registers, 59 on sm_90. With 8 warps, and so 8 rows, Triton 3.6
# spills a register or two from sm_80 on.
CONFIGS: dict[Target, Config] = {70: Config(4, 64, 4), "gfx942": Config(4, 64, 2)}


# ---- tables ----


@lru_cache(maxsize=256)
def axis_table(mask: int, resized: int, processed: int, target: int) -> tuple[np.ndarray, int]:
    """One axis, int32, laid out as the header's fields say, and the number of picked positions.

    `mask` logits are resized to `resized` positions, of which the first `processed` are the image's, and NEAREST makes
    `target` of those.
    """
    picked, position = np.unique(pil_nearest_indices(processed, target), return_inverse=True)
    shown_from = np.searchsorted(position, np.arange(len(picked) + 1))
    parts = [taps_table(mask, resized)[:, picked].ravel(), shown_from, position]
    return np.concatenate(parts).astype(np.int32), len(picked)


class Plan(NamedTuple):
    """A batch as the kernels see it."""

    tables: tuple[Tensor, Tensor, Tensor]  # header int64, tables int32, the same as float32
    images: int
    picked_tiles: int
    target_tiles: int
    picked_pixels: int
    target_pixels: int
    dtype: torch.dtype  # of winners and ids
    config: Config

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_H": self.config.block_h, "BLOCK_W": self.config.block_w, "num_warps": self.config.num_warps}

    @property
    def block_k(self) -> dict[str, int]:
        return {"BLOCK_K": self.config.block_k, "num_warps": 1}


def id_dtype(counts: Sequence[int]) -> torch.dtype:
    """The integers that hold ids up to the number of an image's queries."""
    return torch.uint8 if max(counts, default=0) < 256 else torch.int16


def _sides(
    resized: Sequence[int], processed: Sequence[int], target: Sequence[int], count: int
) -> list[tuple[Size, Size, Size]]:
    """(resized, processed, target) of each image. ValueError if one does not fit, or is cropped to more than it is."""
    named = {"resized": resized, "processed": processed, "target": target}
    sizes = list(zip(*(pairs(name, value, count) for name, value in named.items()), strict=True))
    for size, source, _ in sizes:
        check_crop("resized", size, source)
    return sizes


def _check_queries(masks: Tensor, labels: Tensor, counts: Sequence[int]) -> None:
    check_masks(masks, counts)
    if labels.shape != masks.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be [{len(masks)}] integers, got {list(labels.shape)} {labels.dtype}")
    if max(counts, default=0) >= 2**15:
        raise ValueError(f"counts must be below 32768, got {max(counts)}")


def plan(masks: Tensor, counts: Sequence[int], sizes: Sequence[tuple[Size, Size, Size]]) -> Plan:
    config = config_for(CONFIGS, device_of(masks.device).target)
    tables, header = Tables(), []
    picked_tiles = target_tiles = first = winners = out = 0
    for count, (resized, processed, target) in zip(counts, sizes, strict=True):
        places, picked = [], []
        for axis in zip(masks.shape[1:], resized, processed, target, strict=True):
            table, length = axis_table(*axis)
            places.append(tables.place(axis, table))
            picked.append(length)
        header.append([picked_tiles, target_tiles, count, first, *picked, *target, *places, winners, out, 0, 0])
        if count:
            picked_tiles += tiles_of(*picked, *config[:2])
            winners += math.prod(picked)
        target_tiles += tiles_of(*target, *config[:2])
        first, out = first + count, out + math.prod(target)
    sent = tables.send(header, masks.device)
    return Plan(sent, len(header), picked_tiles, target_tiles, winners, out, id_dtype(counts), config)


# ---- launchers ----

Merged = tuple[Tensor, Tensor, Tensor, Tensor]


def launch_panoptic_merge(
    masks: Tensor,
    labels: Tensor,
    isthing: Tensor,
    counts: Sequence[int],
    resized: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    merge_for_good: bool,
) -> Merged:
    """`panoptic_merge` by the kernels, on a GPU or in Triton's interpreter."""
    _check_queries(masks, labels, counts)
    sizes = _sides(resized, processed, target, len(counts))
    masks, labels = strided_masks(masks), labels.long().contiguous()
    p = plan(masks, counts, sizes)
    winners, ids, stats, lead, segment = _allocate(p, masks)
    if p.images == 0:
        return _results(ids, segment, stats)
    header, *_ = p.tables
    per_image = (p.images,)
    isthing = isthing.contiguous().view(torch.uint8)
    with torch.cuda.device_of(masks):
        start_kernel[per_image](labels, isthing, lead, stats, None, header, LEADS=True, **p.block_k)
        joined = lead if merge_for_good else None
        if p.picked_tiles:
            winners_kernel[(p.picked_tiles,)](
                masks, None, joined, winners, stats, None, *p.tables, *masks.stride(), p.images, 0.0, **p.blocks
            )
        counts_for = lead
        if not merge_for_good and p.picked_tiles:
            counts_for = torch.empty_like(lead)
            unmerge_kernel[per_image](lead, stats, counts_for, header, **p.block_k)
            settle_kernel[(p.picked_tiles,)](
                masks, counts_for, winners, stats, *p.tables, *masks.stride(), p.images, **p.blocks
            )
        number_kernel[per_image](counts_for, stats, segment, header, int(merge_for_good), **p.block_k)
        write_kernel[(p.target_tiles,)](
            masks, segment, winners, stats, ids, *p.tables, *masks.stride(), p.images, REDO=True, **p.blocks
        )
    return _results(ids, segment, stats)


def launch_weighted_merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    fuse: Tensor,
    counts: Sequence[int],
    target: Sequence[int],
    mask_threshold: float,
    overlap_threshold: float,
) -> Merged:
    """`weighted_merge` by the kernels, on a GPU or in Triton's interpreter."""
    _check_queries(masks, labels, counts)
    sizes = _sides(target, target, target, len(counts))
    # once a logit: the kernel would compute it for each of the pixels that a logit is a tap of, some twenty
    masks, labels = strided_masks(masks).float().sigmoid(), labels.long().contiguous()
    p = plan(masks, counts, sizes)
    winners, ids, stats, own, segment = _allocate(p, masks)
    if p.images == 0:
        return _results(ids, segment, stats)
    header, *_ = p.tables
    per_image = (p.images,)
    with torch.cuda.device_of(masks):
        start_kernel[per_image](labels, None, None, stats, own, header, LEADS=False, **p.block_k)
        if p.picked_tiles:
            scores = scores.float().contiguous()
            winners_kernel[(p.picked_tiles,)](
                masks,
                scores,
                None,
                winners,
                stats,
                own,
                *p.tables,
                *masks.stride(),
                p.images,
                mask_threshold,
                **p.blocks,
            )
        accept_kernel[per_image](
            labels,
            fuse.contiguous().view(torch.uint8),
            stats,
            own,
            segment,
            header,
            float32_below(overlap_threshold),
            **accept_blocks(max(counts), p.config),
        )
        write_kernel[(p.target_tiles,)](
            masks, segment, winners, stats, ids, *p.tables, *masks.stride(), p.images, REDO=False, **p.blocks
        )
    return _results(ids, segment, stats)


def accept_blocks(count: int, config: Config) -> dict[str, int]:
    """`accept_kernel` numbers one query after another, and so holds all of an image's at once, four or so a thread."""
    block_k = max(config.block_k, triton.next_power_of_2(count))
    return {"BLOCK_K": block_k, "num_warps": min(16, block_k // config.block_k)}


def float32_below(value: float) -> float:
    """The largest float32 that is not above `value`: a float32 is above the one exactly if it is above the other."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


def _allocate(p: Plan, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Winners, ids, the counts of each query, and two numbers for each query."""
    device = masks.device
    winners = torch.empty(p.picked_pixels, dtype=p.dtype, device=device)
    ids = torch.empty(p.target_pixels, dtype=p.dtype, device=device)
    stats = torch.empty((len(masks), STATS.value), dtype=torch.int32, device=device)
    one, other = (torch.empty(len(masks), dtype=torch.int32, device=device) for _ in range(2))
    return winners, ids, stats, one, other


def _results(ids: Tensor, segment: Tensor, stats: Tensor) -> Merged:
    """With copies of `stats`, a single query's too, whose views are contiguous: outputs must not share storage."""
    area, box = (part.clone(memory_format=torch.contiguous_format) for part in (stats[:, 0], stats[:, 1:]))
    return ids, segment, area, box


# ---- operations ----


@operation("panoptic_merge", launch_panoptic_merge)
def panoptic_merge(
    masks: Tensor,
    labels: Tensor,
    isthing: Tensor,
    counts: list[int],
    resized: list[int],
    processed: list[int],
    target: list[int],
    merge_for_good: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The panoptic merges of B images: `reference.panoptic_merge` of each.

    Args:
        masks: mask logits of the kept queries [N,h,w], those of image 0 first.
        labels: their classes [N], from 0 to C - 1.
        isthing: bool [C], whether a class is a thing (True) or stuff.
        counts: queries of each image, N in sum.
        resized: [h0, w0, ...], what each image's logits are resized to: the padded batch (ours) or `processed`
            (facebookresearch's).
        processed: [h0, w0, ...], each image at the top left of that, without padding.
        target: [H0, W0, ...] of the results.
        merge_for_good: ours, with ids from 1; or facebookresearch's, with ids from 0.

    Returns:
        ids: uint8 (int16 if an image has more than 255 queries), [H_i,W_i] of each image, flat, one after the other; 0
            where nothing is left.
        segment: int32 [N], the id of each query's segment, -1 if it was removed. Queries that joined share an id.
        area, box: int32 [N] and [N,4], target pixels and (left, top, right, bottom), ends exclusive. A segment's are
            the sum and the union over its queries; a query without pixels has 0 and (2^31 - 1, 2^31 - 1, 0, 0). Not
            defined for removed queries.

    Raises:
        TypeError, ValueError: shapes or sizes that do not fit; on a GPU, another dtype than float16, bfloat16, float32.
    """
    _check_queries(masks, labels, counts)
    sizes = _sides(resized, processed, target, len(counts))
    images = zip(masks.split(list(counts)), labels.split(list(counts)), sizes, strict=True)
    parts = [reference.panoptic_merge(own, classes, isthing, *size, merge_for_good) for own, classes, size in images]
    return _collected(parts, masks, counts)


def _collected(parts: Sequence[Merged], masks: Tensor, counts: Sequence[int]) -> Merged:
    """The results of all images, one after the other, in the dtypes and shapes of the operation."""
    empty = masks.new_empty(0, dtype=torch.int32)
    columns = list(zip(*parts, strict=True)) or [()] * 4
    ids, segment, area, box = (torch.cat([empty, *(part.flatten() for part in column)]) for column in columns)
    return ids.to(id_dtype(counts)), segment, area, box.view(-1, 4)


@panoptic_merge.register_fake
def _(
    masks: Tensor,
    labels: Tensor,
    isthing: Tensor,
    counts: list[int],
    resized: list[int],
    processed: list[int],
    target: list[int],
    merge_for_good: bool,
) -> Merged:
    return _fake(masks, counts, target)


def _fake(masks: Tensor, counts: Sequence[int], target: Sequence[int]) -> Merged:
    queries = masks.shape[0]
    pixels = sum(height * width for height, width in pairs("target", target, len(counts)))
    per_query = [masks.new_empty(size, dtype=torch.int32) for size in ((queries,), (queries,), (queries, 4))]
    return masks.new_empty(pixels, dtype=id_dtype(counts)), per_query[0], per_query[1], per_query[2]


@operation("weighted_merge", launch_weighted_merge)
def weighted_merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    fuse: Tensor,
    counts: list[int],
    target: list[int],
    mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merges of B images as transformers' `post_process_panoptic_segmentation` has them.

    Args:
        masks, labels, counts: as in `panoptic_merge`.
        scores: of the kept queries [N].
        fuse: bool [C], classes of which an image has one segment.
        target: [H0, W0, ...] of the results, to which the probabilities are resized; [h, w, ...] keeps them.
        mask_threshold: a pixel belongs to a mask if its probability times the score is at least this.
        overlap_threshold: a segment is kept if the pixels it won, divided by its mask's, are above.

    Returns: as `panoptic_merge`: ids from 1, 0 for none (also in an image without queries); different segments can
        share an id, as upstream.

    Raises:
        TypeError, ValueError: shapes or sizes that do not fit; on a GPU, another dtype than float16, bfloat16, float32.
    """
    _check_queries(masks, labels, counts)
    targets = pairs("target", target, len(counts))
    images = zip(*(tensor.split(list(counts)) for tensor in (masks, scores, labels)), targets, strict=True)
    thresholds = mask_threshold, overlap_threshold
    parts = [reference.weighted_merge(*queries, fuse, size, *thresholds) for *queries, size in images]
    return _collected(parts, masks, counts)


@weighted_merge.register_fake
def _(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    fuse: Tensor,
    counts: list[int],
    target: list[int],
    mask_threshold: float,
    overlap_threshold: float,
) -> Merged:
    return _fake(masks, counts, target)


# ---- builds ----


def builds(target: Target) -> list[Build]:
    """Every configuration that the launchers choose on `target`; ids in bytes, and in 16 bits once."""
    config = config_for(CONFIGS, target)
    types = {"header_ptr": "*i64", "tables_ptr": "*i32", "labels_ptr": "*i64", "isthing_ptr": "*u8", "fuse_ptr": "*u8"}
    types |= dict.fromkeys(("lead_ptr", "stats_ptr", "own_ptr", "alive_ptr", "counts_for_ptr", "segment_ptr"), "*i32")
    types |= dict.fromkeys(("mask_threshold", "overlap_threshold"), "fp32")
    found: list[Build] = []

    def add_tiles(name: str, kernel: Any, dtype: str, ids: str, **constexprs: bool | None) -> None:
        pointers = {"masks_ptr": f"*{dtype}", "winners_ptr": f"*{ids}", "out_ptr": f"*{ids}"}
        values = {"BLOCK_H": config.block_h, "BLOCK_W": config.block_w, **constexprs}
        found.append(build(name, kernel, {**types, **pointers}, values, num_warps=config.num_warps))

    def add_queries(name: str, kernel: Any, **constexprs: bool | None) -> None:
        found.append(build(name, kernel, types, {"BLOCK_K": config.block_k, **constexprs}, num_warps=1))

    for dtype, ids in [*((dtype, "u8") for dtype in dtypes_on(target).values()), ("fp32", "i16")]:
        unweighted = {"scores_ptr": None, "own_ptr": None}
        add_tiles(f"winners-merged-{dtype}-{ids}", winners_kernel, dtype, ids, **unweighted)
        add_tiles(f"winners-unmerged-{dtype}-{ids}", winners_kernel, dtype, ids, **unweighted, lead_ptr=None)
        add_tiles(f"settle-{dtype}-{ids}", settle_kernel, dtype, ids)
        add_tiles(f"write-{dtype}-{ids}", write_kernel, dtype, ids, REDO=True)
        if dtype == "fp32":
            add_tiles(f"winners-weighted-{ids}", winners_kernel, dtype, ids, lead_ptr=None)
            add_tiles(f"write-weighted-{ids}", write_kernel, dtype, ids, REDO=False)

    add_queries("start-leads", start_kernel, own_ptr=None, LEADS=True)
    add_queries("start-weighted", start_kernel, lead_ptr=None, isthing_ptr=None, LEADS=False)
    add_queries("unmerge", unmerge_kernel)
    add_queries("number", number_kernel)
    for count in (1, 1000):  # up to 128 kept queries, and all of a very large model
        blocks = accept_blocks(count, config)
        num_warps = blocks.pop("num_warps")
        found.append(build(f"accept-{blocks['BLOCK_K']}", accept_kernel, types, blocks, num_warps=num_warps))
    return found
