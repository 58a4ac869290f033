"""Pictures of a training: its curves, and the truth of a few images beside the model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detr_fast import visualize
from detr_fast.categories import Category
from detr_fast.data.coco import Sample
from detr_fast.predictor import Predictor

PANEL = (360, 220)  # width and height, in pixels
MARGIN = (52, 26, 10, 22)  # left, top, right, bottom
POINTS = 200  # of a curve: each is the mean of as many steps as it takes
CURVES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice", "class_error", "lr")
HEIGHT = 256  # of a prediction


def curves(log: Sequence[dict[str, Any]]) -> Image.Image:
    """A panel for each of `CURVES` that the log has, over steps.

    Args:
        log: at least one entry with "step" and numbers.
    """
    steps = np.array([entry["step"] for entry in log], dtype=float)
    names = [name for name in CURVES if name in log[-1]]
    columns = min(4, len(names))
    picture = Image.new("RGB", (columns * PANEL[0], -(-len(names) // columns) * PANEL[1]), "white")
    for index, name in enumerate(names):
        values = np.array([entry[name] for entry in log], dtype=float)
        corner = (index % columns * PANEL[0], index // columns * PANEL[1])
        picture.paste(_panel(name, _thinned(steps), _thinned(values)), corner)
    return picture


def _thinned(values: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])


def _panel(name: str, x: np.ndarray, y: np.ndarray) -> Image.Image:
    panel = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(11)
    left, top = MARGIN[:2]
    right, bottom = PANEL[0] - MARGIN[2], PANEL[1] - MARGIN[3]
    low, high = float(y.min()), float(y.max())
    draw.rectangle((left, top, right, bottom), outline="gray")
    draw.text((left, 6), name, fill="black", font=font)
    draw.text((left - 4, top), f"{high:.3g}", fill="black", font=font, anchor="rt")
    draw.text((left - 4, bottom), f"{low:.3g}", fill="black", font=font, anchor="rb")
    draw.text((left, bottom + 4), f"{x[0]:.0f}", fill="black", font=font, anchor="lt")
    draw.text((right, bottom + 4), f"step {x[-1]:.0f}", fill="black", font=font, anchor="rt")
    across = left + (x - x[0]) / max(x[-1] - x[0], 1) * (right - left)
    down = bottom - (y - low) / (high - low or 1) * (bottom - top)
    draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=(31, 90, 180), width=2)
    return panel


def predictions(predictor: Predictor, samples: Sequence[Sample]) -> Image.Image:
    """The truth at the left and the prediction at the right, a row for each sample."""
    results = predictor.predict([predictor.prepare_picture(sample.image) for sample in samples])
    pairs = [
        (truth(sample, predictor.categories), result.overlay()) for sample, result in zip(samples, results, strict=True)
    ]
    rows = [[_scaled(picture) for picture in pair] for pair in pairs]
    width = max(picture.width for row in rows for picture in row)
    sheet = Image.new("RGB", (2 * width, HEIGHT * len(rows)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, number * HEIGHT))
    return sheet


def truth(sample: Sample, categories: list[Category]) -> Image.Image:
    """The annotations drawn over their image: segments if it has masks, else boxes."""
    labels = sample.target["labels"].tolist()
    if "masks" not in sample.target:
        boxes, unscored = sample.target["boxes"].numpy(), np.full(len(labels), None)
        return visualize.draw_boxes(sample.image, boxes, unscored, np.array(labels), categories)
    ids = np.zeros((sample.image.height, sample.image.width), dtype=np.int32)
    for number, mask in enumerate(sample.target["masks"].numpy(), 1):
        ids[mask] = number
    present = set(np.unique(ids).tolist())  # of masks that overlap, one may be hidden
    segments = [{"id": i, "category_id": label} for i, label in enumerate(labels, 1) if i in present]
    return visualize.draw_segments(sample.image, ids, segments, categories)


def _scaled(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))
