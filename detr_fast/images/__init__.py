"""Pictures without torch: files to RGB pixels, pixels to what a DETR reads, id maps to PNG and run lengths."""

from detr_fast.images.batching import batches_of_one_size
from detr_fast.images.encoding import grey_png, panoptic_png, run_lengths
from detr_fast.images.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SENT_BYTES,
    Pixels,
    image_to_array,
    normalise,
    pixels_of,
    prepare,
    resized_for_normalise,
)
from detr_fast.images.reading import ImageSource, read_image

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SENT_BYTES",
    "ImageSource",
    "Pixels",
    "batches_of_one_size",
    "grey_png",
    "image_to_array",
    "normalise",
    "panoptic_png",
    "pixels_of",
    "prepare",
    "read_image",
    "resized_for_normalise",
    "run_lengths",
]
