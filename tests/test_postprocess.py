"""Post-processing against transformers (live), facebookresearch/detr and transformers 4.57.6 (recorded), and the plain
merges of detr_fast.reference."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from PIL import Image
from torch import Tensor

from contract import merge_by_definition
from detr_fast import ops, postprocess, reference
from detr_fast.ops import cells
from detr_fast.ops import masks as mask_ops
from detr_fast.postprocess import PostProcess, PostProcessPanoptic, PostProcessSegm, id_to_rgb, rgb_to_id
from detr_fast.resampling import pil_nearest_indices
from postprocess_cases import CASES, Case, is_thing, make, smooth

GOLDEN = Path(__file__).parent / "golden"
THING_MAP = {label: is_thing(label) for label in range(250)}
NEAR_TIE = 1e-5  # scores closer than this may go either way
sizes = st.integers(1, 2500)


@pytest.fixture(scope="module", params=["facebookresearch", "transformers-4.57.6"])
def recorded(request: pytest.FixtureRequest) -> tuple[bool, dict[str, np.ndarray]]:
    """Whether these are facebookresearch's results, and the results; see golden/make_postprocess.py."""
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        return request.param == "facebookresearch", dict(arrays)


@pytest.fixture(scope="module")
def upstream() -> Any:
    """The image processor of the installed transformers, 5.x."""
    pytest.importorskip("transformers", reason="compares with the installed transformers")
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    return DetrImageProcessorPil()


@pytest.fixture(params=["PyTorch", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a CPU runs; or what a GPU runs, with the operations' CPU bodies in place of the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with ops.pretend("sm_70") if request.param == "kernels" else contextlib.nullcontext():
        yield


def decode(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.mode == "RGB"
    return rgb_to_id(np.array(image))


def near_ties(masks: Tensor, padded: Any, processed: Any, target: Any) -> Tensor:
    """Target pixels whose two best logits are nearly equal, bool [H,W]."""
    logits = F.interpolate(masks[None], size=tuple(padded), mode="bilinear", align_corners=False)[0]
    best = logits[:, : processed[0], : processed[1]].topk(min(2, len(masks)), dim=0).values
    return reference.nearest_as_pil((best[0] - best[-1] < NEAR_TIE).int(), target).bool() & (len(masks) > 1)


# ---- panoptic PNGs, as recorded from upstream ----


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_panoptic_png_is_upstreams(recorded: tuple[bool, dict[str, np.ndarray]], name: str) -> None:
    is_facebook, arrays = recorded
    case = CASES[name]
    if is_facebook:
        results = PostProcessPanoptic(THING_MAP)(case.facebookresearch, case.processed_sizes, case.target_sizes)
    else:
        tensors = torch.tensor(case.processed_sizes), torch.tensor(case.target_sizes)
        results = postprocess.post_process_panoptic(case.transformers, *tensors)
    assert len(results) == len(case.target_sizes)
    for i, result in enumerate(results):
        if is_facebook and name == "nothing":  # upstream raises there; the other recording has what it gives
            assert i == 1 or (result["segments_info"] == [] and not decode(result["png_string"]).any())
            continue
        np.testing.assert_array_equal(decode(result["png_string"]), arrays[f"panoptic/{name}/{i}/ids"])
        expected = json.loads(str(arrays[f"panoptic/{name}/{i}/segments"]))
        assert [list(segment.items()) for segment in result["segments_info"]] == [list(s.items()) for s in expected]


@pytest.mark.usefixtures("path")
def test_panoptic_png_without_target_sizes(recorded: tuple[bool, dict[str, np.ndarray]]) -> None:
    is_facebook, arrays = recorded
    case = CASES["stuff"]
    if is_facebook:
        results = PostProcessPanoptic(THING_MAP)(case.facebookresearch, case.processed_sizes)
        for i, result in enumerate(results):
            ids = decode(result["png_string"])
            assert ids.shape == case.processed_sizes[i]
            np.testing.assert_array_equal(ids, arrays[f"panoptic-as-processed/{i}/ids"])
    else:
        strict = postprocess.post_process_panoptic(case.transformers, case.processed_sizes, threshold=1.0)
        assert [result["segments_info"] for result in strict] == [[], []]


# ---- boxes and masks, as recorded from upstream ----


@pytest.mark.usefixtures("path")
def test_boxes_and_masks_are_upstreams(recorded: tuple[bool, dict[str, np.ndarray]]) -> None:
    is_facebook, arrays = recorded
    case = CASES["stuff"]
    targets, processed = torch.tensor(case.target_sizes), torch.tensor(case.processed_sizes)
    if is_facebook:
        results = PostProcess()(case.facebookresearch, targets)
        results = PostProcessSegm(0.5)(results, case.facebookresearch, targets, processed)
    else:
        results = postprocess.post_process(case.transformers, targets)
        results = postprocess.post_process_instance(results, case.transformers, targets, processed)
        kept = postprocess.post_process_segmentation(case.transformers, case.target_sizes)
        check_recorded(kept, arrays, "segmentation")
    check_recorded(results, arrays, "segm")


def check_recorded(results: list[dict[str, Tensor]], arrays: dict[str, np.ndarray], group: str) -> None:
    keys = {f"{group}/{i}/{key}" for i, result in enumerate(results) for key in result}
    assert keys == {key for key in arrays if key.startswith(group + "/")}
    for i, result in enumerate(results):
        for key, value in result.items():
            expected = torch.from_numpy(arrays[f"{group}/{i}/{key}"])
            tolerance = {"atol": 2e-5, "rtol": 1e-6} if expected.is_floating_point() else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(value, expected, **tolerance)


@pytest.mark.usefixtures("path")
def test_5d_masks_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["up"]
    sizes = torch.tensor(case.target_sizes), torch.tensor(case.processed_sizes)
    plain = PostProcessSegm()([{}, {}], case.facebookresearch, *sizes)
    monkeypatch.setattr(mask_ops, "RESIZED_AT_ONCE", 1)
    parts = PostProcessSegm()([{}, {}], {"pred_masks": case.masks.unsqueeze(2)}, *sizes)
    for one, other in zip(plain, parts, strict=True):
        assert torch.equal(one["masks"], other["masks"])


# ---- transformers 5.x, live ----


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in every type, key order, dtype and value."""
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs
        assert isinstance(ours, int) == isinstance(theirs, int | np.integer)


def compare(upstream: Any, call: str, case: Case, **arguments: Any) -> list[Any]:
    ours = getattr(postprocess, call)(case.transformers, **arguments)
    assert_same(ours, getattr(upstream, call)(case.transformers, **arguments))
    return ours


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(upstream: Any, name: str) -> None:
    case = CASES[name]
    for targets in (None, case.target_sizes, torch.tensor(case.target_sizes)):
        compare(upstream, "post_process_object_detection", case, target_sizes=targets)
    compare(upstream, "post_process_object_detection", case, threshold=0.999)
    for targets in (None, case.target_sizes):
        compare(upstream, "post_process_semantic_segmentation", case, target_sizes=targets)
        compare(upstream, "post_process_instance_segmentation", case, target_sizes=targets)
        looser = {"threshold": 0.2, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.1, "target_sizes": targets}
        compare(upstream, "post_process_instance_segmentation", case, **looser, return_coco_annotation=True)
        compare(upstream, "post_process_panoptic_segmentation", case, target_sizes=targets)
        compare(upstream, "post_process_panoptic_segmentation", case, **looser, label_ids_to_fuse={1, 93, 120})


def test_semantic_scores(upstream: Any) -> None:
    case = CASES["up"]
    arguments = {"target_sizes": case.target_sizes, "return_segmentation_scores": True}
    ours = postprocess.post_process_semantic_segmentation(case.transformers, **arguments)
    theirs = upstream.post_process_semantic_segmentation(case.transformers, **arguments)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.segmentation, other.segmentation)
        assert torch.equal(one.segmentation_scores, other["segmentation_scores"])


@pytest.mark.usefixtures("path")
def test_an_id_is_shared_after_a_fused_repeat(upstream: Any) -> None:
    case = make(0, [[93, 1, 93, 2, 3, 93]], [(30, 41)])
    arguments = {"overlap_mask_area_threshold": 0.1, "mask_threshold": 0.3, "label_ids_to_fuse": {93}}
    (result,) = compare(upstream, "post_process_panoptic_segmentation", case, threshold=0.2, **arguments)
    ids = {(segment["id"], segment["label_id"]) for segment in result["segments_info"]}
    assert len({i for i, _ in ids}) < len(ids)  # the quirk is exercised


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["stuff", "noise"])
def test_overlaps_are_transformers(upstream: Any, name: str) -> None:
    for overlap in np.linspace(0.02, 0.98, 25).tolist():
        arguments = {"threshold": 0.3, "mask_threshold": 0.6, "overlap_mask_area_threshold": overlap}
        compare(upstream, "post_process_panoptic_segmentation", CASES[name], **arguments)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("won", "overlap", "kept"), [(4, 0.8, [1, 2]), (5, 0.5, [2]), (5, 0.49, [1, 2])])
def test_an_overlap_of_exactly_the_threshold(upstream: Any, won: int, overlap: float, kept: list[int]) -> None:
    """The quotient must be above; 4 / 5 is above 0.8 in float32, and would not be in float64."""
    masks = torch.full((1, 2, 3, 10), -20.0)
    masks[0, 0, 0, : 5 if won == 4 else 10] = 4.0
    masks[0, 1, 0, won:] = 9.0
    logits = torch.zeros(1, 2, 251)
    logits[0, 0, 1], logits[0, 1, 2] = 9.0, 14.0
    case = Case(logits, torch.rand(1, 2, 4), masks, (12, 40), [(12, 40)], [(3, 10)])
    arguments = {"overlap_mask_area_threshold": overlap}
    (result,) = compare(upstream, "post_process_panoptic_segmentation", case, **arguments)
    assert [segment["label_id"] for segment in result["segments_info"]] == kept


# ---- the merges, against the plain ones ----


def random_merge(seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Kept queries, and sizes that pad, crop, shrink and enlarge."""
    random = np.random.RandomState(seed)
    labels = random.choice([1, 2, 3, 100, 101, 102], random.randint(1, 12)).tolist()
    case = make(seed, [labels], [], noise=seed % 3 == 0, bias=[0.0, 2.0, 6.0][seed % 4 % 3])
    kept = case.masks[0], torch.from_numpy(random.rand(len(labels)).astype(np.float32)), torch.tensor(labels)
    processed = tuple(int(random.randint(side // 2, side + 1)) for side in case.padded_size)
    target = processed if seed % 5 == 0 else tuple(random.randint(1, 130, 2).tolist())
    return kept, {"padded_size": case.padded_size, "processed_size": processed, "target_size": target}


@pytest.mark.parametrize("block", [1 << 19, 300])
@pytest.mark.parametrize("call", ["panoptic_merge", "upstream_panoptic_merge"])
def test_merge_equals_the_plain_one(call: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "BLOCK_PIXELS", block)
    monkeypatch.setattr(cells, "BLOCK_VALUES", block)
    pixels = differing = removed = 0
    for seed in range(60):
        kept, size = random_merge(seed)
        padded = size["padded_size"]
        if call == "upstream_panoptic_merge":
            padded = size["processed_size"]
            del size["padded_size"]
        ids, segments = getattr(postprocess, call)(*kept, **size, isthing=THING_MAP)
        true_ids, true_segments = merge_by_definition(*kept, **size, isthing=is_thing)
        assert ids.dtype == torch.int32
        wrong = ids != true_ids
        if not wrong.any():
            assert segments == true_segments
        assert not (wrong & ~near_ties(kept[0], padded, size["processed_size"], size["target_size"])).any()
        pixels, differing = pixels + wrong.numel(), differing + int(wrong.sum())
        removed += len(segments) < len(set(kept[2].tolist()))
    assert differing <= max(1, NEAR_TIE * pixels)
    assert removed > 5  # the redo is exercised


def test_merge_of_one_full_size_image() -> None:
    """DETR's own sizes: masks at stride 4 of 800 x 1066, padded to 832 x 1100, back to 480 x 640."""
    random = np.random.RandomState(0)
    masks = F.interpolate(
        torch.from_numpy(random.randn(1, 7, 12, 16).astype(np.float32)), size=(208, 275), mode="bicubic"
    )[0]
    scores, labels = torch.linspace(0.86, 0.99, 7), torch.tensor([1, 100, 100, 17, 93, 1, 93])
    size = {"padded_size": (832, 1100), "processed_size": (800, 1066), "target_size": (480, 640)}
    ids, segments = postprocess.panoptic_merge(masks, scores, labels, **size, isthing=is_thing)
    true_ids, true_segments = merge_by_definition(masks, scores, labels, **size, isthing=is_thing)
    wrong = ids != true_ids
    assert int(wrong.sum()) <= NEAR_TIE * wrong.numel()
    assert not (wrong & ~near_ties(masks, *size.values())).any()
    assert [segment["category_id"] for segment in segments] == [s["category_id"] for s in true_segments]


def masks_for_cells(seed: int) -> Tensor:
    """Smooth masks [K,h,w], of which every third has ties, and every third two that are equal but for rounding."""
    random = np.random.RandomState(seed)
    count = 300 if seed % 20 == 0 else random.randint(9, 14)  # more than fit uint8
    masks = torch.from_numpy(smooth(random, *(count, *random.randint(2, 40, 2)), knots=3))
    if seed % 3 == 1:
        masks = (2 * masks).round()
    if seed % 3 == 2:
        masks[1] += 30
        masks[3] = masks[1] * (1 + 1e-7 * torch.from_numpy(random.randn(*masks.shape[1:]).astype(np.float32)))
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (masks * [1.0, 1e-2, 1e3][seed // 3 % 3]).to(dtypes[seed % 5])


@pytest.mark.parametrize("block", [1 << 21, 300])
def test_winners_of_cells_are_those_of_all_logits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, ties and roundings included: the same sums in the same order."""
    monkeypatch.setattr(cells, "BLOCK_VALUES", block)
    taken = 0
    for seed in range(120):
        masks, random = masks_for_cells(seed), np.random.RandomState(seed)
        padded = [int(random.randint(2 * side, 5 * side)) for side in masks.shape[1:]]
        processed = [int(random.randint(side // 2, side + 1)) for side in padded] if seed % 2 else padded
        target = [int(random.randint(2 * side // 3, 2 * side)) for side in processed]
        logits = cells.Logits(masks, padded, processed, target)
        label = np.random.RandomState(seed).permutation(len(masks))
        winners = logits._winners_of_cells(label)
        if winners is not None:
            taken += 1
            assert torch.equal(winners, torch.from_numpy(label)[logits._winners_of_planes().int()]), seed
    assert taken > 40


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-42])
def test_cells_do_not_judge_what_they_cannot(value: float) -> None:
    masks = torch.from_numpy(smooth(np.random.RandomState(0), 9, 40, 60, knots=3))
    size = (160, 240)
    assert cells.Logits(masks, size, size, size)._winners_of_cells(np.arange(9)) is not None
    if np.isfinite(value):
        masks *= value / masks.abs().max()
    else:
        masks[4, 7, 8] = value
    assert cells.Logits(masks, size, size, size)._winners_of_cells(np.arange(9)) is None


def test_corrected_merge_keeps_stuff_merged_and_counts_from_one() -> None:
    masks = torch.full((4, 4, 8), -5.0)
    masks[0, :, :2], masks[1, :, 2:4], masks[2, :, 4:6], masks[3, :, 6:] = 5.0, 5.0, 5.0, 5.0  # the last is padding
    scores, labels = torch.tensor([0.9, 0.95, 0.97, 0.99]), torch.tensor([120, 1, 120, 2])
    ids, segments = postprocess.panoptic_merge(
        masks, scores, labels, padded_size=(16, 32), processed_size=(16, 24), target_size=(8, 12), isthing=is_thing
    )
    assert ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1]] * 8
    score = float(scores[2])
    assert segments == [
        {"id": 1, "category_id": 120, "isthing": False, "score": score, "area": 64, "bbox": [0, 0, 12, 8]},
        {"id": 2, "category_id": 1, "isthing": True, "score": float(scores[1]), "area": 32, "bbox": [4, 0, 4, 8]},
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_merge_takes_other_dtypes(dtype: torch.dtype) -> None:
    (masks, scores, labels), size = random_merge(1)
    masks = masks.to(dtype)
    ids, _ = postprocess.panoptic_merge(masks, scores.to(dtype), labels, **size, isthing=is_thing)
    exact = masks.to(torch.promote_types(dtype, torch.float32))
    true_ids, _ = merge_by_definition(exact, scores, labels, **size, isthing=is_thing)
    assert torch.equal(ids, true_ids)


# ---- the pieces ----


@settings(max_examples=300, deadline=None)
@given(sizes, sizes)
def test_nearest_indices_are_pils(size_in: int, size_out: int) -> None:
    column = Image.fromarray(np.arange(size_in, dtype=np.int32)[:, None])
    expected = np.array(column.resize((1, size_out), Image.Resampling.NEAREST))[:, 0]
    np.testing.assert_array_equal(pil_nearest_indices(size_in, size_out), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 300))
def test_bilinear_taps_are_torchs(size_in: int, size_out: int) -> None:
    signal = torch.from_numpy(np.random.RandomState(size_in).randn(1, 1, size_in, 1))
    low, high, low_weight, high_weight = reference.bilinear_taps(size_in, size_out, signal.dtype, signal.device)
    expected = F.interpolate(signal, size=(size_out, 1), mode="bilinear", align_corners=False).flatten()
    column = signal.flatten()
    torch.testing.assert_close(column[low] * low_weight + column[high] * high_weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_of_many_planes_takes_the_lower_of_equals(dtype: torch.dtype) -> None:
    planes = torch.from_numpy(np.random.RandomState(0).randint(0, 250, (400, 9, 11))).to(dtype)
    index = cells.argmax_of_planes(planes, len(planes))
    np.testing.assert_array_equal(index.numpy(), planes.float().numpy().argmax(0))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, (1 << 24) - 1), min_size=1, max_size=20))
def test_ids_survive_as_colors(ids: list[int]) -> None:
    id_map = np.array([ids])
    colors = id_to_rgb(id_map)
    assert colors.dtype == np.uint8
    assert colors.shape == (1, len(ids), 3)
    np.testing.assert_array_equal(rgb_to_id(colors), id_map)
    np.testing.assert_array_equal(rgb_to_id(torch.from_numpy(colors)), id_map)
    assert colors[0].tolist() == [id_to_rgb(i) for i in ids]
    assert [rgb_to_id(color) for color in colors[0]] == ids


def test_colors_are_transformers(upstream: Any) -> None:
    from transformers import image_transforms

    colors = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)
    ids = image_transforms.rgb_to_id(colors)
    assert rgb_to_id(colors).dtype == ids.dtype
    np.testing.assert_array_equal(rgb_to_id(colors), ids)
    np.testing.assert_array_equal(id_to_rgb(ids), image_transforms.id_to_rgb(ids))
    assert rgb_to_id([7, 8, 9]) == image_transforms.rgb_to_id([7, 8, 9])
    assert id_to_rgb(591879) == image_transforms.id_to_rgb(591879)


# ---- bad input ----

HF, FB = CASES["stuff"].transformers, CASES["stuff"].facebookresearch
PAIRS = [(20, 30), (20, 30)]
MASKS, SCORES, LABELS = torch.zeros(2, 4, 5), torch.ones(2), torch.tensor([1, 300])
SIZE = {"padded_size": (16, 20), "processed_size": (16, 20), "target_size": (8, 10), "isthing": THING_MAP}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: postprocess.post_process_object_detection(HF, threshold=1.5), ValueError, "threshold must be in"),
        (
            lambda: postprocess.post_process_object_detection(HF, threshold="0.5"),
            TypeError,
            "threshold must be a number",
        ),
        (lambda: postprocess.post_process_object_detection(HF, target_sizes=PAIRS[:1]), ValueError, "2 entries"),
        (lambda: postprocess.post_process_instance_segmentation(HF, mask_threshold=-1), ValueError, "mask_threshold"),
        (
            lambda: postprocess.post_process_panoptic_segmentation(HF, target_sizes=[(1, 2, 3)] * 2),
            ValueError,
            "height",
        ),
        (lambda: postprocess.post_process_panoptic_segmentation(HF, target_sizes=[(4, 0)] * 2), ValueError, "4 x 0"),
        (
            lambda: postprocess.post_process_panoptic_segmentation(HF, target_sizes=[(4, 2.0)] * 2),
            TypeError,
            "integers",
        ),
        (lambda: postprocess.post_process_semantic_segmentation(FB), TypeError, "logits"),
        (lambda: postprocess.post_process_panoptic(HF, PAIRS, threshold=float("nan")), ValueError, "threshold"),
        (lambda: postprocess.post_process_panoptic(HF, PAIRS[:1]), ValueError, "processed_sizes must have 2"),
        (lambda: postprocess.post_process_segmentation(HF, 7), TypeError, "target_sizes must be a tensor"),
        (lambda: PostProcess()(FB, torch.tensor([20, 30])), ValueError, "target_sizes must be"),
        (lambda: PostProcess()({}, torch.tensor(PAIRS)), TypeError, "pred_logits"),
        (lambda: PostProcess()(FB | {"pred_boxes": FB["pred_boxes"][:, :3]}, torch.tensor(PAIRS)), ValueError, "agree"),
        (lambda: PostProcessSegm()([{}], FB, PAIRS, PAIRS), ValueError, "results must have 2"),
        (lambda: PostProcessSegm(2), ValueError, "threshold"),
        (lambda: PostProcessPanoptic({1: True})(FB, PAIRS), ValueError, "no entry for class"),
        (lambda: postprocess.panoptic_merge(MASKS, SCORES, LABELS, **SIZE), ValueError, "no entry for class 300"),
        (lambda: postprocess.panoptic_merge(MASKS, SCORES[:1], LABELS, **SIZE), ValueError, "scores and labels"),
        (lambda: postprocess.panoptic_merge(MASKS[0], SCORES, LABELS, **SIZE), ValueError, r"pred_masks must be \[K"),
        (
            lambda: postprocess.panoptic_merge(MASKS.int(), SCORES, LABELS, **SIZE),
            TypeError,
            "pred_masks must be a float",
        ),
        (
            lambda: postprocess.panoptic_merge(MASKS, SCORES, LABELS, **SIZE | {"processed_size": (17, 20)}),
            ValueError,
            "within padded_size",
        ),
        (lambda: rgb_to_id(np.zeros((4, 5, 4), np.uint8)), ValueError, "color must be"),
        (lambda: id_to_rgb(np.array([[-1]])), ValueError, "id_map must be in"),
        (lambda: id_to_rgb(0.5), TypeError, "id_map must be an integer"),
        (lambda: postprocess.post_process(SimpleNamespace(logits=None), torch.tensor(PAIRS)), TypeError, "logits"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
