"""Pictures in, boxes and panoptic segments out."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast import ops, visualize
from detr_fast.categories import categories_for
from detr_fast.checkpoint import load_model
from detr_fast.detr.detector import DETR, Samples
from detr_fast.detr.graphs import Graphs, Recorder
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.images import ImageSource, Pixels, batches_of_one_size, normalise, panoptic_png, prepare, read_image
from detr_fast.ops import resolve_device, resolve_dtype
from detr_fast.postprocess import CORRECTED_KEYS, UPSTREAM_KEYS, Kept, describe, kept_queries, resize_and_crop
from detr_fast.preprocess import batch_of_size
from detr_fast.reference import Merged

Segments = tuple[np.ndarray | None, list[dict[str, Any]]]
Size = tuple[int, int]  # (height, width)

MODES = ("corrected", "detr", "transformers")
TRANSFORMERS_THRESHOLDS = (0.5, 0.8)  # of masks and of overlaps: the defaults of its post-processing


class Prepared(NamedTuple):
    """An image as read, RGB, and what is sent to the model of it."""

    picture: Image.Image
    pixels: Pixels


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

    Any number of threads may call it at once, also several Predictors of one model: each call gives its own result.

    Args:
        model: a `DETR` or `DETRsegm`; put into eval mode and moved to `device`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or a torch.device.
        dtype: of the model's convolutions and GEMMs: "fp32", "bf16", "fp16", the torch.dtype, or "auto": fp16 on a GPU,
            else fp32.
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
        self._on_gpu = ops.is_gpu(self.device)
        recorded = self._on_gpu and ops.HAS_TRITON and isinstance(model, DETRsegm)
        self._graphs = Graphs(cast(DETRsegm, model), self.select, Recorder(), self.dtype) if recorded else None
        # a graph's inputs and outputs are overwritten by the next batch, whichever thread starts it
        self._turn = threading.Lock() if recorded else nullcontext()
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

    def prepare(self, image: ImageSource) -> Prepared:
        """Reads one image and resizes it; what is raised is raised here, before the model runs."""
        return self.prepare_picture(read_image(image))

    def prepare_picture(self, picture: Image.Image) -> Prepared:
        """The same of a picture as `read_image` gives it, whatever EXIF orientation it still carries."""
        allocate = _pinned if self._on_gpu else np.empty
        return Prepared(picture, prepare(picture, self.size, self.max_size, self._on_gpu, allocate))

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
    def predict(self, prepared: Sequence[Prepared]) -> list[PanopticResult]:
        """The results of prepared images, in their order; none for none."""
        results: dict[int, PanopticResult] = {}
        finish: Callable[[], None] | None = None
        size = lambda index: prepared[index].pixels.size  # noqa: E731
        for indices in batches_of_one_size(range(len(prepared)), size, self.batch_size):
            started = self._start(prepared, indices, results)
            if finish is not None:
                finish()  # while the device computes the batch that was just started
            finish = started
        if finish is not None:
            finish()
        return [results[index] for index in range(len(prepared))]

    def _start(
        self, prepared: Sequence[Prepared], indices: list[int], results: dict[int, PanopticResult]
    ) -> Callable[[], None]:
        """Computes a batch; what is returned makes its results, once the device is done."""
        wait = self._begin([prepared[index].pixels for index in indices], "selected", "pred_logits", "pred_boxes")

        def finish() -> None:
            (selected, logits, boxes), segments = wait()
            for row, index in enumerate(indices):
                kept = selected[row]
                found = (logits[row, kept].float(), boxes[row, kept].float())
                results[index] = self._result(prepared[index].picture, *found, segments[row])

        return finish

    @torch.inference_mode()
    def start_segments(self, batch: Sequence[Pixels]) -> Callable[[], list[Segments]]:
        """Begins with a batch of images that have one `size`; what is returned waits for the device, and gives each
        image's ids [H, W], in a small integer dtype, and `segments_info`. All that labeling needs of a result."""
        wait = self._begin(batch)
        return lambda: wait()[1]

    def _begin(self, batch: Sequence[Pixels], *names: str) -> Callable[[], tuple[list[Tensor], list[Segments]]]:
        """Computes a batch; what is returned waits for the device, and gives the named outputs and the segments."""
        with self._on_device(), self._turn:
            outputs = self.forward(self._samples(batch))
            found = Download(*(outputs[name] for name in names))
            if not self.panoptic:
                return lambda: (found.tensors(), [(None, []) for _ in batch])
            processed, targets = ([getattr(image, name) for image in batch] for name in ("size", "target"))
            segments = self.start_merges(self.kept(outputs), batch[0].size, processed, targets)
        return lambda: (found.tensors(), segments())

    def forward(self, samples: Samples, select: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """The model's outputs for samples, as `DETRsegm.forward` takes them, on this Predictor's device.

        Args:
            select: as for `DETRsegm.forward`; None: the queries above the thresholds.

        Returns: what the model returns; "selected", bool [B, Q]; and of a panoptic model "index", int64 [N]: the
            selected queries, counted through the batch.
        """
        with self._on_device():
            if (
                self._graphs is not None
                and select is None
                and isinstance(samples, Tensor)
                and ops.uses_kernels(samples)
            ):
                return self._graphs(samples)
            select = select or self.select
            own = next(self.model.parameters()).dtype  # in which a subclass need not take the argument
            options = {} if self.dtype == own else {"dtype": self.dtype}
            if not self.panoptic:
                outputs = self.model(samples, **options)
                return {**outputs, "selected": select(outputs["pred_logits"])}
            outputs = self.model(samples, select=select, **options)
            return {**outputs, "index": outputs["selected"].flatten().nonzero()[:, 0]}

    def _on_device(self) -> Any:
        """Whose streams and events are meant within it."""
        return torch.cuda.device(self.device if self._on_gpu else -1)

    def _samples(self, batch: Sequence[Pixels]) -> Tensor:
        """[B, 3, h, w], normalised. On a CPU the next batch of this thread overwrites it."""
        if self._uploads is None:
            out = _batches.of(self, (len(batch), *batch[0].size, 3))  # as the convolutions have it in memory
            for image, row in zip(batch, out.numpy(), strict=True):
                normalise(image.array, row)
            return out.permute(0, 3, 1, 2)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._uploads):
            pictures = [torch.from_numpy(image.array).to(self.device, non_blocking=True) for image in batch]
        current.wait_stream(self._uploads)
        for picture in pictures:
            picture.record_stream(current)
        height, width = batch[0].size
        return batch_of_size(pictures, width, height, self.device)

    def select(self, pred_logits: Tensor) -> Tensor:
        """bool [B, Q]: the kept queries, from [B, Q, C+1]."""
        return kept_queries(pred_logits.float(), self._thresholds)[2]

    def kept(self, outputs: dict[str, Any]) -> list[Kept]:
        """The selected queries of each image, from the outputs of `forward`."""
        counts = [len(masks) for masks in outputs["pred_masks"]]
        scores, labels, _ = kept_queries(outputs["pred_logits"].float(), self._thresholds)
        queries = (x.flatten()[outputs["index"]].split(counts) for x in (scores, labels))
        return [Kept(*image) for image in zip(outputs["pred_masks"], *queries, strict=True)]

    def start_merges(
        self, kept: Sequence[Kept], padded: Size, processed: Sequence[Size], targets: Sequence[Size]
    ) -> Callable[[], list[Segments]]:
        """Starts the merges of B images in this Predictor's mode, padding cropped; what is returned waits for the
        device, and gives each image's ids [H, W], in a small integer dtype, and `segments_info`.

        Args:
            padded: (height, width) of the batch that the model saw.
            processed, targets: of each image in it, and of its result.
        """
        counts = [len(image.labels) for image in kept]
        masks, scores, labels = ([getattr(image, name) for image in kept] for name in Kept._fields)
        with self._on_device():
            if self.mode == "transformers":
                masks = [resize_and_crop(m, padded, size) for m, size in zip(masks, processed, strict=True)]
                fused = torch.zeros_like(self._thing_table)
                merges = ops.weighted_merge(masks, scores, labels, fused, targets, *TRANSFORMERS_THRESHOLDS)
            else:
                resized, for_good = [padded] * len(kept), self.mode == "corrected"
                merges = ops.panoptic_merge(masks, labels, self._thing_table, resized, processed, targets, for_good)
            found = Download(*merges, torch.cat(scores), torch.cat(labels))

        def finish() -> list[Segments]:
            *merged, score, label = found.tensors()
            images = ops.Merges(*merged).images(counts, targets)
            queries = (score.split(counts), label.split(counts))
            return [(m.ids.numpy(), self._segments_info(m, s, c)) for m, s, c in zip(images, *queries, strict=True)]

        return finish

    def _segments_info(self, merged: Merged, scores: Tensor, labels: Tensor) -> list[dict[str, Any]]:
        """`segments_info` of one image, from its kept queries, on the CPU."""
        keys = (*UPSTREAM_KEYS, "bbox") if self.mode == "detr" else CORRECTED_KEYS
        found = describe(merged, scores, labels, self._is_thing, keys)
        if self.mode == "transformers":
            return [{**info, "score": round(info["score"], 6)} for info in found]  # as upstream
        return found

    def _result(self, image: Image.Image, logits: Tensor, boxes: Tensor, segments: Segments) -> PanopticResult:
        """The result of one image from what its kept queries gave: logits [K, C+1] and boxes [K, 4], on the CPU."""
        scores, labels = logits.softmax(-1).max(-1)
        ids, segments_info = segments
        width, height = image.size
        x, y, w, h = boxes.unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
        corners *= corners.new_tensor([width, height, width, height])
        return PanopticResult(
            None if ids is None else ids.astype(np.int32),
            segments_info,
            corners.numpy(),
            scores.numpy(),
            labels.numpy(),
            categories=[self._by_class[label] for label in sorted({*self._named, *labels.tolist()})],
            image=image,
        )


class _Batches(threading.local):
    """The last batch of each Predictor in each thread: new memory costs more in page faults than normalising."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Predictor, Tensor] = WeakKeyDictionary()

    def of(self, predictor: Predictor, shape: tuple[int, ...]) -> Tensor:
        last = self._last.get(predictor)
        if last is None or last.shape != shape:
            last = self._last[predictor] = torch.empty(shape)
        return last


_batches = _Batches()


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """uint8 in memory from which a GPU copies by itself."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


class Download:
    """Tensors on their way to the host, which need not wait for them until it wants them."""

    def __init__(self, *tensors: Tensor) -> None:
        on_gpu = any(ops.is_gpu(tensor.device) for tensor in tensors)
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
