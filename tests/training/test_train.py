"""Training: interrupted, distributed, fine-tuned and refused, with a tiny model on a tiny synthetic data set."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detr_fast import load_model, save_model
from detr_fast.checkpoint import read_checkpoint
from detr_fast.cli import main
from detr_fast.config import PRESETS, DetrConfig
from detr_fast.data import shapes
from detr_fast.detr.backbone import thaw_batch_norm
from detr_fast.detr.segmentation import build_detr
from detr_fast.files import OccupiedError
from detr_fast.training.loader import Order, Portions, batches
from detr_fast.training.run import RunFolder
from detr_fast.training.train import (
    Trainer,
    TrainSettings,
    World,
    initial_model,
    open_dataset,
    rate_factor,
    read_config,
    starting_config,
    train,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_width": 8,
    "hidden_dim": 32,
    "nheads": 8,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 32,
    "num_queries": 12,
    "masks": True,
    "image_size": 48,
    "max_image_size": 80,
}
ALONE = World(0, 1, torch.device("cpu"))
IMAGES = 10

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    shapes.write_dataset(out, IMAGES, seed=1, size=(48, 60))
    return out


def settings_for(data: Path, config: dict[str, Any] | None = CONFIG, **changes: Any) -> TrainSettings:
    text = json.dumps(config) if config is not None else None
    return TrainSettings(data=str(data), config=text, **{"batch_size": 2, "steps": 2, "workers": 0, **changes})


def start_trainer(settings: TrainSettings) -> tuple[Trainer, Any]:
    checkpoint = read_checkpoint(settings.start) if settings.start else None
    dataset = open_dataset(settings, starting_config(settings, checkpoint)[0])
    model, _ = initial_model(settings, dataset, checkpoint)
    return Trainer(model, settings, ALONE, len(dataset)), dataset


def run_of(settings: TrainSettings, out: Path) -> Trainer:
    trainer, dataset = start_trainer(settings)
    train(trainer, dataset, RunFolder(out, settings.to_dict()))
    return trainer


def arguments(settings: TrainSettings) -> list[str]:
    """The command line of settings that differ from their defaults."""
    line = ["--data", settings.data]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name != "data" and value != field.default:
            option = "--" + {"start": "from"}.get(field.name, field.name).replace("_", "-")
            line += [option] if value is True else [option, str(value)]
    return line


def start(*arguments: str | Path, launcher: Sequence[str] = (), before: Sequence[str] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, *launcher, "-m", "detr_fast", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`detr-fast train` in this process: exit code, standard output and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main(["train", *map(str, arguments)])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def logged(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "images_per_s"} for entry in entries]


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_bytes().count(b"\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# ---- a run ----


def test_a_run_learns_and_leaves_what_it_promises(command: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"steps": 60, "lr": 2e-3, "lr_backbone": 2e-3, "batch_norm": "train", "augment": "none", "ema": 0.9}
    settings = settings_for(data, CONFIG | {"dropout": 0.0}, **changes)
    code, printed, err = command(*arguments(settings), "--out", out)
    assert (code, err) == (0, "")
    assert "60 steps" in printed
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert [entry["epoch"] for entry in log[:11]] == [1] * 5 + [2] * 5 + [3]
    assert {"loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice", "lr", "images_per_s"} <= set(log[0])
    assert sum(entry["loss"] for entry in log[-10:]) < 0.8 * sum(entry["loss"] for entry in log[:10])
    for name in ("loss.png", *(f"predictions/epoch_{epoch:04d}.jpg" for epoch in range(1, 13))):
        with Image.open(out / name) as picture:
            picture.load()
    assert json.loads((out / "settings.json").read_text())["lr"] == 2e-3
    assert not list(out.rglob("*.tmp"))

    model = load_model(out)
    assert model.config == DetrConfig(**CONFIG | {"dropout": 0.0, "num_classes": 15})
    assert [category["name"] for category in model.categories] == [*shapes.THINGS, *shapes.STUFF]
    contents = torch.load(out / "checkpoint.pth", weights_only=True)
    assert set(model.state_dict()) == set(contents["model"])
    averaged, live = (
        contents["model"]["detr.class_embed.weight"],
        contents["training"]["model"]["detr.class_embed.weight"],
    )
    assert not torch.equal(averaged, live)
    assert contents["model"]["detr.backbone.0.body.bn1.running_mean"].abs().max() > 0
    save_model(load_model(out / "checkpoint.pth"), tmp_path / "saved")
    assert load_model(tmp_path / "saved").config == model.config


def test_killed_runs_resume_to_the_same_losses(data: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 16,
        "accumulate": 2,
        "batch_norm": "train",
        "ema": 0.9,
        "schedule": "cosine",
        "warmup": 5,
        "lr": 1e-3,
        "workers": 1,
    }
    settings = settings_for(data, **changes)
    # a process of its own, too: in this one other tests decide how many threads there are, and so how sums are rounded
    assert finish(start(*arguments(dataclasses.replace(settings, workers=0)), "--out", tmp_path / "whole"))[0] == 0
    out = tmp_path / "killed"
    line = [*arguments(settings), "--out", out, "--save-every", "3", "--resume"]
    moments = random.Random(time.time_ns())
    for least, most in ((4, 7), (9, 14)):  # after checkpoints of steps 3 and 6 at the least
        process = start(*line)
        wait_for_steps(process, out, moments.randrange(least, most))
        time.sleep(moments.random() / 5)
        process.send_signal(signal.SIGKILL)
        finish(process)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 9')  # cut in the middle of a line
    assert finish(start(*line))[0] == 0
    assert logged(out) == logged(tmp_path / "whole")
    one, other = (torch.load(run / "checkpoint.pth", weights_only=True) for run in (out, tmp_path / "whole"))
    for weights in ("model", ("training", "model")):
        a, b = (c[weights] if isinstance(weights, str) else c[weights[0]][weights[1]] for c in (one, other))
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_that_can_go_on(data: Path, tmp_path: Path, number: int, code: int) -> None:
    line = [*arguments(settings_for(data, steps=100000, epochs=100000, workers=1)), "--out", tmp_path / "run"]
    process = start(*line)
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    ended, _, err = finish(process)
    assert ended == code
    assert err.count("\n") == 1 and "--resume" in err
    steps = len(logged(tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["training"]["step"] == steps
    line[line.index("--steps") + 1] = str(steps + 2)
    assert finish(start(*line, "--resume"))[0] == 0
    assert [entry["step"] for entry in logged(tmp_path / "run")] == list(range(1, steps + 3))


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoint.pth", weights_only=True)["training"]["step"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes' children are in Linux's /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_whose_worker_hangs(data: Path, tmp_path: Path, number: int, code: int) -> None:
    line = [*arguments(settings_for(data, steps=100000, epochs=100000, workers=2)), "--out", tmp_path / "run"]
    process = start(*line)
    wait_for_steps(process, tmp_path / "run", 3)
    workers = children(process)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(2)  # what they had made is used up
    told = time.monotonic()
    process.send_signal(number)
    ended, _, err = finish(process)
    assert time.monotonic() - told < 10
    assert ended == code
    assert err.count("\n") == 1 and "--resume" in err
    assert saved_step(tmp_path / "run") == len(logged(tmp_path / "run"))
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_signal_ends_a_step_and_leaves_no_trace_of_it(data: Path, tmp_path: Path) -> None:
    settings = settings_for(data, steps=4, batch_norm="train")
    run_of(settings, tmp_path / "whole")
    trainer, dataset = start_trainer(settings)
    losses = trainer.losses.forward

    def slow(samples: Any, targets: Any) -> Any:
        result = losses(samples, targets)
        if trainer.step_number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return result

    trainer.losses.forward = slow  # type: ignore[method-assign]
    began = time.monotonic()
    summary = train(trainer, dataset, RunFolder(tmp_path / "run", settings.to_dict()))
    assert time.monotonic() - began < 55
    assert (summary.steps, summary.signal) == (2, signal.SIGTERM)
    again, dataset = start_trainer(settings)
    run = RunFolder(tmp_path / "run", settings.to_dict(), resume=True)
    saved = run.load()
    assert saved is not None
    again.restore(saved)
    train(again, dataset, run)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes' children are in Linux's /proc")
def test_a_worker_that_dies_ends_a_run_that_can_go_on(data: Path, tmp_path: Path) -> None:
    line = [*arguments(settings_for(data, steps=100000, epochs=100000, workers=2)), "--out", tmp_path / "run"]
    process = start(*line)
    wait_for_steps(process, tmp_path / "run", 3)
    os.kill(children(process)[0], signal.SIGKILL)
    ended, _, err = finish(process)
    assert ended == 1
    assert err.count("\n") == 1 and "--workers" in err
    assert saved_step(tmp_path / "run") == len(logged(tmp_path / "run")) >= 3


def test_workers_need_no_shared_memory_file_system(data: Path, tmp_path: Path) -> None:
    small = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets no test mount a small /dev/shm")
    line = [*arguments(settings_for(data, steps=6, batch_size=4, workers=2)), "--out", tmp_path / "run"]
    code, _, err = finish(start(*line, before=small))
    assert (code, err) == (0, "")
    assert len(logged(tmp_path / "run")) == 6


def test_two_trainings_do_not_share_a_folder(command: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = settings_for(data, steps=100000, epochs=100000)
    process = start(*arguments(settings), "--out", run)
    wait_for_steps(process, run, 3)
    code, _, err = command(*arguments(dataclasses.replace(settings, steps=6)), "--out", run, "--resume")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert code == 2
    assert err.count("\n") == 1 and "--out" in err and str(run) in err
    assert [entry["step"] for entry in logged(run)] == list(range(1, saved_step(run) + 1))


def test_a_run_that_another_process_changed_since_it_was_read_is_left_alone(data: Path, tmp_path: Path) -> None:
    settings = settings_for(data)
    trainer, dataset = start_trainer(settings)
    late = RunFolder(tmp_path, settings.to_dict())
    run_of(settings, tmp_path)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(OccupiedError, match="another"):
        train(trainer, dataset, late)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("size", [0, 20000, None])
def test_a_damaged_checkpoint_is_resumed_from_the_one_before(
    command: Command, data: Path, tmp_path: Path, size: int | None
) -> None:
    run_of(settings_for(data, steps=6), tmp_path / "whole")
    run = tmp_path / "run"
    assert command(*arguments(settings_for(data, steps=4, save_every=3)), "--out", run)[0] == 0
    if size is None:
        (run / "checkpoint.pth").unlink()
    else:
        os.truncate(run / "checkpoint.pth", size)
    line = [*arguments(settings_for(data, steps=6)), "--out", run, "--resume"]
    code, _, err = command(*line)
    assert code == 0, err
    assert err.count("\n") == 1 and "checkpoint.previous.pth" in err and "step 3" in err
    assert logged(run) == logged(tmp_path / "whole")
    assert saved_step(run) == 6

    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        os.truncate(run / name, 100)
    code, _, err = command(*line)
    assert code == 2
    assert err.count("\n") == 1 and "checkpoint.pth" in err


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    config = CONFIG | {"dropout": 0.0}
    changes = {"steps": 5, "augment": "none", "lr": 1e-3, "lr_backbone": 1e-3}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = settings_for(data, config, batch_size=2, device="cpu", **changes)
    process = start(*arguments(two), "--out", tmp_path / "two", launcher=launcher)
    run_of(settings_for(data, config, batch_size=4, **changes), tmp_path / "one")
    code, _, err = finish(process)
    assert code == 0, err
    for entry, other in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        entry.pop("class_error"), other.pop("class_error")  # a mean of the processes' percentages
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-5)


# ---- starting from a checkpoint ----


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    run_of(settings_for(data, batch_norm="train"), run)
    return run


def three_classes(folder: Path) -> Path:
    """A data set of three classes, none of which the checkpoint knows."""
    shapes.write_dataset(folder, 4, seed=8, size=(48, 60))
    content = json.loads((folder / "panoptic.json").read_text())
    content["categories"] = [{"id": i, "name": f"new {i}", "isthing": int(i < 2)} for i in range(3)]
    for annotation in content["annotations"]:
        for info in annotation["segments_info"]:
            info["category_id"] %= 3
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder


def test_fine_tuning_the_bundled_model_to_three_new_classes_is_one_command(command: Command, tmp_path: Path) -> None:
    new = three_classes(tmp_path / "new")
    out = tmp_path / "run"
    line = ["--data", new, "--from", "shapes", "--size", "64", "--out", out]
    line += ["--steps", "2", "--lr", "1e-9", "--lr-backbone", "0"]
    code, printed, err = command(*line)
    assert (code, err) == (0, "")
    assert "class_embed starts anew: 3 classes, not 15" in printed.splitlines()[0]
    before, after = load_model("shapes"), load_model(out)
    assert after.config == before.config.replace(num_classes=3, image_size=64, max_image_size=106)
    assert [category["name"] for category in after.categories] == ["new 0", "new 1", "new 2"]
    for name, tensor in after.state_dict().items():
        if "class_embed" not in name:
            torch.testing.assert_close(tensor, before.state_dict()[name], atol=1e-6, rtol=0, msg=name)


def test_a_detector_gets_a_mask_head_and_keeps_the_rest(data: Path, tmp_path: Path) -> None:
    detector = run_of(settings_for(data, CONFIG | {"masks": False}, annotations="panoptic"), tmp_path / "detector")
    changes = {"start": str(tmp_path / "detector"), "masks": True, "freeze_detr": True, "lr": 1e-3}
    trainer = run_of(settings_for(data, None, **changes), tmp_path / "masks")
    state = trainer.model.state_dict()
    for name, tensor in detector.model.state_dict().items():
        assert torch.equal(state[f"detr.{name}"], tensor), name
    torch.manual_seed(0)
    untrained = build_detr(trainer.model.config).state_dict()
    changed = [
        name for name, x in state.items() if not name.startswith("detr.") and not torch.equal(x, untrained[name])
    ]
    assert "mask_head.lay1.weight" in changed and "bbox_attention.q_linear.weight" in changed
    assert load_model(tmp_path / "masks").config.masks


def test_what_is_frozen_stays(data: Path, tmp_path: Path) -> None:
    settings = settings_for(data, lr_backbone=1e-3)
    before = start_trainer(settings)[0].model.state_dict()
    trained = run_of(settings, tmp_path / "run").model.state_dict()
    moved = {name.removeprefix("detr.") for name, x in trained.items() if not torch.equal(x, before[name])}
    assert not any(name.startswith(("backbone.0.body.conv1", "backbone.0.body.layer1")) for name in moved)
    assert not any("bn" in name for name in moved)
    assert {"backbone.0.body.layer2.0.conv1.weight", "backbone.0.body.layer4.1.conv2.weight"} <= moved
    assert {"class_embed.weight", "query_embed.weight", "input_proj.weight"} <= moved


# ---- parts ----


def test_live_batch_norm_trains_and_becomes_a_frozen_one() -> None:
    config = DetrConfig(**CONFIG)
    torch.manual_seed(0)
    model = build_detr(config).train()
    body = model.detr.backbone[0].body
    for norm in (m for m in body.modules() if hasattr(m, "running_var")):
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    images = torch.randn(4, 3, 40, 56)
    thaw_batch_norm(model)
    plain, x = torch.nn.BatchNorm2d(8), body.conv1(images)
    plain.weight.data.copy_(body.bn1.weight.data)
    torch.testing.assert_close(body.bn1(x), plain(x))
    torch.testing.assert_close(body.bn1.running_var, plain.running_var)
    body(images)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())
    frozen = build_detr(config)
    frozen.load_state_dict(model.state_dict())  # strict: the same names
    with torch.no_grad():
        for live, folded in zip(body.eval()(images), frozen.eval().detr.backbone[0].body(images), strict=True):
            torch.testing.assert_close(live, folded, rtol=1e-4, atol=1e-4)


def test_rates_follow_their_schedule() -> None:
    step = TrainSettings(data="", warmup=4, lr_drop=2)
    factors = [rate_factor(step, number, 100, steps_per_epoch=10) for number in range(60)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[19] == 1 and factors[20] == pytest.approx(0.1) and factors[40] == pytest.approx(0.01)
    cosine = TrainSettings(data="", warmup=4, schedule="cosine")
    factors = [rate_factor(cosine, number, 104, steps_per_epoch=10) for number in range(104)]
    assert factors[3] == factors[4] == 1 and factors[54] == pytest.approx(0.5) and 0 < factors[103] < 0.001


@pytest.mark.parametrize("amp", [False, True])
def test_accumulated_batches_add_up(data: Path, amp: bool) -> None:
    settings = settings_for(data, amp=amp, accumulate=2, lr=1e-3)
    trainer, dataset = start_trainer(settings)
    made = list(batches(dataset, Portions(Order(IMAGES, 0), 2, 2, range(1)), 0, False))
    numbers = trainer.step(made)
    assert all(math.isfinite(value) for value in numbers.values())
    singles = [start_trainer(settings)[0].step([batch, batch])["loss"] for batch in made]
    if not amp:
        assert numbers["loss"] == pytest.approx(sum(singles) / 2, rel=0.2)  # dropout differs


def test_query_groups_learn_apart_and_the_first_is_kept(data: Path, tmp_path: Path) -> None:
    config = CONFIG | {"masks": False, "dropout": 0.0}
    settings = settings_for(data, config, annotations="panoptic", query_groups=2, ema=0.5, lr=1e-3)
    trainer, dataset = start_trainer(settings)
    batch = next(batches(dataset, Portions(Order(IMAGES, 0), 2, 1, range(1)), 0, False))
    weights = trainer.model.state_dict()
    alone = []
    for queries in weights["query_embed.weight"].chunk(2):
        single = start_trainer(dataclasses.replace(settings, query_groups=1))[0]
        single.model.load_state_dict({**weights, "query_embed.weight": queries})
        alone.append(single.losses(batch.samples, batch.targets))
    for name, value in trainer.losses(batch.samples, batch.targets).items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, msg=name)

    trained = run_of(settings, tmp_path / "run")
    again = start_trainer(settings)[0]
    again.restore(torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True))
    for one, other in ((trained.average, again.average), (trained.model.state_dict(), again.model.state_dict())):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    kept = load_model(tmp_path / "run").query_embed.weight
    assert torch.equal(kept, trained.average["query_embed.weight"][: CONFIG["num_queries"]])


def test_divergence_ends_the_run_before_it_spoils_the_weights(command: Command, data: Path, tmp_path: Path) -> None:
    settings = settings_for(data, steps=50, lr=1e30, clip=0.0)
    code, _, err = command(*arguments(settings), "--out", tmp_path / "run")
    assert code == 1
    assert err.count("\n") == 1 and "--lr" in err


def test_bad_annotations_end_a_run_or_are_counted(command: Command, data: Path, tmp_path: Path) -> None:
    three_classes(tmp_path / "data")
    (tmp_path / "data" / "images" / "000002.jpg").write_bytes(b"no picture")
    line = ["--data", tmp_path / "data", "--config", json.dumps(CONFIG), "--steps", "4", "--out"]
    code, _, err = command(*line, tmp_path / "fail")
    assert code == 1
    assert err.count("\n") == 1 and "000002.jpg" in err
    code, printed, err = command(*line, tmp_path / "skip", "--bad-annotations", "skip")
    assert (code, err) == (0, "")
    assert "1 bad annotations skipped" in printed
    assert "000002.jpg" in (tmp_path / "skip" / "bad_annotations.txt").read_text()
    content = json.loads((tmp_path / "data" / "panoptic.json").read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 9
    (tmp_path / "data" / "panoptic.json").write_text(json.dumps(content))
    code, _, err = command(*line, tmp_path / "early")
    assert code == 2 and "category_id 9" in err


def test_usage_errors_are_one_line_and_exit_2(command: Command, data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pth").write_bytes((trained / "checkpoint.pth").read_bytes()[:5000])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    right: dict[str, Any] = {"--data": data, "--out": tmp_path / "out", "--config": json.dumps(CONFIG)}
    wrong = [
        ("--data", tmp_path / "missing", "missing"),
        ("--data", tmp_path / "empty", "images"),
        ("--split", "val2017", "no splits"),
        ("--out", tmp_path / "file", "--out"),
        ("--out", trained, "holds another run"),
        ("--config", "detr_resnet9000", "detr_resnet50_panoptic"),
        ("--config", '{"hidden_dim": 7}', "hidden_dim"),
        ("--config", '{"hidden_dim": "a"}', "hidden_dim"),
        ("--config", '{"depth": 7}', "depth"),
        ("--config", json.dumps(CONFIG | {"num_classes": 3}), "num_classes is 3"),
        ("--from", tmp_path / "cut.pth", "cut.pth"),
        ("--from", tmp_path / "nothing", "nothing"),
        ("--lr", "-1", "--lr"),
        ("--ema", "1.5", "--ema"),
        ("--batch-size", "0", "--batch-size"),
        ("--device", "tpu", "--device"),
        ("--schedule", "none", "--schedule"),
    ]
    lines = [[part for pair in (right | {option: value}).items() for part in pair] for option, value, _ in wrong]
    cases = [(line, named) for line, (_, _, named) in zip(lines, wrong, strict=True)]
    whole = [part for pair in right.items() for part in pair]
    cases += [
        ([*whole, "--no-masks", "--freeze-detr"], "mask head"),
        ([*whole, "--query-groups", "2"], "query_groups"),
        ([*whole[:3], tmp_path / "damaged", *whole[4:], "--resume"], "settings.json"),
        ([*whole[:3], trained, *whole[4:], "--resume"], "is a run with"),
        (
            ["--data", data, "--out", tmp_path / "out", "--config", "detr_resnet50_panoptic", "--from", trained],
            "backbone",
        ),
    ]
    for line, named in cases:
        code, out, err = command(*line)
        assert (code, out) == (2, ""), (line, err)
        assert err.count("\n") == 1 and named in err, (line, err)
    assert not (tmp_path / "out").exists()


def test_configs_by_name_file_and_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    assert read_config(str(tmp_path / "c.json")) == (DetrConfig(**CONFIG), False)
    assert read_config('{"num_classes": 5}') == (DetrConfig(num_classes=5), True)
    for name, config in PRESETS.items():
        assert read_config(name) == (config, False)
