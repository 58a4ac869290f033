"""The record of a labeling run on disk: run.json, once, and manifest.jsonl, one line an image.

A line is `{"file", "settings", "bytes", "width", "height", "segments_info", ..., "crc32"}` of an image that is
labelled, with the fields that the formats add ("rle"), and `{"file", "settings", "error", "crc32"}` of one that failed;
it is written when the image's files are safe on the disk. `file` is relative to the folder of images, `settings` the
hash of what decides the labels, `bytes` the length of the image's file in each format that writes one, `crc32` the
checksum of the line without it. Lines are in the order in which images were done. The result files are made from them
alone.

Nothing in these files is trusted: `Run.read` and `read_lines` give checked values.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.files import OccupiedError, open_atomic, sync, write_json
from detr_fast.labeling import formats
from detr_fast.labeling.inside import Lengths, open_regular, stays_inside

RESULTS = (*formats.RESULTS, "failures.jsonl", "report.html")  # written when all images are done
KEY_LENGTH = 16  # hex digits of the hash of the settings
# They begin the last value of a line, and what a resumed run need not parse. Nothing in a file's name can be the same:
# there " has a \\ before it.
CHECKSUM, LABELS = b', "crc32": ', b', "width": '
MAX_CATEGORY = 65_535
MAX_SIDE = 1 << 24  # pixels
UNPARSABLE = (ValueError, TypeError, KeyError, RecursionError)  # of JSON that is damaged, or has other values


@dataclass(frozen=True)
class Run:
    """The content of run.json.

    Attributes:
        settings: everything that decides the labels of an image.
        images: the folder of images.
        shard: "I/N", or None.
        categories: the model's.
        count, listing: how many images all shards together have, and `listing_hash` of them; None: an older run.
        limit: if it left out images of the folder.
    """

    settings: dict[str, Any]
    images: str
    shard: str | None
    categories: list[dict[str, Any]]
    count: int | None = None
    listing: str | None = None
    limit: int | None = None

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
            with open_regular(path, "rb") as file:
                run = cls(**json.load(file))
            run.check()
            return run
        except FileNotFoundError:
            raise OccupiedError(f"{out} holds no labeling run: it has no run.json") from None
        except UNPARSABLE as error:
            raise OccupiedError(f"{path} is damaged: {error}") from None

    def check(self) -> None:
        """Raises ValueError, TypeError or KeyError for values that `label` does not write."""
        names = self.settings["formats"]
        _require(isinstance(names, list) and bool(names) and set(names) <= set(formats.FORMATS), "formats")
        _require(isinstance(self.images, str), "images")
        _require(self.shard is None or re.fullmatch(r"[1-9]\d{0,9}/[1-9]\d{0,9}", self.shard) is not None, "shard")
        for category in self.categories:
            _require(_is_count(category["id"], MAX_CATEGORY) and isinstance(category["name"], str), "categories")
            _require(len(category["color"]) == 3 and all(_is_count(value, 255) for value in category["color"]), "color")
        _require(self.count is None or _is_count(self.count), "count")
        _require(self.listing is None or isinstance(self.listing, str), "listing")
        _require(self.limit is None or (_is_count(self.limit) and self.limit > 0), "limit")


def occupied(out: Path) -> list[str]:
    """The names in the output folder that belong to a run, or are links in their place."""
    files = [name for name in ("run.json", "manifest.jsonl", *RESULTS) if os.path.lexists(out / name)]
    folders = [out / name for name in formats.FOLDERS]
    return files + [path.name for path in folders if path.is_symlink() or (path.is_dir() and any(path.iterdir()))]


class Manifest:
    """manifest.jsonl of one run. Only the place of each image's line is in memory.

    Opening it drops lines that are damaged, lines of images whose files are not on the disk in full, and failures:
    these images are done again.

    Args:
        out: the output folder.
        key: hash of the settings.
        files: the images, in the order of the listing; lines of others are kept and passed over.
        names: the formats whose files and fields each image has.

    Raises:
        OccupiedError: a line of other settings.
        OSError: it cannot be read or written, or is a link.
    """

    def __init__(self, out: Path, key: str, files: Sequence[str], names: Iterable[str] = ()) -> None:
        self._out = out
        self._path = out / "manifest.jsonl"
        self._key = key
        self._names = tuple(names)
        self._number = {file: number for number, file in enumerate(files)}
        self._open()
        if dropped := self._load():
            self._drop(dropped)
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
            parts.append(_format_line({"file": file, "settings": self._key, **record}))
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
        """(file, image id, record) of the images that are done, in the order of the listing. Ids count from 1.

        Raises:
            OccupiedError: a line has values that `append` was not given.
        """
        with open_regular(self._path, "rb") as lines:
            for file, number in self._number.items():
                if self._offsets[number] >= 0:
                    lines.seek(self._offsets[number])
                    try:
                        record = _parse_line(lines.readline(), self._names)
                    except UNPARSABLE as error:
                        raise OccupiedError(f"the line of {file} in {self._path} is damaged: {error}") from None
                    yield file, number + 1, record

    def __getitem__(self, image_id: int) -> dict[str, Any]:
        """The record of an image that is done."""
        with open_regular(self._path, "rb") as lines:
            lines.seek(self._offsets[image_id - 1])
            return json.loads(lines.readline())

    def _open(self) -> None:
        self._offsets = array("q", [-1]) * len(self._number)
        self._file = open_regular(self._path, "a+b", buffering=0)

    def _load(self) -> set[int]:
        """Finds the lines of the images that are done, and gives the places of the lines to drop."""
        dropped, end, lengths = set(), 0, Lengths(self._out)
        for line, values in _checked_lines(self._path, self._names, _parse_head):
            if values is not None and values["settings"] != self._key:
                raise OccupiedError(f"{self._path} holds lines of other settings")
            number = None if values is None else self._number.get(values["file"])
            if values is None or "error" in values or (number is not None and missing_file(lengths, values)):
                dropped.add(end)
            elif number is not None:
                self._offsets[number] = end
            end += len(line)
        return dropped

    def _drop(self, dropped: set[int]) -> None:
        self._file.close()
        end = 0
        with open_regular(self._path, "rb") as lines, open_atomic(self._path, durable=True) as kept:
            for line in lines:
                if end not in dropped:
                    kept.write(line)
                end += len(line)


def read_lines(out: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, record) of the images in a manifest, in its order. Lines that are damaged are passed over.

    Args:
        names: the formats whose fields each record has.
    """
    for _, values in _checked_lines(out / "manifest.jsonl", tuple(names), _parse_line):
        if values is not None:
            yield values["file"], values


def missing_file(lengths: Lengths, record: dict[str, Any]) -> str | None:
    """The first of an image's files that is not in the output folder, or not of its length."""
    for name, length in record["bytes"].items():
        path = formats.FORMATS[name].path(record["file"])
        if lengths(path) != length:
            return path
    return None


def _checked_lines(
    path: Path, names: tuple[str, ...], parse: Callable[[bytes, tuple[str, ...]], dict[str, Any]]
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its values, None if it is damaged."""
    with open_regular(path, "rb") as lines:
        for line in lines:
            try:
                yield line, parse(line, names)
            except UNPARSABLE:
                yield line, None


def _format_line(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    return text[:-1] + CHECKSUM + b"%d}\n" % zlib.crc32(text)


def _parse_line(line: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """The values of a line, without its checksum, which older lines do not have.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: the line is damaged, or lacks what the formats `names` write.
    """
    values = json.loads(_without_checksum(line)[0])
    _check_head(values, names)
    if "error" in values:
        return values
    _require(_is_count(values["width"], MAX_SIDE) and _is_count(values["height"], MAX_SIDE), "size")
    for info in values["segments_info"]:
        _require(_is_count(info["category_id"], MAX_CATEGORY), "category_id")
        _require(_is_count(info["id"]) and _is_count(info["area"]), "segments_info")
    for format in (formats.FORMATS[name] for name in names):
        _require(all(isinstance(values[field], kind) for field, kind in format.fields.items()), format.name)
    return values


def _parse_head(line: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """`_parse_line` without the labels, which are most of it, where the checksum shows that they are not damaged."""
    text, checked = _without_checksum(line)
    if not checked:
        return _parse_line(line, names)
    head, labels, _ = text.partition(LABELS)
    values = json.loads(head + b"}" if labels else text)
    _check_head(values, names)
    return values


def _without_checksum(line: bytes) -> tuple[bytes, bool]:
    """A line without its checksum, which must be right, and whether it has one."""
    _require(line.endswith(b"\n"), "the end")
    place = line.rfind(CHECKSUM)
    if place < 0:
        return line, False
    text, checksum = line[:place] + b"}", line[place + len(CHECKSUM) :].rstrip()
    _require(int(checksum[:-1]) == zlib.crc32(text), "crc32")
    return text, True


def _check_head(values: dict[str, Any], names: tuple[str, ...]) -> None:
    _require(stays_inside(values["file"]), "file")
    _require(isinstance(values["settings"], str), "settings")
    if "error" in values:
        _require(isinstance(values["error"], str), "error")
        return
    lengths = values.setdefault("bytes", {})
    _require(isinstance(lengths, dict) and all(map(_is_count, lengths.values())), "bytes")
    _require(all(formats.FORMATS[name].folder for name in lengths), "bytes")
    _require(all(name in lengths for name in names if formats.FORMATS[name].folder), "bytes")


def _is_count(value: object, most: int = (1 << 63) - 1) -> bool:
    return type(value) is int and 0 <= value <= most


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(f"{what} is not as it is written")
