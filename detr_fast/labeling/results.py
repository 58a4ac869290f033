"""The JSON of a labelled data set, made from the manifest one image after the other."""

from __future__ import annotations

import json
import shutil
import tempfile
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import detr_fast
from detr_fast.files import open_atomic, sync
from detr_fast.labeling import writers
from detr_fast.labeling.manifest import Manifest, Run
from detr_fast.predictor import unnamed_category

FAILURES_SHOWN = 100


@dataclass
class LabelSummary:
    """What became of the images that were found.

    Attributes:
        labelled, failed: how many; together all that were found.
        segments: how many there are in the labelled ones.
        classes: how many segments each class id has.
        areas: how many segments have an area in pixels, in binary, of so many digits.
        failures: the first of failures.jsonl.
        computed: how many of the images this run did itself, without those that it resumed.
        seconds: what it took for them.
    """

    labelled: int = 0
    failed: int = 0
    segments: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    areas: Counter[int] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0

    def add(self, file: str, record: dict[str, Any]) -> None:
        if "error" in record:
            self.failed += 1
            if self.failed <= FAILURES_SHOWN:
                self.failures.append({"file": file, "error": record["error"]})
            return
        self.labelled += 1
        self.segments += len(record["segments_info"])
        self.classes.update(info["category_id"] for info in record["segments_info"])
        self.areas.update(info["area"].bit_length() for info in record["segments_info"])


class _JsonList:
    """What `json.dumps` of a list gives, of which one value at a time is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._separator = b"["

    def add(self, value: Any) -> None:
        self._file.write(self._separator + json.dumps(value).encode())
        self._separator = b", "

    def end(self) -> None:
        self._file.write(b"[]" if self._separator == b"[" else b"]")


def write_results(manifest: Manifest, run: Run, out: Path) -> tuple[LabelSummary, array[int]]:
    """Writes panoptic.json and instances.json, where they are wanted, and failures.jsonl, last of all.

    Returns:
        What was counted, and the ids of the images that are labelled.

    Raises:
        OSError: a file cannot be written.
    """
    summary, labelled = LabelSummary(), array("q")
    formats = run.settings["formats"]
    with ExitStack() as stack:
        failures = stack.enter_context(open_atomic(out / "failures.jsonl"))
        if "instances" in formats:
            instances = _JsonList(stack.enter_context(open_atomic(out / "instances.json")))
        if "panoptic" in formats:
            panoptic = stack.enter_context(open_atomic(out / "panoptic.json"))
            info = {"description": "panoptic labels", "version": detr_fast.__version__, "contributor": "detr_fast"}
            panoptic.write(b'{"info": ' + json.dumps(info).encode() + b', "images": ')
            later = stack.enter_context(tempfile.TemporaryFile(dir=out))
            records, annotations = _JsonList(panoptic), _JsonList(later)
        for file, image_id, record in manifest.read():
            summary.add(file, record)
            if "error" in record:
                failures.write(f"{json.dumps({'file': file, 'error': record['error']})}\n".encode())
                continue
            labelled.append(image_id)
            if "instances" in formats:
                for result in writers.instance_results(image_id, record):
                    instances.add(result)
            if "panoptic" in formats:
                size = {"width": record["width"], "height": record["height"]}
                records.add({"id": image_id, "file_name": file, **size})
                annotations.add(writers.panoptic_annotation(image_id, file, record))
        if "instances" in formats:
            instances.end()
        if "panoptic" in formats:
            records.end()
            annotations.end()
            later.seek(0)
            panoptic.write(b', "annotations": ')
            shutil.copyfileobj(later, panoptic)
            categories = json.dumps(found_categories(run, summary)).encode()
            panoptic.write(b', "categories": ' + categories + b"}")
    for name in ("panoptic.json", "instances.json", "failures.jsonl"):
        if (out / name).exists():
            sync(out / name)
    sync(out)
    return summary, labelled


def found_categories(run: Run, summary: LabelSummary) -> list[dict[str, Any]]:
    """The model's categories, and any other class that was found."""
    named = {category["id"]: category for category in run.categories}
    return list(
        (named | {index: unnamed_category(index) for index in sorted(summary.classes) if index not in named}).values()
    )
