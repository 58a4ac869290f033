"""The ladder under pytest-benchmark: `pytest bench --benchmark-only`."""

import pytest
import torch

from bench import cases, measure
from bench.ladder import Panoptic, Step, errors, inference, ladder, transformers_model
from detr_fast import ops

# what float32 and bfloat16 may lose on logits, boxes and masks of unit size; a wrong step gets no time
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@pytest.fixture(scope="module")
def panoptic():
    return Panoptic(cases.panoptic_model(), cases.images(1, cases.TYPICAL))


@pytest.fixture(scope="module")
def truth(panoptic):
    return panoptic.truth()


def timed(benchmark, call):
    benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("step", ladder(), ids=lambda step: step.name)
def test_panoptic(benchmark, panoptic, truth, step):
    benchmark.group = "panoptic forward and merge, 15 of 100 queries kept"
    error = errors(panoptic.outputs(panoptic.forward(step)), truth)
    assert max(error.values()) <= ALLOWED[step.dtype]
    benchmark.extra_info.update(error=error, gmac=measure.gmac(lambda: panoptic.forward(step)), **measure.machine())
    timed(benchmark, lambda: panoptic.run(step))


@pytest.mark.parametrize("name", ["plain", "ours"])
def test_all_masks(benchmark, panoptic, name):
    benchmark.group = "forward with all 100 masks"
    step = Step(name, () if name == "plain" else tuple(ops.REWRITES), kept=None)
    timed(benchmark, lambda: panoptic.forward(step))


@pytest.mark.parametrize("name", ["transformers", "ours"])
def test_detection(benchmark, panoptic, name):
    benchmark.group = "detection only"
    theirs = transformers_model(panoptic.model) if name == "transformers" else None
    if name == "transformers" and theirs is None:
        pytest.skip("transformers is not installed")
    panoptic.model.compute_dtype = None
    timed(benchmark, inference(lambda: (theirs or panoptic.model).detr(panoptic.image)))
