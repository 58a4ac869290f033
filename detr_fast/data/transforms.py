"""Augmentations of an image together with its boxes and masks, called as `(image, target)`.

Same names, results and use of random numbers as facebookresearch/detr's datasets/transforms.py: seeded alike
(`random` and torch), both give the same images and targets.

A target is a dict. The transforms change its "boxes" float32 [N, 4] (x0, y0, x1, y1 in pixels), "masks" bool or uint8
[N, H, W], "labels", "area" and "iscrowd" [N], and "size" [2] (height, width). Other keys pass through. Targets are
never changed in place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from detr_fast.resampling import resized_size

Target = dict[str, Any]
Transform = Callable[[Any, Any], tuple[Any, Any]]
Region = tuple[int, int, int, int]


def crop(image: Image.Image, target: Target, region: Region) -> tuple[Image.Image, Target]:
    """Cuts out `region` = (top, left, height, width); pixels of the region beyond the image are black.

    Objects that lose their whole box, or without boxes their whole mask, are removed. With boxes, "area" becomes the
    area of the cut box.
    """
    top, left, height, width = region
    cropped = image.crop((left, top, left + width, top + height))
    target = {**target, "size": torch.tensor([height, width])}
    keep = None
    if "masks" in target:
        right, bottom = left + width - image.width, top + height - image.height
        # negative padding cuts, positive padding adds background
        target["masks"] = F.pad(target["masks"], (-left, right, -top, bottom))
        keep = target["masks"].flatten(1).any(1)
    if "boxes" in target:
        corners = (target["boxes"] - torch.tensor([left, top, left, top])).reshape(-1, 2, 2)
        corners = torch.min(corners, torch.tensor([width, height], dtype=torch.float32)).clamp(min=0)
        target["boxes"] = corners.reshape(-1, 4)
        target["area"] = (corners[:, 1] - corners[:, 0]).prod(dim=1)
        keep = (corners[:, 1] > corners[:, 0]).all(dim=1)
    if keep is not None:
        for key in ("boxes", "masks", "labels", "area", "iscrowd"):
            if key in target:
                target[key] = target[key][keep]
    return cropped, target


def hflip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Mirrors left and right."""
    target = dict(target)
    if "boxes" in target:
        x0, y0, x1, y1 = target["boxes"].unbind(-1)
        target["boxes"] = torch.stack((image.width - x1, y0, image.width - x0, y1), dim=-1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return ImageOps.mirror(image), target


def resize(
    image: Image.Image, target: Target | None, size: int | Sequence[int], max_size: int | None = None
) -> tuple[Image.Image, Target | None]:
    """Resizes the image bilinearly, its masks to the nearest pixel.

    Args:
        size: the short side, from which `preprocess.resized_size` makes both; or (width, height).
        max_size: the most that the long side may be, about.
    """
    width, height = resized_size(*image.size, size, max_size) if isinstance(size, int) else size
    if (width, height) == image.size:
        return image, target if target is None else {**target, "size": torch.tensor([height, width])}
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    if target is None:
        return resized, None
    target = {**target, "size": torch.tensor([height, width])}
    ratio_x, ratio_y = width / image.width, height / image.height
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    if "area" in target:
        target["area"] = target["area"] * (ratio_x * ratio_y)
    if "masks" in target:
        masks = target["masks"][:, None].to(torch.uint8)
        target["masks"] = F.interpolate(masks, size=(height, width), mode="nearest")[:, 0] > 0
    return resized, target


def pad(image: Image.Image, target: Target | None, padding: tuple[int, int]) -> tuple[Image.Image, Target | None]:
    """Adds black at the right and the bottom: `padding` = (columns, rows)."""
    columns, rows = padding
    padded = ImageOps.expand(image, (0, 0, columns, rows), fill=0)
    if target is None:
        return padded, None
    target = {**target, "size": torch.tensor([padded.height, padded.width])}
    if "masks" in target:
        target["masks"] = F.pad(target["masks"], (0, columns, 0, rows))
    return padded, target


class Compose:
    """Applies transforms one after another."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any, target: Target | None = None) -> tuple[Any, Target | None]:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__}(", *(f"    {transform}" for transform in self.transforms), ")"])


def _random_region(image: Image.Image, height: int, width: int) -> Region:
    """A place for a crop of height x width, from the random numbers of torchvision's RandomCrop.get_params."""
    if height > image.height or width > image.width:
        raise ValueError(
            f"crop size {height} x {width} must not be larger than the image, {image.height} x {image.width}"
        )
    if (width, height) == image.size:
        return 0, 0, height, width
    top = int(torch.randint(0, image.height - height + 1, (1,)))
    left = int(torch.randint(0, image.width - width + 1, (1,)))
    return top, left, height, width


class RandomCrop:
    """Cuts out `size` = (height, width) at a random place; ValueError if the image is smaller."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        return crop(image, target, _random_region(image, *self.size))


class RandomSizeCrop:
    """Cuts out a random place; each side is drawn from [min_size, max_size], or whole where the image is smaller."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        width, height = self._side(image.width), self._side(image.height)
        return crop(image, target, _random_region(image, height, width))

    def _side(self, available: int) -> int:
        largest = min(available, self.max_size)
        return random.randint(min(self.min_size, largest), largest)


class CenterCrop:
    """Cuts out the middle: `size` = (height, width)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        height, width = self.size
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return crop(image, target, (top, left, height, width))


class RandomHorizontalFlip:
    """Mirrors with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        return hflip(image, target) if random.random() < self.p else (image, target)


class RandomResize:
    """Resizes as `resize` to one of `sizes`."""

    def __init__(self, sizes: Sequence[int | Sequence[int]], max_size: int | None = None) -> None:
        if not isinstance(sizes, list | tuple):
            raise TypeError(f"sizes must be a list or tuple, got {type(sizes).__name__}")
        self.sizes = sizes
        self.max_size = max_size

    def __call__(self, image: Image.Image, target: Target | None = None) -> tuple[Image.Image, Target | None]:
        return resize(image, target, random.choice(self.sizes), self.max_size)


class RandomPad:
    """Adds up to `max_pad` black columns at the right and rows at the bottom."""

    def __init__(self, max_pad: int) -> None:
        self.max_pad = max_pad

    def __call__(self, image: Image.Image, target: Target | None) -> tuple[Image.Image, Target | None]:
        return pad(image, target, (random.randint(0, self.max_pad), random.randint(0, self.max_pad)))


class RandomSelect:
    """Applies `transforms1` with probability `p`, else `transforms2`."""

    def __init__(self, transforms1: Transform, transforms2: Transform, p: float = 0.5) -> None:
        self.transforms1 = transforms1
        self.transforms2 = transforms2
        self.p = p

    def __call__(self, image: Any, target: Target | None) -> tuple[Any, Target | None]:
        return self.transforms1(image, target) if random.random() < self.p else self.transforms2(image, target)


class ToTensor:
    """A PIL image or array [H, W, C] of 8 bits a channel -> float32 [C, H, W] in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray, target: Target | None = None) -> tuple[Tensor, Target | None]:
        pixels = np.array(image)
        if pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * 255
        if pixels.dtype != np.uint8:
            raise TypeError(f"image must have 8 bits a channel, got {pixels.dtype}")
        planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        return planes.contiguous().float().div_(255), target


class Normalize:
    """(image - mean) / std for each channel; boxes become (cx, cy, w, h) in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        mean = image.new_tensor(self.mean).view(-1, 1, 1)
        std = image.new_tensor(self.std).view(-1, 1, 1)
        image = image.sub(mean).div_(std)
        if target is None:
            return image, None
        target = dict(target)
        if "boxes" in target:
            height, width = image.shape[-2:]
            x0, y0, x1, y1 = target["boxes"].unbind(-1)
            boxes = torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)
            target["boxes"] = boxes / torch.tensor([width, height, width, height], dtype=torch.float32)
        return image, target
