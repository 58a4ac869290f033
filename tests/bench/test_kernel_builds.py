"""What the compiler makes of one build of every kernel, for a GPU without tensor cores in Triton and for one with them.

`python -m bench.kernel_builds --check` does it for every build and target.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import triton

from bench import kernel_builds
from bench.kernel_builds import Outcome, Result


def one_of_each_kernel(target: int | str) -> str:
    """A pattern that matches one build of each kernel: in float16 if there is one, and the one that reads the most."""
    chosen: dict[tuple[str, str], tuple[tuple[bool, int], str]] = {}
    for name, build in kernel_builds.builds(target, "").items():
        types = build.signature.values()
        rank = "*fp16" in types, sum(kind != "constexpr" for kind in types)
        kernel = name.partition("/")[0], build.kernel.__name__
        if kernel not in chosen or rank > chosen[kernel][0]:
            chosen[kernel] = rank, name
    return "|".join(f"^{re.escape(name)}$" for _, name in chosen.values())


@pytest.mark.parametrize("target", [70, 90])
def test_a_build_of_every_kernel_keeps_the_rules_and_the_budget(target: int) -> None:
    pattern = one_of_each_kernel(target)
    outcomes = kernel_builds.build_target(target, pattern)
    assert [outcome.name for outcome in outcomes] == list(kernel_builds.builds(target, pattern))
    assert {outcome.name: kernel_builds.broken_rules(target, outcome) for outcome in outcomes} == {
        outcome.name: [] for outcome in outcomes
    }
    version, budget = kernel_builds.read_budget(pattern)
    if version == triton.__version__:
        assert kernel_builds.over_budget(outcomes, budget[str(target)]) == []


@pytest.mark.parametrize("target", kernel_builds.TARGETS)
def test_the_budget_has_every_build_and_keeps_the_rules(target: int | str) -> None:
    _, budget = kernel_builds.read_budget()
    builds = kernel_builds.builds(target, "")
    assert budget[str(target)].keys() == builds.keys()
    for name, result in budget[str(target)].items():
        outcome = Outcome(name, builds[name].num_warps, builds[name].tensor_cores, result)
        assert kernel_builds.broken_rules(target, outcome) == []
        assert kernel_builds.occupancy(target, outcome.num_warps, result) > 0


FINE = Result(registers=64, spilled=0, shared=4096, tensor_cores=8, tensor_memory=0)


def outcome(expects_tensor_cores: bool = True, **change: int) -> Outcome:
    return Outcome("op/build", 4, expects_tensor_cores, FINE._replace(**change))


@pytest.mark.parametrize(
    ("target", "made", "broken"),
    [
        (90, outcome(), []),
        (90, outcome(spilled=8), ["spills 8 bytes"]),
        (90, outcome(shared=227 * 1024), []),
        (90, outcome(shared=227 * 1024 + 1), ["needs 232449 bytes of shared memory of 232448"]),
        (75, outcome(False, shared=65 * 1024, tensor_cores=0), ["needs 66560 bytes of shared memory of 65536"]),
        (90, outcome(tensor_cores=0), ["has no tensor-core instruction"]),
        (90, outcome(False), ["has tensor-core instructions, unexpectedly"]),
        (100, outcome(tensor_memory=513), ["needs 513 columns of tensor memory of 512"]),
        (90, Outcome("op/build", 4, True, None, "exit status -6"), ["exit status -6"]),
    ],
)
def test_rules(target: int, made: Outcome, broken: list[str]) -> None:
    assert kernel_builds.broken_rules(target, made) == broken


@pytest.mark.parametrize(
    ("change", "over"),
    [
        ({}, []),
        ({"registers": 72, "shared": 0, "tensor_cores": 9}, []),
        ({"registers": 73}, ["takes 73 registers, 64 in the budget"]),
        ({"shared": 4097}, ["takes 4097 bytes of shared memory, 4096 in the budget"]),
        ({"tensor_cores": 7}, ["has 7 tensor-core instructions, 8 in the budget"]),
    ],
)
def test_budget(change: dict[str, int], over: list[str]) -> None:
    assert kernel_builds.over_budget([outcome(**change)], {"op/build": FINE}) == [("op/build", text) for text in over]


def test_budget_and_builds_must_be_the_same_ones() -> None:
    assert kernel_builds.over_budget([outcome()], {"op/other": FINE}) == [
        ("op/build", "is not in the budget"),
        ("op/other", "was not built, but the budget has it"),
    ]


@pytest.mark.parametrize(
    ("made", "status", "message"),
    [
        (outcome(), 0, ""),
        (outcome(registers=73), 1, "90 op/build: takes 73 registers, 64 in the budget\n"),
        (outcome(spilled=4), 1, "90 op/build: spills 4 bytes\n"),
    ],
)
def test_command_fails_on_what_is_over_the_budget_that_it_wrote(
    made: Outcome,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "budget.json"
    monkeypatch.setattr(kernel_builds, "BUDGET", path)
    monkeypatch.setattr(kernel_builds, "build_target", lambda target, pattern: [outcome()])
    assert kernel_builds.main(["--targets", "90", "--out", str(path)]) == 0
    monkeypatch.setattr(kernel_builds, "build_target", lambda target, pattern: [made])
    assert kernel_builds.main(["--targets", "90", "--check"]) == status
    assert capsys.readouterr().err == message
    path.write_text(path.read_text().replace(triton.__version__, "3.0.0"))
    assert kernel_builds.main(["--targets", "90", "--check"]) == 1
    assert f"budget.json is for Triton 3.0.0, this is {triton.__version__}" in capsys.readouterr().err


def test_command_needs_a_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_builds, "build_target", lambda target, pattern: [])
    with pytest.raises(SystemExit, match="2"):
        kernel_builds.main(["--only", "no such build"])
    assert "--only must match a build, got no such build" in capsys.readouterr().err


def test_a_compiler_that_dies_fails_the_build_it_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "building op/build\nbuilding op/next\nLLVM ERROR: cannot select\n"
    died = subprocess.CompletedProcess([], -6, json.dumps(outcome()) + "\n", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    first, last = kernel_builds.build_target(90, "")
    assert first == outcome() and last.name == "op/next"
    assert kernel_builds.broken_rules(90, last) == ["exit status -6: LLVM ERROR: cannot select"]


@pytest.mark.parametrize(
    ("target", "num_warps", "change", "blocks", "warps"),
    [
        (90, 4, {"registers": 96, "shared": 28672}, 5, 64),  # 16384 registers of a partition hold 5 warps
        (90, 4, {"registers": 32, "shared": 28672}, 7, 64),  # each block's shared memory is 1 KiB larger
        (90, 2, {"registers": 40}, 24, 64),  # 12 warps a partition
        (90, 1, {"registers": 104}, 16, 64),  # 4 a partition, and not a quarter of 19
        (90, 4, {"registers": 0}, 16, 64),
        (86, 1, {"registers": 20}, 16, 48),
        (89, 1, {"registers": 20}, 24, 48),
        (75, 1, {"registers": 20}, 16, 32),
        (70, 4, {"registers": 255, "shared": 48 * 1024}, 2, 64),
        (70, 4, {"registers": 255, "shared": 48 * 1024 + 1}, 1, 64),
        (100, 4, {"tensor_memory": 256}, 2, 64),
        ("gfx942", 4, {"registers": 248, "shared": 8192}, 2, 32),  # 2 of a SIMD's 512
        ("gfx942", 4, {"registers": 64, "shared": 8193}, 7, 32),
    ],
)
def test_occupancy(target: int | str, num_warps: int, change: dict[str, int], blocks: int, warps: int) -> None:
    """By hand, and those of NVIDIA as by CUDA's cuda_occupancy.h but for tensor memory, which that does not know."""
    result = Result(0, 0, 0, 0, 0)._replace(**change)
    assert kernel_builds.occupancy(target, num_warps, result) == blocks * num_warps / warps
