"""The files of a data set: where they are, and how to read annotations."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Split:
    """The files of one split; at least one of the two JSONs is there.

    Attributes:
        images: folder of the images.
        instances_json: annotations in COCO's format for detection, None where there are none.
        panoptic_json: annotations in COCO's panoptic format, None where there are none.
        panoptic_pngs: folder of the PNGs of `panoptic_json`, None with it.
    """

    images: Path
    instances_json: Path | None
    panoptic_json: Path | None
    panoptic_pngs: Path | None


def find_split(folder: str | os.PathLike[str], split: str | None = None) -> Split:
    """The files of a data set in either of two layouts.

    As `detr-fast synth` writes it, which has no splits: `images/`, and `panoptic.json` with `panoptic/`, or
    `instances.json`, or both. As COCO comes: `SPLIT/`, `annotations/instances_SPLIT.json`, and
    `annotations/panoptic_SPLIT.json` with `annotations/panoptic_SPLIT/` (or `panoptic_SPLIT/`); one JSON is enough.

    Args:
        folder: the data set.
        split: such as "train2017"; None for a data set without splits, and for "val2017" of one that has them.

    Raises:
        ValueError: the folder, or a part of the layout, is missing, or the data set has no splits and `split`
            is given; the message names it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no folder {root}")
    annotations = root / "annotations"
    if not annotations.is_dir():
        if split is not None:
            raise ValueError(f"{root} has no splits, as it has no annotations/; asked for {split!r}")
        return _split(root / "images", root / "instances.json", root / "panoptic.json", [root / "panoptic"])
    split = split or "val2017"
    pngs = [annotations / f"panoptic_{split}", root / f"panoptic_{split}"]
    instances, panoptic = (annotations / f"{task}_{split}.json" for task in ("instances", "panoptic"))
    return _split(root / split, instances, panoptic, pngs)


def _split(images: Path, instances_json: Path, panoptic_json: Path, pngs: list[Path]) -> Split:
    if not images.is_dir():
        raise ValueError(f"no folder {images}, which should hold the images")
    if not (instances_json.is_file() or panoptic_json.is_file()):
        raise ValueError(f"no annotations: neither {instances_json} nor {panoptic_json}")
    found = instances_json if instances_json.is_file() else None
    if not panoptic_json.is_file():
        return Split(images, found, None, None)
    for folder in pngs:
        if folder.is_dir():
            return Split(images, found, panoptic_json, folder)
    archive = pngs[0].with_suffix(".zip")
    hint = f"unpack {archive}" if archive.is_file() else f"which should hold the PNGs of {panoptic_json.name}"
    raise ValueError(f"no folder {pngs[0]}: {hint}")


def panoptic_ids(picture: Image.Image) -> np.ndarray:
    """The segment ids of a panoptic PNG, R + 256 G + 65536 B.

    Args:
        picture: mode RGB or RGBA, of H x W pixels.

    Returns:
        uint32 [H, W].
    """
    pixels = picture.tobytes("raw", "RGBX" if picture.mode == "RGB" else "RGBA")  # 4 bytes a pixel: one integer
    return np.frombuffer(pixels, "<u4").reshape(picture.height, picture.width) & 0xFFFFFF


def read_annotations(path: Path) -> dict[str, Any]:
    """The contents of a COCO JSON: "images", "annotations" and "categories" are lists of objects, each with an "id" or,
    in panoptic annotations, an "image_id".

    Raises:
        ValueError: the file is not such a JSON; the message names the file and the fault.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    keys: dict[str, dict[str, type]] = {
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"image_id": int},
        "categories": {"id": int, "name": str},
    }
    for name, fields in keys.items():
        if not isinstance(content.get(name), list):
            raise ValueError(f"{path} must have a list {name!r}, got {type(content.get(name)).__name__}")
        for index, entry in enumerate(content[name]):
            for key, kind in fields.items():
                if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                    given = repr(entry.get(key)) if isinstance(entry, dict) else type(entry).__name__
                    raise ValueError(f"{path}: {name}[{index}] must have {key!r} of type {kind.__name__}, got {given}")
    return content
