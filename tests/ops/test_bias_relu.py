"""The fused end of a convolution against its definition in float64: in Triton's interpreter, or on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from detr_fast.kernels import bias_relu as kernels
from far_memory import sparse

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def case(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, device: torch.device) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def maps() -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last)

    bias = torch.randn(shape[1], generator=generator).to(device, dtype)
    return maps(), bias, maps() if residual else None


def defined(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype) + bias.to(dtype)[:, None, None]
    if residual is not None:
        y = y + residual.to(dtype)
    return y.relu() if relu else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "relu"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(2, 24, 7, 9), (1, 3, 41, 37), (3, 2048, 1, 2)])
def test_contract(shape: tuple[int, ...], residual: bool, relu: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, bias, more = case(shape, dtype, residual, device)
    truth, plain = (defined(x, bias, more, relu, kind) for kind in (torch.float64, dtype))
    for run in (kernels.launch_bias_relu, kernels.bias_relu):
        out = run(x, bias, more, relu)
        assert out.is_contiguous(memory_format=torch.channels_last) and out.data_ptr() != x.data_ptr()
        error, allowed = ((y.double() - truth).abs().max().item() for y in (out, plain))
        assert error <= 2 * allowed + 1e-6


def test_float16_stays_finite_and_nan_stays_nan(device: torch.device) -> None:
    x = torch.tensor([6e4, -6e4, float("nan"), 1.0], dtype=torch.float16, device=device).view(1, 1, 2, 2)
    bias, residual = torch.tensor([6e4], dtype=torch.float16, device=device), torch.zeros_like(x)
    out = kernels.launch_bias_relu(x, bias, residual, False).flatten()
    assert out[:2].tolist() == [65504, 0] and out[2].isnan() and out[3] == 60000
    out = kernels.launch_bias_relu(x, -bias, None, True).flatten()
    assert out[[0, 1, 3]].tolist() == [0, 0, 0] and out[2].isnan()


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch, far_memory: None) -> None:
    """The last program of a batch of more than 2^31 numbers, by itself."""
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: interpreter.TensorHandle(np.array([2**31 // kernels.BLOCK], np.int32), tl.int32),
    )
    beyond = slice(2**31, 2**31 + 100)
    x, residual, out = (sparse((beyond.stop,), (1,), torch.float16) for _ in range(3))
    bias = torch.arange(24).half()
    x[beyond], residual[beyond] = torch.arange(100).half(), 1
    constants = {"CHANNELS": 24, "RELU": True, "LIMIT": True, "BLOCK": kernels.BLOCK}
    kernels.bias_relu_kernel[(1,)](x, bias, residual, out, len(x), **constants)
    index = torch.arange(100)
    assert out[beyond].tolist() == (index + 1 + (2**31 + index) % 24).tolist()


def test_empty(device: torch.device) -> None:
    x, bias, residual = case((0, 4, 3, 2), torch.float32, True, device)
    assert kernels.launch_bias_relu(x, bias, residual, True).shape == (0, 4, 3, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 4, 3, 2)}, ValueError, "x must be channels_last"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\]"),
        ({"residual": torch.zeros(1, 4, 3, 2)}, ValueError, "residual must be channels_last"),
        ({"x": torch.zeros(1, 4, 3, 2, dtype=torch.float64)}, TypeError, "x must be of one of"),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    x, bias, residual = case((1, 4, 3, 2), torch.float32, True, device)
    with pytest.raises(error, match=message):
        kernels.launch_bias_relu(**{"x": x, "bias": bias, "residual": residual, "relu": True, **change})


def test_opcheck() -> None:
    for residual, dtype in ((True, torch.float32), (False, torch.float16)):
        x, bias, more = case((2, 4, 3, 2), dtype, residual, torch.device("cpu"))
        torch.library.opcheck(kernels.bias_relu, (x, bias, more, True))
