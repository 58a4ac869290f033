"""`bench.compare` on made-up measurements: what it catches, what it lets pass, and what it names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import main

Json = dict[str, Any]


def benchmark(group: str, way: str, seconds: list[float]) -> Json:
    info = {"way": way, "shape": "850 x 256", "dtype": "fp32", "device": "cpu", "quick": False}
    stats = {"min": seconds[0], "median": seconds[1]}
    return {"group": group, "extra_info": {**info, "flops": 1000, "bytes": 10}, "stats": stats}


BENCHMARKS: Json = {
    "benchmarks": [
        benchmark("attention", "reference", [1.0, 1.01]),
        benchmark("attention", "fast", [0.5, 0.505]),
        benchmark("whole model", "reference", [8.0, 8.1]),
        benchmark("whole model", "fast", [1.4, 1.41]),
        benchmark("whole model", "transformers", [26.0, 26.0]),
    ]
}
ROOFLINE: Json = {
    "device": "cpu",
    "stages": {"backbone": {"ours": {"gmac": 70.0, "bytes": 2000}}},
    "estimates": {"floor_seconds": 1.0},
}
BUDGET: Json = {"triton": "3.7.1", "80": {"attention/fp16": [128, 0, 4096, 8]}}
LADDER: Json = {
    "size": [800, 1066],
    "target": [480, 640],
    "kept": 15,
    "mask_head_gmac": {"800x1066": 12.06},
    "rows": {
        "plain": {"gmac": 236.5, "seconds": [8.0, 8.4, 9.0]},
        "merge": {"gmac": 93.2, "seconds": [1.3, 1.4, 1.5]},
        "transformers": {"seconds": [26.0, 27.0, 28.0]},
    },
}


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """The exit status and the lines for a file, and the same file after a change."""

    def run(old: Json, change: Callable[[Json], Any], *options: str) -> tuple[int, list[str]]:
        new = copy.deepcopy(old)
        change(new)
        for name, content in (("old", old), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        status = main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        return status, capsys.readouterr().out.splitlines()

    return run


def times(row: int, best: float, median: float) -> Callable[[Json], Any]:
    """A benchmark's best and median take so many times as long."""

    def change(found: Json) -> None:
        stats = found["benchmarks"][row]["stats"]
        stats.update(min=stats["min"] * best, median=stats["median"] * median)

    return change


@pytest.mark.parametrize("found", [BENCHMARKS, ROOFLINE, BUDGET, LADDER])
def test_the_same_twice_differs_in_nothing(compared, found: Json) -> None:
    status, (last,) = compared(found, lambda _: None)
    assert status == 0 and "0 differ" in last


def test_a_slow_down_is_caught(compared) -> None:
    status, lines = compared(BENCHMARKS, times(1, 1.3, 1.3))
    assert status == 1
    assert lines[0].startswith("slower   attention, fast: x 1.30")
    assert len(lines) == 2


def test_what_a_noisy_run_cannot_tell_is_unclear(compared) -> None:
    noisy = copy.deepcopy(BENCHMARKS)
    noisy["benchmarks"][0]["stats"]["median"] = 1.3  # of the reference
    status, lines = compared(noisy, times(1, 1.4, 1.4))
    assert status == 0 and lines[0].startswith("unclear  attention, fast: x 1.40")
    assert compared(noisy, times(1, 1.6, 1.6))[0] == 1


@pytest.mark.parametrize("change", [(1.3, 1.05), (1.05, 1.3), (1.1, 1.1)], ids=["best", "median", "little"])
def test_noise_is_not(compared, change: tuple[float, float]) -> None:
    status, lines = compared(BENCHMARKS, times(1, *change))
    assert status == 0 and len(lines) == 1


def test_a_machine_of_half_the_speed_is_not(compared) -> None:
    def slower(found: Json) -> None:
        for row in range(len(found["benchmarks"])):
            times(row, 2, 2)(found)

    status, lines = compared(BENCHMARKS, slower)
    assert status == 0 and len(lines) == 1


def test_a_faster_one_is_shown_and_passes(compared) -> None:
    status, lines = compared(BENCHMARKS, times(3, 0.5, 0.5))
    assert status == 0
    assert lines[0].startswith("faster   whole model, fast: x 0.50")


def test_another_implementation_may_become_slower(compared) -> None:
    status, lines = compared(BENCHMARKS, times(4, 2, 2))
    assert status == 0 and lines[0].startswith("slower   whole model, transformers")


def test_the_threshold_decides(compared) -> None:
    assert compared(BENCHMARKS, times(1, 1.3, 1.3), "--threshold", "1.4")[0] == 0
    assert compared(BENCHMARKS, times(1, 1.1, 1.1), "--threshold", "1.05")[0] == 1


def test_what_is_gone_or_new_is_named(compared) -> None:
    def rename(found: Json) -> None:
        for row in found["benchmarks"][:2]:
            row["group"] = "attention of two"

    status, lines = compared(BENCHMARKS, rename)
    assert status == 1
    assert "gone     attention, fast" in lines
    assert "new      attention of two, fast" in lines


def test_without_transformers_it_passes(compared) -> None:
    def remove(found: Json) -> None:
        del found["benchmarks"][4]

    old = copy.deepcopy(BENCHMARKS)
    del old["benchmarks"][4]["extra_info"]["flops"], old["benchmarks"][4]["extra_info"]["bytes"]
    status, lines = compared(old, remove)
    assert status == 0 and lines[0].startswith("gone     whole model, transformers")


def test_other_sizes_are_not_judged(compared) -> None:
    def quick(found: Json) -> None:
        times(1, 3, 3)(found)
        found["benchmarks"][1]["extra_info"]["quick"] = True

    status, lines = compared(BENCHMARKS, quick)
    assert status == 1
    assert lines[0].startswith("resized  attention, fast") and not any(line.startswith("slower") for line in lines)


@pytest.mark.parametrize(
    ("found", "path", "value", "named"),
    [
        (BENCHMARKS, ("benchmarks", 1, "extra_info", "flops"), 1001, "attention, fast, flops: 1000 before, 1001 now"),
        (ROOFLINE, ("stages", "backbone", "ours", "gmac"), 70.1, "stages, backbone, ours, gmac: 70.0 before, 70.1 now"),
        (BUDGET, ("80", "attention/fp16", 1), 8, "80, attention/fp16: [128, 0, 4096, 8] before, [128, 8, 4096, 8] now"),
        (LADDER, ("rows", "merge", "gmac"), 93.3, "merge, gmac: 93.2 before, 93.3 now"),
    ],
    ids=["benchmarks", "roofline", "budget", "ladder"],
)
def test_a_count_that_changed_is_caught(compared, found: Json, path: tuple[Any, ...], value: Any, named: str) -> None:
    def change(content: Any) -> None:
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = value

    status, lines = compared(found, change)
    assert status == 1 and lines[0] == f"changed  {named}"


def test_estimates_are_no_counts(compared) -> None:
    assert compared(ROOFLINE, lambda found: found.update(estimates={}))[0] == 0


def test_the_ladder_is_judged_by_its_plain_step(compared) -> None:
    def slower(found: Json) -> None:
        found["rows"]["merge"]["seconds"] = [2.6, 2.8, 3.0]

    status, lines = compared(LADDER, slower)
    assert status == 1 and lines[0].startswith("slower   merge: x 2.00")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "none of pytest-benchmark, ladder"),
        ('{"benchmarks": [{}]}', "no pytest-benchmark file that bench wrote: KeyError 'group'"),
        (json.dumps(LADDER), "is of the kind pytest-benchmark"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(BENCHMARKS))
    if content is not None:
        new.write_text(content)
    assert main([str(old), str(new)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(new) in error and message in error
