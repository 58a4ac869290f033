"""Everything that needs a CUDA device, in one command and at most 8 minutes.

    python -m bench.gpu [--out FILE.json] [--quick]

Runs the tests marked gpu; measures the device's ceilings, each kernel cold and in a CUDA graph against its definition
in PyTorch, the model against plain PyTorch, and `Predictor` from uint8 pictures to segments. A result is compared with
float64 before it is timed: what is wrong gets no time. Each section is a process of its own with a time limit, so that
neither a crash nor a slow compilation takes the others along; what did not fit is reported as not run. Exits with 1 if
anything failed or was wrong, with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bench import cases, measure
from bench.cases import REAL
from bench.gpu_tables import Row, broken, tables
from bench.ladder import errors, transformers_model
from bench.operations import on_gpu
from bench.operations.case import BRAIN, HALF, NAMES, SINGLE, Case, Draw, wrong
from detr_fast import ops
from detr_fast.predictor import PanopticResult, Predictor

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numpy", "scipy", "pillow", "transformers", "pycocotools")


# ---- time ----


class Timer(Protocol):
    """Seconds of a call, several samples of them."""

    def cold(self, call: Callable[[], Any]) -> list[float]: ...

    def graph(self, calls: Sequence[Callable[[], Any]]) -> list[float]: ...

    def latency(self, call: Callable[[], Any], seconds: float) -> list[float]: ...


class CudaTimer:
    """The device's own clock for kernels, the host's for whole models."""

    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=device)

    def cold(self, call: Callable[[], Any]) -> list[float]:
        """With no input in the cache, and the host so far ahead that launching does not count until it is slow."""
        _until_done(call)  # compiles
        once = _until_done(call)
        pairs = [_events() for _ in range(_count(0.1, once, 3, 50))]
        for start, end in pairs:
            for _ in range(8):
                self.scratch.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def graph(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Of one of `calls`, which are replayed in turn without gaps; their inputs should not all fit in the cache."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # else each would write where the one before it did
        once = _until_done(graph.replay)
        pairs = [_events() for _ in range(_count(0.1, once, 5, 30))]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / len(kept) for start, end in pairs]

    def latency(self, call: Callable[[], Any], seconds: float) -> list[float]:
        """From the call until the device is done."""
        _until_done(call)
        return [_until_done(call) for _ in range(_count(seconds, _until_done(call), 2, 30))]


def _until_done(call: Callable[[], Any]) -> float:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return measure.seconds(run)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _count(seconds: float, once: float, least: int, most: int) -> int:
    return min(most, max(least, int(seconds / max(once, 1e-6))))


# ---- rows ----


class Rows:
    """The rows of a section, written to `path` after each one, so that a section that is cut off leaves what it has."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        self.rows: list[Row] = []

    def measure(self, key: Row, need: float, call: Callable[[], Row]) -> None:
        """Adds `key` and what `call` returns, or that it failed, or that too little time, under `need`, was left."""
        if self.end - time.monotonic() < need:
            self.add({**key, "not_run": f"less than {need:.0f} s left"})
            return
        try:
            row = call()
        except torch.cuda.OutOfMemoryError:
            row = {"not_run": "out of memory"}
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.add({**key, **row})

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows))
        print({name: value for name, value in row.items() if isinstance(value, str | int)}, file=sys.stderr, flush=True)


# ---- the device ----


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """bfloat16 needs sm_80; older devices emulate it."""
    return dtype != BRAIN or device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


def measure_ceilings(rows: Rows, timer: Timer, device: torch.device, side: int = 8192) -> None:
    """What the memory and the matrix units of this device give at most: a large copy, and large products."""
    draw = Draw(device, 0)

    def copy() -> Row:
        source = draw.normal(4 * side, side)
        target = torch.empty_like(source)
        return {"bytes": 2 * source.nbytes, "seconds": timer.cold(lambda: target.copy_(source))}

    rows.measure({"name": "copy"}, 3, copy)
    for dtype in (HALF, BRAIN, SINGLE):
        if not supports(dtype, device):
            continue

        def product(dtype: torch.dtype = dtype) -> Row:
            n = side if dtype != SINGLE else side // 2
            a, b = draw.normal(n, n, dtype=dtype), draw.normal(n, n, dtype=dtype)
            return {"flops": 2 * n**3, "seconds": timer.cold(partial(torch.matmul, a, b))}

        rows.measure({"name": f"GEMM {NAMES[dtype]}"}, 3, product)


# ---- kernels ----


def measure_kernels(rows: Rows, timer: Timer, device: torch.device, chosen: Iterable[Case]) -> None:
    for case in chosen:
        key = {"op": case.op, "name": case.name, "dtype": NAMES[case.dtype], "bytes": case.bytes, "flops": case.flops}
        if supports(case.dtype, device):
            rows.measure(key, 4, partial(measure_case, case, timer, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def measure_case(case: Case, timer: Timer, device: torch.device) -> Row:
    inputs = case.inputs(Draw(device, 0))
    reason = wrong(case, inputs)
    if reason:
        return {"wrong": reason}
    sets = [inputs, *(case.inputs(Draw(device, seed)) for seed in range(1, rotations(case, device)))]
    row: Row = {"ours": timed(case.ours, sets, timer, case.graph), "plain": timed(case.plain, sets, timer, False)}
    for name, rival in case.rivals.items():
        try:
            rival(*inputs)
        except RuntimeError as error:  # a backend of SDPA that cannot do this shape, mask or dtype here
            row[name] = {"unsupported": str(error).splitlines()[0][:200]}
        else:
            row[name] = timed(rival, sets, timer, case.graph)
    return row


def rotations(case: Case, device: torch.device) -> int:
    """How many sets of inputs outgrow the cache three times over; at most 16."""
    if device.type != "cuda" or not case.graph:
        return 1
    return measure.rotations(case.bytes, device)


def timed(call: Callable[..., Any], sets: list[tuple[Any, ...]], timer: Timer, graph: bool) -> Row:
    turn = cycle(sets)
    row = {"cold": timer.cold(lambda: call(*next(turn)))}
    if graph:
        row["graph"] = timer.graph([partial(call, *inputs) for inputs in sets])
    return row


# ---- the model ----


@dataclass(frozen=True)
class Rung:
    """The panoptic model, computed in one way."""

    name: str
    dtype: torch.dtype
    fast: bool
    kept: int | None  # queries whose masks are computed, of each image; None: all

    def forward(self, model: Any, samples: Tensor) -> dict[str, Any]:
        """Plain models compute in float16 the way PyTorch's autocast does, ours by their argument."""
        rules = nullcontext() if self.fast else ops.plain()
        mixed = torch.autocast(samples.device.type, self.dtype, enabled=not self.fast and self.dtype != SINGLE)
        with torch.no_grad(), rules, mixed:
            return model(
                samples,
                None if self.kept is None else cases.keep(self.kept),
                self.dtype if self.fast else None,
            )


# What a row's logits, boxes and masks of unit size may be off from float64; PyTorch's float32 convolutions are TF32.
ALLOWED = {SINGLE: 0.1, HALF: 0.5, BRAIN: 0.5}


def rungs(kept: int) -> list[Rung]:
    """In the order of their worth, so that time runs out on the least."""
    return [
        Rung("plain fp32 eager", SINGLE, False, None),
        Rung("plain fp16 autocast", HALF, False, None),
        Rung("ours fp32", SINGLE, True, kept),
        Rung("ours fp16", HALF, True, kept),
        Rung("ours bf16", BRAIN, True, kept),
        Rung("ours fp16, all masks", HALF, True, None),
        Rung("plain fp32 eager, kept masks", SINGLE, False, kept),
        Rung("plain fp16 autocast, kept masks", HALF, False, kept),
    ]


class Ladder:
    """A model, images, and what the first of them gives in float64."""

    def __init__(self, model: Any, images: Tensor, kept: int):
        self.model, self.images, self.count = model, images, kept
        queries = model.config.num_queries
        self.kept = cases.keep(kept)(torch.empty(1, queries, 1))[0].to(images.device)
        model.double()
        exact = Rung("float64", torch.float64, True, kept)
        with ops.plain():
            self.truth = self.outputs(exact.forward(model, images[:1].double()))
        model.float()

    def outputs(self, out: dict[str, Any]) -> dict[str, Tensor]:
        """Of the first image; of its masks, those of the kept queries."""
        masks = out["pred_masks"]
        masks = masks[0] if isinstance(masks, list) else masks[0][self.kept]
        return {"logits": out["pred_logits"][:1], "boxes": out["pred_boxes"][:1], "masks": masks}

    def row(self, timer: Timer, batch: int, dtype: torch.dtype, call: Callable[[Tensor], dict[str, Any]]) -> Row:
        """Error, peak memory and time of `call` on a batch of images."""
        samples = self.images[:batch]
        out = call(samples)
        error = errors(self.outputs(out), self.truth)
        del out
        if not max(error.values()) <= ALLOWED[dtype]:
            return {"wrong": f"errors {error}, above {ALLOWED[dtype]}", "error": error}
        peak = measure.peak_extra_bytes(lambda: call(samples), samples.device)
        return {"error": error, "peak_bytes": peak, "seconds": timer.latency(lambda: call(samples), 1.0)}


def measure_ladder(rows: Rows, timer: Timer, ladder: Ladder, batches: Sequence[int]) -> None:
    theirs = transformers_model(ladder.model)
    for batch in batches:
        for rung in rungs(ladder.count):
            if supports(rung.dtype, ladder.images.device):
                forward = partial(rung.forward, ladder.model)
                rows.measure(
                    {"name": rung.name, "batch": batch}, 4, partial(ladder.row, timer, batch, rung.dtype, forward)
                )
        if theirs is not None:
            call = as_ours(theirs.to(ladder.images.device))
            key = {"name": f"transformers {version('transformers')} fp32", "batch": batch}
            rows.measure(key, 8, partial(ladder.row, timer, batch, SINGLE, call))


def as_ours(theirs: nn.Module) -> Callable[[Tensor], dict[str, Any]]:
    @torch.no_grad()
    def call(samples: Tensor) -> dict[str, Any]:
        out = theirs(samples)
        return {"pred_logits": out.logits, "pred_boxes": out.pred_boxes, "pred_masks": out.pred_masks}

    return call


def measure_compiled(rows: Rows, timer: Timer, ladder: Ladder, batches: Sequence[int]) -> None:
    """torch.compile of the plain model, all masks. Its compilation, minutes perhaps, is in the first of its calls."""
    compiled = torch.compile(ladder.model, dynamic=False)
    for dtype in (HALF, SINGLE):
        call = partial(Rung("", dtype, False, None).forward, compiled)
        for batch in batches:
            key = {"name": f"torch.compile of plain {NAMES[dtype]}", "batch": batch}
            rows.measure(key, 30, partial(ladder.row, timer, batch, dtype, call))


# ---- from pictures to segments ----

# (width, height) of photographs as COCO has them
ONE_SIZE, COCO_SIZES = [(640, 480)], [(640, 480), (480, 640), (640, 427), (640, 480), (427, 640), (500, 375)]


def measure_predictor(
    rows: Rows, timer: Timer, model: Any, device: torch.device, batches: Sequence[int], count: int, kept: int
) -> None:
    """Arrays in, segments out: reading a file and decoding a JPEG are left out."""
    for name, sizes in (("one size", ONE_SIZE), ("COCO's sizes", COCO_SIZES)):
        pictures = cases.photographs(count, sizes)
        for batch in batches:
            call = partial(predictor_row, timer, model, device, pictures, batch, kept)
            rows.measure({"name": name, "batch": batch}, 8, call)


def predicted(predictor: Predictor, pictures: list[np.ndarray]) -> list[PanopticResult]:
    return predictor.predict([predictor.prepare(picture) for picture in pictures])


def predictor_row(
    timer: Timer, model: Any, device: torch.device, pictures: list[np.ndarray], batch: int, kept: int
) -> Row:
    # as many queries as a photograph keeps: those above a threshold that suits the random model
    every = predicted(Predictor(model, device=device, threshold=0.0), pictures[:1])[0].scores
    threshold = float(np.sort(every)[::-1][min(kept, len(every) - 1)])
    predictor = Predictor(model, device=device, threshold=threshold, batch_size=batch)
    results = predicted(predictor, pictures)
    return {
        "images": len(pictures),
        "dtype": NAMES[predictor.dtype],
        "kept": statistics.mean(len(result.scores) for result in results),
        "segments": statistics.mean(len(result.segments_info) for result in results),
        "prepare": timer.latency(lambda: [predictor.prepare(picture) for picture in pictures], 1.0),
        "seconds": timer.latency(lambda: predicted(predictor, pictures), 3.0),
    }


# ---- tests ----


def gpu_tests() -> list[str]:
    """Files with tests that need a CUDA device, marked or by the fixture `device`; others may need more packages."""
    pattern = re.compile(r"mark\.gpu|\bdevice: torch\.device")
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if pattern.search(path.read_text()))


def run_tests(rows: Rows, files: Sequence[str]) -> None:
    def call() -> Row:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--durations=5", "-p", "no:cacheprovider"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen([*command, *files], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                returncode: int | None = process.wait(rows.end - time.monotonic())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                returncode = None
            log.seek(0)
            output = log.read()[-6000:]
        summary = output.strip().rsplit("\n", 1)[-1]
        row: Row = {"returncode": returncode, "output": output, "summary": summary}
        if returncode is None:
            return {**row, "not_run": f"cut off at {summary[-60:]!r}"}
        return row if returncode == 0 else {**row, "failed": summary}

    rows.measure({"name": "pytest -m gpu"}, 5, call)


# ---- sections ----


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: at most so many seconds, and what it does with them."""

    seconds: float
    run: Callable[[Rows, bool], None]


def tests_section(rows: Rows, quick: bool) -> None:
    run_tests(rows, gpu_tests())


def kernels_section(rows: Rows, quick: bool) -> None:
    chosen = [case for case in on_gpu() if not quick or (case.batch == REAL.batches[1] and case.dtype != BRAIN)]
    measure_kernels(rows, CudaTimer(cuda()), cuda(), chosen)


def ladder_of(batch: int) -> Ladder:
    model = cases.panoptic_model().to(cuda())
    return Ladder(model, cases.images(batch, cases.TYPICAL).to(cuda()), cases.KEPT)


def ladder_section(rows: Rows, quick: bool) -> None:
    batches = REAL.batches[: 2 if quick else 3]
    measure_ladder(rows, CudaTimer(cuda()), ladder_of(batches[-1]), batches)


def predictor_section(rows: Rows, quick: bool) -> None:
    batches = REAL.batches[1:2] if quick else REAL.batches
    model = cases.panoptic_model().to(cuda())
    measure_predictor(rows, CudaTimer(cuda()), model, cuda(), batches, 64, cases.KEPT)


def compiled_section(rows: Rows, quick: bool) -> None:
    batches = REAL.batches[: 1 if quick else 2]
    measure_compiled(rows, CudaTimer(cuda()), ladder_of(batches[-1]), batches)


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


# The last gets what the others leave.
SECTIONS = {
    "ceilings": Section(25, lambda rows, quick: measure_ceilings(rows, CudaTimer(cuda()), cuda())),
    "tests": Section(130, tests_section),
    "kernels": Section(130, kernels_section),
    "ladder": Section(80, ladder_section),
    "predictor": Section(50, predictor_section),
    "compiled": Section(120, compiled_section),
}
LIMIT, QUICK_LIMIT = 465.0, 170.0
START = 12.0  # to import PyTorch and start CUDA


def run_section(name: str, seconds: float, quick: bool) -> Row:
    """Runs a section in a process of its own, which is ended, with all it started, once its time is over."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        command = [sys.executable, "-m", "bench.gpu", "--section", name, "--out", str(path)]
        command += ["--seconds", str(max(1.0, seconds - START))] + (["--quick"] if quick else [])
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(seconds)
            status = "done" if process.returncode == 0 else f"failed: exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: what it started ends with it
                process.wait()
        rows = json.loads(path.read_text()) if path.exists() else []
    return {"status": status, "seconds": time.monotonic() - start, "rows": rows}


def run_all(quick: bool, commit: str | None, out: Path | None) -> Row:
    end = time.monotonic() + (QUICK_LIMIT if quick else LIMIT)
    result: Row = {"quick": quick, "machine": machine(commit), "sections": {}}
    names = [name for name in SECTIONS if not (quick and name in ("tests", "compiled"))]
    for name in names:
        left = end - time.monotonic()
        seconds = left if name == names[-1] else min(left, SECTIONS[name].seconds)
        enough = seconds > START + 5
        not_run = {"status": "not run: no time left", "seconds": 0.0, "rows": []}
        result["sections"][name] = run_section(name, seconds, quick) if enough else not_run
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def machine(commit: str | None) -> Row:
    """What a figure must be read with."""
    found = measure.machine()
    properties = torch.cuda.get_device_properties(cuda())
    return {
        **found,
        "commit": commit or found["commit"],
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "versions": {package: version(package) for package in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- command ----


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write every sample to this JSON file")
    parser.add_argument("--quick", action="store_true", help="one batch size, without the tests and torch.compile")
    parser.add_argument("--commit", help="what is measured, where the files are no git checkout")
    parser.add_argument("--show", type=Path, help="measure nothing: print the tables of this JSON file")
    parser.add_argument("--section", choices=SECTIONS, help="run one section here and write its rows to --out")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time for --section")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(json.loads(arguments.show.read_text())))
        return
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device: nothing was measured", file=sys.stderr)
        sys.exit(2)
    if arguments.section:
        if not arguments.out:
            parser.error("--section needs --out")
        SECTIONS[arguments.section].run(Rows(arguments.out, arguments.seconds), arguments.quick)
        return
    result = run_all(arguments.quick, arguments.commit, arguments.out)
    print(tables(result))
    sys.exit(1 if broken(result) else 0)


if __name__ == "__main__":
    main()
