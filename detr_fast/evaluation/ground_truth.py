"""The true objects and segments of a data set's images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from detr_fast.data.layout import Split, find_split, read_annotations
from detr_fast.evaluation.average_precision import check_instances
from detr_fast.images import read_image

SEGMENT_KEYS = {"id", "category_id", "area", "iscrowd"}


@dataclass(frozen=True)
class GroundTruth:
    """The true objects and segments of a data set's images.

    Attributes:
        split: where its files are.
        images: the records of the images in COCO's format, those that all annotation files list.
        instances: as `check_instances` gives them, None where there are none.
        panoptic: the panoptic annotation of each image id, None where there are none.
        panoptic_categories: dicts with "id", "name" and "isthing"; empty where `panoptic` is None.
        notes: a line for each thing that is missing or left out.
    """

    split: Split
    images: list[dict[str, Any]]
    instances: dict[str, Any] | None
    panoptic: dict[int, dict[str, Any]] | None
    panoptic_categories: list[dict[str, Any]]
    notes: list[str]

    @classmethod
    def read(cls, data: str | os.PathLike[str], split: str | None = None, limit: int | None = None) -> GroundTruth:
        """Reads and checks the annotations of a data set, and that the files they name are there.

        Args:
            data, split: as for `find_split`.
            limit: take the first so many images only.

        Raises:
            ValueError: the data set, a part of it or a file is missing, or an annotation is not in COCO's format.
            OSError: a file cannot be read.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        found = find_split(data, split)
        files = {
            name: (path, read_annotations(path))
            for name, path in (("panoptic", found.panoptic_json), ("instances", found.instances_json))
            if path is not None
        }
        images = _common_images([content["images"] for _, content in files.values()])
        panoptic, categories, instances, notes = None, [], None, []
        if "panoptic" in files:
            path, content = files["panoptic"]
            panoptic = _by_image(content, path)
            categories = content["categories"]
            images = [image for image in images if image["id"] in panoptic]
        else:
            notes.append("no PQ: the data set has no panoptic annotations")
        listed = max(len(content["images"]) for _, content in files.values())
        if len(images) < listed:
            notes.append(f"{listed - len(images)} of {listed} images are left out: no annotations of every kind")
        images = images[:limit]
        if not images:
            raise ValueError(f"no images with annotations in {' and '.join(str(path) for path, _ in files.values())}")
        if "instances" in files:
            path, content = files["instances"]
            instances = check_instances(content, {image["id"] for image in images}, str(path))
        else:
            notes.append("no AP: the data set has no instance annotations")
        expected = [found.images / image["file_name"] for image in images]
        if panoptic is not None and found.panoptic_pngs is not None:
            expected += [found.panoptic_pngs / panoptic[image["id"]]["file_name"] for image in images]
        missing = [path for path in expected if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(expected)} files are missing, the first is {missing[0]}")
        return cls(found, images, instances, panoptic, categories, notes)

    def read_image(self, record: Mapping[str, Any]) -> Image.Image:
        """A picture in the orientation that its annotations have, which is mostly that of the file: COCO ignores EXIF.

        Raises:
            ValueError: it is no image, or not of the size that the annotations say.
        """
        path, size = self.split.images / record["file_name"], (record["width"], record["height"])
        picture = read_image(path, exif=False)
        if picture.size != size:
            picture = read_image(path)
        if picture.size != size:
            raise ValueError(f"{path} is {picture.width} x {picture.height}, in its annotations {size[0]} x {size[1]}")
        return picture


def _common_images(lists: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    first, *others = ({image["id"]: image for image in images} for images in lists)
    return [image for key, image in first.items() if all(key in other for other in others)]


def _by_image(content: Mapping[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    for index, category in enumerate(content["categories"]):
        if category.get("isthing") not in (0, 1):
            raise ValueError(f"{path}: categories[{index}] must have 'isthing' 0 or 1, got {category.get('isthing')!r}")
    for index, annotation in enumerate(content["annotations"]):
        at = f"{path}: annotations[{index}]"
        if not isinstance(annotation.get("file_name"), str):
            raise ValueError(f"{at} must have a string 'file_name', got {annotation.get('file_name')!r}")
        if not isinstance(annotation.get("segments_info"), list):
            raise ValueError(f"{at} must have a list 'segments_info', got {annotation.get('segments_info')!r}")
        for segment in annotation["segments_info"]:
            if not isinstance(segment, dict) or not segment.keys() >= SEGMENT_KEYS:
                raise ValueError(f"{at}: each segment must have {', '.join(sorted(SEGMENT_KEYS))}, got {segment!r}")
    return {annotation["image_id"]: annotation for annotation in content["annotations"]}
