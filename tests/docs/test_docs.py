"""Every command in the README and in docs/ works, and the pictures of figures are those of committed measurements."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import detr_fast
from bench.chart import STEPS, chart
from tiny import tiny_detr

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The first command of each block that is not run, by document
NOT_RUN = {
    "README.md": [
        "detr-fast label photographs --out labels --resume",
        "RAY_ADDRESS=auto detr-fast label photographs --out labels --engine ray --resume",
        "python -m bench.labeling --out bench/results/labeling-cpu.json",
        "detr-fast train --data coco --out run --from facebook/detr-resnet-50-panoptic --epochs 50 --lr-drop 40",
        "detr-fast eval --data COCO --model facebook/detr-resnet-50-panoptic --dtype fp32 --out report.json",
        "python -m bench.ladder --out bench/results/ladder-cpu.json",
        "python -m bench.gpu --out gpu.json",
    ],
    "CONTRIBUTING.md": [
        "pip install -e '.[test,lint]'",
        ".ci/run",
        "python -m pytest",
        "pip install pre-commit",
        "python -m pytest bench --benchmark-only --benchmark-json old.json",
    ],
    "docs/architecture.md": [],
    "docs/kernels.md": [
        "python -m pytest tests/ops/test_bias_relu.py",
        "python -m bench.kernel_builds --check",
        "python -m bench.gpu --out gpu.json",
    ],
    "docs/numerics.md": [],
    "docs/tutorial.md": [
        "detr-fast train --data own --out run --from facebook/detr-resnet-50-panoptic --epochs 50 --lr-drop 40 "
        "--batch-size 4 --amp"
    ],
}
SET_UP = ("python3 -m venv", ". .venv/", "pip install")  # this very environment is used instead


class Block(NamedTuple):
    """A fenced block, and why it is not run, or None."""

    reason: str | None
    language: str
    text: str


def blocks(document: str) -> list[Block]:
    return [Block(reason or None, *rest) for reason, *rest in BLOCK.findall((ROOT / document).read_text())]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to run commands in, and `detr-fast` and `python` in its folder bin/."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "dist")
    shutil.copytree(ROOT, copy, ignore=unwanted, dirs_exist_ok=True)
    (copy / "bin").mkdir()
    for name, arguments in {"python": "", "detr-fast": "-m detr_fast"}.items():
        (copy / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (copy / "bin" / name).chmod(0o755)
    return copy


def run(text: str, checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{checkout / 'bin'}{os.pathsep}{environment['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_only_these_commands_are_not_run(document: str) -> None:
    found = [block.text.splitlines()[0] for block in blocks(document) if block.reason]
    assert found == NOT_RUN[document]


def test_the_quick_start(checkout: Path) -> None:
    first = next(block for block in blocks("README.md") if block.language == "sh")
    lines = [line for line in first.text.splitlines() if not line.startswith(SET_UP)]
    assert len(lines) >= 2 and len(lines) == len(first.text.splitlines()) - 4
    run("\n".join(lines), checkout)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str, checkout: Path) -> None:
    shutil.rmtree(checkout / "demo", ignore_errors=True)
    found = [block for block in blocks(document) if block.language == "bash" and not block.reason]
    assert found or document == "docs/architecture.md"
    for block in found:
        run(block.text, checkout)


def test_the_python_of_the_readme(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small random weights in place of the official ones, which need the network."""
    detr_fast.save_model(tiny_detr(image_size=96, max_image_size=160), tmp_path / "model", dialect="transformers")
    image = Image.effect_noise((96, 64), 50).convert("RGB")
    image.save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks("README.md") if block.language == "python"]
    names: dict[str, object] = {"image": image, "images": torch.zeros(1, 3, 64, 96)}
    for block in found:
        text = block.text.replace("facebook/detr-resnet-50-panoptic", str(tmp_path / "model"))
        exec(compile(text.replace("pretrained=True", "pretrained=False"), "README.md", "exec"), names)
    assert len(found) >= 3 and (tmp_path / "overlay.png").is_file()


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), (document, target)


# ---- figures ----

MEASURED = json.loads((ROOT / "bench/results/ladder-cpu.json").read_text())


def test_the_chart_is_that_of_the_ladder() -> None:
    assert (ROOT / "docs/images/ladder-cpu.svg").read_text() == chart(MEASURED)


def test_the_chart_has_a_bar_for_each_step() -> None:
    drawn = chart(MEASURED)
    assert drawn.count("<rect") == len(STEPS) == sum("error" in row for row in MEASURED["rows"].values())
    slower = json.loads(json.dumps(MEASURED))
    slower["rows"]["merge"]["seconds"] = [100.0]
    assert chart(slower) != drawn


def test_figures_of_the_comparison_are_measured_ones() -> None:
    rows = MEASURED["rows"]
    best = {name: min(row["seconds"]) for name, row in rows.items()}
    peak = {name: row["peak_mib"] for name, row in rows.items() if "peak_mib" in row}
    error = {name: row["error"]["logits"] for name, row in rows.items() if "error" in row}
    readme = (ROOT / "README.md").read_text()
    for expected in (
        f"| a panoptic picture, merge included | {best['merge']:.2f} s | {best['transformers']:.2f} s, no merge "
        f"| {best['plain']:.2f} s |",
        f"| the same in bf16 | {best['bf16']:.2f} s | not measured | not measured |",
        f"| all 100 masks, no merge | {best['ours, all masks']:.2f} s | {best['transformers']:.2f} s "
        f"| {best['plain, all masks']:.2f} s |",
        f"| boxes only | {best['ours, detection']:.2f} s | {best['transformers, detection']:.2f} s | not measured |",
        f"| memory it takes at its peak | {peak['merge']:.0f} MiB | not measured | {peak['plain']:.0f} MiB |",
        f"| largest error of a logit | {error['merge']:.1e} | {error['transformers']:.1e} | {error['plain']:.1e} |",
    ):
        assert expected in readme, expected
