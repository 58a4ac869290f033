"""Each operation as the model calls it: what `detr_fast.ops` chooses on a CPU, Triton's kernels on a GPU."""

from itertools import cycle

import pytest
import torch

from bench import measure
from bench.conftest import DEVICE, SCALE
from bench.operations import on_cpu, on_gpu
from bench.operations.case import BRAIN, Draw, wrong


def chosen_cases(scale):
    """On a GPU the kernels on a batch, without bfloat16."""
    if DEVICE.type == "cpu":
        return on_cpu(scale)
    return [case for case in on_gpu(scale) if case.batch == scale.batches[1] and case.dtype != BRAIN]


def pytest_generate_tests(metafunc):
    cases = chosen_cases(metafunc.config.stash[SCALE])
    metafunc.parametrize("case", cases, ids=[f"{case.op}: {case.name}" for case in cases])


@pytest.mark.parametrize("way", ["reference", "fast"])
@torch.no_grad()
def test_op(bench, device, ceilings, case, way):
    inputs = case.inputs(Draw(device, 0))

    def check(out):
        reason = wrong(case, inputs) if way == "fast" else None
        assert reason is None, reason
        return (out.double() - case.plain(*case.inputs(Draw(device, 0))).double()).abs().max().item()

    memory_bound = ceilings.is_memory_bound(case.flops, case.bytes, case.dtype)
    count = measure.rotations(case.bytes, device) if memory_bound else 1
    turn = cycle([case.inputs(Draw(device, seed)) for seed in range(count)])
    call = case.ours if way == "fast" else case.plain
    bench(
        f"{case.op}: {case.name}",
        way,
        lambda: call(*next(turn)),
        check,
        shape=case.name,
        dtype=case.dtype,
        flops=case.flops,
        bytes=case.bytes,
        seconds=0.7,
    )
