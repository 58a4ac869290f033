"""An image on disk or in memory -> an RGB picture.

No torch here: the processes that read images for `detr-fast label` need none, and start in a tenth of the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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
