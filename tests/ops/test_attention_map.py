"""Fused attention maps against `reference.attention_map` in float64: in Triton's interpreter, or on a CUDA device.

The contract: at most twice the error of the definition in float32, in which it takes q and k, plus 1e-6.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from contract import assert_contract
from detr_fast import reference
from detr_fast.kernels import attention_map as kernels
from detr_fast.kernels.common import DEVICES
from far_memory import STEP, sparse, spread

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


class Case(NamedTuple):
    queries: int
    batch: int
    keys: int
    nheads: int
    head_dim: int
    padded: bool = False


CASES = {
    "one": Case(1, 1, 1, 1, 16),
    "odd": Case(11, 3, 53, 8, 32),
    "odd-padded": Case(11, 3, 53, 8, 32, True),
    "no powers of two, padded": Case(5, 2, 37, 3, 5, True),
    "wide-padded": Case(3, 2, 34, 8, 64, True),
}
REAL_CASES = {
    "one image": Case(17, 1, 850, 8, 32),
    "padded": Case(130, 8, 1400, 8, 32, True),
    "all queries": Case(200, 2, 850, 8, 32, True),
    "wide-padded": Case(40, 4, 999, 8, 64, True),
    "long": Case(9, 2, 9000, 8, 32, True),
}
ALL_CASES = [pytest.param(case, id=name) for name, case in CASES.items()] + [
    pytest.param(case, id=f"real {name}", marks=pytest.mark.gpu) for name, case in REAL_CASES.items()
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    """Queries of the images in turn and back, so that neighbours differ; the last image is all padding."""
    generator = torch.Generator().manual_seed(0)
    dim = case.nheads * case.head_dim
    q = torch.randn(case.queries, dim, generator=generator) * case.head_dim**-0.5
    k = torch.randn(case.batch, case.keys, dim, generator=generator)
    order = torch.arange(case.queries) * case.batch // case.queries
    image = torch.where(torch.arange(case.queries) % 4 < 3, order, case.batch - 1 - order)
    padding = None
    if case.padded:
        padding = torch.rand(case.batch, case.keys, generator=generator) < 0.3
        padding[0, case.keys // 3 :] = True  # whole blocks of keys
        padding[-1] = True
        k[padding] = 1e4
        padding = padding.to(device)
    return q.to(device, dtype), k.to(device, dtype), image.to(device), case.nheads, padding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL_CASES)
def test_meets_the_contract(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    q, k, image, nheads, padding = inputs(case, dtype, device)
    out = kernels.launch_attention_map(q, k, image, nheads, padding)
    assert_contract(
        out,
        reference.attention_map(q.float(), k.float(), image, nheads, padding),
        reference.attention_map(q.double(), k.double(), image, nheads, padding),
    )
    if padding is not None:
        assert (out[padding[image]] == 0).all()
        assert (out[image == case.batch - 1] == 0).all()


def test_any_strides_and_mixed_dtypes(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(16, 5, generator=generator).to(device).T
    k = torch.randn(23, 2, 32, generator=generator).half().to(device).transpose(0, 1)[..., :16]
    image = torch.tensor([1, 1, 0, 0, 1, 9, 9], dtype=torch.int32, device=device)[:5]
    padding = (torch.rand(23, 2, generator=generator) < 0.3).to(device).T
    out = kernels.launch_attention_map(q, k, image, 2, padding)
    torch.testing.assert_close(
        out.double(), reference.attention_map(q.double(), k.double(), image, 2, padding), atol=1e-6, rtol=0
    )


def test_equal_scores_and_extreme_ones(device: torch.device) -> None:
    """Equal scores weigh the same over heads and positions; one far above the others takes all."""
    k = torch.ones(1, 70, 32, device=device)
    q = torch.full((2, 32), 100.0, device=device)  # scores of 1600
    image = torch.zeros(2, dtype=torch.int64, device=device)
    out = kernels.launch_attention_map(q, k, image, 2, None)
    torch.testing.assert_close(out, torch.full_like(out, 1 / 140), atol=1e-9, rtol=0)
    k[0, 41, 16:] *= 2
    out = kernels.launch_attention_map(q, k, image, 2, None)
    assert (out[:, 41, 1] == 1).all() and out.sum() == 2


@pytest.mark.parametrize(("queries", "batch", "keys"), [(0, 2, 5), (0, 0, 5), (3, 2, 0)])
def test_empty(queries: int, batch: int, keys: int, device: torch.device) -> None:
    q, k = torch.ones(queries, 16, device=device), torch.ones(batch, keys, 16, device=device)
    image = torch.zeros(queries, dtype=torch.int64, device=device)
    padding = torch.zeros(batch, keys, dtype=torch.bool, device=device)
    assert kernels.launch_attention_map(q, k, image, 2, padding).shape == (queries, keys, 2)
    assert kernels.attention_map(q, k, image, 2, padding).shape == (queries, keys, 2)


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch, far_memory: None) -> None:
    """Each tensor in turn spans more than 2^31 elements: its 3 rows or images lie 2^30 and a little apart."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 16, generator=generator).half()
    k = torch.randn(3, 3, 16, generator=generator).half()
    padding = torch.zeros(3, 3, dtype=torch.bool)
    padding[-1, -1] = True
    image = torch.arange(3)
    out = kernels.launch_attention_map(q, k, image, 1, padding)

    for far_q, far_k, far_padding in (
        (spread(q, STEP, 1), k, padding),
        (q, spread(k, STEP, 16, 1), padding),
        (q, spread(k, 16, STEP, 1), padding),
        (q, k, spread(padding.byte(), STEP, 1).view(torch.bool)),
        (q, k, spread(padding.byte(), 1, STEP).view(torch.bool)),
    ):
        assert torch.equal(kernels.launch_attention_map(far_q, far_k, image, 1, far_padding), out)

    empty = torch.empty

    def far_empty(shape: tuple[int, ...], **options: torch.dtype) -> Tensor:
        return sparse(shape, (STEP, 1, 1), torch.float32) if shape == out.shape else empty(shape, **options)

    monkeypatch.setattr(torch, "empty", far_empty)
    far_out = kernels.launch_attention_map(q, k, image, 1, padding)
    assert far_out.stride(0) == STEP and torch.equal(far_out, out)


def test_many_blocks_of_keys_are_combined(device: torch.device) -> None:
    """More partial maxima and sums than one program reads at once."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 150, generator=generator).to(device) * 20
    parts[1] = -torch.inf
    parts[0, 70:] = -torch.inf
    totals = torch.rand(2, 150, generator=generator).to(device)
    shift, scale = (torch.empty(2, device=device) for _ in range(2))
    kernels.combine_kernel[(2,)](parts, totals, shift, scale, 150, PARTS=kernels.PARTS, num_warps=1)
    expected = (totals[0].double() * (parts[0].double() - parts[0].max()).exp2()).sum()
    assert shift.tolist() == [parts[0].max().item(), 0] and scale[1] == 0
    torch.testing.assert_close(1 / scale[0].double(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_operator_passes_opcheck(padded: bool, dtype: torch.dtype, device: torch.device) -> None:
    q, k, image, nheads, padding = inputs(Case(5, 3, 7, 2, 16, padded), dtype, device)
    if padding is not None:
        k[padding] = 10  # float16 products of more would overflow in opcheck's own loss
    torch.library.opcheck(kernels.attention_map, (q.requires_grad_(), k.requires_grad_(), image, nheads, padding))


@pytest.mark.parametrize("padded", [False, True])
def test_operator_computes_and_differentiates_the_definition(padded: bool, device: torch.device) -> None:
    """Compiled whole, too: on the CPU the operator's own formulas, in float64; on CUDA the kernels."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    tolerance = 1e-12 if device.type == "cpu" else 3e-6
    q, k, image, nheads, padding = inputs(Case(7, 3, 9, 2, 16, padded), dtype, device)
    if padding is not None:
        k[padding] = 1
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(7, 9, 2, generator=generator, dtype=torch.float64).to(device, dtype)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    truth = reference.attention_map(*leaves, image, nheads, padding)
    true_grads = torch.autograd.grad(truth, leaves, grad.double())
    for function in (kernels.attention_map, torch.compile(kernels.attention_map, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        out = function(*leaves, image, nheads, padding)
        grads = torch.autograd.grad(out, leaves, grad)
        for computed, exact in zip((out, *grads), (truth, *true_grads), strict=True):
            torch.testing.assert_close(computed.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.gpu
def test_repeats_bit_for_bit(device: torch.device) -> None:
    arguments = inputs(REAL_CASES["padded"], torch.float16, device)
    out = kernels.launch_attention_map(*arguments)
    assert all(torch.equal(kernels.launch_attention_map(*arguments), out) for _ in range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nheads": 3}, "d must be a multiple of nheads, got d=32 and nheads=3"),
        ({"image": torch.zeros(3)}, "image must be int32 or int64, got torch.float32"),
        ({"image": torch.zeros(2, dtype=torch.int64)}, r"\[2\]"),
        ({"k": torch.ones(2, 5, 16)}, r"\[2, 5, 16\]"),
        ({"padding": torch.zeros(2, 4, dtype=torch.bool)}, r"\[2, 4\]"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"q": torch.ones(3, 32), "k": torch.ones(2, 5, 32), "image": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        kernels.launch_attention_map(**{**arguments, "nheads": 2, "padding": None, **change})


def test_groups_leave_work_for_every_multiprocessor() -> None:
    assert kernels.group_for(queries=15, blocks=27, multiprocessors=132, most=8) == 1
    assert kernels.group_for(queries=480, blocks=27, multiprocessors=132, most=8) == 8
    assert kernels.group_for(queries=100, blocks=27, multiprocessors=132, most=8) == 5


@pytest.mark.parametrize("target", [device.target for device in DEVICES.values()])
def test_builds_are_those_of_the_launcher(target: int | str) -> None:
    builds = kernels.builds(target)
    assert len({build.name for build in builds}) == len(builds)
    for build in builds:
        assert list(build.signature) == build.kernel.arg_names
        assert {name for name, kind in build.signature.items() if kind == "constexpr"} == set(build.constexprs)
        assert build.num_warps * (64 if target == "gfx942" else 32) <= 1024
