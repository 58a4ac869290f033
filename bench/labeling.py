"""What `detr-fast label` costs around the model: images/s, memory, and the start of a resumed run.

    python -m bench.labeling [--quick] [--out FILE.json]

Each part runs in processes of its own:

- around the model: files to files on one core, with a model that costs nothing and finds 15 smooth masks an image;
- with the model: DETR-R50 panoptic with random weights, and its bare forward on the same batches, in turn;
- memory: the most that each of the run's processes had resident, added up, of few images and of many;
- resume: from the start of the process until the first image after 100,000 finished ones reaches the model.

Pictures are blurred noise with grain: JPEGs of 180 KB, as COCO's photographs. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import cases, measure
from bench.operations.case import Draw
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.labeling import stages, workers
from detr_fast.labeling.formats import PANOPTIC
from detr_fast.labeling.manifest import Manifest, Run
from detr_fast.labeling.pipeline import label
from detr_fast.predictor import Predictor

DISTINCT = 16  # pictures; any more are copies
FORMATS = ("panoptic", "instances")


class Sizes(NamedTuple):
    scale: cases.Scale = cases.REAL
    rounds: int = 3
    around: int = 1000  # images
    whole: int = 40
    memory: tuple[int, int] = (200, 2000)
    finished: int = 100_000
    repeats: int = 20  # of a stage


QUICK = Sizes(cases.TINY, 1, 6, 3, (4, 8), 50, 2)


# ---- what is labelled, and with what ----


class FreeModel(DETRsegm):
    """Finds the same objects whatever it is shown, smooth masks of different classes, at no cost."""

    def __init__(self, scale: cases.Scale):
        super().__init__(cases.panoptic_model(cases.TINY.config.replace(num_queries=scale.queries)).detr)
        draw = Draw(torch.device("cpu"), 0)
        coarse = (4 * draw.normal(scale.kept, 1, 6, 8) for _ in range(DISTINCT))
        self.found = [F.interpolate(blobs, size=scale.level(4), mode="bicubic")[:, 0] for blobs in coarse]
        kept = cases.keep(scale.kept)(torch.empty(1, scale.queries, 1))
        self.logits = torch.zeros(1, scale.queries, self.config.num_classes + 1)
        self.logits[..., -1] = 20.0
        self.logits[0, kept[0], :] = 0.0
        self.logits[0, kept[0], torch.arange(scale.kept) * 12] = 20.0  # things and stuff
        self.calls = 0

    def forward(self, samples: Any, select: Any = None) -> dict[str, Any]:
        logits = self.logits.expand(len(samples), -1, -1)
        numbers = range(self.calls, self.calls + len(samples))
        self.calls += len(samples)
        masks = [self.found[number % DISTINCT] for number in numbers]
        return {"pred_logits": logits, "selected": select(logits), "pred_masks": masks}


class Reached(Exception):
    """An image is at the model."""


class StoppingModel(FreeModel):
    def forward(self, samples: Any, select: Any = None) -> dict[str, Any]:
        raise Reached


def free_predictor(scale: cases.Scale, model: type[FreeModel] = FreeModel) -> Predictor:
    return Predictor(model(scale), device="cpu", size=min(scale.image), max_size=1333)


class KeepsSome(Predictor):
    """Keeps as many queries as a photograph has objects: those it is surest of."""

    keeps = cases.KEPT

    def select(self, pred_logits: Tensor) -> Tensor:
        scores, labels = pred_logits.softmax(-1).max(-1)
        scores = scores.masked_fill(labels == pred_logits.shape[-1] - 1, -1)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(self.keeps).indices, True)


def write_pictures(folder: Path, count: int, scale: cases.Scale) -> None:
    """JPEGs of the size of a photograph, `DISTINCT` different ones."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, smooth in enumerate(cases.photographs(min(count, DISTINCT), [scale.target[::-1]])):
        grain = generator.normal(0, 12, (*scale.target, 1))
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number:06}.jpg", quality=95)
    for number in range(DISTINCT, count):
        shutil.copy(folder / f"{number % DISTINCT:06}.jpg", folder / f"{number:06}.jpg")


@contextmanager
def pictures(count: int, scale: cases.Scale) -> Iterator[tuple[Path, Path]]:
    """A folder of pictures, and one to write to."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "images"), count, scale)
        yield Path(folder, "images"), Path(folder, "labels")


# ---- the parts, each in a process of its own ----


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call` returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def around_the_model(sizes: Sizes) -> float:
    """Images a second on one core, workers and all, from the call of `label` to its return."""
    on_one_core()
    predictor = free_predictor(sizes.scale)
    with pictures(sizes.around, sizes.scale) as (images, out):
        started = time.perf_counter()
        summary = label(images, out, predictor)
        seconds = time.perf_counter() - started
    assert summary.labelled == sizes.around and summary.segments == sizes.scale.kept * sizes.around
    return summary.labelled / seconds


def stage_times(sizes: Sizes) -> dict[str, float]:
    """Seconds that each stage takes for an image, the best of some calls, one after the other on one core."""
    on_one_core()
    predictor, best = free_predictor(sizes.scale), {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        best[name] = min(measure.seconds(call) for _ in range(sizes.repeats))
        return call()

    with pictures(1, sizes.scale) as (images, out), torch.inference_mode():
        reading = stages.Reading(True, predictor.size, predictor.max_size, on_device=False)
        found = timed("decode, resize", lambda: stages.decode(images / "000000.jpg", reading))
        batch = [found] * predictor.batch_size
        samples = timed("normalise into the batch", lambda: predictor._samples(batch))
        best["normalise into the batch"] /= len(batch)
        image = predictor.kept(predictor.forward(samples))[:1]
        merge = partial(predictor.start_merges, image, found.size, [found.size], [found.target])
        ((ids, segments),) = timed("merge", lambda: merge()())
        assert ids is not None
        writing = stages.Writing(out, FORMATS, None, 0, predictor.model.config.num_classes)
        ids = ids.astype(np.uint8)
        encoded = timed("PNG, RLE", lambda: stages.encode("000000.jpg", ids, segments, writing))
        timed("write", lambda: encoded.write(out))
    return best


def with_the_model(sizes: Sizes) -> dict[str, list[float]]:
    """Images a second of the model alone and of `label`, in turn."""
    model = cases.finding_model(sizes.scale.config)
    predictor = KeepsSome(model, device="cpu", size=min(sizes.scale.image), max_size=1333)
    predictor.keeps = sizes.scale.kept
    rates: dict[str, list[float]] = {"forward": [], "label": []}
    with pictures(sizes.whole, sizes.scale) as (images, out):
        prepared = [predictor.prepare(path).pixels for path in sorted(images.iterdir())]
        size = predictor.batch_size
        batches = [prepared[start : start + size] for start in range(0, len(prepared), size)]

        @torch.inference_mode()
        def forward(batch: list[Any]) -> float:
            samples = predictor._samples(batch)
            return measure.seconds(lambda: model(samples, select=predictor.select))

        forward(batches[0])
        for number in range(sizes.rounds):
            rates["forward"].append(len(prepared) / sum(forward(batch) for batch in batches))
            summary = label(images, out / str(number), predictor)
            rates["label"].append(summary.labelled / summary.seconds)
    return rates


def memory(sizes: Sizes, count: int) -> int:
    """The most bytes that this process and each of its children had resident while `label` ran, added up; memory that
    they share counts in each."""
    predictor, peaks, done = free_predictor(sizes.scale), {}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks.update(measure.peak_resident(os.getpid()))

    with pictures(count, sizes.scale) as (images, out):
        watcher = threading.Thread(target=watch)
        watcher.start()
        label(images, out, predictor)
        done.set()
        watcher.join()
    return sum(peaks.values())


def finish(images: Path, out: Path, sizes: Sizes) -> None:
    """Labels the first image, and writes the manifest and PNGs that a run has once all others but one are done, too."""
    names = [f"{number:06}.jpg" for number in range(1, sizes.finished + 1)]
    for name in names:
        (images / name).touch()  # only the last is read
    shutil.copy(images / "000000.jpg", images / names[-1])
    label(images, out, free_predictor(sizes.scale), limit=1)
    png = (out / PANOPTIC.path("000000.jpg")).read_bytes()
    with Manifest(out, Run.read(out).key, ["000000.jpg", *names]) as manifest:
        ((_, _, record),) = manifest.read()
        for name in names[:-1]:
            (out / PANOPTIC.path(name)).write_bytes(png)
        manifest.append((name, {**record, "file": name}) for name in names[:-1])


def resume(images: Path, out: Path, sizes: Sizes, started: float) -> float:
    """Seconds since `started` when the first image that is left reaches the model."""
    predictor = free_predictor(sizes.scale, StoppingModel)
    try:
        label(images, out, predictor, resume=True)
    except Reached:
        return time.time() - started
    raise AssertionError("nothing was left to do")


def run(sizes: Sizes) -> dict[str, Any]:
    """Everything that the table shows."""
    result: dict[str, Any] = {"machine": measure.machine(), **sizes._asdict()}
    result["scale"] = {"image": sizes.scale.image, "target": sizes.scale.target, "kept": sizes.scale.kept}
    result["around the model"] = [apart(around_the_model, sizes) for _ in range(sizes.rounds)]
    with mock.patch.dict(os.environ, workers.ENVIRONMENT):  # as malloc is set in a worker
        result["stages"] = apart(stage_times, sizes)
    result["with the model"] = apart(with_the_model, sizes)
    result["bytes"] = [apart(memory, sizes, count) for count in sizes.memory]
    with pictures(1, sizes.scale) as (images, out):
        apart(finish, images, out, sizes)
        result["resume"] = [apart(resume, images, out, sizes, time.time()) for _ in range(sizes.rounds)]
    return result


def table(result: dict[str, Any]) -> str:
    """The README's table, in Markdown."""
    machine, (height, width) = result["machine"], result["scale"]["target"]
    around, rates = max(result["around the model"]), result["with the model"]
    forward, labelled = max(rates["forward"]), max(rates["label"])
    few, many = (size / 2**20 for size in result["bytes"])
    rows = [
        ("images/s a core without the model", f"{around:.1f} ({1000 / around:.1f} ms)", ">= 45"),
        ("images/s with DETR-R50 panoptic", f"{labelled:.2f}", f">= {0.9 * forward:.2f}"),
        ("of the images/s of its bare forward", f"{labelled / forward:.3f}", ">= 0.9"),
        (f"memory of all processes, {result['memory'][0]:,} images", f"{few:.0f} MiB", ""),
        (f"{result['memory'][1]:,} images", f"{many:.0f} MiB, {100 * (many / few - 1):+.1f} %", "<= +10 %"),
        (f"resumes after {result['finished']:,} images in", f"{min(result['resume']):.1f} s", "< 5 s"),
    ]
    parts = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in result["stages"].items())
    return "\n".join(
        [
            f"JPEGs of {width} x {height}, {result['scale']['kept']} segments each, on {machine['cores']} cores of an "
            f"{machine['cpu']} (torch {machine['torch']}; commit {machine['commit'][:10]}); best of {result['rounds']} "
            "rounds:",
            "",
            "| | measured | wanted |",
            "| --- | --- | --- |",
            *(f"| {name} | {value} | {wanted} |" for name, value, wanted in rows),
            "",
            f"Milliseconds of each stage alone: {parts}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.labeling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny images: whether it works, not how fast")
    parser.add_argument("--out", type=Path, help="write every sample to this JSON file")
    parser.add_argument("--show", type=Path, help="measure nothing: print the table of this JSON file")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
        return
    result = run(QUICK if arguments.quick else Sizes())
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
