"""An image on disk or in memory -> an RGB picture -> the tensor a DETR reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
            return _to_rgb(source, exif)
    if isinstance(source, str | os.PathLike):
        with _naming(os.fspath(source)), Image.open(source) as image:
            return _to_rgb(image, exif)
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
    if image.format == "EPS":
        raise ValueError("EPS is a program, which would be run")
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _high_byte(image)
    if image.mode == "F":
        _check_range(np.asarray(image), 255)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
    return image.convert("RGB")


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


def image_to_tensor(image: Image.Image, size: int = 800, max_size: int | None = 1333) -> Tensor:
    """An RGB picture, resized by `resized_size` with Pillow's bilinear filter, normalised by ImageNet's mean and std.

    Equal to facebookresearch/detr's RandomResize([size], max_size), ToTensor and Normalize to the last bit.

    Returns:
        float32 [3, h, w].

    Raises:
        ValueError: the picture is not RGB, or `resized_size` refuses it.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be an RGB picture, as read_image gives, got mode {image.mode}")
    width, height = resized_size(*image.size, size, max_size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    out = np.empty((3, height, width), dtype=np.float32)
    # Plane by plane and in place. Measured at 800 x 1066 on one core: 2.5 ms, a lookup table 2.9 to 4, torch on
    # whole arrays 3.2 to 4.5; the resize before it takes 6.4.
    for plane, band, mean, std in zip(out, resized.split(), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        np.divide(np.asarray(band), np.float32(255), out=plane)
        plane -= np.float32(mean)
        plane /= np.float32(std)
    return torch.from_numpy(out)


# ---- on any device ----

# Pillow resizes 8-bit images in fixed point, with weights in units of 2**-22: 255 times their sum fits int32.
WEIGHT_BITS = 22


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
    ((width, height),) = sizes
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
