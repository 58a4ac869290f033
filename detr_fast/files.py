"""Files that are never seen half written, and survive a loss of power. No torch here."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file, and the folders above it, so that nobody ever sees a part of it under its name."""
    with open_atomic(path) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its name, and the place of what had it, when all has gone well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Removes what `open_atomic` left behind in a process that was killed."""
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


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value).encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    with open_atomic(path) as file:
        for value in values:
            file.write(f"{json.dumps(value)}\n".encode())
