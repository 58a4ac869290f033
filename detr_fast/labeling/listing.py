"""The images of a folder, their hash, and the names of their PNGs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def find_images(folder: Path, out: Path) -> list[str]:
    """The images of a folder and its sub-folders, sorted, as POSIX paths relative to it.

    An image is a file with one of `IMAGE_SUFFIXES` in any case. Symbolic links to folders are not followed, and
    `out` is left out if it lies within.

    Raises:
        ValueError: `folder` is no folder, is `out` itself, or holds no images.
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {folder}")
    skipped = out.resolve()
    if folder.resolve() == skipped:
        raise ValueError(f"images and out must be different folders, got {folder} for both")
    root, files = os.fspath(folder), []
    for parent, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name != skipped.name or Path(parent, name).resolve() != skipped]
        below = Path(os.path.relpath(parent, root)).as_posix()
        prefix = "" if below == "." else f"{below}/"
        files += [prefix + name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise ValueError(f"no images in {folder}: no file ends in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(files)


def listing_hash(files: Sequence[str]) -> str:
    """Hash of a listing's names, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
    return digest.hexdigest()


def png_name(file_name: str) -> str:
    """The name of an image's PNG below a format's folder; different images never share a name.

    `sub/a.jpg` becomes `sub/a.png`, as in COCO. Any other image keeps its extension (`sub/a.png` becomes
    `sub/a.png.png`), so that neighbours with the same stem stay apart whatever else the folder holds now or later.
    """
    name = file_name.rpartition("/")[2]
    if _suffix(name) == ".jpg" and _suffix(name[:-4]).lower() not in IMAGE_SUFFIXES:
        return f"{file_name[:-4]}.png"
    return f"{file_name}.png"


def without_place(files: Sequence[str]) -> dict[str, str]:
    """The images whose PNG would have the name of a folder of PNGs, with the reason why they fail."""
    folders = set()
    for folder in {file.rpartition("/")[0] for file in files}:
        parts = folder.split("/")
        folders |= {"/".join(parts[:end]) for end in range(1, 1 + len(parts)) if parts[end - 1].endswith(".png")}
    if not folders:
        return {}
    reason = "its PNG would have the name of a folder"
    return {file: reason for file in files if png_name(file) in folders}


def _suffix(name: str) -> str:
    """As `PurePath.suffix`, in a tenth of its time: a resumed run asks for that of every image."""
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""
