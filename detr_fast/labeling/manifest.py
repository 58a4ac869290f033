"""The record of a labeling run on disk: run.json, once, and manifest.jsonl, one line an image.

A line is `{"file", "settings", "width", "height", "segments_info", ...}` of an image that is labelled, with the fields
that the formats add ("rle"), and `{"file", "settings", "error"}` of one that failed; it is written when the image's
files are safe on the disk. `file` is relative to the folder of images, `settings` the hash of what decides the labels.
Lines are in the order in which images were done. The result files are made from them alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.files import open_atomic, sync, write_json
from detr_fast.labeling import formats

RESULTS = (*formats.RESULTS, "failures.jsonl", "report.html")  # written when all images are done
KEY_LENGTH = 16  # hex digits of the hash of the settings
SETTINGS = b', "settings": "'  # begins it in a line; nothing in a file's name can: there " has a \\ before it
ERROR = b', "error": '


class OccupiedError(ValueError):
    """The output folder holds files that the run would mix with its own."""


@dataclass(frozen=True)
class Run:
    """The content of run.json.

    Attributes:
        settings: everything that decides the labels of an image.
        images: the folder of images.
        shard: "I/N", or None.
        categories: the model's.
    """

    settings: dict[str, Any]
    images: str
    shard: str | None
    categories: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]

    def write(self, out: Path) -> None:
        path = out / "run.json"
        write_json(path, vars(self))
        sync(path)
        sync(out)

    @classmethod
    def read(cls, out: Path) -> Run:
        """Raises OccupiedError if there is none that `write` wrote."""
        path = out / "run.json"
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise OccupiedError(f"{out} holds no labeling run: it has no run.json") from None
        except (ValueError, TypeError) as error:
            raise OccupiedError(f"{path} is damaged: {error}") from None


def occupied(out: Path) -> list[str]:
    """The names in the output folder that belong to a run."""
    files = [name for name in ("run.json", "manifest.jsonl", *RESULTS) if (out / name).exists()]
    return files + [name for name in formats.FOLDERS if (out / name).is_dir() and any((out / name).iterdir())]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from labeling into the same folder.

    Raises:
        OccupiedError: one does.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OccupiedError(f"another process is labeling into {out}") from None
    except OSError:
        pass  # a network file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


class Manifest:
    """manifest.jsonl of one run. Only the place of each image's line is in memory.

    Opening it drops lines that a kill or a loss of power left unfinished, and failures, which are tried again.

    Args:
        out: the output folder.
        key: hash of the settings.
        files: the images, in the order of the listing; lines of others are kept and passed over.

    Raises:
        OccupiedError: a line of other settings.
        OSError: it cannot be read or written.
    """

    def __init__(self, out: Path, key: str, files: Sequence[str]) -> None:
        self._path = out / "manifest.jsonl"
        self._key = key
        self._number = {file: number for number, file in enumerate(files)}
        self._offsets = array("q", [-1]) * len(files)
        self._open()
        if self._load():
            self._drop_failures()
            self._offsets = array("q", [-1]) * len(files)
            self._open()
            self._load()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def done(self, file: str) -> bool:
        return self._offsets[self._number[file]] >= 0

    def append(self, lines: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Adds (file, record or {"error"}) of images that are done, safe from a loss of power when this returns."""
        start = end = self._file.seek(0, os.SEEK_END)
        offsets, parts = [], []
        for file, record in lines:
            offsets.append((self._number[file], end))
            parts.append(json.dumps({"file": file, "settings": self._key, **record}).encode() + b"\n")
            end += len(parts[-1])
        try:
            data = memoryview(b"".join(parts))
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        for number, offset in offsets:
            self._offsets[number] = offset

    def read(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(file, image id, record) of the images that are done, in the order of the listing. Ids count from 1."""
        with self._path.open("rb") as lines:
            for file, number in self._number.items():
                if self._offsets[number] >= 0:
                    lines.seek(self._offsets[number])
                    yield file, number + 1, json.loads(lines.readline())

    def __getitem__(self, image_id: int) -> dict[str, Any]:
        """The record of an image that is done."""
        with self._path.open("rb") as lines:
            lines.seek(self._offsets[image_id - 1])
            return json.loads(lines.readline())

    def _open(self) -> None:
        self._file = self._path.open("a+b", buffering=0)

    def _load(self) -> int:
        """Finds the lines that are sound, cuts off the rest, and counts the failures."""
        end = failures = 0
        for line, file, key in _sound_lines(self._path):
            if key != self._key:
                raise OccupiedError(f"{self._path} holds lines of other settings")
            failures += _failed(line)
            if (number := self._number.get(file)) is not None:
                self._offsets[number] = end
            end += len(line)
        self._file.truncate(end)
        return failures

    def _drop_failures(self) -> None:
        self._file.close()
        with open_atomic(self._path) as kept:
            for line, _, _ in _sound_lines(self._path):
                if not _failed(line):
                    kept.write(line)
        sync(self._path)
        sync(self._path.parent)


def read_lines(out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, record) of the images in a manifest, in its order."""
    for line, file, _ in _sound_lines(out / "manifest.jsonl"):
        yield file, json.loads(line)


def _sound_lines(path: Path) -> Iterator[tuple[bytes, str, str]]:
    """Each line with its "file" and "settings", up to the first that was not written in full; a loss of power may leave
    zeros as well as an end. Only the head of a line is parsed, as the rest is long."""
    with path.open("rb") as file:
        for line in file:
            head = line[: line.find(SETTINGS) + len(SETTINGS) + KEY_LENGTH + 1] + b"}"
            if not line.endswith(b"}\n") or b"\0" in line or SETTINGS not in head:
                return
            try:
                values = json.loads(head)
            except ValueError:
                return
            yield line, values["file"], values["settings"]


def _failed(line: bytes) -> bool:
    return line.startswith(ERROR, line.find(SETTINGS) + len(SETTINGS) + KEY_LENGTH + 1)
