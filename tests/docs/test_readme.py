"""Figures in the README are those of committed measurements."""

import json
import re
from pathlib import Path

import pytest

from bench import labeling, ladder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TABLES = {"bench/results/ladder-cpu.json": ladder.table, "bench/results/labeling-cpu.json": labeling.table}
SHOWN = dict(re.findall(r"<!-- (bench/results/\S+) -->\n(.*?)\n<!-- end -->", README, re.DOTALL))


@pytest.mark.parametrize("path", [path for path in TABLES if (ROOT / path).exists()])
def test_a_table_in_the_readme_is_the_measured_one(path):
    assert SHOWN[path] == TABLES[path](json.loads((ROOT / path).read_text()))


def test_no_table_in_the_readme_is_without_its_measurement():
    assert "bench/results/ladder-cpu.json" in SHOWN
    assert all((ROOT / path).exists() for path in SHOWN)
