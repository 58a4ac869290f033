"""The command runs in a folder whose files it labels but must not execute."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detr_fast.checkpoint import save_model
from detr_fast.labeling.workers import trusted_path
from tiny import tiny_detr

ROOT = Path(__file__).resolve().parents[2]
# modules that the command, its workers, multiprocessing or Ray import, and the folder of a package
DECOYS = (
    *("json", "pickle", "socket", "mmap", "tempfile", "subprocess", "signal", "threading", "selectors", "struct"),
    *("multiprocessing", "concurrent", "numpy", "PIL", "torch", "pyarrow", "tqdm", "scipy", "psutil", "decoy"),
)
SCRIPT = "import sys\nfrom detr_fast.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_detr(), folder)
    return folder


@pytest.fixture
def untrusted(tmp_path: Path) -> Path:
    """A folder with images and with modules that leave a mark when they are executed."""
    folder = tmp_path / "untrusted"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 90, 100)).save(folder / f"{number}.png")
    for name in DECOYS:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write('{name} ')\n")
    return folder


@pytest.mark.parametrize(
    "options", [[], ["--devices", "cpu,cpu"], ["--engine", "ray"]], ids=["local", "devices", "ray"]
)
@pytest.mark.parametrize("way", ["script", "module"])
def test_label_executes_nothing_from_the_folder(
    untrusted: Path, model: Path, tmp_path: Path, way: str, options: list[str]
) -> None:
    if "ray" in options and (way == "module" or importlib.util.find_spec("ray") is None):
        pytest.skip("Ray is tried once, where it is installed")
    arguments = ["label", ".", "--out", tmp_path / "out", "--model", model, "--device", "cpu", "--max-size", "40"]
    run(way, untrusted, *arguments, *options)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH for multiprocessing")
def test_synth_executes_nothing_from_the_folder(untrusted: Path, tmp_path: Path) -> None:
    run("script", untrusted, "synth", tmp_path / "out", "--images", "2", "--size", "32", "32", "--workers", "2")


def test_workers_are_not_given_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -c`, `python -m` and a prompt put it into sys.path; a folder that somebody chose stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "elsewhere"])
    assert trusted_path() == ["elsewhere"]
    monkeypatch.setenv("PYTHONPATH", f"other{os.pathsep}{tmp_path}")
    assert trusted_path() == [str(tmp_path), str(tmp_path), "elsewhere"]


def run(way: str, folder: Path, *arguments: str | Path) -> None:
    """The command in `folder`, as pip's script starts it or by `python -m`."""
    script = folder.parent / "bin" / "detr-fast"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    program = [str(script)] if way == "script" else ["-m", "detr_fast"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}
    command = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    mark = folder.parent / "executed"
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr
