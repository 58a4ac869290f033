"""The package as users get it: built into a wheel, installed elsewhere, imported from a third place."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import detr_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "detr_fast", "kernels")


def python(*arguments: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a Python process that sees the packages of this one, and `path` before them."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, with one file more in kernels/."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    (copy / "kernels" / "probe.py").write_text("VALUE = 17\n")
    return copy


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel of `source` is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    offline = ("--no-index", "--no-deps")
    python(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "wheel", source, cwd=folder)
    (wheel,) = (folder / "wheel").iterdir()
    python(*pip, "install", *offline, "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


def test_wheel_holds_every_file(source: Path, installed: Path) -> None:
    # listed before anything is imported from them, so that no bytecode is in the way
    in_source = {path.relative_to(source) for path in (source / "detr_fast").rglob("*") if path.is_file()}
    in_source |= {Path("detr_fast") / path.relative_to(source) for path in (source / "kernels").glob("*.py")}
    in_wheel = {
        path.relative_to(installed)
        for path in (installed / "detr_fast").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert in_wheel == in_source


def test_installed_wheel_imports_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    program = (
        "import detr_fast, detr_fast.kernels.probe as probe, detr_fast.compat, detr_fast.labeling.formats\n"
        "from importlib.metadata import version\n"
        "from detr_fast.categories import COCO_PANOPTIC\n"
        "print(detr_fast.__file__, probe.__file__, probe.VALUE, len(COCO_PANOPTIC))\n"
        "assert version('detr_fast') == detr_fast.__version__"
    )
    package, probe, value, categories = python("-c", program, cwd=tmp_path, path=installed).split()
    assert Path(package) == installed / "detr_fast" / "__init__.py"
    assert Path(probe) == installed / "detr_fast" / "kernels" / "probe.py"
    assert (value, categories) == ("17", "133")


def test_kernels_import_from_the_repository(source: Path) -> None:
    program = "import detr_fast.kernels.probe as probe; print(probe.__file__)"
    assert Path(python("-c", program, cwd=source).strip()) == source / "kernels" / "probe.py"


def test_the_other_package_named_kernels_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    # the current folder, the repository's root, comes first in sys.path
    found = python("-c", "import kernels; print(kernels.__file__)", cwd=ROOT, path=tmp_path)
    assert Path(found.strip()) == tmp_path / "kernels" / "__init__.py"


def test_import_takes_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys; before = set(sys.modules); import detr_fast; print(*set(sys.modules) - before)"
    loaded = python("-c", program, cwd=tmp_path, path=ROOT).split()
    assert "detr_fast" in loaded
    heavy = {"scipy", "pycocotools", "transformers", "huggingface_hub", "PIL", "triton", "safetensors", "tqdm"}
    assert not heavy & set(loaded)


def test_help_comes_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from detr_fast.cli import main\n"
        "try: main(['label', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert python("-c", program, cwd=tmp_path, path=ROOT).split()[-1] == "False"


# ---- what type checkers see ----


def test_type_checkers_see_the_lazy_names() -> None:
    tree = ast.parse((ROOT / "detr_fast" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        # a name is public in a typed package when it is imported as itself
        assert all(alias.asname == alias.name for alias in node.names)
        seen |= {alias.name: str(node.module) for alias in node.names}
    lazy = {name: f"detr_fast.{module}" for name, module in detr_fast._HOME.items()}
    assert seen == lazy | dict.fromkeys(detr_fast._MODULES, "detr_fast")
    assert {"__version__", *seen} == set(detr_fast.__all__)


def test_public_names_have_their_types() -> None:
    pytest.importorskip("mypy", reason="mypy is in the extra lint")
    expected = {
        "Predictor": r"def \(model: .*\) -> detr_fast\.predictor\.Predictor",
        "load_model": r"def \(name_or_path: .*\) -> detr_fast\.detr\.detector\.DETR \| .*DETRsegm",
        "label": r"def \(images: .*\) -> detr_fast\.labeling\.results\.LabelSummary",
        "PostProcess": r"def \(.*\) -> detr_fast\.postprocess\.PostProcess",
        "DetrForSegmentation": r"def \(detr: .*\) -> detr_fast\.compat\.transformers\.DetrForSegmentation",
        "detr_resnet50": r"def \(pretrained: bool =, .*",
        "ops": r"types\.ModuleType",
    }
    program = "\n".join(
        ["import detr_fast", *(f"reveal_type(detr_fast.{name})" for name in expected), "detr_fast.nothing"]
    )
    command = [sys.executable, "-m", "mypy", "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    *revealed, unknown, _ = found.splitlines()
    for line, pattern in zip(revealed, expected.values(), strict=True):
        assert re.search(f'Revealed type is "{pattern}"$', line), found
    assert "attr-defined" in unknown, found
