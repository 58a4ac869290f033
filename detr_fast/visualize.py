"""Results drawn over their pictures, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.5

# Colours (R, G, B) of weights from 0 to the largest, from dark to bright, so that no colour vision is needed
HEAT = ((0, 0, 0), (70, 10, 105), (165, 45, 95), (235, 105, 35), (250, 190, 50), (252, 255, 200))


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


def draw_heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Weights [h, w] over the picture in dark grey: `HEAT` from 0, where it is clear, to the largest of them."""
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    share = _resized(weights, image.size) / max(float(weights.max()), np.finfo(np.float32).tiny)
    levels = np.linspace(0, 1, len(HEAT))
    heat = np.stack([np.interp(share, levels, channel) for channel in zip(*HEAT, strict=True)], -1)
    opacity = 0.85 * np.sqrt(share)[..., None]
    return Image.fromarray(((1 - opacity) * 0.7 * grey + opacity * heat).astype(np.uint8))


def draw_mask(image: Image.Image, probability: np.ndarray, color: Sequence[int]) -> Image.Image:
    """A query's probability of each pixel, [h, w] in [0, 1]: the picture in `color` at 1, nearly black at 0."""
    share = _resized(probability, image.size)[..., None]
    tinted = (1 - OPACITY) * np.asarray(image, dtype=np.float32) + OPACITY * np.array(color, dtype=np.float32)
    return Image.fromarray((tinted * (0.15 + 0.85 * share)).astype(np.uint8))


def draw_point(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A mark around (x, y) in pixels."""
    picture = image.copy()
    radius = max(4, min(image.size) / 50)
    box = (point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius)
    draw = ImageDraw.Draw(picture)
    draw.ellipse(box, outline="black", width=5)
    draw.ellipse(box, outline="white", width=2)
    return picture


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: int, side: int) -> Image.Image:
    """Pictures in rows of at most `columns`, each `side` pixels wide, each row under its title."""
    gap, band = 8, 26
    font = ImageFont.load_default(15)
    shrunk = [
        (title, [tile.resize((side, max(1, round(tile.height * side / tile.width)))) for tile in pictures])
        for title, pictures in rows
    ]
    heights = [band + max(tile.height for tile in tiles) + gap for _, tiles in shrunk]
    sheet = Image.new("RGB", (gap + columns * (side + gap), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, tiles), height in zip(shrunk, heights, strict=True):
        draw.text((gap, top + band / 2), title, fill="black", font=font, anchor="lm")
        for number, tile in enumerate(tiles):
            sheet.paste(tile, (gap + number * (side + gap), top + band))
        top += height
    return sheet


def caption(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {score:.2f}"


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 [h, w] at `size` (width, height), bilinear."""
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


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
