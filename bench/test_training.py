"""Matching, losses, and a training step: the masks of all queries beside those of the matched ones."""

import pytest
import torch

from bench import cases, definitions
from bench.operations.case import Draw
from detr_fast import ops
from detr_fast.training.criterion import SetCriterion, forward_matched
from detr_fast.training.matcher import HungarianMatcher

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask": 1.0, "loss_dice": 1.0}
BOTH = pytest.mark.parametrize("way", ["reference", "fast"])


def targets_of(draw, batch, count, size):
    """`count` objects in each image, with boxes inside of it and smooth masks."""
    return [
        {
            "labels": draw.integers(250, count),
            "boxes": draw.normal(count, 4).sigmoid() / 2 + 0.1,
            "masks": draw.masks(count, size) > 0,
        }
        for _ in range(batch)
    ]


@BOTH
def test_matcher(bench, scale, device, way):
    draw, batch = Draw(device, 0), scale.batches[1]
    targets = targets_of(draw, batch, scale.kept, (4, 4))
    outputs = {
        "pred_logits": draw.normal(batch, scale.queries, 251),
        "pred_boxes": draw.normal(batch, scale.queries, 4).sigmoid(),
    }

    def plain():
        return definitions.match(outputs, targets, (1, 5, 2))

    def fast():
        return HungarianMatcher(1, 5, 2)(outputs, targets)

    expected = plain()

    def check(out):
        for ours, theirs in zip(out, expected, strict=True):
            assert [list(indices) for indices in ours] == [list(indices) for indices in theirs]
        return 0.0

    shape = f"{batch} x {scale.queries} queries, {scale.kept} objects"
    bench("matcher", way, plain if way == "reference" else fast, check, shape=shape)


@BOTH
def test_mask_losses(bench, scale, device, way):
    """Forward and backward."""
    draw, count = Draw(device, 0), 2 * scale.kept
    masks = draw.masks(count, scale.level(4)).requires_grad_()
    targets = draw.masks(count, scale.image) > 0

    def plain():
        return definitions.mask_losses(masks, targets, count)

    def fast():
        every = torch.arange(count)
        criterion = SetCriterion(250, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, ["masks"])
        return criterion.loss_masks(
            {"pred_masks": masks[None]}, [{"labels": every, "masks": targets}], [(every, every)], count
        )

    def step(losses):
        total = sum(losses().values())
        return total.detach(), torch.autograd.grad(total, masks)[0]

    expected = step(plain)
    check = close_to(expected)
    shape = f"{count} masks, {'x'.join(map(str, scale.image))}"
    bench("mask losses", way, lambda: step(plain if way == "reference" else fast), check, shape=shape, memory=True)


def close_to(expected, allowed=1e-3):
    """A check against the same algebra in another order: the error in parts of the largest number."""

    def check(out):
        pairs = zip(out, expected, strict=True)
        errors = [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]
        assert all(error <= allowed for error in errors), f"errors {errors}, above {allowed}"  # a NaN is not below
        return max(errors)

    return check


class Training:
    """A model that trains, without dropout, its criterion, an image with objects, and a plain step in float64."""

    def __init__(self, scale, device):
        self.model = cases.panoptic_model(scale.config.replace(dropout=0.0)).train().requires_grad_(True).to(device)
        losses = ["labels", "boxes", "cardinality", "masks"]
        self.criterion = SetCriterion(250, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, losses).to(device)
        self.image = cases.images(1, scale.trained).to(device)
        self.targets = targets_of(Draw(device, 0), 1, scale.kept, scale.trained)
        self.model.double(), self.criterion.double()
        targets = [{**target, "boxes": target["boxes"].double()} for target in self.targets]
        with ops.plain():
            expected = self.step(lambda: forward_matched(self.model, self.image.double(), targets, self.criterion)[1])
        self.expected = [value.float() for value in expected]
        self.model.float(), self.criterion.float()

    def step(self, losses):
        """Forward, `losses` and backward: the loss, and two gradients."""
        self.model.zero_grad()
        total = sum(value * WEIGHTS[name] for name, value in losses().items() if name in WEIGHTS)
        total.backward()
        return total.detach(), self.model.mask_head.lay1.weight.grad, self.model.detr.input_proj.weight.grad

    def all_masks(self):
        return self.criterion(self.model(self.image), self.targets)

    def matched_masks(self):
        return forward_matched(self.model, self.image, self.targets, self.criterion)[1]

    def plain_step(self):
        with ops.plain():
            return self.step(self.all_masks)


@pytest.fixture(scope="module")
def training(scale, device):
    return Training(scale, device)


@pytest.mark.parametrize("way", ["reference", "fast, all masks", "fast"])
def test_training_step(bench, scale, device, training, way):
    """The reference is plain, with the masks of all queries; "fast" has those of the matched ones."""
    call = {
        "reference": training.plain_step,
        "fast, all masks": lambda: training.step(training.all_masks),
        "fast": lambda: training.step(training.matched_masks),
    }[way]
    check = close_to(training.expected, 1e-3 if device.type == "cpu" else 0.1)  # a GPU convolves in TF32
    shape = f"1 x 3 x {scale.trained[0]} x {scale.trained[1]}, {scale.kept} objects of {scale.queries} queries"
    bench("training step", way, call, check, shape=shape, count=True, seconds=4, memory=True)
