"""A Ray to label on, which keeps to what the command promises: quiet, open to signals, and gone when it is done."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import ray
import ray.data
import ray.data.exceptions
import ray.exceptions
from ray.job_config import JobConfig

from detr_fast.labeling.interrupt import Interrupt
from detr_fast.labeling.workers import PATIENCE, trusted_path

ANSWER = 4.0  # seconds that RAY_ADDRESS has to answer
START = 120.0  # seconds that Ray has to start or to let this process in


@contextmanager
def connected(interrupt: Interrupt) -> Iterator[None]:
    """A connection to Ray: the one that this process has or, if it has none, one to the cluster that `ray.init` finds,
    which is that of RAY_ADDRESS, one that runs on this machine, or else a new one of this machine alone. A
    connection that begins here ends here, and no process is left.

    Raises:
        RuntimeError: it cannot be had.
    """
    if ray.is_initialized():
        yield
        return
    _check_address()
    connection = _Connection()
    try:
        with interrupt.computing(grace=PATIENCE):
            connection.begin()
        yield
    finally:
        connection.end()


def _check_address() -> None:
    """Raises RuntimeError if there is nothing at RAY_ADDRESS; Ray would try for minutes, deaf to signals."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if not port.isdecimal():  # "auto" and "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise RuntimeError(f"RAY_ADDRESS is {address}, where nothing answers: {error}") from error


class _Connection:
    """`ray.init` and `ray.shutdown`, in a thread, since the first may hang, deaf to signals. The thread lasts from one
    to the other, as the kernel ends Ray's processes with it."""

    def __init__(self) -> None:
        self._begun, self._over = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="Ray", daemon=True)

    def begin(self) -> None:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # for Ray's C++, which `ray.init` does not keep quiet
        with _closed_stderr():  # on which it still says that it has read this
            self._thread.start()
            deadline = time.monotonic() + START
            while not self._begun.wait(0.05) and time.monotonic() < deadline:
                _handle_sigterm()
            _handle_sigterm()
        if not self._begun.is_set():
            self._error = TimeoutError(f"no answer in {START:.0f} s")
        if self._error is not None:
            raise RuntimeError(f"Ray cannot be started or reached: {self._error}") from self._error

    def end(self) -> None:
        started = _started()
        if not self._begun.is_set():  # a start that is broken off fails, with errors in its log, when all is over here
            logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
        self._over.set()
        with _closed_stderr():
            self._thread.join(None if self._begun.is_set() else PATIENCE)
            _end(started)

    def _run(self) -> None:
        try:
            ray.init(
                include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, job_config=_TrustedPath()
            )
        except Exception as error:  # Ray raises this very class
            self._error = error
        self._begun.set()
        self._over.wait()
        ray.shutdown()


class _TrustedPath(JobConfig):
    """Ray adds this process's current folder to the sys.path of its workers, which would import the files there."""

    def _serialize(self) -> str:
        trusted = {os.path.abspath(entry) for entry in trusted_path()}
        self._py_driver_sys_path = [entry for entry in self._py_driver_sys_path if entry in trusted]
        return super()._serialize()


def _handle_sigterm() -> None:
    """As before `ray.init`, whose C++ lets SIGTERM abort this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@dataclass(frozen=True)
class _Process:
    """A process that runs, as Linux knows it. Ray's workers rename themselves, and have another parent once theirs has
    ended: neither makes another process of them."""

    pid: int
    started: int
    name: str = field(compare=False)
    parent: int = field(compare=False)

    @classmethod
    def all(cls) -> list[_Process]:
        """None where there is no /proc."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                pid, _, rest = stat.read_text(errors="replace").partition(" (")
                name, _, rest = rest.rpartition(") ")
                state, parent, *more = rest.split()
                if state != "Z":
                    found.append(cls(int(pid), int(more[17]), name, int(parent)))
        return found


def _started() -> set[_Process]:
    """The raylet that this process has started, and all that it has."""
    running = _Process.all()
    found = {process for process in running if process.name == "raylet" and process.parent == os.getpid()}
    while more := {process for process in running if process.parent in {other.pid for other in found}} - found:
        found |= more
    return found


def _end(processes: set[_Process]) -> None:
    """Waits for them to end, and kills those that take long. `ray.shutdown` waits for a part of them, and knows of none
    when `ray.init` was broken off."""
    begun = time.monotonic()
    while processes and (waited := time.monotonic() - begun) < 2 * PATIENCE:
        for process in processes if waited > PATIENCE else ():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
        processes = (processes | _started()) & set(_Process.all())


@contextmanager
def _closed_stderr() -> Iterator[None]:
    """Keeps C++ from stderr, which Python cannot redirect."""
    with open(os.devnull, "wb") as null, os.fdopen(os.dup(2)) as kept:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Ray Data from the terminal. Its messages are in Ray's log files."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    progress_bars, context.enable_progress_bars = context.enable_progress_bars, False
    terminal = [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
    for handler in terminal:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        context.enable_progress_bars = progress_bars
        for handler in terminal:
            logger.addHandler(handler)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises Ray's exceptions as RuntimeError of one line."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise RuntimeError(f"Ray gave up: {(str(error) or repr(error)).splitlines()[0]}") from error
