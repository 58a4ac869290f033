"""`pytest bench` at tiny sizes: every benchmark works, says what it should, and times nothing that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare, labeling

ROOT = Path(__file__).parents[2]
GROUPS = {
    "backbone",
    "transformer",
    "mask head",
    "whole model",
    "detection",
    "preprocessing",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "panoptic PNG",
    "COCO run lengths",
    "panoptic quality",
    "labelling, files to files",
    "matcher",
    "mask losses",
    "training step",
}


def run(out: Path, *options: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "--benchmark-only", f"--benchmark-json={out}"]
    command += ["-q", "-p", "no:cacheprovider", "--benchmark-columns=min", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, json.loads(out.read_text() or "{}"), done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    status, found, output = run(tmp_path_factory.mktemp("bench") / "all.json")
    assert status == 0, output
    return found


def test_every_group_has_its_reference_beside_ours(found: dict[str, Any]) -> None:
    groups: dict[str, set[str]] = {}
    for row in found["benchmarks"]:
        groups.setdefault(row["group"], set()).add(row["extra_info"]["way"])
    assert groups.keys() >= GROUPS and len(groups) > len(GROUPS) + 10
    for group, ways in groups.items():
        assert {"reference", "fast"} <= ways, group


def test_each_says_what_was_timed_and_how_wrong_it_is(found: dict[str, Any]) -> None:
    for row in found["benchmarks"]:
        info = row["extra_info"]
        assert info.keys() >= {"way", "shape", "dtype", "device", "quick", "max_error"}, row["name"]
        assert info["max_error"] <= (1e-3 if info["dtype"] == "fp32" else 0.1), row["name"]
        assert ("share_of_ceiling" in info) == ("flops" in info) == ("bytes" in info), row["name"]
    assert "node" not in found["machine_info"]


def test_a_run_can_be_compared(found: dict[str, Any]) -> None:
    old = compare.read_benchmarks(found)
    assert len(old.ratios) > len(GROUPS) and old.counts
    assert compare.compare(old, old) == []


def test_labeling_around_the_model(tmp_path: Path) -> None:
    out = tmp_path / "labeling.json"
    command = [sys.executable, "-m", "bench.labeling", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    measured = json.loads(out.read_text())
    assert done.stdout.strip() == labeling.table(measured)
    assert len(measured["stages"]) == 5 and min(measured["stages"].values()) > 0
    few, many = measured["bytes"]
    assert few > 2**27 and many > 2**27  # the processes that read and write are counted


def test_a_wrong_result_gets_no_number(tmp_path: Path) -> None:
    """An operation that is a little wrong, one with integers, and a part of the model that gives NaN."""
    (tmp_path / "spoil.py").write_text(
        "from detr_fast import images, ops\n"
        "right_png, right_map, right_norm = images.panoptic_png, ops.attention_map, ops.add_layer_norm\n"
        "images.panoptic_png = lambda ids: right_png(ids + 1)\n"
        "ops.attention_map = lambda *arguments: right_map(*arguments) * 1.001\n"
        "ops.add_layer_norm = lambda *arguments: right_norm(*arguments) * float('nan')\n"
    )
    options = ("-p", "spoil", "-k", "test_png or attention_map or test_transformer")
    status, found, output = run(tmp_path / "wrong.json", *options, PYTHONPATH=str(tmp_path))
    assert status == 1 and "4 failed, 3 passed" in output
    assert {row["extra_info"]["way"] for row in found["benchmarks"]} == {"reference"}
