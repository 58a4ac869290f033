"""Resizing and normalising on any device, against Pillow."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.preprocess import image_to_tensor, images_to_batch, resize
from detr_fast.resampling import resample_taps

# (width, height) -> (width, height): up, down, one of each, nothing, odd, large steps, a single pixel
SIZES = [
    ((64, 48), (106, 80)),
    ((640, 427), (133, 89)),
    ((37, 91), (80, 45)),
    ((91, 37), (45, 80)),
    ((50, 50), (50, 50)),
    ((50, 31), (50, 97)),
    ((31, 50), (97, 50)),
    ((333, 217), (32, 21)),
    ((1, 1), (7, 3)),
    ((7, 300), (1, 1)),
    ((300, 7), (299, 6)),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_resize_gives_pillows_pixels(size: tuple[int, int], new_size: tuple[int, int], device: str) -> None:
    pixels = noise(*size)
    resized = resize(torch.from_numpy(pixels).to(device), *new_size)
    assert resized.dtype == torch.uint8
    np.testing.assert_array_equal(resized.cpu().numpy(), by_pillow(pixels, new_size))


def test_resize_gives_pillows_pixels_at_sizes_nobody_chose() -> None:
    chance = random.Random(0)
    for seed in range(150):
        width, height, new_width, new_height = (chance.randint(1, 200) for _ in range(4))
        pixels = noise(width, height, seed)
        resized = resize(torch.from_numpy(pixels), new_width, new_height).numpy()
        difference = abs(resized.astype(int) - by_pillow(pixels, (new_width, new_height)))
        # Pillow 12 may begin with the height where there is more than 100 times as much of it
        assert difference.max() <= (height > 100 * width), f"{(width, height)} to {(new_width, new_height)}"


def test_extremes_stay_in_range() -> None:
    for level in (0, 255):
        pixels = torch.full((23, 61, 3), level, dtype=torch.uint8)
        assert (resize(pixels, 97, 11) == level).all()


@pytest.mark.parametrize(("size_in", "size_out"), [(640, 1066), (1066, 640), (6000, 3), (1, 5), (999, 1000)])
def test_weights_sum_to_one_and_fit_int32(size_in: int, size_out: int) -> None:
    index, weights = resample_taps(size_in, size_out)
    assert index.min() >= 0
    assert index.max() < size_in
    assert weights.min() >= 0
    sums = weights.astype(np.int64).sum(0)
    assert abs(sums - 2**22).max() <= len(weights)
    assert 255 * sums.max() + 2**21 < 2**31


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_its_images_as_tensors(device: str) -> None:
    images = [noise(64, 48, seed=1), noise(128, 96, seed=2), noise(80, 60, seed=3)]
    batch = images_to_batch([images[0], torch.from_numpy(images[1]), images[2]], 60, 100, device)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([image_to_tensor(Image.fromarray(image), 60, 100) for image in images])
    assert torch.equal(batch.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (427, 640), (1920, 1080), (4000, 3000), (200, 3000)])
def test_photographs_on_a_gpu_are_those_on_the_cpu(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    assert torch.equal(images_to_batch([pixels], device="cuda")[0].cpu(), image_to_tensor(Image.fromarray(pixels)))


@pytest.mark.parametrize(
    ("images", "error", "named"),
    [
        ([], ValueError, "images must be at least one"),
        ([noise(40, 30), noise(30, 40)], ValueError, r"one \(width, height\)"),
        ([np.zeros((4, 4, 3), np.float32)], TypeError, r"images must be uint8 .*float32"),
        ([Image.new("RGB", (4, 4))], TypeError, "images must be uint8 .* Image"),
        ([np.zeros((4, 4), np.uint8)], ValueError, r"images must be \[H, W, 3\], got \[4, 4\]"),
        ([np.zeros((3, 8, 8), np.uint8)], ValueError, r"images must be \[H, W, 3\]"),
    ],
)
def test_what_is_no_batch_is_named(images: list[np.ndarray], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        images_to_batch(images, 60, 100)
