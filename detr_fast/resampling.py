"""How Pillow and the two upstreams resize: to which size, with which filter weights, and which pixels NEAREST picks.

No torch here: the processes that read images for `detr-fast label` need none, and start in a tenth of the time.
"""

from __future__ import annotations

import numpy as np

# Pillow resizes 8-bit images in fixed point, with weights in units of 2**-22: 255 times their sum fits int32.
WEIGHT_BITS = 22


def resized_size(width: int, height: int, size: int = 800, max_size: int | None = 1333) -> tuple[int, int]:
    """The (width, height) to which facebookresearch/detr resizes: short side `size`, long side at most
    about `max_size`.

    The short side is rounded first and the long side follows from it, so the long side can pass `max_size`:
    200 x 3000 becomes 89 x 1335. Source: get_size_with_aspect_ratio in datasets/transforms.py.

    Raises:
        ValueError: a size below 1, or an image so thin that its short side would vanish.
    """
    short = round(_short_side(width, height, size, max_size))
    return _scaled(width, height, short, short)


def transformers_resized_size(width: int, height: int, size: int = 800, max_size: int | None = 1333) -> tuple[int, int]:
    """The (width, height) to which transformers resizes: as `resized_size`, but the long side follows from the
    unrounded short side, and so keeps to `max_size`: 200 x 3000 becomes 89 x 1333.

    Source: get_size_with_aspect_ratio in transformers' image_transforms.py.

    Raises:
        ValueError: as `resized_size`.
    """
    short = _short_side(width, height, size, max_size)
    return _scaled(width, height, round(short), short)


def _short_side(width: int, height: int, size: int, max_size: int | None) -> float:
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be resized")
    if size < 1 or (max_size is not None and max_size < 1):
        raise ValueError(f"size and max_size must be at least 1, got {size} and {max_size}")
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        return max_size * short / long
    return size


def _scaled(width: int, height: int, short: int, scale: float) -> tuple[int, int]:
    """`short` for the short side and, cut to an integer, `scale` times the aspect ratio for the other."""
    if min(width, height) == short:
        return width, height
    long = int(scale * max(width, height) / min(width, height))
    if short == 0 or long == 0:
        raise ValueError(f"an image of {width} x {height} pixels is too thin to be resized")
    return (short, long) if width < height else (long, short)


def resample_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's bilinear filter along one axis: each output pixel is a weighted sum of up to `taps` input pixels.

    Source: precompute_coeffs and normalize_coeffs_8bpc in libImaging/Resample.c.

    Returns:
        Source indices int32 [taps, size_out], and the weights, int32 in units of 2**-22, 0 where there are fewer.
    """
    scale = size_in / size_out
    support = max(scale, 1.0)
    centers = (np.arange(size_out) + 0.5) * scale
    first = (centers - support + 0.5).clip(0).astype(np.int64)
    end = (centers + support + 0.5).astype(np.int64).clip(max=size_in)
    index = first + np.arange((end - first).max())[:, None]
    weights = 1 - abs((index - centers + 0.5) * (1 / support))
    weights[(weights < 0) | (index >= end)] = 0
    weights /= np.cumsum(weights, axis=0)[-1]  # unlike np.sum it adds one after the other, as Pillow does
    fixed = (0.5 + weights * (1 << WEIGHT_BITS)).astype(np.int32)
    return index.clip(max=size_in - 1).astype(np.int32), fixed


def pil_nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """The source index of each of `size_out` pixels when PIL resizes `size_in` pixels with NEAREST, int64 [size_out].

    Pillow's ImagingScaleAffine (libImaging/Geometry.c): it starts at half a step, adds a step per pixel in float64,
    and truncates. The running sum matters: `(i + 0.5) * step` rounds differently.
    """
    steps = np.full(size_out, size_in / size_out)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)
