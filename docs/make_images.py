"""The pictures in the README, made by the bundled model from its examples.

python docs/make_images.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from detr_fast.checkpoint import MODELS
from detr_fast.explanation import explain
from detr_fast.predictor import Predictor
from detr_fast.visualize import contact_sheet

OUT = Path(__file__).parent / "images"
EXAMPLES = sorted((MODELS / "shapes" / "examples").glob("*.jpg"))
COLUMNS = 4


def main() -> None:
    predictor = Predictor.from_pretrained("shapes", device="cpu")
    results = predictor(EXAMPLES[:COLUMNS])
    rows = [("pictures", [result.image for result in results]), ("found", [result.overlay() for result in results])]
    _save(contact_sheet(rows, COLUMNS, side=232), "overlay")

    explanation = explain(predictor, EXAMPLES[0])
    figures: dict[str, list[Image.Image]] = {}
    for row, _, picture in explanation.figures():
        figures.setdefault(row, []).append(picture)
    things = {category["id"] for category in predictor.categories if category["isthing"]}
    queries = list(figures.items())[1:]
    shown = [query for query, label in zip(queries, explanation.result.labels, strict=True) if int(label) in things]
    _save(contact_sheet(shown[:2], columns=3, side=312), "explain")


def _save(picture: Image.Image, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
