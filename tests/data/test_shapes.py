"""The synthetic data set: the same bytes again, annotations that fit the pixels, and files that others can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fast.data import shapes
from detr_fast.evaluation.panoptic_quality import panoptic_quality
from detr_fast.postprocess import rgb_to_id

SIZE = (96, 128)
IMAGES = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    shapes.write_dataset(out, IMAGES, seed=5, size=SIZE)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def ids_of(folder: Path, annotation: dict[str, Any]) -> np.ndarray:
    return rgb_to_id(np.array(Image.open(folder / "panoptic" / annotation["file_name"])))


def test_same_arguments_give_the_same_bytes(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "CHUNK", 5)
    shapes.write_dataset(tmp_path / "again", IMAGES, seed=5, size=SIZE, workers=2)
    expected = contents(dataset)
    assert len(expected) == 2 * IMAGES + 2
    assert contents(tmp_path / "again") == expected


def test_an_image_does_not_depend_on_how_many_there_are(dataset: Path, tmp_path: Path) -> None:
    shapes.write_dataset(tmp_path / "fewer", 3, seed=5, size=SIZE)
    all_files = contents(dataset)
    fewer = {name: data for name, data in contents(tmp_path / "fewer").items() if not name.endswith(".json")}
    assert len(fewer) == 6
    assert all(all_files[name] == data for name, data in fewer.items())
    assert (
        read(tmp_path / "fewer" / "panoptic.json")["annotations"] == read(dataset / "panoptic.json")["annotations"][:3]
    )


def test_seeds_and_indices_differ() -> None:
    pictures = [shapes.render(seed, index, SIZE).image.tobytes() for seed in range(3) for index in range(3)]
    assert len(set(pictures)) == 9


def test_every_image_is_annotated_pixel_by_pixel(dataset: Path) -> None:
    panoptic = read(dataset / "panoptic.json")
    categories = {category["id"]: category for category in panoptic["categories"]}
    assert [image["id"] for image in panoptic["images"]] == [a["image_id"] for a in panoptic["annotations"]]
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        with Image.open(dataset / "images" / image["file_name"]) as picture:
            assert picture.format == "JPEG" and picture.mode == "RGB"
            assert picture.size == (image["width"], image["height"]) == SIZE[::-1]
        ids, segments = ids_of(dataset, annotation), annotation["segments_info"]
        assert ids.shape == SIZE
        assert sorted(np.unique(ids)) == [s["id"] for s in segments] == list(range(1, len(segments) + 1))
        stuff = [s["category_id"] for s in segments if not categories[s["category_id"]]["isthing"]]
        assert stuff and len(set(stuff)) == len(stuff)
        for segment in segments:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y = columns.min(), rows.min()
            assert segment["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
            assert segment["area"] == len(rows) >= shapes.MIN_AREA * ids.size
            assert segment["iscrowd"] == 0


def test_instances_are_the_things(dataset: Path) -> None:
    panoptic, instances = read(dataset / "panoptic.json"), read(dataset / "instances.json")
    assert instances["images"] == panoptic["images"]
    assert [c["name"] for c in instances["categories"]] == list(shapes.THINGS)
    assert [a["id"] for a in instances["annotations"]] == list(range(1, len(instances["annotations"]) + 1))
    found = iter(instances["annotations"])
    for annotation in panoptic["annotations"]:
        ids = ids_of(dataset, annotation)
        for segment in annotation["segments_info"]:
            if segment["category_id"] <= len(shapes.THINGS):
                instance = next(found)
                assert instance["image_id"] == annotation["image_id"]
                assert all(instance[key] == segment[key] for key in ("category_id", "area", "bbox", "iscrowd"))
                assert np.array_equal(coco_mask.decode(instance["segmentation"]), ids == segment["id"])
    assert next(found, None) is None


def test_pycocotools_finds_the_truth_perfect(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = COCO(str(dataset / "instances.json"))
    results = [{**annotation, "score": 1.0} for annotation in truth.dataset["annotations"]]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_panoptic_quality_of_the_truth_is_perfect(dataset: Path) -> None:
    files = dataset / "panoptic.json", dataset / "panoptic"
    result = panoptic_quality(*files, *files)
    assert result["All"]["pq"] == result["Things"]["pq"] == result["Stuff"]["pq"] == 1.0


def test_a_model_can_count_the_categories() -> None:
    assert [c["id"] for c in shapes.CATEGORIES] == list(range(1, len(shapes.THINGS + shapes.STUFF) + 1))
    assert [c["name"] for c in shapes.CATEGORIES] == [*shapes.THINGS, *shapes.STUFF]
    assert len({tuple(c["color"]) for c in shapes.CATEGORIES}) == len(shapes.CATEGORIES)


def test_every_category_occurs_and_no_segment_is_tiny() -> None:
    segments = [segment for index in range(120) for segment in shapes.render(0, index, (64, 64)).segments]
    assert {s["category_id"] for s in segments} == {c["id"] for c in shapes.CATEGORIES}
    assert min(s["area"] for s in segments) >= shapes.MIN_AREA * 64 * 64


def test_stuff_of_which_too_little_is_seen_becomes_the_stuff_around_it() -> None:
    stuff = np.full((50, 50), shapes.GRASS, np.uint8)
    stuff[0, :7], stuff[1, :8] = shapes.SKY, shapes.SAND  # 0.3 % are 7.5 pixels
    expected = np.where(stuff == shapes.SAND, shapes.SAND, shapes.GRASS)
    assert np.array_equal(shapes._without_slivers(stuff, []), expected)


def test_the_nearest_thing_hides_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is painted, with a flat colour for each class, is what the ids say, the nearest last."""
    painted: list[shapes._Thing] = []

    def paint_flat(rng: np.random.Generator, image: np.ndarray, thing: shapes._Thing, light: Any) -> None:
        image[:, thing.rows, thing.columns][:, thing.mask] = 1000 + thing.kind
        painted.append(thing)

    monkeypatch.setattr(shapes, "_paint", paint_flat)
    monkeypatch.setattr(shapes, "_cast_shadow", lambda image, thing, light, from_above: None)
    monkeypatch.setattr(shapes, "_expose", lambda rng, image, light: image)
    hidden = 0
    for index in range(20):
        painted.clear()
        scene = shapes.render(3, index, SIZE)
        kinds = np.array([0] + [1000 + s["category_id"] - 1 for s in scene.segments])[scene.ids]
        is_thing = kinds < 1000 + len(shapes.THINGS)
        assert np.array_equal(np.where(is_thing, kinds, 0), np.where(scene.image[0] >= 1000, scene.image[0], 0))
        bottoms = [thing.y + thing.radius for thing in painted]
        assert bottoms == sorted(bottoms)
        things = [s for s in scene.segments if s["category_id"] <= len(shapes.THINGS)]
        assert [s["category_id"] for s in things] == [thing.kind + 1 for thing in painted]
        for segment, thing in zip(things, painted, strict=True):
            assert segment["area"] >= shapes.MIN_VISIBLE * shapes._areas()[thing.kind] * thing.radius**2
            hidden += segment["area"] < thing.mask.sum()
    assert hidden > 5


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (200, 33), (480, 640)])
def test_other_sizes(size: tuple[int, int]) -> None:
    for index in range(4):
        scene = shapes.render(1, index, size)
        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        assert scene.ids.shape == size and scene.ids.dtype == np.int32 and scene.ids.min() == 1
        assert scene.image.std() > 10  # a picture, not a plain


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 32 pixels a side, got 31 x 64"):
        shapes.render(0, 0, (31, 64))
    with pytest.raises(ValueError, match="seed and index must not be negative, got -1 and 0"):
        shapes.write_dataset(tmp_path / "out", 1, seed=-1)
    with pytest.raises(ValueError, match="images and workers must be at least 1, got 0 and 1"):
        shapes.write_dataset(tmp_path / "out", 0, seed=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="out must be a new or an empty folder"):
        shapes.write_dataset(tmp_path, 1, seed=0, size=SIZE)
