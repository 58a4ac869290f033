"""Batches of images of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NestedTensor:
    """Images padded to one size, and where the padding is (facebookresearch/detr, util/misc.py).

    Attributes:
        tensors: [B,C,H,W].
        mask: bool [B,H,W], True on padding; None where no image is padded.
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None = None):
        if not isinstance(tensors, Tensor) or tensors.ndim != 4:
            raise ValueError(f"tensors must be a Tensor [B,C,H,W], got {_describe(tensors)}")
        if mask is not None:
            expected = (tensors.shape[0], *tensors.shape[-2:])
            if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
                raise ValueError(f"mask must be a bool Tensor {list(expected)} like tensors, got {_describe(mask)}")
            mask = mask.to(torch.bool)
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device | str) -> NestedTensor:
        return NestedTensor(self.tensors.to(device), None if self.mask is None else self.mask.to(device))

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor(tensors={_describe(self.tensors)}, mask={_describe(self.mask)})"


def nested_tensor_from_tensor_list(tensor_list: Sequence[Tensor] | Tensor) -> NestedTensor:
    """Pads images [C,H_i,W_i] with zeros, right and bottom, to the largest height and width among them.

    The mask is None where all images have one size, as then nothing is padded.

    Raises:
        ValueError: an empty list, or images that are not [C,H,W] of one dtype, device and number of channels.
    """
    images = list(tensor_list)
    if not images:
        raise ValueError("tensor_list must hold at least one image [C,H,W], got an empty list")
    first = images[0]
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise ValueError(f"image {index} must be a Tensor [C,H,W], got {_describe(image)}")
        if (image.shape[0], image.dtype, image.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"image {index} must have the channels, dtype and device of image 0 ({_describe(first)}), "
                f"got {_describe(image)}"
            )
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    if all(image.shape == first.shape for image in images):
        return NestedTensor(torch.stack(images))
    tensors = first.new_zeros(len(images), first.shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for image, padded, padding in zip(images, tensors, mask, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
        padding[: image.shape[1], : image.shape[2]] = False
    return NestedTensor(tensors, mask)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value) if value is None else type(value).__name__
