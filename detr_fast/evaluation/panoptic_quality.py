"""Panoptic quality: how well predicted segments match the true ones.

Kirillov et al. 2019, "Panoptic Segmentation", section 4; the same results as cocodataset/panopticapi's evaluation.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from detr_fast.data.layout import panoptic_ids

VOID = 0
ID_BITS = 24
ID_MASK = (1 << ID_BITS) - 1
KINDS = ("ground truth of", "prediction for")

JsonSource = str | os.PathLike[str] | Mapping[str, Any]


class PanopticFormatError(ValueError, KeyError):
    """A PNG, its JSON and the categories do not fit together. A KeyError too, which is what panopticapi raises."""

    __str__ = Exception.__str__  # KeyError's would quote the message


def panoptic_quality(
    gt_json: JsonSource,
    gt_folder: str | os.PathLike[str],
    pred_json: JsonSource,
    pred_folder: str | os.PathLike[str],
    progress: bool = False,
) -> dict[str, Any]:
    """The panoptic quality of predictions against ground truth, both in COCO's panoptic format.

    A predicted and a true segment of one category match if they overlap by an IoU above 0.5; void pixels of the ground
    truth count in no union. True segments with iscrowd match nothing and are not missed. A predicted segment of which
    more than half is void, or crowd of its own category, is no false positive. As in panopticapi, areas of true
    segments are those of the JSON, true ids that are only in the PNG are neither void nor missed, and of several
    crowds of one category in an image the last counts.

    Args:
        gt_json, pred_json: path of a panoptic JSON, or its contents. Of the predictions' only "annotations" is read;
            those of images without ground truth are ignored.
        gt_folder, pred_folder: where their PNGs are (id = R + 256 G + 65536 B, 0 = void unless the JSON lists it).
        progress: show a progress bar on stderr.

    Returns:
        "All", "Things" and "Stuff": {"pq", "sq", "rq", "n"}, means over the `n` categories that occur, in [0, 1], 0.0
        if none does; and "per_class": {"pq", "sq", "rq", "tp", "fp", "fn"} for each category id, zeros for a category
        that does not occur.

    Raises:
        PanopticFormatError (a ValueError and a KeyError): an image has no prediction; a predicted id is in the PNG and
            not in the JSON or the other way round; an id is listed twice; a category is unknown; a PNG is not RGB or
            the two of an image differ in size; a JSON lacks a field.
        FileNotFoundError: a JSON, a folder or a PNG is missing.
    """
    ground_truth = _load(gt_json, "gt_json", ("annotations", "categories"))
    predictions = _load(pred_json, "pred_json", ("annotations",))
    for name, folder in (("gt_folder", gt_folder), ("pred_folder", pred_folder)):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{name}: no folder {folder}")
    quality = PanopticQuality(ground_truth["categories"])

    by_image = {_get(a, "image_id", "an annotation of pred_json"): a for a in predictions["annotations"]}
    pairs = [(a, by_image.get(_get(a, "image_id", "an annotation of gt_json"))) for a in ground_truth["annotations"]]
    missing = [truth["image_id"] for truth, prediction in pairs if prediction is None]
    if missing:
        raise PanopticFormatError(f"no prediction for {len(missing)} of {len(pairs)} images, first image {missing[0]}")

    def count(pair: tuple[Any, Any]) -> np.ndarray:
        truth, prediction = pair
        paths = (
            Path(folder) / _get(annotation, "file_name", f"{kind} image {truth['image_id']}")
            for kind, folder, annotation in zip(KINDS, (gt_folder, pred_folder), pair, strict=True)
        )
        return quality.count(truth, prediction, *map(read_ids, paths))

    pool = ThreadPoolExecutor()  # decoding PNGs, most of the work, releases the GIL
    try:
        for counts in tqdm(pool.map(count, pairs), total=len(pairs), unit="image", disable=not progress):
            quality.counts += counts
    finally:
        pool.shutdown(cancel_futures=True)
    return quality.summary()


class PanopticQuality:
    """The counts behind `panoptic_quality`, for images that come one by one.

    Args:
        categories: dicts with "id" and "isthing", as in a panoptic JSON.

    Attributes:
        counts: of each category the sum of matched IoUs, true positives, false positives and false negatives, float64
            [4, categories]. Add the result of `count` to it.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        self._categories = list({_get(c, "id", "a category"): c for c in categories}.values())
        self._column = {category["id"]: index for index, category in enumerate(self._categories)}
        self._isthing = np.array([_get(c, "isthing", f"category {c['id']}") == 1 for c in self._categories], dtype=bool)
        self.counts = np.zeros((4, len(self._categories)))

    def count(
        self, truth: Mapping[str, Any], prediction: Mapping[str, Any], gt_ids: np.ndarray, pred_ids: np.ndarray
    ) -> np.ndarray:
        """The counts of one image, to add to `counts`.

        Args:
            truth, prediction: annotations with "segments_info"; the truth's with "image_id" too.
            gt_ids, pred_ids: the ids of their PNGs, integers [H, W] of equal size, 0 = void unless listed.

        Raises:
            PanopticFormatError: as `panoptic_quality`.
        """
        return _count_image(truth, prediction, gt_ids, pred_ids, self._column)

    def summary(self) -> dict[str, Any]:
        """The result of `panoptic_quality` from the counts so far."""
        return _summary(self.counts, self._categories, self._isthing)


def _summary(totals: np.ndarray, categories: list[Mapping[str, Any]], isthing: np.ndarray) -> dict[str, Any]:
    iou, tp, fp, fn = totals
    occurs = tp + fp + fn > 0
    denominator = np.where(occurs, tp + 0.5 * fp + 0.5 * fn, 1.0)
    qualities = {"pq": iou / denominator, "sq": iou / np.maximum(tp, 1), "rq": tp / denominator}

    def mean(chosen: np.ndarray) -> dict[str, Any]:
        chosen = chosen & occurs
        n = int(chosen.sum())
        return {**{name: float(q[chosen].sum()) / max(n, 1) for name, q in qualities.items()}, "n": n}

    per_class = {
        category["id"]: {
            **{name: float(q[i]) for name, q in qualities.items()},
            **{"tp": int(tp[i]), "fp": int(fp[i]), "fn": int(fn[i])},
        }
        for i, category in enumerate(categories)
    }
    return {"All": mean(occurs), "Things": mean(isthing), "Stuff": mean(~isthing), "per_class": per_class}


def _count_image(
    truth: Mapping[str, Any],
    prediction: Mapping[str, Any],
    gt_map: np.ndarray,
    pred_map: np.ndarray,
    column: dict[int, int],
) -> np.ndarray:
    """Sum of matched IoUs, true positives, false positives and false negatives of one image, [4, categories]."""
    image_id = truth["image_id"]
    in_truth, in_prediction = (f"{kind} image {image_id}" for kind in KINDS)
    gt_rows, gt_category = _segments(truth, in_truth, column)
    gt_area = _values(truth, "area", in_truth)
    crowd = _values(truth, "iscrowd", in_truth) == 1
    pred_rows, pred_category = _segments(prediction, in_prediction, column)
    gt_ids, pred_ids, pixels = _intersections(gt_map, pred_map, image_id)
    # -1, the last row and column below, stands for pixels of no segment
    gt_row = np.array([gt_rows.get(i, -1) for i in gt_ids.tolist()], dtype=int)
    pred_row = np.array([pred_rows.get(i, -1) for i in pred_ids.tolist()], dtype=int)
    unlisted = np.unique(pred_ids[(pred_row < 0) & (pred_ids != VOID)]).tolist()
    unseen = sorted(set(pred_rows) - set(pred_ids.tolist()))
    if unlisted or unseen:
        ids, here, there = (unlisted, "PNG", "JSON") if unlisted else (unseen, "JSON", "PNG")
        raise PanopticFormatError(f"{in_prediction}: segment ids {_some(ids)} are in its {here} and not in its {there}")

    overlap = np.zeros((len(gt_rows) + 1, len(pred_rows) + 1))
    overlap[gt_row, pred_row] = pixels  # all that collide are in the last row or column
    overlap[-1] = overlap[:, -1] = 0
    pred_area = np.bincount(pred_row + 1, pixels, len(pred_rows) + 1)[1:]
    on_void = gt_ids == VOID
    void = np.bincount(pred_row[on_void] + 1, pixels[on_void], len(pred_rows) + 1)[1:]

    inner = overlap[:-1, :-1]
    union = gt_area[:, None] + pred_area - inner - void
    comparable = (inner > 0) & (gt_category[:, None] == pred_category) & ~crowd[:, None]
    iou = np.divide(inner, union, out=np.zeros_like(inner), where=comparable)
    matched = iou > 0.5
    matched_row, matched_pred = np.nonzero(matched)

    crowd_row = np.full(len(column), -1)
    for row in np.flatnonzero(crowd):
        crowd_row[gt_category[row]] = row
    ignored = void + overlap[crowd_row[pred_category], np.arange(len(pred_rows))]
    false_positive = ~matched.any(axis=0) & (ignored <= 0.5 * pred_area)
    missed = ~matched.any(axis=1) & ~crowd

    matched_category = gt_category[matched_row]
    return np.stack(
        [
            np.bincount(matched_category, iou[matched_row, matched_pred], len(column)),
            np.bincount(matched_category, minlength=len(column)),
            np.bincount(pred_category[false_positive], minlength=len(column)),
            np.bincount(gt_category[missed], minlength=len(column)),
        ]
    )


def _intersections(gt: np.ndarray, pred: np.ndarray, image_id: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs (true id, predicted id) that share pixels, and how many: three arrays [pairs]."""
    if gt.shape != pred.shape:
        raise PanopticFormatError(
            f"image {image_id}: the ground truth's PNG is {gt.shape[1]} x {gt.shape[0]} pixels, "
            f"the prediction's {pred.shape[1]} x {pred.shape[0]}"
        )
    gt, pred = gt.ravel(), pred.ravel()
    # segments are runs of equal pixels: sorting runs is many times less work than sorting pixels
    starts = np.flatnonzero((gt[1:] != gt[:-1]) | (pred[1:] != pred[:-1])) + 1
    starts = np.concatenate([[0], starts])
    runs = gt[starts].astype(np.uint64) << ID_BITS | pred[starts].astype(np.uint64)
    pairs = np.unique(runs)
    pixels = np.bincount(np.searchsorted(pairs, runs), np.diff(starts, append=gt.size))
    return pairs >> ID_BITS, pairs & ID_MASK, pixels


def read_ids(path: Path) -> np.ndarray:
    """The ids of a panoptic PNG, uint32 [H, W].

    Raises:
        PanopticFormatError: the PNG is not RGB.
        OSError: the file is missing or no image.
    """
    with Image.open(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise PanopticFormatError(f"{path}: a panoptic PNG must be RGB, got mode {image.mode}")
        return panoptic_ids(image)


def _segments(annotation: Mapping[str, Any], where: str, column: dict[int, int]) -> tuple[dict[int, int], np.ndarray]:
    """The row of each segment id, and the column of each segment's category, int [segments]."""
    segments = _get(annotation, "segments_info", where)
    rows: dict[int, int] = {}
    for row, segment in enumerate(segments):
        segment_id = _get(segment, "id", f"{where}, segment {row} of the list")
        category = _get(segment, "category_id", f"{where}, segment {segment_id}")
        if segment_id in rows:
            raise PanopticFormatError(f"{where}: segments_info lists id {segment_id} twice")
        if category not in column:
            raise PanopticFormatError(f"{where}: segment {segment_id} has unknown category_id {category}")
        rows[segment_id] = row
    return rows, np.array([column[segment["category_id"]] for segment in segments], dtype=int)


def _values(annotation: Mapping[str, Any], key: str, where: str) -> np.ndarray:
    segments = annotation["segments_info"]
    return np.array([_get(segment, key, f"{where}, segment {segment['id']}") for segment in segments], dtype=float)


def _get(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise PanopticFormatError(f"{where} has no {key!r}")
    return record[key]


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _load(source: JsonSource, name: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no file {path}")
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PanopticFormatError(f"{name}: {path} is not JSON: {error}") from error
        name = f"{name} {path}"
    if not isinstance(source, Mapping):
        raise PanopticFormatError(f"{name} must be a JSON object, got {type(source).__name__}")
    for key in keys:
        _get(source, key, name)
    return source
