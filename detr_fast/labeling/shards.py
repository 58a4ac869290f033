"""The outputs of several machines joined to one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from detr_fast.labeling.formats import FORMATS
from detr_fast.labeling.manifest import Manifest, OccupiedError, Run, locked, occupied, read_lines
from detr_fast.labeling.results import LabelSummary, write_results

LINES_AT_ONCE = 1000


def merge_shards(shards: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> LabelSummary:
    """Joins the outputs of `label` for all shards of a folder of images to the output of one run, byte for byte.

    The images' files are hard links to the shards' where the file system allows it, else copies.

    Args:
        shards: output folders of finished runs with the same settings.
        out: a new or empty folder.

    Raises:
        OccupiedError: (a ValueError) `out` is not empty, or a shard holds no run.
        ValueError: a shard is missing, given twice, unfinished or has other settings.
        OSError: a file cannot be read or written.
    """
    folders, out = [Path(shard) for shard in shards], Path(out)
    runs = [Run.read(folder) for folder in folders]
    _check(folders, runs)
    if out.exists() and occupied(out):
        raise OccupiedError(f"{out} holds {occupied(out)[0]} already")
    files = sorted(file for folder in folders for file, _ in read_lines(folder))
    for file, following in zip(files, files[1:], strict=False):
        if file == following:
            raise ValueError(f"two of the shards hold {file}")
    run = Run(runs[0].settings, runs[0].images, None, runs[0].categories)
    formats = [FORMATS[name] for name in run.settings["formats"] if FORMATS[name].folder is not None]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        run.write(out)
        with Manifest(out, run.key, files) as manifest:
            for folder in folders:
                lines = read_lines(folder)
                while part := list(islice(lines, LINES_AT_ONCE)):
                    for file, record in part:
                        if "error" not in record:
                            for format in formats:
                                _link(folder, out, format.path(file))
                    manifest.append(part)
            return write_results(manifest, run, out)[0]


def _check(folders: list[Path], runs: list[Run]) -> None:
    for folder, run in zip(folders, runs, strict=True):
        if not (folder / "failures.jsonl").exists():
            raise ValueError(f"{folder} holds a run that is not finished; label with --resume finishes it")
        if run.key != runs[0].key:
            names = [name for name in run.settings if run.settings[name] != runs[0].settings.get(name)]
            raise ValueError(f"{folder} was made with other settings than {folders[0]}: {', '.join(names)}")
    given = sorted(run.shard or "1/1" for run in runs)
    count = int(given[0].partition("/")[2])
    wanted = sorted(f"{i}/{count}" for i in range(1, count + 1))
    if given != wanted:
        raise ValueError(f"the shards must be {', '.join(wanted)}, each once, got {', '.join(given)}")


def _link(folder: Path, out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(folder / name, out / name)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(folder / name, out / name)
