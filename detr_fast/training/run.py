"""A training's folder: settings, log, checkpoint and pictures, whole at any moment."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detr_fast.files import OccupiedError, locked, open_atomic, remove_temporary, write_atomic, write_json_lines

SETTINGS, LOG, BAD = "settings.json", "log.jsonl", "bad_annotations.txt"
CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"

# settings that may differ between a training and its resumption
MAY_CHANGE = ("epochs", "steps", "save_every", "workers", "device")


class RunFolder:
    """The folder of a training.

    `settings.json`, `log.jsonl` (a line for each step), `checkpoint.pth` (a model that `checkpoint.load_model` reads,
    and under "training" the state to resume from), `checkpoint.previous.pth` (the one before),
    `loss.png`, `predictions/epoch_NNNN.jpg` and `bad_annotations.txt`.

    Args:
        folder: made if missing.
        settings: of the training.
        resume: go on where the run in the folder stopped, if there is one.

    Attributes:
        damage: why `load` took the previous checkpoint; None where it did not.

    Raises:
        ValueError: the folder holds a run that is not to be resumed, or one of other settings, or cannot be one.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], resume: bool = False):
        self.folder = Path(folder)
        self.settings = dict(settings)
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder")
        self.damage: str | None = None
        self._state = self._read_state()
        self.exists = any(self._state)
        if self.exists and not resume:
            raise ValueError(f"{self.folder} holds another run: --resume goes on with it")
        if self.exists:
            self._check_settings()

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS
        try:
            before = json.loads(path.read_bytes())
            if not isinstance(before, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for name, value in json.loads(json.dumps(self.settings)).items():
            if name not in MAY_CHANGE and before.get(name) != value:
                raise ValueError(f"{self.folder} is a run with {name} {before.get(name)!r}, not {value!r}")

    def _read_state(self) -> list[tuple[int, int] | None]:
        """What changes with each run and each checkpoint in the folder."""
        paths = [self.folder / name for name in (SETTINGS, CHECKPOINT, PREVIOUS, LOG)]
        files = [path.stat() if path.exists() else None for path in paths]
        return [(file.st_ino, file.st_mtime_ns) if file else None for file in files]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in the folder, which is made if missing.

        Raises:
            OccupiedError: one trains there, or has done so since this object was made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, "training in"):
            if self._read_state() != self._state:
                raise OccupiedError(f"another process has trained in {self.folder} in the meantime")
            yield
            self._state = self._read_state()

    def load(self) -> dict[str, Any] | None:
        """The contents of the last checkpoint, of the previous one if the last is damaged, None without any; raises
        ValueError where none can be read."""
        last, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        if not last.exists() and not previous.exists():
            return None
        try:
            return _read_checkpoint(last)
        except ValueError as error:
            try:
                saved = _read_checkpoint(previous)
            except ValueError:
                raise error from None
            self.damage = str(error)
            return saved

    def start(self, step: int) -> None:
        """Makes the folder ready for step `step` (from 0): log entries of later steps, unfinished files and a damaged
        checkpoint go."""
        remove_temporary(self.folder)
        if self.damage is not None:
            os.replace(self.folder / PREVIOUS, self.folder / CHECKPOINT)
        write_atomic(self.folder / SETTINGS, json.dumps(self.settings, indent=2).encode(), durable=True)
        write_json_lines(self.folder / LOG, [entry for entry in self.log() if entry["step"] <= step])

    def log(self) -> list[dict[str, Any]]:
        """The steps logged so far; the last line may be cut where the process was killed."""
        path = self.folder / LOG
        entries = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries

    def note_bad(self, problems: list[str]) -> None:
        """Lists the bad annotations that were skipped."""
        if problems:
            text = "".join(f"{problem}\n" for problem in problems)
            write_atomic(self.folder / BAD, text.encode(), durable=True)

    def save_picture(self, name: str, picture: Image.Image) -> None:
        """Saves a picture; `name` is a path in the folder that ends in .png or .jpg."""
        with open_atomic(self.folder / name, durable=True) as file:
            picture.save(file, "PNG" if name.endswith(".png") else "JPEG")

    def save(self, contents: Mapping[str, Any]) -> None:
        """Saves a checkpoint. The last one becomes the previous one, whose place it takes."""
        with open_atomic(self.folder / CHECKPOINT, durable=True) as file:
            torch.save(dict(contents), file)
            self._keep_last()

    def _keep_last(self) -> None:
        """Gives the last checkpoint the name of the previous one; it has both names until another one is last."""
        last, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        if last.exists():
            second = self.folder / f".{uuid.uuid4().hex}.tmp"
            try:
                os.link(last, second)
                os.replace(second, previous)
            except OSError:  # a file system without a second name for a file
                os.replace(last, previous)
            second.unlink(missing_ok=True)  # where both were one file, nothing was replaced


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint with a training's state; raises ValueError on a damaged one, or on none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved["training"]["step"], int):
            raise TypeError("step is no number")
    except Exception as error:  # what a damaged file raises is anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be resumed from, it is damaged or of another origin: {reason}") from error
    return saved
