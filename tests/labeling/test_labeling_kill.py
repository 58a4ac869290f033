"""Labeling that is killed: the whole process at random moments, its workers, and by signals that ask."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.checkpoint import save_model
from detr_fast.labeling.model import Model, find, in_memory, model_process, options_of
from detr_fast.labeling.stages import Found, Slot
from detr_fast.labeling.workers import SharedMemory, WorkerDied, WorkerPool
from detr_fast.predictor import Predictor
from poison import DiesOnce
from tiny import tiny_detr

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("DETR_FAST_KILLS", "4"))
IMAGES = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_detr(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        size = [(96, 64), (64, 96), (80, 80)][number % 3]
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    (folder / "bad.jpg").write_text("not a picture")
    return folder


def start(images: Path, out: Path, model: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["--out", out, "--model", model, "--device", "cpu", "--threshold", "0.2", "--max-size", "160", *options]
    command = [sys.executable, "-m", "detr_fast", "label", str(images), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, err


def contents(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how the run went."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lines = files.pop("manifest.jsonl").splitlines()
    assert len({json.loads(line)["file"] for line in lines}) == len(lines)
    return {**files, "manifest lines": b"\n".join(sorted(lines))}


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(pictures, out, model)) == (0, "")
    return contents(out)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def lines(out: Path) -> int:
    path = out / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_nothing_is_lost_by_sigkill_at_any_moment(
    pictures: Path, model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    kills = done = 0
    orphans: list[int] = []
    while kills < KILLS:
        process = start(pictures, out, model, "--resume", "--workers", str(moments.randint(1, 2)))
        # most of the time goes by before the first image: two of three times count from there
        while kills % 3 and process.poll() is None and lines(out) == done and not list(out.glob("panoptic/*.tmp")):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 4 if kills % 3 == 0 else 0.5))
        orphans += children(process.pid)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        if (out / "failures.jsonl").exists():  # the last file of a run that is done, so begin anew
            assert contents(out) == undisturbed
            shutil.rmtree(out)
        assert lines(out) >= done or not out.exists()
        done = lines(out)
        if done and b'"error"' in (out / "manifest.jsonl").read_bytes():
            done -= 1  # what failed is tried again
    assert finish(start(pictures, out, model, "--resume")) == (0, "")
    assert contents(out) == undisturbed
    assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_what_has_begun(
    pictures: Path, model: Path, undisturbed: dict[str, bytes], tmp_path: Path, number: int, code: int
) -> None:
    process = start(pictures, tmp_path / "out", model, "--batch-size", "1")
    while not list(tmp_path.glob("out/panoptic/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    assert workers
    process.send_signal(number)
    ended, err = finish(process)
    assert ended == code
    assert err.count("\n") <= 1 and "Traceback" not in err
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    # each PNG that was written is recorded, so that nothing is done twice
    labelled = [line for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines() if "error" not in line]
    assert 1 <= len(labelled) == len(list(tmp_path.glob("out/panoptic/*"))) < IMAGES
    assert not list(tmp_path.rglob("*.tmp"))
    assert finish(start(pictures, tmp_path / "out", model, "--resume")) == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def test_workers_that_die_are_replaced(
    pictures: Path, model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(pictures, tmp_path / "out", model, "--workers", "2", "--batch-size", "1")
    killed = 0
    while process.poll() is None:
        if list(tmp_path.glob("out/panoptic/*.png")) and killed < 3 and (pids := children(process.pid)):
            os.kill(pids[0], signal.SIGKILL)
            killed += 1
        time.sleep(0.3)
    assert finish(process) == (0, "")
    assert killed >= 1
    assert contents(tmp_path / "out") == undisturbed


def test_a_task_is_tried_twice_and_others_go_on() -> None:
    with WorkerPool(1, (os.getpid, ())) as pool:
        poison = pool.submit(os._exit, 3)
        harmless = pool.submit(divmod, 7, 2)
        assert harmless.result(60) == (3, 1)
        with pytest.raises(WorkerDied, match="twice .code 3"):
            poison.result(60)
        with pytest.raises(FileNotFoundError):
            pool.submit(os.stat, "no such file").result(60)
        pids = pool.pids()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_model_that_dies_between_batches_reads_the_same_pixels_again(tmp_path: Path) -> None:
    model = tiny_detr()
    model.__class__, model.mark = DiesOnce, str(tmp_path / "died")
    predictor = Predictor(model, device="cpu", threshold=0.2, size=48, max_size=64)
    memory = SharedMemory(3, 1 << 20)
    shape, generator = (48, 64, 3), np.random.default_rng(0)
    slots = [Slot(number, shape, shape[:2], (30, 40)) for number in range(3)]
    for slot in slots:
        memory.array(slot.number, shape, np.uint8)[:] = generator.integers(0, 256, shape)

    def ids(found: list[Found]) -> list[np.ndarray]:
        return [memory.array(k, a.shape, a.dtype, a.offset).copy() for k, a in enumerate(found)]

    arguments = ("cpu", options_of(predictor), torch.get_num_threads())
    with in_memory(partial(torch.save, model)) as saved, model_process(memory, saved, *arguments) as pool:
        twice = [found for batch in pool.submit(find, [[slot] for slot in slots]).result() for found in batch]
        found = ids(twice)
    assert (tmp_path / "died").exists()
    once = [Model(predictor, memory).start([slot])()[0] for slot in slots]
    assert twice == once and len(twice[0].segments_info) > 1
    assert all(map(np.array_equal, found, ids(once)))


def test_workers_that_cannot_start_are_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerPool(2, (os._exit, (5,))) as pool, pytest.raises(RuntimeError, match="cannot be started.* 5"):
        pool.submit(divmod, 7, 2).result(60)


def test_shared_memory_keeps_slots_apart_and_gives_pages_back() -> None:
    memory = SharedMemory(3, 64 << 20)
    other = SharedMemory(3, 64 << 20, os.dup(memory.descriptor))
    memory.array(1, (64 << 20,), np.uint8)[:] = 7
    assert other.array(1, (2, 5), np.uint8).tolist() == [[7] * 5] * 2
    assert not other.array(0, (64 << 20,), np.uint8).any() and not other.array(2, (9,), np.float32).any()
    before = os.fstat(memory.descriptor).st_blocks
    memory.empty(1)
    assert os.fstat(memory.descriptor).st_blocks <= before - (32 << 20) // 512
    with pytest.raises(ValueError, match="bytes are needed"):
        memory.array(0, (1 << 40,), np.uint8)
