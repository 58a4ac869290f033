"""Labeling on this machine: workers read and write, and the model runs here or in a process for each of some devices.

decode and resize -> batches of one size -> model and merge -> encode and write -> manifest
(workers)                                   (this process)     (workers)
"""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detr_fast.images import batches_of_one_size
from detr_fast.labeling import stages
from detr_fast.labeling.interrupt import Interrupt, Interrupted
from detr_fast.labeling.manifest import Manifest
from detr_fast.labeling.model import Model, failure, find, in_memory, model_process, options_of, slot_bytes
from detr_fast.labeling.stages import Found, Reading, Slot, Writing
from detr_fast.labeling.workers import SharedMemory, WorkerDied, WorkerPool
from detr_fast.predictor import Predictor

# Batches are made of images of one size. An image waits for others of its size while this many batches are read.
BATCHES_AHEAD = 2
COMMIT_IMAGES = 64  # the manifest is written after so many images,
COMMIT_SECONDS = 2.0  # or after this time


@dataclass(frozen=True)
class Job:
    """One run of an engine.

    Attributes:
        predictor: its model labels.
        images: the folder of images.
        reading, writing: how they are read, and how their labels are written.
        manifest: the record of each image that is done.
        interrupt: the wish to stop.
        bar: shows the progress.
    """

    predictor: Predictor
    images: Path
    reading: Reading
    writing: Writing
    manifest: Manifest
    interrupt: Interrupt
    bar: tqdm[Any]


@dataclass(frozen=True)
class _Image:
    """An image whose pixels lie in a slot."""

    file: str
    slot: Slot


class LocalEngine:
    """Takes images from the disk through the model and back to it.

    An image keeps one slot of shared memory from its reading to its writing. The slots are as many as images may be
    waiting for a batch, in reading, in the model and in writing, so that no stage can starve another.

    Args:
        workers: processes that read and write images.
        devices: run the model in a process for each of these, instead of on the predictor's device in this one.
    """

    def __init__(self, job: Job, workers: int, devices: Sequence[str] = ()) -> None:
        self._job = job
        self._workers = workers
        self._devices = devices
        self._failed = 0
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        self._encoded: queue.SimpleQueue[tuple[_Image, Future[Any]]] = queue.SimpleQueue()
        self._started: deque[tuple[list[_Image], Callable[[], list[Found]]]] = deque()
        self._window: deque[tuple[str, int, Future[Slot]]] = deque()
        self._encoding = 0
        self._uncommitted: list[tuple[str, dict[str, Any], list[Path]]] = []
        self._committed = time.monotonic()
        self._syncing: deque[tuple[Future[None], list[tuple[str, dict[str, Any]]]]] = deque()

    def run(self, files: Sequence[str], hopeless: dict[str, str]) -> None:
        """Labels images and records them all in the manifest.

        Args:
            hopeless: the images that are known to fail, with the reason.
        """
        if not files:
            return
        predictor, size = self._job.predictor, self._job.predictor.batch_size
        self._ahead = size + 2 * self._workers
        in_model = size * 2 * max(1, len(self._devices))
        slots = BATCHES_AHEAD * size + self._ahead + in_model + self._ahead
        self._memory = memory = SharedMemory(slots, slot_bytes(predictor))
        for slot in reversed(range(slots)):
            self._free.put(slot)
        attach = (stages.attach, (slots, memory.slot_bytes, memory.descriptor))
        with ExitStack() as stack:
            self._pool = stack.enter_context(WorkerPool(min(self._workers, len(files)), attach, (memory.descriptor,)))
            self._model: Model | _ModelOnDevices = Model(predictor, memory)
            if self._devices:
                self._model = stack.enter_context(_ModelOnDevices(predictor, memory, self._devices))
            images = self._decoded(files, hopeless)
            for batch in batches_of_one_size(images, lambda image: image.slot.size, size, BATCHES_AHEAD * size):
                if self._job.interrupt.number is not None:
                    break
                self._compute(batch)
                self._record()
            while self._started:
                self._finish(*self._started.popleft())
            while self._encoding:
                self._record(wait=True)
            self._commit(at_once=True)

    def _decoded(self, files: Sequence[str], hopeless: dict[str, str]) -> Iterator[_Image]:
        """The images that can be read, in their order; until a signal comes."""
        waiting = iter(files)
        while self._job.interrupt.number is None:
            while len(self._window) < self._ahead and (file := next(waiting, None)) is not None:
                if file in hopeless:
                    self._fail(file, hopeless[file])
                    continue
                number = self._free.get()
                path = self._job.images / file
                future = self._pool.submit(stages.decode_into, number, path, self._job.reading)
                self._window.append((file, number, future))
            if not self._window:
                return
            file, number, future = self._window.popleft()
            try:
                slot = future.result()
            except stages.UNREADABLE as error:
                self._release(number)
                self._fail(file, stages.why_unreadable(error, self._job.images / file))
            else:
                yield _Image(file, slot)

    def _compute(self, batch: list[_Image]) -> None:
        with suppress(Interrupted), self._job.interrupt.computing():
            self._started.append((batch, self._model.start([image.slot for image in batch])))
        while len(self._started) >= self._model.depth:
            self._finish(*self._started.popleft())

    def _finish(self, batch: list[_Image], wait: Callable[[], list[Found]]) -> None:
        try:
            with self._job.interrupt.computing():
                results = wait()
        except Interrupted:
            return
        except WorkerDied as error:
            results = [failure(str(error))] * len(batch)
        for image, found in zip(batch, results, strict=True):
            number = image.slot.number
            if found.error is not None:
                self._release(number)
                self._fail(image.file, found.error)
                continue
            encoding = self._pool.submit(stages.encode_from, number, found, image.file, self._job.writing)
            self._encoding += 1
            encoding.add_done_callback(partial(self._written, image))

    def _written(self, image: _Image, future: Future[Any]) -> None:
        """Called in the pool's thread, so that a slot is free before this one has time."""
        self._release(image.slot.number)
        self._encoded.put((image, future))

    def _release(self, slot: int) -> None:
        self._memory.empty(slot)
        self._free.put(slot)

    def _record(self, wait: bool = False) -> None:
        """Takes the results of the writers.

        Args:
            wait: for one of them, if there is none yet.
        """
        while self._encoding and (wait or not self._encoded.empty()):
            image, future = self._encoded.get()
            self._encoding -= 1
            wait = False
            try:
                record, paths = future.result()
            except (WorkerDied, OSError) as error:
                self._fail(image.file, stages.why_unwritable(error))
            else:
                self._uncommitted.append((image.file, record, paths))
                self._job.bar.update()
        self._commit()
        if not self._job.bar.disable:
            ready = sum(future.done() for *_, future in self._window)
            self._job.bar.set_postfix_str(
                f"{self._failed} failed, {ready} of {self._ahead} read ahead, {self._encoding} to be written",
                refresh=False,
            )

    def _fail(self, file: str, reason: str) -> None:
        self._failed += 1
        self._uncommitted.append((file, {"error": reason}, []))
        self._job.bar.update()

    def _commit(self, at_once: bool = False) -> None:
        """The manifest's lines follow the images' files onto the disk, many at once."""
        due = len(self._uncommitted) >= COMMIT_IMAGES or time.monotonic() - self._committed >= COMMIT_SECONDS
        if self._uncommitted and (due or at_once):
            paths = [path for *_, written in self._uncommitted for path in written]
            lines = [(file, record) for file, record, _ in self._uncommitted]
            self._syncing.append((self._pool.submit(stages.sync_written, paths), lines))
            self._uncommitted, self._committed = [], time.monotonic()
        while self._syncing and (at_once or self._syncing[0][0].done()):
            future, lines = self._syncing.popleft()
            future.result()
            self._job.manifest.append(lines)


class _ModelOnDevices:
    """The model of a `Predictor` in a process for each device, which take turns; else as `Model`."""

    def __init__(self, predictor: Predictor, memory: SharedMemory, devices: Sequence[str]) -> None:
        self.depth = 2 * len(devices)
        self._turn = 0
        threads = max(1, torch.get_num_threads() // len(devices))
        with ExitStack() as stack:
            model = stack.enter_context(in_memory(partial(torch.save, predictor.model)))
            options = options_of(predictor)
            self._pools = [
                stack.enter_context(model_process(memory, model, device, options, threads)) for device in devices
            ]
            self._stack = stack.pop_all()

    def start(self, batch: Sequence[Slot]) -> Callable[[], list[Found]]:
        self._turn = (self._turn + 1) % len(self._pools)
        found = self._pools[self._turn].submit(find, [list(batch)])
        return lambda: found.result()[0]

    def __enter__(self) -> _ModelOnDevices:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def default_workers(on_gpu: bool) -> int:
    """A CPU's model keeps all processors busy for far longer than it takes to read and write its images."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors - 1) if on_gpu else max(1, min(2, processors // 4))
