"""Files below a folder whose content is not trusted: names that stay inside, opened without following links."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe could keep the reader waiting for ever


def stays_inside(name: object) -> bool:
    """Whether a value is the relative POSIX path of a file that lies below whatever folder it is joined to."""
    if not isinstance(name, str) or "\0" in name or os.path.splitdrive(name)[0]:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return not {"", ".", ".."} & set(name.split("/"))


def open_regular(path: Path, mode: str, *, buffering: int = -1) -> IO[bytes]:
    """`open` of a regular file in binary.

    Raises:
        OSError: it is a link, no regular file, or cannot be opened.
    """
    file = open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags | NO_LINK, 0o666))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


class Lengths:
    """The bytes of the regular files below a folder, each of whose folders is read once, when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, dict[str, int]] = {}

    def __call__(self, name: str) -> int | None:
        """None if there is no such file, or a link on the way to it."""
        folder, _, last = name.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._read(folder)
        return self._folders[folder].get(last)

    def _read(self, folder: str) -> dict[str, int]:
        path = os.fspath(self._root)
        try:
            for part in folder.split("/") if folder else ():
                path += f"/{part}"
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    return {}
            with os.scandir(path) as entries:
                files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
                return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in files}
        except OSError as error:
            if error.errno in ABSENT:
                return {}
            raise


def link_or_copy(folder: Path, name: str, target: Path) -> None:
    """Gives a regular file below a folder a second name, or copies it where the file system has no hard links.

    Raises:
        OSError: it is a link or behind one, no regular file, or `target` exists or cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _parent(folder, name) as (parent, last), open(os.open(last, NO_LINK, dir_fd=parent), "rb") as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise OSError(f"{folder / name} is not a regular file")
        try:
            os.link(last, target, src_dir_fd=parent, follow_symlinks=False)
        except OSError:  # another file system, or one without hard links
            with target.open("xb") as copy:
                shutil.copyfileobj(source, copy)


@contextmanager
def _parent(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that holds a file, and the last part of the file's name."""
    *parts, last = name.split("/")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor, last
    finally:
        os.close(descriptor)
