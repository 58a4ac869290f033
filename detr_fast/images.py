"""An image on disk or in memory -> an RGB picture -> the array a DETR reads.

No torch here: the processes that read images for `detr-fast label` need none, and start in a tenth of the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NORMALISED_AT_ONCE = 1 << 16  # values, 256 KiB of float32
# Of one product of matrices, so that OpenBLAS leaves it to one thread, and what it works on stays in the cache.
ROWS_ADDED = 8
COLUMNS_ADDED = 16
MULTIPLICATIONS = 1 << 17

# Pillow resizes 8-bit images in fixed point, with weights in units of 2**-22: 255 times their sum fits int32.
WEIGHT_BITS = 22

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray


def read_image(source: ImageSource, exif: bool = True) -> Image.Image:
    """Any image as an RGB picture of 8 bits a channel.

    Alpha is dropped, as `Image.convert("RGB")` does. Of 16-bit grey the high byte is taken, which is what Pillow does
    to 16-bit colour. Of an animation the first frame is read, or the current one of an open PIL image.

    JPEGs are decoded in full: Pillow's draft mode scales inside the DCT, which never gives the pixels that decoding
    and then filtering gives.

    Args:
        source: a path, a PIL image of any mode, or a uint8 array [H, W, 3], [H, W, 4], [H, W, 1] or [H, W].
        exif: turn the picture the way its EXIF orientation says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, truncated, of zero size, above Pillow's limit on pixels; an array of another layout.
        TypeError: something that is none of the above, or an array that is not uint8.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"{source.mode} image"
        with _naming(name):
            picture = _to_rgb(source, exif)
        return picture.copy() if picture is source else picture
    if isinstance(source, str | os.PathLike):
        with _naming(os.fspath(source)), Image.open(source) as image:
            picture = _to_rgb(image, exif)
            picture.load()
        return picture
    raise TypeError(f"image must be a path, a PIL image or a uint8 array [H, W, 3], got {type(source).__name__}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises on a file into one line that names it.

    Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, IndexError and more on damaged files.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name}: a folder, not an image") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image, or of a format that Pillow cannot read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too large, Pillow's limit is {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read as an image: {reason}") from error


def _to_rgb(image: Image.Image, exif: bool) -> Image.Image:
    """The image itself, perhaps not loaded yet, where there is nothing to do: Pillow would copy it twice."""
    if image.format == "EPS":
        raise ValueError("EPS is a program, which would be run")
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    if exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _high_byte(image)
    if image.mode == "F":
        _check_range(np.asarray(image), 255)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    _check_range(pixels, 65535)
    # mode I holds 16-bit files (PGM, and PNG in older Pillow) as well as 8-bit values that were merely widened
    if image.mode != "I" or pixels.max() > 255:
        pixels = pixels >> 8
    return Image.fromarray(pixels.astype(np.uint8))


def _check_range(pixels: np.ndarray, largest: int) -> None:
    if not (pixels.min() >= 0 and pixels.max() <= largest):  # false for NaN
        raise ValueError(f"pixels must be in [0, {largest}], got [{pixels.min()}, {pixels.max()}]")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(f"image must be a uint8 array with values 0 to 255, got {array.dtype}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"image must be an array [H, W, 3] (or [H, W], [H, W, 1], [H, W, 4]), got {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"image must have pixels, got an array {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(array).convert("RGB")


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
    """Writes what `resized_for_normalise` gives, uint8 [at most h, w, 3], normalised by ImageNet's mean and std, to
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


def _normalise(levels: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """torchvision's ToTensor and Normalize to the last bit: three roundings, in this order."""
    np.divide(levels, np.float32(255), out=out)
    out -= mean
    out /= std
