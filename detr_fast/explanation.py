"""Explanations of a result: a sheet of figures of an image, with the attention and the mask of each kept query."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detr_fast import visualize
from detr_fast.detr.attention import decoder_attention, encoder_attention
from detr_fast.files import open_atomic
from detr_fast.images import ImageSource
from detr_fast.predictor import PanopticResult, Predictor
from detr_fast.preprocess import image_to_tensor


@dataclass(frozen=True)
class Explanation:
    """The attention and the masks behind the `PanopticResult` of an image of H x W pixels.

    Attributes:
        result: its boxes, scores and labels are those of `queries`, in order.
        queries: int64 [K], the kept object queries.
        attention: float32 [K, heads, h, w], each query's attention in the decoder: `decoder_attention`.
        masks: float32 [K, H/4, W/4] about, each query's probability of a pixel; None if the model has no mask head.
        points: (x, y) in pixels of the image.
        point_attention: float32 [P, heads, h, w], each point's attention in the encoder: `encoder_attention`.
    """

    result: PanopticResult
    queries: np.ndarray
    attention: np.ndarray
    masks: np.ndarray | None
    points: list[tuple[int, int]]
    point_attention: np.ndarray

    def figures(self) -> Iterator[tuple[str, str, Image.Image]]:
        """(row, name, picture) of each figure; every picture has the image's size."""
        image, categories = self.result.image, {category["id"]: category for category in self.result.categories}
        yield "the image and what is found in it", "image", image
        yield "the image and what is found in it", "overlay", self.result.overlay()
        for number, query in enumerate(self.queries.tolist()):
            label, score = int(self.result.labels[number]), float(self.result.scores[number])
            category = categories[label]
            row = f"query {query}: {visualize.caption(category['name'], score)} - box, attention"
            row += ", mask" if self.masks is not None else ""
            name, one = f"query-{query:03d}", slice(number, number + 1)
            boxes, scores, labels = (x[one] for x in (self.result.boxes, self.result.scores, self.result.labels))
            boxed = visualize.draw_boxes(image, boxes, scores, labels, self.result.categories)
            yield row, f"{name}-box", boxed
            yield row, f"{name}-attention", visualize.draw_heat(image, self.attention[number].mean(0))
            if self.masks is not None:
                yield row, f"{name}-mask", visualize.draw_mask(image, self.masks[number], category["color"])
        for (x, y), heads in zip(self.points, self.point_attention, strict=True):
            row, name = f"encoder attention from ({x}, {y})", f"point-{x}-{y}"
            yield row, name, visualize.draw_point(image, (x, y))
            yield row, f"{name}-attention", visualize.draw_heat(image, heads.mean(0))

    def heads(self) -> Iterator[tuple[str, Image.Image]]:
        """(name, picture) of each query's and point's attention, all heads side by side."""
        names = [f"query-{query:03d}" for query in self.queries.tolist()] + [f"point-{x}-{y}" for x, y in self.points]
        for name, heads in zip(names, [*self.attention, *self.point_attention], strict=True):
            pictures = [visualize.draw_heat(self.result.image, weights) for weights in heads]
            yield f"{name}-heads", visualize.contact_sheet([("the heads", pictures)], len(pictures), side=192)

    def sheet(self) -> Image.Image:
        """All figures in one picture."""
        rows: dict[str, list[Image.Image]] = {}
        for row, _, picture in self.figures():
            rows.setdefault(row, []).append(picture)
        return visualize.contact_sheet(list(rows.items()), columns=3, side=384)

    def save(self, out: str | os.PathLike[str]) -> None:
        """Writes sheet.png, and each figure and the heads as PNGs of their own, to a folder that is made if missing.

        Raises:
            ValueError: as `check_output`.
            OSError: a file cannot be written.
        """
        folder = check_output(out)
        _write(folder / "sheet.png", self.sheet())
        for _, name, picture in self.figures():
            _write(folder / f"{name}.png", picture)
        for name, picture in self.heads():
            _write(folder / f"{name}.png", picture)


@torch.inference_mode()
def explain(predictor: Predictor, image: ImageSource, points: Sequence[tuple[int, int]] = ()) -> Explanation:
    """The result of an image, with the attention of each query that the predictor keeps.

    Args:
        points: (x, y), pixels of the upright image, to explain their attention in the encoder, too.

    Raises:
        ValueError, TypeError: no image, or a point outside the image.
    """
    prepared = predictor.prepare(image)
    picture = prepared.picture
    check_points(points, picture)
    (result,) = predictor.predict([prepared])
    model = predictor.model
    samples = image_to_tensor(picture, predictor.size, predictor.max_size)[None].to(predictor.device)
    outputs = predictor.forward(samples, predictor.select)
    selected = predictor.select(outputs["pred_logits"])
    places = [(x / picture.width, y / picture.height) for x, y in points]
    return Explanation(
        result=result,
        queries=selected[0].nonzero()[:, 0].cpu().numpy(),
        attention=decoder_attention(model, samples, selected, predictor.dtype).cpu().numpy(),
        masks=outputs["pred_masks"][0].float().sigmoid().cpu().numpy() if predictor.panoptic else None,
        points=list(points),
        point_attention=encoder_attention(model, samples, places, predictor.dtype)[0].cpu().numpy(),
    )


def check_points(points: Sequence[tuple[int, int]], image: Image.Image) -> None:
    """Raises ValueError on a point (x, y) that is no pixel of the image."""
    for x, y in points:
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise ValueError(f"must be a pixel of {image.width} x {image.height}, got {x},{y}")


def check_output(out: str | os.PathLike[str]) -> Path:
    """Raises ValueError on a folder that holds something: pictures of other queries would stay among the new ones."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"must be a new or an empty folder, got {folder}")
    return folder


def _write(path: Path, picture: Image.Image) -> None:
    with open_atomic(path) as file:
        picture.save(file, "PNG")
