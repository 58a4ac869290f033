"""Where the model runs on one machine: in this process, or in one of its own for each of several devices."""

from __future__ import annotations

import io
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

import numpy as np
import torch

from detr_fast.images import Pixels
from detr_fast.labeling.stages import MAX_PIXELS
from detr_fast.labeling.workers import RESIDENT, SharedMemory, WorkerPool, anonymous_file
from detr_fast.predictor import Predictor

OPTIONS = ("dtype", "threshold", "mode", "batch_size", "class_thresholds", "size", "max_size")


@dataclass(frozen=True)
class Slot:
    """The pixels of an image in shared memory, and `size` and `target` as in `Pixels`."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    size: tuple[int, int]
    target: tuple[int, int]

    @property
    def end(self) -> int:
        """The byte of the slot at which other things may begin."""
        return -(-int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize // 64) * 64


@dataclass(frozen=True)
class Found:
    """The ids of an image, which lie behind its pixels in the slot, as these are needed again if the process dies, and
    `segments_info`; or why there are none."""

    shape: tuple[int, int]
    dtype: str
    offset: int
    segments_info: list[dict[str, Any]]
    error: str | None = None


class Engine(Protocol):
    """Attributes: depth: how many batches should have been started, so that no device waits."""

    depth: int

    def start(self, batch: Sequence[Slot]) -> Callable[[], list[Found]]:
        """Begins with a batch of images of one size; what is returned waits for what was found in each."""


class LocalEngine:
    """The model of a `Predictor`, in this process."""

    def __init__(self, predictor: Predictor, memory: SharedMemory) -> None:
        self.depth = 2 if predictor.device.type == "cuda" else 1  # a CPU has done all when `start` returns
        self._predictor = predictor
        self._memory = memory

    def start(self, batch: Sequence[Slot]) -> Callable[[], list[Found]]:
        arrays = [self._memory.array(slot.number, slot.shape, slot.dtype) for slot in batch]
        wait = self._predictor.start_segments(
            [Pixels(pixels, slot.size, slot.target) for pixels, slot in zip(arrays, batch, strict=True)]
        )
        return lambda: [self._place(slot, *segments) for slot, segments in zip(batch, wait(), strict=True)]

    def _place(self, slot: Slot, ids: np.ndarray | None, segments_info: list[dict[str, Any]]) -> Found:
        assert ids is not None  # the model is panoptic
        dtype = np.min_scalar_type(int(ids.max()))
        try:
            self._memory.array(slot.number, slot.target, dtype, slot.end)[:] = ids
        except ValueError as error:
            return Found(slot.target, dtype.str, slot.end, [], str(error))
        return Found(slot.target, dtype.str, slot.end, segments_info)


def options_of(predictor: Predictor) -> dict[str, Any]:
    """What makes another `Predictor` give the same results."""
    return {name: getattr(predictor, name) for name in OPTIONS}


def slot_bytes(predictor: Predictor) -> int:
    """Of memory that is only taken when it is used: enough for what the model reads, or a GPU resizes, and for the
    labels of the largest image."""
    pixels = max(3 * predictor.size * (predictor.max_size + predictor.size), RESIDENT)
    labels = MAX_PIXELS * (1 if predictor.model.config.num_queries < 256 else 2)
    return (pixels + labels) // 4096 * 4096 + 4096


@contextmanager
def in_memory(write: Callable[[IO[bytes]], Any]) -> Iterator[int]:
    """A descriptor of what `write` writes: of memory, as a file would be left where processes are killed."""
    with open(anonymous_file(), "wb") as file:
        write(file)
        file.flush()
        yield file.fileno()


class DevicesEngine:
    """The model of a `Predictor` in a process for each device."""

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

    def close(self) -> None:
        self._stack.close()


def model_process(memory: SharedMemory, model: int, device: str, options: dict[str, Any], threads: int) -> WorkerPool:
    """One process that runs `find`.

    Args:
        model: descriptor of what torch saved, which stays open for as long as the process runs.
        options: of `options_of`.
        threads: on a CPU.
    """
    shared = (memory.slots, memory.slot_bytes, memory.descriptor)
    return WorkerPool(1, (_attach, (shared, model, device, options, threads)), (memory.descriptor, model))


_engine: LocalEngine


def _attach(shared: tuple[int, int, int], descriptor: int, device: str, options: dict[str, Any], threads: int) -> None:
    """What a model's process does first."""
    global _engine
    torch.set_num_threads(threads)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as file:  # a file's position would be shared
        # trusted, as another process wrote it for this one
        model = torch.load(io.BytesIO(file), map_location="cpu", weights_only=False)
    _engine = LocalEngine(Predictor(model, device=device, **options), SharedMemory(*shared))


def find(batches: list[list[Slot]]) -> list[list[Found]]:
    """What is in batches of images, of which each has one size; the device need not wait between them."""
    found, started = [], deque[Callable[[], list[Found]]]()
    for batch in batches:
        started.append(_engine.start(batch))
        if len(started) >= _engine.depth:
            found.append(started.popleft()())
    return found + [wait() for wait in started]
