"""Graphs, buckets and padding without CUDA: what is recorded is computed again and written where it was first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

from contract import picture
from detr_fast import ops
from detr_fast.detr import graphs
from detr_fast.detr.graphs import SHAPES, Graphs, Recording, bucket
from detr_fast.ops import cache
from detr_fast.predictor import Predictor
from tiny import tiny_detr


class Recorder:
    """Counts what it records."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Callable[[], Any]) -> Recording:
        self.count += 1
        with ops.holding() as held:
            outputs = call()

        def replay() -> None:
            for old, new in zip(tree_flatten(outputs)[0], tree_flatten(call())[0], strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return Recording(replay, outputs, held)


def above(threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: logits.softmax(-1)[..., :-1].amax(-1) > threshold


@pytest.mark.parametrize(
    ("count", "batch", "expected"),
    [
        (1, 1, 8),
        (8, 1, 8),
        (9, 1, 16),
        (65, 1, 100),
        (100, 1, 100),
        (15, 8, 64),
        (64, 8, 64),
        (65, 8, 128),
        (800, 8, 800),
    ],
)
def test_buckets(count: int, batch: int, expected: int) -> None:
    assert bucket(count, batch, 100) == expected
    assert bucket(count, batch, 10) <= 10 * batch or count > 10 * batch


@pytest.fixture(autouse=True)
def pretended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, but for its kernels, in whose place the operations' CPU bodies run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with contextlib.nullcontext() if request.node.get_closest_marker("gpu") else ops.pretend("sm_90"):
        yield


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_detr()


@torch.inference_mode()
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_same_outputs_each_time(model: torch.nn.Module, threshold: float) -> None:
    select = above(threshold)
    recorded = Graphs(model, select, Recorder())
    for seed in range(4):  # eager, recorded, replayed, replayed
        samples = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        expected, out = model(samples, select), recorded(samples)
        assert torch.equal(out["selected"], expected["selected"])
        assert torch.equal(out["index"], expected["selected"].flatten().nonzero()[:, 0])
        torch.testing.assert_close(out["pred_logits"], expected["pred_logits"])
        for masks, wanted in zip(out["pred_masks"], expected["pred_masks"], strict=True):
            assert len(masks) == len(wanted)
            if len(wanted):
                torch.testing.assert_close(masks, wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_graphs_are_few_and_follow_the_weights(model: torch.nn.Module) -> None:
    record = Recorder()
    recorded = Graphs(model, above(0.3), record)
    shapes = [(1, 3, 32, 32 + 8 * n) for n in range(SHAPES + 1)]
    samples = {shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes}
    recorded(samples[shapes[0]])
    assert record.count == 0
    recorded(samples[shapes[0]])
    assert record.count == 2
    recorded(samples[shapes[0]])
    assert record.count == 2
    for shape in shapes[1:]:
        recorded(samples[shape])
        recorded(samples[shape])
    assert record.count == 2 * len(shapes)
    assert len(recorded._shapes) == SHAPES
    with torch.inference_mode(False), torch.no_grad():  # which counts as a new version, as training does
        model.detr.class_embed.bias += 1
    out = recorded(samples[shapes[-1]])
    assert record.count == 2 * len(shapes)
    assert len(recorded._shapes) == 1
    torch.testing.assert_close(out["pred_logits"], model(samples[shapes[-1]])["pred_logits"])


def test_what_a_graph_reads_outlives_the_cache() -> None:
    owner = torch.nn.Linear(1, 1).requires_grad_(False)
    with ops.holding() as held:
        first = ops.kept(owner, "x", 0, [owner.weight], lambda: torch.ones(1))
    for key in range(1, cache.CAPACITY + 2):
        ops.kept(owner, "x", key, [owner.weight], lambda: torch.zeros(1))
    assert held[0] is first
    assert ops.kept(owner, "x", 0, [owner.weight], lambda: torch.zeros(1)) is not first


def rounded(info: dict[str, Any]) -> dict[str, Any]:
    return {**info, "score": round(info["score"], 4)}


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
def test_predictor_through_graphs_finds_the_same(model: torch.nn.Module, threshold: float) -> None:
    sizes = [(96, 64), (96, 64), (64, 96)]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    predictor = Predictor(model, device="cpu", threshold=threshold, batch_size=2)
    expected = predictor(images)
    predictor._graphs = Graphs(model, predictor.select, Recorder())
    for _ in range(3):
        for one, other in zip(predictor(images), expected, strict=True):
            assert [rounded(info) for info in one.segments_info] == [rounded(info) for info in other.segments_info]
            assert np.array_equal(one.segmentation, other.segmentation)
            assert one.segmentation.dtype == np.int32
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
            assert one.labels.tolist() == other.labels.tolist()


@pytest.mark.gpu
@torch.inference_mode()
def test_recorded_on_a_gpu(model: torch.nn.Module) -> None:
    """Shapes in turn, more than are kept, so that graphs are dropped and the cache's values with them."""
    model, select = model.cuda(), above(0.3)
    recorded = Graphs(model, select, graphs.Recorder())
    for seed, turn in enumerate([0, 0, 1, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0, 1, 0]):
        samples = torch.randn(2, 3, 64, 64 + 32 * turn, generator=torch.Generator().manual_seed(seed)).cuda()
        expected = model(samples, select)
        out = recorded(samples)
        assert torch.equal(out["selected"], expected["selected"])
        torch.testing.assert_close(out["pred_logits"], expected["pred_logits"], rtol=1e-3, atol=1e-3)
        for masks, wanted in zip(out["pred_masks"], expected["pred_masks"], strict=True):
            torch.testing.assert_close(
                masks, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()) if len(wanted) else 0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["corrected", "detr", "transformers"])
def test_predictor_on_a_gpu_finds_what_a_cpu_finds(model: torch.nn.Module, mode: str) -> None:
    images = [picture(*size, seed=seed) for seed, size in enumerate([(96, 64), (96, 64), (64, 96)] * 3)]
    options = {"mode": mode, "threshold": 0.4, "batch_size": 2, "dtype": "fp32"}
    expected = Predictor(model, device="cpu", **options)(images)
    predictor = Predictor(model, device="cuda", **options)
    first, second = predictor(images), predictor(images)
    for one, again, other in zip(first, second, expected, strict=True):
        assert one.to_png() == again.to_png()
        assert (one.segmentation == other.segmentation).mean() > 0.999
        assert [info["category_id"] for info in one.segments_info] == [
            info["category_id"] for info in other.segments_info
        ]
