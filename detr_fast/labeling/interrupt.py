"""SIGINT and SIGTERM as a wish to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 4.0  # seconds that a computation which has begun may still take


class Interrupted(BaseException):
    """A computation was broken off."""


class Interrupt:
    """While it is entered SIGINT and SIGTERM only set `number`; when it is left they are raised again.

    A second one is raised at once. Outside of the main thread it does nothing: there Python lets nobody
    handle signals.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._computing = False
        self._grace = GRACE
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._wish)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._insist)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._restore()
        if self.number is not None:
            signal.raise_signal(self.number)

    @contextmanager
    def computing(self, grace: float | None = None) -> Iterator[None]:
        """The code inside may be broken off, by raising `Interrupted`, `grace` (GRACE) seconds after a signal."""
        self._computing, self._grace = True, GRACE if grace is None else grace
        try:
            yield
        finally:
            self._computing, self._grace = False, GRACE

    def _wish(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self._restore()
            signal.raise_signal(number)
        self.number = number
        signal.setitimer(signal.ITIMER_REAL, self._grace, 0.1)

    def _insist(self, number: int, frame: FrameType | None) -> None:
        if self._computing:
            raise Interrupted

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
