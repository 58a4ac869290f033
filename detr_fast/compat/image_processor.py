"""transformers' DetrImageProcessor: same options, same numbers, without transformers or torchvision."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast import postprocess
from detr_fast.checkpoint.download import hub_file
from detr_fast.data.layout import panoptic_ids
from detr_fast.files import write_atomic
from detr_fast.images import IMAGENET_MEAN, IMAGENET_STD, read_image
from detr_fast.resampling import transformers_resized_size

CONFIG_NAME = "preprocessor_config.json"
FORMATS = ("coco_detection", "coco_panoptic")
LAYOUTS = ("channels_first", "channels_last")
SIZE_KEYS = ({"shortest_edge", "longest_edge"}, {"height", "width"}, {"max_height", "max_width"})

TensorKind = Literal["pt", "np"] | None


class BatchFeature(dict):
    """A dict whose entries are attributes too; what a model takes as `model(**features)`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no entry {name!r}; there are {', '.join(self)}")
        return self[name]

    def to(
        self,
        device: str | int | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Moves every tensor to `device` and casts the floating-point ones to `dtype`; labels are moved only.

        As with `Tensor.to`, a dtype may stand first. Changes this object and returns it.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for key, value in self.items():
            if isinstance(value, Tensor):
                cast = dtype if value.is_floating_point() else None
                self[key] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
            elif isinstance(value, list) and all(isinstance(item, BatchFeature) for item in value):
                self[key] = [item.to(device, non_blocking=non_blocking) for item in value]
        return self


class DetrImageProcessor:
    """Images, with or without COCO annotations -> inputs of `DetrForObjectDetection` and `DetrForSegmentation`.

    Options and defaults are those of transformers' DetrImageProcessor, and so are the results, which its PIL processor
    (image_processing_pil_detr.py of 5.23, image_processing_detr.py of 4.57) gives bit for bit. Beyond it, images that
    are not RGB are converted, and paths are read.

    Args:
        format: of annotations, "coco_detection" or "coco_panoptic".
        do_resize: resize to `size`.
        size: {"shortest_edge", "longest_edge"} keeps the aspect ratio, {"max_height", "max_width"} too, {"height",
            "width"} does not; an int is a shortest edge, a pair is (height, width).
        resample: a `PIL.Image.Resampling`.
        do_rescale, rescale_factor: multiply pixels by the factor.
        do_normalize, image_mean, image_std: subtract the mean, divide by the standard deviation; one number, or three.
        do_convert_annotations: boxes as (cx, cy, w, h) in [0, 1]; by default as `do_normalize`.
        do_pad: pad at the right and bottom with zeros, after normalising, to the batch's largest size or to `pad_size`.
        pad_size: {"height", "width"}.
        max_size: the longest edge that goes with an int `size`; 1333 by default.
        pad_and_return_pixel_mask: `do_pad`'s old name.

    Raises:
        ValueError, TypeError: an option with a value that is not accepted; the message names it.
    """

    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(
        self,
        format: str = "coco_detection",
        do_resize: bool = True,
        size: int | Sequence[int] | Mapping[str, int | None] | None = None,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_annotations: bool | None = None,
        do_pad: bool = True,
        pad_size: Mapping[str, int | None] | None = None,
        *,
        max_size: int | None = None,
        pad_and_return_pixel_mask: bool | None = None,
    ) -> None:
        self.format = getattr(format, "value", format)  # transformers has an enum of the same strings
        self.do_resize = do_resize
        self.size = _size_dict(size, max_size)
        self.resample = int(Image.Resampling(resample))
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = _per_channel("image_std", IMAGENET_STD if image_std is None else image_std)
        self.do_convert_annotations = do_normalize if do_convert_annotations is None else do_convert_annotations
        self.do_pad = do_pad if pad_and_return_pixel_mask is None else pad_and_return_pixel_mask
        self.pad_size = None if pad_size is None else _checked_size("pad_size", pad_size, (SIZE_KEYS[1],))
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if 0 in self.image_std:
            raise ValueError(f"image_std must not be 0, got {self.image_std}")

    # ---- options on disk

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> DetrImageProcessor:
        """The options in preprocessor_config.json of a folder, beside a checkpoint file, or of a hub id.

        Defaults where there is no such file; a .json file is read itself. `options` override the file's; `revision`,
        `token`, `cache_dir`, `local_files_only` and `force_download` are passed to the hub.

        Raises:
            ValueError: no such folder or hub id, no network, or a file that is not a JSON object.
        """
        hub_options: dict[str, Any] = {
            key: options.pop(key)
            for key in ("revision", "token", "cache_dir", "local_files_only", "force_download")
            if key in options
        }
        path = Path(name_or_path)
        if path.is_dir():
            file: Path | None = path / CONFIG_NAME
        elif path.is_file():
            file = path if path.suffix == ".json" else path.with_name(CONFIG_NAME)
        else:
            file = hub_file(os.fspath(name_or_path), CONFIG_NAME, **hub_options)
        known = vars(DetrImageProcessor()).keys() | {"max_size", "pad_and_return_pixel_mask"}
        stored = _read_json(file) if file is not None and file.is_file() else {}
        return cls(**{**{key: value for key, value in stored.items() if key in known and value is not None}, **options})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json, which `from_pretrained` reads, transformers' too."""
        file = Path(folder) / CONFIG_NAME
        write_atomic(file, (json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())

    def to_dict(self) -> dict[str, Any]:
        """Every option, in types that JSON has."""
        return {**vars(self), "image_processor_type": "DetrImageProcessor"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    # ---- preprocessing

    def __call__(self, images: Any, *args: Any, **options: Any) -> BatchFeature:
        return self.preprocess(images, *args, **options)

    def preprocess(
        self,
        images: Any,
        annotations: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | os.PathLike[str] | None = None,
        *,
        return_tensors: TensorKind = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepares one image or several, which may differ in size.

        Args:
            images: a PIL image, path, array or tensor ([H, W, C] or [C, H, W], told apart by which is 1, 3 or 4 long),
                or a list or a 4-dimensional batch of them. Float pixels are in [0, 1], with `do_rescale=False`, or
                whole numbers in [0, 255].
            annotations: for each image a dict with "image_id" and "annotations" (coco_detection), or with "image_id",
                "file_name" and "segments_info" (coco_panoptic).
            return_segmentation_masks: "masks" in the labels; by default for coco_panoptic only.
            masks_path: folder of the panoptic PNGs.
            return_tensors: "pt" for tensors, "np" for arrays, None for a list of arrays.
            input_data_format: "channels_first" or "channels_last", where the shape leaves a doubt.
            options: as in the constructor, for this call.

        Returns:
            pixel_values float32 [B, 3, H, W]; with `do_pad` pixel_mask int64 [B, H, W], 1 = image, 0 = padding; with
            annotations labels, one BatchFeature an image: boxes [N, 4], class_labels, area, iscrowd [N], image_id [1],
            orig_size, size [2] (height, width) and masks [N, H, W].

        Raises:
            ValueError, TypeError: an empty list, something that is no image, pixels that are NaN or out of range,
                annotations that do not fit; the message names it.
        """
        changes = {key: value for key, value in options.items() if value is not None}
        processor = DetrImageProcessor(**{**vars(self), **changes}) if changes else self
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
        if input_data_format is not None:
            input_data_format = getattr(input_data_format, "value", input_data_format)
            if input_data_format not in LAYOUTS:
                raise ValueError(f"input_data_format must be one of {', '.join(LAYOUTS)}, got {input_data_format!r}")
        pictures = [
            _read(f"images[{index}]", image, input_data_format) for index, image in enumerate(_flat_list(images))
        ]
        if not pictures:
            raise ValueError("images must not be an empty list")
        targets = None
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else annotations
            if len(annotations) != len(pictures):
                raise ValueError(f"annotations must be one for each image, got {len(annotations)} for {len(pictures)}")
            panoptic = processor.format == "coco_panoptic"
            with_masks = panoptic if return_segmentation_masks is None else return_segmentation_masks
            targets = [
                _target(f"annotations[{i}]", annotation, processor.format, _size_of(picture), with_masks, masks_path)
                for i, (annotation, picture) in enumerate(zip(annotations, pictures, strict=True))
            ]
        return processor._process(pictures, targets, return_tensors)

    def _process(
        self, pictures: list[Image.Image | np.ndarray], targets: list[dict[str, Any]] | None, kind: TensorKind
    ) -> BatchFeature:
        arrays = []
        for index, picture in enumerate(pictures):
            if self.do_resize:
                before = _size_of(picture)
                picture = self._resize(f"images[{index}]", picture)
                if targets is not None:
                    targets[index] = _resize_target(targets[index], before, _size_of(picture))
            if targets is not None and self.do_convert_annotations:
                targets[index]["boxes"] = _relative_boxes(targets[index]["boxes"], _size_of(picture))
            arrays.append(self._scale(picture))
        if self.do_pad:
            return self.pad(
                arrays,
                targets,
                return_tensors=kind,
                input_data_format="channels_first",
                update_bboxes=self.do_convert_annotations,
            )
        if kind is None:
            return _features({"pixel_values": arrays}, targets, kind)
        if len({array.shape for array in arrays}) > 1:
            raise ValueError("images that differ in size make a batch only with do_pad=True, or return_tensors=None")
        return _features({"pixel_values": np.stack(arrays)}, targets, kind)

    def _resize(self, name: str, picture: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
        """Pillow resizes 8-bit pixels only: floats in [0, 1] are cut to 8 bits and scaled back."""
        fraction = False
        if isinstance(picture, np.ndarray):
            low, high = picture.min(), picture.max()
            fraction = bool(low >= 0 and high <= 255) and not np.allclose(picture, picture.astype(np.uint8))
            if low < 0 or high > (1 if fraction else 255):
                raise ValueError(f"{name} must hold integers in [0, 255] or fractions in [0, 1], got [{low}, {high}]")
            if fraction:
                if self.do_rescale:
                    warnings.warn(f"{name} is in [0, 1] already: pass do_rescale=False", stacklevel=4)
                picture = (picture.astype(np.float64) * 255).astype(np.float32)
            picture = Image.fromarray(np.ascontiguousarray(picture.astype(np.uint8).transpose(1, 2, 0)))
        resized = picture.resize(self._resized_size(*picture.size), self.resample)
        if not fraction:
            return resized
        return (np.asarray(resized).transpose(2, 0, 1).astype(np.float64) * (1 / 255)).astype(np.float32)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if "shortest_edge" in self.size:
            return transformers_resized_size(width, height, self.size["shortest_edge"], self.size["longest_edge"])
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        scale = min(self.size["max_height"] / height, self.size["max_width"] / width)
        if int(width * scale) < 1 or int(height * scale) < 1:
            raise ValueError(f"an image of {width} x {height} pixels is too thin to be resized")
        return int(width * scale), int(height * scale)

    def _scale(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """Rescales and normalises to [3, H, W]; 8-bit pixels through a table of the results for their 256 values."""
        if isinstance(picture, np.ndarray):
            return self._scale_values(picture)
        table = self._scale_values(np.tile(np.arange(256, dtype=np.uint8), (3, 1)))
        out = np.empty((3, picture.height, picture.width), dtype=table.dtype)
        for plane, band, values in zip(out, picture.split(), table, strict=True):
            np.take(values, np.asarray(band), out=plane, mode="clip")
        return out

    def _scale_values(self, values: np.ndarray) -> np.ndarray:
        """values [3, ...]; rescaled in float64 and normalised in float32, as transformers does."""
        if self.do_rescale:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            if not np.issubdtype(values.dtype, np.floating):
                values = values.astype(np.float32)
            shape = (3, *[1] * (values.ndim - 1))
            mean, std = (np.array(v, dtype=values.dtype).reshape(shape) for v in (self.image_mean, self.image_std))
            values = (values - mean) / std
        return values

    def pad(
        self,
        images: Sequence[np.ndarray | Tensor],
        annotations: Sequence[dict[str, Any]] | None = None,
        constant_values: float = 0,
        return_pixel_mask: bool = True,
        return_tensors: TensorKind = None,
        *,
        input_data_format: str | None = None,
        update_bboxes: bool = True,
        pad_size: Mapping[str, int | None] | None = None,
    ) -> BatchFeature:
        """Pads images at the right and bottom to the largest height and width among them, or to `pad_size`.

        Args:
            images: arrays or tensors [C, H, W] (or [H, W, C]).
            annotations: labels that go with them; masks are padded, and with `update_bboxes` relative boxes rescaled.
            constant_values: what to pad with.

        Returns:
            pixel_values [B, C, H, W], pixel_mask and labels as `preprocess`.

        Raises:
            ValueError: no images, or one larger than `pad_size`.
        """
        arrays = [
            _channels_first(f"images[{index}]", _to_array(image), input_data_format)
            for index, image in enumerate(images)
        ]
        if not arrays:
            raise ValueError("images must not be an empty list")
        sizes = [array.shape[1:] for array in arrays]
        wanted = self.pad_size if pad_size is None else _checked_size("pad_size", pad_size, (SIZE_KEYS[1],))
        if wanted is None:
            height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        else:
            height, width = wanted["height"], wanted["width"]
        batch = np.full((len(arrays), arrays[0].shape[0], height, width), constant_values, dtype=arrays[0].dtype)
        mask = np.zeros((len(arrays), height, width), dtype=np.int64)
        for index, (array, (h, w)) in enumerate(zip(arrays, sizes, strict=True)):
            if h > height or w > width:
                raise ValueError(f"pad_size must hold every image, got {height} x {width} for one of {h} x {w}")
            batch[index, :, :h, :w] = array
            mask[index, :h, :w] = 1
        data = {"pixel_values": batch, "pixel_mask": mask} if return_pixel_mask else {"pixel_values": batch}
        if annotations is not None:
            annotations = [
                _pad_target(target, size, (height, width), update_bboxes)
                for target, size in zip(annotations, sizes, strict=True)
            ]
        return _features(data, annotations, return_tensors)

    # ---- postprocessing

    post_process = staticmethod(postprocess.post_process)
    post_process_object_detection = staticmethod(postprocess.post_process_object_detection)
    post_process_semantic_segmentation = staticmethod(postprocess.post_process_semantic_segmentation)
    post_process_instance_segmentation = staticmethod(postprocess.post_process_instance_segmentation)
    post_process_panoptic_segmentation = staticmethod(postprocess.post_process_panoptic_segmentation)
    post_process_panoptic = staticmethod(postprocess.post_process_panoptic)
    post_process_segmentation = staticmethod(postprocess.post_process_segmentation)
    post_process_instance = staticmethod(postprocess.post_process_instance)


DetrFeatureExtractor = DetrImageProcessor


# ---- options


def _size_dict(size: int | Sequence[int] | Mapping[str, int | None] | None, max_size: int | None) -> dict[str, int]:
    if size is None:
        size = 800
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": 1333 if max_size is None else max_size}
    elif isinstance(size, Sequence) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    return _checked_size("size", size, SIZE_KEYS)


def _checked_size(name: str, size: Any, accepted: Sequence[set[str]]) -> dict[str, int]:
    given = {key: size[key] for key in dict(size) if size[key] is not None} if hasattr(size, "keys") else size
    if not isinstance(given, dict) or set(given) not in accepted:
        choices = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys in accepted)
        raise ValueError(f"{name} must have the keys {choices}, got {given!r}")
    for key, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}[{key!r}] must be an integer of at least 1, got {value!r}")
    return given


def _per_channel(name: str, values: float | Sequence[float]) -> list[float]:
    channels = [float(values)] * 3 if isinstance(values, int | float) else [float(value) for value in values]
    if len(channels) != 3:
        raise ValueError(f"{name} must be one number or three, got {values!r}")
    return channels


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


# ---- images


def _flat_list(images: Any) -> Iterator[Any]:
    """One by one the images of a single image, a batch [B, ...], or lists of these."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat_list(image)
    elif isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        yield from images
    else:
        yield images


def _read(name: str, image: Any, layout: str | None) -> Image.Image | np.ndarray:
    """An RGB picture if the image has 8 bits a channel, else an array [3, H, W]."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return read_image(image, exif=False)
    if not isinstance(image, np.ndarray | Tensor):
        raise TypeError(f"{name} must be a PIL image, a path, an array or a tensor, got {type(image).__name__}")
    array = _to_array(image)
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise TypeError(f"{name} must be of integers or floats, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} must have pixels, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite pixels")
    array = array[None] if array.ndim == 2 else _channels_first(name, array, layout)
    if array.dtype == np.uint8:
        return read_image(np.ascontiguousarray(array.transpose(1, 2, 0)))
    return np.repeat(array, 3, axis=0) if len(array) == 1 else array[:3]


def _to_array(image: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    image = image.detach().cpu()
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()


def _channels_first(name: str, array: np.ndarray, layout: str | None) -> np.ndarray:
    if array.ndim != 3:
        raise ValueError(f"{name} must be [H, W, C] or [C, H, W], got shape {list(array.shape)}")
    first, _, last = array.shape
    if layout is None:
        layout = "channels_first" if first in (1, 3) or (first == 4 and last not in (1, 3)) else "channels_last"
    if (first if layout == "channels_first" else last) not in (1, 3, 4):
        raise ValueError(f"{name} must have 1, 3 or 4 channels, first or last, got shape {list(array.shape)}")
    return array if layout == "channels_first" else array.transpose(2, 0, 1)


def _size_of(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width)"""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[1:]


# ---- annotations


def _target(
    name: str,
    annotation: Any,
    format: str,
    size: tuple[int, int],
    with_masks: bool,
    masks_path: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """The label of an image of `size` (height, width): boxes (x0, y0, x1, y1) in its pixels, masks [N, H, W]."""
    if format == "coco_detection":
        _check_keys(name, annotation, ("image_id", "annotations"))
        target = _detection_target(name, annotation["annotations"], size, with_masks)
    else:
        _check_keys(name, annotation, ("image_id", "file_name", "segments_info"))
        if masks_path is None:
            raise ValueError("masks_path must be the folder of the panoptic PNGs, got None")
        target = _panoptic_target(name, annotation["segments_info"], Path(masks_path, annotation["file_name"]), size)
        if not with_masks:
            del target["masks"]
    target["image_id"] = np.array([annotation["image_id"]], dtype=np.int64)
    target["orig_size"] = np.array(size, dtype=np.int64)
    return target


def _check_keys(name: str, annotation: Any, keys: Sequence[str]) -> None:
    if not isinstance(annotation, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(annotation).__name__}")
    missing = [key for key in keys if key not in annotation]
    if missing:
        raise ValueError(f"{name} must have the keys {', '.join(keys)}; it lacks {', '.join(missing)}")


def _detection_target(
    name: str, objects: Sequence[dict[str, Any]], size: tuple[int, int], with_masks: bool
) -> dict[str, Any]:
    """Crowds are left out, boxes cut to the image, and objects whose box is then empty left out too."""
    height, width = size
    needed = ("bbox", "category_id", "area", *(["segmentation"] if with_masks else []))
    for index, obj in enumerate(objects):
        _check_keys(f"{name}['annotations'][{index}]", obj, needed)
    objects = [obj for obj in objects if not obj.get("iscrowd", 0)]
    boxes = np.array([obj["bbox"] for obj in objects], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    target = {
        "class_labels": np.array([obj["category_id"] for obj in objects], dtype=np.int64)[keep],
        "boxes": boxes[keep],
        "area": np.array([obj["area"] for obj in objects], dtype=np.float32)[keep],
        "iscrowd": np.zeros(len(objects), dtype=np.int64)[keep],
    }
    if objects and "keypoints" in objects[0]:
        keypoints = np.array([obj["keypoints"] for obj in objects], dtype=np.float32)[keep]
        target["keypoints"] = keypoints.reshape(-1, 3) if len(keypoints) else keypoints
    if with_masks:
        masks = [_decode(obj["segmentation"], height, width) for obj in objects]
        target["masks"] = np.array(masks, dtype=bool).reshape(-1, height, width)[keep]
    return target


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation, polygons or RLE, as bool [height, width]."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return coco_mask.decode(segmentation).astype(bool)
    decoded = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
    return decoded.reshape(height, width, -1).any(axis=2)  # one mask a polygon


def _panoptic_target(name: str, segments: Sequence[dict[str, Any]], png: Path, size: tuple[int, int]) -> dict[str, Any]:
    for index, segment in enumerate(segments):
        _check_keys(f"{name}['segments_info'][{index}]", segment, ("id", "category_id", "iscrowd", "area"))
    picture = read_image(png, exif=False)
    if _size_of(picture) != size:
        raise ValueError(f"{png}: must be as large as its image, {size[0]} x {size[1]}, got {_size_of(picture)}")
    ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
    masks = (panoptic_ids(picture) == ids[:, None, None]).astype(np.uint8)
    empty = [int(i) for i, found in zip(ids, masks.any(axis=(1, 2)), strict=True) if not found]
    if empty:
        raise ValueError(f"{png}: has no pixels of the segments {empty} of {name}")
    return {
        "masks": masks,
        "boxes": _tight_boxes(masks),
        "class_labels": np.array([segment["category_id"] for segment in segments], dtype=np.int64),
        "iscrowd": np.array([segment["iscrowd"] for segment in segments], dtype=np.int64),
        "area": np.array([segment["area"] for segment in segments], dtype=np.float32),
        "size": np.array(size, dtype=np.int64),
    }


def _tight_boxes(masks: np.ndarray) -> np.ndarray:
    """masks [N, H, W], none empty -> float32 [N, 4], first and last column and row that a mask touches (no + 1)."""
    sides = []
    for axis in (1, 2):
        touched = np.any(masks, axis=axis)  # [N, W], then [N, H]
        sides.append((touched.argmax(1), touched.shape[1] - 1 - touched[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = sides
    return np.stack((x0, y0, x1, y1), axis=1).astype(np.float32)


def _resize_target(target: dict[str, Any], before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
    ratio_y, ratio_x = after[0] / before[0], after[1] / before[1]
    resized = {
        **target,
        "size": np.array(after, dtype=np.int64),
        "boxes": target["boxes"] * np.array([ratio_x, ratio_y, ratio_x, ratio_y], dtype=np.float32),
        "area": target["area"] * (ratio_x * ratio_y),
    }
    if "masks" in target:
        width_height = after[1], after[0]
        resized["masks"] = np.empty((len(target["masks"]), *after), dtype=bool)
        for out, mask in zip(resized["masks"], target["masks"], strict=True):
            out[:] = Image.fromarray(mask.astype(np.uint8)).resize(width_height, Image.Resampling.NEAREST)
    return resized


def _relative_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(x0, y0, x1, y1) in pixels -> (cx, cy, w, h) in [0, 1]"""
    height, width = size
    x0, y0, x1, y1 = boxes.T
    centres = np.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), axis=-1)
    return centres / np.array([width, height, width, height], dtype=np.float32)


def _pad_target(
    target: dict[str, Any], before: tuple[int, int], after: tuple[int, int], update_boxes: bool
) -> dict[str, Any]:
    if before == after:
        return target
    rows, columns = after[0] - before[0], after[1] - before[1]
    padded = {**target, "size": np.array(after, dtype=np.int64)}
    if "masks" in target:
        padded["masks"] = np.pad(target["masks"], ((0, 0), (0, rows), (0, columns)))
    if update_boxes and "boxes" in target:
        ratio = np.array([before[1] / after[1], before[0] / after[0]] * 2)  # float64, as upstream's product
        padded["boxes"] = (target["boxes"] * ratio).astype(target["boxes"].dtype)
    return padded


def _features(
    data: Mapping[str, np.ndarray | list[np.ndarray]], targets: Sequence[dict[str, Any]] | None, kind: TensorKind
) -> BatchFeature:
    """Batches as tensors, arrays, or, for None, lists of arrays."""
    if kind is None:
        data = {key: list(value) for key, value in data.items()}
    features = BatchFeature(_tensors(data) if kind == "pt" else data)
    if targets is not None:
        features["labels"] = [BatchFeature(_tensors(target) if kind == "pt" else target) for target in targets]
    return features


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
