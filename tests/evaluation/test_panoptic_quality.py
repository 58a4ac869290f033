"""Panoptic quality against known answers, a plain loop over segments, and real photographs' annotations."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fast.evaluation.panoptic_quality import panoptic_quality
from detr_fast.postprocess import id_to_rgb, rgb_to_id

COCO_SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_panoptic_sample"
CATEGORIES = [
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 200, "name": "sky", "isthing": 0},
    {"id": 201, "name": "never", "isthing": 0},
]
# true and predicted [ids, {id: category or (category, "crowd")}]; an image is a strip of pixels
Side = tuple[list[int], dict[int, Any]]


def write_side(folder: Path, images: list[Side]) -> dict[str, Any]:
    """The panoptic JSON of images whose PNGs it writes."""
    folder.mkdir()
    annotations = []
    for number, (ids, categories) in enumerate(images):
        pixels = np.atleast_2d(np.array(ids, dtype=np.int32))
        Image.fromarray(id_to_rgb(pixels)).save(folder / f"{number}.png")
        segments = []
        for segment_id, category in categories.items():
            category, crowd = category if isinstance(category, tuple) else (category, None)
            area = int((pixels == segment_id).sum())
            segments.append({"id": segment_id, "category_id": category, "area": area, "iscrowd": int(bool(crowd))})
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    return {"annotations": annotations, "categories": CATEGORIES}


@pytest.fixture
def quality(tmp_path: Path) -> Any:
    """panoptic_quality of (truth, prediction) pairs."""

    def evaluate(*pairs: tuple[Side, Side]) -> dict[str, Any]:
        truth = write_side(tmp_path / "truth", [truth for truth, _ in pairs])
        prediction = write_side(tmp_path / "prediction", [prediction for _, prediction in pairs])
        del prediction["categories"]
        for annotation in prediction["annotations"]:
            for segment in annotation["segments_info"]:
                del segment["area"], segment["iscrowd"]
        return panoptic_quality(truth, tmp_path / "truth", prediction, tmp_path / "prediction")

    return evaluate


def counts(result: dict[str, Any], category: int) -> tuple[int, int, int]:
    found = result["per_class"][category]
    return found["tp"], found["fp"], found["fn"]


# ---- known answers ----


def test_means_over_the_categories_that_occur(quality: Any) -> None:
    truth = ([5, 5, 5, 5, 6, 6, 9, 9], {5: 1, 6: 7, 9: 200})
    prediction = ([2, 2, 2, 3, 3, 3, 4, 4], {2: 1, 3: 7, 4: 200})
    result = quality((truth, prediction))
    assert result["per_class"][1] == {"pq": 3 / 4, "sq": 3 / 4, "rq": 1.0, "tp": 1, "fp": 0, "fn": 0}
    assert result["per_class"][7] == {"pq": 2 / 3, "sq": 2 / 3, "rq": 1.0, "tp": 1, "fp": 0, "fn": 0}
    assert result["per_class"][201] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 0, "fn": 0}
    assert result["Things"] == pytest.approx({"pq": 17 / 24, "sq": 17 / 24, "rq": 1.0, "n": 2})
    assert result["Stuff"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1}
    assert result["All"] == pytest.approx({"pq": 29 / 36, "sq": 29 / 36, "rq": 1.0, "n": 3})


def test_an_iou_of_exactly_one_half_is_no_match(quality: Any) -> None:
    result = quality((([5, 5, 0, 0], {5: 1}), ([0, 2, 0, 0], {2: 1})))
    assert counts(result, 1) == (0, 1, 1)
    assert result["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 1}


def test_a_split_and_a_merged_segment(quality: Any) -> None:
    split = (([5] * 6, {5: 1}), ([2] * 4 + [3] * 2, {2: 1, 3: 1}))
    merged = (([5] * 4 + [6] * 2, {5: 7, 6: 7}), ([2] * 6, {2: 7}))
    result = quality(split, merged)
    assert counts(result, 1) == (1, 1, 0) and result["per_class"][1]["sq"] == 4 / 6
    assert counts(result, 7) == (1, 0, 1) and result["per_class"][7]["pq"] == 4 / 6 / 1.5


def test_another_category_is_both_false_and_missed(quality: Any) -> None:
    result = quality((([5, 5], {5: 1}), ([2, 2], {2: 7})))
    assert counts(result, 1) == (0, 0, 1)
    assert counts(result, 7) == (0, 1, 0)


def test_void_counts_in_no_union_and_excuses_what_lies_in_it(quality: Any) -> None:
    truth = ([5, 5, 0, 0, 0, 0, 9, 9], {5: 1, 9: 200})
    prediction = ([2, 2, 2, 2, 3, 3, 3, 4], {2: 1, 3: 7, 4: 7})
    result = quality((truth, prediction))
    assert counts(result, 1) == (1, 0, 0) and result["per_class"][1]["sq"] == 1.0
    assert counts(result, 7) == (0, 1, 0)  # 3 has two of three pixels in void, 4 none


def test_half_in_void_is_not_enough(quality: Any) -> None:
    assert counts(quality((([0, 9], {9: 200}), ([3, 3], {3: 7}))), 7) == (0, 1, 0)


def test_a_true_id_that_is_only_in_the_png_is_not_void(quality: Any) -> None:
    assert counts(quality((([8, 8, 8], {}), ([3, 3, 3], {3: 7}))), 7) == (0, 1, 0)


def test_a_crowd_matches_nothing_and_excuses_its_own_category(quality: Any) -> None:
    truth = ([5] * 6 + [0], {5: (1, "crowd")})
    prediction = ([2, 2, 3, 3, 3, 3, 3], {2: 7, 3: 1})
    result = quality((truth, prediction))
    assert counts(result, 1) == (0, 0, 0)
    assert counts(result, 7) == (0, 1, 0)


def test_the_last_of_several_crowds_of_a_category_excuses(quality: Any) -> None:
    truth = ([5, 5, 6, 6], {5: (1, "crowd"), 6: (1, "crowd")})
    assert counts(quality((truth, ([2, 2, 3, 3], {2: 1, 3: 1}))), 1) == (0, 1, 0)


def test_nothing_at_all(quality: Any) -> None:
    result = quality((([0, 0], {}), ([0, 0], {})))
    assert result["All"] == result["Things"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


# ---- against a plain loop ----


def plain(pairs: list[tuple[Side, Side]]) -> dict[int, list[float]]:
    """IoU sum, true positives, false positives, false negatives of each category, a segment at a time."""
    totals: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
    for (gt_pixels, gt_categories), (pred_pixels, pred_categories) in pairs:
        gt, pred = np.array(gt_pixels), np.array(pred_pixels)
        crowds = {c[0]: g for g, c in gt_categories.items() if isinstance(c, tuple)}
        missed = {g: c for g, c in gt_categories.items() if not isinstance(c, tuple)}
        for p, category in pred_categories.items():
            matches = False
            for g, gt_category in list(missed.items()):
                shared = ((gt == g) & (pred == p)).sum()
                iou = shared / (((gt == g) | (pred == p)) & ~((gt == 0) & (pred == p))).sum()
                if gt_category == category and iou > 0.5:
                    totals[category][0] += iou
                    totals[category][1] += 1
                    matches = True
                    del missed[g]
            excused = (gt == 0) | (gt == crowds.get(category, 0))
            if not matches and (excused & (pred == p)).sum() / (pred == p).sum() <= 0.5:
                totals[category][2] += 1
        for category in missed.values():
            totals[category][3] += 1
    return totals


def random_pair(rng: np.random.Generator) -> tuple[Side, Side]:
    """Coarse random maps, the second mostly like the first, ids over the whole 24 bits."""
    labels = rng.integers(0, 9, (7, 9))
    other = np.where(rng.random((7, 9)) < 0.35, rng.integers(0, 9, (7, 9)), labels)
    gt_ids, pred_ids = (np.concatenate([[0], rng.choice(2**24 - 1, 8, replace=False) + 1]) for _ in range(2))
    gt, pred = gt_ids[np.kron(labels, np.ones((4, 5), int))], pred_ids[np.kron(other, np.ones((4, 5), int))]
    choices = [1, 1, 7, 200]
    categories = rng.choice(choices, 9)
    gt_segments: dict[int, Any] = {}
    pred_segments: dict[int, Any] = {}
    for label in range(1, 9):
        kind = int(categories[label])
        if label in labels and rng.random() < 0.9:
            gt_segments[int(gt_ids[label])] = (kind, "crowd") if rng.random() < 0.2 else kind
        if label in other:
            pred_segments[int(pred_ids[label])] = kind if rng.random() < 0.8 else int(rng.choice(choices))
    return (gt.tolist(), gt_segments), (pred.tolist(), pred_segments)


def test_random_maps_equal_the_plain_loop(quality: Any) -> None:
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng) for _ in range(60)]
    result, expected = quality(*pairs), plain(pairs)
    assert min(expected[1]) > 20  # the maps do exercise matches, false positives and misses
    qualities = []
    for category, (iou, tp, fp, fn) in expected.items():
        assert counts(result, category) == (tp, fp, fn)
        if tp + fp + fn:
            qualities.append(iou / (tp + fp / 2 + fn / 2))
            assert result["per_class"][category]["pq"] == pytest.approx(qualities[-1], abs=1e-12)
    assert result["All"]["pq"] == pytest.approx(np.mean(qualities), abs=1e-12)


# ---- real annotations ----


@pytest.fixture(scope="module")
def coco_sample() -> dict[str, Any]:
    if not COCO_SAMPLE.is_dir():
        pytest.skip("the two COCO photographs of ../shared/data are not here")
    return json.loads((COCO_SAMPLE / "panoptic.json").read_text())


def test_photographs_against_themselves_are_perfect(coco_sample: dict[str, Any]) -> None:
    files = COCO_SAMPLE / "panoptic.json", COCO_SAMPLE / "panoptic"
    result = panoptic_quality(*files, *files)
    used = {s["category_id"] for a in coco_sample["annotations"] for s in a["segments_info"] if not s["iscrowd"]}
    assert result["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": len(used)}
    assert set(result["per_class"]) == {category["id"] for category in coco_sample["categories"]}


def test_photographs_against_shifted_copies_equal_the_plain_loop(coco_sample: dict[str, Any], tmp_path: Path) -> None:
    pairs: list[tuple[Side, Side]] = []
    for annotation in coco_sample["annotations"]:
        truth = rgb_to_id(np.array(Image.open(COCO_SAMPLE / "panoptic" / annotation["file_name"])))
        moved = np.roll(truth, (9, -13), (0, 1))
        segments = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        crowds = {s["id"]: (s["category_id"], "crowd") for s in annotation["segments_info"] if s["iscrowd"]}
        pairs.append(((truth.tolist(), segments | crowds), (moved.tolist(), segments)))
    prediction = write_side(tmp_path / "moved", [prediction for _, prediction in pairs])
    for annotation, source in zip(prediction["annotations"], coco_sample["annotations"], strict=True):
        annotation["image_id"] = source["image_id"]
    result = panoptic_quality(coco_sample, COCO_SAMPLE / "panoptic", prediction, tmp_path / "moved")
    expected = plain(pairs)
    assert 0 < result["All"]["pq"] < 0.9
    for category, (iou, tp, fp, fn) in expected.items():
        assert counts(result, category) == (tp, fp, fn)
        assert result["per_class"][category]["sq"] * tp == pytest.approx(iou, abs=1e-9)


# ---- inputs that do not fit together ----


def spoil(change: str, truth: dict[str, Any], prediction: dict[str, Any], folder: Path) -> None:
    segments = prediction["annotations"][0]["segments_info"]
    match change:
        case "id in PNG only":
            segments.pop()
        case "id in JSON only":
            segments.append({"id": 77, "category_id": 1})
        case "id twice":
            segments.append(segments[0])
        case "unknown category":
            segments[0]["category_id"] = 999
        case "unknown true category":
            truth["annotations"][0]["segments_info"][0]["category_id"] = 999
        case "no prediction":
            prediction["annotations"].clear()
        case "no field":
            del truth["annotations"][0]["segments_info"][0]["iscrowd"]
        case "another size":
            Image.new("RGB", (9, 9)).save(folder / "0.png")
        case "grey PNG":
            Image.new("L", (4, 1)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("id in PNG only", "image 0: segment ids 3 are in its PNG and not in its JSON"),
        ("id in JSON only", "image 0: segment ids 77 are in its JSON and not in its PNG"),
        ("id twice", "image 0: segments_info lists id 2 twice"),
        ("unknown category", "prediction for image 0: segment 2 has unknown category_id 999"),
        ("unknown true category", "ground truth of image 0: segment 5 has unknown category_id 999"),
        ("no prediction", "no prediction for 1 of 1 images, first image 0"),
        ("no field", "ground truth of image 0, segment 5 has no 'iscrowd'"),
        ("another size", "image 0: the ground truth's PNG is 4 x 1 pixels, the prediction's 9 x 9"),
        ("grey PNG", "must be RGB, got mode L"),
    ],
)
def test_what_does_not_fit_is_named(change: str, message: str, tmp_path: Path) -> None:
    truth = write_side(tmp_path / "truth", [([5, 5, 6, 6], {5: 1, 6: 7})])
    prediction = write_side(tmp_path / "prediction", [([2, 2, 3, 3], {2: 1, 3: 7})])
    sound = copy.deepcopy((truth, prediction))
    assert panoptic_quality(sound[0], tmp_path / "truth", sound[1], tmp_path / "prediction")["All"]["pq"] == 1.0
    spoil(change, truth, prediction, tmp_path / "prediction")
    for kind in (ValueError, KeyError):
        with pytest.raises(kind) as caught:
            panoptic_quality(truth, tmp_path / "truth", prediction, tmp_path / "prediction")
        assert message in str(caught.value) == caught.value.args[0]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    truth = write_side(tmp_path / "truth", [([5, 5], {5: 1})])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"pred_json: no file .*gone\.json"):
        panoptic_quality(truth, tmp_path / "truth", tmp_path / "gone.json", tmp_path / "truth")
    with pytest.raises(ValueError, match=r"gt_json: .*broken\.json is not JSON"):
        panoptic_quality(tmp_path / "broken.json", tmp_path / "truth", truth, tmp_path / "truth")
    with pytest.raises(FileNotFoundError, match="pred_folder: no folder"):
        panoptic_quality(truth, tmp_path / "truth", truth, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty.0\.png"):
        panoptic_quality(truth, tmp_path / "truth", truth, tmp_path / "empty")
