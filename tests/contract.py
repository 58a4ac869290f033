"""What tests of several rooms share: the numerics contract, the merges by their definition, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast import reference


def assert_contract(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """err(fast) <= 2 * err(plain at the same dtype) + 1e-6, against float64."""
    assert fast.shape == exact.shape and fast.dtype == plain.dtype and exact.isfinite().all()
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (fast, plain))
    assert error <= 2 * plain_error + 1e-6, f"{error:.2e}, plain {plain_error:.2e}"


def merge_by_definition(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    processed_size: Any,
    target_size: Any,
    isthing: Callable[[int], Any],
    padded_size: Any = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The ids and segments_info of `panoptic_merge`, or without `padded_size` of `upstream_panoptic_merge`: from
    `reference`, and described from the ids alone."""
    corrected = padded_size is not None
    things = torch.tensor([bool(isthing(label)) for label in range(1 + max(labels.tolist(), default=0))])
    resized = padded_size if corrected else processed_size
    merged = reference.panoptic_merge(masks, labels, things, resized, processed_size, target_size, corrected)
    segments = []
    for number in sorted(set(merged.segment.tolist()) - {-1}):
        queries = (merged.segment == number).nonzero()[:, 0].tolist()
        label = int(labels[queries[0]])
        y, x = (merged.ids == number).nonzero().unbind(1)
        info = {"id": number, "category_id": label, "isthing": isthing(label), "area": len(x)}
        if corrected:
            left, top = int(x.min()), int(y.min())
            info["isthing"] = bool(info["isthing"])
            info["score"] = max(float(scores[k]) for k in queries)
            info["bbox"] = [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1]
        segments.append(info)
    return merged.ids, segments


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise: every part of it looks different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
