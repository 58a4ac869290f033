"""One prediction for each object: the assignment of least cost (Carion et al. 2020, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detr_fast.boxes import box_cxcywh_to_xyxy, generalized_iou

Outputs = Mapping[str, Any]
Targets = Sequence[Mapping[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]

ROUNDING = 1e-4  # by which normalised boxes may pass 1


class HungarianMatcher(nn.Module):
    """Matches predictions and objects one to one (facebookresearch/detr, models/matcher.py).

    Args:
        cost_class: weight of minus the probability of the object's class.
        cost_bbox: weight of the L1 distance of the boxes (cx, cy, w, h).
        cost_giou: weight of minus their generalised IoU. The paper's weights are 1, 5 and 2.

    Raises:
        ValueError: weights that are all 0, or not finite.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1):
        super().__init__()
        weights = {"cost_class": cost_class, "cost_bbox": cost_bbox, "cost_giou": cost_giou}
        if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
            raise ValueError(f"cost_class, cost_bbox and cost_giou must be finite and not all 0, got {weights}")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: Targets) -> Indices:
        """
        Args:
            outputs: with "pred_logits" [B,Q,num_classes+1] and "pred_boxes" [B,Q,4], (cx, cy, w, h).
            targets: B dicts with "labels", integer [N_i] in [0,num_classes), and "boxes" [N_i,4], (cx, cy, w, h) in
                [0,1] of the image.

        Returns:
            For each image the matched queries, ascending, and the object of each: two int64 tensors
            [min(Q,N_i)] in the host's memory.

        Raises:
            ValueError: shapes that do not fit, labels or boxes out of range, predictions that are not finite.
        """
        _check_shapes(outputs, targets)
        cost = self._cost(outputs, targets).cpu()  # the only wait for the device
        indices = []
        for image, target in enumerate(targets):
            block = cost[image, :, : len(target["labels"])].numpy()
            if not np.isfinite(block).all():
                raise ValueError(_fault(image, outputs, target))
            queries, objects = linear_sum_assignment(block)
            indices.append((torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(objects, dtype=torch.int64)))
        return indices

    def _cost(self, outputs: Outputs, targets: Targets) -> Tensor:
        """[B,Q,max N_i], NaN where the query or the object is not valid: the check then needs no copy of its own."""
        prob = at_least_float32(outputs["pred_logits"]).softmax(-1)
        boxes = at_least_float32(outputs["pred_boxes"])
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True).to(prob.device, torch.int64)
        objects = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(boxes)

        num_classes = prob.shape[-1] - 1
        index = labels.clamp(0, num_classes)[:, None].expand(-1, prob.shape[1], -1)
        cost_class = -prob.gather(2, index)
        cost_bbox = torch.cdist(boxes, objects, p=1)
        cost_giou = -generalized_iou(box_cxcywh_to_xyxy(boxes)[:, :, None], box_cxcywh_to_xyxy(objects)[:, None])
        cost = self.cost_bbox * cost_bbox + self.cost_class * cost_class + self.cost_giou * cost_giou

        valid = _valid_labels(labels, num_classes) & _valid_boxes(objects)
        return cost.masked_fill(~(_valid_predictions(boxes)[:, :, None] & valid[:, None]), math.nan)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision, as autocast leaves it, as float32; any other as it is. Small boxes have no area in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _valid_labels(labels: Tensor, num_classes: int) -> Tensor:
    return (labels >= 0) & (labels < num_classes)


def _valid_boxes(boxes: Tensor) -> Tensor:
    return ((boxes >= 0) & (boxes <= 1 + ROUNDING)).all(-1)


def _valid_predictions(boxes: Tensor) -> Tensor:
    return boxes.isfinite().all(-1) & (boxes[..., 2:] >= 0).all(-1)


def _check_shapes(outputs: Outputs, targets: Targets) -> None:
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            "outputs must have pred_logits [B,Q,num_classes+1] and pred_boxes [B,Q,4], "
            f"got {list(logits.shape)} and {list(boxes.shape)}"
        )
    if not len(targets) or len(targets) != len(logits):
        raise ValueError(f"targets must be one dict for each of {len(logits)} images, got {len(targets)}")
    for image, target in enumerate(targets):
        missing = {"labels", "boxes"} - set(target)
        if missing:
            raise ValueError(f"targets[{image}] must have labels and boxes, got {sorted(target)}")
        labels, objects = target["labels"], target["boxes"]
        if labels.ndim != 1 or objects.shape != (len(labels), 4):
            raise ValueError(
                f"targets[{image}] must have labels [N] and boxes [N,4], "
                f"got {list(labels.shape)} and {list(objects.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"targets[{image}] labels must be integers, got {labels.dtype}")


def _fault(image: int, outputs: Outputs, target: Mapping[str, Tensor]) -> str:
    """The reason why an image's costs are not all finite."""
    logits, boxes = outputs["pred_logits"][image], outputs["pred_boxes"][image]
    num_classes = logits.shape[-1] - 1
    wrong_labels = target["labels"][~_valid_labels(target["labels"], num_classes)]
    if len(wrong_labels):
        return f"targets[{image}] labels must be in [0, {num_classes}), got {wrong_labels[0].item()}"
    wrong_boxes = target["boxes"][~_valid_boxes(target["boxes"])]
    if len(wrong_boxes):
        return f"targets[{image}] boxes must be (cx, cy, w, h) in [0, 1] of the image, got {wrong_boxes[0].tolist()}"
    if not logits.isfinite().all():
        return f"outputs pred_logits must be finite, got NaN or infinity for image {image}"
    wrong_predictions = boxes[~_valid_predictions(boxes)]
    if len(wrong_predictions):
        return (
            "outputs pred_boxes must be finite (cx, cy, w, h) with w, h >= 0, "
            f"got {wrong_predictions[0].tolist()} for image {image}"
        )
    return f"outputs pred_boxes and targets[{image}] boxes must not both be without area: their IoU is 0 / 0"
