"""An image on disk or in memory -> an RGB picture -> the tensor a DETR reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from detr_fast.images import IMAGENET_MEAN, IMAGENET_STD, image_to_array
from detr_fast.resampling import WEIGHT_BITS, resample_taps, resized_size


def image_to_tensor(image: Image.Image, size: int = 800, max_size: int | None = 1333) -> Tensor:
    """An RGB picture, resized by `resized_size` with Pillow's bilinear filter, normalised by ImageNet's mean and std.

    Equal to facebookresearch/detr's RandomResize([size], max_size), ToTensor and Normalize to the last bit.

    Returns:
        float32 [3, h, w].

    Raises:
        ValueError: the picture is not RGB, or `resized_size` refuses it.
    """
    return torch.from_numpy(image_to_array(image, size, max_size))


# ---- on any device ----


def images_to_batch(
    images: Sequence[Tensor | np.ndarray],
    size: int = 800,
    max_size: int | None = 1333,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`image_to_tensor` of several RGB pictures on any device, the same to the last bit: it computes in integers.

    Images taller than 100 times their width are within one grey level: some releases of Pillow 12 resize them in
    another order.

    Args:
        images: uint8 [H, W, 3], which may differ in size, but not once they are resized. Moved to `device`.

    Returns:
        float32 [B, 3, h, w] on `device`, in channels_last memory.

    Raises:
        TypeError: an image that is not a uint8 array or tensor.
        ValueError: no images, another shape than [H, W, 3], or images that `resized_size` gives different sizes.
    """
    pictures = [_pixels(image) for image in images]
    sizes = {resized_size(picture.shape[1], picture.shape[0], size, max_size) for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"images must be at least one, all of one (width, height) when resized, got {sorted(sizes)}")
    return batch_of_size(pictures, *sizes.pop(), device)


def batch_of_size(pictures: Sequence[Tensor], width: int, height: int, device: torch.device | str = "cpu") -> Tensor:
    """`images_to_batch` to a given size, to which some of the pictures, uint8 [H, W, 3], may be resized already."""
    device = torch.device(device)
    batch = torch.empty((len(pictures), height, width, 3), dtype=torch.uint8, device=device)
    for out, picture in zip(batch, pictures, strict=True):
        out.copy_(resize(picture.to(device, non_blocking=True), width, height))
    table, starts = _normalised_levels(device)
    return table.index_select(0, (batch + starts).flatten()).view(batch.shape).permute(0, 3, 1, 2)


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """uint8 [H, W, C] to [height, width, C], on any device: Pillow's `resize` with its bilinear filter.

    One axis after the other, each rounded to 8 bits. The order shows, by one grey level: Pillow 13 begins with the
    height where that loses more than twice the pixels of the width, older ones always with the width.
    """
    rows, columns = image.shape[0] - height, image.shape[1] - width
    if rows > max(0, 2 * columns) and int(PIL.__version__.split(".")[0]) >= 13:
        return _resample(_resample(image, height, 0), width, 1)
    return _resample(_resample(image, width, 1), height, 0)


def _resample(image: Tensor, size: int, dim: int) -> Tensor:
    if image.shape[dim] == size:
        return image
    along = [size if axis == dim else 1 for axis in range(image.ndim)]
    total = torch.full((), 1 << (WEIGHT_BITS - 1), dtype=torch.int32, device=image.device)  # rounds to nearest
    for index, weight in zip(*_device_taps(image.shape[dim], size, image.device), strict=True):
        total = total + image.index_select(dim, index) * weight.view(along)
    return (total >> WEIGHT_BITS).to(torch.uint8)


def _pixels(image: Tensor | np.ndarray) -> Tensor:
    picture = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8:
        given = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
        raise TypeError(f"images must be uint8 arrays or tensors, got {given}")
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"images must be [H, W, 3], got {list(picture.shape)}")
    return picture


@lru_cache(maxsize=256)
def _device_taps(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index, weights = resample_taps(size_in, size_out)
    return torch.from_numpy(index).to(device), torch.from_numpy(weights).to(device)


@lru_cache(maxsize=8)
def _normalised_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [768], each grey level of each channel normalised, and where in it the channels start, int32 [3].

    A table, as a GPU divides by a number by multiplying with its reciprocal, which rounds differently.
    """
    mean, std = (np.array(values, np.float32)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    levels = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std
    starts = torch.arange(0, 768, 256, dtype=torch.int32)
    return torch.from_numpy(levels.ravel()).to(device), starts.to(device)
