"""The model of a `Predictor` for images in slots of shared memory: in this process, or in one of its own."""

from __future__ import annotations

import io
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

from detr_fast import ops
from detr_fast.files import anonymous_file
from detr_fast.images import SENT_BYTES
from detr_fast.labeling.stages import MAX_PIXELS, Found, Slot
from detr_fast.labeling.workers import SharedMemory, WorkerPool
from detr_fast.predictor import Predictor

OPTIONS = ("dtype", "threshold", "mode", "batch_size", "class_thresholds", "size", "max_size")


class Model:
    """The model of a `Predictor`, in this process.

    Attributes:
        depth: how many batches should have been started, so that the device never waits.
    """

    def __init__(self, predictor: Predictor, memory: SharedMemory) -> None:
        self.depth = 2 if ops.is_gpu(predictor.device) else 1  # a CPU has done all when `start` returns
        self._predictor = predictor
        self._memory = memory

    def start(self, batch: Sequence[Slot]) -> Callable[[], list[Found]]:
        """Begins with a batch of images of one size; the function that is returned waits for their segments."""
        wait = self._predictor.start_segments([slot.pixels(self._memory) for slot in batch])
        return lambda: [self._place(slot, *segments) for slot, segments in zip(batch, wait(), strict=True)]

    def _place(self, slot: Slot, ids: np.ndarray | None, segments_info: list[dict[str, Any]]) -> Found:
        assert ids is not None  # the model is panoptic
        found = Found(slot.target, np.min_scalar_type(int(ids.max())).str, slot.end, segments_info)
        try:
            found.ids(self._memory, slot.number)[:] = ids
        except ValueError as error:
            return failure(str(error))
        return found


def failure(reason: str) -> Found:
    """No segments, and the reason."""
    return Found((0, 0), "|u1", 0, [], reason)


def options_of(predictor: Predictor) -> dict[str, Any]:
    """The options with which another `Predictor` of the model gives the same results."""
    return {name: getattr(predictor, name) for name in OPTIONS}


def slot_bytes(predictor: Predictor) -> int:
    """The size of a slot: enough for the pixels of any image, and for the ids of the largest. Memory is taken only
    where it is written to."""
    pixels = max(3 * predictor.size * (predictor.max_size + predictor.size), SENT_BYTES)
    ids = MAX_PIXELS * (1 if predictor.model.config.num_queries < 256 else 2)
    return (pixels + ids) // 4096 * 4096 + 4096


# ---- a process for it ----


@contextmanager
def in_memory(write: Callable[[IO[bytes]], Any]) -> Iterator[int]:
    """A descriptor of the bytes that `write` writes: in memory, as a file would be left where processes are killed."""
    with open(anonymous_file(), "wb") as file:
        write(file)
        file.flush()
        yield file.fileno()


def model_process(memory: SharedMemory, model: int, device: str, options: dict[str, Any], threads: int) -> WorkerPool:
    """One process that runs `find`.

    Args:
        model: descriptor of the model as torch saved it, which stays open for as long as the process runs.
        options: of `options_of`.
        threads: on a CPU.
    """
    shared = (memory.slots, memory.slot_bytes, memory.descriptor)
    return WorkerPool(1, (_attach, (shared, model, device, options, threads)), (memory.descriptor, model))


_model: Model


def _attach(shared: tuple[int, int, int], descriptor: int, device: str, options: dict[str, Any], threads: int) -> None:
    """The first call of a model's process."""
    global _model
    torch.set_num_threads(threads)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as file:  # a file's position would be shared
        # trusted, as another process wrote it for this one
        model = torch.load(io.BytesIO(file), map_location="cpu", weights_only=False)
    _model = Model(Predictor(model, device=device, **options), SharedMemory(*shared))


def find(batches: list[list[Slot]]) -> list[list[Found]]:
    """The segments of batches of images, of which each has one size; the device need not wait between them."""
    found, started = [], deque[Callable[[], list[Found]]]()
    for batch in batches:
        started.append(_model.start(batch))
        if len(started) >= _model.depth:
            found.append(started.popleft()())
    return found + [wait() for wait in started]
