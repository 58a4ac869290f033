"""The plain PyTorch definition of every operation that detr_fast accelerates: tensors in, tensors out.

Slow on purpose: the algorithms of facebookresearch/detr and transformers, step by step. Every fast version is tested
against these functions, in whatever dtype the tensors have: float64 gives the truth to measure errors by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# ---- convolutions and linear layers ----

LARGEST_FLOAT16 = 65504.0


def finite(x: Tensor) -> Tensor:
    """x, where float16 ends at 65504: what would be infinite stays there, so that no NaN can follow."""
    return x.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16) if x.dtype == torch.float16 else x


def frozen_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Normalisation of x [B,C,H,W] by fixed statistics [C]: facebookresearch/detr, models/backbone.py."""
    scale = weight * (var + eps).rsqrt()
    shift = bias - mean * scale
    return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """x [N,C,H,W] + bias [C] + residual, then its ReLU where `relu`, in float32 at least; `finite`."""
    y = x.to(at_least_float32(x.dtype)) + bias.to(at_least_float32(x.dtype))[:, None, None]
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    if x.dtype == torch.float16:
        y = y.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
    return y.to(x.dtype)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """relu(conv(x) + bias + residual) for x [B,C,H,W] and weight [O,C,k,k]; `finite`."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if residual is not None:
        y = y + residual
    return finite(y.relu() if relu else y)


def upsample_conv(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest upsampling of x [N,C,h,w] to `size`, then the 3x3 convolution [O,C,3,3], zero padded: [N,O,*size]."""
    return F.conv2d(F.interpolate(x, size=size), weight, padding=1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What softmax, normalisations and sums are computed in."""
    return torch.promote_types(dtype, torch.float32)


# ---- attention ----


def attention(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in heads: q [B,Q,d], k and v [B,L,d], padding bool [B,L] to [B,Q,d].

    Where all keys of an image are padding its rows are 0.
    """
    q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1)
    if padding is not None:
        weights = weights.masked_fill(padding.all(1)[:, None, None, None], 0)
    return (weights @ v).transpose(1, 2).flatten(-2)


def attention_weights(q: Tensor, k: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) in heads, float32 at least: q [B,Q,d], k [B,L,d] to [B,heads,Q,L].

    0 on padding, bool [B,L].
    """
    dtype = at_least_float32(q.dtype)
    q, k = (x.to(dtype).unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if padding is None:
        return scores.softmax(-1)
    padding = padding[:, None, None, :]
    return scores.masked_fill(padding, float("-inf")).softmax(-1).masked_fill(padding, 0)


def attention_map(q: Tensor, k: Tensor, image: int | Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """Each query's softmax over heads and positions together, float32 at least: facebookresearch/detr's MHAttentionMap.

    Args:
        q: [N,d], scaled queries.
        k: [B,L,d], the images' keys.
        image: of all queries, or of each, int64 [N].
        padding: bool [B,L].

    Returns: [N,L,heads]; 0 where all of L is padding.
    """
    dtype = at_least_float32(q.dtype)
    queries, keys = (x.to(dtype).unflatten(-1, (nheads, -1)) for x in (q, k[image]))
    scores = torch.einsum("nhc,lhc->nlh" if isinstance(image, int) else "nhc,nlhc->nlh", queries, keys)
    if padding is not None:
        scores = scores.masked_fill(padding[image].unsqueeze(-1), float("-inf"))
    weights = scores.flatten(1).softmax(-1).view_as(scores)
    return weights if padding is None else weights.masked_fill(padding[image].all(-1)[..., None, None], 0)


# ---- normalisation ----


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + update) over the last dimension [...,C], in float32 at least and the dtype of x."""
    dtype = at_least_float32(x.dtype)
    return F.layer_norm(x.to(dtype) + update, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def group_norm_relu_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shared: Tensor | None,
    image: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """relu(GroupNorm(x)), upsampled by "nearest", plus the feature map of each one's image; in float32 at least.

    Args:
        x: [N,C,h,w].
        shared: [B,C,*size], or None.
        image: int64 [N], or None.

    Returns: [N,C,*size] in the dtype of x.
    """
    dtype = at_least_float32(x.dtype)
    y = F.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps).relu()
    y = F.interpolate(y, size=size)
    if shared is not None:
        y = y + shared[image]
    return y.to(x.dtype)


# ---- bilinear resizing ----


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


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits [K,h,w], bilinear, at `size` (height, width), float32 at least."""
    masks = masks.to(at_least_float32(masks.dtype))
    return F.interpolate(masks[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def mask_upsample(
    masks: Tensor, padded: Sequence[int], processed: Sequence[int], target: Sequence[int], threshold: float
) -> Tensor:
    """Binary masks of one image's queries: facebookresearch/detr's PostProcessSegm (models/segmentation.py).

    Args:
        masks: mask logits [K,h,w] over the padded batch.
        padded: (height, width) of the batch, to which the logits are resized.
        processed: of the image in it, at its top left.
        target: of the masks, by torch's "nearest".
        threshold: the probability above which a pixel belongs to a mask.

    Returns: uint8 [K,*target].
    """
    above = resize_masks(masks, padded).sigmoid() > threshold
    above = above[:, : processed[0], : processed[1]].to(torch.uint8)
    return F.interpolate(above[:, None], size=tuple(target), mode="nearest")[:, 0]


# ---- the panoptic merges ----

SMALLEST_AREA = 4  # pixels; a segment must be larger
NOWHERE = torch.iinfo(torch.int32).max  # left and top of a query without pixels


class Merged(NamedTuple):
    """The merge of one image's K kept queries.

    Attributes:
        ids: int32 [H,W], the segment of each pixel.
        segment: int32 [K], the id of each query's segment, -1 if it has none. Queries that joined share an id.
        area, box: int32 [K] and [K,4], target pixels and (left, top, right, bottom), ends exclusive. A segment's are
            the sum and the union over its queries; a query without pixels has 0 and (2^31 - 1, 2^31 - 1, 0, 0).
            Undefined for queries without a segment.
    """

    ids: Tensor
    segment: Tensor
    area: Tensor
    box: Tensor


def nearest_as_pil(ids: Tensor, size: Sequence[int]) -> Tensor:
    """An id map [h,w] resized to `size` (height, width) by Pillow's NEAREST."""
    image = Image.fromarray(ids.cpu().numpy().astype(np.int32))
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))).to(ids.device)


def panoptic_merge(
    masks: Tensor,
    labels: Tensor,
    isthing: Tensor,
    resized: Sequence[int],
    processed: Sequence[int],
    target: Sequence[int],
    merge_for_good: bool,
) -> Merged:
    """The panoptic merge of one image: facebookresearch/detr's PostProcessPanoptic, or the corrected one.

    Each pixel goes to the query with the largest logit, ties to the lower index, and the result is resized by Pillow's
    NEAREST. The pixels of a stuff class count for its first query. Queries whose count is at most SMALLEST_AREA are
    removed, and the merge is redone without them, until none is. Upstream's flaw: the parts of a stuff class but the
    first count no pixels of their own, and so are removed in the first round. Corrected: a class is removed or kept as
    a whole, and its parts stay one segment.

    Args:
        masks: mask logits of the kept queries [K,h,w].
        labels: their classes [K].
        isthing: bool [C], whether a class is a thing or stuff.
        resized: (height, width) to which the logits are resized: the padded batch (corrected) or `processed`.
        processed: of the image at the top left of that.
        target: of the result.
        merge_for_good: the corrected merge, with ids from 1 and 0 for none; else upstream's, with ids from 0.
    """
    count, own = len(labels), torch.arange(len(labels), device=masks.device)
    logits = resize_masks(masks, resized)[:, : processed[0], : processed[1]]
    same_stuff = (labels[:, None] == labels) & ~isthing[labels]
    lead = (same_stuff | (own[:, None] == own)).int().argmax(1) if count else own
    alive = torch.ones_like(lead, dtype=torch.bool)
    winner = torch.zeros(tuple(target), dtype=torch.int64, device=masks.device)
    while alive.any():
        left = logits.masked_fill(~alive[:, None, None], float("-inf"))
        winner = (left if merge_for_good else left.softmax(0)).argmax(0)
        winner = nearest_as_pil(lead[winner], target).long()
        area = torch.bincount(winner.flatten(), minlength=count)
        small = alive & ((area[lead] if merge_for_good else area) <= SMALLEST_AREA)
        if not small.any():
            break
        alive = alive & ~small
    first_id = int(merge_for_good)
    leads = alive & (lead == own)
    segment = torch.where(alive, leads.cumsum(0)[lead] - 1 + first_id, -1).int()
    ids = segment[winner] if alive.any() else torch.zeros_like(winner).int()
    return Merged(ids, segment, *_count(winner, count))


def weighted_merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    fuse: Tensor,
    target: Sequence[int],
    mask_threshold: float,
    overlap_threshold: float,
) -> Merged:
    """The merge of one image in transformers' `post_process_panoptic_segmentation`.

    Args:
        masks, scores, labels: of the kept queries, mask logits [K,h,w], [K] and [K].
        fuse: bool [C], classes of which an image has one segment.
        target: (height, width) of the result.
        mask_threshold: a pixel belongs to a mask if its probability times the score is at least this.
        overlap_threshold: a segment is kept if the pixels it won, divided by its mask's, are above.

    Returns: ids from 1, 0 for none; after a repeat of a fused class the next new segment counts on from that class's
        id, so that different segments can share an id, as upstream.
    """
    count = len(labels)
    if count == 0:
        nothing = torch.zeros(tuple(target), dtype=torch.int32, device=masks.device)
        return Merged(nothing, nothing.new_empty(0), *_count(nothing.long(), 0))
    probabilities = masks.to(at_least_float32(masks.dtype)).sigmoid()
    if tuple(target) != tuple(masks.shape[1:]):
        probabilities = resize_masks(probabilities, target)
    weighted = probabilities * scores[:, None, None]
    winner = weighted.argmax(0)
    area, box = _count(winner, count)
    own = (weighted >= mask_threshold).sum((1, 2))
    segment = torch.tensor(weighted_segments(area, own, labels, fuse, overlap_threshold), device=masks.device).int()
    return Merged(segment[winner].clamp(min=0), segment, area, box)


def weighted_segments(won: Tensor, own: Tensor, labels: Tensor, fuse: Tensor, overlap_threshold: float) -> list[int]:
    """The segment of each of K queries in `weighted_merge`, -1 for none: from the pixels that it won and those of its
    mask, [K] each."""
    segments, current, id_of_class = [], 0, dict[int, int]()
    # x / 0 is inf or NaN, which is no ratio; the quotient is float32, so that 4 / 5 is above 0.8
    for ratio, label, fused in zip((won / own).tolist(), labels.tolist(), fuse[labels].tolist(), strict=True):
        if not (0 < ratio < float("inf") and ratio > overlap_threshold):
            segments.append(-1)
            continue
        current = id_of_class.get(label, current + 1)
        segments.append(current)
        if fused:
            id_of_class[label] = current
    return segments


def _count(winner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`Merged.area` and `Merged.box` from the query of each pixel, int64 [H,W]."""
    boxes = winner.new_tensor([NOWHERE, NOWHERE, 0, 0]).expand(count, 4).clone()
    for k in range(count):
        y, x = (winner == k).nonzero().unbind(1)
        if len(y):
            boxes[k] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    area = torch.bincount(winner.flatten(), minlength=count)[:count]
    return area.int(), boxes.int()
