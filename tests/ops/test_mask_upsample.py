"""The mask upsampling kernels against float64, with what they allocate poisoned; on CUDA with real shapes too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from detr_fast.kernels import mask_upsample as kernels
from detr_fast.kernels import ragged
from detr_fast.postprocess import PostProcessSegm

NEAR_TIE = 1e-5  # probabilities closer than this to the threshold may go either way
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# name: (mask logits [h,w], padded, for each image its queries, processed and target size)
BATCHES: dict[str, tuple[tuple[int, int], tuple[int, int], list[tuple[int, tuple[int, int], tuple[int, int]]]]] = {
    # down, up, and nothing to do; an image without queries first, in the middle and last
    "sizes": (
        (13, 17),
        (51, 67),
        [
            (0, (51, 5), (9, 9)),
            (3, (51, 67), (19, 33)),
            (0, (4, 67), (3, 3)),
            (2, (37, 50), (45, 70)),
            (0, (9, 9), (9, 9)),
        ],
    ),
    "same": ((11, 9), (11, 9), [(2, (11, 9), (11, 9)), (1, (7, 5), (7, 5))]),
    "line": ((1, 23), (3, 90), [(2, (1, 90), (1, 61)), (1, (3, 1), (5, 2))]),
    "down": ((40, 30), (17, 9), [(1, (17, 9), (17, 9))]),
    "many": ((5, 7), (19, 27), [(17, (19, 27), (5, 6)), (33, (11, 27), (3, 7))]),  # more than a program's queries
}
REAL = (
    (200, 334),
    (800, 1333),
    [(100, (800, 1333), (480, 640)), (15, (800, 1066), (1920, 2560)), (1, (512, 800), (427, 640))],
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN, or integers that no result has."""

    def poisoning(allocate: Any) -> Any:
        def poison(*args: Any, **options: Any) -> Tensor:
            out = allocate(*args, **options)
            return out.fill_(float("nan") if out.is_floating_point() else 0x55)

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


def flat(sizes: list[tuple[int, int]]) -> list[int]:
    return [side for size in sizes for side in size]


def logits(count: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (4 * torch.randn(count, height, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def probabilities(masks: Tensor, padded: tuple[int, int], source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """What is compared with the threshold, float64 [K,H,W]."""
    large = F.interpolate(masks.double()[:, None], size=padded, mode="bilinear", align_corners=False).sigmoid()
    return F.interpolate(large[..., : source[0], : source[1]], size=target, mode="nearest")[:, 0]


def check_binary(case: Any, dtype: torch.dtype, device: torch.device, threshold: float) -> None:
    (height, width), padded, images = case
    counts, processed, targets = (list(column) for column in zip(*images, strict=True))
    masks = logits(sum(counts), height, width, dtype)
    packed = kernels.launch_mask_upsample(
        masks.to(device), counts, list(padded), flat(processed), flat(targets), threshold
    ).cpu()
    assert packed.dtype == torch.uint8 and packed.ndim == 1
    parts = packed.split([count * h * w for count, (h, w) in zip(counts, targets, strict=True)])
    ties = 0
    for part, own, source, target in zip(parts, masks.split(counts), processed, targets, strict=True):
        if len(own):
            expected = probabilities(own, padded, source, target)
            near = (expected - threshold).abs() < NEAR_TIE
            ties += int(near.sum())
            assert torch.equal(part.view(expected.shape)[~near], (expected > threshold).byte()[~near])
    assert part.numel() == 0 or part.max() <= 1
    assert ties <= max(1, 5e-5 * packed.numel())


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHES)
def test_binary_masks(name: str, dtype: torch.dtype, threshold: float, device: torch.device) -> None:
    check_binary(BATCHES[name], dtype, device, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_masks_of_real_images(dtype: torch.dtype, device: torch.device) -> None:
    check_binary(REAL, dtype, device, 0.5)


def test_binary_masks_are_those_of_postprocesssegm(device: torch.device) -> None:
    masks, processed, targets = logits(6, 9, 12, torch.float32, seed=1), [(36, 31), (29, 47)], [(23, 17), (31, 50)]
    results = PostProcessSegm(0.4)(
        [{}, {}], {"pred_masks": masks.view(2, 3, 9, 12)}, torch.tensor(targets), torch.tensor(processed)
    )
    packed = kernels.launch_mask_upsample(masks.to(device), [3, 3], [36, 47], flat(processed), flat(targets), 0.4)
    assert torch.equal(packed.cpu(), torch.cat([result["masks"].flatten() for result in results]))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_extreme_logits_and_thresholds(threshold: float, device: torch.device) -> None:
    """A probability that is the threshold is not above it."""
    masks = torch.tensor([0.0, 1e-3, -1e-3, 65504.0, -80.0])[:, None, None].expand(5, 2, 3)
    out = kernels.launch_mask_upsample(masks.to(device), [5], [4, 6], [4, 6], [3, 5], threshold).view(5, 15).cpu()
    above = {0.0: [1, 1, 1, 1, 1], 0.5: [0, 1, 0, 1, 0], 1.0: [0, 0, 0, 0, 0]}[threshold]
    assert out.tolist() == [[value] * 15 for value in above]


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "expanded"])
def test_any_strides(layout: str, device: torch.device) -> None:
    wide = logits(6, 12, 34, torch.float32).to(device)
    masks = {
        "transposed": wide.transpose(1, 2)[:, :17],
        "channels_last": wide.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "sliced": wide[1::2, 1:, ::3],
        "expanded": wide[:1].expand(3, -1, -1),
    }[layout]
    args = [len(masks)], [40, 50], [33, 50], [21, 19]
    expected = kernels.launch_mask_upsample(masks.contiguous(), *args, 0.5)
    assert torch.equal(kernels.launch_mask_upsample(masks, *args, 0.5), expected)


def test_nothing_to_do(device: torch.device) -> None:
    nothing = torch.zeros(0, 4, 5, device=device)
    assert kernels.launch_mask_upsample(nothing, [], [8, 9], [], [], 0.5).shape == (0,)
    assert kernels.launch_mask_upsample(nothing, [0, 0], [8, 9], [8, 9, 8, 9], [3, 3, 2, 2], 0.5).shape == (0,)


# ---- the operation, on a CPU ----


def test_operation() -> None:
    masks = logits(3, 5, 6, torch.float32)
    args = (masks, [2, 0, 1], [20, 23], [20, 23, 9, 9, 17, 20], [11, 9, 4, 4, 25, 30], 0.5)
    torch.library.opcheck(kernels.mask_upsample, args)


@pytest.mark.parametrize("launch", [kernels.launch_mask_upsample, kernels.mask_upsample])
def test_errors_name_the_argument(launch: Any) -> None:
    masks = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match="masks must be"):
        launch(masks, [1, 1], [8, 9], [8, 9, 8, 9], [8, 9, 8, 9], 0.5)
    with pytest.raises(ValueError, match="target must be"):
        launch(masks, [1, 2], [8, 9], [8, 9, 8, 9], [8, 9, 8, 0], 0.5)
    with pytest.raises(ValueError, match="processed must be"):
        launch(masks, [1, 2], [8, 9], [8, 9], [8, 9, 8, 9], 0.5)
    with pytest.raises(ValueError, match="processed must lie within"):
        launch(masks, [3], [8, 9], [8, 10], [8, 9], 0.5)
    with pytest.raises(ValueError, match="threshold must be"):
        launch(masks, [3], [8, 9], [8, 9], [8, 9], 1.5)


def test_float64_is_refused_by_the_kernels() -> None:
    with pytest.raises(TypeError, match="masks must be float16, bfloat16 or float32, got torch.float64"):
        kernels.launch_mask_upsample(torch.zeros(1, 2, 2).double(), [1], [3, 3], [3, 3], [3, 3], 0.5)


# ---- addresses ----


@triton.jit
def offsets_kernel(out_ptr, plane, stride):
    tl.store(out_ptr, ragged.plane_offset(plane, stride))


def test_planes_lie_beyond_two_to_the_31(device: torch.device) -> None:
    out = torch.zeros(1, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](out, 70000, 2**20 + 3)
    assert out.item() == 70000 * (2**20 + 3)


def test_header_holds_offsets_beyond_two_to_the_31() -> None:
    tables = ragged.Tables()
    assert (tables.place("a", np.arange(3, dtype=np.int32)), tables.place("a", np.zeros(9, np.int32))) == (0, 0)
    header, integers, floats = tables.send([[2**40, 7]], torch.device("cpu"))
    assert header.tolist() == [2**40, 7] and integers.tolist() == [0, 1, 2]
    assert floats.data_ptr() == integers.data_ptr() == header.data_ptr() + 16


IR = """
import importlib, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
for build in importlib.import_module("detr_fast.kernels." + sys.argv[1]).builds(80):
    if "-fp16" in build.name:
        source = ASTSource(build.kernel, build.signature, build.constexprs)
        print(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"])
"""


def bases(kernel_file: str) -> dict[str, set[str]]:
    """The integer types that each pointer argument is offset by in the compiled kernels on float16."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", IR, kernel_file]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, set[str]] = {}
    for name, kind in re.findall(r"tt\.addptr %(\w+_ptr), \S+ : !tt\.ptr<\w+>, (i\d+)", run.stdout):
        found.setdefault(name, set()).add(kind)
    return found


def test_compiled_addresses_of_planes_are_64_bits_wide() -> None:
    found = bases("mask_upsample")
    assert all(found[name] == {"i64"} for name in ("masks_ptr", "out_ptr")), found
