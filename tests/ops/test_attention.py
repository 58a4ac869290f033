"""Fused attention against `reference.attention` in float64: in Triton's interpreter, or on a CUDA device.

The contract: at most twice the error of `reference.attention` in the same dtype, plus 1e-6; gradients too.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from contract import assert_contract
from detr_fast import reference
from detr_fast.kernels import attention as kernels
from detr_fast.kernels.common import DEVICES
from far_memory import STEP, sparse, spread

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    nheads: int
    head_dim: int
    padded: bool = False
    splits: int | None = None


CASES = {
    "one": Case(1, 1, 1, 1, 16),
    "odd": Case(2, 67, 93, 2, 32),
    "odd-padded": Case(3, 33, 70, 1, 32, True),
    "narrow-padded": Case(2, 35, 47, 3, 16, True),
    "wide-padded": Case(2, 5, 130, 1, 64, True),
    "split-padded": Case(2, 9, 150, 2, 32, True, 3),
    "more splits than keys": Case(1, 20, 30, 1, 16, False, 5),
}
REAL_CASES = {
    "encoder": Case(8, 850, 850, 8, 32),
    "encoder-padded": Case(4, 1400, 1400, 8, 32, True),
    "decoder": Case(8, 100, 100, 8, 32),
    "cross, one image": Case(1, 100, 1393, 8, 32),
    "cross-padded": Case(8, 100, 850, 8, 32, True),
    "narrow-padded": Case(2, 100, 999, 16, 16, True, 4),
    "wide-padded": Case(2, 850, 901, 8, 64, True),
}
ALL_CASES = [pytest.param(case, id=name) for name, case in CASES.items()] + [
    pytest.param(case, id=f"real {name}", marks=pytest.mark.gpu) for name, case in REAL_CASES.items()
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v as slices of one GEMM's outcome, and padding on which k and v are large.

    The last image is all padding, the others are padded at the end and in the middle.
    """
    generator = torch.Generator().manual_seed(0)
    dim = case.nheads * case.head_dim
    q = torch.randn(case.batch, case.queries, 3 * dim, generator=generator)
    kv = torch.randn(case.batch, case.keys, 3 * dim, generator=generator)
    padding = None
    if case.padded:
        padding = torch.zeros(case.batch, case.keys, dtype=torch.bool)
        for image, row in enumerate(padding):
            row[case.keys - case.keys // (image + 3) :] = True
            row[3 : 5 + image] = True
        padding[-1] = True
        kv[padding] = 100
        padding = padding.to(device)
    q, kv = q.to(device, dtype), kv.to(device, dtype)
    return q[..., :dim], kv[..., dim : 2 * dim], kv[..., 2 * dim :], padding


def differentiated(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The definition, and its gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = reference.attention(leaves[0], leaves[1], leaves[2], nheads, padding)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL_CASES)
def test_forward_and_backward_meet_the_contract(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, padding = inputs(case, dtype, device)
    out, lse = kernels.launch_attention(q, k, v, case.nheads, padding, case.splits)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grads = kernels.launch_attention_backward(grad, q, k, v, out, lse, case.nheads, padding)

    plain, plain_grads = differentiated(grad, q, k, v, case.nheads, padding)
    truth, true_grads = differentiated(*(x.double() for x in (grad, q, k, v)), case.nheads, padding)
    assert_contract(out, plain, truth)
    for computed, expected, exact in zip(grads, plain_grads, true_grads, strict=True):
        assert_contract(computed, expected, exact)
    if padding is not None:
        assert (out[-1] == 0).all() and (lse[-1] == -torch.inf).all()
        assert all((x[-1] == 0).all() for x in grads)
        assert all((x[padding] == 0).all() for x in grads[1:])


def test_any_strides(device: torch.device) -> None:
    """Sequence first, every second token, one image for all, and channels that are not contiguous, which are copied."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(19, 3, 32, generator=generator).to(device).transpose(0, 1)
    k = torch.randn(3, 42, 32, generator=generator).to(device)[:, ::2]
    v = torch.randn(3, 32, 21, generator=generator).to(device).transpose(1, 2)
    padding = (torch.rand(21, 1, generator=generator) < 0.3).to(device).expand(21, 3).T
    grad = torch.randn(1, 19, 1, generator=generator).to(device).expand(3, 19, 32)
    out, lse = kernels.launch_attention(q, k, v, 2, padding)
    grads = kernels.launch_attention_backward(grad, q, k, v, out, lse, 2, padding)
    truth, true_grads = differentiated(*(x.double() for x in (grad, q, k, v)), 2, padding)
    for computed, exact in zip((out, *grads), (truth, *true_grads), strict=True):
        torch.testing.assert_close(computed.double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_equal_scores_and_extreme_ones(splits: int, device: torch.device) -> None:
    """Equal keys weigh the same; a key far above the others takes all; neither overflows."""
    k = torch.ones(1, 100, 16, device=device)
    v = torch.randn(1, 100, 16, generator=torch.Generator().manual_seed(0)).to(device)
    q = torch.full((1, 4, 16), 300.0, device=device)  # scores of 1200
    out, _ = kernels.launch_attention(q, k, v, 1, None, splits)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand(1, 4, 16), atol=1e-6, rtol=0)
    k[0, 71] *= 2
    out, lse = kernels.launch_attention(q, k, v, 1, None, splits)
    torch.testing.assert_close(out, v[:, 71:72].expand(1, 4, 16), atol=0, rtol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 2400 * 1.4426950408889634))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(batch: int, queries: int, keys: int, device: torch.device) -> None:
    q, k = torch.ones(batch, queries, 32, device=device), torch.ones(batch, keys, 32, device=device)
    padding = torch.zeros(batch, keys, dtype=torch.bool, device=device)
    for splits in (None, 2):
        out, lse = kernels.launch_attention(q, k, k, 2, padding, splits)
        assert out.shape == q.shape and lse.shape == (batch, 2, queries)
        assert (out == 0).all() and (lse == -torch.inf).all()
    for x, like in zip(kernels.launch_attention_backward(q, q, k, k, out, lse, 2, padding), (q, k, k), strict=True):
        assert x.shape == like.shape and (x == 0).all()


@pytest.mark.parametrize("axis", ["image", "row"])
def test_offsets_beyond_32_bits(
    axis: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, far_memory: None
) -> None:
    """Each tensor in turn spans more than 2^31 elements; 3 images, or 3 rows, lie 2^30 elements and a little apart."""
    rows = 3 if axis == "row" else 2
    strides = (0, STEP, 1) if axis == "row" else (STEP, 16, 1)
    generator = torch.Generator().manual_seed(0)
    batch = 1 if axis == "row" else 3
    q, k, v, grad = (torch.randn(batch, rows, 16, generator=generator).half() for _ in range(4))
    padding = torch.zeros(batch, rows, dtype=torch.bool)
    padding[-1, -1] = True
    out, lse = kernels.launch_attention(q, k, v, 1, padding)
    grads = kernels.launch_attention_backward(grad, q, k, v, out, lse, 1, padding)
    assert out.abs().min() > 0

    for index in range(5):
        far: list[Tensor] = [q, k, v, grad, out]
        far[index] = spread(far[index], *strides)
        assert torch.equal(kernels.launch_attention(far[0], far[1], far[2], 1, padding)[0], out)
        again = kernels.launch_attention_backward(far[3], far[0], far[1], far[2], far[4], lse, 1, padding)
        assert all(torch.equal(x, y) for x, y in zip(again, grads, strict=True))
    far_padding = spread(padding.byte(), *(strides[:2] if axis == "image" else (0, STEP))).view(torch.bool)
    assert torch.equal(kernels.launch_attention(q, k, v, 1, far_padding)[0], out)

    empty = torch.empty

    def far_empty(shape: tuple[int, ...], **options: torch.dtype) -> Tensor:
        return sparse(shape, strides, options["dtype"]) if shape == q.shape else empty(shape, **options)

    monkeypatch.setattr(torch, "empty", far_empty)
    far_out, _ = kernels.launch_attention(q, k, v, 1, padding)
    assert far_out.stride() == strides and torch.equal(far_out, out)
    again = kernels.launch_attention_backward(grad, q, k, v, out, lse, 1, padding)
    assert all(x.stride() == strides and torch.equal(x, y) for x, y in zip(again, grads, strict=True))


def test_parts_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch, far_memory: None) -> None:
    """What the splits of the keys leave to be combined, 2^30 elements and a little apart."""
    q, k, v, _ = inputs(Case(2, 3, 150, 1, 16), torch.float16, device)
    out, lse = kernels.launch_attention(q, k, v, 1, None, splits=3)
    empty, spreads = torch.empty, []

    def far_empty(shape: tuple[int, ...], **options: torch.dtype) -> Tensor:
        near = empty(shape, **options)
        if len(shape) != 4 or shape[0] != 3:
            return near
        spreads.append(shape)
        return sparse(shape, (STEP, *near.stride()[1:]), near.dtype)

    monkeypatch.setattr(torch, "empty", far_empty)
    again, again_lse = kernels.launch_attention(q, k, v, 1, None, splits=3)
    assert spreads == [(3, 2, 3, 16), (3, 2, 1, 3)] and torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_operators_pass_opcheck(padded: bool, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, padding = inputs(Case(2, 5, 7, 2, 16, padded), dtype, device)
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    tolerance = {"atol": 2e-3, "rtol": 0} if dtype == torch.float16 else {}
    torch.library.opcheck(kernels.attention_and_lse, (*leaves, 2, padding), **tolerance)
    out, lse = kernels.attention_and_lse(q, k, v, 2, padding)
    torch.library.opcheck(kernels.attention_backward, (torch.ones_like(out), q, k, v, out, lse, 2, padding))


@pytest.mark.parametrize("padded", [False, True])
def test_operator_computes_and_differentiates_the_definition(padded: bool, device: torch.device) -> None:
    """Compiled whole, too: on the CPU its own formulas, in float64; on CUDA the kernels."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    q, k, v, padding = inputs(Case(3, 6, 9, 2, 16, padded), dtype, device)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    truth, true_grads = differentiated(*(x.double() for x in (grad, q, k, v)), 2, padding)
    for function in (kernels.attention, torch.compile(kernels.attention, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, 2, padding)
        grads = torch.autograd.grad(out, leaves, grad)
        for computed, exact in zip((out, *grads), (truth, *true_grads), strict=True):
            torch.testing.assert_close(computed.double(), exact, atol=1e-12 if device.type == "cpu" else 3e-6, rtol=0)


def test_definition_and_kernel_agree_on_the_log_sum_exp(device: torch.device) -> None:
    q, k, v, padding = inputs(Case(2, 5, 70, 2, 16, True), torch.float32, device)
    expected = kernels.attention_and_lse(q.cpu(), k.cpu(), v.cpu(), 2, padding.cpu())[1].to(device)
    for splits in (1, 2):
        _, lse = kernels.launch_attention(q, k, v, 2, padding, splits)
        torch.testing.assert_close(lse, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in REAL_CASES.items()])
def test_repeats_bit_for_bit(case: Case, device: torch.device) -> None:
    """No sum depends on the order of programs, and no program on another's memory."""
    q, k, v, padding = inputs(case, torch.float16, device)
    out, lse = kernels.launch_attention(q, k, v, case.nheads, padding, case.splits)
    grads = kernels.launch_attention_backward(out, q, k, v, out, lse, case.nheads, padding)
    for _ in range(20):
        again, again_lse = kernels.launch_attention(q, k, v, case.nheads, padding, case.splits)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)
        again_grads = kernels.launch_attention_backward(out, q, k, v, out, lse, case.nheads, padding)
        assert all(torch.equal(x, y) for x, y in zip(again_grads, grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 24)}, ValueError, r"\[2, 3, 24\]"),
        ({"nheads": 4}, ValueError, r"d / nheads must be one of \(16, 32, 64\), got d=32 and nheads=4"),
        ({"nheads": 3}, ValueError, "d=32 and nheads=3"),
        ({"v": torch.ones(2, 4, 32)}, ValueError, r"\[2, 4, 32\]"),
        ({"padding": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"\[2, 4\]"),
        ({"k": torch.ones(2, 5, 32).half()}, TypeError, "torch.float16"),
        ({name: torch.ones(2, 5, 32).double() for name in "qkv"}, TypeError, "torch.float64"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {name: torch.ones(2, 5, 32) for name in "qkv"} | {"nheads": 2, "padding": None} | change
    with pytest.raises(error, match=message):
        kernels.launch_attention(**arguments)


def test_splits_fill_the_device_once() -> None:
    assert kernels.splits_for(programs=16, keys=850, block_n=64, multiprocessors=132) == 7  # of two blocks each
    assert kernels.splits_for(programs=64, keys=1400, block_n=64, multiprocessors=132) == 2
    assert kernels.splits_for(programs=112, keys=850, block_n=64, multiprocessors=132) == 1
    assert kernels.splits_for(programs=16, keys=100, block_n=64, multiprocessors=132) == 1
    assert kernels.splits_for(programs=0, keys=0, block_n=64, multiprocessors=132) == 1


def test_configurations_without_tf32() -> None:
    for target in (100, 103):  # larger tiles are computed in tf32 there
        assert all(config.block_m < 64 for config in kernels.configs_for(target, torch.float32))


@pytest.mark.parametrize("target", [device.target for device in DEVICES.values()])
def test_builds_hold_every_configuration(target: int | str) -> None:
    builds = kernels.builds(target)
    assert len({build.name for build in builds}) == len(builds)
    found = {
        (build.name.split("-")[0], build.num_warps, build.num_stages, *tiles(build.constexprs)) for build in builds
    }
    for dtype in (torch.float16, torch.float32):
        for name, config in kernels.configs_for(target, dtype)._asdict().items():
            for head_dim in kernels.HEAD_DIMS:
                expected = (name, config.num_warps, config.num_stages, head_dim, config.block_m, config.block_n)
                assert expected in found
    for build in builds:
        assert list(build.signature) == build.kernel.arg_names
        assert {name for name, kind in build.signature.items() if kind == "constexpr"} == set(build.constexprs)


def tiles(constexprs: dict) -> tuple:
    return constexprs["HEAD_DIM"], constexprs["BLOCK_M"], constexprs.get("BLOCK_N")
