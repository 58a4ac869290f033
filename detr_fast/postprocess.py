"""From a model's outputs to boxes, masks and panoptic maps, as facebookresearch/detr and as transformers do it.

`PostProcess`, `PostProcessSegm`, `PostProcessPanoptic` have facebookresearch/detr's calls and results; the functions
have those of transformers' DetrImageProcessor, 5.x first, then the calls that only 4.x has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.ops.cells import argmax_of_planes
from detr_fast.reference import Merged

__all__ = [
    "PostProcess",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "SemanticSegmentation",
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
Size = tuple[int, int]  # (height, width)
IsThing = Callable[[int], Any] | Mapping[int, Any]
Array = TypeVar("Array", np.ndarray, Tensor)

LAST_COCO_THING = 90  # in COCO's panoptic ids


# What `segments_info` has of a segment in each merge; upstream's knows no scores.
CORRECTED_KEYS = ("id", "category_id", "isthing", "score", "area", "bbox")
UPSTREAM_KEYS = ("id", "isthing", "category_id", "area")


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


def pair(name: str, value: Any) -> tuple[int, int]:
    """`value` as (height, width) in pixels, ints of at least 1. Raises TypeError or ValueError with `name`."""
    items = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if not isinstance(items, tuple | list) or len(items) != 2:
        raise ValueError(f"{name} must be (height, width), got {value!r}")
    if not all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items):
        raise TypeError(f"{name} must hold two integers, got {value!r}")
    height, width = (item.__index__() for item in items)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1 x 1, got {height} x {width}")
    return height, width


# ---- which queries are kept ----


def class_scores(logits: Tensor) -> Tensor:
    """The probabilities of the classes [...,C] from pred_logits [...,C+1], the last of which is no-object."""
    return logits.softmax(-1)[..., :-1]


def kept_queries(logits: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one rule of keeping: a query is kept whose likeliest class is an object, and likelier than the threshold.

    Args:
        logits: pred_logits [...,C+1], the last of which is no-object.
        threshold: of all classes, or of each and of no-object, [C+1].

    Returns: scores and labels [...] of all queries, and bool [...], whether each is kept.
    """
    scores, labels = logits.softmax(-1).max(-1)
    least = threshold[labels] if isinstance(threshold, Tensor) else threshold
    return scores, labels, (labels != logits.shape[-1] - 1) & (scores > least)


# ---- boxes ----


def _boxes_and_scores(logits: Tensor, boxes: Tensor, target_sizes: Tensor | None) -> list[dict[str, Tensor]]:
    """Best class that is not no-object, its probability, and corner boxes scaled to `target_sizes` [B,2] (h, w)."""
    scores, labels = class_scores(logits).max(-1)
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
    binaries = ops.mask_upsample(list(masks), padded, processed, originals, threshold)
    for result, binary in zip(results, binaries, strict=True):
        result["masks"] = binary.cpu().unsqueeze(1)
    return results


def resize_and_crop(masks: Tensor, padded: Size, processed: Size) -> Tensor:
    """Mask logits [K,h,w] over a padded batch, as those of the image at its top left, [K,*processed]; as they are where
    nothing is padded."""
    if padded == processed:
        return masks
    if len(masks) == 0:
        return masks.new_empty((0, *processed))
    return F.interpolate(masks[None], size=padded, mode="bilinear")[0, :, : processed[0], : processed[1]]


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
    for (kept, scores, labels), size in zip(_kept(logits, masks, threshold), sizes, strict=True):
        large = F.interpolate(kept[:, None], size=size, mode="bilinear").squeeze(1)
        results.append({"scores": scores, "labels": labels, "masks": (large.sigmoid() > mask_threshold).long()})
    return results


class Kept(NamedTuple):
    """The kept queries of one image: masks [K,h,w], scores [K] and labels [K]."""

    masks: Tensor
    scores: Tensor
    labels: Tensor


def _kept(logits: Tensor, masks: Tensor, threshold: float) -> list[Kept]:
    """Of each image, from pred_logits [B,Q,C+1] and pred_masks [B,Q,h,w]."""
    images = zip(masks, *kept_queries(logits, threshold), strict=True)
    return [Kept(mask[kept], score[kept], label[kept]) for mask, score, label, kept in images]


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
    scores = torch.einsum("bqc,bqhw->bchw", class_scores(logits), masks.sigmoid())
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
    kept = _kept(logits, masks, threshold)
    targets = [size or (masks.shape[-2], masks.shape[-1]) for size in sizes]
    fused = torch.tensor([label in fuse for label in range(logits.shape[-1])], device=masks.device)
    all_masks, scores, labels = ([getattr(image, name) for image in kept] for name in Kept._fields)
    thresholds = (mask_threshold, overlap_mask_area_threshold)
    merges = ops.weighted_merge(all_masks, scores, labels, fused, targets, *thresholds)
    merged = merges.images([len(image.labels) for image in kept], targets)
    return [_weighted_result(*image, fuse) for image in zip(merged, kept, strict=True)]


def _weighted_result(merged: Merged, kept: Kept, fuse: set[int]) -> dict[str, Any]:
    """transformers' result of one image."""
    if len(kept.labels) == 0:
        return {"segmentation": torch.full(merged.ids.shape, -1.0), "segments_info": []}
    queries = zip(merged.segment.tolist(), kept.labels.tolist(), kept.scores.tolist(), strict=True)
    segments = [
        {"id": segment, "label_id": label, "was_fused": label in fuse, "score": round(score, 6)}
        for segment, label, score in queries
        if segment > 0
    ]
    return {"segmentation": merged.ids.int(), "segments_info": segments}


def _run_lengths(segmentation: Tensor) -> list[list[int]]:
    """For each id of a map [H,W], in rising order, [start, length, start, length, ...], row by row from 1."""
    pixels = segmentation.flatten().cpu().numpy()
    starts = np.flatnonzero(np.diff(pixels, prepend=pixels[0] - 1))
    runs = np.stack([starts + 1, np.diff(starts, append=len(pixels))], axis=1)
    return [runs[pixels[starts] == i].flatten().tolist() for i in np.unique(pixels[starts])]


# ---- the panoptic merges of one image ----


def is_thing(isthing: IsThing, label: int) -> Any:
    """Look `label` up in `isthing`, a function or a mapping; ValueError if the mapping lacks it."""
    if callable(isthing):
        return isthing(label)
    try:
        return isthing[label]
    except (KeyError, IndexError):
        raise ValueError(f"is_thing_map has no entry for class {label}, which was detected") from None


def thing_table(labels: Tensor, isthing: IsThing) -> Tensor:
    """bool [C], whether a class is a thing, for those among `labels`; on the CPU."""
    things = {label: bool(is_thing(isthing, label)) for label in set(labels.tolist())}
    return torch.tensor([things.get(label, False) for label in range(1 + max(things, default=0))])


class Segment(NamedTuple):
    """One segment of a merge.

    Attributes:
        score: the largest of its queries.
        area: its pixels.
        bbox: the tight [x, y, width, height] of them.
    """

    id: int
    category_id: int
    score: float
    area: int
    bbox: list[int]


def segments_of(merged: Merged, scores: Tensor, labels: Tensor) -> list[Segment]:
    """The segments of a merge in order of their ids, from what it says of each kept query [K]; all on the CPU."""
    found: dict[int, Segment] = {}
    queries = (x.tolist() for x in (merged.segment, labels, scores, merged.area, merged.box))
    for segment, label, score, area, (left, top, right, bottom) in zip(*queries, strict=True):
        if segment < 0:
            continue
        corners = (left, top, right, bottom)
        if (before := found.get(segment)) is not None:
            label, score, area = before.category_id, max(score, before.score), area + before.area
            corners = (*map(min, corners[:2], before.bbox[:2]), *map(max, corners[2:], before.bbox[2:]))
        found[segment] = Segment(segment, label, score, area, list(corners))
    by_id = (found[segment] for segment in sorted(found))
    return [s._replace(bbox=[*s.bbox[:2], s.bbox[2] - s.bbox[0], s.bbox[3] - s.bbox[1]]) for s in by_id]


def describe(
    merged: Merged, scores: Tensor, labels: Tensor, isthing: IsThing, keys: Sequence[str]
) -> list[dict[str, Any]]:
    """`segments_info` of a merge, from its kept queries: of each segment the values of `keys`, "isthing" among them."""
    on_host = Merged(merged.ids, *(x.cpu() for x in merged[1:]))
    found = []
    for segment in segments_of(on_host, scores.cpu(), labels.cpu()):
        values = segment._asdict() | {"isthing": is_thing(isthing, segment.category_id)}
        found.append({key: values[key] for key in keys})
    return found


def _check(pred_masks: Tensor, scores: Tensor, labels: Tensor) -> None:
    for name, value in (("pred_masks", pred_masks), ("scores", scores), ("labels", labels)):
        if not isinstance(value, Tensor) or value.is_floating_point() != (name != "labels"):
            kind = "an integer" if name == "labels" else "a floating point"
            raise TypeError(f"{name} must be {kind} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if pred_masks.ndim != 3 or 0 in pred_masks.shape[1:]:
        raise ValueError(f"pred_masks must be [K, h, w], got {list(pred_masks.shape)}")
    if tuple(scores.shape) != tuple(labels.shape) or tuple(labels.shape) != (len(pred_masks),):
        raise ValueError(
            f"scores and labels must be [{len(pred_masks)}], one for each of pred_masks, "
            f"got {list(scores.shape)} and {list(labels.shape)}"
        )


@torch.no_grad()
def upstream_panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: IsThing,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The panoptic merge of facebookresearch/detr's PostProcessPanoptic (models/segmentation.py), flaws included.

    Padding is not cropped: the logits are resized straight to the processed size. Stuff segments of one class are
    merged only to count the first areas: all but the first are then removed, and their pixels go to the next best
    query; the first is removed too if it is left with at most 4 pixels. Ids start at 0, which is also the id where
    nothing is found.

    Arguments:
        pred_masks: mask logits of the kept queries [K,h,w].
        scores, labels: of the kept queries, [K]; upstream's result does not depend on the scores.
        processed_size, target_size: (height, width) of the image as the model saw it, and of the result.
        isthing: mapping or function from class to whether it is a thing.

    Returns:
        Ids int32 [H,W], and a list of {"id", "isthing", "category_id", "area"} in order of the ids.

    Raises:
        TypeError, ValueError: shapes that do not fit, or a class that `isthing` lacks.
    """
    _check(pred_masks, scores, labels)
    processed, target = pair("processed_size", processed_size), pair("target_size", target_size)
    kept = Kept(pred_masks, scores, labels)
    merged = _merge(kept, processed, processed, target, isthing, False)
    return merged.ids.int(), describe(merged, scores, labels, isthing, UPSTREAM_KEYS)


@torch.no_grad()
def panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    padded_size: Sequence[int],
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: IsThing,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The corrected panoptic merge: padding cropped, one segment for each stuff class, ids from 1 and 0 for void.

    Every pixel of the processed image goes to the query with the largest logit, ties to the lower index; the target
    takes its pixels as PIL's NEAREST resize does. Segments of at most 4 target pixels are removed and their pixels go
    to the next best query, until none is left. 0 appears only where nothing is kept at all. Memory on a CPU: a few
    integer maps of the target or the processed image, whichever is smaller, the masks in int16, and some 50 MiB.

    Arguments:
        pred_masks: mask logits of the kept queries [K,h,w], over the whole padded image.
        scores, labels: of the kept queries, [K].
        padded_size: (height, width) of the batch that the model saw.
        processed_size: (height, width) of this image in it, at its top left.
        target_size: (height, width) of the result.
        isthing: mapping or function from class to whether it is a thing.

    Returns:
        Ids int32 [H,W], on the device of `pred_masks`, and a list of
        {"id", "category_id", "isthing", "score", "area", "bbox"} in order of the ids: the score of a merged segment is
        the largest of its queries', area counts target pixels, bbox is their tight [x, y, width, height].

    Raises:
        TypeError, ValueError: shapes that do not fit, or a class that `isthing` lacks.
    """
    _check(pred_masks, scores, labels)
    padded, processed = pair("padded_size", padded_size), pair("processed_size", processed_size)
    target = pair("target_size", target_size)
    if processed[0] > padded[0] or processed[1] > padded[1]:
        raise ValueError(f"processed_size must lie within padded_size {padded}, got {processed}")
    merged = _merge(Kept(pred_masks, scores, labels), padded, processed, target, isthing, True)
    return merged.ids.int(), describe(
        merged, scores, labels, lambda label: bool(is_thing(isthing, label)), CORRECTED_KEYS
    )


def _merge(kept: Kept, resized: Size, processed: Size, target: Size, isthing: IsThing, merge_for_good: bool) -> Merged:
    things = thing_table(kept.labels, isthing).to(kept.masks.device)
    merges = ops.panoptic_merge([kept.masks], [kept.labels], things, [resized], [processed], [target], merge_for_good)
    return merges.images([len(kept.labels)], [target])[0]


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
    kept = _kept(logits, masks, threshold)
    queries = ([image.masks for image in kept], [image.labels for image in kept])
    things = thing_table(torch.cat(queries[1]), isthing)
    merges = ops.panoptic_merge(*queries, things.to(masks.device), processed, processed, targets, False)
    return [
        {
            "png_string": _png(merged.ids),
            "segments_info": describe(merged, image.scores, image.labels, isthing, UPSTREAM_KEYS),
        }
        for merged, image in zip(merges.images([len(image.labels) for image in kept], targets), kept, strict=True)
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
