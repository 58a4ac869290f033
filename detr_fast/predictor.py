"""Pictures in, boxes and panoptic segments out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast import ops, visualize
from detr_fast.categories import categories_for
from detr_fast.checkpoint import load_model
from detr_fast.detr.detector import DETR
from detr_fast.detr.graphs import Graphs, Recorder
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.images import ImageSource, normalise, panoptic_png, pixels_of, read_image, resized_for_normalise
from detr_fast.postprocess import (
    panoptic_merge,
    post_process_panoptic_segmentation,
    upstream_panoptic_merge,
)
from detr_fast.preprocess import batch_of_size
from detr_fast.resampling import resized_size

Segments = tuple[np.ndarray | None, list[dict[str, Any]]]

MODES = ("corrected", "detr", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pixels:
    """What is sent to the device of an image.

    Attributes:
        tensor: uint8, as `images.resized_for_normalise` gives it; for a GPU, which resizes it itself, [H, W, 3].
        size: (h, w), as the model sees it.
        target: (H, W), as the image is and its segmentation shall be.
    """

    tensor: Tensor
    size: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class PreparedImage(Pixels):
    """An image as read, RGB, and what is sent to the device."""

    image: Image.Image


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
        return panoptic_png(self.segmentation)

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
        dtype: what the model computes in: "fp32", "bf16", "fp16", the torch.dtype, or "auto": fp16 on a GPU, else fp32.
        threshold: least score of a query that counts, in [0, 1].
        class_thresholds: by class id, where it differs from `threshold`.
        mode: how the masks become segments. "corrected" is facebookresearch/detr's merge without its flaws: the parts
            of one stuff class stay one segment, and ids count from 1. "detr" and "transformers" give exactly what
            `PostProcessPanoptic` and `post_process_panoptic_segmentation` give, ids included; "detr" has no scores.
        batch_size: the most images in one forward pass. Only images of one shape after resizing share a pass, since
            padding changes what a DETR computes (convolutions see it, and the mask head's GroupNorm averages over it);
            so results do not depend on it.
        size, max_size: pixels of an image's short side as the model sees it, and the most of its long side; None: what
            the model is made for (`DetrConfig.image_size`, `max_image_size`).

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
        class_thresholds: Mapping[int, float] | None = None,
        size: int | None = None,
        max_size: int | None = None,
    ) -> None:
        if not isinstance(model, (DETR, DETRsegm)):
            raise TypeError(f"model must be a detr_fast DETR or DETRsegm, got {type(model).__name__}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.class_thresholds = dict(class_thresholds or {})
        for index, value in self.class_thresholds.items():
            if not 0 <= value <= 1 or not 0 <= index < model.config.num_classes:
                raise ValueError(
                    f"class_thresholds must be in [0, 1] for classes 0 to {model.config.num_classes - 1}, "
                    f"got {value} for {index}"
                )
        for name, pixels in (("size", size), ("max_size", max_size)):
            if pixels is not None and pixels < 1:
                raise ValueError(f"{name} must be at least 1, got {pixels}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.dtype = resolve_dtype(dtype, self.device)
        self.threshold = threshold
        self.mode = mode
        self.batch_size = batch_size
        self.size = size or model.config.image_size
        self.max_size = max_size or model.config.max_image_size
        self.panoptic: bool = model.config.masks
        self.categories = categories_for(model.config, model.categories)
        self._named = {category["id"]: category for category in self.categories}
        self._by_class = {index: unnamed_category(index) for index in range(model.config.num_classes)} | self._named
        self._on_gpu = self.device.type == "cuda"
        recorded = self._on_gpu and ops.HAS_KERNELS and isinstance(model, DETRsegm)
        self._graphs = Graphs(cast(DETRsegm, model), self.select, Recorder()) if recorded else None
        self._batch = torch.empty(0)
        self._uploads = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._is_thing = {index: bool(category["isthing"]) for index, category in self._by_class.items()}
        things = [self._is_thing.get(index, False) for index in range(1 + max(self._is_thing))]
        self._thing_table = torch.tensor(things, device=self.device)
        thresholds = [self.class_thresholds.get(index, threshold) for index in range(model.config.num_classes + 1)]
        self._thresholds = torch.tensor(thresholds, device=self.device)

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
        return self.prepare_picture(read_image(image))

    def prepare_picture(self, picture: Image.Image) -> PreparedImage:
        """The same of a picture as `read_image` gives it, whatever EXIF orientation it still carries."""
        target = (picture.height, picture.width)
        width, height = resized_size(*picture.size, self.size, self.max_size)
        if self._on_gpu:
            tensor = torch.from_numpy(pixels_of(picture)).pin_memory()
        else:
            tensor = torch.from_numpy(resized_for_normalise(picture, width, height))
        return PreparedImage(tensor, (height, width), target, picture)

    def stream(self, images: Iterable[ImageSource]) -> Iterator[PanopticResult]:
        """The results of any number of images, in their order. While the model computes, the next ones are read; at
        most 8 batches of images are in memory.

        Raises:
            ValueError, TypeError: something that is no image; after the results of all images before it.
        """
        images = iter(images)
        window = 4 * self.batch_size  # images of one shape share a batch, and need not be neighbours
        readers = ThreadPoolExecutor(2)
        try:
            reading = deque(readers.submit(self.prepare, image) for image in islice(images, window))
            while reading:
                due = [reading.popleft() for _ in range(len(reading))]
                error = next((future.exception() for future in due if future.exception()), None)
                prepared = [future.result() for future in takewhile(lambda future: not future.exception(), due)]
                reading.extend(readers.submit(self.prepare, image) for image in islice(images, window))
                yield from self.predict(prepared)
                if error:
                    raise error
        finally:
            readers.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def predict(self, prepared: Sequence[PreparedImage]) -> list[PanopticResult]:
        """The results of prepared images, in their order; none for none."""
        with torch.cuda.device(self.device if self._on_gpu else -1):  # whose streams and events are meant
            return self._predict(prepared)

    def _predict(self, prepared: Sequence[PreparedImage]) -> list[PanopticResult]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(prepared):
            by_size.setdefault(image.size, []).append(index)
        results: dict[int, PanopticResult] = {}
        finish: Callable[[], None] | None = None
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                started = self._start(prepared, indices[start : start + self.batch_size], results)
                if finish is not None:
                    finish()  # while the device computes the batch that was just started
                finish = started
        if finish is not None:
            finish()
        return [results[index] for index in range(len(prepared))]

    def _start(
        self, prepared: Sequence[PreparedImage], indices: list[int], results: dict[int, PanopticResult]
    ) -> Callable[[], None]:
        """Computes a batch; what is returned makes its results, once the device is done."""
        batch = [prepared[index] for index in indices]
        outputs = self._forward(batch)
        found = Download(outputs["selected"], outputs["pred_logits"].float(), outputs["pred_boxes"].float())
        merged = self._merged(batch, outputs)

        def finish() -> None:
            selected, logits, boxes = found.tensors()
            segments = merged()
            for row, index in enumerate(indices):
                kept = selected[row]
                results[index] = self._result(prepared[index].image, logits[row, kept], boxes[row, kept], segments[row])

        return finish

    @torch.inference_mode()
    def start_segments(self, batch: Sequence[Pixels]) -> Callable[[], list[Segments]]:
        """Begins with a batch of images that have one `size`; what is returned waits for the device, and gives each
        image's ids int32 [H, W] and `segments_info`. All that labeling needs of a result."""
        with torch.cuda.device(self.device if self._on_gpu else -1):
            return self._merged(batch, self._forward(batch))

    def _forward(self, batch: Sequence[Pixels]) -> dict[str, Any]:
        self.model.compute_dtype = self.dtype  # another Predictor may share the model
        samples = self._samples(batch)
        if self._graphs is not None:
            return self._graphs(samples)
        if self.panoptic:
            return self.model(samples, select=self.select)
        outputs = self.model(samples)
        return {**outputs, "selected": self.select(outputs["pred_logits"])}

    def _samples(self, batch: Sequence[Pixels]) -> Tensor:
        if self._uploads is None:
            shape = (len(batch), *batch[0].size, 3)  # the order in memory that the model's convolutions want
            if self._batch.shape != shape:  # new memory for each batch costs more in page faults than the work
                self._batch = torch.empty(shape)
            for image, out in zip(batch, self._batch.numpy(), strict=True):
                normalise(image.tensor.numpy(), out)
            return self._batch.permute(0, 3, 1, 2)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._uploads):
            pictures = [image.tensor.to(self.device, non_blocking=True) for image in batch]
        current.wait_stream(self._uploads)
        for picture in pictures:
            picture.record_stream(current)
        height, width = batch[0].size
        return batch_of_size(pictures, width, height, self.device)

    def select(self, pred_logits: Tensor) -> Tensor:
        """bool [B, Q]: the queries that count, from [B, Q, C+1]."""
        scores, labels = pred_logits.float().softmax(-1).max(-1)
        return (labels != pred_logits.shape[-1] - 1) & (scores > self._thresholds[labels])

    def _result(self, image: Image.Image, logits: Tensor, boxes: Tensor, segments: Segments) -> PanopticResult:
        """The result of one image from what its kept queries gave: logits [K, C+1] and boxes [K, 4], on the CPU."""
        scores, labels = logits.softmax(-1).max(-1)
        width, height = image.size
        x, y, w, h = boxes.unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
        corners *= corners.new_tensor([width, height, width, height])
        return PanopticResult(
            *segments,
            corners.numpy(),
            scores.numpy(),
            labels.numpy(),
            categories=[self._by_class[label] for label in sorted({*self._named, *labels.tolist()})],
            image=image,
        )

    def _merged(self, batch: Sequence[Pixels], outputs: dict[str, Any]) -> Callable[[], list[Segments]]:
        """Starts the merges of a batch; what is returned gives each image's ids int32 [H, W] and `segments_info`."""
        if not self.panoptic:
            return lambda: [(None, []) for _ in batch]
        sizes = [(image.size, image.target) for image in batch]
        if self._graphs is not None and self.mode == "corrected":
            return self._merged_at_once(outputs, sizes)
        logits = [
            logits[kept].float() for logits, kept in zip(outputs["pred_logits"], outputs["selected"], strict=True)
        ]
        images = zip(outputs["pred_masks"], logits, sizes, strict=True)
        merged: list[Segments] = [self.merge(masks, logits, *size) for masks, logits, size in images]
        return lambda: merged

    def _merged_at_once(
        self, outputs: dict[str, Any], sizes: list[tuple[tuple[int, int], tuple[int, int]]]
    ) -> Callable[[], list[Segments]]:
        """The corrected merge of all images in one launch, without waiting for it."""
        counts = [len(masks) for masks in outputs["pred_masks"]]
        scores, labels = outputs["pred_logits"].float().softmax(-1).max(-1)
        scores, labels = (x.flatten()[outputs["index"]] for x in (scores, labels))
        processed, targets = ([side for size in sizes for side in size[k]] for k in (0, 1))
        merge_kernel = torch.ops.detr_fast.panoptic_merge
        found = Download(
            *merge_kernel(
                torch.cat(outputs["pred_masks"]), labels, self._thing_table, counts, processed, processed, targets, True
            ),
            scores,
            labels,
        )

        def finish() -> list[Segments]:
            ids, segment, area, box, score, label = found.tensors()
            maps = ids.int().split([height * width for _, (height, width) in sizes])
            per_image = zip(*(x.split(counts) for x in (segment, area, box, score, label)), strict=True)
            return [
                (map_.view(target).numpy(), self._describe(*queries))
                for map_, queries, (_, target) in zip(maps, per_image, sizes, strict=True)
            ]

        return finish

    def _describe(
        self, segment: Tensor, area: Tensor, box: Tensor, score: Tensor, label: Tensor
    ) -> list[dict[str, Any]]:
        """`segments_info` from the segment's id [K] of each query, -1 for none, and its own pixels' area and box."""
        segments_info = []
        for number in range(1, int(segment.max()) + 1 if len(segment) else 1):
            parts = segment == number
            left, top = box[parts, :2].amin(0).tolist()
            right, bottom = box[parts, 2:].amax(0).tolist()
            category = int(label[parts][0])
            segments_info.append(
                {
                    "id": number,
                    "category_id": category,
                    "isthing": self._is_thing[category],
                    "score": float(score[parts].max()),
                    "area": int(area[parts].sum()),
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
        return segments_info

    def merge(
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
            lowest = min(self.threshold, *self.class_thresholds.values(), 1.0)  # `select` has applied each one
            (result,) = post_process_panoptic_segmentation(outputs, lowest, target_sizes=[target_size])
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


class Download:
    """Tensors on their way to the host, which need not wait for them until it wants them."""

    def __init__(self, *tensors: Tensor) -> None:
        on_gpu = tensors[0].is_cuda
        # a graph's outputs are overwritten by the next batch: copied now, in the stream's order
        self._tensors = [torch.empty_like(x, device="cpu", pin_memory=True) if on_gpu else x for x in tensors]
        self._done = torch.cuda.Event() if on_gpu else None
        if self._done is not None:
            for target, source in zip(self._tensors, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self._done.record()

    def tensors(self) -> list[Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def unnamed_category(index: int) -> dict[str, Any]:
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


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that `Predictor` means by a name; "auto" is fp16 on a GPU, elsewhere fp32, which changes nothing.

    Raises:
        ValueError: none of the names and dtypes in `DTYPES`.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    for name, resolved in DTYPES.items():
        if dtype in (name, resolved):
            return resolved
    raise ValueError(f"dtype must be auto, {', '.join(DTYPES)} or a torch.dtype of these, got {dtype!r}")
