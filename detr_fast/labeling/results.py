"""The result files of a labelled data set, made from the manifest one image after the other."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detr_fast.files import open_atomic, sync
from detr_fast.labeling.formats import FORMATS
from detr_fast.labeling.manifest import Manifest, Run
from detr_fast.predictor import unnamed_category

FAILURES_SHOWN = 100


@dataclass
class LabelSummary:
    """The outcome of a run, in counts of images and segments.

    Attributes:
        labelled, failed: how many; together all that were found.
        segments: how many there are in the labelled ones.
        classes: how many segments each class id has.
        areas: how many segments have an area in pixels, in binary, of so many digits.
        failures: the first of failures.jsonl.
        computed: images that this run labelled itself, without the images of the run that it resumed.
        seconds: the time that they took.
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


def write_results(manifest: Manifest, run: Run, out: Path) -> tuple[LabelSummary, array[int]]:
    """Writes the result files of the run's formats and, last of all, failures.jsonl.

    Returns:
        The summary, and the ids of the images that are labelled.

    Raises:
        OSError: a file cannot be written.
    """
    summary, labelled = LabelSummary(), array("q")
    formats = [FORMATS[name] for name in run.settings["formats"]]
    with ExitStack() as stack:
        failures = stack.enter_context(open_atomic(out / "failures.jsonl"))
        writers = [stack.enter_context(format.writer(out)) for format in formats]
        for file, image_id, record in manifest.read():
            summary.add(file, record)
            if "error" in record:
                failures.write(f"{json.dumps({'file': file, 'error': record['error']})}\n".encode())
                continue
            labelled.append(image_id)
            for writer in writers:
                writer.add(image_id, file, record)
        categories = found_categories(run, summary)
        for writer in writers:
            writer.end(categories)
    for name in (*(name for format in formats for name in format.results), "failures.jsonl"):
        sync(out / name)
    sync(out)
    return summary, labelled


def found_categories(run: Run, summary: LabelSummary) -> list[dict[str, Any]]:
    """The model's categories, and any other class that was found."""
    named = {category["id"]: category for category in run.categories}
    return list(
        (named | {index: unnamed_category(index) for index in sorted(summary.classes) if index not in named}).values()
    )
