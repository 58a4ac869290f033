"""The fused normalisations against their definitions in float64: in Triton's interpreter, or on a CUDA device.

The contract for each: at most twice the error of PyTorch's own operations in the same dtype, plus 1e-6.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import assert_contract
from detr_fast import reference
from detr_fast.kernels import add_layer_norm as layer
from detr_fast.kernels import group_norm_relu_upsample as group

DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---- GroupNorm, ReLU, upsampling ----


def group_definition(*arguments: Any) -> Tensor:
    """`reference.group_norm_relu_upsample` in the dtype of its arguments, with the operation's height and width."""
    *tensors, height, width = arguments
    return reference.group_norm_relu_upsample(*tensors, (height, width))


def group_case(
    n: int,
    channels: int,
    size: tuple[int, int],
    groups: int,
    target: tuple[int, int],
    images: int,
    dtype: torch.dtype,
    device: torch.device,
    mean: float = 0.5,
) -> tuple:
    """Arguments of the operation; no images: no feature map. Channels differ in mean and spread."""
    spread = torch.linspace(0.5, 2, channels, device=device)[:, None, None]
    x = (random(n, channels, *size, dtype=torch.float32, device=device) * spread + mean * spread).to(dtype)
    weight, bias = (random(channels, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    x = x.contiguous(memory_format=torch.channels_last)
    if not images:
        return x, weight, bias, groups, EPS, None, None, *target
    shared = random(images, channels, *target, dtype=dtype, device=device, seed=3)
    image = torch.arange(n, device=device) * images // n
    return x, weight, bias, groups, EPS, shared.contiguous(memory_format=torch.channels_last), image, *target


def converted(arguments: tuple, dtype: torch.dtype, contiguous: bool = True) -> tuple:
    """Contiguous, as PyTorch's own CPU kernel for channels_last is inexact."""
    return tuple(x.to(dtype).contiguous() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def assert_group_contract(arguments: tuple) -> Tensor:
    out = group.launch_group_norm_relu_upsample(*arguments)
    assert out.dtype == arguments[0].dtype and out.is_contiguous(memory_format=torch.channels_last)
    plain = group_definition(*converted(arguments, arguments[0].dtype))
    assert_contract(out, plain, group_definition(*converted(arguments, torch.float64)))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((2, 264, (5, 7), 8, (5, 7), 0), id="lay1: groups of 33"),
        pytest.param((3, 32, (5, 6), 8, (9, 12), 2), id="2n-1 x 2n"),
        pytest.param((2, 128, (3, 5), 8, (6, 9), 1), id="2n x 2n-1"),
        pytest.param((1, 16, (33, 35), 8, (33, 35), 0), id="two strips"),
        pytest.param((2, 12, (3, 3), 4, (3, 3), 2), id="same size and a feature map"),
        pytest.param((1, 6, (1, 3), 1, (1, 5), 1), id="one row, one group"),
        pytest.param((1, 4, (1, 1), 2, (1, 1), 0), id="one pixel"),
    ],
)
def test_group_norm_meets_the_contract(case: tuple, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    assert_group_contract(group_case(*case, dtype, device))


def test_group_norm_of_a_mean_far_from_zero(device: torch.device, poisoned: None) -> None:
    """E[x^2] - E[x]^2 is off by 6% here."""
    assert_group_contract(group_case(1, 16, (33, 35), 8, (33, 35), 0, torch.float32, device, mean=1000))


def test_group_norm_combines_many_strips(device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TILE": 32, "MAX_CHANNELS": 8, "STEPS": 2, "COMBINE_TILE": 8}.items():
        monkeypatch.setattr(group, name, value)
    arguments = group_case(1, 12, (5, 7), 3, (10, 14), 1, torch.float32, device)
    assert group.blocks_for(12, 4, 2).combine["BLOCK_S"] < 35 // 8
    assert_group_contract(arguments)


def test_group_norm_takes_any_layout_and_float32_weights(device: torch.device, poisoned: None) -> None:
    x, weight, bias, groups, eps, shared, image, *target = group_case(4, 8, (3, 5), 4, (6, 9), 2, torch.float16, device)
    expected = group.launch_group_norm_relu_upsample(x, weight, bias, groups, eps, shared, image, *target)
    wide = torch.full((4, 16, 6, 5), float("nan"), dtype=x.dtype, device=device)
    wide[:, ::2, ::2] = x
    pairs = torch.stack((image.int(), image.int() + 100), 1)
    found = group.launch_group_norm_relu_upsample(
        wide[:, ::2, ::2], weight.float(), bias.float(), groups, eps, shared.contiguous(), pairs[:, 0], *target
    )
    assert torch.equal(found, expected)


def test_group_norm_of_an_image_does_not_depend_on_the_others(device: torch.device) -> None:
    arguments = group_case(3, 16, (33, 35), 8, (33, 35), 0, torch.float32, device)
    together = group.launch_group_norm_relu_upsample(*arguments)
    alone = group.launch_group_norm_relu_upsample(arguments[0][1:2], *arguments[1:])
    assert torch.equal(together[1:2], alone)


def test_group_norm_keeps_nan_to_its_group_and_takes_constants(device: torch.device) -> None:
    x, *rest = group_case(1, 4, (3, 3), 2, (3, 3), 0, torch.float32, device)
    x[:, :2] = float("nan")
    x[:, 2:] = 7
    out = group.launch_group_norm_relu_upsample(x, *rest)
    assert out[:, :2].isnan().all()
    assert torch.equal(out[0, 2:, 0, 0], rest[1][2:].relu())


@pytest.mark.parametrize("images", [0, 1])
def test_group_norm_of_nothing(images: int, device: torch.device) -> None:
    arguments = group_case(2, 8, (3, 5), 4, (6, 9), images, torch.float16, device)
    empty = (arguments[0][:0], *arguments[1:6], None if images == 0 else arguments[6][:0], *arguments[7:])
    for out in (group.launch_group_norm_relu_upsample(*empty), group.group_norm_relu_upsample(*empty)):
        assert out.shape == (0, 8, 6, 9) and out.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({3: 3}, ValueError, "num_groups must divide the 8 channels"),
        ({5: None, 6: None, 7: 7}, ValueError, "height and width must be"),
        ({6: None}, ValueError, "shared and image"),
        ({5: torch.zeros(1, 8, 6, 10)}, ValueError, r"shared must be \[B, 8, 6, 9\]"),
        ({6: torch.zeros(2)}, ValueError, "image must be int32 or int64"),
        ({1: torch.zeros(4)}, ValueError, r"weight and bias must be \[8\]"),
        ({0: torch.zeros(2, 8, 3, 5, dtype=torch.float64)}, TypeError, "x must be of one of"),
    ],
)
def test_group_norm_refuses(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    arguments = list(group_case(2, 8, (3, 5), 4, (6, 9), 1, torch.float32, device))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        group.launch_group_norm_relu_upsample(*arguments)


def gradients(function, arguments: tuple, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of every floating-point tensor among the arguments, for a random gradient of the outcome."""
    leaves = [
        x.detach().to(dtype or x.dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
    out = function(*leaves)
    grad = random(*out.shape, dtype=arguments[0].dtype, device=out.device, seed=9).to(out.dtype)
    return list(torch.autograd.grad(out, [x for x in leaves if isinstance(x, Tensor) and x.requires_grad], grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [0, 2])
def test_group_norm_gradients_meet_the_contract(images: int, dtype: torch.dtype, device: torch.device) -> None:
    target = (5, 8) if images else (3, 4)
    arguments = converted(group_case(3, 8, (3, 4), 2, target, images, dtype, device), dtype)
    plain, truth = gradients(group_definition, arguments), gradients(group_definition, arguments, torch.float64)
    fast = gradients(group.group_norm_relu_upsample, arguments)
    assert len(fast) == len(truth) == (4 if images else 3)
    for found in zip(fast, plain, truth, strict=True):
        assert_contract(*found)


# ---- residual sum and LayerNorm ----


def layer_case(
    *shape: int, residual: torch.dtype, update: torch.dtype, device: torch.device, mean: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    x = random(*shape, dtype=torch.float32, device=device) * 2 + mean
    weight, bias = (random(shape[-1], dtype=torch.float32, device=device, seed=seed) for seed in (1, 2))
    return x.to(residual), random(*shape, dtype=update, device=device, seed=3), weight, bias, EPS


def launched_gradients(grad: Tensor, arguments: tuple) -> list[Tensor]:
    return list(layer.launch_add_layer_norm_backward(grad, *arguments))


def assert_layer_contract(arguments: tuple) -> None:
    """Outcome and gradients."""
    fast = layer.launch_add_layer_norm(*arguments)
    assert fast.dtype == arguments[0].dtype and fast.is_contiguous()
    wide = converted(arguments, torch.float64)
    assert_contract(fast, reference.add_layer_norm(*arguments), reference.add_layer_norm(*wide))
    grad = random(*fast.shape, dtype=fast.dtype, device=fast.device, seed=9)
    plain, truth = (
        gradients(reference.add_layer_norm, arguments),
        gradients(reference.add_layer_norm, arguments, torch.float64),
    )
    for tensor, *found in zip(arguments, launched_gradients(grad, arguments), plain, truth, strict=False):
        assert found[0].dtype == tensor.dtype
        assert_contract(*found)


@pytest.mark.parametrize("update", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 256), (11, 100), (1, 1), (7,)], ids=str)
def test_layer_norm_meets_the_contract(
    shape: tuple[int, ...], update: torch.dtype, device: torch.device, poisoned: None
) -> None:
    assert_layer_contract(layer_case(*shape, residual=torch.float32, update=update, device=device))


def test_layer_norm_of_a_16_bit_residual_and_of_a_far_mean(device: torch.device, poisoned: None) -> None:
    half, single = torch.float16, torch.float32
    assert_layer_contract(layer_case(5, 64, residual=half, update=half, device=device))
    assert_layer_contract(layer_case(5, 64, residual=single, update=half, device=device, mean=1000))


def test_layer_norm_gradients_over_several_programs(
    device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "TILE", 64)
    monkeypatch.setattr(layer, "BACKWARD_BLOCKS", 2)
    assert_layer_contract(layer_case(23, 20, residual=torch.float32, update=torch.float16, device=device))


def test_layer_norm_takes_strided_rows(device: torch.device, poisoned: None) -> None:
    x, update, *rest = layer_case(4, 3, 32, residual=torch.float32, update=torch.float16, device=device)
    wide = torch.full((4, 3, 50), float("nan"), device=device)
    wide[..., 7:39] = x
    strided = (wide[..., 7:39], update.transpose(0, 1).contiguous().transpose(0, 1), *rest)
    expected = layer.launch_add_layer_norm(x, update, *rest)
    assert torch.equal(layer.launch_add_layer_norm(*strided), expected)
    grad = random(4, 32, 3, dtype=torch.float32, device=device).transpose(1, 2)
    launched = launched_gradients(grad, strided)
    for found, wanted in zip(launched, launched_gradients(grad.contiguous(), (x, update, *rest)), strict=True):
        assert torch.equal(found, wanted)
    columns = (x[0].T.contiguous().T, update[0], *rest)
    assert torch.equal(layer.launch_add_layer_norm(*columns), expected[0])


def test_layer_norm_of_nothing(device: torch.device) -> None:
    arguments = layer_case(0, 4, 8, residual=torch.float32, update=torch.float16, device=device)
    assert layer.launch_add_layer_norm(*arguments).shape == (0, 4, 8)
    grads = launched_gradients(arguments[0], arguments)
    assert [list(x.shape) for x in grads] == [[0, 4, 8], [0, 4, 8], [8], [8]]
    assert not grads[2].any() and not grads[3].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(3, 8)}, ValueError, r"update must have the shape of x, \[2, 8\]"),
        ({2: torch.zeros(4)}, ValueError, r"weight and bias must be \[8\]"),
        ({0: torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "x must be of one of"),
        ({0: torch.zeros(1, 4096), 1: torch.zeros(1, 4096)}, ValueError, "at most 2048 channels, got 4096"),
    ],
)
def test_layer_norm_refuses(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    arguments = list(layer_case(2, 8, residual=torch.float32, update=torch.float16, device=device))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        layer.launch_add_layer_norm(*arguments)


@pytest.mark.parametrize("update", DTYPES)
def test_layer_norm_trains(update: torch.dtype, device: torch.device) -> None:
    """Through autograd."""
    arguments = layer_case(2, 5, 24, residual=torch.float32, update=update, device=device)
    plain, truth = (
        gradients(reference.add_layer_norm, arguments),
        gradients(reference.add_layer_norm, arguments, torch.float64),
    )
    for found in zip(gradients(layer.add_layer_norm, arguments), plain, truth, strict=True):
        assert_contract(*found)


# ---- both ----


def required(arguments: tuple) -> tuple:
    return tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    arguments = layer_case(2, 3, 8, residual=torch.float32, update=dtype, device=cpu)
    torch.library.opcheck(layer.add_layer_norm_backward, (arguments[0] + 1, *arguments))
    torch.library.opcheck(layer.add_layer_norm, required(arguments))
    for target, images in (((5, 4), 1), ((3, 2), 0)):
        arguments = group_case(2, 4, (3, 2), 2, target, images, dtype, cpu)
        torch.library.opcheck(group.group_norm_relu_upsample, required(arguments))


def test_offsets_of_batches_are_64_bit() -> None:
    """In the compiled kernels every row and every plane is found by a product in 64 bits."""
    program = """
import sys
from bench.kernel_builds import compiled
from detr_fast.kernels import add_layer_norm, group_norm_relu_upsample
for module, names in ((add_layer_norm, ("forward-fp32-fp16-256", "backward-fp32-fp16-256")),
                      (group_norm_relu_upsample, ("statistics-fp16-32", "combine-32", "apply-fp16-32"))):
    for build in module.builds(80):
        if build.name in names:
            print("BUILD", build.name)
            print(compiled(build, 80).asm["ttir"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    kernels = dict(text.partition("\n")[::2] for text in done.stdout.split("BUILD ")[1:])
    assert len(kernels) == 5
    for name, rows in (("forward-fp32-fp16-256", 3), ("backward-fp32-fp16-256", 4)):
        products = re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", kernels[name])
        assert len(products) >= rows and set(products) == {"i64"}, name
    for name, planes in (("statistics-fp16-32", 2), ("combine-32", 1), ("apply-fp16-32", 3)):
        text = kernels[name]
        bases = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", text)
        assert bases.count("i64") >= planes, name
        assert len(re.findall(r"arith\.muli .* : i64", text)) >= 2 * planes, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        (30, 264, (25, 34), 8, (25, 34), 0),
        (30, 128, (25, 34), 8, (50, 67), 2),
        (30, 64, (50, 67), 8, (100, 134), 2),
        (30, 32, (100, 134), 8, (200, 267), 2),
        (30, 16, (200, 267), 8, (200, 267), 0),
    ],
    ids=str,
)
def test_group_norm_at_real_sizes(case: tuple, dtype: torch.dtype, device: torch.device) -> None:
    arguments = group_case(*case, dtype, device)
    first = assert_group_contract(arguments)
    assert all(torch.equal(group.launch_group_norm_relu_upsample(*arguments), first) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("update", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 850, 256), (8, 100, 256), (1, 1400, 512), (3, 2048)], ids=str)
def test_layer_norm_at_real_sizes(shape: tuple[int, ...], update: torch.dtype, device: torch.device) -> None:
    arguments = layer_case(*shape, residual=torch.float32, update=update, device=device)
    assert_layer_contract(arguments)
    grad = random(*shape, dtype=torch.float32, device=device, seed=9)
    first = launched_gradients(grad, arguments)
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(launched_gradients(grad, arguments), first, strict=True))
