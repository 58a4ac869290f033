"""The model that the package brings, on pictures that it has not seen."""

from __future__ import annotations

from pathlib import Path

from detr_fast.data import shapes
from detr_fast.evaluation.evaluate import evaluate
from detr_fast.predictor import Predictor


def test_it_finds_what_its_card_says(tmp_path: Path) -> None:
    """Of 60 pictures; the least is what 500 gave (the card), less twice the deviation of so few."""
    shapes.write_dataset(tmp_path / "unseen", 60, seed=2024)
    report = evaluate(Predictor.from_pretrained("shapes", device="cpu", mode="detr"), tmp_path / "unseen")
    assert report["bbox"]["AP"] > 60
    assert report["segm"]["AP"] > 55
    assert report["panoptic"]["PQ"] > 70
