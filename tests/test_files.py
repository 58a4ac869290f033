"""Files take their names when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from detr_fast.files import OccupiedError, locked, open_atomic, remove_temporary, write_json, write_json_lines
from detr_fast.training.run import RunFolder


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_that_fails_leaves_the_old_one(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with open_atomic(path, durable=durable) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), open_atomic(path, durable=durable) as file:
        file.write(b"half")
        raise OSError("full")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_durable_files_are_on_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    with open_atomic(tmp_path / "file", durable=True) as file:
        file.write(b"x")
    assert events == ["sync", "replace", "sync"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"a": 1})
    write_json_lines(tmp_path / "more", [{"a": 1}, 2])
    assert (tmp_path / "one").read_text() == '{"a": 1}'
    assert (tmp_path / "more").read_text() == '{"a": 1}\n2\n'


def unfinished(folder: Path) -> None:
    """Leaves a file as a killed process does."""
    with open_atomic(folder / "file") as file:
        temporary = Path(file.name)
    temporary.write_bytes(b"half")


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    unfinished(tmp_path / "deep")
    (tmp_path / ".notes.tmp").touch()
    remove_temporary(tmp_path)
    assert os.listdir(tmp_path / "deep") == ["file"] and (tmp_path / ".notes.tmp").exists()


def test_a_training_starts_without_unfinished_files(tmp_path: Path) -> None:
    unfinished(tmp_path / "predictions")
    RunFolder(tmp_path, {"steps": 1}).start(0)
    assert os.listdir(tmp_path / "predictions") == ["file"]


def test_a_folder_is_locked_for_one_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "training in"),
        pytest.raises(OccupiedError, match="another process is training in"),
        locked(tmp_path, "training in"),
    ):
        pass
    with locked(tmp_path, "training in"):
        pass


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path, "training in"):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_two_checkpoints_are_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("no links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    run = RunFolder(tmp_path, {})
    for step in range(3):
        run.save({"training": {"step": step}})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pth", "checkpoint.pth"]
    for name, step in (("checkpoint.pth", 2), ("checkpoint.previous.pth", 1)):
        assert torch.load(tmp_path / name, weights_only=True)["training"]["step"] == step
