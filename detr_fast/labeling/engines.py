"""Where the model runs on one machine: in this process, or in one of its own for each of several devices."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from detr_fast.labeling.stages import MAX_PIXELS
from detr_fast.labeling.workers import SharedMemory, WorkerPool
from detr_fast.predictor import Pixels, Predictor

OPTIONS = ("dtype", "threshold", "mode", "batch_size", "class_thresholds", "size", "max_size")


@dataclass(frozen=True)
class Slot:
    """The pixels of an image in shared memory, and `size` and `target` as in `Pixels`."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    size: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """The ids of an image, which have taken the place of its pixels in the slot, and `segments_info`; or why not."""

    shape: tuple[int, int]
    dtype: str
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
            [
                Pixels(torch.from_numpy(pixels), slot.size, slot.target)
                for pixels, slot in zip(arrays, batch, strict=True)
            ]
        )
        return lambda: [self._place(slot, *segments) for slot, segments in zip(batch, wait(), strict=True)]

    def _place(self, slot: Slot, ids: np.ndarray | None, segments_info: list[dict[str, Any]]) -> Found:
        assert ids is not None  # the model is panoptic
        dtype = np.min_scalar_type(int(ids.max()))
        try:
            self._memory.array(slot.number, slot.target, dtype)[:] = ids
        except ValueError as error:
            return Found(slot.target, dtype.str, [], str(error))
        return Found(slot.target, dtype.str, segments_info)


def options_of(predictor: Predictor) -> dict[str, Any]:
    """What makes another `Predictor` give the same results."""
    return {name: getattr(predictor, name) for name in OPTIONS}


def slot_bytes(predictor: Predictor) -> int:
    """Of memory that is only taken when it is used: enough for what the model reads, and for the labels of the
    largest image."""
    pixels = 3 * predictor.size * (predictor.max_size + predictor.size)
    labels = MAX_PIXELS * (1 if predictor.model.config.num_queries < 256 else 2)
    return -(-max(pixels, labels) // 4096) * 4096


@contextmanager
def saved(model: torch.nn.Module) -> Iterator[str]:
    """A file with a model, for `attach`."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(model, file)
        file.flush()
        yield file.name


class DevicesEngine:
    """The model of a `Predictor` in a process for each device."""

    def __init__(self, predictor: Predictor, memory: SharedMemory, devices: Sequence[str]) -> None:
        self.depth = 2 * len(devices)
        self._turn = 0
        threads = max(1, torch.get_num_threads() // len(devices))
        with ExitStack() as stack:
            file = stack.enter_context(saved(predictor.model))
            self._pools = [
                stack.enter_context(model_process(memory, file, device, options_of(predictor), threads))
                for device in devices
            ]
            self._stack = stack.pop_all()

    def start(self, batch: Sequence[Slot]) -> Callable[[], list[Found]]:
        self._turn = (self._turn + 1) % len(self._pools)
        found = self._pools[self._turn].submit(find, [list(batch)])
        return lambda: found.result()[0]

    def close(self) -> None:
        self._stack.close()


def model_process(memory: SharedMemory, file: str, device: str, options: dict[str, Any], threads: int) -> WorkerPool:
    """One process that runs `find`, with the model that `saved` wrote and as many threads on a CPU."""
    shared = (memory.slots, memory.slot_bytes, memory.descriptor)
    return WorkerPool(1, (_attach, (shared, file, device, options, threads)), shared[2:])


_engine: LocalEngine


def _attach(shared: tuple[int, int, int], file: str, device: str, options: dict[str, Any], threads: int) -> None:
    """What a model's process does first."""
    global _engine
    torch.set_num_threads(threads)
    # the file is trusted, as another process wrote it for this one
    model = torch.load(file, map_location="cpu", weights_only=False)
    _engine = LocalEngine(Predictor(model, device=device, **options), SharedMemory(*shared))


def find(batches: list[list[Slot]]) -> list[list[Found]]:
    """What is in batches of images, of which each has one size; the device need not wait between them."""
    return [wait() for wait in [_engine.start(batch) for batch in batches]]
