"""Results drawn over their pictures, for people to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.5


def draw_segments(
    image: Image.Image, segmentation: np.ndarray, segments_info: list[dict[str, Any]], categories: list[dict[str, Any]]
) -> Image.Image:
    """Segments in their category's colour with a white outline, each with its class and score at its centre.

    Args:
        image: RGB, [H, W].
        segmentation: int32 [H, W] ids.
        segments_info: dicts with "id", "category_id" and, where known, "score".
        categories: dicts with "id", "name" and "color" (R, G, B).
    """
    by_id = {category["id"]: category for category in categories}
    pixels = np.array(image, dtype=np.float32)
    for info in segments_info:
        mask = segmentation == info["id"]
        color = np.array(by_id[info["category_id"]]["color"], dtype=np.float32)
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * color
    pixels[_outlines(segmentation)] = 255
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for info in segments_info:
        text = caption(by_id[info["category_id"]]["name"], info.get("score"))
        _draw_text(draw, _centre(segmentation == info["id"]), text, picture.size)
    return picture


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, categories: list[dict[str, Any]]
) -> Image.Image:
    """Boxes (x0, y0, x1, y1 in pixels) in their category's colour, each with its class and score at its top left."""
    by_id = {category["id"]: category for category in categories}
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes, labels, strict=True):
        draw.rectangle(box.tolist(), outline=tuple(by_id[int(label)]["color"]), width=3)
    for box, score, label in zip(boxes, scores, labels, strict=True):
        _draw_text(draw, (float(box[0]), float(box[1])), caption(by_id[int(label)]["name"], score), picture.size, "la")
    return picture


def caption(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {score:.2f}"


def _outlines(segmentation: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels whose right or lower neighbour belongs to another segment."""
    edges = np.zeros(segmentation.shape, dtype=bool)
    edges[:, :-1] |= segmentation[:, :-1] != segmentation[:, 1:]
    edges[:-1] |= segmentation[:-1] != segmentation[1:]
    return edges


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the mask's pixel that is nearest to its centroid, which itself may lie outside."""
    y, x = np.nonzero(mask)
    nearest = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    return float(x[nearest]), float(y[nearest])


def _draw_text(
    draw: ImageDraw.ImageDraw, position: tuple[float, float], text: str, size: tuple[int, int], anchor: str = "mm"
) -> None:
    """White on black, moved to lie within the picture."""
    font = ImageFont.load_default(max(10, min(size) // 40))
    left, top, right, bottom = draw.textbbox(position, text, font=font, anchor=anchor)
    shift_x = max(0, -left) - max(0, right - size[0])
    shift_y = max(0, -top) - max(0, bottom - size[1])
    draw.rectangle((left + shift_x - 1, top + shift_y - 1, right + shift_x + 1, bottom + shift_y + 1), fill="black")
    draw.text((position[0] + shift_x, position[1] + shift_y), text, fill="white", font=font, anchor=anchor)
