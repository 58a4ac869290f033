"""The matcher and the criterion beside the paper's formulas, one pair, one pixel at a time, in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from detr_fast.training import criterion as criterion_module
from detr_fast.training.criterion import (
    MaskLosses,
    SetCriterion,
    dice_loss,
    forward_matched,
    matched_selection,
    sigmoid_focal_loss,
)
from detr_fast.training.matcher import HungarianMatcher
from tiny import tiny_detr

NUM_CLASSES = 5
EOS_COEF = 0.1
LOSSES = ("labels", "cardinality", "boxes", "masks")
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask": 1.0, "loss_dice": 1.0}


# ---- the paper, plainly ----


def plain_giou(a: Tensor, b: Tensor) -> Tensor:
    def edges(box: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2

    inner = hull = area_a = area_b = torch.ones((), dtype=torch.float64)
    for axis in (0, 1):
        (a0, a1), (b0, b1) = edges(a, axis), edges(b, axis)
        inner = inner * (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0)
        hull = hull * (torch.maximum(a1, b1) - torch.minimum(a0, b0))
        area_a, area_b = area_a * (a1 - a0), area_b * (b1 - b0)
    union = area_a + area_b - inner
    return inner / union - (hull - union) / hull


def plain_cost(logits: Tensor, box: Tensor, label: int, target: Tensor, weights: tuple[float, ...]) -> float:
    probability = logits.exp()[label] / logits.exp().sum()
    terms = (-probability, (box - target).abs().sum(), -plain_giou(box, target))
    return sum(weight * term.item() for weight, term in zip(weights, terms, strict=True))


def plain_bilinear(image: Tensor, height: int, width: int) -> list[Tensor]:
    """Pixels of the upsampled image, row by row; pixel centres lie at (i + 0.5) / size (align_corners=False)."""
    h, w = image.shape

    def neighbours(index: int, size: int, new: int) -> list[tuple[int, float]]:
        at = max((index + 0.5) * size / new - 0.5, 0)
        low = min(int(at), size - 1)
        return [(low, 1 - (at - low)), (min(low + 1, size - 1), at - low)]

    pixels = []
    for y, x in itertools.product(range(height), range(width)):
        corners = itertools.product(neighbours(y, h, height), neighbours(x, w, width))
        pixels.append(sum((image[i, j] * p * q for (i, p), (j, q) in corners), torch.zeros((), dtype=torch.float64)))
    return pixels


def plain_losses(outputs: dict, targets: list, indices: list, masks: bool) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    height = max(t["masks"].shape[1] for t in targets)
    width = max(t["masks"].shape[2] for t in targets)
    entropy, entropy_weight, bbox, giou, focal, dice = (zero for _ in range(6))
    wrong = cardinality = matches = 0
    for image, (target, (queries, objects)) in enumerate(zip(targets, indices, strict=True)):
        object_of = dict(zip(queries.tolist(), objects.tolist(), strict=True))
        found = 0
        for query in range(logits.shape[1]):
            j = object_of.get(query)
            label = NUM_CLASSES if j is None else int(target["labels"][j])
            weight = EOS_COEF if j is None else 1.0
            scores = logits[image, query]
            entropy = entropy + weight * (scores.exp().sum().log() - scores[label])
            entropy_weight = entropy_weight + weight
            best = max(range(NUM_CLASSES + 1), key=lambda c: scores[c].item())
            found += best != NUM_CLASSES
            if j is None:
                continue
            matches += 1
            wrong += best != label
            box = target["boxes"][j].double()
            bbox = bbox + (boxes[image, query] - box).abs().sum()
            giou = giou + 1 - plain_giou(boxes[image, query], box)
            if masks:
                inside = torch.zeros(height, width, dtype=torch.float64)
                inside[: target["masks"].shape[1], : target["masks"].shape[2]] = target["masks"][j]
                overlap = total = mean = zero
                pixels = plain_bilinear(outputs["pred_masks"][image, query], height, width)
                for logit, t in zip(pixels, inside.flatten().tolist(), strict=True):
                    p = 1 / (1 + (-logit).exp())
                    mean = mean - (0.25 * (1 - p) ** 2 * p.log() if t else 0.75 * p**2 * (1 - p).log())
                    overlap, total = overlap + 2 * p * t, total + p + t
                focal = focal + mean / len(pixels)
                dice = dice + 1 - (overlap + 1) / (total + 1)
        cardinality += abs(found - len(target["labels"]))
    losses = {
        "loss_ce": entropy / entropy_weight,
        "cardinality_error": torch.tensor(cardinality / len(targets)),
        "loss_bbox": bbox / num_boxes,
        "loss_giou": giou / num_boxes,
    }
    if masks:  # of the last layer only, and so is the class error
        losses["class_error"] = torch.tensor(100.0 * wrong / matches if matches else 100.0)
        losses.update(loss_mask=focal / num_boxes, loss_dice=dice / num_boxes)
    return losses


# ---- cases ----


def predictions(batch: int, queries: int, generator: torch.Generator) -> dict:
    return {
        "pred_logits": torch.randn(batch, queries, NUM_CLASSES + 1, generator=generator).requires_grad_(),
        "pred_boxes": torch.randn(batch, queries, 4, generator=generator).sigmoid().requires_grad_(),
    }


def case(counts: tuple[int, ...], queries: int = 4, seed: int = 0) -> tuple[dict, list]:
    """Outputs of two layers, and targets with so many objects each, in images of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    outputs = predictions(len(counts), queries, generator)
    outputs["pred_masks"] = torch.randn(len(counts), queries, 3, 2, generator=generator).mul(3).requires_grad_()
    outputs["aux_outputs"] = [predictions(len(counts), queries, generator)]
    targets = []
    for image, count in enumerate(counts):
        targets.append(
            {
                "labels": torch.randint(NUM_CLASSES, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator),
                "masks": torch.rand(count, 5 + image, 7 - image, generator=generator) < 0.4,
            }
        )
    return outputs, targets


def without_area() -> tuple[dict, list]:
    """Objects that are a point, a line and the whole image, without a pixel in their masks."""
    outputs, targets = case((3, 1))
    targets[0]["boxes"] = torch.tensor([[0.2, 0.3, 0, 0], [0.5, 0.5, 0.4, 0], [0.5, 0.5, 1, 1]])
    targets[0]["masks"][:] = False
    return outputs, targets


def identical() -> tuple[dict, list]:
    """One object three times, and queries that all predict it exactly."""
    outputs, targets = case((3,))
    targets[0]["labels"][:] = 2
    targets[0]["boxes"][:] = torch.tensor([0.5, 0.4, 0.3, 0.2])
    outputs["pred_boxes"] = torch.tensor([0.5, 0.4, 0.3, 0.2]).repeat(1, 4, 1).requires_grad_()
    return outputs, targets


CASES = {
    "random": lambda: case((2, 3)),
    "an image without objects": lambda: case((0, 3, 1), seed=1),
    "no object at all": lambda: case((0, 0)),
    "more objects than queries": lambda: case((6, 1), queries=3),
    "one query, one object": lambda: case((1,), queries=1),
    "without area": without_area,
    "identical": identical,
}


def criterion_of(*losses: str) -> SetCriterion:
    return SetCriterion(NUM_CLASSES, HungarianMatcher(1, 5, 2), WEIGHTS, EOS_COEF, losses or LOSSES)


def leaves(outputs: dict) -> list[Tensor]:
    aux = outputs["aux_outputs"][0]
    return [*(outputs[f"pred_{name}"] for name in ("logits", "boxes", "masks")), aux["pred_logits"], aux["pred_boxes"]]


def total(losses: dict[str, Tensor]) -> Tensor:
    """A sum to which each loss adds a different multiple."""
    return sum(((i + 1) * losses[name] for i, name in enumerate(sorted(losses)) if "loss" in name), torch.zeros(()))


# ---- tests ----


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 0, 0), (0, 0, 1)])
def test_matching_costs_least(name: str, weights: tuple[float, ...]) -> None:
    outputs, targets = CASES[name]()
    logits, boxes = outputs["pred_logits"].double(), outputs["pred_boxes"].double()
    for image, (queries, objects) in enumerate(HungarianMatcher(*weights)(outputs, targets)):
        labels, wanted = targets[image]["labels"].tolist(), targets[image]["boxes"].double()
        cost = [
            [plain_cost(logits[image, q], boxes[image, q], label, wanted[j], weights) for j, label in enumerate(labels)]
            for q in range(logits.shape[1])
        ]
        size = min(len(cost), len(labels))
        assert queries.dtype == objects.dtype == torch.int64
        assert len(queries) == len(set(objects.tolist())) == size
        assert queries.tolist() == sorted(set(queries.tolist()))
        least = min(
            sum(cost[q][j] for q, j in zip(some, order, strict=True))
            for some in itertools.combinations(range(len(cost)), size)
            for order in itertools.permutations(range(len(labels)), size)
        )
        pairs = zip(queries.tolist(), objects.tolist(), strict=True)
        assert sum(cost[q][j] for q, j in pairs) == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_papers(name: str) -> None:
    outputs, targets = CASES[name]()
    criterion = criterion_of()
    losses = criterion(outputs, targets)

    exact = {
        key: value.detach().double().requires_grad_() for key, value in outputs.items() if isinstance(value, Tensor)
    }
    exact_aux = {key: value.detach().double().requires_grad_() for key, value in outputs["aux_outputs"][0].items()}
    exact["aux_outputs"] = [exact_aux]
    wanted = plain_losses(exact, targets, criterion.matcher(outputs, targets), masks=True)
    aux_indices = criterion.matcher(outputs["aux_outputs"][0], targets)
    for key, value in plain_losses(exact_aux, targets, aux_indices, masks=False).items():
        wanted[f"{key}_0"] = value

    assert set(losses) == set(wanted)
    for key, value in losses.items():
        assert value.shape == () and value.item() == pytest.approx(wanted[key].item(), rel=1e-5, abs=1e-5), key
    gradients = torch.autograd.grad(total(losses), leaves(outputs))
    expected = torch.autograd.grad(total(wanted), leaves(exact), allow_unused=True)
    for got, want in zip(gradients, expected, strict=True):
        zeros = torch.zeros_like(got, dtype=torch.float64)
        torch.testing.assert_close(got.double(), zeros if want is None else want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("more", [False, True], ids=["matched only", "others too"])
def test_a_list_of_selected_masks_is_as_good_as_all(name: str, more: bool) -> None:
    outputs, targets = CASES[name]()
    criterion = criterion_of("masks")
    indices = criterion.matcher(outputs, targets)
    selected = matched_selection(outputs, indices)
    if more:
        selected[:, 0] = True
    some = {**outputs, "selected": selected}
    some["pred_masks"] = [m[s] for m, s in zip(outputs["pred_masks"], selected, strict=True)]
    values = []
    for given in (outputs, some):
        losses = criterion.get_loss("masks", given, targets, indices, 2.0)
        gradient = torch.autograd.grad(total(losses), outputs["pred_masks"])[0]
        values.append((*losses.values(), gradient))
    for one, other in zip(*values, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("part", [1, 70, 10_000])
def test_mask_losses_are_the_plain_ones_however_many_at_once(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion_module, "PART", part)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 33, generator=generator).mul(30).double().requires_grad_()  # some far beyond saturation
    masks = torch.rand(7, 33, generator=generator) < 0.4
    masks[2], masks[3] = False, True
    focal, dice = MaskLosses.apply(logits, masks)
    plain = sigmoid_focal_loss(logits, masks.to(logits), 1.0), dice_loss(logits, masks.to(logits), 1.0)
    torch.testing.assert_close((focal, dice), plain, rtol=1e-12, atol=1e-12)
    for weights in ((1, 0), (0, 1), (2, 3)):
        ours, theirs = (
            torch.autograd.grad(a * weights[0] + b * weights[1], logits, retain_graph=True)[0]
            for a, b in ((focal, dice), plain)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0)])
def test_a_step_with_matched_masks_equals_one_with_all(counts: tuple[int, int]) -> None:
    model = tiny_detr(num_classes=NUM_CLASSES, dec_layers=2, aux_loss=True).double()  # rounding aside, they are equal
    samples = [torch.randn(3, 64, 70).double(), torch.randn(3, 50, 96).double()]
    _, targets = case(counts)
    for target, sample in zip(targets, samples, strict=True):
        target["masks"] = torch.rand(len(target["labels"]), *sample.shape[1:]) < 0.4
    criterion = criterion_of().double()
    steps = []
    for matched in (False, True):
        model.zero_grad()
        if matched:
            outputs, losses = forward_matched(model, samples, targets, criterion)
            assert [len(masks) for masks in outputs["pred_masks"]] == list(counts)
        else:
            losses = criterion(model(samples), targets)
        total(losses).backward()
        steps.append((losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (all_losses, all_gradients), (losses, gradients) = steps
    for name, value in all_losses.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-8, atol=1e-8, msg=name)
    for name, gradient in all_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert gradients[name] is not None, name  # as DistributedDataParallel wants
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=1e-7, atol=1e-7, msg=name)


def test_no_mask_is_computed_where_no_loss_wants_one() -> None:
    model = tiny_detr(num_classes=NUM_CLASSES)
    _, targets = case((1,))
    outputs, losses = forward_matched(model, torch.randn(1, 3, 64, 64), targets, criterion_of("labels", "boxes"))
    assert "pred_masks" not in outputs
    assert set(losses) == {"loss_ce", "class_error", "loss_bbox", "loss_giou"}
    with pytest.raises(ValueError, match="DETRsegm"):
        forward_matched(model.detr, torch.randn(1, 3, 64, 64), targets, criterion_of())


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outputs, targets = case((1, 3))
    mine = {name: outputs[name][rank : rank + 1] for name in ("pred_logits", "pred_boxes")}
    torch.save(criterion_of("labels", "boxes")(mine, targets[rank : rank + 1]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_workers_divide_by_their_means(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    outputs, targets = case((1, 3))
    together = criterion_of("labels", "boxes")(outputs, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close((one[name] + other[name]) / 2, together[name], rtol=1e-6, atol=1e-6, msg=name)


def broken(**changes: object) -> tuple[dict, list]:
    """A case whose second image has one value replaced."""
    outputs, targets = case((1, 2))
    outputs = {name: outputs[name].detach().clone() for name in ("pred_logits", "pred_boxes", "pred_masks")}
    for name, value in changes.items():
        (outputs if name in outputs else targets[1])[name][(1, 0) if name in outputs else 0] = value
    return outputs, targets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": NUM_CLASSES}, r"targets\[1\] labels must be in \[0, 5\), got 5"),
        ({"labels": -1}, r"targets\[1\] labels must be in \[0, 5\), got -1"),
        ({"boxes": torch.tensor([320.0, 200, 64, 32])}, r"targets\[1\] boxes must be .* got \[320.0"),
        ({"boxes": torch.tensor([0.5, 0.5, -0.25, 0.25])}, r"targets\[1\] boxes must be .* -0.25"),
        ({"boxes": math.nan}, r"targets\[1\] boxes must be .* nan"),
        ({"pred_logits": math.nan}, "pred_logits must be finite, .* image 1"),
        ({"pred_boxes": math.inf}, "pred_boxes must be finite .* image 1"),
        ({"pred_boxes": torch.tensor([0.5, 0.5, 0.5, -0.25])}, "pred_boxes must be finite .* -0.25"),
        (
            {"pred_boxes": torch.tensor([0.5, 0.5, 0, 0]), "boxes": torch.tensor([0.5, 0.5, 0, 0])},
            r"targets\[1\] boxes must not both be without area",
        ),
    ],
)
def test_bad_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HungarianMatcher(1, 5, 2)(*broken(**changes))


def test_bad_shapes_are_named() -> None:
    outputs, targets = case((1, 2))
    first, second = targets
    criterion = criterion_of()
    with pytest.raises(ValueError, match="one dict for each of 2 images, got 1"):
        criterion(outputs, [first])
    with pytest.raises(ValueError, match=r"targets\[1\] must have labels and boxes, got \['labels', 'masks'\]"):
        criterion(outputs, [first, {key: second[key] for key in ("labels", "masks")}])
    with pytest.raises(
        ValueError, match=r"targets\[1\] must have labels \[N\] and boxes \[N,4\], got \[2\] and \[1, 4\]"
    ):
        criterion(outputs, [first, {**second, "boxes": second["boxes"][:1]}])
    with pytest.raises(ValueError, match="labels must be integers, got torch.float32"):
        criterion(outputs, [first, {**second, "labels": second["labels"].float()}])
    with pytest.raises(ValueError, match=r"targets\[1\] masks must be \[2,H,W\], got \[1, 6, 6\]"):
        criterion(outputs, [first, {**second, "masks": second["masks"][:1]}])
    with pytest.raises(ValueError, match=r"pred_logits must be \[B,Q,8\], as num_classes is 7"):
        SetCriterion(7, HungarianMatcher(), {}, 0.1, ["labels"])(outputs, targets)
    with pytest.raises(ValueError, match="must have pred_masks for the masks loss"):
        criterion({key: outputs[key] for key in ("pred_logits", "pred_boxes")}, targets)
    with pytest.raises(ValueError, match="selected leaves some out"):
        none = torch.zeros(2, 4, dtype=torch.bool)
        criterion({**outputs, "pred_masks": [torch.zeros(0, 3, 2)] * 2, "selected": none}, targets)
    with pytest.raises(ValueError, match="losses must be among .*, got 'keypoints'"):
        criterion_of("keypoints")(outputs, targets)
    with pytest.raises(ValueError, match="not all 0"):
        HungarianMatcher(0, 0, 0)
