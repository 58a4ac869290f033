"""The outputs of several machines joined to one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from detr_fast.files import OccupiedError, locked
from detr_fast.labeling.formats import FORMATS
from detr_fast.labeling.inside import Lengths, link_or_copy
from detr_fast.labeling.listing import listing_hash
from detr_fast.labeling.manifest import Manifest, Run, missing_file, occupied, read_lines
from detr_fast.labeling.results import LabelSummary, write_results

LINES_AT_ONCE = 1000
NAMED = 20  # shards, at most


class IncompleteError(ValueError):
    """A shard lacks labels."""


def merge_shards(shards: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> LabelSummary:
    """Joins the outputs of `label` for all shards of a folder of images to the output of one run, byte for byte.

    Each image of the shards' listing must be labelled, with its files there in full, or failed. The images' files are
    hard links to the shards' where the file system allows it, else copies. Links in a shard are not followed.

    Args:
        shards: output folders of finished runs with the same settings.
        out: a new or empty folder.

    Raises:
        OccupiedError: (a ValueError) `out` is not empty, or a shard holds no run.
        IncompleteError: (a ValueError) a shard is unfinished, or lacks an image or a file.
        ValueError: a shard is missing, given twice or has other settings.
        OSError: a file cannot be read or written.
    """
    folders, out = [Path(shard) for shard in shards], Path(out)
    runs = [Run.read(folder) for folder in folders]
    _check_shards(folders, runs)
    if out.exists() and occupied(out):
        raise OccupiedError(f"{out} holds {occupied(out)[0]} already")
    files = _complete_listing(folders, runs)
    run = Run(runs[0].settings, runs[0].images, None, runs[0].categories, runs[0].count, runs[0].listing)
    names = run.settings["formats"]
    formats = [FORMATS[name] for name in names if FORMATS[name].folder is not None]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "labeling into"):
        run.write(out)
        with Manifest(out, run.key, files) as manifest:
            for folder in folders:
                lines = read_lines(folder, names)
                while part := list(islice(lines, LINES_AT_ONCE)):
                    for file, record in part:
                        if "error" not in record:
                            for format in formats:
                                link_or_copy(folder, format.path(file), out / format.path(file))
                    manifest.append(part)
            return write_results(manifest, run, out)[0]


def _check_shards(folders: list[Path], runs: list[Run]) -> None:
    """Raises ValueError unless they are all shards of one run, and IncompleteError for one that is unfinished."""
    for folder, run in zip(folders, runs, strict=True):
        if not (folder / "failures.jsonl").exists():
            raise IncompleteError(f"{folder} holds a run that is not finished; label with --resume finishes it")
        if run.key != runs[0].key:
            names = [name for name in run.settings if run.settings[name] != runs[0].settings.get(name)]
            raise ValueError(f"{folder} was made with other settings than {folders[0]}: {', '.join(names)}")
    given = sorted(run.shard or "1/1" for run in runs)
    count = int(given[0].partition("/")[2])
    if count != len(given) or given != sorted(f"{i}/{count}" for i in range(1, count + 1)):
        wanted = ", ".join(f"{i}/{count}" for i in range(1, count + 1)) if count <= NAMED else f"1/{count} to N/{count}"
        raise ValueError(f"the shards must be {wanted}, each once, got {', '.join(given)}")


def _complete_listing(folders: list[Path], runs: list[Run]) -> list[str]:
    """The images of all shards, sorted.

    Raises:
        IncompleteError: one is missing, or a file of one.
    """
    files = []
    for folder, run in zip(folders, runs, strict=True):
        files += _complete_shard(folder, run)
        if run.listing != runs[0].listing:
            raise IncompleteError(
                f"{folder} and {folders[0]} were made from different listings; label with --resume on the same images"
            )
    files.sort()
    for file, following in zip(files, files[1:], strict=False):
        if file == following:
            raise ValueError(f"two of the shards hold {file}")
    if listing_hash(files) != runs[0].listing:
        raise IncompleteError(f"{', '.join(map(str, folders))} hold other images than those of their listing")
    return files


def _complete_shard(folder: Path, run: Run) -> list[str]:
    """The images of a shard, in the order of its manifest. Raises IncompleteError as above."""
    if run.count is None:
        raise IncompleteError(f"{folder} does not say which images it should hold; label with --resume completes it")
    if run.limit is not None:
        raise IncompleteError(
            f"{folder} was made with --limit {run.limit}; label with --resume and without it completes it"
        )
    files, lengths = [], Lengths(folder)
    for file, record in read_lines(folder, run.settings["formats"]):
        files.append(file)
        if "error" not in record and (missing := missing_file(lengths, record)):
            raise IncompleteError(f"{folder / missing} is missing or not whole; label with --resume makes it again")
    i, n = map(int, (run.shard or "1/1").split("/"))
    if len(files) != (expected := len(range(i - 1, run.count, n))):
        raise IncompleteError(f"{folder} holds {len(files)} of its {expected} images; label with --resume completes it")
    return files
