"""Boxes, as (cx, cy, w, h) and as corners (x0, y0, x1, y1)."""

from __future__ import annotations

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners [...,4] of boxes [...,4] given by centre and extent (facebookresearch/detr, util/box_ops.py)."""
    centre, extent = boxes.split(2, dim=-1)
    return torch.cat([centre - 0.5 * extent, centre + 0.5 * extent], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union, in [-1,1] (Rezatofighi et al. 2019, https://giou.stanford.edu).

    Args:
        a, b: corner boxes [...,4] whose leading dimensions broadcast, with x1 >= x0 and y1 >= y0.

    Returns:
        The broadcast leading dimensions: `a[:, None]` and `b` give every pair, as upstream's generalized_box_iou, and
        two equal shapes give one value a row. NaN where neither box has an area.
    """
    inner = torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])
    hull = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    intersection, enclosing = _product(inner.clamp(min=0)), _product(hull.clamp(min=0))
    union = _product(a[..., 2:] - a[..., :2]) + _product(b[..., 2:] - b[..., :2]) - intersection
    return intersection / union - (enclosing - union) / enclosing


def _product(extent: Tensor) -> Tensor:
    return extent[..., 0] * extent[..., 1]
