"""The real launchers under the whole product: labels, merges and a training step, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from contract import picture
from detr_fast import ops
from detr_fast.labeling.pipeline import label
from detr_fast.postprocess import Kept, rgb_to_id
from detr_fast.predictor import MODES, Predictor
from detr_fast.training.criterion import forward_matched
from detr_fast.training.train import build_criterion
from tiny import tiny_detr

SIZES = {
    "backbone_width": 8,
    "dim_feedforward": 32,
    "num_queries": 3,
    "dropout": 0.0,
    "image_size": 32,
    "max_image_size": 40,
}


@pytest.fixture
def model() -> Any:
    model = tiny_detr(**SIZES)
    with torch.no_grad():
        model.detr.class_embed.bias[250] = -1000  # every query finds something
    return model


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels that were imported for a CUDA device cannot be interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def keep(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Predictor keeps the first `count` queries."""

    def first(_: Predictor, logits: torch.Tensor) -> torch.Tensor:
        return (torch.arange(logits.shape[1]) < count).expand(logits.shape[:2])

    monkeypatch.setattr(Predictor, "select", first)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_labels(model: Any, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A blank picture, of which no query is kept, ended a run."""
    keep(count, monkeypatch)
    (tmp_path / "images").mkdir()
    picture(40, 32).save(tmp_path / "images" / "1.png")
    predictor = Predictor(model, device="cpu")
    expected = predictor(tmp_path / "images" / "1.png")
    with ops.pretend("sm_70"):
        summary = label(tmp_path / "images", tmp_path / "labels", predictor, workers=1)
    assert (summary.labelled, summary.failed) == (1, 0)
    assert summary.segments == len(expected.segments_info) and (summary.segments > 0) == (count > 0)
    ids = rgb_to_id(np.array(Image.open(tmp_path / "labels" / "panoptic" / "1.png.png")))
    assert (ids == expected.segmentation).mean() > 0.99


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_merges_of_a_batch(model: Any, mode: str, count: int) -> None:
    """The second image has no kept query."""
    predictor = Predictor(model, device="cpu", mode=mode)
    masks = 4 * torch.randn(count, 8, 10, generator=torch.Generator().manual_seed(count))
    kept = [Kept(masks, torch.full((count,), 0.9), torch.tensor([1, 120, 120])[:count])]
    kept.append(Kept(masks[:0], kept[0].scores[:0], kept[0].labels[:0]))
    sizes = ((32, 40), [(32, 40), (24, 40)], [(20, 25), (9, 7)])
    expected = predictor.start_merges(kept, *sizes)()
    with ops.pretend("sm_70"):
        found = predictor.start_merges(kept, *sizes)()
    for (ids, segments_info), (true_ids, true_segments_info) in zip(found, expected, strict=True):
        assert np.array_equal(ids, true_ids) and segments_info == true_segments_info


@pytest.mark.parametrize("objects", [0, 1, 3])
def test_a_training_step(model: Any, objects: int) -> None:
    """LayerNorm's gradients shared storage, which ended training at the first step."""
    criterion = build_criterion(model.config, aux_loss=False)
    samples = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    boxes = torch.rand(objects, 4, generator=torch.Generator().manual_seed(2)) / 4 + 0.3
    masks = torch.zeros(objects, 32, 32, dtype=torch.bool)
    masks[:, 8:20, 8:24] = True
    targets = [{"labels": torch.arange(objects), "boxes": boxes, "masks": masks}]

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        _, losses = forward_matched(model, samples, targets, criterion)
        loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, plain = step()
    with ops.pretend("sm_90"):
        loss, gradients = step()
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, gradient in plain.items():
        scale = gradient.abs().max().item()
        assert (gradients[name] - gradient).abs().max().item() <= 1e-3 * scale + 1e-6, name
