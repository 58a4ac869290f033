"""Processes that make batches, and how a batch gets from one to the training: through memory of its own, which needs
neither /dev/shm nor a lock."""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

from detr_fast.files import anonymous_file

AHEAD = 4  # results of each worker that are made or on their way
ALIGNMENT = 64  # bytes, as PyTorch's own memory has
WATCH = 0.1  # seconds between two looks at whether to stop
ORPHANED = 5.0  # seconds until an idle worker notices that its parent is gone


class WorkerDied(RuntimeError):
    """A process that makes batches ended by itself."""


def made_ahead(
    make: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    finish: Callable[[Any], Any],
    stop: Sequence[int] = (),
) -> Iterator[Any]:
    """`finish(make(task))` for each of `tasks`, in their order.

    Args:
        make: called in `workers` processes, each of which takes every `workers`-th task.
        finish: called in a thread of this process.
        stop: the iterator ends early, within a second and whatever the workers do, once this has an item.

    Raises:
        WorkerDied: a process ended by itself.
        Exception: what `make` or `finish` raises.
    """
    pool = [_Worker(make) for _ in range(workers)]
    with ThreadPoolExecutor(1) as thread:

        def asked() -> Iterator[Future[Any]]:
            for task, worker in zip(tasks, cycle(pool), strict=False):
                worker.ask(task)
                yield thread.submit(worker.receive, finish)

        more = asked()
        try:
            pending = deque(islice(more, AHEAD * workers))
            while pending:
                while not wait([pending[0]], WATCH).done:
                    if stop:
                        return
                yield pending.popleft().result()
                pending.extend(islice(more, 1))
        finally:
            for worker in pool:
                worker.kill()  # which ends the thread's waiting, too


class _Worker:
    """A process that answers each task with a result."""

    def __init__(self, make: Callable[[Any], Any]):
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_work, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, task: Any) -> None:
        with suppress(ConnectionError):  # `receive` says that it died
            self._connection.send(task)

    def receive(self, finish: Callable[[Any], Any]) -> Any:
        """The next result, finished.

        Raises:
            WorkerDied: the process ended.
            Exception: what the task or `finish` raised.
        """
        try:
            sizes = self._connection.recv()
            descriptor = recv_handle(self._connection)
        except (EOFError, ConnectionError) as error:
            self._process.join(1)
            how = f"exit code {self._process.exitcode}"
            advice = "if memory is short, fewer --workers help"
            raise WorkerDied(f"a worker process that reads images died ({how}); {advice}") from error
        result, problem, where = unpacked(descriptor, sizes)
        if problem is not None:
            raise problem from RuntimeError(f"in a worker process:\n{where}")
        return finish(result)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(1)


def _work(make: Callable[[Any], Any], connection: Connection) -> None:
    # Ctrl-C, and torchrun's SIGTERM, reach the workers too. They end when the parent says so, or is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()
    with suppress(EOFError, ConnectionError):
        while os.getppid() == parent:
            if connection.poll(ORPHANED):
                descriptor, sizes = packed(_outcome(make, connection.recv()))
                connection.send(sizes)
                send_handle(connection, descriptor, parent)
                os.close(descriptor)


def _outcome(make: Callable[[Any], Any], task: Any) -> tuple[Any, Exception | None, str]:
    """The result of a task, or what it raised, and where."""
    try:
        return make(task), None, ""
    except Exception as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # not every exception can be sent to another process
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return None, error, where


# ---- a value in a file that is memory ----


class _Pickler(pickle.Pickler):
    """Leaves the contents of tensors on the CPU to the buffers, as NumPy's arrays do."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def packed(value: Any) -> tuple[int, list[int]]:
    """A value in an anonymous file: the descriptor, and the bytes of each of its parts."""
    pickled, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(pickled, 5, buffer_callback=buffers.append).dump(value)
    parts = [pickled.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    descriptor = anonymous_file()
    with open(descriptor, "wb", closefd=False) as file:
        for start, part in zip(_starts(sizes), parts, strict=False):
            file.seek(start)
            file.write(part)
        file.truncate(_starts(sizes)[-1])
    return descriptor, sizes


def unpacked(descriptor: int, sizes: Sequence[int]) -> Any:
    """The value that `packed` put there, whose arrays and tensors stay there; the descriptor is closed."""
    starts = _starts(sizes)
    view = memoryview(mmap.mmap(descriptor, starts[-1]))
    os.close(descriptor)
    first, *buffers = (view[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return pickle.loads(first, buffers=buffers)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each part starts, and after these the end of the last."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts
