"""Images and their targets against transformers, live, and against facts about facebookresearch/detr."""

from __future__ import annotations

import io
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_fast import categories
from detr_fast.compat.image_processor import BatchFeature, DetrFeatureExtractor, DetrImageProcessor
from detr_fast.config import DetrConfig
from detr_fast.data import transforms as T
from detr_fast.images import image_to_array, normalise, read_image, resized_for_normalise
from detr_fast.preprocess import image_to_tensor
from detr_fast.resampling import resized_size, transformers_resized_size

SAMPLE = Path(__file__).parents[3] / "shared/data/coco_panoptic_sample"
SMALL = {"shortest_edge": 80, "longest_edge": 133}


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- sizes

# (width, height) -> facebookresearch/detr's size, transformers' size
SIZES = {
    (640, 480): ((1066, 800), (1066, 800)),
    (480, 640): ((800, 1066), (800, 1066)),
    (427, 640): ((800, 1199), (800, 1199)),
    (1920, 1080): ((1333, 750), (1333, 750)),
    (200, 3000): ((89, 1335), (89, 1333)),
    (3000, 200): ((1335, 89), (1333, 89)),
    (99, 1001): ((132, 1334), (132, 1333)),
    (800, 800): ((800, 800), (800, 800)),
    (1333, 800): ((1333, 800), (1333, 800)),
    (1, 1000): ((1, 1000), (1, 1000)),
}


@pytest.mark.parametrize(("given_size", "expected"), SIZES.items())
def test_sizes_of_both_upstreams(given_size, expected):
    assert (resized_size(*given_size), transformers_resized_size(*given_size)) == expected


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 900), st.integers(1, 1400) | st.none())
def test_transformers_size_rule(width, height, size, max_size):
    upstream = pytest.importorskip("transformers.image_transforms", reason="transformers is not installed")
    expected = upstream.get_size_with_aspect_ratio((height, width), size, max_size)
    if 0 in expected:
        with pytest.raises(ValueError, match="too thin"):
            transformers_resized_size(width, height, size, max_size)
    else:
        assert transformers_resized_size(width, height, size, max_size) == expected[::-1]


@settings(deadline=None)
@given(st.integers(100, 4000), st.integers(100, 4000))
def test_size_rule_keeps_the_limits_and_mirrors(width, height):
    w, h = resized_size(width, height)
    assert resized_size(height, width) == (h, w)
    assert min(w, h) <= 800
    # rounding the short side moves the long side by half the aspect ratio at most
    assert max(w, h) <= 1333 + max(width, height) / min(width, height) / 2 + 1


# ---- pixels


def test_image_to_tensor_is_to_tensor_and_normalize_to_the_last_bit():
    image = Image.fromarray(noise(61, 47))
    out = image_to_tensor(image, 80, 133)
    resized = torch.from_numpy(np.array(image.resize((103, 80), Image.Resampling.BILINEAR)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized.float() / 255 - mean) / std
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert torch.equal(out, expected.permute(2, 0, 1))
    by_transforms = T.Compose([T.RandomResize([80], 133), T.ToTensor(), T.Normalize(mean.tolist(), std.tolist())])
    assert torch.equal(out, by_transforms(image, None)[0])


def assert_normalised_as_by_pillow(pixels, width, height):
    image, out = Image.fromarray(pixels), np.empty((height, width, 3), np.float32)
    normalise(resized_for_normalise(image, width, height), out)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    assert np.array_equal(out.transpose(2, 0, 1), image_to_array(resized, min(width, height), None))


@pytest.mark.parametrize("size", [(1, 1), (40_000, 3), (90, 300), (200, 100)])
@pytest.mark.parametrize("rows", [1, 99, 300])
def test_normalise_gives_the_same_in_another_order(size, rows):
    """In parts of several rows, of one, and of more than there are; with rows that are added, removed, or neither."""
    assert_normalised_as_by_pillow(noise(7, rows), *size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 900))
def test_added_rows_and_columns_are_pillows_at_any_size(size, added):
    pixels = np.random.default_rng(size).choice(np.array([0, 1, 2, 5, 250, 254, 255], np.uint8), (size, 5, 3))
    assert_normalised_as_by_pillow(pixels, 5, size + added)
    assert_normalised_as_by_pillow(pixels.transpose(1, 0, 2).copy(), size + added, 5)


@pytest.mark.parametrize("size", [3, 5, 7, 64, 333])
def test_added_rows_and_columns_are_pillows_for_every_pair_of_levels(size):
    pairs = np.indices((256, 258)).clip(max=255).astype(np.uint8).reshape(2, -1, 3)
    assert_normalised_as_by_pillow(pairs, pairs.shape[1], size)
    assert_normalised_as_by_pillow(pairs.transpose(1, 0, 2).copy(), size, pairs.shape[1])


def test_image_to_tensor_wants_rgb():
    with pytest.raises(ValueError, match="mode L"):
        image_to_tensor(Image.new("L", (4, 4)))


# ---- reading


def test_a_picture_in_memory_is_left_alone():
    image = Image.fromarray(noise(8, 6))
    picture = read_image(image)
    picture.paste("red", (0, 0, 8, 6))
    assert np.array_equal(np.asarray(image), noise(8, 6))


def saved(path, mode, format, **options):
    image = Image.fromarray(noise(8, 6)).convert(mode)
    image.save(path, format, **options)
    return image.convert("RGB")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("CMYK", "TIFF"),
        ("LAB", "TIFF"),
        ("RGB", "TIFF"),
        ("RGB", "PPM"),
    ],
)
def test_lossless_formats_and_modes(tmp_path, mode, format):
    expected = saved(tmp_path / "x", mode, format)
    image = read_image(tmp_path / "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(("mode", "format"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP")])
def test_lossy_formats(tmp_path, mode, format):
    saved(tmp_path / "x", mode, format)
    expected = np.asarray(Image.open(tmp_path / "x").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "x"))), expected)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours(tmp_path):
    Image.new("P", (2, 1)).save(tmp_path / "x.png", transparency=bytes([10, 128]))
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, extension):
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"x.{extension}")
    for source in (tmp_path / f"x.{extension}", Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        assert np.asarray(read_image(source))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    # where the stored top left corner goes: EXIF 2.3, tag 0x0112
    corner = {1: (0, 0), 2: (7, 0), 3: (7, 5), 4: (0, 5), 5: (0, 0), 6: (5, 0), 7: (5, 7), 8: (0, 7)}[orientation]
    image = Image.new("RGB", (8, 6))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    upright = read_image(tmp_path / "x.png")
    assert upright.size == ((6, 8) if orientation > 4 else (8, 6))
    assert upright.getpixel(corner) == (255, 255, 255)
    assert read_image(tmp_path / "x.png", exif=False).getpixel((0, 0)) == (255, 255, 255)


def test_broken_exif_is_no_orientation(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "x.jpg", exif=b"Exif\0\0garbage garbage!")
    assert read_image(tmp_path / "x.jpg").size == (4, 3)


def test_a_given_picture_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "PNG", exif=exif)
    image = Image.open(buffer)
    assert read_image(image).size == (6, 8)
    assert image.size == (8, 6)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_arrays(shape):
    array = noise(5, 4).reshape(-1)[:20].reshape(4, 5, 1).repeat(4, axis=2)[..., : (*shape, 1)[2]].reshape(shape)
    np.testing.assert_array_equal(np.asarray(read_image(array)), array.reshape(4, 5, -1)[..., :1].repeat(3, axis=2))


def damaged(path, keep, format="PNG"):
    Image.fromarray(noise(64, 64)).save(path, format)
    path.write_bytes(path.read_bytes()[:keep])
    return path


BAD_IMAGES = {
    "missing": (lambda d: d / "x.png", FileNotFoundError, "x.png: no such file"),
    "folder": (lambda d: d, ValueError, "a folder"),
    "empty": (lambda d: damaged(d / "x.png", 0), ValueError, "x.png: not an image"),
    "header": (lambda d: damaged(d / "x.png", 20), ValueError, "x.png: "),
    "truncated png": (lambda d: damaged(d / "x.png", 3000), ValueError, "x.png: .*truncated"),
    "truncated jpeg": (lambda d: damaged(d / "x.jpg", 900, "JPEG"), ValueError, "x.jpg: .*truncated"),
    "truncated webp": (lambda d: damaged(d / "x.webp", 900, "WEBP"), ValueError, "x.webp: "),
    "zero size": (lambda d: Image.new("RGB", (0, 4)), ValueError, "0 x 4"),
    "nan": (lambda d: Image.fromarray(np.full((2, 2), np.nan, np.float32)), ValueError, "nan"),
    "none": (lambda d: None, TypeError, "NoneType"),
    "bytes": (lambda d: b"abc", TypeError, "bytes"),
    "float array": (lambda d: np.zeros((4, 4, 3)), TypeError, "uint8 .*float64"),
    "channels first": (lambda d: np.zeros((3, 8, 9), np.uint8), ValueError, r"\[H, W, 3\].*\[3, 8, 9\]"),
    "batch": (lambda d: np.zeros((1, 8, 9, 3), np.uint8), ValueError, r"\[1, 8, 9, 3\]"),
    "no pixels": (lambda d: np.zeros((0, 9, 3), np.uint8), ValueError, r"\[0, 9, 3\]"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_give_one_clear_line(tmp_path, case):
    source, error, message = BAD_IMAGES[case]
    with pytest.raises(error, match=message) as caught:
        read_image(source(tmp_path))
    assert "\n" not in str(caught.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    saved(tmp_path / "x.png", "RGB", "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="x.png: too large, Pillow's limit is 40 pixels"):
        read_image(tmp_path / "x.png")


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps", "EPS")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg: .*EPS"):
        read_image(tmp_path / "x.jpg")


# ---- transforms


def scene():
    y, x = np.mgrid[:60, :100]
    image = Image.fromarray(np.stack([2 * x, 4 * y, x + y], -1).astype(np.uint8))
    boxes = torch.tensor([[10.0, 5, 40, 30], [50, 20, 95, 55], [0, 40, 12, 60], [60, 0, 100, 10]])
    masks = torch.zeros(4, 60, 100, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return image, {
        "boxes": boxes,
        "masks": masks,
        "labels": torch.tensor([1, 2, 3, 4]),
        "area": torch.tensor([750.0, 1575, 240, 400]),
        "iscrowd": torch.tensor([0, 0, 1, 0]),
        "size": torch.tensor([60, 100]),
    }


# What facebookresearch/detr's transforms gave for each seed:
# size, labels, pixels of each mask, sum of the boxes, sum of the areas, mean pixel
SEEDED = [
    ((35, 29), [2], [567], 2.236, 563.5, -0.8045),
    ((30, 35), [1, 3], [140, 36], 3.123, 184.5, -1.1757),
    ((24, 27), [2], [420], 2.497, 427.8, -0.4013),
    ((36, 48), [1, 2], [180, 532], 3.508, 707.2, -0.7299),
    ((54, 90), [1, 2, 3, 4], [594, 1280, 180, 324], 6.768, 2401.6, -0.4517),
    ((43, 40), [2], [837], 2.539, 837.0, -0.5817),
    ((23, 28), [2], [588], 2.87, 588.0, -0.0577),
    ((48, 80), [1, 2, 3, 4], [480, 1008, 144, 256], 6.768, 1897.6, -0.4522),
]


@pytest.mark.parametrize("seed", range(len(SEEDED)))
def test_seeded_transforms_equal_facebookresearch(seed):
    small = T.Compose([T.RandomResize([40, 50, 60]), T.RandomSizeCrop(20, 40), T.RandomPad(9)])
    pipeline = T.Compose(
        [
            T.RandomHorizontalFlip(),
            T.RandomSelect(T.RandomResize([48, 64], max_size=90), small),
            T.ToTensor(),
            T.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    random.seed(seed)
    torch.manual_seed(seed)
    image, target = pipeline(*scene())
    size, labels, pixels, box_sum, area_sum, mean = SEEDED[seed]
    assert image.shape == (3, *size) and target["size"].tolist() == list(size)
    assert target["labels"].tolist() == labels
    assert target["iscrowd"].tolist() == [int(label == 3) for label in labels]
    assert target["masks"].sum((1, 2)).tolist() == pixels
    assert target["boxes"].sum().item() == pytest.approx(box_sum, abs=1e-3)
    assert target["area"].sum().item() == pytest.approx(area_sum, abs=0.1)
    assert image.double().mean().item() == pytest.approx(mean, abs=1e-4)


def test_crop_removes_what_it_cuts_away():
    image, target = T.crop(*scene(), (0, 45, 30, 55))
    assert image.size == (55, 30)
    assert target["labels"].tolist() == [2, 4]
    assert target["boxes"].tolist() == [[5, 20, 50, 30], [15, 0, 55, 10]]
    assert target["area"].tolist() == [450, 400] == target["masks"].sum((1, 2)).tolist()
    masks_only = {key: value for key, value in scene()[1].items() if key not in ("boxes", "area")}
    assert T.crop(scene()[0], masks_only, (0, 45, 30, 55))[1]["labels"].tolist() == [2, 4]


def test_center_crop_beyond_the_image_pads_masks_like_the_image():
    image, target = T.CenterCrop((80, 120))(*scene())
    assert image.size == (120, 80)
    assert target["masks"].shape == (4, 80, 120)
    assert target["masks"][0].nonzero()[0].tolist() == [5 + 10, 10 + 10]


def test_no_objects():
    image, target = scene()
    target = {key: value[:0] if key != "size" else value for key, value in target.items()}
    for transform in (T.RandomResize([30]), T.RandomSizeCrop(10, 20), T.RandomHorizontalFlip(1.0), T.RandomPad(5)):
        image, target = transform(image, target)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, image.height, image.width)


def test_resize_and_pad():
    image, target = T.resize(*scene(), (50, 90))
    assert image.size == (50, 90) and target["size"].tolist() == [90, 50]
    assert target["boxes"][0].tolist() == [5, 7.5, 20, 45]
    assert target["area"].tolist() == [562.5, 1181.25, 180, 300]
    assert target["masks"][1].nonzero().aminmax(dim=0).max.tolist() == [82, 47]
    padded, target = T.pad(image, target, (3, 7))
    assert padded.size == (53, 97) and target["size"].tolist() == [97, 53]
    assert padded.crop((0, 0, 50, 90)).tobytes() == image.tobytes() and padded.getpixel((52, 0)) == (0, 0, 0)
    assert target["masks"][1].nonzero().aminmax(dim=0).max.tolist() == [82, 47]
    assert T.resize(image, None, 20) == (image.resize((20, 36), Image.Resampling.BILINEAR), None)


def test_random_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="70 x 20 .* 60 x 100"):
        T.RandomCrop((70, 20))(*scene())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_transforms_keep_boxes_and_masks_in_the_image(seed):
    rng = np.random.default_rng(seed)
    width, height, count = (int(v) for v in rng.integers([2, 2, 0], [60, 60, 6]))
    corners = torch.from_numpy(np.sort(rng.random((count, 2, 2)), axis=1) * [width, height])
    boxes = corners.float().reshape(-1, 4)
    target = {"boxes": boxes, "labels": torch.arange(count), "area": (corners[:, 1] - corners[:, 0]).prod(1)}
    target["masks"] = torch.rand(count, height, width) > 0.5
    image = Image.fromarray(noise(width, height))

    twice = T.hflip(*T.hflip(image, target))
    assert np.array_equal(np.asarray(twice[0]), np.asarray(image))
    assert torch.equal(twice[1]["masks"], target["masks"])
    torch.testing.assert_close(twice[1]["boxes"], boxes, atol=1e-5, rtol=0)

    random.seed(seed)
    for transform in (T.RandomResize([20, 40], 80), T.RandomSizeCrop(4, 30), T.RandomPad(7), T.RandomHorizontalFlip()):
        image, target = transform(image, target)
        kept = len(target["labels"])
        assert target["masks"].shape == (kept, image.height, image.width)
        assert target["boxes"].shape == (kept, 4) and len(target["area"]) == kept
        limit = torch.tensor([image.width, image.height] * 2)
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= limit + 1e-3).all()
        assert (target["boxes"][:, 2:] >= target["boxes"][:, :2]).all()


# ---- categories


def test_coco_categories():
    assert len(categories.COCO_PANOPTIC) == 133
    assert all(set(c) == {"id", "name", "isthing", "color"} for c in categories.COCO_PANOPTIC)
    assert sum(c["isthing"] for c in categories.COCO_PANOPTIC) == 80
    assert {c["id"] for c in categories.COCO_PANOPTIC if not c["isthing"]} <= set(range(91, 201))
    assert len(categories.COCO_CLASSES) == 91
    assert [categories.COCO_CLASSES[i] for i in (0, 1, 12, 17, 90)] == ["N/A", "person", "N/A", "cat", "toothbrush"]
    assert categories.COCO_CLASSES.count("N/A") == 11


def test_categories_for():
    own = [{"id": 1, "name": "square", "isthing": 1, "color": [0, 0, 0]}]
    assert categories.categories_for(DetrConfig(num_classes=250), own) == own
    assert categories.categories_for(DetrConfig(num_classes=250), None) == categories.COCO_PANOPTIC
    assert len(categories.categories_for(DetrConfig(num_classes=91), None)) == 80
    made_up = categories.categories_for(DetrConfig(num_classes=5), None)
    assert [c["name"] for c in made_up] == [f"class {i}" for i in range(5)]
    assert len({tuple(c["color"]) for c in made_up}) == 5


# ---- the image processor, live against transformers' PIL one


@pytest.fixture(scope="module")
def upstream():
    return pytest.importorskip(
        "transformers.models.detr.image_processing_pil_detr", reason="transformers 5 is not installed"
    ).DetrImageProcessorPil


def assert_same(ours, theirs):
    """Same keys, shapes, types and every bit."""
    assert set(ours) == set(theirs)
    for key in theirs:
        if key == "labels":
            for our_label, their_label in zip(ours["labels"], theirs["labels"], strict=True):
                assert_same(our_label, their_label)
        else:
            for a, b in zip(ours[key], theirs[key], strict=True):
                assert np.asarray(a).dtype == np.asarray(b).dtype, key
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=key)


SHAPES = [(64, 48), (50, 70), (20, 300), (80, 80)]
MIXED = [noise(*shape, seed) for seed, shape in enumerate(SHAPES)]
PICTURES = [Image.fromarray(array) for array in MIXED]
FRACTIONS = [(array / 255).astype(np.float32) for array in MIXED]

IMAGES = {
    "default size": (PICTURES[0], {}),
    "old size": (PICTURES, {"size": 100, "max_size": 150}),
    "mixed sizes": (PICTURES, {"size": SMALL}),
    "exact size": (PICTURES, {"size": {"height": 33, "width": 44}}),
    "largest size": (PICTURES, {"size": {"max_height": 33, "max_width": 44}}),
    "pad size": (PICTURES, {"size": SMALL, "pad_size": {"height": 150, "width": 160}}),
    "bicubic": (PICTURES, {"size": SMALL, "resample": Image.Resampling.BICUBIC}),
    "no resize": (PICTURES, {"do_resize": False}),
    "no rescale": (PICTURES, {"size": SMALL, "do_rescale": False}),
    "no normalize": (PICTURES, {"size": SMALL, "do_normalize": False}),
    "no pad": (PICTURES[:1] * 2, {"size": SMALL, "do_pad": False}),
    "other constants": (
        PICTURES,
        {"size": SMALL, "rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ),
    "arrays [H, W, C]": (MIXED, {"size": SMALL}),
    "arrays [C, H, W]": ([a.transpose(2, 0, 1) for a in MIXED], {"size": SMALL}),
    "tensors": ([torch.from_numpy(a) for a in MIXED], {"size": SMALL}),
    "a batch": (np.stack([MIXED[0]] * 2), {"size": SMALL}),
    "whole floats": ([a.astype(np.float32) for a in MIXED], {"size": SMALL}),
    "fractions": (FRACTIONS, {"size": SMALL, "do_rescale": False}),
    "fractions unresized": (FRACTIONS, {"do_resize": False, "do_rescale": False}),
    "float64": ([a.astype(np.float64) for a in FRACTIONS], {"do_resize": False, "do_rescale": False}),
}


@pytest.mark.parametrize("kind", ["pt", "np", None])
@pytest.mark.parametrize("case", IMAGES)
def test_pixels_equal_transformers(upstream, case, kind):
    images, options = IMAGES[case]
    theirs = upstream(**options)(images, return_tensors=kind)
    assert_same(DetrImageProcessor(**options)(images, return_tensors=kind), theirs)
    in_the_call = {key: value for key, value in options.items() if key != "max_size"}
    if case != "old size":
        assert_same(DetrFeatureExtractor()(images, return_tensors=kind, **in_the_call), theirs)


def detection_annotation(size, seed):
    """Five objects: 1 is a crowd, 2 is outside the image, 3 has two polygons."""
    rng = np.random.default_rng(seed)
    objects = []
    for index in range(5):
        x, y, w, h = (float(v) for v in rng.random(4) * [*size, *size])
        x += size[0] * (index == 2)
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]] + [[1, 1, 9, 1, 9, 8]] * (index == 3)
        objects.append({"bbox": [x, y, w, h], "category_id": index + 1, "area": w * h, "segmentation": polygons})
        objects[-1]["iscrowd"] = int(index == 1)
    return {"image_id": seed, "annotations": objects}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_segmentation_masks": True},
        {"return_segmentation_masks": True, "do_resize": False},
        {"do_convert_annotations": False},
        {"do_pad": False, "size": {"height": 20, "width": 30}},
    ],
    ids=str,
)
def test_detection_labels_equal_transformers(upstream, options):
    annotations = [detection_annotation(size, seed) for seed, size in enumerate(SHAPES)]
    theirs = upstream(size=SMALL)(PICTURES, annotations, return_tensors="pt", **options)
    ours = DetrImageProcessor(size=SMALL)(PICTURES, annotations, return_tensors="pt", **options)
    assert_same(ours, theirs)
    assert ours["labels"][0]["class_labels"].tolist() == [1, 4, 5]


def test_compressed_rle_equals_its_polygon():
    coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    annotation = detection_annotation(SHAPES[0], 0)
    as_rle = json.loads(json.dumps(annotation))
    for obj in as_rle["annotations"]:
        rle = coco_mask.merge(coco_mask.frPyObjects(obj["segmentation"], 48, 64))
        obj["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    processor = DetrImageProcessor(size=SMALL)
    labels = [processor(PICTURES[0], a, return_segmentation_masks=True)["labels"][0] for a in (annotation, as_rle)]
    np.testing.assert_array_equal(labels[0]["masks"], labels[1]["masks"])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the two COCO photographs are not in ../shared/data")
def test_photographs_with_panoptic_labels_equal_transformers(upstream):
    panoptic = json.loads((SAMPLE / "panoptic.json").read_text())
    by_image = {annotation["image_id"]: annotation for annotation in panoptic["annotations"]}
    images = [Image.open(SAMPLE / "images" / record["file_name"]) for record in panoptic["images"]]
    options = {
        "annotations": [by_image[record["id"]] for record in panoptic["images"]],
        "masks_path": SAMPLE / "panoptic",
        "return_tensors": "pt",
    }
    ours = DetrImageProcessor(format="coco_panoptic")(images, **options)
    assert_same(ours, upstream(format="coco_panoptic")(images, **options))
    for image, pixels, mask in zip(images, ours["pixel_values"], ours["pixel_mask"], strict=True):
        height, width = (int(mask.any(axis).sum()) for axis in (1, 0))
        assert (width, height) == resized_size(*image.size) == transformers_resized_size(*image.size)
        assert torch.equal(pixels[:, :height, :width], image_to_tensor(read_image(image)))


def test_images_that_are_not_rgb_are_converted(tmp_path):
    processor = DetrImageProcessor(size=SMALL)
    Image.fromarray(MIXED[0]).save(tmp_path / "x.png")
    expected = processor(PICTURES[0])["pixel_values"][0]
    np.testing.assert_array_equal(processor(tmp_path / "x.png")["pixel_values"][0], expected)
    np.testing.assert_array_equal(processor(PICTURES[0].convert("RGBA"))["pixel_values"][0], expected)
    # a shape that could be four channels is taken for what has three
    thin = noise(9, 4)
    for_sure = processor(thin, input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_array_equal(processor(thin)["pixel_values"][0], for_sure)
    grey = PICTURES[0].convert("L")
    expected = processor(grey.convert("RGB"))["pixel_values"][0]
    for image in (grey, np.asarray(grey), np.asarray(grey)[None], np.asarray(grey, dtype=np.int32)):
        np.testing.assert_array_equal(processor(image)["pixel_values"][0], expected)


def test_pad():
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 2)]
    batch = DetrImageProcessor().pad(images, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 5, 6)
    assert batch.pixel_mask.dtype == torch.int64
    assert torch.equal(batch.pixel_values, batch.pixel_mask[:, None].expand(2, 3, 5, 6).float())
    assert batch.pixel_mask.sum((1, 2)).tolist() == [24, 10]


def test_options_on_disk(tmp_path, upstream):
    ours = DetrImageProcessor(format="coco_panoptic", size=SMALL, image_std=0.5, do_pad=False)
    ours.save_pretrained(tmp_path / "a")
    assert DetrImageProcessor.from_pretrained(tmp_path / "a").to_dict() == ours.to_dict()
    theirs = upstream.from_pretrained(tmp_path / "a")
    assert_same(ours(PICTURES), theirs(PICTURES))
    theirs.save_pretrained(tmp_path / "b")
    assert DetrImageProcessor.from_pretrained(tmp_path / "b").to_dict() == ours.to_dict()
    (tmp_path / "b/model.pth").touch()
    assert DetrImageProcessor.from_pretrained(tmp_path / "b/model.pth", do_pad=True).size == SMALL
    # as facebook/detr-resnet-50-panoptic's on the hub
    old = {"feature_extractor_type": "DetrFeatureExtractor", "format": "coco_panoptic", "max_size": 1000, "size": 600}
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = DetrFeatureExtractor.from_pretrained(tmp_path / "old.json")
    assert (loaded.size, loaded.format) == ({"shortest_edge": 600, "longest_edge": 1000}, "coco_panoptic")
    (tmp_path / "c").mkdir()
    assert DetrImageProcessor.from_pretrained(tmp_path / "c").to_dict() == DetrImageProcessor().to_dict()
    (tmp_path / "c/preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"c/preprocessor_config\.json: not JSON"):
        DetrImageProcessor.from_pretrained(tmp_path / "c")


def test_a_name_that_is_nowhere(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder or file"):
        DetrImageProcessor.from_pretrained(tmp_path / "nowhere")


def test_batch_feature():
    features = BatchFeature(x=torch.zeros(2), n=torch.zeros(2, dtype=torch.int64))
    features["labels"] = [BatchFeature(b=torch.ones(1))]
    assert features.to("cpu", torch.float16) is features
    assert (features.x.dtype, features.n.dtype) == (torch.float16, torch.int64)
    assert features.labels[0].b.dtype == torch.float32
    assert features.to(torch.bfloat16)["x"].dtype == torch.bfloat16
    assert dict(**features).keys() == {"x", "n", "labels"}
    with pytest.raises(AttributeError, match="'y'"):
        features.y  # noqa: B018


def test_fractions_that_would_be_rescaled_twice_warn():
    with pytest.warns(UserWarning, match=r"images\[0\].*do_rescale=False"):
        DetrImageProcessor(size=SMALL)(FRACTIONS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DetrImageProcessor(size=SMALL)(FRACTIONS[0], do_rescale=False)


NAN = np.full((4, 5, 3), np.nan)
BAD_CALLS = {
    "empty list": ({"images": []}, ValueError, "empty list"),
    "not an image": ({"images": [PICTURES[0], 3]}, TypeError, r"images\[1\].*int"),
    "zero size": ({"images": np.zeros((3, 0, 5), np.uint8)}, ValueError, r"images\[0\].*\[3, 0, 5\]"),
    "nan": ({"images": NAN}, ValueError, r"images\[0\].*NaN"),
    "bool": ({"images": NAN > 0}, TypeError, r"images\[0\].*bool"),
    "layout": ({"images": np.zeros((5, 6, 7), np.uint8)}, ValueError, r"1, 3 or 4 channels.*\[5, 6, 7\]"),
    "dimensions": ({"images": np.zeros(5, np.uint8)}, ValueError, r"\[5\]"),
    "range": ({"images": np.full((4, 5, 3), 256)}, ValueError, r"\[0, 255\].*256"),
    "fractions": ({"images": np.full((4, 5, 3), 1.5)}, ValueError, r"\[0, 1\].*1\.5"),
    "size keys": ({"images": PICTURES, "size": {"shortest_edge": 5}}, ValueError, "size must have the keys"),
    "size value": ({"images": PICTURES, "size": {"height": 0, "width": 5}}, ValueError, r"size\['height'\]"),
    "pad size": ({"images": PICTURES, "pad_size": {"height": 9, "width": 9}}, ValueError, "pad_size must hold"),
    "no batch": (
        {"images": PICTURES, "do_pad": False, "do_resize": False, "return_tensors": "pt"},
        ValueError,
        "do_pad=True",
    ),
    "tensors": ({"images": PICTURES, "return_tensors": "tf"}, ValueError, "return_tensors.*'tf'"),
    "format": ({"images": PICTURES, "format": "voc"}, ValueError, "format.*'voc'"),
    "mean": ({"images": PICTURES, "image_mean": [1, 2]}, ValueError, "image_mean"),
    "unknown": ({"images": PICTURES, "do_dance": True}, TypeError, "do_dance"),
    "count": ({"images": PICTURES, "annotations": {}}, ValueError, "got 1 for 4"),
    "keys": ({"images": PICTURES[0], "annotations": {"image_id": 1}}, ValueError, r"\[0\] must .*lacks annotations"),
    "object": (
        {"images": PICTURES[0], "annotations": {"image_id": 1, "annotations": [{"bbox": [0, 0, 1, 1]}]}},
        ValueError,
        r"annotations\[0\]\['annotations'\]\[0\].*lacks category_id, area",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_give_one_clear_line(case):
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message) as caught:
        DetrImageProcessor()(**arguments)
    assert "\n" not in str(caught.value)


def test_panoptic_png_of_another_size_or_without_a_segment(tmp_path):
    Image.new("RGB", (64, 48), (7, 0, 0)).save(tmp_path / "x.png")
    segment = {"id": 7, "category_id": 1, "iscrowd": 0, "area": 1}
    annotation = {"image_id": 1, "file_name": "x.png", "segments_info": [segment]}
    processor = DetrImageProcessor(format="coco_panoptic", size=SMALL)
    label = processor(PICTURES[0], annotation, masks_path=tmp_path)["labels"][0]
    assert label["masks"].all() and label["masks"].shape == (1, 80, 106)
    assert processor(PICTURES[0], {**annotation, "segments_info": []}, masks_path=tmp_path)["labels"][0][
        "masks"
    ].shape == (0, 80, 106)
    with pytest.raises(ValueError, match=r"x\.png: must be as large as its image, 70 x 50, got \(48, 64\)"):
        processor(PICTURES[1], annotation, masks_path=tmp_path)
    with pytest.raises(ValueError, match=r"no pixels of the segments \[8\]"):
        processor(PICTURES[0], {**annotation, "segments_info": [{**segment, "id": 8}]}, masks_path=tmp_path)
    with pytest.raises(ValueError, match="masks_path"):
        processor(PICTURES[0], annotation)
