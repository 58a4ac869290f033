"""A folder of images to a COCO panoptic data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import detr_fast
from detr_fast.labeling import writers
from detr_fast.predictor import Predictor, PreparedImage

# Batches are made of images of one shape; looking this many batches ahead finds them without holding a whole folder.
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class LabelSummary:
    """What became of the images: so many `labelled`, with so many `segments`, and `failures` as in failures.jsonl."""

    labelled: int
    segments: int
    failures: list[dict[str, str]]


def find_images(folder: Path, out: Path) -> list[str]:
    """The images of a folder and its sub-folders, sorted, as POSIX paths relative to it.

    An image is what has one of `writers.IMAGE_SUFFIXES` in any case. Symbolic links to folders are not followed, and
    `out` is left out if it lies within.

    Raises:
        ValueError: `folder` is none, is `out` itself, or holds no images.
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {folder}")
    skipped = out.resolve()
    if folder.resolve() == skipped:
        raise ValueError(f"images and out must be different folders, got {folder} for both")
    files = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if Path(parent, name).resolve() != skipped]
        files += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in names
            if name.lower().endswith(writers.IMAGE_SUFFIXES)
        ]
    if not files:
        raise ValueError(f"no images in {folder}: no file ends in {', '.join(writers.IMAGE_SUFFIXES)}")
    return sorted(files)


def label(
    images: str | os.PathLike[str], out: str | os.PathLike[str], predictor: Predictor, progress: bool = False
) -> LabelSummary:
    """Labels every image of a folder and writes the result in COCO's formats.

    Writes below `out`: `panoptic/` with a PNG for each image (id = R + 256 G + 65536 B, 0 = void; named by
    `writers.png_name`), `panoptic.json`, `instances.json` (COCO results with RLE, of the things) and `failures.jsonl`,
    one `{"file", "error"}` a line for each image that could not be read. Image ids count from 1 in the order of the
    listing. The files do not depend on `predictor.batch_size`.

    Args:
        images: the folder; `out` may lie in it and is then not searched.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `images` is no folder, holds no images or equals `out`, or the model has no mask head.
        OSError: a folder cannot be read or a file cannot be written.
    """
    images, out = Path(images), Path(out)
    files = find_images(images, out)
    if not predictor.panoptic:
        raise ValueError("labeling needs a panoptic model, got one without a mask head")

    categories = {category["id"]: category for category in predictor.categories}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with tqdm(total=len(files), unit="image", disable=not progress) as bar:
        for chunk in _chunks(list(enumerate(files, start=1)), BATCHES_AHEAD * predictor.batch_size):
            prepared: dict[tuple[int, str], PreparedImage] = {}
            for image_id, file in chunk:
                try:
                    prepared[image_id, file] = _prepare(images / file, predictor)
                except (ValueError, OSError) as error:
                    failures.append({"file": file, "error": str(error).removeprefix(f"{images / file}: ")})
            for (image_id, file), result in zip(prepared, predictor.predict(list(prepared.values())), strict=True):
                assert result.segmentation is not None  # the model is panoptic
                height, width = result.segmentation.shape
                categories |= {category["id"]: category for category in result.categories}
                records.append({"id": image_id, "file_name": file, "width": width, "height": height})
                annotations.append(writers.panoptic_annotation(image_id, file, result.segments_info))
                instances += writers.instance_results(image_id, result.segmentation, result.segments_info)
                writers.write_atomic(out / "panoptic" / writers.png_name(file), result.to_png())
            bar.update(len(chunk))

    info = {"description": "panoptic labels", "version": detr_fast.__version__, "contributor": "detr_fast"}
    writers.write_json(
        out / "panoptic.json",
        {"info": info, "images": records, "annotations": annotations, "categories": list(categories.values())},
    )
    writers.write_json(out / "instances.json", instances)
    writers.write_json_lines(out / "failures.jsonl", failures)
    segments = sum(len(annotation["segments_info"]) for annotation in annotations)
    return LabelSummary(len(records), segments, failures)


def _prepare(path: Path, predictor: Predictor) -> PreparedImage:
    if path.exists() and not path.is_file():  # a pipe or device could keep the reader waiting for ever
        raise ValueError("not a regular file")
    return predictor.prepare(path)


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
