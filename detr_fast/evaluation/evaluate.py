"""A model scored on a data set, as facebookresearch/detr's evaluation does it: box and mask AP, panoptic quality."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from tqdm import tqdm

from detr_fast import ops
from detr_fast.detr.detector import DETR
from detr_fast.detr.nested import nested_tensor_from_tensor_list
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.evaluation.average_precision import METRICS, AveragePrecision, has_masks
from detr_fast.evaluation.ground_truth import GroundTruth
from detr_fast.evaluation.panoptic_quality import VOID, PanopticQuality, read_ids
from detr_fast.images import batches_of_one_size
from detr_fast.postprocess import Kept, PostProcess, class_scores
from detr_fast.predictor import Predictor
from detr_fast.preprocess import image_to_tensor

T = TypeVar("T")

# Without padding a batch is made of images of one shape; looking this many batches ahead finds them.
BATCHES_AHEAD = 4
MASKS_AT_ONCE = 1 << 26  # pixels of binary masks that are held at once: bytes
READERS = min(8, os.cpu_count() or 1)  # threads that decode and resize images


def evaluate(
    model: Predictor | DETR | DETRsegm,
    data: str | os.PathLike[str] | GroundTruth,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    padded: bool = False,
    size: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Box AP, mask AP and panoptic quality of a model on a data set.

    The protocol is facebookresearch/detr's: each query counts for AP with its best class that is not no-object, all
    queries do, and its masks are thresholded at 1/2 in the padded size before the padding is cropped and the rest
    resized. Only what no score depends on is left out: masks of queries that nothing asks for. In one point it differs,
    in padded batches: panoptic maps are cropped like masks, where upstream's squeeze the padding into the image.

    Args:
        model: a `Predictor`, whose `mode` and `threshold` decide about the segments; or a model, which stands for
            `Predictor(model, device=its device, mode="detr")`: upstream's merge at 0.85. It is left in the mode
            that it has.
        data: a data set as `find_split` finds it, or its `GroundTruth`.
        split, limit: as for `GroundTruth.read`; not with a `GroundTruth`.
        batch_size: images in one forward pass.
        padded: pad images of different shapes, in the order of the annotations, to one batch, as upstream does; that
            changes what a DETR computes. Else a batch is made of images of one shape, which changes the speed only.
        size: pixels of the images' shorter side, and in proportion the most of the longer one; None: the predictor's.
        progress: show a progress bar on stderr.

    Returns:
        A dict for JSON. "images", their number; "seconds"; "notes", a line for each missing score and why. "bbox" and,
        with a mask head, "segm": `AveragePrecision.summary`. With a mask head "panoptic": "PQ", "SQ" and "RQ" of all
        categories, "All", "Things" and "Stuff" with the same and "n", the categories that occur, and "per_class" with
        "name", the same, "tp", "fp" and "fn" by category id as a string. AP, AR, PQ, SQ and RQ are in percent; an AP is
        None where nothing is to be found.

    Raises:
        TypeError: `model` is none.
        ValueError: an argument is out of range, or as `GroundTruth.read` and `GroundTruth.read_image`.
    """
    if batch_size < 1 or (size is not None and size < 1):
        raise ValueError(f"batch_size and size must be at least 1, got {batch_size} and {size}")
    truth = data if isinstance(data, GroundTruth) else GroundTruth.read(data, split, limit)
    started = time.perf_counter()
    with _predictor(model) as predictor:
        scores = _Scores(predictor, truth)
        sides = (predictor.size, predictor.max_size)
        if size is not None:
            sides = (size, round(size * predictor.max_size / predictor.size))
        samples = _read_ahead(truth.images, lambda record: _Sample.read(truth, record, sides), batch_size)
        with tqdm(total=len(truth.images), unit="image", disable=not progress) as bar:
            for batch in _batches(samples, batch_size, padded):
                scores.add(batch)
                bar.update(len(batch))
    found = scores.summary()
    seconds = round(time.perf_counter() - started, 3)
    return {"images": len(truth.images), "seconds": seconds, "notes": scores.notes(), **found}


@contextmanager
def _predictor(model: Predictor | DETR | DETRsegm) -> Iterator[Predictor]:
    if isinstance(model, Predictor):
        yield model
    elif isinstance(model, (DETR, DETRsegm)):
        training = model.training
        try:
            yield Predictor(model, device=next(model.parameters()).device, mode="detr")
        finally:
            model.train(training)
    else:
        raise TypeError(f"model must be a Predictor or a detr_fast DETR or DETRsegm, got {type(model).__name__}")


@dataclass(frozen=True)
class _Sample:
    """An image's record, the image as the model reads it, float32 [3, h, w], and the true ids, integers [H, W]."""

    record: dict[str, Any]
    tensor: Tensor
    ids: np.ndarray | None

    @property
    def processed_size(self) -> tuple[int, int]:
        return self.tensor.shape[1], self.tensor.shape[2]

    @property
    def target_size(self) -> tuple[int, int]:
        return self.record["height"], self.record["width"]

    @classmethod
    def read(cls, truth: GroundTruth, record: dict[str, Any], sides: tuple[int, int]) -> _Sample:
        tensor = image_to_tensor(truth.read_image(record), *sides)
        ids = None
        if truth.panoptic is not None and truth.split.panoptic_pngs is not None:
            ids = read_ids(truth.split.panoptic_pngs / truth.panoptic[record["id"]]["file_name"])
        return cls(record, tensor, ids)


def _read_ahead(records: Iterable[Any], read: Callable[[Any], T], batch_size: int) -> Iterator[T]:
    """`read(record)` of each record, in order, some of them ahead of time in threads."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for record in records:
            waiting.append(pool.submit(read, record))
            if len(waiting) >= READERS + batch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(samples: Iterator[_Sample], batch_size: int, padded: bool) -> Iterator[list[_Sample]]:
    size = (lambda sample: None) if padded else (lambda sample: sample.processed_size)
    return batches_of_one_size(samples, size, batch_size, BATCHES_AHEAD * batch_size)


class _Scores:
    """The scores of a predictor on the images so far."""

    def __init__(self, predictor: Predictor, truth: GroundTruth) -> None:
        if truth.instances is None and not predictor.panoptic:
            raise ValueError("nothing to score: the model has no mask head and the data set no instance annotations")
        self._predictor = predictor
        self._truth = truth
        self._notes = [*truth.notes, *_renamed(predictor, truth)]
        self._unlisted = 0
        self._ap: dict[str, AveragePrecision] = {}
        self._has_instances = torch.zeros(predictor.model.config.num_classes, dtype=torch.bool, device=predictor.device)
        if truth.instances is not None:
            self._ap = {kind: AveragePrecision(truth.instances, kind) for kind in self._kinds(truth.instances)}
            ids = [category["id"] for category in truth.instances["categories"]]
            self._has_instances[[index for index in ids if 0 <= index < len(self._has_instances)]] = True
        self._pq: PanopticQuality | None = None
        if predictor.panoptic and truth.panoptic is not None:
            self._pq = PanopticQuality(truth.panoptic_categories)
            self._listed = {category["id"] for category in truth.panoptic_categories}

    def _kinds(self, instances: Mapping[str, Any]) -> tuple[str, ...]:
        if not self._predictor.panoptic:
            self._notes.append("no mask AP, no PQ: the model has no mask head")
        elif not has_masks(instances["annotations"]):
            self._notes.append("no mask AP: not every instance annotation has a segmentation")
        else:
            return "bbox", "segm"
        return ("bbox",)

    @torch.inference_mode()
    def add(self, batch: Sequence[_Sample]) -> None:
        predictor = self._predictor
        samples = nested_tensor_from_tensor_list([sample.tensor for sample in batch]).to(predictor.device)
        padded_size = (samples.tensors.shape[2], samples.tensors.shape[3])
        outputs = predictor.forward(samples, select=self._wanted)
        sizes = torch.tensor([sample.target_size for sample in batch], device=predictor.device)
        logits = outputs["pred_logits"].float()
        detections = PostProcess()({"pred_logits": logits, "pred_boxes": outputs["pred_boxes"].float()}, sizes)
        for index, (sample, found) in enumerate(zip(batch, detections, strict=True)):
            things = self._has_instances[found["labels"]]
            results = _results({name: value[things] for name, value in found.items()})
            if "bbox" in self._ap:
                self._ap["bbox"].add(sample.record, results)
            if not predictor.panoptic:
                continue
            selected, masks = outputs["selected"][index], outputs["pred_masks"][index].float()
            if "segm" in self._ap:
                self._ap["segm"].add(
                    sample.record, self._with_masks(results, masks[things[selected]], padded_size, sample)
                )
        if self._pq is not None:
            self._count_segments(batch, outputs, padded_size)

    def _wanted(self, pred_logits: Tensor) -> Tensor:
        """bool [B, Q]: the queries whose masks a score depends on, from [B, Q, C+1]."""
        wanted = torch.zeros(pred_logits.shape[:2], dtype=torch.bool, device=pred_logits.device)
        if "segm" in self._ap:
            wanted |= self._has_instances[class_scores(pred_logits.float()).max(-1).indices]
        return wanted | self._predictor.select(pred_logits) if self._pq is not None else wanted

    def _with_masks(
        self, results: list[dict[str, Any]], logits: Tensor, padded_size: tuple[int, int], sample: _Sample
    ) -> list[dict[str, Any]]:
        """Results with masks in the boxes' place: pycocotools would take the objects' areas from the boxes."""
        if not results:
            return []
        sizes = ([sample.processed_size], [sample.target_size])
        parts = logits.split(max(1, MASKS_AT_ONCE // math.prod(sample.target_size)))
        binaries = (ops.mask_upsample([part], padded_size, *sizes, threshold=0.5)[0] for part in parts)
        masks = [mask for binary in binaries for mask in _run_lengths(binary)]
        keys = ("category_id", "score")
        return [
            {**{key: result[key] for key in keys}, "segmentation": mask}
            for result, mask in zip(results, masks, strict=True)
        ]

    def _count_segments(self, batch: Sequence[_Sample], outputs: dict[str, Any], padded_size: tuple[int, int]) -> None:
        """Merges the masks of a batch as the Predictor would, and counts their segments."""
        segments = self._predictor.select(outputs["pred_logits"])
        wanted = [among[selected] for among, selected in zip(segments, outputs["selected"], strict=True)]
        kept = [
            Kept(*(x[among] for x in image)) for image, among in zip(self._predictor.kept(outputs), wanted, strict=True)
        ]
        processed, targets = [sample.processed_size for sample in batch], [sample.target_size for sample in batch]
        found = self._predictor.start_merges(kept, padded_size, processed, targets)()
        for sample, (ids, segments_info) in zip(batch, found, strict=True):
            assert ids is not None
            self._count(sample, ids, segments_info)

    def _count(self, sample: _Sample, ids: np.ndarray, segments_info: list[dict[str, Any]]) -> None:
        assert self._pq is not None and self._truth.panoptic is not None and sample.ids is not None
        listed = [info for info in segments_info if info["category_id"] in self._listed]
        self._unlisted += len(segments_info) - len(listed)
        # upstream counts ids from 0, which is void here
        number = np.full(1 + max([int(ids.max()), *(info["id"] for info in listed)]), VOID, dtype=np.uint32)
        number[[info["id"] for info in listed]] = np.arange(1, len(listed) + 1)
        segments = [{"id": index, "category_id": info["category_id"]} for index, info in enumerate(listed, start=1)]
        truth = self._truth.panoptic[sample.record["id"]]
        self._pq.counts += self._pq.count(truth, {"segments_info": segments}, sample.ids, number[ids])

    def notes(self) -> list[str]:
        if not self._unlisted:
            return self._notes
        return [*self._notes, f"{self._unlisted} segments count as void: the data set does not list their categories"]

    def summary(self) -> dict[str, Any]:
        found = {kind: ap.summary() for kind, ap in self._ap.items()}
        return found if self._pq is None else {**found, "panoptic": self._panoptic(self._pq.summary())}

    def _panoptic(self, quality: Mapping[str, Any]) -> dict[str, Any]:
        names = {category["id"]: category["name"] for category in self._truth.panoptic_categories}

        def percent(found: Mapping[str, Any]) -> dict[str, Any]:
            upper = {key.upper(): 100 * found[key] for key in ("pq", "sq", "rq")}
            return {**upper, **{key: value for key, value in found.items() if key not in ("pq", "sq", "rq")}}

        groups = {group: percent(quality[group]) for group in ("All", "Things", "Stuff")}
        overall = {key: groups["All"][key] for key in ("PQ", "SQ", "RQ")}
        per_class = {str(key): {"name": names[key], **percent(one)} for key, one in quality["per_class"].items()}
        return {**overall, **groups, "per_class": per_class}


def _results(found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """COCO results from "scores" [K], "labels" [K] and "boxes" [K, 4] (x0, y0, x1, y1)."""
    low, high = found["boxes"].split(2, dim=-1)
    boxes = torch.cat([low, high - low], dim=-1).tolist()
    columns = zip(found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True)
    return [{"category_id": label, "score": score, "bbox": box} for label, score, box in columns]


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's RLE of masks uint8 [K, H, W]."""
    columns = masks.transpose(1, 2).contiguous().cpu().numpy()
    return coco_mask.encode(columns.transpose(2, 1, 0))  # which wants [H, W, K] in Fortran's order


def _renamed(predictor: Predictor, truth: GroundTruth) -> list[str]:
    """A note if the model calls categories by another name: likely it was trained for another data set."""
    listed = {category["id"]: category["name"] for category in truth.panoptic_categories}
    if truth.instances is not None:
        listed |= {category["id"]: category["name"] for category in truth.instances["categories"]}
    named = {category["id"]: category["name"] for category in predictor.categories}
    other = [key for key, name in listed.items() if named.get(key) not in (name, f"class {key}")]
    if not other:
        return []
    first = f"{other[0]} is {listed[other[0]]!r}, in the model {named.get(other[0], 'nothing')!r}"
    return [f"{len(other)} of {len(listed)} categories are others in the model: {first}"]


def table(report: Mapping[str, Any]) -> str:
    """The result of `evaluate` as a table for people."""
    lines = [_row("", METRICS)] if "bbox" in report else []
    lines += [_row(kind, [report[kind][name] for name in METRICS]) for kind in ("bbox", "segm") if kind in report]
    panoptic = report.get("panoptic")
    if panoptic is not None:
        lines.append(_row("", ["PQ", "SQ", "RQ", "n"]))
        for group in ("All", "Things", "Stuff"):
            lines.append(
                _row(group, [*(panoptic[group][key] for key in ("PQ", "SQ", "RQ")), str(panoptic[group]["n"])])
            )
    kinds = [(kind, "AP", f"{kind} AP") for kind in ("bbox", "segm")]
    kinds += [("panoptic", key, key) for key in ("PQ", "SQ", "RQ")]
    kinds = [kind for kind in kinds if kind[0] in report]
    if kinds:
        lines.append(_row("category", [title for _, _, title in kinds]))
    names = {key: one["name"] for kind, _, _ in reversed(kinds) for key, one in report[kind]["per_class"].items()}
    for key in sorted(names, key=int):
        lines.append(
            _row(names[key], [report[kind]["per_class"].get(key, {}).get(metric) for kind, metric, _ in kinds])
        )
    return "\n".join([*lines, *report["notes"], f"{report['images']} images in {report['seconds']} s"])


def _row(name: str, values: Iterable[Any]) -> str:
    cells = [value if isinstance(value, str) else "-" if value is None else f"{value:.1f}" for value in values]
    return f"{name:<24}" + "".join(f"{cell:>8}" for cell in cells)
