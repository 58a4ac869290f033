"""Files that are never seen half written, and survive a loss of power; locks; memory as a file. No torch here."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def open_atomic(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which takes the name `path` when its block ends well; an older file of that name stays until
    then, and for good where the block raises. Missing folders are made.

    Args:
        durable: the file survives a loss of power from the end of the block on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Writes bytes to a file with `open_atomic`."""
    with open_atomic(path, durable=durable) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON with `open_atomic`."""
    write_atomic(path, json.dumps(value).encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes values as lines of JSON with `open_atomic`."""
    with open_atomic(path) as file:
        for value in values:
            file.write(f"{json.dumps(value)}\n".encode())


def remove_temporary(folder: Path) -> None:
    """Removes the unfinished files that a killed process left below a folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(".tmp") and len(name) == len(f".{uuid.uuid4().hex}.tmp"):
                Path(parent, name).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, safe from a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OccupiedError(ValueError):
    """Another process works in a folder, or it holds files that a run would mix with its own."""


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Keeps other processes from doing the same work in a folder.

    Args:
        work: for the message, as "training in".

    Raises:
        OccupiedError: one does it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OccupiedError(f"another process is {work} {folder}") from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(descriptor)


def anonymous_file() -> int:
    """A descriptor of memory, or of a file where there is no such memory, that is gone with the last process that has
    it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("detr_fast")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
