"""COCO's data sets for training: detection and panoptic segmentation, with COCO's categories or any others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset

from detr_fast.categories import COCO_PANOPTIC, Category, palette_color
from detr_fast.data import transforms as T
from detr_fast.data.layout import Split, find_split, panoptic_ids, read_annotations
from detr_fast.data.transforms import Target
from detr_fast.images import IMAGENET_MEAN, IMAGENET_STD, read_image

LARGEST = 1e9  # of a coordinate or an area
MAX_CATEGORY = 65535  # `DetrConfig.num_classes` is at most one more


class AnnotationError(ValueError):
    """An image or its annotation cannot be used; the message names the file."""


class Sample(NamedTuple):
    """An image as read, its target in pixels, and the faults of the annotations that were left out."""

    image: Image.Image
    target: Target
    problems: list[str]


class _Record(NamedTuple):
    """An image's entry in the JSON, its objects, and the name of its panoptic PNG."""

    image: dict[str, Any]
    objects: list[dict[str, Any]]
    png: str = ""


class CocoDataset(Dataset):
    """The base of both kinds. Targets are facebookresearch/detr's: a dict with

    - "boxes" float32 [N,4]: x0, y0, x1, y1 in pixels, as the transforms take them; (cx, cy, w, h) in [0,1] after
      `transforms.Normalize`;
    - "labels" int64 [N]: category ids, which are the model's class indices;
    - "masks" bool [N,H,W], with `masks=True`;
    - "area" float32 [N] in pixels, "iscrowd" int64 [N], all 0: crowds are left out, and so are empty boxes and masks;
    - "image_id" int64 [1], "orig_size" and "size" int64 [2]: (height, width).

    Args:
        data: the data set's folder, as `layout.find_split` knows it, or the files as a `Split`.
        split: which one, where the folder has several; "train2017" if None.
        masks: put masks into the targets.
        transforms: called as (image, target).
        bad_annotations: "fail" or "skip" those that cannot be used. Skipped ones are listed in `problems`.

    Attributes:
        categories: dicts with "id", "name", "isthing" and "color".
        num_classes: the largest category id and 1; 250 for COCO's panoptic categories, as upstream.
        problems: a line for each bad annotation found in the JSON. Faults that show only when an image is read are in
            `read`'s sample, or raised.

    Raises:
        ValueError: a missing file or folder, a JSON of another format, or, to fail, a bad annotation.
        AnnotationError: by `read` and indexing: an image or a PNG that cannot be read or does not fit the JSON.
    """

    kind = ""

    def __init__(
        self,
        data: Split | str | os.PathLike[str],
        split: str | None = None,
        *,
        masks: bool,
        transforms: Callable[..., Any] | None = None,
        bad_annotations: str = "fail",
    ):
        if bad_annotations not in ("fail", "skip"):
            raise ValueError(f"bad_annotations must be fail or skip, got {bad_annotations!r}")
        self.split = data if isinstance(data, Split) else find_training_split(data, split)
        self.masks = masks
        self.transforms = transforms
        self.bad_annotations = bad_annotations
        self.path = self._json()
        content = read_annotations(self.path)
        self.categories = _categories(content["categories"], self.path)
        self.num_classes = _num_classes(self.categories)
        self.problems: list[str] = []
        self._ids = {category["id"] for category in self.categories}
        self._records = self._index(content)
        if self.problems and bad_annotations == "fail":
            raise ValueError(f"{len(self.problems)} bad annotations, the first: {self.problems[0]}")
        if not self._records:
            raise ValueError(f"{self.path} has no usable images")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        sample = self.read(index)
        if sample.problems and self.bad_annotations == "fail":
            raise AnnotationError(sample.problems[0])
        return self.transformed(sample)

    def transformed(self, sample: Sample) -> tuple[Any, Target]:
        """A sample after `transforms`: (image, target), the target without masks if `masks` is False."""
        image, target = self.transforms(sample.image, sample.target) if self.transforms else sample[:2]
        return image, target if self.masks else {key: value for key, value in target.items() if key != "masks"}

    def read(self, index: int) -> Sample:
        """Image `index`, in the order of ids, without transforms."""
        record = self._records[index]
        path = self.split.images / record.image["file_name"]
        try:
            image = read_image(path, exif=False)  # annotations are of the pixels as stored
        except (OSError, ValueError) as error:
            raise AnnotationError(str(error)) from error
        size = (record.image["width"], record.image["height"])
        if image.size != size:
            raise AnnotationError(f"{path}: {image.width} x {image.height}, but {self.path.name} says {_times(size)}")
        problems: list[str] = []
        target = self._target(record, problems)
        target["image_id"] = torch.tensor([record.image["id"]])
        target["orig_size"] = target["size"] = torch.tensor([image.height, image.width])
        return Sample(image, target, [f"{path}: {problem}" for problem in problems])

    def _json(self) -> Path:
        raise NotImplementedError

    def _index(self, content: dict[str, Any]) -> list[_Record]:
        raise NotImplementedError

    def _target(self, record: _Record, problems: list[str]) -> Target:
        raise NotImplementedError

    def _bad(self, problem: str) -> None:
        self.problems.append(f"{self.path}: {problem}")

    def _images(self, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """By id, ascending."""
        images: dict[int, dict[str, Any]] = {}
        for image in content["images"]:
            name = image["file_name"]
            if image["id"] in images:
                self._bad(f"image id {image['id']} is there twice, as {images[image['id']]['file_name']} and {name}")
            elif image["width"] < 1 or image["height"] < 1:
                self._bad(f"image {name} has a size of {image['width']} x {image['height']}")
            elif not (self.split.images / name).is_file():
                self._bad(f"no file {self.split.images / name}")
            else:
                images[image["id"]] = image
        return dict(sorted(images.items()))

    def _fault(self, entry: Any) -> str | None:
        """The fault of an object's entry, None for a usable one."""
        if not isinstance(entry, dict):
            return f"an object is {type(entry).__name__}, not a dict"
        if type(entry.get("category_id")) is not int or entry["category_id"] not in self._ids:
            return f"object {entry.get('id')} has category_id {entry.get('category_id')!r}, which is no category"
        if entry.get("iscrowd", 0) not in (0, 1):
            return f"object {entry.get('id')} has iscrowd {entry['iscrowd']!r}, neither 0 nor 1"
        return None


class CocoDetection(CocoDataset):
    """COCO's detection format: boxes, and masks from polygons or RLE. See `CocoDataset` for arguments and targets."""

    def __init__(self, data: Split | str | os.PathLike[str], split: str | None = None, **options: Any):
        super().__init__(data, split, **{"masks": False, **options})

    def _json(self) -> Path:
        if self.split.instances_json is None:
            raise ValueError(f"no instance annotations beside {self.split.panoptic_json}")
        return self.split.instances_json

    def _index(self, content: dict[str, Any]) -> list[_Record]:
        images = self._images(content)
        listed = {image["id"] for image in content["images"]}
        objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        for entry in content["annotations"]:
            fault = self._fault(entry)
            if fault is None and not _is_box(entry.get("bbox")):
                fault = f"object {entry.get('id')} has bbox {entry.get('bbox')!r}, not [x, y, width, height] >= 0"
            if fault is None and entry["image_id"] not in listed:
                fault = f"object {entry.get('id')} belongs to image {entry['image_id']}, which is not listed"
            if fault is not None:
                self._bad(fault)
            elif entry["image_id"] in objects and not entry.get("iscrowd", 0):
                objects[entry["image_id"]].append(entry)
        return [_Record(image, objects[image_id]) for image_id, image in images.items()]

    def _target(self, record: _Record, problems: list[str]) -> Target:
        height, width = record.image["height"], record.image["width"]
        objects, masks = record.objects, []
        if self.masks:
            objects = []
            for entry in record.objects:
                try:
                    masks.append(decode_segmentation(entry.get("segmentation"), height, width))
                    objects.append(entry)
                except ValueError as error:
                    problems.append(f"object {entry.get('id')}: {error}")
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        target = _target(boxes, objects)
        areas = [entry.get("area") for entry in objects]
        given = torch.tensor([area if _are_finite([area]) else -1.0 for area in areas])
        target["area"] = given.where(given >= 0, (boxes[:, 2:] - boxes[:, :2]).prod(1))
        if self.masks:
            empty = torch.zeros((0, height, width), dtype=torch.bool)
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else empty
        return drop_empty(target)


class CocoPanoptic(CocoDataset):
    """COCO's panoptic format: a segment is an object. Boxes are the tight boxes of the segments' pixels, in which
    upstream's lack the last row and column. See `CocoDataset` for arguments and targets.
    """

    def __init__(self, data: Split | str | os.PathLike[str], split: str | None = None, **options: Any):
        super().__init__(data, split, **{"masks": True, **options})

    def _json(self) -> Path:
        if self.split.panoptic_json is None or self.split.panoptic_pngs is None:
            raise ValueError(f"no panoptic annotations beside {self.split.instances_json}")
        return self.split.panoptic_json

    def _index(self, content: dict[str, Any]) -> list[_Record]:
        assert self.split.panoptic_pngs is not None
        images = self._images(content)
        listed = {image["id"] for image in content["images"]}
        records: dict[int, _Record] = {}
        for annotation in content["annotations"]:
            image_id, png = annotation["image_id"], annotation.get("file_name")
            if image_id not in listed:
                self._bad(f"an annotation belongs to image {image_id}, which is not listed")
            elif image_id in records:
                self._bad(f"image {image_id} has two annotations, {records[image_id].png} and {png}")
            elif not isinstance(png, str) or not isinstance(annotation.get("segments_info"), list):
                self._bad(f"the annotation of image {image_id} must have a file_name and a list segments_info")
            elif image_id in images and not (self.split.panoptic_pngs / png).is_file():
                self._bad(f"no file {self.split.panoptic_pngs / png}")
            elif image_id in images:
                segments = self._segments(png, annotation["segments_info"])
                records[image_id] = _Record(images[image_id], segments, png)
        for image_id in images.keys() - {annotation["image_id"] for annotation in content["annotations"]}:
            self._bad(f"image {images[image_id]['file_name']} has no annotation")
        return [records[image_id] for image_id in images if image_id in records]

    def _segments(self, png: str, segments_info: list[Any]) -> list[dict[str, Any]]:
        segments: dict[int, dict[str, Any]] = {}
        for info in segments_info:
            fault = self._fault(info)
            if fault is None and (type(info.get("id")) is not int or not 0 < info["id"] < 2**24):
                fault = f"a segment has id {info.get('id')!r}, not a whole number from 1 to 16777215"
            if fault is None and info["id"] in segments:
                fault = f"segment {info['id']} is there twice"
            if fault is None:
                segments[info["id"]] = info
            else:
                self._bad(f"{png}: {fault}")
        return list(segments.values())

    def _target(self, record: _Record, problems: list[str]) -> Target:
        assert self.split.panoptic_pngs is not None
        path = self.split.panoptic_pngs / record.png
        try:
            ids = panoptic_ids(read_image(path, exif=False))
        except (OSError, ValueError) as error:
            raise AnnotationError(str(error)) from error
        size = (record.image["width"], record.image["height"])
        if ids.shape[::-1] != size:
            raise AnnotationError(f"{path}: {_times(ids.shape[::-1])}, but the image has {_times(size)}")
        objects = [info for info in record.objects if not info.get("iscrowd", 0)]
        segments = np.array([info["id"] for info in objects], dtype=np.uint32)
        masks = ids == segments[:, None, None]
        areas = [int(np.count_nonzero(mask)) for mask in masks]
        problems += [
            f"segment {info['id']} has no pixel in {path}"
            for info, area in zip(objects, areas, strict=True)
            if not area
        ]
        target = _target(mask_boxes(torch.from_numpy(masks)), objects)
        target["area"] = torch.tensor(areas, dtype=torch.float32)
        target["masks"] = torch.from_numpy(masks)
        return drop_empty(target)


def find_training_split(folder: str | os.PathLike[str], split: str | None = None) -> Split:
    """As `layout.find_split`, with "train2017" for None where the data set has splits."""
    if split is None and (Path(folder) / "annotations").is_dir():
        split = "train2017"
    return find_split(folder, split)


def training_transforms(size: int = 800, max_size: int = 1333, augment: str = "paper") -> T.Compose:
    """The paper's augmentation (section A.4; facebookresearch/detr, datasets/coco.py), scaled so that `size` takes the
    place of 800 pixels.

    Args:
        size: of the short side, the largest.
        max_size: the most of the long side, about.
        augment: "paper": flip, then resize to one of eleven sizes, or crop first; "flip": flip, resize to `size`;
            "none": resize to `size`.
    """

    def scaled(pixels: int) -> int:
        return max(1, round(pixels * size / 800))

    def resize(*sizes: int) -> T.RandomResize:
        return T.RandomResize([scaled(pixels) for pixels in sizes], max_size)

    scales = resize(*range(480, 801, 32))
    before_crop = T.RandomResize([scaled(pixels) for pixels in (400, 500, 600)])
    cropped = T.Compose([before_crop, T.RandomSizeCrop(scaled(384), scaled(600)), fit_to_masks, scales])
    augmentations: dict[str, list[T.Transform]] = {
        "paper": [T.RandomHorizontalFlip(), T.RandomSelect(scales, cropped)],
        "flip": [T.RandomHorizontalFlip(), resize(800)],
        "none": [resize(800)],
    }
    if augment not in augmentations:
        raise ValueError(f"augment must be one of {', '.join(augmentations)}, got {augment!r}")
    normalize = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return T.Compose(
        [*augmentations[augment], lambda image, target: (image, drop_empty(target)), T.ToTensor(), normalize]
    )


def fit_to_masks(image: Any, target: Target) -> tuple[Any, Target]:
    """After a crop: tight boxes of the remaining masks; the crop itself only cuts an object's box."""
    if "masks" not in target:
        return image, target
    return image, drop_empty({**target, "boxes": mask_boxes(target["masks"])})


def drop_empty(target: Target) -> Target:
    """Without the objects whose box has no area, or whose mask has no pixel."""
    x0, y0, x1, y1 = target["boxes"].unbind(-1)
    keep = (x1 > x0) & (y1 > y0)
    if "masks" in target:
        keep &= _any(target["masks"], (1, 2))
    if keep.all():
        return target
    keys = ("boxes", "labels", "masks", "area", "iscrowd")
    return {key: value[keep] if key in keys else value for key, value in target.items()}


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes float32 [N,4], x0, y0, x1, y1 in pixels, of masks bool [N,H,W]; all 0 for an empty mask."""

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and one past the last True of [N,L]."""
        numbers = torch.arange(1, line.shape[1] + 1) * line
        last = numbers.amax(1)
        return torch.where(line, numbers, line.shape[1] + 1).amin(1).sub(1).minimum(last), last

    if not len(masks):
        return torch.zeros(0, 4)
    (x0, x1), (y0, y1) = ends(_any(masks, 1)), ends(_any(masks, 2))
    return torch.stack((x0, y0, x1, y1), dim=1).float()


def _any(masks: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """masks.any(dim), which takes 30 times as long on bools; False where there are no masks."""
    return masks.view(torch.uint8).amax(dim).bool() if masks.numel() else masks.any(dim)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask bool [H,W] of COCO's polygons, or of its run lengths, compressed or not.

    Raises:
        ValueError: it is none of these, or does not fit the image.
    """
    if isinstance(segmentation, list) and segmentation:
        if not all(_is_polygon(polygon, 2 * max(height, width)) for polygon in segmentation):
            raise ValueError("a polygon must be a list of at least 3 points x0, y0, x1, y1, ... about the image")
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)
    if not isinstance(segmentation, dict):
        raise ValueError(f"segmentation must be polygons or run lengths, got {type(segmentation).__name__}")
    if segmentation.get("size") != [height, width]:
        raise ValueError(f"run lengths of size {segmentation.get('size')!r}, but the image has {[height, width]}")
    counts = segmentation.get("counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths must be a list of whole numbers of at least 0, or a string made of one")
    if sum(runs) != height * width:
        raise ValueError(f"run lengths add up to {sum(runs)} pixels, but the image has {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _is_polygon(polygon: Any, limit: float) -> bool:
    points = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and _are_finite(polygon)
    return points and all(-limit <= coordinate <= limit for coordinate in polygon)


def _uncompressed(counts: str) -> list[int]:
    """pycocotools' strings: 5 bits a character, least significant first, each number less the last but one. It reads
    damaged ones, too, and then returns memory as it was."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"run lengths have the character {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _target(boxes: torch.Tensor, objects: list[dict[str, Any]]) -> Target:
    labels = torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "iscrowd": torch.zeros(len(objects), dtype=torch.int64)}


def _categories(entries: list[dict[str, Any]], path: Path) -> list[Category]:
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        number = entry["id"]
        if not 0 <= number <= MAX_CATEGORY:
            raise ValueError(f"{path}: category ids must be from 0 to {MAX_CATEGORY}, got {number}")
        if number in categories:
            raise ValueError(f"{path}: category id {number} is there twice")
        isthing, color = entry.get("isthing", 1), entry.get("color")
        if isthing not in (0, 1):
            raise ValueError(f"{path}: isthing of category {number} must be 0 or 1, got {isthing!r}")
        if not (isinstance(color, list) and len(color) == 3 and all(type(c) is int and 0 <= c < 256 for c in color)):
            color = palette_color(index)
        categories[number] = {"id": number, "name": entry["name"], "isthing": int(isthing), "color": color}
    if not categories:
        raise ValueError(f"{path} has no categories")
    return list(categories.values())


def _num_classes(categories: list[Category]) -> int:
    ids = {category["id"] for category in categories}
    return 250 if ids == {category["id"] for category in COCO_PANOPTIC} else max(ids) + 1


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and _are_finite(box) and box[2] >= 0 and box[3] >= 0


def _are_finite(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and -LARGEST < value < LARGEST for value in values)


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
