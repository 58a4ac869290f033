"""An RGB picture -> resized -> the normalised array a DETR reads, bit for bit as Pillow and torchvision compute it.

No torch here: the processes that read images for `detr-fast label` need none, and start in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from detr_fast.resampling import WEIGHT_BITS, resample_taps, resized_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SENT_BYTES = 32 << 20  # the most of a picture that is sent to a device as it is; a larger one is resized before

NORMALISED_AT_ONCE = 1 << 16  # values, 256 KiB of float32
# Of one product of matrices, so that OpenBLAS leaves it to one thread, and what it works on stays in the cache.
ROWS_ADDED = 8
COLUMNS_ADDED = 16
MULTIPLICATIONS = 1 << 17


@dataclass(frozen=True)
class Pixels:
    """The pixels of one image on their way to a model.

    Attributes:
        array: uint8 [rows, columns, 3], as `prepare` makes it.
        size: (h, w), as the model sees the image.
        target: (H, W), as the image is, and its segmentation shall be.
    """

    array: np.ndarray
    size: tuple[int, int]
    target: tuple[int, int]


def prepare(
    picture: Image.Image, size: int, max_size: int, on_device: bool, allocate: Callable[..., np.ndarray] = np.empty
) -> Pixels:
    """The pixels of an RGB picture that go to the model; the only place that decides where a picture is resized.

    Args:
        size, max_size: as for `resized_size`.
        on_device: a GPU resizes the picture itself (`preprocess.batch_of_size`), unless it is too large to be sent
            there; else it is resized here, but for the rows that `normalise` adds.
        allocate: makes the array from its shape and dtype.

    Raises:
        ValueError: the picture is too thin to be resized.
    """
    target = (picture.height, picture.width)
    width, height = resized_size(*picture.size, size, max_size)
    if not on_device:
        array = resized_for_normalise(picture, width, height, allocate)
    elif 3 * picture.width * picture.height <= SENT_BYTES:
        array = pixels_of(picture, allocate)
    else:
        array = pixels_of(picture.resize((width, height), Image.Resampling.BILINEAR), allocate)
    return Pixels(array, (height, width), target)


def image_to_array(image: Image.Image, size: int = 800, max_size: int | None = 1333) -> np.ndarray:
    """`preprocess.image_to_tensor`, as a float32 array [3, h, w]."""
    if image.mode != "RGB":
        raise ValueError(f"image must be an RGB picture, as read_image gives, got mode {image.mode}")
    width, height = resized_size(*image.size, size, max_size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    out = np.empty((3, height, width), dtype=np.float32)
    for plane, band, mean, std in zip(out, resized.split(), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        _normalise(np.asarray(band), np.float32(mean), np.float32(std), plane)
    return out


def resized_for_normalise(
    picture: Image.Image, width: int, height: int, allocate: Callable[..., np.ndarray] = np.empty
) -> np.ndarray:
    """An RGB picture resized with Pillow's bilinear filter, but for rows that are to be added, as `normalise` does.

    480 rows of 640 pixels become 1066 wide in 2.4 ms; Pillow takes 3.0, with the copy of its larger picture.

    Args:
        allocate: makes the array from its shape and dtype.

    Returns:
        uint8 [at most height, width, 3].
    """
    if width <= picture.width or height < picture.height:
        picture = picture.resize((width, min(height, picture.height)), Image.Resampling.BILINEAR)
        return pixels_of(picture, allocate)
    out = allocate((picture.height, width, 3), np.uint8)
    _add_columns(np.asarray(picture).reshape(picture.height, -1), out.reshape(picture.height, -1))
    return out


def pixels_of(picture: Image.Image, allocate: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """An RGB picture as uint8 [H, W, 3], in memory of its own that `allocate` makes from shape and dtype."""
    out = allocate((picture.height, picture.width, 3), np.uint8)
    out[:] = np.asarray(picture)
    return out


def normalise(pixels: np.ndarray, out: np.ndarray) -> None:
    """Writes pixels of `resized_for_normalise`, uint8 [at most h, w, 3], normalised by ImageNet's mean and std, to
    float32 [h, w, 3]; both contiguous. Bit for bit `preprocess.image_to_tensor`, in another order in memory.

    Some rows at a time, so that they stay in the cache, and with a mean and std for each value of a row, as NumPy is
    slow where three of them repeat. Measured at 800 x 1066 on one core: 2.3 ms, and 1.2 more for rows to be added to
    480; Pillow takes 4.9 for these, with the copies of its larger picture.
    """
    height, width, _ = out.shape
    mean, std = (np.tile(np.array(values, np.float32), width) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels, out = pixels.reshape(len(pixels), -1), out.reshape(height, -1)
    if len(pixels) < height:
        for source, rows, weights in _products(len(pixels), height, ROWS_ADDED, 1):
            np.trunc(np.matmul(weights.T, _levels(pixels[source]), out=out[rows]), out=out[rows])
            _normalise(out[rows], mean, std, out[rows])
        return
    step = max(1, NORMALISED_AT_ONCE // (3 * width))
    for rows in (slice(top, top + step) for top in range(0, height, step)):
        _normalise(pixels[rows], mean, std, out[rows])


def _add_columns(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 [H, 3 W] to uint8 [H, 3 w]."""
    products = _products(pixels.shape[1] // 3, out.shape[1] // 3, COLUMNS_ADDED, 3)
    step = max(1, MULTIPLICATIONS // max(weights.size for *_, weights in products))
    added = np.empty((min(step, len(out)), out.shape[1]), np.float32)
    for rows in (slice(top, top + step) for top in range(0, len(out), step)):
        levels = _levels(pixels[rows])
        for source, columns, weights in products:
            np.matmul(levels[:, source], weights, out=added[: len(levels), columns])
        np.copyto(out[rows], added[: len(levels)], casting="unsafe")  # takes the integer part


def _levels(pixels: np.ndarray) -> np.ndarray:
    """As float32, 1/2 added."""
    levels = pixels.astype(np.float32)
    levels += np.float32(0.5)
    return levels


@lru_cache(maxsize=32)
def _products(size_in: int, size_out: int, at_once: int, values: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Pillow's bilinear filter where it enlarges, as products of matrices, of which each gives `at_once` positions of
    an axis: of which values in, which values out, and weights, float32 [in, out]. A position has so many `values`.

    What a product gives of levels + 1/2 has Pillow's level as integer part, in any order of its sums.
    """
    first, weight = _added(size_in, size_out)
    starts = np.arange(0, size_out, at_once)
    product, out = np.divmod(np.arange(size_out), at_once)
    place = first - first[starts][product]
    following = np.minimum(first + 1, size_in - 1) - first[starts][product]
    weights = np.zeros((len(starts), following.max() + 1, values, at_once, values), np.float32)
    for value in range(values):
        weights[product, place, value, out, value] = 1 - weight
        weights[product, following, value, out, value] += weight
    weights = weights.reshape(len(starts), -1, values * at_once)
    products = []
    for start, some in zip(starts.tolist(), weights, strict=True):
        stop = min(start + at_once, size_out)
        source = slice(values * int(first[start]), values * min(int(first[stop - 1]) + 2, size_in))
        part = slice(values * start, values * stop)
        products.append((source, part, some[: source.stop - source.start, : part.stop - part.start]))
    return products


@lru_cache(maxsize=256)
def _added(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's bilinear filter where it enlarges: between which source position and the next each position lies, and
    the weight of the latter, float32; both [size_out].

    Pillow takes the integer part of a + (b - a) w + 1/2. There are 511 differences, so many a weight gives the same for
    all of them: with the one in the middle no sum is within 1/1100 of an integer, which float32 could not pass. Where
    only one weight does, as 1/2, its sums are exact.
    """
    index, fixed = resample_taps(size_in, size_out)
    columns, first = np.arange(size_out), (fixed != 0).argmax(0)
    last = len(fixed) - 1 - (fixed[::-1] != 0).argmax(0)
    exact, place = np.unique(np.where(last > first, fixed[last, columns], 0.0), return_inverse=True)
    exact /= 1 << WEIGHT_BITS
    differences = np.arange(1.0, 256)[:, None]
    added = np.floor(differences * exact + 0.5)
    least, most = ((added - 0.5) / differences).max(0), ((added + 0.5) / differences).min(0)
    halves = exact * 256 % 1 == 0  # what a difference of up to 255 gives may be a level and a half
    weight = np.where(halves, exact, (least + most) / 2)
    return index[first, columns], weight[place].astype(np.float32)


def _normalise(levels: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """torchvision's ToTensor and Normalize to the last bit: three roundings, in this order."""
    np.divide(levels, np.float32(255), out=out)
    out -= mean
    out /= std
