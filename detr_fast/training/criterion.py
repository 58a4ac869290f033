"""DETR's loss (Carion et al. 2020, sections 3.1 and A.2; facebookresearch/detr, models/detr.py).

A training step with masks computes those of matched queries only, since matching needs none:

    outputs, losses = forward_matched(model, samples, targets, criterion)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detr_fast.boxes import box_cxcywh_to_xyxy, generalized_iou
from detr_fast.detr.detector import DETR, Samples
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.reference import bilinear_weights
from detr_fast.training.matcher import Indices, Outputs, Targets, at_least_float32

Losses = dict[str, Tensor]

LOSSES = ("labels", "cardinality", "boxes", "masks")

PART = 2**17  # mask pixels at once on a CPU: a core's cache holds some float32 maps of them


class SetCriterion(nn.Module):
    """Losses of predictions that are matched to an image's objects.

    Args:
        num_classes: classes without the no-object class.
        matcher: maps (outputs, targets) to matched (queries, objects) of each image: `HungarianMatcher`.
        weight_dict: weight of each loss in the sum to minimise. The criterion holds it for its caller and returns
            losses without weights.
        eos_coef: weight of the no-object class in the cross-entropy.
        losses: some of "labels", "cardinality", "boxes" and "masks".
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Outputs, targets: Targets, indices: Indices | None = None) -> Losses:
        """
        Args:
            outputs: the model's: "pred_logits" [B,Q,num_classes+1], "pred_boxes" [B,Q,4], for the "masks" loss
                "pred_masks", and optionally "aux_outputs".
            targets: B dicts with "labels" integer [N_i], "boxes" [N_i,4] (cx, cy, w, h) in [0,1] of the image and, for
                the "masks" loss, "masks" [N_i,H_i,W_i]. N_i may be 0.
            indices: the result of `matcher` for these outputs; None: it is called. Auxiliary outputs are always
                matched anew.

        Returns:
            "loss_ce", "class_error" (percent), "cardinality_error", "loss_bbox", "loss_giou", "loss_mask" and
            "loss_dice", as far as `losses` asks for them; then, with suffix _0, _1, ..., those of the auxiliary
            outputs, without masks and class error. Box and mask losses are sums over objects, divided by the number of
            objects, and the cross-entropy is a sum over queries, divided by their weights: where torch.distributed
            runs, by the mean of either over the workers, so that gradients averaged over them equal those of one large
            batch. (Upstream's cross-entropy is each worker's own mean.)

        Raises:
            ValueError: an unknown loss, or outputs and targets that do not fit.
        """
        if indices is None:
            indices = self.matcher(outputs, targets)
        objects = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=outputs["pred_boxes"].device)
        num_boxes = _mean_over_workers(objects).clamp(min=1)
        losses: Losses = {}
        for loss in self.losses:
            losses.update(self.get_loss(loss, outputs, targets, indices, num_boxes))
        for layer, aux in enumerate(outputs.get("aux_outputs", ())):
            matched = self.matcher(aux, targets)
            for loss in self.losses:
                if loss != "masks":
                    options = {"log": False} if loss == "labels" else {}
                    values = self.get_loss(loss, aux, targets, matched, num_boxes, **options)
                    losses.update({f"{name}_{layer}": value for name, value in values.items()})
        return losses

    def get_loss(
        self,
        loss: str,
        outputs: Outputs,
        targets: Targets,
        indices: Indices,
        num_boxes: float | Tensor,
        **options: Any,
    ) -> Losses:
        """One of `losses` by name."""
        if loss not in LOSSES:
            raise ValueError(f"losses must be among {', '.join(LOSSES)}, got {loss!r}")
        return getattr(self, f"loss_{loss}")(outputs, targets, indices, num_boxes, **options)

    def loss_labels(
        self, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor, log: bool = True
    ) -> Losses:
        """Cross-entropy over all queries, and with `log` the percentage of matched ones in the wrong class."""
        logits = outputs["pred_logits"]
        if logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"outputs pred_logits must be [B,Q,{self.num_classes + 1}], as num_classes is {self.num_classes}, "
                f"got {list(logits.shape)}"
            )
        matched = _queries(indices, logits.device)
        labels = _objects("labels", targets, indices).to(logits.device, torch.int64)
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[matched] = labels
        entropy = F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight, reduction="sum")
        losses = {"loss_ce": entropy / _mean_over_workers(self.empty_weight[classes].sum())}
        if log:
            correct = logits.detach()[matched].argmax(-1) == labels
            losses["class_error"] = 100 - 100 * correct.sum() / max(len(labels), 1)  # 100 where there are none
        return losses

    @torch.no_grad()
    def loss_cardinality(
        self, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
    ) -> Losses:
        """Mean absolute error of the number of queries in a class, for the log only."""
        logits = outputs["pred_logits"]
        found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        present = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        return {"cardinality_error": (found - present).abs().float().mean()}

    def loss_boxes(self, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor) -> Losses:
        """L1 distance, and 1 - generalised IoU, of matched boxes."""
        predicted = at_least_float32(outputs["pred_boxes"])
        predicted = predicted[_queries(indices, predicted.device)]
        boxes = _objects("boxes", targets, indices).to(predicted)
        giou = generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(boxes))
        return {
            "loss_bbox": F.l1_loss(predicted, boxes, reduction="sum") / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }

    def loss_masks(self, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor) -> Losses:
        """Focal and dice loss of matched masks, at the resolution of the targets padded to one size.

        "pred_masks" is [B,Q,h,w], or a list of [K_i,h,w] for the queries that "selected", bool [B,Q], says.
        """
        masks = _object_masks(targets, indices)  # [K,H,W]
        logits = at_least_float32(_matched_masks(outputs, indices))  # [K,h,w]
        logits = Upsample.apply(logits, masks.shape[-2:]).flatten(1)
        focal, dice = MaskLosses.apply(logits, masks.to(logits.device, torch.bool).flatten(1))
        return {"loss_mask": focal / num_boxes, "loss_dice": dice / num_boxes}


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """Focal loss (Lin et al. 2017), a mean over pixels and a sum over objects, divided by `num_boxes`.

    Args:
        inputs: logits [K,pixels].
        targets: [K,pixels], 1 on the object and 0 elsewhere.
        alpha: weight of the object's pixels; the others have 1 - alpha.
        gamma: power of the probability of the wrong answer.
    """
    prob = inputs.sigmoid()
    wrong = prob + targets - 2 * prob * targets
    balance = 1 - alpha + (2 * alpha - 1) * targets
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    return (balance * wrong**gamma * cross_entropy).mean(1).sum() / num_boxes


def dice_loss(inputs: Tensor, targets: Tensor, num_boxes: float | Tensor) -> Tensor:
    """Dice loss (Milletari et al. 2016), with 1 added above and below, summed over objects, divided by `num_boxes`.

    Args:
        inputs: logits [K,pixels].
        targets: [K,pixels], 1 on the object and 0 elsewhere.
    """
    prob = inputs.sigmoid()
    overlap = 2 * (prob * targets).sum(1)
    return (1 - (overlap + 1) / (prob.sum(1) + targets.sum(1) + 1)).sum() / num_boxes


class Upsample(torch.autograd.Function):
    """[K,h,w] to [K,*size], as F.interpolate's "bilinear", whose gradient takes 5 times as long as its value on a CPU
    and depends on the order of atomic sums on a GPU. This one is two matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        axes = zip(x.shape[1:], size, strict=True)
        ctx.save_for_backward(*(bilinear_weights(n, m, x.dtype, x.device) for n, m in axes))
        return F.interpolate(x[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, columns = ctx.saved_tensors
        return rows @ gradient @ columns.T, None


class MaskLosses(torch.autograd.Function):
    """`sigmoid_focal_loss` and `dice_loss` of [K,P] logits and bool masks, with `num_boxes` 1.

    With w = sigmoid(z), the probability of the wrong answer, where z is the logit off the object and minus the logit on
    it, both need little else: the cross-entropy is softplus(z), and dice's overlap counts the object's pixels less
    their w. For the gradient nothing is kept but the logits, and on a CPU a part at a time stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        focal = logits.new_zeros(())
        above, below = logits.new_empty((2, len(logits)))
        for rows in _parts(logits):
            on, sign, z = _signed(logits[rows], masks[rows])
            wrong = z.sigmoid()
            size, missed = on.sum(1), (wrong * on).sum(1)
            above[rows] = 2 * (size - missed) + 1
            below[rows] = 2 * (size - missed) + wrong.sum(1) + 1
            focal += F.softplus(z, threshold=60).mul_(wrong).mul_(wrong).mul_(sign.add_(2)).sum()
        ctx.save_for_backward(logits, masks, above, below)
        return focal / (4 * max(logits.shape[1], 1)), (1 - above / below).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal: Tensor, dice: Tensor) -> tuple[Tensor, None]:
        logits, masks, above, below = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        on_object, elsewhere = dice * (2 / below - above / below**2), dice * above / below**2
        for rows in _parts(logits):
            on, sign, z = _signed(logits[rows], masks[rows])
            wrong = z.sigmoid()
            right = 1 - wrong
            # the derivative of softplus is w, and that of w is w (1 - w)
            slope = F.softplus(z, threshold=60).mul_(right).mul_(2).add_(wrong).mul_(wrong)
            slope.mul_(sign + 2).mul_(focal / (4 * max(logits.shape[1], 1)))
            slope += on.mul_((on_object - elsewhere)[rows, None]).add_(elsewhere[rows, None]).mul_(right)
            torch.mul(slope.mul_(wrong), sign, out=gradient[rows])
        return gradient, None


def _signed(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 on the object and 0 elsewhere; -1 on it and 1 elsewhere; that times the logits. (Faster than torch.where.)"""
    on = masks.to(logits.dtype)
    sign = 1 - 2 * on
    return on, sign, logits * sign


def _parts(logits: Tensor) -> Iterator[slice]:
    """Rows of [K,P], on a CPU as many at once as the cache holds."""
    rows = max(1, PART // max(logits.shape[1], 1)) if logits.device.type == "cpu" else max(len(logits), 1)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def matched_selection(outputs: Outputs, indices: Indices) -> Tensor:
    """bool [B,Q], the matched queries, on the device of `outputs`: as `DETRsegm.forward`'s `select` returns."""
    logits = outputs["pred_logits"]
    selected = torch.zeros(logits.shape[:2], dtype=torch.bool)
    selected[_queries(indices, selected.device)] = True
    return selected.to(logits.device)


def forward_matched(
    model: DETR | DETRsegm,
    samples: Samples,
    targets: Targets,
    criterion: SetCriterion,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], Losses]:
    """The model's outputs and their losses, with masks for the matched queries only.

    Losses and gradients are those of `criterion(model(samples), targets)`; where the criterion has no "masks" loss, no
    mask is computed. DistributedDataParallel sees only what runs within its own forward: let it wrap a module whose
    forward is this function.

    Args:
        model: `DETR`, or `DETRsegm` where the criterion has a "masks" loss.
        samples, dtype: images, as the model takes them, and what it computes in.
        targets: as `SetCriterion.forward` takes them.

    Returns:
        The outputs, "pred_masks" being a list with "selected" as `DETRsegm.forward` says, and the losses.

    Raises:
        ValueError: a "masks" loss for a model without masks, and all that `SetCriterion.forward` raises.
    """
    detr = model.detr if isinstance(model, DETRsegm) else model
    encoded = model.encode(samples, dtype)
    outputs = detr.predict(encoded)
    if "masks" not in criterion.losses:
        return outputs, criterion(outputs, targets)
    if not isinstance(model, DETRsegm):
        raise ValueError(f"model must be a DETRsegm for the masks loss, got {type(model).__name__}")
    indices = criterion.matcher(outputs, targets)
    selected = matched_selection(outputs, indices)
    outputs = model.predict(encoded, lambda logits: selected)
    return outputs, criterion(outputs, targets, indices)


def _mean_over_workers(number: Tensor) -> Tensor:
    """A scalar, averaged over torch.distributed's workers where it runs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    torch.distributed.all_reduce(number)
    return number / torch.distributed.get_world_size()


def _queries(indices: Indices, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and query of each match, [K] each."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(indices)])
    queries = torch.cat([queries for queries, _ in indices])
    return images.to(device), queries.to(device)


def _objects(key: str, targets: Targets, indices: Indices) -> Tensor:
    """`key` of each match's object, [K,...]."""
    return torch.cat([target[key][objects] for target, (_, objects) in zip(targets, indices, strict=True)])


def _object_masks(targets: Targets, indices: Indices) -> Tensor:
    """Each match's mask [K,H,W], padded to the largest size among the images, those without objects included."""
    for image, target in enumerate(targets):
        if "masks" not in target:
            raise ValueError(f"targets[{image}] must have masks for the masks loss, got {sorted(target)}")
        shape = target["masks"].shape
        if len(shape) != 3 or shape[0] != len(target["labels"]):
            raise ValueError(f"targets[{image}] masks must be [{len(target['labels'])},H,W], got {list(shape)}")
    height, width = (max(target["masks"].shape[axis] for target in targets) for axis in (1, 2))
    padded = []
    for target, (_, objects) in zip(targets, indices, strict=True):
        masks = target["masks"][objects]
        padded.append(F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1])))
    return torch.cat(padded)


def _matched_masks(outputs: Outputs, indices: Indices) -> Tensor:
    """Each match's mask logits [K,h,w]."""
    masks = outputs.get("pred_masks")
    if masks is None:
        raise ValueError(f"outputs must have pred_masks for the masks loss, got {sorted(outputs)}")
    if isinstance(masks, Tensor):
        return masks[_queries(indices, masks.device)]
    selected = outputs["selected"]
    matched = _queries(indices, selected.device)
    if not selected[matched].all():
        raise ValueError("outputs pred_masks must hold every matched query's mask, but selected leaves some out")
    rows = selected.flatten().cumsum(0).view_as(selected) - 1  # of a selected query in the concatenated list
    return torch.cat(masks)[rows[matched]]
