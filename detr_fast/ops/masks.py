"""The mask head's layers, and its masks at the size of the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import reference
from detr_fast.ops.cache import kept
from detr_fast.ops.dense import conv2d, image_layout, weights
from detr_fast.ops.norm import group_norm_relu
from detr_fast.ops.policy import is_plain, uses_kernels

# Queries are worked through in chunks whose largest feature map stays under this, so that the memory needed does not
# grow with their number. Measured on 2 cores with 32 MiB of L3 at 800 x 1066: chunks of 4 take half the time of 15.
CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 2**30  # the same on a GPU, where chunks only bound the memory
RESIZED_AT_ONCE = 1 << 24  # resized mask logits held at once: 64 MiB in float32

Size = tuple[int, int]  # (height, width)


# ---- the mask head ----


def chunks(
    x: Tensor, image: Tensor, counts: Sequence[int] | None, query_bytes: int
) -> Iterator[tuple[slice, int | Tensor]]:
    """N queries in parts that the mask head works on at once: which of them, and the image of all, or of each, [n].

    Triton's kernels take the queries of many images at once; elsewhere a part has one image's, as many as a CPU's cache
    holds. There is at least one part.

    Args:
        x: the encoded images, whose device and dtype decide.
        image: int64 [N], the image of each query, in rising order.
        counts: queries of each image; None, where the host does not know, needs the kernels.
        query_bytes: of a query's largest feature map.
    """
    if uses_kernels(x):
        step = max(1, GPU_CHUNK_BYTES // query_bytes)
        for rows in (slice(start, start + step) for start in range(0, max(1, len(image)), step)):
            yield rows, image[rows]
        return
    assert counts is not None
    step = max(1, CHUNK_BYTES // query_bytes)
    stop, found = 0, False
    for index, count in enumerate(counts):
        start, stop = stop, stop + count
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop)), index
        found = found or count > 0
    if not found:
        yield slice(0, 0), 0


def level(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A feature map [B,C,h,w] in the form in which `norm_upsample_conv` adds it, made once an image.

    A convolution is linear: where no kernel adds the map while it normalises, it is convolved here, once an image
    instead of once a query.
    """
    return x if uses_kernels(x) else conv2d(x, *weights(layer, x.dtype), padding=1)


def norm_upsample_conv(x: Tensor, norm: nn.GroupNorm, layer: nn.Conv2d, level: Tensor, image: int | Tensor) -> Tensor:
    """layer(up(relu(norm(x))) + map[image]), with nearest upsampling to the map's size.

    Args:
        x: [N,C,h,w], may be overwritten.
        layer: a 3x3 convolution, zero padded, from C to O channels.
        level: of the images' feature maps [B,C,H,W], by `level`.
        image: of all of x, or of each, int64 [N].

    Returns: [N,O,H,W].
    """
    size = (level.shape[2], level.shape[3])
    if isinstance(image, Tensor) and uses_kernels(x):
        arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps, level, image, *size)
        x = torch.ops.detr_fast.group_norm_relu_upsample(x, *arguments)
        return conv2d(x, *weights(layer, x.dtype), padding=1)
    weight, _ = weights(layer, x.dtype)
    x = upsample_conv(group_norm_relu(x, norm), weight, _phases(layer, x.dtype), size)
    return x.add_(level[image])


def _phases(layer: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """`phase_kernels` of the layer's weight."""
    build = lambda: image_layout(phase_kernels(layer.weight).to(dtype))  # noqa: E731
    return kept(layer, "phases", dtype, (layer.weight,), build)


def upsample_conv(x: Tensor, weight: Tensor, phases: Tensor, size: Size) -> Tensor:
    """`reference.upsample_conv`: nearest upsampling of x [N,C,h,w] to `size`, then a 3x3 convolution, zero padded.

    An upsampled pixel repeats, so of the nine taps over 2x2 equal pixels only four differ: each of the four positions
    (phases) in an upsampled 2x2 block is a 2x2 convolution at low resolution. Stride-2 layers make every `size` 2n or
    2n - 1 of n, where nearest upsampling is doubling, cropped; then the pixels just beyond the crop, which the phases
    see and the definition does not, are subtracted.

    Args:
        weight: [O,C,3,3].
        phases: [4*O,C,2,2], `phase_kernels(weight)`.
        size: (height, width); others than 2n and 2n - 1 are computed as defined.

    Returns: [N,O,*size].
    """
    h, w = x.shape[-2:]
    height, width = size
    # Measured on 2 cores (AMD EPYC, AVX-512), float32 and bfloat16, at all three layers of the head: 1.9 to 2.3 times
    # as fast as upsampling first, so there is no size at which a doubling takes the plain road.
    if is_plain("upsample_conv") or height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
        return reference.upsample_conv(x, weight, size)
    out_channels = weight.shape[0]
    low = conv2d(x, phases, None, padding=1)  # [N,4*O,h+1,w+1]
    out = low.new_empty((x.shape[0], out_channels, height, width)).contiguous(memory_format=torch.channels_last)
    for row in (0, 1):
        for column in (0, 1):
            target = out[:, :, row::2, column::2]
            phase = 2 * row + column
            source = low[:, phase * out_channels : (phase + 1) * out_channels, row:, column:]
            target.copy_(source[:, :, : target.shape[2], : target.shape[3]])
    if height < 2 * h:  # the row below the crop, its last pixel beyond the corner included
        beyond = x[:, :, -1:].repeat_interleave(2, 3)
        out[:, :, -1:] -= F.conv2d(beyond, weight[:, :, 2:], padding=(0, 1))[..., :width]
    if width < 2 * w:
        beyond = x[..., -1:].repeat_interleave(2, 2)[:, :, :height]
        out[..., -1:] -= F.conv2d(beyond, weight[..., 2:], padding=(1, 0))
    return out


def phase_kernels(weight: Tensor) -> Tensor:
    """[4*O,C,2,2] from [O,C,3,3]: which taps of the 3x3 kernel fall on the same low-resolution pixel, summed."""

    def fold(taps: tuple[Tensor, ...], dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = taps
        return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)

    rows = fold(weight.unbind(2), 2)
    return torch.cat([kernel for row in rows for kernel in fold(row.unbind(3), 3)])


# ---- masks at the size of the image ----


def mask_upsample(
    masks: Sequence[Tensor], padded: Size, processed: Sequence[Size], targets: Sequence[Size], threshold: float
) -> list[Tensor]:
    """`reference.mask_upsample` of B images: uint8 [K_i,H_i,W_i] of each, on the masks' device.

    Args:
        masks: mask logits [K_i,h,w] of each image over the padded batch.
        padded: of the batch.
        processed, targets: of each image, without padding, and of its masks.
        threshold: the probability above which a pixel belongs to a mask.
    """
    counts = [len(image) for image in masks]
    if uses_kernels(masks[0]):
        sizes = ([side for size in sizes for side in size] for sizes in (processed, targets))
        flat = torch.ops.detr_fast.mask_upsample(torch.cat(list(masks)), counts, list(padded), *sizes, threshold)
        parts = flat.split([count * math.prod(size) for count, size in zip(counts, targets, strict=True)])
        return [part.view(-1, *size) for part, size in zip(parts, targets, strict=True)]
    images = zip(masks, processed, targets, strict=True)
    return [_mask_upsample(image, padded, source, target, threshold) for image, source, target in images]


def _mask_upsample(masks: Tensor, padded: Size, processed: Size, target: Size, threshold: float) -> Tensor:
    """One image's, some queries at a time."""
    height, width = processed
    largest = max(math.prod(padded), math.prod(target))
    shrinks = math.prod(target) < height * width  # then fewer pixels are left to judge
    out = torch.empty((len(masks), *target), dtype=torch.uint8, device=masks.device)
    if len(masks) == 0:
        return out
    step = max(1, RESIZED_AT_ONCE // largest)
    for part, chunk in zip(out.split(step), masks.split(step), strict=True):
        large = F.interpolate(chunk[None], size=padded, mode="bilinear", align_corners=False)[:, :, :height, :width]
        if shrinks:
            part.copy_(F.interpolate(large, size=target, mode="nearest").sigmoid()[0] > threshold)
        else:
            part.copy_(F.interpolate((large.sigmoid() > threshold).byte(), size=target, mode="nearest")[0])
    return out
