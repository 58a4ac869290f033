"""Pictures in, boxes and panoptic segments out."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast import visualize
from detr_fast.checkpoint import load_model
from detr_fast.data.categories import categories_for
from detr_fast.detr import DETR
from detr_fast.postprocess import (
    id_to_rgb,
    panoptic_merge,
    post_process_panoptic_segmentation,
    upstream_panoptic_merge,
)
from detr_fast.preprocess import ImageSource, image_to_tensor, read_image
from detr_fast.segmentation import DETRsegm

MODES = ("corrected", "detr", "transformers")
DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PreparedImage:
    """An image as read, RGB, and as the model takes it: float32 [3, h, w], resized and normalised."""

    image: Image.Image
    tensor: Tensor


@dataclass(frozen=True)
class PanopticResult:
    """What a model found in one image of H x W pixels.

    Attributes:
        segmentation: int32 [H, W] segment ids, 0 = void; None if the model has no mask head.
        segments_info: a dict for each segment: "id", "category_id", "isthing", "score" in [0, 1], "area" in pixels and
            "bbox", the tight [x, y, width, height] of its pixels.
        boxes: float32 [K, 4], x0, y0, x1, y1 in pixels, of the K queries above the threshold.
        scores: float32 [K].
        labels: int64 [K] category ids.
        categories: dicts with "id", "name", "isthing" and "color": the model's, and any other class that was found.
        image: the picture itself, RGB.
    """

    segmentation: np.ndarray | None
    segments_info: list[dict[str, Any]]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    categories: list[dict[str, Any]] = field(repr=False)
    image: Image.Image = field(repr=False)

    def to_png(self) -> bytes:
        """The segmentation as a COCO panoptic PNG: id = R + 256 G + 65536 B.

        Raises:
            ValueError: the model has no mask head.
        """
        if self.segmentation is None:
            raise ValueError("to_png needs a panoptic model, got a result of a model without a mask head")
        buffer = io.BytesIO()
        Image.fromarray(id_to_rgb(self.segmentation)).save(buffer, "PNG")
        return buffer.getvalue()

    def overlay(self) -> Image.Image:
        """The image with the segments drawn over it, or with the boxes if the model has no mask head."""
        if self.segmentation is None:
            return visualize.draw_boxes(self.image, self.boxes, self.scores, self.labels, self.categories)
        return visualize.draw_segments(self.image, self.segmentation, self.segments_info, self.categories)


class Predictor:
    """A model with everything around it: reading, resizing, batching and merging.

    Args:
        model: a `DETR` or `DETRsegm`; put into eval mode and moved to `device`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or a torch.device.
        dtype: what the model computes in: "auto", "fp32", "bf16", "fp16" or the torch.dtype.
        threshold: least score of a query that counts, in [0, 1].
        mode: how the masks become segments. "corrected" is facebookresearch/detr's merge without its flaws: the parts
            of one stuff class stay one segment, and ids count from 1. "detr" and "transformers" give exactly what
            `PostProcessPanoptic` and `post_process_panoptic_segmentation` give, ids included; "detr" has no scores.
        batch_size: the most images in one forward pass. Only images of one shape after resizing share a pass, since
            padding changes what a DETR computes (convolutions see it, and the mask head's GroupNorm averages over it);
            so results do not depend on it.

    Raises:
        TypeError: a model of another class.
        ValueError: a value outside of what is accepted above, or a device that this machine lacks.
    """

    def __init__(
        self,
        model: DETR | DETRsegm,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        threshold: float = 0.85,
        mode: str = "corrected",
        batch_size: int = 4,
    ) -> None:
        if not isinstance(model, (DETR, DETRsegm)):
            raise TypeError(f"model must be a detr_fast DETR or DETRsegm, got {type(model).__name__}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.dtype = resolve_dtype(dtype)
        self.threshold = threshold
        self.mode = mode
        self.batch_size = batch_size
        self.panoptic: bool = model.config.masks
        self.categories = categories_for(model.config, model.categories)
        self._named = {category["id"]: category for category in self.categories}
        self._by_class = {index: _unnamed(index) for index in range(model.config.num_classes)} | self._named
        self._is_thing = {index: bool(category["isthing"]) for index, category in self._by_class.items()}

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Predictor:
        """Loads a hub id, folder or file as `checkpoint.load_model` does; `options` as for `Predictor`.

        Raises:
            CheckpointError: the checkpoint cannot be had or is not a sound DETR.
        """
        return cls(load_model(name_or_path), **options)

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> PanopticResult | list[PanopticResult]:
        """Finds the objects in an image, or in each of a list of images, which may differ in size.

        Args:
            images: a path, a PIL image, a uint8 array [H, W, 3] (RGB), or a list of them.

        Raises:
            ValueError, TypeError: an empty list, or something that is no image.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("images must hold at least one image, got an empty list")
            return self.predict([self.prepare(image) for image in images])
        return self.predict([self.prepare(cast(ImageSource, images))])[0]

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Reads one image and resizes it; what is raised is raised here, before the model runs."""
        picture = read_image(image)
        return PreparedImage(picture, image_to_tensor(picture))

    @torch.inference_mode()
    def predict(self, prepared: Sequence[PreparedImage]) -> list[PanopticResult]:
        """The results of prepared images, in their order; none for none."""
        by_shape: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(prepared):
            by_shape.setdefault(image.tensor.shape, []).append(index)
        results: dict[int, PanopticResult] = {}
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                results.update(zip(batch, self._forward([prepared[index] for index in batch]), strict=True))
        return [results[index] for index in range(len(prepared))]

    def _forward(self, batch: list[PreparedImage]) -> list[PanopticResult]:
        self.model.compute_dtype = self.dtype  # another Predictor may share the model
        samples = torch.stack([image.tensor for image in batch]).to(self.device)
        if not self.panoptic:
            outputs = self.model(samples)
            outputs["selected"] = self._select(outputs["pred_logits"])
        else:
            outputs = self.model(samples, select=self._select)
        return [self._result(image, outputs, index) for index, image in enumerate(batch)]

    def _select(self, pred_logits: Tensor) -> Tensor:
        """bool [B, Q]: the queries that count, from [B, Q, C+1]."""
        scores, labels = pred_logits.float().softmax(-1).max(-1)
        return (labels != pred_logits.shape[-1] - 1) & (scores > self.threshold)

    def _result(self, image: PreparedImage, outputs: dict[str, Any], index: int) -> PanopticResult:
        """The result of image `index` of a batch."""
        kept = outputs["selected"][index]
        logits = outputs["pred_logits"][index, kept].float()
        scores, labels = logits.softmax(-1).max(-1)
        width, height = image.image.size
        x, y, w, h = outputs["pred_boxes"][index, kept].float().unbind(-1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
        boxes *= boxes.new_tensor([width, height, width, height])
        segmentation: np.ndarray | None = None
        segments_info: list[dict[str, Any]] = []
        if self.panoptic:
            processed_size = (image.tensor.shape[1], image.tensor.shape[2])
            segmentation, segments_info = self._merge(
                outputs["pred_masks"][index], logits, processed_size, (height, width)
            )
        return PanopticResult(
            segmentation,
            segments_info,
            boxes.cpu().numpy(),
            scores.cpu().numpy(),
            labels.cpu().numpy(),
            categories=[self._by_class[label] for label in sorted({*self._named, *labels.tolist()})],
            image=image.image,
        )

    def _merge(
        self, masks: Tensor, logits: Tensor, processed_size: tuple[int, int], target_size: tuple[int, int]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Ids int32 [H, W] and `segments_info` from the kept queries' masks [K, h, w] and logits [K, C+1]."""
        scores, labels = logits.softmax(-1).max(-1)
        if self.mode == "corrected":
            ids, segments_info = panoptic_merge(
                masks,
                scores,
                labels,
                padded_size=processed_size,  # no image of a batch is padded
                processed_size=processed_size,
                target_size=target_size,
                isthing=self._is_thing,
            )
            return ids.cpu().numpy(), segments_info
        if self.mode == "detr":
            ids, segments_info = upstream_panoptic_merge(
                masks, scores, labels, processed_size=processed_size, target_size=target_size, isthing=self._is_thing
            )
        else:
            outputs = {"logits": logits[None], "pred_masks": masks[None]}
            (result,) = post_process_panoptic_segmentation(outputs, self.threshold, target_sizes=[target_size])
            ids = result["segmentation"].clamp(min=0)  # upstream has -1 where no query is kept
            segments_info = [
                {
                    "id": info["id"],
                    "category_id": info["label_id"],
                    "isthing": self._is_thing[info["label_id"]],
                    "score": info["score"],
                    "area": int((ids == info["id"]).sum()),
                }
                for info in result["segments_info"]
            ]
        segmentation = ids.cpu().numpy().astype(np.int32)
        return segmentation, [{**info, "bbox": _tight_box(segmentation, info["id"])} for info in segments_info]


def _unnamed(index: int) -> dict[str, Any]:
    """The category of a class that none of the model's is for, as 117 of the 250 panoptic ones: COCO left them out.

    A trained model does not predict them, an untrained one does. Things are the ids up to 90.
    """
    return {"id": index, "name": f"class {index}", "isthing": int(index <= 90), "color": [128, 128, 128]}


def _tight_box(segmentation: np.ndarray, segment: int) -> list[int]:
    """[x, y, width, height] of a segment's pixels."""
    (rows,), (columns,) = ((segmentation == segment).any(axis).nonzero() for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `Predictor` means by a name.

    Raises:
        ValueError: an unknown name, or a device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one of this machine's {torch.cuda.device_count()} CUDA devices, got {device!r}"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that `Predictor` means by a name; "auto" is fp32, the one that changes nothing.

    Raises:
        ValueError: none of the names and dtypes in `DTYPES`.
    """
    for name, resolved in DTYPES.items():
        if dtype in (name, resolved):
            return resolved
    raise ValueError(f"dtype must be {', '.join(DTYPES)} or a torch.dtype of these, got {dtype!r}")
