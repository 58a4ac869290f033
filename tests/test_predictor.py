"""`Predictor` and `PanopticResult`."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contract import picture
from detr_fast.checkpoint import save_model
from detr_fast.detr.nested import nested_tensor_from_tensor_list
from detr_fast.postprocess import PostProcessPanoptic, post_process_panoptic_segmentation, rgb_to_id
from detr_fast.predictor import MODES, PanopticResult, Predictor
from detr_fast.preprocess import image_to_tensor
from detr_fast.visualize import draw_segments
from tiny import tiny_detr


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_detr()


def test_segments_describe_the_segmentation(model: torch.nn.Module) -> None:
    result = Predictor(model, device="cpu", threshold=0.2)(picture(97, 61))
    assert result.segmentation.shape == (61, 97)
    assert result.segmentation.dtype == np.int32
    assert len(result.segments_info) >= 3
    assert {info["isthing"] for info in result.segments_info} == {True, False}
    assert {info["id"] for info in result.segments_info} == set(np.unique(result.segmentation)) - {0}
    for info in result.segments_info:
        y, x = np.nonzero(result.segmentation == info["id"])
        assert info["id"] >= 1
        assert info["area"] == len(x)
        assert info["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
        assert 0.2 < info["score"] <= 1
        assert info["category_id"] in result.labels
    png = np.array(Image.open(io.BytesIO(result.to_png())))
    assert np.array_equal(rgb_to_id(png), result.segmentation)


def test_boxes_are_those_of_the_queries_above_the_threshold(model: torch.nn.Module) -> None:
    image = picture(120, 80)
    result = Predictor(model, device="cpu", threshold=0.4)(image)
    with torch.inference_mode():
        outputs = model(image_to_tensor(image)[None])
    scores, labels = outputs["pred_logits"][0].softmax(-1).max(-1)
    kept = (labels != 250) & (scores > 0.4)
    x, y, width, height = outputs["pred_boxes"][0][kept].numpy().T
    expected = np.stack(
        [(x - width / 2) * 120, (y - height / 2) * 80, (x + width / 2) * 120, (y + height / 2) * 80], axis=1
    )
    assert 0 < kept.sum() < 12
    np.testing.assert_allclose(result.boxes, expected, atol=1e-3)
    np.testing.assert_allclose(result.scores, scores[kept], atol=1e-5)
    assert result.labels.tolist() == labels[kept].tolist()


def test_every_source_of_an_image_gives_the_same(model: torch.nn.Module, tmp_path: Path) -> None:
    image = picture(64, 48)
    image.save(tmp_path / "image.png")
    predictor = Predictor(model, device="cpu", threshold=0.0)
    results = [predictor(source) for source in (image, np.array(image), tmp_path / "image.png", [image])]
    assert isinstance(results[-1], list)
    for result in (*results[1:-1], *results[-1]):
        assert np.array_equal(result.segmentation, results[0].segmentation)
        assert np.array_equal(result.boxes, results[0].boxes)


def test_batches_change_nothing_and_keep_the_order(model: torch.nn.Module) -> None:
    sizes = [(96, 64), (64, 96), (96, 64), (100, 37), (64, 96), (96, 64)]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    together = Predictor(model, device="cpu", threshold=0.2, batch_size=3)(images)
    alone = Predictor(model, device="cpu", threshold=0.2, batch_size=1)(images)
    for image, one, other in zip(images, alone, together, strict=True):
        assert one.image.size == image.size
        assert one.to_png() == other.to_png()
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)


def test_mode_detr_is_exactly_postprocesspanoptic(model: torch.nn.Module) -> None:
    images = [picture(90, 60), picture(61, 61, seed=1)]
    results = Predictor(model, device="cpu", threshold=0.2, mode="detr")(images)
    for image, result in zip(images, results, strict=True):
        tensor = image_to_tensor(image)
        with torch.inference_mode():
            outputs = model(nested_tensor_from_tensor_list([tensor]))
        is_thing = {category: category <= 90 for category in range(250)}
        upstream = PostProcessPanoptic(is_thing, 0.2)(
            outputs, [tuple(tensor.shape[-2:])], [(image.height, image.width)]
        )
        expected = rgb_to_id(np.array(Image.open(io.BytesIO(upstream[0]["png_string"]))))
        assert len(upstream[0]["segments_info"]) >= 3
        assert np.array_equal(result.segmentation, expected)
        assert [info["id"] for info in result.segments_info] == [info["id"] for info in upstream[0]["segments_info"]]


def test_mode_transformers_is_exactly_its_panoptic_segmentation(model: torch.nn.Module) -> None:
    image = picture(90, 60)
    result = Predictor(model, device="cpu", threshold=0.2, mode="transformers")(image)
    with torch.inference_mode():
        outputs = model(image_to_tensor(image)[None])
    renamed = {"logits": outputs["pred_logits"], "pred_masks": outputs["pred_masks"]}
    (upstream,) = post_process_panoptic_segmentation(renamed, threshold=0.2, target_sizes=[(60, 90)])
    assert len(upstream["segments_info"]) >= 1
    assert np.array_equal(result.segmentation, upstream["segmentation"].numpy())
    for info, expected in zip(result.segments_info, upstream["segments_info"], strict=True):
        assert (info["id"], info["category_id"]) == (expected["id"], expected["label_id"])
        assert info["area"] == (result.segmentation == info["id"]).sum()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_found_is_all_void(model: torch.nn.Module, mode: str) -> None:
    result = Predictor(model, device="cpu", threshold=1.0, mode=mode)(picture(40, 30))
    assert result.segmentation.dtype == np.int32
    assert result.segments_info == []
    assert not result.segmentation.any()
    assert result.boxes.shape == (0, 4)
    assert result.overlay().size == (40, 30)


def test_segments_are_drawn_in_their_colour_with_outline_and_caption() -> None:
    segmentation = np.zeros((200, 300), np.int32)
    segmentation[:, 150:] = 7
    categories = [{"id": 1, "name": "cat", "isthing": 1, "color": [220, 20, 60]}]
    image = Image.new("RGB", (300, 200), (100, 100, 100))
    drawn = np.array(draw_segments(image, segmentation, [{"id": 7, "category_id": 1, "score": 0.9}], categories))
    assert (drawn[:, :149] == 100).all()
    assert (drawn[:, 149] == 255).all()
    assert (drawn[:50, 150:] == (160, 60, 80)).all()
    caption = drawn[96:104, 210:238]
    assert (np.ptp(caption, axis=-1) == 0).all()
    assert caption.min() == 0
    assert caption.max() > 200


def test_overlay_draws_the_segments(model: torch.nn.Module) -> None:
    result = Predictor(model, device="cpu", threshold=0.2)(picture(100, 80))
    expected = draw_segments(result.image, result.segmentation, result.segments_info, result.categories)
    assert result.overlay().tobytes() == expected.tobytes() != result.image.tobytes()


def test_detection_model_has_boxes_and_no_segments() -> None:
    result = Predictor(tiny_detr(masks=False, num_classes=91), device="cpu", threshold=0.2)(picture(80, 60))
    assert result.segmentation is None
    assert result.segments_info == []
    assert len(result.boxes) > 0
    assert result.overlay().tobytes() != result.image.tobytes()
    with pytest.raises(ValueError, match="mask head"):
        result.to_png()


def test_from_pretrained_reads_what_was_saved(model: torch.nn.Module, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    image = picture(50, 70)
    loaded = Predictor.from_pretrained(tmp_path, device="cpu", threshold=0.2)(image)
    assert loaded.to_png() == Predictor(model, device="cpu", threshold=0.2)(image).to_png()
    with pytest.raises(TypeError, match="model .* Linear"):
        Predictor(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_finds_nearly_the_same(dtype: str) -> None:
    image = picture(90, 60)
    model = tiny_detr()
    predictors = [Predictor(model, device="cpu", threshold=0.2, dtype=name) for name in ("auto", dtype)]
    exact, lower = (predictor(image) for predictor in predictors)
    different = (exact.segmentation != lower.segmentation).mean()
    assert 0 < different < 0.2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold": 1.5}, r"threshold .* 1\.5"),
        ({"threshold": float("nan")}, "threshold .* nan"),
        ({"device": "tpu9"}, "device .* 'tpu9'"),
        ({"device": "meta"}, "device .* 'meta'"),
        ({"device": "cuda:99"}, "device .* 'cuda:99'"),
        ({"dtype": "int8"}, "dtype .* 'int8'"),
        ({"dtype": torch.int64}, "dtype .* torch.int64"),
        ({"mode": "fast"}, "mode .* 'fast'"),
        ({"batch_size": 0}, "batch_size .* 0"),
    ],
)
def test_options_out_of_range_are_named(model: torch.nn.Module, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Predictor(model, **options)


@pytest.mark.parametrize(
    "images",
    [
        [],
        None,
        np.zeros((4, 4), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        [picture(8, 8), "no/such/file.jpg"],
    ],
)
def test_what_is_no_image_is_refused(model: torch.nn.Module, images: object) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)):
        Predictor(model, device="cpu")(images)


# ---- from several threads ----

SMALL = {"size": 64, "max_size": 96}


def same(one: PanopticResult, other: PanopticResult) -> bool:
    """Whether two results are equal, to the last bit."""
    maps = [one.segmentation, other.segmentation]
    return (
        (maps[0] is maps[1] is None or np.array_equal(*maps))
        and one.segments_info == other.segments_info
        and np.array_equal(one.boxes, other.boxes)
        and np.array_equal(one.scores, other.scores)
        and np.array_equal(one.labels, other.labels)
    )


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(*[(96, 64), (64, 96), (80, 80)][seed % 3], seed=seed) for seed in range(8)]


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("masks", [True, False], ids=["panoptic", "detector"])
def test_any_number_of_threads_may_call_it_at_once(pictures: list[Image.Image], masks: bool, threads: int) -> None:
    predictor = Predictor(tiny_detr(masks=masks), device="cpu", threshold=0.2, **SMALL)
    alone = [predictor(image) for image in pictures]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(predictor, pictures * 10))
    assert len(results) == 80
    assert all(same(result, alone[index % 8]) for index, result in enumerate(results))


def test_two_streams_at_once_and_in_turn(model: torch.nn.Module, pictures: list[Image.Image]) -> None:
    predictor = Predictor(model, device="cpu", threshold=0.2, batch_size=2, **SMALL)
    orders = (pictures, pictures[::-1])
    alone = [list(predictor.stream(images)) for images in orders]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda images: list(predictor.stream(images)), orders))
    in_turn = list(zip(*zip(*(predictor.stream(images) for images in orders), strict=True), strict=True))
    for results in (at_once, in_turn):
        assert all(
            same(*pair)
            for found, expected in zip(results, alone, strict=True)
            for pair in zip(found, expected, strict=True)
        )


def test_two_predictors_of_one_model_in_two_dtypes(model: torch.nn.Module, pictures: list[Image.Image]) -> None:
    predictors = [Predictor(model, device="cpu", threshold=0.2, **SMALL, dtype=dtype) for dtype in ("fp32", "bf16")]
    alone = [[predictor(image) for image in pictures] for predictor in predictors]
    assert not all(map(same, *alone))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda index: predictors[index % 2](pictures[index // 2 % 8]), range(80)))
    assert all(same(result, alone[index % 2][index // 2 % 8]) for index, result in enumerate(results))


def test_a_predictor_can_be_pickled(model: torch.nn.Module, pictures: list[Image.Image]) -> None:
    predictor = Predictor(model, device="cpu", threshold=0.2, **SMALL)
    assert same(pickle.loads(pickle.dumps(predictor))(pictures[0]), predictor(pictures[0]))
