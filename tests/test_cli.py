"""`detr-fast label`, `synth` and `info`, as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detr_fast.checkpoint import save_model
from detr_fast.labeling.listing import find_images, png_name
from detr_fast.postprocess import rgb_to_id
from tiny import tiny_detr

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "coco_panoptic_sample" / "images"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "detr_fast", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def detr_fast(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    return finish(start(*arguments))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def make_picture(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_detr(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Different sizes, equal stems, and one file that is no picture by its name."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = {
        "a.jpg": (96, 64),
        "a.png": (96, 64),
        "sub/a.jpg": (64, 96),
        "sub/b.JPEG": (120, 50),
        "c d é.webp": (96, 64),
        "z.bmp": (61, 83),
    }
    for seed, (name, size) in enumerate(sizes.items()):
        make_picture(folder / name, *size, seed)
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def labels(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "new"
    code, printed, err = detr_fast(
        "label", pictures, "--out", out, "--model", model, "--device", "cpu", "--threshold", "0.2", "--batch-size", "3"
    )
    assert (code, err) == (0, "")
    assert "6 images" in printed
    return out


def check_data_set(out: Path, images: Path) -> list[dict]:
    """Everything that COCO's formats promise of the files in `out`; returns the panoptic annotations."""
    panoptic = json.loads((out / "panoptic.json").read_text())
    instances = json.loads((out / "instances.json").read_text())
    is_thing = {category["id"]: category["isthing"] for category in panoptic["categories"]}
    by_image = {annotation["image_id"]: annotation for annotation in panoptic["annotations"]}
    pngs = sorted(path.relative_to(out / "panoptic").as_posix() for path in (out / "panoptic").rglob("*.*"))
    assert pngs == sorted(annotation["file_name"] for annotation in panoptic["annotations"])
    things = []
    for image in panoptic["images"]:
        with Image.open(images / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        annotation = by_image.pop(image["id"])
        ids = rgb_to_id(np.array(Image.open(out / "panoptic" / annotation["file_name"])))
        assert ids.shape == (image["height"], image["width"])
        assert {info["id"] for info in annotation["segments_info"]} == set(np.unique(ids)) - {0}
        for info in annotation["segments_info"]:
            assert set(info) == {"id", "category_id", "area", "bbox", "iscrowd", "score"}
            y, x = np.nonzero(ids == info["id"])
            assert info["area"] == len(x)
            assert info["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            if is_thing[info["category_id"]]:
                things.append((image["id"], info, ids == info["id"]))
    assert not by_image
    for result, (image_id, info, mask) in zip(instances, things, strict=True):
        shared = ("category_id", "score", "bbox", "area")
        assert result["image_id"] == image_id
        assert [result[key] for key in shared] == [info[key] for key in shared]
        assert np.array_equal(coco_mask.decode(result["segmentation"]), mask)
    truth = COCO()
    truth.dataset = {"images": panoptic["images"], "categories": panoptic["categories"], "annotations": []}
    truth.createIndex()
    loaded = truth.loadRes(str(out / "instances.json"))
    assert len(loaded.anns) == len(things) > 0
    return panoptic["annotations"]


def test_label_writes_a_coco_data_set(labels: Path, pictures: Path) -> None:
    annotations = check_data_set(labels, pictures)
    panoptic = json.loads((labels / "panoptic.json").read_text())
    names = ["a.jpg", "a.png", "c d é.webp", "sub/a.jpg", "sub/b.JPEG", "z.bmp"]
    assert [image["file_name"] for image in panoptic["images"]] == names
    assert len(panoptic["categories"]) == 133
    assert all(len(annotation["segments_info"]) >= 2 for annotation in annotations)
    assert (labels / "failures.jsonl").read_text() == ""


def test_label_does_not_depend_on_the_batch_size(model: Path, pictures: Path, labels: Path, tmp_path: Path) -> None:
    arguments = ("--model", model, "--device", "cpu", "--threshold", "0.2", "--batch-size", "1")
    assert detr_fast("label", pictures, "--out", tmp_path, *arguments)[0] == 0
    files = sorted(path.relative_to(labels) for path in (labels / "panoptic").rglob("*.png"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (labels / file).read_bytes(), file


def test_label_real_photographs(model: Path, tmp_path: Path) -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no COCO photographs in {PHOTOGRAPHS}")
    code, _, err = detr_fast("label", PHOTOGRAPHS, "--out", tmp_path, "--model", model, "--threshold", "0")
    assert (code, err) == (0, "")
    annotations = check_data_set(tmp_path, PHOTOGRAPHS)
    assert [annotation["file_name"] for annotation in annotations] == ["000000142238.png", "000000439180.png"]


def test_label_lists_bad_files_and_exits_1(model: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "in" / "good.png", 40, 30, 0)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "empty.jpg").touch()
    (tmp_path / "in" / "text.GIF").write_text("not a picture")
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:300])
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    out = tmp_path / "in" / "out"  # within the folder of images, and so not searched
    for option in ("--resume", "--overwrite"):
        code, _, err = detr_fast("label", tmp_path / "in", "--out", out, "--model", model, "--threshold", "0.2", option)
        assert code == 1
        assert err.count("\n") == 1
        assert "4 of 5 images failed" in err
        assert str(out / "failures.jsonl") in err
        failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        assert [failure["file"] for failure in failures] == ["cut.png", "pipe.jpg", "sub/empty.jpg", "text.GIF"]
        assert all(failure["error"] for failure in failures)
        assert [image["file_name"] for image in json.loads((out / "panoptic.json").read_text())["images"]] == [
            "good.png"
        ]


def test_usage_errors_are_one_line_and_exit_2(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "weights.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    save_model(tiny_detr(masks=False), tmp_path / "boxes")
    (tmp_path / "file").touch()
    right = {"images": pictures, "--out": tmp_path / "out", "--model": model, "--device": "cpu"}
    wrong = [
        ("images", tmp_path / "missing", "missing"),
        ("images", tmp_path / "file", "file"),
        ("images", tmp_path / "empty", "no images in"),
        ("--out", tmp_path / "file", "--out"),
        ("--out", pictures, "different folders"),
        ("--model", tmp_path / "missing", "--model"),
        ("--model", tmp_path / "cut" / "weights.pth", "weights.pth"),
        ("--model", tmp_path / "boxes", "mask head"),
        ("--device", "tpu", "--device"),
        ("--dtype", "int3", "--dtype"),
        ("--batch-size", "0", "--batch-size"),
        ("--threshold", "1.01", "--threshold"),
        ("--threshold", "much", "--threshold"),
        ("--no-such-option", "1", "--no-such-option"),
    ]
    processes = []
    for option, value, _ in wrong:
        options = {**right, option: value}
        images = options.pop("images")
        arguments = [str(part) for pair in options.items() for part in pair]
        processes.append(start("label", images, *arguments))
        if len(processes) % 2 == 0:
            processes[-2].wait()
    for (option, value, named), process in zip(wrong, processes, strict=True):
        code, out, err = finish(process)
        assert (code, out) == (2, ""), (option, value, err)
        assert err.count("\n") == 1
        assert named in err
    assert not (tmp_path / "out").exists()


def test_without_a_command_or_with_help() -> None:
    code, out, err = detr_fast()
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = detr_fast("label", "--help")
    assert (code, err) == (0, "")
    assert "--threshold" in out


def test_unwritable_out_exits_1(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "panoptic").touch()  # where the folder of PNGs belongs
    code, _, err = detr_fast("label", pictures, "--out", tmp_path, "--model", model)
    assert code == 1
    assert err.count("\n") == 1
    assert str(tmp_path / "panoptic") in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_at_once(model: Path, tmp_path: Path, number: int, code: int) -> None:
    for seed in range(200):
        make_picture(tmp_path / "in" / f"{seed:03}.jpg", 64, 48, seed)
    process = start("label", tmp_path / "in", "--out", tmp_path / "out", "--model", model, "--threshold", "0")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("panoptic/*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    ended, _, err = finish(process)
    assert ended == code
    assert "Traceback" not in err
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / "panoptic.json").exists()


def test_info_says_versions_and_choices() -> None:
    import torch

    from detr_fast.ops import choices

    code, out, err = detr_fast("info")
    assert (code, err) == (0, "")
    assert f"torch {torch.__version__}" in out
    for operation, choice, reason in choices.table(None):
        assert f"{operation}: {choice} ({reason})" in out


def test_listing_and_names_keep_images_apart(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "a.JPG",
        "a.jpeg",
        "a.png",
        "a.png.jpg",
        "a.png.png",
        "a.jpg.jpg",
        "sub/a.jpg",
        "sub/a.Tiff",
        "b.gif",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.png").touch()
    assert find_images(tmp_path, tmp_path / "out") == sorted(names)
    pngs = [png_name(name) for name in names]
    assert len({png.lower() for png in pngs}) == len(names)
    assert pngs[0] == "a.png"
    assert "sub/a.png" in pngs


def test_synth_writes_a_data_set_or_says_why_not(tmp_path: Path) -> None:
    code, out, _ = detr_fast("synth", tmp_path / "data", "--images", "2", "--seed", "0", "--size", "64", "96")
    assert code == 0 and "2 images" in out
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "images",
        "panoptic",
        "panoptic.json",
        "instances.json",
    }
    code, _, err = detr_fast("synth", tmp_path / "data", "--images", "2")
    assert code == 2 and "OUT" in err and len(err.splitlines()) == 1
    code, _, err = detr_fast("synth", tmp_path / "small", "--images", "2", "--size", "8", "64")
    assert code == 2 and "--size" in err and len(err.splitlines()) == 1
