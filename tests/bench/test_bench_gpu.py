"""`bench.gpu` without a GPU: all of it but the CUDA clock, at tiny shapes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, gpu, measure
from bench.cases import REAL, TINY
from bench.gpu_tables import broken, tables
from bench.operations import on_gpu
from bench.operations.case import Case, Draw, poisoned, wrong
from detr_fast.kernels.common import NAMES
from tiny import CONFIG

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CASES = {f"{case.op}: {case.name}": case for case in on_gpu(TINY)}
MATRIX_OPS = ("attention", "attention_map")


class HostTimer:
    """Takes the time once, and runs what it is given."""

    def cold(self, call: Any) -> list[float]:
        return [measure.seconds(call)]

    def graph(self, calls: Any) -> list[float]:
        return [measure.seconds(call) for call in calls]

    def latency(self, call: Any, seconds: float) -> list[float]:
        return [measure.seconds(call)]


def inputs_of(case: Case) -> tuple[Any, ...]:
    return case.inputs(Draw(CPU, 0))


def test_every_kernel_has_cases_of_unique_name() -> None:
    assert {case.op for case in CASES.values()} == set(NAMES)
    assert len(CASES) == len(on_gpu(TINY)) == len(on_gpu(REAL))


@pytest.mark.parametrize("name", CASES)
def test_operation_is_its_definition(name: str) -> None:
    assert wrong(CASES[name], inputs_of(CASES[name])) is None


@pytest.mark.parametrize("name", [name for name in CASES if "backward" not in name])
def test_bytes_are_those_of_inputs_and_outcome(name: str) -> None:
    case = CASES[name]
    inputs = inputs_of(case)
    # what is one number a query, channel or class is left out, and so is what only the definition reads
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.ndim > 1]
    tensors = tensors[:1] if case.op in ("mask_upsample", "panoptic_merge") else tensors
    expected = sum(tensor.nbytes for tensor in [*tensors, case.ours(*inputs)])
    if case.op == "attention":  # the log-sum-exp, float32
        expected += 4 * inputs[0].shape[0] * TINY.heads * inputs[0].shape[1]
    assert case.bytes == expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op in MATRIX_OPS])
def test_flops_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    inputs = inputs_of(case)
    with FlopCounterMode(display=False) as counter:
        case.plain(*inputs)
    assert case.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op not in MATRIX_OPS])
def test_memory_bound_operations_have_few_flops_a_byte(name: str) -> None:
    assert 0 < CASES[name].flops < 30 * CASES[name].bytes


@pytest.mark.parametrize("op", sorted({case.op for case in CASES.values()}))
def test_a_wrong_result_is_seen_and_gets_no_time(op: str) -> None:
    case = next(case for case in CASES.values() if case.op == op)

    def off(*arguments: Any) -> Tensor:
        out = case.ours(*arguments).contiguous().clone()
        out.view(-1)[out.numel() // 2] += 1
        return out

    broken_case = Case(**{**vars(case), "ours": off})
    row = gpu.measure_case(broken_case, HostTimer(), CPU)
    assert list(row) == ["wrong"]


def test_unwritten_memory_is_poisoned() -> None:
    assert poisoned(lambda: torch.empty(100)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    case = next(case for case in CASES.values() if case.op == "add_layer_norm")
    row = gpu.measure_case(Case(**{**vars(case), "ours": lambda x, *_: torch.empty_like(x)}), HostTimer(), CPU)
    assert "nan" in row["wrong"]


class Theirs(torch.nn.Module):
    """A model whose outcome is called what transformers calls it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> SimpleNamespace:
        out = self.model(samples)
        return SimpleNamespace(logits=out["pred_logits"], pred_boxes=out["pred_boxes"], pred_masks=out["pred_masks"])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A whole run on the CPU, without the minute that importing transformers and compiling take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "transformers_model", Theirs)
        patch.setattr(torch, "compile", lambda model, **_: model)
        yield whole_run(tmp_path_factory.mktemp("gpu"))


def whole_run(folder: Path) -> dict[str, Any]:
    timer, sections = HostTimer(), {}
    (folder / "test_nothing.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): pass\n")
    chosen = [case for case in CASES.values() if case.dtype == torch.float16][::3]
    model = cases.panoptic_model(CONFIG)
    ladder = gpu.Ladder(model, cases.images(2, (64, 96)), kept=3)
    runs = {
        "ceilings": lambda rows: gpu.measure_ceilings(rows, timer, CPU, side=16),
        "tests": lambda rows: gpu.run_tests(rows, [str(folder / "test_nothing.py")]),
        "kernels": lambda rows: gpu.measure_kernels(rows, timer, CPU, chosen),
        "ladder": lambda rows: gpu.measure_ladder(rows, timer, ladder, (1, 2)),
        "predictor": lambda rows: gpu.measure_predictor(rows, timer, model, CPU, (2,), 2, 3),
        "compiled": lambda rows: gpu.measure_compiled(rows, timer, ladder, (1,)),
    }
    for name, run in runs.items():
        rows = gpu.Rows(folder / f"{name}.json", seconds=1000)
        run(rows)
        sections[name] = {"status": "done", "seconds": 1.0, "rows": json.loads(rows.path.read_text())}
        assert sections[name]["rows"] == rows.rows
    machine = {
        "device": "none",
        "capability": "9.0",
        "driver": "1",
        "cuda": "1",
        "commit": "0" * 40,
        "versions": {name: gpu.version(name) for name in gpu.PACKAGES},
    }
    return {"quick": False, "machine": machine, "sections": sections}


def test_a_whole_run_has_a_time_for_every_row(result: dict[str, Any]) -> None:
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    assert set(rows) == set(gpu.SECTIONS)
    assert rows["tests"][0]["summary"].startswith("1 passed")
    del rows["tests"]
    for row in [row for section in rows.values() for row in section]:
        samples = row["ours"]["cold"] if "ours" in row else row["seconds"]
        assert samples
        assert all(math.isfinite(sample) and sample > 0 for sample in samples)
    assert {rung.name for rung in gpu.rungs(3)} <= {row["name"] for row in rows["ladder"] if row["batch"] == 2}
    for row in rows["ladder"]:
        assert max(row["error"].values()) < (1e-3 if "fp32" in row["name"] else 0.5), row["name"]


def test_tables_show_every_row(result: dict[str, Any]) -> None:
    shown = tables(result)
    for name in ("ladder", "kernels", "predictor", "compiled"):
        for row in result["sections"][name]["rows"]:
            assert row["name"] in shown
    assert "not run" not in shown


def test_what_failed_or_did_not_fit_is_said(tmp_path: Path, result: dict[str, Any]) -> None:
    rows = gpu.Rows(tmp_path / "rows.json", seconds=5)
    rows.measure({"name": "slow"}, 60, lambda: {"seconds": [1.0]})
    rows.measure({"name": "bad"}, 0, lambda: {"seconds": 1 / 0})
    rows.measure({"name": "fine", "batch": 1}, 0, lambda: {"wrong": "error 1"})
    sections = {"ladder": {"status": "cut off after 5 s", "seconds": 5.0, "rows": rows.rows}}
    partial_result = {**result, "sections": sections}
    assert broken(partial_result) == [
        "ladder, bad: ZeroDivisionError: division by zero",
        "ladder, fine, batch 1: error 1",
    ]
    assert "not run: slow" in tables(partial_result)
    assert "cut off" in tables(partial_result)


def test_a_section_ends_in_time() -> None:
    section = gpu.run_section("kernels", 0.2, quick=True)
    assert section["status"] == "cut off after 0 s"
    assert section["seconds"] < 5
    assert section["rows"] == []


def test_failing_and_endless_tests_are_told_apart(tmp_path: Path) -> None:
    start = "import pytest, time\n@pytest.mark.gpu\ndef test(): "
    outcomes = []
    for body, seconds in (("assert 0", 60), ("time.sleep(60)", 5.5)):
        (tmp_path / "test_it.py").write_text(start + body + "\n")
        rows = gpu.Rows(tmp_path / "rows.json", seconds)
        gpu.run_tests(rows, [str(tmp_path / "test_it.py")])
        outcomes.append({"failed", "not_run"} & set(rows.rows[0]))
    assert outcomes == [{"failed"}, {"not_run"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "bench.gpu: no CUDA device: nothing was measured\n"


def test_needs_no_package_but_those_promised() -> None:
    absent = ("pycocotools", "transformers", "safetensors", "huggingface_hub", "tqdm", "hypothesis")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.gpu; bench.gpu.on_gpu()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_the_files_that_have_gpu_tests() -> None:
    names = {Path(path).name for path in gpu.gpu_tests()}
    assert {"test_preprocess_device.py", "test_mask_upsample.py"} <= names
    assert "test_readme.py" not in names
