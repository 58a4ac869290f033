"""A merge and a resumed run prove that nothing is missing, and keep to their folders."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_labeling import contents

from contract import picture
from detr_fast.cli import main
from detr_fast.files import OccupiedError
from detr_fast.labeling.pipeline import label
from detr_fast.labeling.shards import merge_shards
from detr_fast.predictor import Predictor
from tiny import tiny_detr

IMAGES = 8
EVIL = "../../evil.jpg"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_detr(), device="cpu", threshold=0.2, max_size=80, batch_size=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for number in range(IMAGES):
        picture(48, 32, number).save(folder / ("sub" if number % 2 else "") / f"{number}.jpg")
    (folder / "bad.gif").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def made(predictor: Predictor, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run over all images, "whole", and of two shards, "1" and "2"."""
    folder = tmp_path_factory.mktemp("made")
    label(pictures, folder / "whole", predictor)
    for i in (1, 2):
        label(pictures, folder / str(i), predictor, shard=(i, 2))
    return folder


@pytest.fixture
def outs(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may damage."""
    shutil.copytree(made, tmp_path / "deep" / "outs")
    return tmp_path / "deep" / "outs"


def merge(outs: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and stderr of the command, which leaves nothing behind when it fails."""
    code = main(["merge", str(outs / "1"), str(outs / "2"), "--out", str(outs / "merged")])
    err = capsys.readouterr().err
    if code:
        assert not (outs / "merged").exists()
        assert err.count("\n") == 1 and err.startswith("detr-fast merge: error: ")
    return code, err


def some_png(shard: Path) -> Path:
    return sorted((shard / "panoptic").rglob("*.png"))[0]


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def change_line(path: Path, **values: Any) -> None:
    """Changes values of the first line of an image that is labelled; its checksum is left out, as a forger could."""

    def change(lines: list[bytes]) -> list[bytes]:
        number = next(k for k, line in enumerate(lines) if b'"error"' not in line)
        line = json.loads(lines[number])
        line.pop("crc32", None)
        lines[number] = json.dumps({**line, **values}).encode() + b"\n"
        return lines

    edit(path, change)


def change_run(folder: Path, **values: Any) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, **values}))


def as_of_an_older_run(shard: Path) -> None:
    run = json.loads((shard / "run.json").read_text())
    (shard / "run.json").write_text(json.dumps({k: run[k] for k in ("settings", "images", "shard", "categories")}))
    lines = [json.loads(line) for line in (shard / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("bytes", None), line.pop("crc32", None)
    (shard / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- nothing is lost ----

LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a manifest": (lambda shard: edit(shard / "manifest.jsonl", lambda lines: lines[:2]), "holds 2 of its 5"),
    "an empty manifest": (lambda shard: edit(shard / "manifest.jsonl", lambda lines: []), "holds 0 of its 5"),
    "no manifest": (lambda shard: (shard / "manifest.jsonl").unlink(), "manifest.jsonl"),
    "a garbled line": (
        lambda shard: edit(shard / "manifest.jsonl", lambda lines: [lines[0].replace(b":", b"\0", 3), *lines[1:]]),
        "holds 4 of its 5",
    ),
    "a PNG that is missing": (lambda shard: some_png(shard).unlink(), ".png"),
    "a PNG that is empty": (lambda shard: some_png(shard).write_bytes(b""), ".png"),
    "a PNG that is cut off": (lambda shard: os.truncate(some_png(shard), 40), ".png"),
    "no PNGs": (lambda shard: shutil.rmtree(shard / "panoptic"), ".png"),
    "an older run": (as_of_an_older_run, "--resume"),
    "no end": (lambda shard: (shard / "failures.jsonl").unlink(), "not finished"),
    "another listing": (lambda shard: change_run(shard, listing="0" * 64), "listing"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_merge_names_what_is_missing_and_resume_makes_it(
    predictor: Predictor, pictures: Path, outs: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, named = LOSSES[name]
    damage(outs / "1")
    code, err = merge(outs, capsys)
    assert code == 1
    assert named in err and str(outs / "1") in err
    label(pictures, outs / "1", predictor, shard=(1, 2), resume=True)
    assert merge(outs, capsys) == (0, "")
    merged, whole = contents(outs / "merged"), contents(outs / "whole")
    assert json.loads(merged.pop("run.json")) == json.loads(whole.pop("run.json"))
    assert merged == whole


def test_a_shard_with_a_limit_is_not_whole(
    predictor: Predictor, pictures: Path, outs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label(pictures, outs / "1", predictor, shard=(1, 2), limit=4, overwrite=True)
    code, err = merge(outs, capsys)
    assert code == 1 and "--limit" in err and str(outs / "1") in err
    label(pictures, outs / "1", predictor, shard=(1, 2), limit=100, resume=True)
    assert merge(outs, capsys) == (0, "")


@pytest.mark.parametrize("loss", ["a PNG", "a folder", "all", "cut off"])
def test_resume_makes_what_vanished_again(predictor: Predictor, pictures: Path, outs: Path, loss: str) -> None:
    out = outs / "whole"
    before = contents(out)
    if loss == "a PNG":
        some_png(out).unlink()
    elif loss == "cut off":
        os.truncate(some_png(out), 20)
    else:
        shutil.rmtree(out / "panoptic" / ("sub" if loss == "a folder" else ""))
    summary = label(pictures, out, predictor, resume=True)
    assert summary.computed == 1 + {"a folder": IMAGES // 2, "all": IMAGES}.get(loss, 1)  # and the one that failed
    assert contents(out) == before


def garbled(line: bytes, way: int) -> bytes:
    """A line that is damaged in one of seven ways, of which one gives JSON of another value."""
    middle = len(line) // 2
    digit = next(k for k in range(line.index(b'"area"'), len(line)) if line[k : k + 1].isdigit())
    return [
        line[:middle] + bytes(20) + line[middle + 20 :],
        line[:middle] + b"\n" + line[middle + 1 :],
        line[:digit] + (b"1" if line[digit : digit + 1] != b"1" else b"2") + line[digit + 1 :],
        b"\xff\xfe" + line,
        b"[" * 100_000 + b"\n",
        b"[]\n",
        b"\n",
    ][way]


def test_a_garbled_line_costs_its_image_alone(predictor: Predictor, pictures: Path, outs: Path) -> None:
    out = outs / "whole"
    before = contents(out)
    lines = [line for line in (out / "manifest.jsonl").read_bytes().splitlines(keepends=True) if b'"error"' not in line]
    damaged = [garbled(line, way) for way, line in enumerate(lines[:7])]
    torn = [*lines[:3], lines[3][:200], *lines[4:]]  # the line that follows cannot be told from it
    for content, lost in (([*damaged, *lines[7:]], 7), (torn, 2)):
        (out / "manifest.jsonl").write_bytes(b"".join(content))
        assert label(pictures, out, predictor, resume=True).computed == lost + 1  # and the one that failed
        assert contents(out) == before


def test_lines_may_end_as_on_windows(
    predictor: Predictor, pictures: Path, outs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "1"):
        edit(outs / name / "manifest.jsonl", lambda lines: [line[:-1] + b"\r\n" for line in lines])
    assert label(pictures, outs / "whole", predictor, resume=True).computed == 1
    assert merge(outs, capsys) == (0, "")


# ---- nothing leaves the folders ----


@pytest.mark.parametrize("file", [EVIL, "/tmp/evil.jpg", "sub/../../../evil.jpg", "a\0.jpg", "", ".", "\ud800.jpg", 7])
def test_a_name_that_leads_outside_is_refused(outs: Path, capsys: pytest.CaptureFixture[str], file: Any) -> None:
    target = outs / "1" / "panoptic" / "../../evil.png"
    shutil.copy(some_png(outs / "1"), target)  # for the name to be of a file
    length = target.stat().st_size
    change_line(outs / "1" / "manifest.jsonl", file=file, bytes={"panoptic": length})
    assert merge(outs, capsys)[0] == 1
    assert [path.name for path in outs.parent.rglob("evil*")] == ["evil.png"]


@pytest.mark.parametrize("where", ["PNG", "sub-folder", "folder"])
def test_links_are_not_followed(outs: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    path = {"PNG": some_png(outs / "1"), "sub-folder": outs / "1/panoptic/sub", "folder": outs / "1/panoptic"}[where]
    path.rename(outs / "secret")
    path.symlink_to(outs / "secret")
    code, err = merge(outs, capsys)
    assert code == 1 and ".png" in err


def test_links_in_the_new_folder_are_not_followed(
    predictor: Predictor, pictures: Path, outs: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("manifest.jsonl", "outside.jsonl"), ("panoptic", "elsewhere"), ("run.json", "outside.json")):
        merged = tmp_path / f"merged with {name}"
        merged.mkdir()
        (merged / name).symlink_to(tmp_path / target)
        with pytest.raises(OccupiedError, match=f"holds {name}"):
            merge_shards([outs / "1", outs / "2"], merged)
        with pytest.raises((OccupiedError, OSError), match=name):
            label(pictures, merged, predictor, resume=True)
    for name in ("manifest.jsonl", "panoptic", "run.json"):
        out = tmp_path / f"labels with {name}"
        shutil.copytree(outs / "whole", out)
        (out / name).rename(tmp_path / f"old {name}")
        (out / name).symlink_to(tmp_path / f"old {name}")
        with pytest.raises((OccupiedError, OSError), match=name):
            label(pictures, out, predictor, resume=True)
    assert not list(tmp_path.glob("outside*")) and not list((tmp_path / "elsewhere").iterdir())


# ---- what a file says is checked ----

CATEGORY = {"id": 1, "name": "a", "isthing": 1, "color": [0, 0, 0]}


@pytest.mark.parametrize(
    "values",
    [
        {"settings": []},
        {"settings": {"formats": ["unknown"]}},
        {"settings": {"formats": "panoptic"}},
        {"settings": {}},
        {"images": 3},
        {"shard": "1/1000000000000000000000"},
        {"shard": "0/2"},
        {"shard": "x"},
        {"shard": [1, 2]},
        {"categories": None},
        {"categories": [{**CATEGORY, "id": 10**30}]},
        {"categories": [{**CATEGORY, "id": True}]},
        {"categories": [{**CATEGORY, "name": 1}]},
        {"categories": [{**CATEGORY, "color": ["red", 0, 0]}]},
        {"categories": [{"id": 1}]},
        {"count": -1},
        {"count": "8"},
        {"listing": 5},
        {"limit": 0},
        {"more": 1},
    ],
)
def test_a_strange_run_is_one_line(outs: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any]) -> None:
    change_run(outs / "1", **values)
    code, err = merge(outs, capsys)
    assert code == 2 and f"{outs / '1' / 'run.json'} is damaged" in err


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"settings": ' + "9" * 5000 + "}"])
def test_a_run_that_is_no_run_is_one_line(outs: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (outs / "1" / "run.json").write_text(text)
    code, err = merge(outs, capsys)
    assert code == 2 and "is damaged" in err


def test_a_shard_of_a_thousand_million_is_one_line(outs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_run(outs / "1", shard="1/1000000000")
    code, err = merge(outs, capsys)
    assert code == 2 and "1/1000000000" in err and len(err) < 500


def test_a_strange_line_with_a_checksum_is_an_error(predictor: Predictor, pictures: Path, outs: Path) -> None:
    def forge(lines: list[bytes]) -> list[bytes]:
        texts = [line.partition(b', "crc32"')[0].replace(b'"area": ', b'"area": 1e3') + b"}" for line in lines]
        return [text[:-1] + b', "crc32": %d}\n' % zlib.crc32(text) for text in texts]

    edit(outs / "whole" / "manifest.jsonl", forge)
    with pytest.raises(OccupiedError, match="manifest.jsonl is damaged"):
        label(pictures, outs / "whole", predictor, resume=True)


@pytest.mark.parametrize(
    "values",
    [
        {"segments_info": None},
        {"segments_info": [3]},
        {"segments_info": [{"id": 1, "category_id": 10**30, "area": 3}]},
        {"segments_info": [{"id": 1, "category_id": [], "area": 3}]},
        {"segments_info": [{"id": 1, "category_id": 1, "area": "3"}]},
        {"segments_info": [{"category_id": 1, "area": 3}]},
        {"width": "x"},
        {"height": -1},
        {"rle": None},
        {"bytes": {"panoptic": "12"}},
        {"bytes": []},
        {"error": 5},
        {"settings": None},
    ],
)
def test_a_strange_line_is_as_a_missing_one(
    outs: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any]
) -> None:
    change_line(outs / "1" / "manifest.jsonl", **values)
    code, err = merge(outs, capsys)
    assert code == 1 and "holds 4 of its 5" in err
