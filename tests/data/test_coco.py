"""COCO's data sets: targets beside the annotations, augmented pixels beside their masks, and bad annotations named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detr_fast.data import shapes
from detr_fast.data.coco import (
    AnnotationError,
    CocoDetection,
    CocoPanoptic,
    decode_segmentation,
    mask_boxes,
    training_transforms,
)
from detr_fast.postprocess import id_to_rgb
from detr_fast.training.loader import Order, Portions, batches, seeded

SIZE = (60, 90)
IMAGES = 5


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    shapes.write_dataset(out, IMAGES, seed=3, size=SIZE)
    return out


@pytest.fixture
def copy(synthetic: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synthetic, tmp_path / "copy"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def corners(annotation: dict) -> list[float]:
    x, y, width, height = annotation["bbox"]
    return [x, y, x + width, y + height]


def test_panoptic_targets_are_the_annotations(synthetic: Path) -> None:
    content = json.loads((synthetic / "panoptic.json").read_text())
    dataset = CocoPanoptic(synthetic)
    assert len(dataset) == IMAGES and dataset.num_classes == 15
    assert [category["name"] for category in dataset.categories] == [*shapes.THINGS, *shapes.STUFF]
    for index, annotation in enumerate(content["annotations"]):
        image, target = dataset[index]
        scene = shapes.render(3, index, SIZE)
        infos = annotation["segments_info"]
        assert image.size == SIZE[::-1]
        assert target["image_id"].tolist() == [annotation["image_id"]]
        assert target["size"].tolist() == target["orig_size"].tolist() == list(SIZE)
        assert target["labels"].tolist() == [info["category_id"] for info in infos]
        assert target["boxes"].tolist() == [corners(info) for info in infos]
        assert target["area"].tolist() == [info["area"] for info in infos]
        assert np.array_equal(target["masks"].numpy(), [scene.ids == info["id"] for info in infos])


def test_detection_targets_are_the_annotations(synthetic: Path) -> None:
    content = json.loads((synthetic / "instances.json").read_text())
    dataset = CocoDetection(synthetic, masks=True)
    for image, (_, target) in zip(content["images"], dataset, strict=False):
        entries = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert target["labels"].tolist() == [entry["category_id"] for entry in entries]
        assert target["boxes"].tolist() == [corners(entry) for entry in entries]
        assert target["masks"].flatten(1).sum(1).tolist() == [entry["area"] for entry in entries]
    assert "masks" not in CocoDetection(synthetic)[0][1]


def test_layouts_of_coco_and_crowds_and_empty_objects(synthetic: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    shutil.copytree(synthetic / "images", tmp_path / "train2017")
    shutil.copy(synthetic / "instances.json", tmp_path / "annotations" / "instances_train2017.json")

    def change(content: Any) -> None:
        mine = [entry for entry in content["annotations"] if entry["image_id"] == 1]
        content["annotations"] = mine  # the other images have no object
        mine[0]["iscrowd"] = 1
        mine[1]["bbox"][2] = 0

    edit(tmp_path / "annotations" / "instances_train2017.json", change)
    dataset = CocoDetection(tmp_path, masks=True)
    before = json.loads((synthetic / "instances.json").read_text())["annotations"]
    kept = [entry["category_id"] for entry in before if entry["image_id"] == 1][2:]
    assert dataset[0][1]["labels"].tolist() == kept
    assert dataset[1][1]["boxes"].shape == (0, 4) and dataset[1][1]["masks"].shape == (0, *SIZE)
    with pytest.raises(ValueError, match="no panoptic annotations"):
        CocoPanoptic(tmp_path)
    with pytest.raises(ValueError, match="val2017"):
        CocoDetection(tmp_path, "val2017")


def mosaic(folder: Path) -> None:
    """A data set of one image, whose segments are flat in a colour of their own, and of odd forms."""
    rows, columns = np.mgrid[:200, :300]
    ids = np.where((rows - 70) ** 2 + (columns - 90) ** 2 < 60**2, 2, 1)
    ids[(rows > 120) & ((rows // 9 + columns // 11) % 2 == 0)] = 3  # in many pieces
    ids[20:180, 230:240] = 4
    ids[170:180, 60:240] = 4  # an angle, which a crop can leave one leg of
    (folder / "images").mkdir(parents=True)
    (folder / "panoptic").mkdir()
    Image.fromarray((ids * 60).astype(np.uint8)).convert("RGB").save(folder / "images" / "a.png")
    Image.fromarray(id_to_rgb(ids.astype(np.int32))).save(folder / "panoptic" / "a.png")
    segments = [{"id": number, "category_id": number} for number in range(1, 5)]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 300, "height": 200}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": number, "name": str(number)} for number in range(1, 5)],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))


def test_augmentation_keeps_boxes_and_masks_on_their_pixels(tmp_path: Path) -> None:
    mosaic(tmp_path)
    dataset = CocoPanoptic(tmp_path, transforms=training_transforms(160, 267))
    sizes, flipped, fewer = set(), set(), 0
    for seed in range(60):
        with seeded(seed):
            image, target = dataset[0]
        height, width = image.shape[1:]
        sizes.add(min(height, width))
        grey = ((image[0] * 0.229 + 0.485) * 255 / 60).numpy()
        masks = target["masks"]
        fewer += len(masks) < 4
        assert masks.shape == (len(target["labels"]), height, width) and target["size"].tolist() == [height, width]
        assert masks.sum(0).eq(1).all()  # a segment for each pixel, also beside what a crop removed
        for label, mask in zip(target["labels"].tolist(), masks.numpy(), strict=True):
            inner = mask.copy()  # away from outlines, which the bilinear filter blurs
            for shift in (-2, -1, 1, 2):
                inner &= np.roll(mask, shift, 0) & np.roll(mask, shift, 1)
            if inner.any():
                assert np.median(abs(grey[inner] - label)) < 0.4
        cx, cy, w, h = (target["boxes"] * torch.tensor([width, height, width, height])).unbind(1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        assert (boxes - mask_boxes(masks)).abs().max() < 3  # what a nearest pixel of the cut image is wide
        if len(masks) == 4:
            flipped.add(bool(cx[3] < width / 2))
    assert sizes <= {round(side / 5) for side in range(480, 801, 32)} and len(sizes) > 6
    assert flipped == {True, False}
    assert fewer  # some crop removed a segment


def test_batches_depend_on_seed_and_place_alone(synthetic: Path) -> None:
    def made(workers: int, first: int, seed: int = 4) -> list[Any]:
        dataset = CocoPanoptic(synthetic, transforms=training_transforms(48, 80))
        portions = Portions(Order(len(dataset), seed), batch_size=3, accumulate=1, steps=range(first, 4))
        return list(batches(dataset, portions, workers, pin_memory=False))

    expected = made(0, 0)
    images = [target["image_id"].item() for batch in expected for target in batch.targets]
    assert sorted(images[:IMAGES]) == sorted(images[IMAGES : 2 * IMAGES]) == list(range(1, IMAGES + 1))
    assert images[:IMAGES] != images[IMAGES : 2 * IMAGES]
    sizes = {tuple(target["size"].tolist()) for batch in expected for target in batch.targets}
    assert len(sizes) > 4  # each draw has an augmentation of its own
    torch.manual_seed(9)  # of no influence
    for workers, first in ((0, 2), (1, 0), (3, 1)):
        for batch, want in zip(made(workers, first), expected[first:], strict=True):
            assert torch.equal(batch.samples.tensors, want.samples.tensors)
            for target, other in zip(batch.targets, want.targets, strict=True):
                assert target.keys() == other.keys()
                assert all(torch.equal(target[key], other[key]) for key in target)
    assert not torch.equal(made(0, 3, seed=5)[0].samples.tensors, expected[3].samples.tensors)


def test_portions_of_processes_make_up_a_step() -> None:
    order = Order(10, 0)
    whole = list(Portions(order, 8, 1, range(3)))
    parts = [list(Portions(order, 2, 2, range(3), rank, 2)) for rank in (0, 1)]
    for step in range(3):
        draws = [draw for part in (0, 1) for rank in (0, 1) for draw in parts[rank][2 * step + part]]
        assert draws == whole[step]


def set_image(key: str, value: Any) -> Callable[[Any], object]:
    return lambda content: content["images"][2].update({key: value})


def set_segment(**values: Any) -> Callable[[Any], object]:
    return lambda content: content["annotations"][2]["segments_info"][0].update(values)


def set_object(**values: Any) -> Callable[[Any], object]:
    return lambda content: content["annotations"][2].update(values)


# What is wrong, what is said, and how many images are left to use.
PANOPTIC_FAULTS: dict[str, tuple[Callable[[Any], object], str, int]] = {
    "unknown category": (set_segment(category_id=99), "has category_id 99, which is no category", 5),
    "boolean category": (set_segment(category_id=True), "has category_id True", 5),
    "iscrowd": (set_segment(iscrowd="yes"), "has iscrowd 'yes'", 5),
    "segment 0": (set_segment(id=0), "has id 0", 5),
    "no object": (lambda c: c["annotations"][2]["segments_info"].append(3), "an object is int", 5),
    "no file name": (lambda c: c["annotations"][2].pop("file_name"), "must have a file_name", 4),
    "missing image": (set_image("file_name", "none.jpg"), "no file .*none.jpg", 4),
    "missing png": (lambda c: c["annotations"][2].update(file_name="none.png"), "no file .*none.png", 4),
    "same id": (set_image("id", 2), "image id 2 is there twice", 4),
    "no annotation": (lambda c: c["annotations"].pop(2), "000003.jpg has no annotation", 4),
    "two": (lambda c: c["annotations"].append(c["annotations"][0]), "image 1 has two annotations", 5),
    "unlisted": (lambda c: c["annotations"][2].update(image_id=77), "image 77, which is not listed", 4),
}
DETECTION_FAULTS: dict[str, tuple[Callable[[Any], object], str, int]] = {
    "bbox of three": (set_object(bbox=[1, 2, 3]), r"has bbox \[1, 2, 3\]", 5),
    "negative width": (set_object(bbox=[1, 2, -3, 4]), r"has bbox \[1, 2, -3, 4\]", 5),
    "huge": (set_object(bbox=[1, 2, 3, 10**400]), "has bbox", 5),
    "unknown category": (set_object(category_id=None), "category_id None", 5),
    "unlisted": (set_object(image_id=77), "image 77, which is not listed", 5),
}


@pytest.mark.parametrize("fault", [*PANOPTIC_FAULTS, *(f"detection: {name}" for name in DETECTION_FAULTS)])
def test_bad_annotations_are_named_or_skipped(copy: Path, fault: str) -> None:
    kind, name = (CocoDetection, "instances.json") if fault.startswith("detection") else (CocoPanoptic, "panoptic.json")
    change, message, images = (DETECTION_FAULTS | PANOPTIC_FAULTS if kind is CocoPanoptic else DETECTION_FAULTS)[
        fault.removeprefix("detection: ")
    ]
    edit(copy / name, change)
    with pytest.raises(ValueError, match=f"bad annotations, the first: .*{message}"):
        kind(copy)
    dataset = kind(copy, bad_annotations="skip")
    assert len(dataset) == images
    assert dataset.problems and len(list(dataset)) == images


def test_what_is_wrong_with_a_file_is_seen_when_it_is_read(copy: Path) -> None:
    (copy / "images" / "000001.jpg").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(copy / "images" / "000002.jpg")
    Image.new("RGB", (9, 9)).save(copy / "panoptic" / "000003.png")
    Image.new("RGB", SIZE[::-1]).save(copy / "panoptic" / "000004.png")
    dataset = CocoPanoptic(copy)
    for index, message in enumerate(("000001.jpg: not an image", "000002.jpg: 9 x 9, but", "000003.png: 9 x 9, but")):
        with pytest.raises(AnnotationError, match=message):
            dataset[index]
    with pytest.raises(AnnotationError, match="segment 1 has no pixel in .*000004.png"):
        dataset[3]
    skipping = CocoPanoptic(copy, bad_annotations="skip", transforms=training_transforms(48, 80, "none"))
    portions = Portions(Order(IMAGES, 0), IMAGES, 1, range(1))
    (batch,) = batches(skipping, portions, 0, pin_memory=False)
    assert len(batch.targets) == IMAGES  # those that cannot be read are replaced by the next
    assert {target["image_id"].item() for target in batch.targets} == {4, 5}
    assert len({problem for problem in batch.problems if "00000" in problem}) >= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "must have a list 'categories'"),
        (lambda c: c["categories"].clear(), "has no categories"),
        (lambda c: c["categories"][0].update(id=-1), "from 0 to 65535, got -1"),
        (lambda c: c["categories"][0].update(id=2), "category id 2 is there twice"),
        (lambda c: c["categories"][0].update(isthing=5), "isthing of category 1 must be 0 or 1"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "no usable images"),
    ],
)
def test_a_json_of_another_format_is_refused(copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit(copy / "panoptic.json", change)
    with pytest.raises(ValueError, match=message):
        CocoPanoptic(copy, bad_annotations="skip")


def test_segmentations_of_every_kind() -> None:
    square = np.zeros((20, 30), dtype=np.uint8, order="F")
    square[5:15, 4:24] = 1
    compressed = coco_mask.encode(square)["counts"].decode()
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, square.T.ravel(), 2]))).tolist()
    for given in ([[4, 5, 24, 5, 24, 15, 4, 15]], {"size": [20, 30], "counts": compressed},
                  {"size": [20, 30], "counts": runs}):  # fmt: skip
        assert np.array_equal(decode_segmentation(given, 20, 30), square)
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = np.asfortranarray(generator.random((37, 41)) < generator.choice([0, 0.02, 0.5, 1]), dtype=np.uint8)
        rle = {"size": [37, 41], "counts": coco_mask.encode(mask)["counts"].decode()}
        assert np.array_equal(decode_segmentation(rle, 37, 41), mask)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        {},
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1e12] * 6],
        {"size": [30, 20], "counts": [600]},
        {"size": [20, 30], "counts": ""},
        {"size": [20, 30], "counts": "\x00é"},
        {"size": [20, 30], "counts": [599]},
        {"size": [20, 30], "counts": [700, -100]},
        {"size": [20, 30], "counts": 600},
    ],
)
def test_damaged_segmentations_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="polygon|run lengths|segmentation"):
        decode_segmentation(given, 20, 30)
