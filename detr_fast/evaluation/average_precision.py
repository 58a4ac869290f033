"""Average precision of boxes and masks, by pycocotools, for images that come one by one."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# in the order of COCOeval.stats
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# the fields of COCOeval.evaluate's finding in an image that COCOeval.accumulate reads
KEPT = ("dtScores", "dtMatches", "dtIgnore", "gtIgnore")


class AveragePrecision:
    """COCO's average precision and recall; equal to pycocotools' for all images at once, without holding all results.

    Args:
        instances: COCO's format for detection, "annotations" and "categories"; as `check_instances` returns it.
        iou_type: "bbox" or "segm".
    """

    def __init__(self, instances: Mapping[str, Any], iou_type: str) -> None:
        self.iou_type = iou_type
        self._categories = instances["categories"]
        self._truth: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in instances["annotations"]:
            self._truth[annotation["image_id"]].append(annotation)
        self._found: dict[int, list[dict[str, np.ndarray] | None]] = {}  # of each image, by category, then area range

    def add(self, image: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
        """Matches the results of an image with its truth.

        Args:
            image: its record in COCO's format, with "id", "width" and "height".
            results: COCO results: "category_id", "score", and "bbox" (x, y, width, height) or "segmentation" (RLE),
                by `iou_type`. Results of categories that the truth does not list do not count.
        """
        truth = _coco([image], self._truth[image["id"]], self._categories)
        with _silent():
            found = truth.loadRes([{**result, "image_id": image["id"]} for result in results]) if results else COCO()
            evaluation = COCOeval(truth, found, self.iou_type)
            evaluation.evaluate()
        self._found[image["id"]] = [_slim(found) for found in evaluation.evalImgs]

    def summary(self) -> dict[str, Any]:
        """`METRICS`, in percent, and "per_class": each category's name and "AP", by its id as a string.

        None where there is no truth to find, for which pycocotools has -1.
        """
        evaluation = COCOeval(iouType=self.iou_type)
        params = evaluation.params
        params.imgIds = sorted(self._found)  # the order decides between equal scores
        params.catIds = sorted({category["id"] for category in self._categories})
        evaluation._paramsEval = copy.deepcopy(params)
        by_image = [self._found[image] for image in params.imgIds]
        evaluation.evalImgs = [found for images in zip(*by_image, strict=True) for found in images]
        with _silent():
            evaluation.accumulate()
            evaluation.summarize()
        names = {category["id"]: category["name"] for category in self._categories}
        precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, category] of all areas, most detections
        per_class = {
            str(category): {"name": names[category], "AP": _percent(_mean(precision[:, :, index]))}
            for index, category in enumerate(params.catIds)
        }
        stats = {name: _percent(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
        return {**stats, "per_class": per_class}


def check_instances(instances: Mapping[str, Any], image_ids: Container[int], where: str) -> dict[str, Any]:
    """The true objects of some images: annotations numbered from 1, segmentations as RLE if all of them have one.

    pycocotools takes a match with the annotation of id 0 for none, hence the numbers.

    Args:
        instances: COCO's format for detection, as `layout.read_annotations` gives it.
        image_ids: the images.
        where: the file, for messages.

    Raises:
        ValueError: an annotation lacks an area or a box, its category is not listed, or its segmentation is none of
            polygons, run lengths and RLE, or not of the image's size.
    """
    categories = {category["id"] for category in instances["categories"]}
    chosen: dict[str, dict[str, Any]] = {}
    for index, annotation in enumerate(instances["annotations"]):
        if annotation["image_id"] in image_ids:
            chosen[f"{where}: annotations[{index}]"] = {"iscrowd": 0, **annotation, "id": len(chosen) + 1}
    for at, annotation in chosen.items():
        box, area = annotation.get("bbox"), annotation.get("area")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
            raise ValueError(f"{at} must have 'bbox' [x, y, width, height], got {box!r}")
        if not isinstance(area, int | float):
            raise ValueError(f"{at} must have a number 'area', got {area!r}")
        if annotation["iscrowd"] not in (0, 1):
            raise ValueError(f"{at} must have 'iscrowd' 0 or 1, got {annotation['iscrowd']!r}")
        if annotation.get("category_id") not in categories:
            raise ValueError(f"{at} has category_id {annotation.get('category_id')!r}, which is not listed")
    annotations = list(chosen.values())
    if has_masks(annotations):
        coco = _coco(instances["images"], annotations, instances["categories"])
        for at, annotation in chosen.items():
            annotation["segmentation"] = _run_lengths(coco, annotation, at)
    return {"annotations": annotations, "categories": instances["categories"]}


def _run_lengths(coco: COCO, annotation: dict[str, Any], at: str) -> dict[str, Any]:
    try:
        found = coco.annToRLE(annotation)
        size = list(found["size"])
    except Exception as error:  # pycocotools raises anything, Exception included
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{at} has an unreadable 'segmentation': {reason}") from error
    image = coco.imgs[annotation["image_id"]]
    if size != [image["height"], image["width"]]:
        raise ValueError(f"{at} has a 'segmentation' of size {size}, its image {[image['height'], image['width']]}")
    return found


def has_masks(annotations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every annotation has a segmentation."""
    return all(annotation.get("segmentation") for annotation in annotations)


def _coco(images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with _silent():
        coco.createIndex()
    return coco


def _slim(found: dict[str, Any] | None) -> dict[str, np.ndarray] | None:
    """The part of COCOeval's finding that is needed later; matches as bool, which is how it reads their ids."""
    if found is None:
        return None
    return {**{key: np.asarray(found[key]) for key in KEPT}, "dtMatches": found["dtMatches"] != 0}


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
