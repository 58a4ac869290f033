"""Labeling on a local Ray, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from PIL import Image
from test_labeling import contents, make_strange_images
from tqdm import tqdm

from contract import picture
from detr_fast.checkpoint import save_model
from detr_fast.labeling import ray_session
from detr_fast.labeling.cluster import ClusterEngine
from detr_fast.labeling.interrupt import Interrupt
from detr_fast.labeling.local import Job
from detr_fast.labeling.manifest import Manifest
from detr_fast.labeling.pipeline import label
from detr_fast.labeling.stages import Reading, Writing
from detr_fast.predictor import Predictor
from poison import DiesOverWhite, Poison
from tiny import tiny_detr

KILLED = "its process ended twice (signal 9), perhaps for lack of memory"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_detr(), device="cpu", threshold=0.2, max_size=160)


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Poison is unpickled by the workers
        ray.init("local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_goes_on_with_a_local_run_to_the_same_bytes(
    predictor: Predictor, running_ray: None, tmp_path: Path
) -> None:
    good, bad = make_strange_images(tmp_path / "in")
    label(tmp_path / "in", tmp_path / "local", predictor)
    label(tmp_path / "in", tmp_path / "ray", predictor, limit=30)
    summary = label(tmp_path / "in", tmp_path / "ray", predictor, engine="ray", resume=True)
    assert (summary.labelled, summary.failed) == (len(good), len(bad))
    assert len(bad) < summary.computed < len(good) + len(bad)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert ray.is_initialized()  # as it was before


def test_an_image_that_kills_its_reader_fails_alone_and_a_full_disk_ends_the_run(
    predictor: Predictor, running_ray: None, tmp_path: Path
) -> None:
    files = ["a.png", "b.png", "poison.png", "z.png"]
    for file in files:
        picture(40, 30).save(tmp_path / file)

    def run(out: Path) -> None:
        with Manifest(tmp_path, "0" * 16, files) as manifest, tqdm(disable=True) as bar:
            reading, writing = Reading(True, 40, 60, False), Writing(out, ("panoptic",), None, 0, 250)
            job = Job(predictor, Poison(tmp_path), reading, writing, manifest, Interrupt(), bar)
            ClusterEngine(job).run([file for file in files if not manifest.done(file)], {})

    with pytest.raises(NotADirectoryError, match=r"^\[Errno 20\] Not a directory: .*a\.png"):
        run(tmp_path / "a.png")
    assert not (tmp_path / "manifest.jsonl").read_bytes()
    run(tmp_path / "out")
    lines = {line["file"]: line for line in map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())}
    assert sorted(lines) == files
    failed = {file: line["error"] for file, line in lines.items() if "error" in line}
    assert failed == {"poison.png": KILLED}


def test_an_image_that_kills_the_model_fails_alone(running_ray: None, tmp_path: Path) -> None:
    model = tiny_detr()
    model.__class__ = DiesOverWhite
    predictor = Predictor(model, device="cpu", threshold=0.2, max_size=160, batch_size=2)
    (tmp_path / "in").mkdir()
    for number in range(10):  # more than an actor is given at once
        image = Image.new("RGB", (64, 48), "white") if number == 3 else picture(40, 30, number)
        image.save(tmp_path / "in" / f"{number}.png")
    summary = label(tmp_path / "in", tmp_path / "out", predictor, engine="ray")
    assert (summary.labelled, summary.failed) == (9, 1)
    assert summary.failures == [
        {"file": "3.png", "error": "its process ended twice (signal 9), perhaps for lack of memory"}
    ]


# ---- the command ----


def start(*arguments: str | Path, program: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "MARK": f"{os.getpid()} here"}
    program += "; import sys; from detr_fast.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program.removeprefix("; "), "label", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left() -> list[str]:
    """What runs of the processes that have been started by `start`, and of theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={os.getpid()} here".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " ").strip())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def model(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(predictor.model, folder)
    return folder


@pytest.mark.parametrize(
    ("number", "code", "moment", "engine"),
    [(signal.SIGINT, 130, "manifest.jsonl", "local"), (signal.SIGTERM, 143, "panoptic/*.png", "ray")],
)
def test_signals_leave_no_process_and_what_is_done_is_kept(
    predictor: Predictor, model: Path, tmp_path: Path, number: int, code: int, moment: str, engine: str
) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(40):
        picture(64, 48, seed).save(tmp_path / "in" / f"{seed:03}.jpg")
    options = ["--model", model, "--threshold", "0.2", "--max-size", "160", "--batch-size", "1", "--device", "cpu"]
    arguments = (tmp_path / "in", "--out", tmp_path / "out", *options, "--resume", "--engine")
    process = start(*arguments, "ray")
    while not list((tmp_path / "out").glob(moment)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert err in ("", "detr-fast label: error: interrupted\n")
    assert left() == []
    assert not (tmp_path / "out" / "panoptic.json").exists()
    process = start(*arguments, engine)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err, left()) == (0, "", [])
    label(tmp_path / "in", tmp_path / "undisturbed", predictor)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("program", "options", "code", "named"),
    [
        ("import sys; sys.modules['ray'] = None", [], 2, "--engine: ray needs ray: pip install 'detr_fast[ray]'"),
        ("", ["--workers", "2"], 2, "--engine: ray does not go with workers"),
        ("", ["--devices", "cpu,cpu"], 2, "--engine: ray does not go with devices"),
        ("import os; os.environ['RAY_ADDRESS'] = '127.0.0.1:1'", [], 1, "RAY_ADDRESS is 127.0.0.1:1, where nothing"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, tmp_path: Path, program: str, options: list[str], code: int, named: str
) -> None:
    picture(40, 30).save(tmp_path / "a.png")
    arguments = (tmp_path, "--out", tmp_path / "out", "--model", model, "--engine", "ray")
    process = start(*arguments, *options, program=program)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err.count("\n")) == (code, 1)
    assert named in err


def test_a_process_that_is_renamed_or_left_by_its_parent_is_waited_for() -> None:
    """A worker that outlived its raylet was forgotten, and was still there when the command had ended."""
    assert ray_session._Process(7, 40, "ray::IDLE", 5) == ray_session._Process(7, 40, "ray::MapWorker", 1)
    assert ray_session._Process(7, 40, "ray::IDLE", 5) != ray_session._Process(7, 41, "ray::IDLE", 5)
