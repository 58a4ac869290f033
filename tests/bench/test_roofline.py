"""Counted operations and bytes: by hand for small layers, and as committed for the model."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import compare, roofline
from bench.cases import REAL, TINY
from bench.measure import Tally, gmac
from bench.operations.case import HALF, SINGLE

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CPU = roofline.Device({SINGLE: 1e12, HALF: 1e12}, 1e11, None, "made up")


def tally(call: Any) -> tuple[int, int, int]:
    with torch.no_grad(), Tally() as found:
        call()
    return found.flops, found.bytes, found.calls


def test_a_linear_layer_by_hand() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    read, written = 4 * (5 * 6 + 6 * 4 + 4), 4 * 5 * 4
    assert tally(lambda: layer(x)) == (2 * 5 * 6 * 4, read + written, 1)


def test_a_convolution_by_hand() -> None:
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 8, 10)
    assert tally(lambda: layer(x)) == (2 * (2 * 5 * 4 * 5) * 3 * 9, 4 * (2 * 3 * 80 + 5 * 27 + 2 * 5 * 20), 1)


def test_attention_by_hand() -> None:
    q, k, v = (torch.randn(1, 2, length, 8) for length in (5, 7, 7))
    flops, moved, _ = tally(lambda: F.scaled_dot_product_attention(q, k, v))
    assert flops == 2 * 2 * (2 * 5 * 7 * 8)
    assert moved >= 4 * 2 * 8 * (5 + 7 + 7 + 5)


def test_views_move_nothing_and_sums_in_place_read_what_they_write() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert tally(lambda: x.t().unflatten(0, (2, 3))[1]) == (0, 0, 0)
    assert tally(lambda: x.add_(y)) == (0, 4 * 3 * 24, 1)
    assert tally(lambda: torch.empty(1000)) == (0, 0, 0)


def test_gmac_counts_within_inference_mode() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    with torch.inference_mode():
        assert gmac(lambda: layer(x)) == 5 * 6 * 4 / 1e9


def test_a_floor_is_that_of_bytes_or_of_flops() -> None:
    operations = [roofline.Operation("a", 2 * 10**12, 10), roofline.Operation("a", 10, 10**11)]
    total = roofline.Total.of(operations, CPU, SINGLE)
    assert total.floor == pytest.approx(2 + 1)
    assert (total.gmac, total.bytes, total.calls) == (pytest.approx(1000), 10**11 + 10, 2)


@pytest.mark.parametrize("gpu", [None, roofline.DEVICES["v100"].gpu, roofline.DEVICES["h200"].gpu])
def test_every_stage_is_counted(gpu: Any) -> None:
    dtype = SINGLE if gpu is None else HALF
    device = roofline.Device({dtype: 1e12}, 1e11, gpu, "made up")
    result = roofline.run(device, "cpu" if gpu is None else "made up", 2, dtype, TINY)
    for stage in roofline.ORDER:
        for way in ("plain", "ours"):
            assert result["stages"][stage][way]["bytes"] > 0, (stage, way)
            has_products = stage not in (roofline.MERGE, roofline.UPSAMPLING)
            assert (result["stages"][stage][way]["gmac"] > 0) == has_products, (stage, way)
    whole = result["stages"][roofline.WHOLE]
    assert whole["ours"]["gmac"] < whole["plain"]["gmac"]
    assert "ESTIMATE" in roofline.table(result).splitlines()[0]
    json.dumps(result)


@lru_cache
def counts(name: str) -> dict[str, Any]:
    if name == "cpu":
        return roofline.run(CPU, name, 1, SINGLE)
    return roofline.run(roofline.DEVICES[name], name, 1, HALF)


@pytest.mark.parametrize("name", ["cpu", "v100", "a100", "h200"])
def test_counts_are_the_committed_ones(name: str) -> None:
    """What changes them on purpose writes the file anew: see the command in bench/roofline.py."""
    committed = json.loads((RESULTS / f"roofline-{name}.json").read_text())
    if committed["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"counted with torch {committed['torch']}")
    old, new = compare.read_counts(committed), compare.read_counts(json.loads(json.dumps(counts(name))))
    assert compare.compare(old, new) == []


def test_ours_multiplies_less_as_the_ladder_measured() -> None:
    ladder = json.loads((RESULTS / "ladder-cpu.json").read_text())
    assert ladder["size"] == list(REAL.image) and ladder["kept"] == REAL.kept
    whole = counts("cpu")["stages"][roofline.WHOLE]
    assert whole["plain"]["gmac"] == pytest.approx(ladder["rows"]["plain"]["gmac"])
    assert whole["ours"]["gmac"] == pytest.approx(ladder["rows"]["caches"]["gmac"])
    heads = {way: sum(row[way]["gmac"] for stage, row in counts("cpu")["stages"].items() if "mask head" in stage)
             for way in ("plain", "ours")}  # fmt: skip
    assert heads["plain"] == pytest.approx(155.3, abs=0.1)
    assert heads["ours"] == pytest.approx(ladder["mask_head_gmac"]["800x1066"])


def test_measurements_stand_beside_the_floors_of_what_was_measured(tmp_path: Path) -> None:
    row = {"group": "backbone", "extra_info": {"way": "fast", "dtype": "fp32"}, "stats": {"min": 0.5}}
    content = {"machine_info": {"cpu": "EPYC", "device": "EPYC"}, "benchmarks": [row]}
    (tmp_path / "bench-cpu.json").write_text(json.dumps(content))
    assert roofline.measured("cpu", 1, SINGLE, tmp_path) == {"backbone": {"ours": 0.5}}
    assert roofline.measured("cpu", 1, HALF, tmp_path) == roofline.measured("v100", 1, SINGLE, tmp_path) == {}
    result = json.loads((RESULTS / "roofline-cpu.json").read_text())
    result["estimates"]["measured_seconds"] = {"backbone": {"ours": 0.5}}
    assert "MEASURED, backbone: ours 500.0 ms; floor plain" in roofline.table(result)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--device", "v100", "--dtype", "bf16"], "fp32, fp16 on v100"), (["--device", "t4", "--batch", "0"], "--batch")],
)
def test_what_a_device_cannot_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    with pytest.raises(SystemExit) as ended:
        roofline.main(arguments)
    assert ended.value.code == 2 and named in capsys.readouterr().err
