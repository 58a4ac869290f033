"""The labeling engine: its files, options, bad images, shards, report, and bounds."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco_mask

from contract import picture
from detr_fast.evaluation.panoptic_quality import panoptic_quality
from detr_fast.files import OccupiedError
from detr_fast.images import Pixels, grey_png, panoptic_png, run_lengths
from detr_fast.images.deflate import zlib_stream
from detr_fast.labeling import interrupt, pipeline
from detr_fast.labeling.listing import find_images
from detr_fast.labeling.local import LocalEngine
from detr_fast.labeling.manifest import Manifest
from detr_fast.labeling.pipeline import label
from detr_fast.labeling.shards import merge_shards
from detr_fast.labeling.stages import Reading, Writing, decode, encode
from detr_fast.postprocess import rgb_to_id
from detr_fast.predictor import Predictor
from detr_fast.preprocess import batch_of_size, image_to_tensor
from tiny import tiny_detr

SIZES = [(96, 64), (64, 96), (96, 64), (120, 50), (61, 83)]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_detr(), device="cpu", threshold=0.2, max_size=160)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        path = folder / ("sub" if number % 3 else "") / f"{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        picture(*SIZES[number % 5], seed=number).save(path)
    (folder / "bad.gif").write_text("not a picture")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {**files, "manifest.jsonl": b"\n".join(sorted(files["manifest.jsonl"].splitlines()))}


ALL = ("panoptic", "instances", "semantic")


@pytest.fixture(scope="module")
def labels(predictor: Predictor, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "out"
    summary = label(pictures, out, predictor, formats=ALL, workers=1)
    assert (summary.labelled, summary.failed) == (20, 1)
    return out


def with_options(predictor: Predictor, **options: Any) -> Predictor:
    return Predictor(predictor.model, device="cpu", **{"threshold": 0.2, "max_size": 160, **options})


# ---- encoding ----


@given(
    ids=arrays.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int32]),
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.integers(0, 3),
    ),
    scale=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=100, deadline=None)
def test_run_lengths_and_pngs_are_what_pycocotools_and_pillow_have(ids: np.ndarray, scale: tuple[int, int]) -> None:
    ids = np.kron(ids, np.ones(scale, dtype=ids.dtype))  # long runs, whose lengths take several letters
    for segment, counts in zip(range(5), run_lengths(ids, range(5)), strict=True):
        assert coco_mask.encode(np.asfortranarray(ids == segment, dtype=np.uint8))["counts"].decode() == counts
    large = ids.astype(np.int64) * (5_000_000 if ids.dtype == np.int32 else 80)
    assert np.array_equal(rgb_to_id(np.array(Image.open(io.BytesIO(panoptic_png(large))))), large)
    for values in ((ids * 60).astype(np.uint8), (ids.astype(np.int64) * 20_000).astype(np.uint16)):
        assert np.array_equal(np.array(Image.open(io.BytesIO(grey_png(values)))), values)


@given(
    pixels=st.lists(
        st.tuples(st.integers(0, 255), st.sampled_from([1, 2, 3, 86, 87, 88, 300]), st.integers(0, 600)), max_size=20
    )
)
@settings(max_examples=200, deadline=None)
def test_a_zlib_stream_of_sparse_bytes_is_zlibs(pixels: list[tuple[int, int, int]]) -> None:
    """Pixels, repeated, and cut off or with zeros after them."""
    parts = [(bytes([value, 0, 0]) * times + bytes(600))[: 3 * times - 2 + zeros] for value, times, zeros in pixels]
    data = b"".join([b"\x02", *parts])
    array = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(array)
    assert zlib.decompress(zlib_stream(places, array[places], len(data))) == data


def test_run_lengths_of_a_large_mask() -> None:
    """Counts of up to six letters, as of the largest images."""
    ids = np.zeros((9000, 4000), dtype=np.uint8)
    ids[:, 3990:], ids[-1, -1] = 1, 2
    for segment, counts in zip(range(4), run_lengths(ids, range(4)), strict=True):
        assert coco_mask.encode(np.asfortranarray(ids == segment, dtype=np.uint8))["counts"].decode() == counts
    assert run_lengths(ids, []) == []


def test_ids_without_a_colour_are_refused() -> None:
    for ids in ([[1 << 24]], [[-1]]):
        with pytest.raises(ValueError, match="ids must be"):
            panoptic_png(np.array(ids))


# ---- the data set ----


def test_files_agree_with_each_other_and_with_the_predictor(predictor: Predictor, pictures: Path, labels: Path) -> None:
    panoptic = json.loads((labels / "panoptic.json").read_text())
    instances = json.loads((labels / "instances.json").read_text())
    files = find_images(pictures, labels)
    is_thing = {category["id"]: category["isthing"] for category in panoptic["categories"]}
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        assert files[image["id"] - 1] == image["file_name"]
        result = predictor(pictures / image["file_name"])
        assert (labels / "panoptic" / annotation["file_name"]).read_bytes() == result.to_png()
        semantic = np.array(Image.open(labels / "semantic" / annotation["file_name"]))
        expected = [{**info, "iscrowd": 0} for info in result.segments_info]
        for info in expected:
            assert (semantic[result.segmentation == info["id"]] == info["category_id"]).all()
            del info["isthing"]
        assert annotation["segments_info"] == expected
        things = [info for info in expected if is_thing[info["category_id"]]]
        own = [entry for entry in instances if entry["image_id"] == image["id"]]
        for info, entry in zip(things, own, strict=True):
            mask = np.asfortranarray(result.segmentation == info["id"], dtype=np.uint8)
            rle = coco_mask.encode(mask)
            assert entry["segmentation"] == {"size": rle["size"], "counts": rle["counts"].decode()}
            assert entry["area"] == coco_mask.area(rle) and entry["bbox"] == list(coco_mask.toBbox(rle))


def test_panoptic_quality_reads_it(labels: Path) -> None:
    quality = panoptic_quality(*[labels / "panoptic.json", labels / "panoptic"] * 2)
    assert quality["All"]["pq"] == 1
    assert quality["All"]["n"] > 10


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 2), (3, 1), (7, 3)])
def test_nothing_depends_on_batch_size_and_workers(
    predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path, batch_size: int, workers: int
) -> None:
    label(pictures, tmp_path, with_options(predictor, batch_size=batch_size), formats=ALL, workers=workers)
    assert contents(tmp_path) == contents(labels)


def test_a_process_for_each_device_gives_the_same(
    predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path
) -> None:
    label(pictures, tmp_path / "out", predictor, formats=ALL, devices=["cpu", "cpu"])
    assert contents(tmp_path / "out") == contents(labels)
    with pytest.raises(ValueError, match="device must be"):
        label(pictures, tmp_path / "new", predictor, devices=["cpu", "tpu"])


def test_shards_merge_to_the_same(predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "abc"]
    for i, out in enumerate(outs, start=1):
        label(pictures, out, predictor, formats=ALL, shard=(i, 3))
    assert sorted(len(list((out / "panoptic").rglob("*.png"))) for out in outs) == [6, 7, 7]
    with pytest.raises(ValueError, match="must be 1/3, 2/3, 3/3, each once, got 1/3, 2/3"):
        merge_shards(outs[:2], tmp_path / "merged")
    summary = merge_shards(outs[::-1], tmp_path / "merged")
    assert (summary.labelled, summary.failed) == (20, 1)
    merged, whole = contents(tmp_path / "merged"), contents(labels)
    assert json.loads(merged.pop("run.json")) == json.loads(whole.pop("run.json"))
    assert merged == whole
    with pytest.raises(OccupiedError, match="merged holds"):
        merge_shards(outs, tmp_path / "merged")
    (outs[0] / "failures.jsonl").unlink()
    with pytest.raises(ValueError, match="not finished"):
        merge_shards(outs, tmp_path / "again")


def test_void_is_what_is_not_wanted(predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path) -> None:
    whole = json.loads((labels / "panoptic.json").read_text())
    segments = [info for annotation in whole["annotations"] for info in annotation["segments_info"]]
    most = max({info["category_id"] for info in segments}, key=[info["category_id"] for info in segments].count)
    name = next(category["name"] for category in whole["categories"] if category["id"] == most)
    label(pictures, tmp_path, predictor, classes=[name], min_area=500)
    parts = json.loads((tmp_path / "panoptic.json").read_text())
    for old, new in zip(whole["annotations"], parts["annotations"], strict=True):
        wanted = [info for info in old["segments_info"] if info["category_id"] == most and info["area"] >= 500]
        assert new["segments_info"] == wanted
        before, after = (
            rgb_to_id(np.array(Image.open(out / "panoptic" / new["file_name"]))) for out in (labels, tmp_path)
        )
        assert np.array_equal(after, np.where(np.isin(before, [info["id"] for info in wanted]), before, 0))
    with pytest.raises(ValueError, match="classes .* 'unicorn'"):
        label(pictures, tmp_path / "new", predictor, classes=["unicorn"])


def test_class_thresholds_and_limit(predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path) -> None:
    strict = {index: 1.0 for index in range(1, 91)}
    summary = label(pictures, tmp_path, with_options(predictor, class_thresholds=strict), limit=5)
    assert summary.labelled == 5
    found = json.loads((tmp_path / "panoptic.json").read_text())
    assert [image["id"] for image in found["images"]] == [1, 2, 3, 4, 5]
    assert {info["category_id"] > 90 for entry in found["annotations"] for info in entry["segments_info"]} == {True}
    assert json.loads((tmp_path / "instances.json").read_text()) == []
    with pytest.raises(ValueError, match=r"class_thresholds .* 250"):
        with_options(predictor, class_thresholds={250: 0.5})


@pytest.mark.parametrize("mode", ["detr", "transformers"])
def test_upstream_modes(predictor: Predictor, pictures: Path, tmp_path: Path, mode: str) -> None:
    exact = with_options(predictor, mode=mode)
    label(pictures, tmp_path, exact, limit=4)
    found = json.loads((tmp_path / "panoptic.json").read_text())
    for image, annotation in zip(found["images"], found["annotations"], strict=True):
        result = exact(pictures / image["file_name"])
        assert (tmp_path / "panoptic" / annotation["file_name"]).read_bytes() == result.to_png()
        assert [info["id"] for info in annotation["segments_info"]] == [info["id"] for info in result.segments_info]


def test_exif_orientation(predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    picture(96, 64).save(tmp_path / "in" / "a.jpg", exif=exif)
    for apply, size in ((True, (64, 96)), (False, (96, 64))):
        label(tmp_path / "in", tmp_path / f"out{apply}", predictor, exif=apply)
        (image,) = json.loads((tmp_path / f"out{apply}" / "panoptic.json").read_text())["images"]
        assert (image["width"], image["height"]) == size
        assert Image.open(tmp_path / f"out{apply}" / "panoptic" / "a.png").size == size


def test_large_images_are_resized_before_a_gpu_gets_them(tmp_path: Path) -> None:
    picture(4000, 3000).save(tmp_path / "a.png")
    picture(640, 480).save(tmp_path / "b.png")
    large, small = (decode(tmp_path / name, Reading(True, 800, 1333, on_device=True)) for name in ("a.png", "b.png"))
    assert large.array.shape == (800, 1066, 3) and small.array.shape == (480, 640, 3)
    assert large.size == small.size == (800, 1066)
    assert (large.target, small.target) == ((3000, 4000), (480, 640))
    batch = batch_of_size([torch.from_numpy(decoded.array) for decoded in (large, small)], 1066, 800)
    for tensor, name in zip(batch, ("a.png", "b.png"), strict=True):
        assert torch.equal(tensor, image_to_tensor(Image.open(tmp_path / name)))


def test_semantic_maps_of_many_classes_have_16_bits() -> None:
    info = {"id": 1, "category_id": 999, "isthing": False, "score": 0.5, "area": 2, "bbox": [0, 0, 2, 1]}
    writing = Writing(Path(), ("semantic",), None, 0, 1000)
    (data,) = encode("a.jpg", np.array([[1, 1, 0]]), [info], writing).files.values()
    assert np.array(Image.open(io.BytesIO(data))).tolist() == [[999, 999, 0]]


# ---- going on ----


def test_resume_drops_torn_lines_and_does_the_rest(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert label(pictures, whole, predictor, limit=7).failed == 0
    manifest = (whole / "manifest.jsonl").read_bytes()
    damaged = [b"", manifest[:-1], manifest[:-40], manifest[:-2000] + bytes(2000), manifest[:-90] + bytes(50)]
    damaged[-1] += manifest[-40:]  # a loss of power may leave zeros within a line
    for number, content in enumerate(damaged):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        (out / "manifest.jsonl").write_bytes(content)
        assert 1 <= label(pictures, out, predictor, limit=7, resume=True).computed <= 7
        assert contents(out) == contents(whole)
    assert label(pictures, out, predictor, limit=7, resume=True).computed == 0


def test_resume_tries_again_what_failed(predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path) -> None:
    label(pictures, tmp_path, predictor, formats=ALL, resume=True)  # a missing or empty folder will do
    summary = label(pictures, tmp_path, predictor, formats=ALL, resume=True)
    assert (summary.labelled, summary.failed, summary.computed) == (20, 1, 1)
    assert contents(tmp_path) == contents(labels)


def test_an_occupied_folder_is_refused(predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(labels, out)
    before = contents(out)
    with pytest.raises(OccupiedError, match="--resume goes on"):
        label(pictures, out, predictor, formats=ALL)
    with pytest.raises(OccupiedError, match=r"threshold was 0\.2 and is 0\.3; formats was"):
        label(pictures, out, with_options(predictor, threshold=0.3), resume=True)
    with pytest.raises(OccupiedError, match="model was"):
        label(
            pictures, out, Predictor(tiny_detr(2), device="cpu", threshold=0.2, max_size=160), formats=ALL, resume=True
        )
    assert contents(out) == before
    with manifest_lock(out), pytest.raises(OccupiedError, match="another process"):
        label(pictures, out, predictor, formats=ALL, resume=True)
    label(pictures, out, predictor, limit=2, overwrite=True)
    assert len(list(out.rglob("*.png"))) == 2 and not (out / "semantic").exists()
    (tmp_path / "foreign" / "panoptic").mkdir(parents=True)
    (tmp_path / "foreign" / "panoptic" / "mine.png").touch()
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OccupiedError):
            label(pictures, tmp_path / "foreign", predictor, **options)
    assert (tmp_path / "foreign" / "panoptic" / "mine.png").exists()


def manifest_lock(out: Path) -> Any:
    from detr_fast.files import locked

    return locked(out, "labeling into")


def test_manifest_keeps_files_apart_and_opens_quickly(tmp_path: Path) -> None:
    strange = ['a", "settings": "b.jpg', "x\n.png", "\udcff.jpg", "z.png"]
    with Manifest(tmp_path, "0" * 16, strange) as manifest:
        manifest.append([(file, {"width": 1, "height": 1, "segments_info": []}) for file in strange[:3]])
        manifest.append([("z.png", {"error": "gone"})])
    with Manifest(tmp_path, "0" * 16, strange) as manifest:
        assert [manifest.done(file) for file in strange] == [True, True, True, False]
        assert [(file, number) for file, number, _ in manifest.read()] == [
            (f, n + 1) for n, f in enumerate(strange[:3])
        ]
    with pytest.raises(OccupiedError, match="other settings"):
        Manifest(tmp_path, "1" * 16, strange)


def test_disk_full_is_one_error_and_counts_nothing(
    predictor: Predictor, pictures: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "manifest.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            label(pictures, tmp_path / "out", predictor, formats=ALL, resume=True)
    label(pictures, tmp_path / "out", predictor, formats=ALL, resume=True)
    assert contents(tmp_path / "out") == contents(labels)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", mount]).returncode:
        pytest.skip("needs to be root and allowed to mount a tmpfs")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_disk_that_is_really_full(predictor: Predictor, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{number:02}.png")
    (small_disk / "ballast").write_bytes(bytes(500_000))
    with pytest.raises(OSError, match="No space left") as raised:
        label(tmp_path / "in", small_disk / "out", predictor)
    assert "\n" not in str(raised.value)
    assert not (small_disk / "out" / "failures.jsonl").exists()
    (small_disk / "ballast").unlink()
    shutil.copytree(small_disk / "out", tmp_path / "out", ignore=shutil.ignore_patterns("*.tmp"))
    label(tmp_path / "in", tmp_path / "out", predictor, resume=True)
    label(tmp_path / "in", tmp_path / "fresh", predictor)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# ---- bounds ----


class Stub(Predictor):
    """Gives every image the same segments, and records what it is given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[list[tuple[int, int]]] = []

    def start_segments(self, batch: list[Pixels]) -> Any:  # type: ignore[override]
        self.batches.append([image.size for image in batch])
        info = {"id": 1, "category_id": 1, "isthing": True, "score": 0.5, "area": 1, "bbox": [0, 0, 1, 1]}
        return lambda: [(np.ones(image.target, np.int32), [info]) for image in batch]


def test_rare_shapes_do_not_starve_and_do_not_break_batches(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        size = (20, 30) if number == 3 else (40, 30) if number % 2 else (30, 40)
        Image.new("RGB", size).save(tmp_path / "in" / f"{number:02}.png")
    stub = Stub(tiny_detr(), device="cpu", batch_size=4, max_size=40)
    label(tmp_path / "in", tmp_path / "out", stub)
    assert sum(map(len, stub.batches)) == 40
    assert all(len(set(batch)) == 1 for batch in stub.batches)
    rare = next(number for number, batch in enumerate(stub.batches) if len(batch) == 1)
    assert rare <= 4  # though there are images of the other shapes to the end
    assert [len(batch) for batch in stub.batches].count(4) == 9


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(200):
        Image.new("RGB", (30, 40)).save(tmp_path / "in" / f"{number:03}.png")
    slots = []

    class Watched(LocalEngine):
        def _release(self, slot: int) -> None:
            slots.append(slot)
            super()._release(slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "LocalEngine", Watched)
        label(tmp_path / "in", tmp_path / "out", Stub(tiny_detr(), device="cpu", batch_size=2, max_size=40), workers=1)
    assert len(slots) == 200
    assert max(slots) < 16


def test_a_computation_that_takes_too_long_is_broken_off(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Stub):
        def start_segments(self, batch: list[Pixels]) -> Any:  # type: ignore[override]
            if len(self.batches) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(300)
            return super().start_segments(batch)

    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    slow = Slow(tiny_detr(), device="cpu", batch_size=1, max_size=40)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        label(pictures, tmp_path / "out", slow)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(slow.batches) == 3
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert len([line for line in lines if "error" not in line]) == 3
    assert not (tmp_path / "out" / "panoptic.json").exists()


def test_stream_is_in_order_lazy_and_stops_at_what_is_no_image(predictor: Predictor) -> None:
    taken = []

    def images() -> Iterator[Image.Image]:
        for number in range(1000):
            taken.append(number)
            yield picture(*SIZES[number % 5], seed=number)

    stream = predictor.stream(images())
    for number in range(10):
        result = next(stream)
        assert result.to_png() == predictor(picture(*SIZES[number % 5], seed=number)).to_png()
    stream.close()
    assert len(taken) <= 8 * predictor.batch_size
    broken = predictor.stream([picture(40, 30), picture(40, 30), "no such file.jpg", picture(40, 30)])
    assert [next(broken).image.size for _ in range(2)] == [(40, 30)] * 2
    with pytest.raises(FileNotFoundError):
        next(broken)
    assert list(predictor.stream([])) == []


# ---- bad files ----


def _png_header(width: int, height: int, depth: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def make_strange_images(folder: Path) -> tuple[set[str], set[str]]:
    """Files of more than 40 kinds. Returns those that can be labelled and those that cannot."""
    image = picture(60, 40)
    jpg, png, gif = (_saved(image, kind) for kind in ("JPEG", "PNG", "GIF"))
    tif, webp, bmp = (_saved(image, kind) for kind in ("TIFF", "WEBP", "BMP"))
    rotated, absurd = Image.Exif(), Image.Exif()
    rotated[0x0112], absurd[0x0112] = 8, 99
    ramp = np.linspace(0, 65535, 2400).reshape(40, 60)
    good = {
        "cmyk.jpg": _saved(image.convert("CMYK"), "JPEG"),
        "grey.jpg": _saved(image.convert("L"), "JPEG"),
        "progressive.jpg": _saved(image, "JPEG", progressive=True),
        "rotated.jpg": _saved(image, "JPEG", exif=rotated),
        "absurd orientation.jpg": _saved(image, "JPEG", exif=absurd),
        "trailing.jpg": jpg + b"trailing bytes",
        "16 bit.png": _saved(Image.fromarray(ramp.astype(np.uint16)), "PNG"),
        "16 bit.tif": _saved(Image.fromarray(ramp.astype(np.uint16)), "TIFF"),
        "one bit.png": _saved(image.convert("1"), "PNG"),
        "palette.png": _saved(image.convert("P"), "PNG"),
        "transparent palette.png": _saved(image.convert("P"), "PNG", transparency=3),
        "alpha.png": _saved(image.convert("RGBA"), "PNG"),
        "grey alpha.png": _saved(image.convert("LA"), "PNG"),
        "interlaced.png": _saved(image, "PNG", interlace=1),
        "animated.gif": _saved(image, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "red")] * 3),
        "animated.webp": _saved(image, "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
        "animated.png": _saved(image, "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
        "alpha.webp": _saved(image.convert("RGBA"), "WEBP", lossless=True),
        "palette.bmp": _saved(image.convert("P"), "BMP"),
        "cmyk.tiff": _saved(image.convert("CMYK"), "TIFF"),
        "lab.tif": _saved(Image.merge("LAB", image.split()), "TIFF"),
        "float.tif": _saved(Image.fromarray((ramp / 257).astype(np.float32)), "TIFF"),
        "pages.tif": _saved(image, "TIFF", save_all=True, append_images=[image]),
        "deflate.tif": _saved(image, "TIFF", compression="tiff_adobe_deflate"),
        "a png.jpg": png,
        "a jpg.png": jpg,
        "a gif.bmp": gif,
        "one pixel.png": _saved(Image.new("RGB", (1, 1)), "PNG"),
        "thin.png": _saved(Image.new("RGB", (2, 60)), "PNG"),
        "UPPER.JPG": jpg,
        "same.jpg": jpg,
        "same.jpeg": jpg,
        "same.png": png,
        "sub/same.jpg": jpg,
        "sub/deep/er/same.jpg": jpg,
        "folder.png/same.jpg": jpg,
        " space and\nnewline .jpg": jpg,
        "日本語 ünïcödé.png": png,
        '"quoted", {braced} & <b>.png': png,
        "%s -dash.jpg": jpg,
        os.fsdecode(b"not utf-8 \xff\xfe.jpg"): jpg,
    }
    bad = {
        "empty.jpg": b"",
        "text.jpg": b"not a picture",
        "zeros.png": bytes(5000),
        "html.gif": b"<html><body>404</body></html>",
        "cut.jpg": jpg[: len(jpg) // 2],
        "cut header.jpg": jpg[:20],
        "cut.png": png[: len(png) // 2],
        "cut.gif": gif[:40],
        "cut.tif": tif[: len(tif) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "cut.bmp": bmp[: len(bmp) // 2],
        "flipped bits.png": png[:60] + bytes(byte ^ 0x55 for byte in png[60:120]) + png[120:],
        "bomb.png": _png_header(60_000, 60_000),
        "absurd.png": _png_header(2**31 - 1, 2**31 - 1),
        "no width.png": _png_header(0, 40),
        "wrong depth.png": _png_header(40, 40, 7),
        "no width.bmp": bmp[:18] + bytes(8) + bmp[26:],
        "too thin.png": _saved(Image.new("RGB", (1, 5000)), "PNG"),
        "not a number.tif": _saved(Image.fromarray(np.full((40, 60), np.nan, np.float32)), "TIFF"),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pdf.jpg": b"%PDF-1.4\n%%EOF",
        "archive.png": b"PK\x03\x04" + bytes(100),
        "signature only.png": b"\x89PNG\r\n\x1a\n",
        "folder.jpg": jpg,  # beside a folder `folder.png`, which its PNG would replace
        f"{'n' * 247}.jpeg": jpg,  # its PNG's name is longer than file systems allow
    }
    for name, data in (good | bad).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.png").symlink_to("missing.png")
    (folder / "link.jpg").symlink_to("same.jpg")
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "a folder.png").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.png").symlink_to("/dev/zero")
    failing = {"loop.jpg", "nowhere.png", "pipe.jpg", "device.png"}
    if os.geteuid() != 0:  # root reads everything
        (folder / "secret.jpg").write_bytes(jpg)
        (folder / "secret.jpg").chmod(0)
        failing.add("secret.jpg")
    return {*good, "link.jpg"}, {*bad, *failing}


def test_every_strange_image_is_labelled_or_listed(
    predictor: Predictor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_strange_images(tmp_path)
    assert len(good) > 40 and len(bad) > 28
    out = tmp_path / "out"
    for options in ({}, {"resume": True}):
        summary = label(tmp_path, out, predictor, workers=2, preview=4, **options)
        failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        labelled = [image["file_name"] for image in json.loads((out / "panoptic.json").read_text())["images"]]
        assert set(labelled) == good
        assert {failure["file"] for failure in failures} == bad
        assert (summary.labelled, summary.failed) == (len(labelled), len(failures)) == (len(good), len(bad))
        assert all(failure["error"] and "\n" not in failure["error"] for failure in failures)
        manifest = [json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert sorted(manifest) == sorted(good | bad)
        for name in ("rotated", "animated.gif"):
            size = Image.open(out / "panoptic" / f"{name}.png").size
            assert size == ((40, 60) if name == "rotated" else (60, 40))
    assert capfd.readouterr().err == ""


# ---- the report ----


def test_report_in_a_browser(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    label(pictures, tmp_path / "out", predictor, preview=5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 5
    assert "bad.gif" in page and "not an image" in page
    assert "http" not in page.replace("http-equiv", "")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    frame = tmp_path / "phone.html"
    # a window cannot be as narrow as a phone's screen, a frame can
    frame.write_text(
        '<iframe id="phone" width="360" height="700"></iframe><script>const phone = document.getElementById("phone");'
        "phone.onload = () => { const inside = phone.contentDocument; const images = [...inside.images];"
        "document.body.innerText = JSON.stringify([images.filter(i => i.complete && i.naturalWidth).length,"
        "inside.documentElement.scrollWidth, phone.contentWindow.innerWidth]) };"
        "phone.srcdoc = " + json.dumps(page).replace("</", "<\\/") + ";</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    dumped = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    shown, content, width = json.loads(dumped[dumped.index("[") : dumped.index("]") + 1])
    assert shown == 5
    assert content <= width <= 360
