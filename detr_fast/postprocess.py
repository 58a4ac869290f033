"""From a model's outputs to boxes, masks and panoptic maps, as facebookresearch/detr and as transformers do it.

`PostProcess`, `PostProcessSegm`, `PostProcessPanoptic` have facebookresearch/detr's calls and results; the functions
have those of transformers' DetrImageProcessor, 5.x first, then the calls that only 4.x has.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.ops.merge import (
    IsThing,
    argmax_of_planes,
    is_thing,
    pair,
    panoptic_merge,
    take,
    upstream_panoptic_merge,
)

__all__ = [
    "PostProcess",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "SemanticSegmentation",
    "binary_masks",
    "id_to_rgb",
    "panoptic_merge",
    "post_process",
    "post_process_instance",
    "post_process_instance_segmentation",
    "post_process_object_detection",
    "post_process_panoptic",
    "post_process_panoptic_segmentation",
    "post_process_segmentation",
    "post_process_semantic_segmentation",
    "rgb_to_id",
    "upstream_panoptic_merge",
]

Sizes = Tensor | Sequence[Any]
Array = TypeVar("Array", np.ndarray, Tensor)

MASK_CHUNK = 1 << 24  # resized mask logits held at once by PostProcessSegm: 64 MiB in float32
LAST_COCO_THING = 90  # in COCO's panoptic ids


# ---- checks ----


def _fields(outputs: Any, **ndims: int) -> list[Tensor]:
    """The named tensors of a dict or of an object, checked for their number of dimensions and one batch size."""
    found = []
    for name, ndim in ndims.items():
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if not isinstance(value, Tensor):
            raise TypeError(f"outputs must have a tensor {name}, got {type(value).__name__} from {type(outputs)}")
        if value.ndim != ndim or not value.is_floating_point():
            raise ValueError(f"outputs {name} must be {ndim}-d floating point, got {list(value.shape)} {value.dtype}")
        found.append(value)
    if len({value.shape[:2] for value in found}) != 1:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in zip(ndims, found, strict=True))
        raise ValueError(f"outputs must agree in batch size and number of queries, got {shapes}")
    return found


def _probability(name: str, value: Any) -> None:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _sizes(name: str, sizes: Any, count: int) -> list[tuple[int, int]]:
    if not isinstance(sizes, Tensor | np.ndarray | Sequence) or isinstance(sizes, str):
        raise TypeError(f"{name} must be a tensor [{count}, 2] or a list of (height, width), got {sizes!r}")
    if len(sizes) != count:
        raise ValueError(f"{name} must have {count} entries, one for each image, got {len(sizes)}")
    return [pair(f"{name}[{i}]", size) for i, size in enumerate(sizes)]


# ---- boxes ----


def _boxes_and_scores(logits: Tensor, boxes: Tensor, target_sizes: Tensor | None) -> list[dict[str, Tensor]]:
    """Best class that is not no-object, its probability, and corner boxes scaled to `target_sizes` [B,2] (h, w)."""
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    centre, extent = boxes.split(2, dim=-1)
    corners = torch.cat([centre - 0.5 * extent, centre + 0.5 * extent], dim=-1)
    if target_sizes is not None:
        corners = corners * target_sizes.to(corners.device)[:, [1, 0, 1, 0]].unsqueeze(1)
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, corners, strict=True)]


def _size_tensor(name: str, sizes: Any, count: int) -> Tensor:
    """`sizes` as [count, 2]: a tensor as given, a list as float32."""
    if not isinstance(sizes, Tensor):
        return torch.tensor(_sizes(name, sizes, count), dtype=torch.float32)
    if sizes.shape != (count, 2):
        raise ValueError(f"{name} must be [{count}, 2], (height, width) of each image, got {list(sizes.shape)}")
    return sizes


class PostProcess(nn.Module):
    """Boxes in pixels, as facebookresearch/detr's models/detr.py PostProcess."""

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """
        Arguments:
            outputs: with pred_logits [B,Q,C+1] and pred_boxes [B,Q,4] (cxcywh in [0,1]).
            target_sizes: [B,2], (height, width) of each image in pixels.

        Returns:
            For each image "scores" [Q], "labels" [Q] and "boxes" [Q,4] (x0, y0, x1, y1 in pixels), every query's.

        Raises:
            TypeError, ValueError: a field is missing, or shapes do not fit.
        """
        logits, boxes = _fields(outputs, pred_logits=3, pred_boxes=3)
        return _boxes_and_scores(logits, boxes, _size_tensor("target_sizes", target_sizes, len(logits)))


def post_process(outputs: Any, target_sizes: Tensor) -> list[dict[str, Tensor]]:
    """`PostProcess` for outputs with .logits and .pred_boxes (transformers 4.x `post_process`)."""
    logits, boxes = _fields(outputs, logits=3, pred_boxes=3)
    return _boxes_and_scores(logits, boxes, _size_tensor("target_sizes", target_sizes, len(logits)))


def post_process_object_detection(
    outputs: Any, threshold: float = 0.5, target_sizes: Sizes | None = None
) -> list[dict[str, Tensor]]:
    """Boxes that score above `threshold` (transformers' `post_process_object_detection`).

    Arguments:
        outputs: with .logits [B,Q,C+1] and .pred_boxes [B,Q,4] (cxcywh in [0,1]).
        threshold: probability in [0,1].
        target_sizes: [B,2] or B pairs (height, width) in pixels; None leaves the boxes in [0,1].

    Returns:
        For each image "scores" [K], "labels" [K] and "boxes" [K,4] (x0, y0, x1, y1), in query order.

    Raises:
        TypeError, ValueError: a field is missing, shapes do not fit, or `threshold` is no probability.
    """
    _probability("threshold", threshold)
    logits, boxes = _fields(outputs, logits=3, pred_boxes=3)
    sizes = None if target_sizes is None else _size_tensor("target_sizes", target_sizes, len(logits))
    results = _boxes_and_scores(logits, boxes, sizes)
    return [{name: value[result["scores"] > threshold] for name, value in result.items()} for result in results]


# ---- masks of each query ----


def _add_masks(
    results: list[dict[str, Any]], masks: Tensor, original_sizes: Sizes, max_sizes: Sizes, threshold: float
) -> list[dict[str, Any]]:
    """Set each result's "masks", uint8 [Q,1,H,W] on the CPU, from mask logits [B,Q,h,w] over the padded batch."""
    _probability("threshold", threshold)
    originals = _sizes("orig_target_sizes", original_sizes, len(masks))
    processed = _sizes("max_target_sizes", max_sizes, len(masks))
    if len(results) != len(masks):
        raise ValueError(f"results must have {len(masks)} entries, one for each image, got {len(results)}")
    padded = (max(height for height, _ in processed), max(width for _, width in processed))
    if ops.uses_kernels(masks):
        for result, binary in zip(results, _masks_at_once(masks, padded, processed, originals, threshold), strict=True):
            result["masks"] = binary.unsqueeze(1)
        return results
    for result, logits, source, target in zip(results, masks, processed, originals, strict=True):
        result["masks"] = torch.cat([part.cpu() for part in binary_masks(logits, padded, source, target, threshold)])
        result["masks"] = result["masks"].unsqueeze(1)
    return results


def _masks_at_once(
    masks: Tensor,
    padded: tuple[int, int],
    processed: list[tuple[int, int]],
    targets: list[tuple[int, int]],
    threshold: float,
) -> list[Tensor]:
    """The binary masks [Q,H,W] of all images from one kernel, on the CPU."""
    counts = [masks.shape[1]] * len(masks)
    flat = torch.ops.detr_fast.mask_upsample(
        masks.flatten(0, 1), counts, list(padded), _flat(processed), _flat(targets), threshold
    ).cpu()
    parts = flat.split([count * math.prod(size) for count, size in zip(counts, targets, strict=True)])
    return [part.view(-1, *size) for part, size in zip(parts, targets, strict=True)]


def _flat(sizes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for size in sizes for side in size]


def binary_masks(
    logits: Tensor,
    padded_size: tuple[int, int],
    processed_size: tuple[int, int],
    target_size: tuple[int, int],
    threshold: float = 0.5,
) -> Iterator[Tensor]:
    """`PostProcessSegm` of one image, some queries at a time: each part is uint8 [k,H,W], on the logits' device.

    Arguments:
        logits: mask logits [Q,h,w] over the padded image.
        padded_size: (height, width) of the batch that the model saw.
        processed_size: (height, width) of this image in it, at its top left.
        target_size: (height, width) of the masks.
        threshold: least probability of a pixel in a mask, exclusive.
    """
    height, width = processed_size
    largest = max(math.prod(padded_size), math.prod(target_size))
    shrinks = math.prod(target_size) < height * width  # then fewer pixels are left to judge
    for chunk in logits.split(max(1, MASK_CHUNK // largest)):
        large = F.interpolate(chunk[None], size=padded_size, mode="bilinear", align_corners=False)
        large = large[:, :, :height, :width]
        if shrinks:
            yield (F.interpolate(large, size=target_size, mode="nearest").sigmoid() > threshold)[0].byte()
        else:
            yield F.interpolate((large.sigmoid() > threshold).byte(), size=target_size, mode="nearest")[0]


class PostProcessSegm(nn.Module):
    """A binary mask of each query, as facebookresearch/detr's models/segmentation.py PostProcessSegm."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        _probability("threshold", threshold)
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, Any]],
        outputs: Mapping[str, Any],
        orig_target_sizes: Tensor,
        max_target_sizes: Tensor,
    ) -> list[dict[str, Any]]:
        """
        Arguments:
            results: what `PostProcess` returned; each entry is given "masks", uint8 [Q,1,H,W] on the CPU.
            outputs: with pred_masks [B,Q,h,w] (or [B,Q,1,h,w]), logits.
            orig_target_sizes: [B,2], (height, width) of each result.
            max_target_sizes: [B,2], (height, width) of each image before padding; the largest are the batch's size.

        Raises:
            TypeError, ValueError: a field is missing, or shapes do not fit.
        """
        masks = outputs["pred_masks"]
        (masks,) = _fields({"pred_masks": masks.squeeze(2) if masks.ndim == 5 else masks}, pred_masks=4)
        return _add_masks(results, masks, orig_target_sizes, max_target_sizes, self.threshold)


@torch.no_grad()
def post_process_instance(
    results: list[dict[str, Any]],
    outputs: Any,
    orig_target_sizes: Tensor,
    max_target_sizes: Tensor,
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """`PostProcessSegm` for outputs with .pred_masks (transformers 4.x `post_process_instance`)."""
    (masks,) = _fields(outputs, pred_masks=4)
    return _add_masks(results, masks, orig_target_sizes, max_target_sizes, threshold)


@torch.no_grad()
def post_process_segmentation(
    outputs: Any, target_sizes: Sizes, threshold: float = 0.9, mask_threshold: float = 0.5
) -> list[dict[str, Tensor]]:
    """Masks of the queries that score above `threshold` (transformers 4.x `post_process_segmentation`).

    Returns:
        For each image "scores" [K], "labels" [K] and "masks" int64 [K,H,W] of 0 and 1.

    Raises:
        TypeError, ValueError: a field is missing, shapes do not fit, or a threshold is no probability.
    """
    _probability("threshold", threshold)
    _probability("mask_threshold", mask_threshold)
    logits, masks = _fields(outputs, logits=3, pred_masks=4)
    results = []
    sizes = _sizes("target_sizes", target_sizes, len(logits))
    for kept, scores, labels, size in _kept_queries(logits, masks, threshold, sizes):
        large = F.interpolate(kept[:, None], size=size, mode="bilinear").squeeze(1)
        results.append({"scores": scores, "labels": labels, "masks": (large.sigmoid() > mask_threshold).long()})
    return results


def _kept_queries(logits: Tensor, masks: Tensor, threshold: float, sizes: list[Any]) -> list[tuple[Any, ...]]:
    """For each image the masks, scores and labels of its queries that are an object above `threshold`; and its size."""
    scores, labels = logits.softmax(-1).max(-1)
    keep = (labels != logits.shape[-1] - 1) & (scores > threshold)
    images = zip(masks, scores, labels, keep, sizes, strict=True)
    return [(mask[kept], score[kept], label[kept], size) for mask, score, label, kept, size in images]


# ---- one map from the weighted masks ----


class SemanticSegmentation(dict[str, Tensor]):
    """A class map "segmentation" [H,W] and its "segmentation_scores" [C,H,W], as keys and as attributes."""

    segmentation = property(lambda self: self["segmentation"])
    segmentation_scores = property(lambda self: self["segmentation_scores"])


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any, target_sizes: Sizes | None = None, return_segmentation_scores: bool = False
) -> list[Any]:
    """The class of each pixel (transformers' `post_process_semantic_segmentation`).

    Arguments:
        outputs: with .logits [B,Q,C+1] and .pred_masks [B,Q,h,w].
        target_sizes: B pairs (height, width); None keeps [h,w].
        return_segmentation_scores: also return the scores of all classes.

    Returns:
        For each image an int64 map [H,W]; with scores a `SemanticSegmentation`.

    Raises:
        TypeError, ValueError: a field is missing, or shapes do not fit.
    """
    logits, masks = _fields(outputs, logits=3, pred_masks=4)
    scores = torch.einsum("bqc,bqhw->bchw", logits.softmax(-1)[..., :-1], masks.sigmoid())
    sizes = None if target_sizes is None else _sizes("target_sizes", target_sizes, len(logits))
    results: list[Any] = []
    for i, image in enumerate(scores):
        if sizes is not None:
            image = F.interpolate(image[None], size=sizes[i], mode="bilinear", align_corners=False)[0]
        classes = argmax_of_planes(image, len(image)).long()
        both = SemanticSegmentation(segmentation=classes, segmentation_scores=image)
        results.append(both if return_segmentation_scores else classes)
    return results


def post_process_instance_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes | None = None,
    return_coco_annotation: bool = False,
) -> list[dict[str, Any]]:
    """`post_process_panoptic_segmentation` with nothing fused (transformers' `post_process_instance_segmentation`).

    Arguments:
        return_coco_annotation: "segmentation" becomes a list of run lengths [start, length, ...] (start from 1, row
            by row), one for each id of the map in rising order, 0 included; an image without segments keeps its map.
    """
    results = post_process_panoptic_segmentation(
        outputs, threshold, mask_threshold, overlap_mask_area_threshold, None, target_sizes
    )
    if return_coco_annotation:
        for result in results:
            if not result["segmentation"].is_floating_point():
                result["segmentation"] = _run_lengths(result["segmentation"])
    return results


@torch.no_grad()
def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Any = None,
    target_sizes: Sizes | None = None,
) -> list[dict[str, Any]]:
    """Segments from masks weighted by their scores (transformers' `post_process_panoptic_segmentation`).

    Kept as upstream has it: after a repeat of a fused class the next new segment counts on from that class's id, so
    two segments can share an id.

    Arguments:
        outputs: with .logits [B,Q,C+1] and .pred_masks [B,Q,h,w].
        threshold: a query is kept if its score is above.
        mask_threshold: a pixel belongs to a mask if its probability times the score is at least this.
        overlap_mask_area_threshold: a segment is kept if the pixels it won, divided by its mask's, are above.
        label_ids_to_fuse: classes of which an image has one segment; None is none.
        target_sizes: B pairs (height, width); None keeps [h,w].

    Returns:
        For each image "segmentation", ids from 1 in int32 [H,W] with 0 for none (a float map of -1 if no query is
        kept), and "segments_info", a list of {"id", "label_id", "was_fused", "score"}.

    Raises:
        TypeError, ValueError: a field is missing, shapes do not fit, or a threshold is no probability.
    """
    _probability("threshold", threshold)
    _probability("mask_threshold", mask_threshold)
    _probability("overlap_mask_area_threshold", overlap_mask_area_threshold)
    logits, masks = _fields(outputs, logits=3, pred_masks=4)
    count = len(logits)
    sizes = [None] * count if target_sizes is None else _sizes("target_sizes", target_sizes, count)
    fuse = set() if label_ids_to_fuse is None else set(label_ids_to_fuse)
    kept = _kept_queries(logits, masks, threshold, sizes)
    given, thresholds = (masks.shape[-2], masks.shape[-1]), (mask_threshold, overlap_mask_area_threshold)
    if ops.uses_kernels(masks):
        return _weighted_merges_at_once(kept, fuse, given, thresholds)
    return [_weighted_merge(m, s, c, size or given, fuse, thresholds) for m, s, c, size in kept]


def _weighted_merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    fuse: set[int],
    thresholds: tuple[float, float],
) -> dict[str, Any]:
    """One image's result from its kept queries."""
    mask_threshold, overlap_threshold = thresholds
    if len(masks) == 0:
        return {"segmentation": torch.full(size, -1.0), "segments_info": []}
    weighted = masks.sigmoid()
    if size != tuple(masks.shape[-2:]):
        weighted = F.interpolate(weighted[None], size=size, mode="bilinear", align_corners=False)[0]
    weighted *= scores[:, None, None]
    winners = argmax_of_planes(weighted, len(weighted))
    won = torch.bincount(winners.flatten(), minlength=len(weighted))
    own = torch.stack([(mask >= mask_threshold).sum() for mask in weighted])
    # 0 / 0 is NaN, which is above nothing; the quotient is float32, so that 4 / 5 is above 0.8
    large = ((own > 0) & (won > 0)).tolist()
    ratios = (won / own).tolist()
    accepted = [ok and ratio > overlap_threshold for ok, ratio in zip(large, ratios, strict=True)]
    ids, segments = _number_segments(accepted, scores.tolist(), labels.tolist(), fuse)
    return {"segmentation": take(np.array(ids), winners), "segments_info": segments}


def _weighted_merges_at_once(
    kept: list[tuple[Any, ...]], fuse: set[int], given: tuple[int, int], thresholds: tuple[float, float]
) -> list[dict[str, Any]]:
    """`_weighted_merge` of all images by kernels that wait for the device once."""
    masks, scores, labels = (torch.cat(parts) for parts in list(zip(*kept, strict=True))[:3])
    sizes: list[tuple[int, int]] = [size or given for *_, size in kept]
    counts = [len(image[0]) for image in kept]
    classes = labels.tolist()
    table = torch.tensor([c in fuse for c in range(max(classes, default=0) + 1)], device=masks.device)
    ids, segment, *_ = torch.ops.detr_fast.weighted_merge(
        masks, scores, labels, table, counts, _flat(sizes), *thresholds
    )
    per_image = zip(*(torch.split(x, counts) for x in (segment.cpu(), scores.cpu(), labels.cpu())), strict=True)
    results = []
    maps = ids.split([math.prod(size) for size in sizes])
    for map_, size, (numbers, score, label) in zip(maps, sizes, per_image, strict=True):
        if len(numbers) == 0:
            results.append({"segmentation": torch.full(size, -1.0), "segments_info": []})
            continue
        accepted = [number > 0 for number in numbers.tolist()]
        _, segments = _number_segments(accepted, score.tolist(), label.tolist(), fuse)
        results.append({"segmentation": map_.view(size).int(), "segments_info": segments})
    return results


def _number_segments(
    accepted: list[bool], scores: list[float], labels: list[int], fuse: set[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The id of each query's segment, 0 if it is not accepted, and the segments' descriptions."""
    ids, segments, current = [0] * len(accepted), [], 0
    id_of_class: dict[int, int] = {}
    for k, (score, label) in enumerate(zip(scores, labels, strict=True)):
        if not accepted[k]:
            continue
        current = id_of_class.get(label, current + 1)
        ids[k] = current
        segments.append({"id": current, "label_id": label, "was_fused": label in fuse, "score": round(score, 6)})
        if label in fuse:
            id_of_class[label] = current
    return ids, segments


def _run_lengths(segmentation: Tensor) -> list[list[int]]:
    """For each id of a map [H,W], in rising order, [start, length, start, length, ...], row by row from 1."""
    pixels = segmentation.flatten().cpu().numpy()
    starts = np.flatnonzero(np.diff(pixels, prepend=pixels[0] - 1))
    runs = np.stack([starts + 1, np.diff(starts, append=len(pixels))], axis=1)
    return [runs[pixels[starts] == i].flatten().tolist() for i in np.unique(pixels[starts])]


# ---- the panoptic PNG ----


class PostProcessPanoptic(nn.Module):
    """A panoptic PNG and its segments, as facebookresearch/detr's models/segmentation.py PostProcessPanoptic.

    Its flaws are kept (see `upstream_panoptic_merge`); `panoptic_merge` is the corrected one.

    Arguments:
        is_thing_map: from class to whether it is a thing (True) or stuff (False).
        threshold: a query is kept if its score is above.
    """

    def __init__(self, is_thing_map: IsThing, threshold: float = 0.85) -> None:
        super().__init__()
        _probability("threshold", threshold)
        self.threshold = threshold
        self.is_thing_map = is_thing_map

    def forward(
        self, outputs: Mapping[str, Any], processed_sizes: Sizes, target_sizes: Sizes | None = None
    ) -> list[dict[str, Any]]:
        """
        Arguments:
            outputs: with pred_logits [B,Q,C+1] and pred_masks [B,Q,h,w].
            processed_sizes: B pairs (height, width), tuples or tensors: each image as it entered the batch.
            target_sizes: the same for the results; None is `processed_sizes`.

        Returns:
            For each image "png_string", the bytes of an RGB PNG of id = R + 256 G + 65536 B, ids from 0; and
            "segments_info", a list of {"id", "isthing", "category_id", "area"}.

        Raises:
            TypeError, ValueError: a field is missing, shapes do not fit, or `is_thing_map` lacks a detected class.
        """
        logits, masks = _fields(outputs, pred_logits=3, pred_masks=4)
        return _panoptic(logits, masks, processed_sizes, target_sizes, self.is_thing_map, self.threshold)


def post_process_panoptic(
    outputs: Any,
    processed_sizes: Sizes,
    target_sizes: Sizes | None = None,
    is_thing_map: IsThing | None = None,
    threshold: float = 0.85,
) -> list[dict[str, Any]]:
    """`PostProcessPanoptic` for outputs with .logits and .pred_masks (transformers 4.x `post_process_panoptic`).

    Without `is_thing_map` the classes up to 90 are things, as in COCO panoptic.
    """
    logits, masks = _fields(outputs, logits=3, pred_masks=4)
    isthing = (lambda label: label <= LAST_COCO_THING) if is_thing_map is None else is_thing_map
    return _panoptic(logits, masks, processed_sizes, target_sizes, isthing, threshold)


@torch.no_grad()
def _panoptic(
    logits: Tensor,
    masks: Tensor,
    processed_sizes: Sizes,
    target_sizes: Sizes | None,
    isthing: IsThing,
    threshold: float,
) -> list[dict[str, Any]]:
    _probability("threshold", threshold)
    processed = _sizes("processed_sizes", processed_sizes, len(logits))
    targets = processed if target_sizes is None else _sizes("target_sizes", target_sizes, len(logits))
    kept = _kept_queries(logits, masks, threshold, list(zip(processed, targets, strict=True)))
    if ops.uses_kernels(masks):
        merged = _upstream_merges_at_once(kept, isthing)
    else:
        merged = [
            upstream_panoptic_merge(*image, processed_size=source, target_size=target, isthing=isthing)
            for *image, (source, target) in kept
        ]
    return [{"png_string": _png(ids), "segments_info": segments} for ids, segments in merged]


def _upstream_merges_at_once(
    kept: list[tuple[Any, ...]], isthing: IsThing
) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    """`upstream_panoptic_merge` of all images by kernels that wait for the device once."""
    masks, _, labels = (torch.cat(parts) for parts in list(zip(*kept, strict=True))[:3])
    counts = [len(image[0]) for image in kept]
    processed, targets = zip(*(sizes for *_, sizes in kept), strict=True)
    classes = labels.tolist()
    things = {c: is_thing(isthing, c) for c in set(classes)}
    table = torch.tensor([bool(things.get(c)) for c in range(max(classes, default=0) + 1)], device=masks.device)
    sizes = _flat(processed)
    merge = torch.ops.detr_fast.panoptic_merge
    ids, *queries = merge(masks, labels, table, counts, sizes, sizes, _flat(targets), False)
    segment, area, label = (x.cpu().split(counts) for x in (*queries[:2], labels))
    maps = ids.int().split([math.prod(size) for size in targets])
    return [
        (
            map_.view(size),
            [
                {"id": i, "isthing": things[c], "category_id": c, "area": a}
                for i, c, a in zip(*(x.tolist() for x in image), strict=True)
                if i >= 0
            ],
        )
        for map_, size, *image in zip(maps, targets, segment, label, area, strict=True)
    ]


def _png(ids: Tensor) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(id_to_rgb(ids.cpu().numpy())).save(file, format="PNG")
        return file.getvalue()


# ---- ids as colours ----


def rgb_to_id(color: Any) -> Any:
    """COCO panoptic ids, R + 256 G + 65536 B, of an array or tensor [H,W,3] (as int32 [H,W] if it is uint8), or of one
    colour, a sequence of three numbers (as int). transformers' `rgb_to_id`.

    Raises:
        ValueError: the last dimension is not 3.
    """
    is_map = isinstance(color, np.ndarray | Tensor) and color.ndim == 3
    if (color.shape[-1] if is_map else len(color)) != 3:
        raise ValueError(f"color must be [height, width, 3] or three numbers, got {np.shape(color)}")
    if not is_map:
        red, green, blue = (int(channel) for channel in color)
        return red + 256 * green + 65536 * blue
    if isinstance(color, Tensor):
        color = color.to(torch.int32) if color.dtype == torch.uint8 else color
    elif color.dtype == np.uint8:
        color = color.astype(np.int32)
    return color[..., 0] + 256 * color[..., 1] + 65536 * color[..., 2]


def id_to_rgb(id_map: Any) -> Any:
    """The colours of COCO panoptic ids: uint8 [...,3] of an integer array or tensor, [R, G, B] of one int.
    transformers' `id_to_rgb`.

    Raises:
        TypeError: not integers.
        ValueError: an id below 0 or of 2^24 or more, which has no colour.
    """
    ids = np.asarray(id_map)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"id_map must be an integer or an array of integers, got {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 24:
        raise ValueError(f"id_map must be in [0, 2**24), got {ids.min()} to {ids.max()}")
    little_endian = np.ascontiguousarray(ids[..., None], dtype="<u4").view(np.uint8)
    colors = np.ascontiguousarray(little_endian[..., :3])
    if isinstance(id_map, Tensor):
        return torch.from_numpy(colors)
    return colors if isinstance(id_map, np.ndarray) else colors.tolist()
