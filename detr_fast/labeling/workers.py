"""Processes that run functions for this one and share memory with it; one that dies is replaced.

They are started by a command of their own and not by multiprocessing: a fork of a process with torch's threads may
hang, and multiprocessing's spawn imports the caller's main module, with all of torch, into each of them, or breaks
where that module has no `if __name__ == "__main__"`. The memory has no name, so that nothing is left of it even if
every process is killed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from detr_fast.files import anonymous_file

ATTEMPTS = 2  # a task whose process died is tried again once
STARTS = 3  # this many processes in a row that die before their first task are not an accident
PATIENCE = 2.0  # seconds that a process has to end by itself
RESIDENT = 32 << 20  # bytes of a slot that stay allocated when it is empty

# Pictures take megabytes each. By default glibc asks the system for them anew every time, whose page faults cost more
# than the work: reading and resizing a photograph takes 16.6 ms with them and 11.8 without.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}

# `python -c` puts the current folder first into sys.path: nothing but the built-in sys is imported before that is gone.
COMMAND = """
import sys
sys.path[:] = sys.argv[2:]
from detr_fast.labeling.workers import serve
serve(int(sys.argv[1]))
"""


def trusted_path() -> list[str]:
    """sys.path without the current folder, which may hold anybody's files: `python -c`, `python -m` and a prompt put it
    there. It stays if PYTHONPATH names it, or if this package or the running script lies in it."""
    here = os.getcwd()
    chosen = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    chosen.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    if script := getattr(sys.modules["__main__"], "__file__", None):
        chosen.append(os.path.dirname(script))
    if here in {os.path.abspath(folder) for folder in chosen}:
        return [entry or here for entry in sys.path]
    return [entry for entry in sys.path if os.path.abspath(entry) != here]


class WorkerDied(Exception):
    """The process that had the task ended, and so did the one that tried again."""


class SharedMemory:
    """Slots of equal size in memory that processes share through a file descriptor.

    Slots may be far larger than their content: only pages that are written to take memory.

    Args:
        slots, slot_bytes: how many, and the most that each can hold.
        descriptor: of memory that another process made; by default new memory.
    """

    def __init__(self, slots: int, slot_bytes: int, descriptor: int | None = None) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.descriptor = anonymous_file() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, slots * slot_bytes)
        self._map = mmap.mmap(self.descriptor, slots * slot_bytes)

    def array(self, slot: int, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0) -> np.ndarray:
        """A slot from its byte `offset` on as an array.

        Raises:
            ValueError: it is too small for one of that shape.
        """
        size, left = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, self.slot_bytes - offset
        if size > left:
            raise ValueError(f"{size} bytes are needed, more than the {left} that an image may take")
        return np.ndarray(shape, dtype, buffer=self._map, offset=slot * self.slot_bytes + offset)

    def empty(self, slot: int) -> None:
        """Gives back the memory of an unusually large image."""
        if hasattr(mmap, "MADV_REMOVE") and self.slot_bytes > RESIDENT:
            self._map.madvise(mmap.MADV_REMOVE, slot * self.slot_bytes + RESIDENT, self.slot_bytes - RESIDENT)


@dataclass
class _Task:
    call: bytes
    future: Future[Any]
    attempts: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    task: _Task | None = None


@dataclass
class _State:
    workers: list[_Worker] = field(default_factory=list)
    waiting: deque[_Task] = field(default_factory=deque)
    failed_starts: int = 0


class WorkerPool:
    """`count` processes, each of which runs one task at a time, and a thread here that talks to them.

    Args:
        count: processes.
        setup: a function and its arguments, which each process calls first.
        descriptors: open files that they inherit, under the same numbers.
    """

    def __init__(
        self, count: int, setup: tuple[Callable[..., None], tuple[Any, ...]], descriptors: tuple[int, ...] = ()
    ) -> None:
        self._setup = pickle.dumps(setup)
        self._descriptors = descriptors
        self._state = _State()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._closed = False
        self._bell, self._ring = socket.socketpair()
        for _ in range(count):
            self._state.workers.append(self._start())
        self._thread = threading.Thread(target=self._manage, name="detr_fast workers", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls `function(*args)` in one of the processes. The call is pickled, and so is its value or exception.

        The future has `WorkerDied` if two processes died over it, and RuntimeError if none can be started.
        """
        task = _Task(pickle.dumps((function, args)), Future())
        with self._lock:
            if self._error is not None:
                task.future.set_exception(self._error)
                return task.future
            self._state.waiting.append(task)
        self._ring.send(b"!")
        return task.future

    def pids(self) -> list[int]:
        """The processes, as they are now."""
        with self._lock:
            return [worker.process.pid for worker in self._state.workers]

    def close(self) -> None:
        """Ends the processes, after the task that each has begun; others are never done."""
        self._closed = True
        self._ring.send(b"!")
        self._thread.join()
        for worker in self._state.workers:
            worker.connection.close()
        for worker in self._state.workers:
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._bell.close()
        self._ring.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(theirs.fileno()), *trusted_path()],
                pass_fds=(theirs.fileno(), *self._descriptors),
                stdin=subprocess.DEVNULL,
                env={**ENVIRONMENT, **os.environ},
                start_new_session=True,  # a Ctrl-C is for this process, which then ends the others
            )
        connection = Connection(ours.detach())
        connection.send_bytes(self._setup)
        return _Worker(process, connection)

    def _manage(self) -> None:
        try:
            while not self._closed:
                self._give_out()
                workers = {worker.connection: worker for worker in self._state.workers}
                for ready in wait([self._bell, *workers]):
                    if isinstance(ready, Connection):
                        self._hear(workers[ready])
                    else:
                        self._bell.recv(4096)
        except BaseException as error:
            self._give_up(error)

    def _give_out(self) -> None:
        for worker in self._state.workers:
            if worker.ready and worker.task is None:
                with self._lock:
                    if not self._state.waiting:
                        return
                    worker.task = self._state.waiting.popleft()
                with suppress(OSError):  # if it has just died, `_hear` will find out
                    worker.connection.send_bytes(worker.task.call)

    def _hear(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if not worker.ready:
            worker.ready = True
            self._state.failed_starts = 0
            return
        assert worker.task is not None
        future, worker.task = worker.task.future, None
        value, error = answer
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def _replace(self, dead: _Worker) -> None:
        dead.connection.close()
        code = dead.process.wait()
        if not dead.ready:
            self._state.failed_starts += 1
            if self._state.failed_starts >= STARTS:
                raise RuntimeError(f"a worker process cannot be started, it ends with code {code}")
        if (task := dead.task) is not None:
            task.attempts += 1
            if task.attempts < ATTEMPTS:
                with self._lock:
                    self._state.waiting.appendleft(task)
            else:
                reason = f"signal {-code}" if code < 0 else f"code {code}"
                task.future.set_exception(WorkerDied(f"its process ended twice ({reason}), perhaps for lack of memory"))
        with self._lock:
            self._state.workers[self._state.workers.index(dead)] = self._start()

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            tasks = [*self._state.waiting, *(worker.task for worker in self._state.workers if worker.task)]
            self._state.waiting.clear()
        for task in tasks:
            task.future.set_exception(error)


# ---- in the worker ----


def serve(descriptor: int) -> None:
    """Runs the calls that come through a socket, until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one decides when it ends
    connection = Connection(descriptor)
    function, args = connection.recv()
    function(*args)
    warnings.simplefilter("ignore")
    # libtiff and others write about damaged files straight to the terminal
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno() if sys.__stderr__ else 2)
    try:
        connection.send("ready")
        while True:
            connection.send_bytes(_answer(*connection.recv()))
    except (EOFError, OSError):
        return


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((function(*args), None))
    except Exception as error:
        return pickle.dumps((None, portable(error)))


def portable(error: Exception) -> Exception:
    """The error itself, or one of the same message if it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class may hold anything
        return RuntimeError(f"{type(error).__name__}: {error}")
