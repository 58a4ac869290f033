"""A format that is not ours goes through every step of labeling: what it writes of an image, and at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from detr_fast.files import open_atomic
from detr_fast.labeling.formats import FOLDERS, FORMATS, RESULTS, Format, ImageLabels, Writer
from detr_fast.labeling.listing import listing_hash
from detr_fast.labeling.manifest import Manifest, Run
from detr_fast.labeling.results import write_results
from detr_fast.labeling.shards import merge_shards
from detr_fast.labeling.stages import Writing, encode


class Boxes(Format):
    """Boxes as text for each image, and a list of all images."""

    name = "boxes"
    folder = "boxes"
    results = ("boxes.txt",)

    def path(self, file: str) -> str:
        return f"boxes/{file}.txt"

    def encode(self, labels: ImageLabels) -> bytes:
        return "".join(f"{info['category_id']} {info['bbox']}\n" for info in labels.segments_info).encode()

    def record(self, labels: ImageLabels) -> dict[str, Any]:
        return {"boxes": len(labels.segments_info)}

    @contextmanager
    def writer(self, out: Path) -> Iterator[Writer]:
        with open_atomic(out / "boxes.txt") as file:
            yield BoxList(file)


class BoxList(Writer):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, image_id: int, file: str, record: dict[str, Any]) -> None:
        self._file.write(f"{image_id} {file} {record['boxes']}\n".encode())

    def end(self, categories: list[dict[str, Any]]) -> None:
        self._file.write(f"{len(categories)} classes\n".encode())


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "boxes", Boxes())


def run_of(out: Path, files: list[str], mine: list[str], shard: str | None) -> None:
    """What a run leaves that labels two segments in each image, one of which is too small."""
    info = {"id": 1, "category_id": 7, "isthing": True, "score": 0.5, "area": 2, "bbox": [0, 0, 2, 1]}
    small = {"id": 2, "category_id": 8, "isthing": True, "score": 0.5, "area": 1, "bbox": [2, 0, 1, 1]}
    categories = [{"id": 7, "name": "seven", "isthing": 1, "color": [0, 0, 0]}]
    run = Run({"formats": ["boxes"]}, "images", shard, categories, len(files), listing_hash(files))
    out.mkdir()
    run.write(out)
    with Manifest(out, run.key, files) as manifest:
        for file in mine:
            encoded = encode(file, np.array([[1, 1, 2]]), [info, small], Writing(out, ("boxes",), None, 2, 250))
            encoded.write(out)
            manifest.append([(file, encoded.record)])
        write_results(manifest, run, out)


def test_a_format_writes_of_each_image_and_at_the_end(boxes: None, tmp_path: Path) -> None:
    files = ["a.jpg", "sub/b.png"]
    run_of(tmp_path / "out", files, files, None)
    assert (tmp_path / "out" / "boxes" / "sub" / "b.png.txt").read_text() == "7 [0, 0, 2, 1]\n"
    assert (tmp_path / "out" / "boxes.txt").read_text() == "1 a.jpg 1\n2 sub/b.png 1\n1 classes\n"
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert line["boxes"] == 1 and "rle" not in line
    assert not (tmp_path / "out" / "panoptic.json").exists()


def test_merge_copies_its_files_and_writes_its_end(boxes: None, tmp_path: Path) -> None:
    files = ["a.jpg", "sub/b.png"]
    run_of(tmp_path / "whole", files, files, None)
    for number, file in enumerate(files, start=1):
        run_of(tmp_path / str(number), files, [file], f"{number}/2")
    merge_shards([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    for name in ("boxes.txt", "boxes/a.jpg.txt", "boxes/sub/b.png.txt"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_formats_do_not_share_names() -> None:
    assert list(FORMATS) == [format.name for format in FORMATS.values()]
    assert len(set(FOLDERS)) == len(FOLDERS) and len(set(RESULTS)) == len(RESULTS)
    assert RESULTS == ("panoptic.json", "instances.json")
