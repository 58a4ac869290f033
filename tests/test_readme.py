"""Figures in the README are those of committed measurements."""

import json
from pathlib import Path

from bench.ladder import table

ROOT = Path(__file__).parents[1]


def test_the_ladder_in_the_readme_is_the_measured_one():
    measured = json.loads((ROOT / "bench/results/ladder-cpu.json").read_text())
    _, _, rest = (ROOT / "README.md").read_text().partition("<!-- bench/results/ladder-cpu.json -->\n")
    shown, end, _ = rest.partition("\n<!-- end -->")
    assert end and shown == table(measured)
