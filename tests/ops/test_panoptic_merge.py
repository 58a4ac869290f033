"""The merge kernels against the plain definitions in float64, allocations poisoned; on CUDA with real shapes too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_mask_upsample import bases, flat
from test_mask_upsample import poisoned as poisoned
from torch import Tensor

from contract import merge_by_definition
from detr_fast import postprocess, reference
from detr_fast.kernels import panoptic_merge as kernels
from detr_fast.resampling import pil_nearest_indices
from postprocess_cases import CASES, is_thing, make, smooth

NEAR_TIE = 1e-5  # logits closer than this may go either way
ISTHING = torch.tensor([is_thing(label) for label in range(250)])
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
Size = tuple[int, int]


class Image(SimpleNamespace):
    """The kept queries of one image, and its sizes."""

    masks: Tensor
    scores: Tensor
    labels: Tensor
    processed: Size
    target: Size


def image(masks: Tensor, labels: list[int], processed: Size, target: Size) -> Image:
    scores = torch.linspace(0.99, 0.86, len(labels))
    return Image(masks=masks, scores=scores, labels=torch.tensor(labels).long(), processed=processed, target=target)


def images_of(name: str, dtype: torch.dtype) -> tuple[Size, list[Image]]:
    """The padded size and the images of a case, their logits rounded to `dtype`."""
    case, images = CASES[name], []
    for i, (processed, target) in enumerate(zip(case.processed_sizes, case.target_sizes, strict=True)):
        masks, scores, labels = case.kept(i)
        images.append(Image(masks=masks.to(dtype), scores=scores, labels=labels, processed=processed, target=target))
    return case.padded_size, images


def launch(padded: Size, images: list[Image], ours: bool, device: torch.device) -> list[tuple[Tensor, list[Any]]]:
    """For each image its ids int32 [H,W] and segments, as the merges of `detr_fast.postprocess` return them."""
    masks, labels = (torch.cat([getattr(image, name) for image in images]) for name in ("masks", "labels"))
    processed, targets = [image.processed for image in images], [image.target for image in images]
    counts = [len(image.labels) for image in images]
    results = kernels.launch_panoptic_merge(
        masks.to(device),
        labels.to(device),
        ISTHING.to(device),
        counts,
        flat([padded] * len(images) if ours else processed),
        flat(processed),
        flat(targets),
        ours,
    )
    ids, *per_query = (result.cpu() for result in results)
    assert ids.dtype == (torch.uint8 if max(counts) < 256 else torch.int16)
    columns = zip(
        images, ids.split([h * w for h, w in targets]), *(part.split(counts) for part in per_query), strict=True
    )
    return [
        (part.view(image.target).int(), segments(image, s, area, box, ours)) for image, part, s, area, box in columns
    ]


def segments(image: Image, segment: Tensor, area: Tensor, box: Tensor, ours: bool) -> list[dict[str, Any]]:
    found = []
    for i in sorted(set(segment.tolist()) - {-1}):
        own = segment == i
        label = int(image.labels[own][0])
        left, top = box[own, :2].amin(0).tolist()
        right, bottom = box[own, 2:].amax(0).tolist()
        info = {"id": i, "category_id": label, "isthing": is_thing(label), "area": int(area[own].sum())}
        if ours:
            info["score"] = float(image.scores[own].max())
        found.append({**info, "bbox": [left, top, right - left, bottom - top]})
    return found


def with_boxes(ids: Tensor, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """facebookresearch's segments have no boxes: those of the definition's ids."""
    for info in infos:
        y, x = (ids == info["id"]).nonzero().unbind(1)
        left, top = int(x.min()), int(y.min())
        info["bbox"] = [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1]
    return infos


def truth(padded: Size, image: Image, ours: bool) -> tuple[Tensor, list[dict[str, Any]]]:
    sizes: dict[str, Any] = {"processed_size": image.processed, "target_size": image.target, "isthing": is_thing}
    arguments = image.masks.double(), image.scores, image.labels
    if ours:
        return merge_by_definition(*arguments, padded_size=padded, **sizes)
    ids, infos = merge_by_definition(*arguments, **sizes)
    return ids, with_boxes(ids, infos)


def near_ties(size: Size, image: Image) -> Tensor:
    """Target pixels whose two best logits are nearly equal, bool [H,W]."""
    if len(image.masks) < 2:
        return torch.zeros(image.target, dtype=torch.bool)
    logits = F.interpolate(image.masks.double()[None], size=size, mode="bilinear", align_corners=False)[0]
    best = logits[:, : image.processed[0], : image.processed[1]].topk(2, dim=0).values
    return reference.nearest_as_pil((best[0] - best[1] < NEAR_TIE).int(), image.target).bool()


def check(padded: Size, images: list[Image], ours: bool, device: torch.device) -> None:
    """Ids are those of the definition but for near ties, and without such so are the segments."""
    for image, (ids, infos) in zip(images, launch(padded, images, ours, device), strict=True):
        expected, expected_infos = truth(padded, image, ours)
        ties = near_ties(padded if ours else image.processed, image)
        assert int(ties.sum()) <= 5e-5 * ties.numel()
        assert torch.equal(ids[~ties], expected[~ties])
        if torch.equal(ids, expected):
            key = lambda info: info["id"]  # noqa: E731
            assert sorted(infos, key=key) == sorted(expected_infos, key=key)


# ---- the panoptic merges ----


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"up"}))  # slow, and enlarges as "line" does
def test_merge_is_the_definition(name: str, ours: bool, device: torch.device) -> None:
    check(*images_of(name, torch.float32), ours, device)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_merge_of_16_bits(dtype: torch.dtype, ours: bool, device: torch.device) -> None:
    check(*images_of("tiny", dtype), ours, device)


def crowd(seed: int, count: int, target: Size) -> Image:
    """Many queries of few classes with few pixels each, so that some are removed."""
    random = np.random.RandomState(seed)
    height, width = random.randint(4, 9, 2)
    masks = smooth(random, count, height, width, knots=3) + 3 * random.randn(count, 1, 1)
    masks += random.randn(count, height, width)
    labels = random.choice([1, 2, 93, 94, 120], count).tolist()
    return image(torch.from_numpy(masks.astype(np.float32)), labels, (4 * int(height) - 2, 4 * int(width) - 3), target)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_merge_of_a_crowd(seed: int, ours: bool, device: torch.device) -> None:
    one = crowd(seed, 9 + 3 * seed, [(11, 13), (23, 20), (7, 31)][seed % 3])
    check((4 * one.masks.shape[1], 4 * one.masks.shape[2]), [one], ours, device)


def test_rounds_end_where_the_definition_ends() -> None:
    """What the kernels count on: one round for ours, two for facebookresearch's, also where each removes something."""
    rounds = {True: set[int](), False: set[int]()}
    for seed in range(40):
        one = crowd(seed, 4 + seed, (9 + seed % 5, 11))
        for ours in rounds:
            axes = zip(one.processed, one.target, strict=True)
            rows, columns = (torch.from_numpy(pil_nearest_indices(*axis)) for axis in axes)
            shown = reference.resize_masks(one.masks, one.processed)[:, rows[:, None], columns]
            labels = one.labels.tolist()
            lead = torch.tensor([k if is_thing(c) else labels.index(c) for k, c in enumerate(labels)])
            alive, removals, merged = torch.ones_like(lead, dtype=torch.bool), 0, True
            while alive.any():
                winner = shown.masked_fill(~alive[:, None, None], -torch.inf).argmax(0)
                winner = lead[winner] if merged else winner
                area = torch.bincount(winner.flatten(), minlength=len(lead))
                area, merged = (area[lead] if ours else area), ours
                if not (alive & (area <= 4)).any():
                    break
                alive, removals = alive & (area > 4), removals + 1
            rounds[ours].add(removals)
    assert rounds[True] == {0, 1} and {1, 2} <= rounds[False] <= {0, 1, 2}


def painted(rows: list[str]) -> Tensor:
    """Mask logits of the queries 0, 1, ... that win the pixels so named, the next best being the following one."""
    order = torch.tensor([[int(character) for character in row] for row in rows])
    count = int(order.max()) + 1
    return torch.stack([-((k - order) % count).float() for k in range(count)])


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (["00111", "11111", "22222"], [93, 93, 2]),  # undone, the first is left with 2 pixels: a second round
        (["00111", "11222", "22222"], [93, 93, 2]),
        (["00002", "11112", "22222"], [1, 93, 2]),  # 4 pixels are too few
        (["00000", "11111", "22222"], [1, 93, 2]),  # 5 are enough
        (["00110", "11002", "20011"], [94, 94, 94]),  # nothing but one class
        (["0011", "2233"], [1, 2, 93, 93]),  # of ours, only the class that is together larger than 4 could stay
        (["00", "11"], [93, 93]),  # ours: together 4, all removed
    ],
)
def test_small_segments(rows: list[str], labels: list[int], ours: bool, device: torch.device) -> None:
    masks = painted(rows)
    size = masks.shape[1], masks.shape[2]
    check(size, [image(masks, labels, size, size)], ours, device)
    enlarged = size[0] * 2, size[1]  # a pixel that is shown twice counts twice
    check(size, [image(masks, labels, size, enlarged)], ours, device)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, on infinity times a weight of 0 in the interpreter
def test_ties_go_to_the_lower_query(device: torch.device) -> None:
    masks = torch.tensor([[1.0], [2.0], [2.0], [float("-inf")]])[..., None].expand(4, 3, 4)
    ((ids, infos),) = launch((12, 16), [image(masks, [5, 6, 7, 8], (12, 16), (7, 9))], False, device)
    assert not ids.any() and [(info["category_id"], info["area"]) for info in infos] == [(6, 63)]
    sizes = (12, 16), (7, 9)
    nowhere = image(torch.full((2, 3, 4), float("-inf")), [5, 6], *sizes)
    _, (ids, infos) = launch((12, 16), [image(masks, [5, 6, 7, 8], *sizes), nowhere], True, device)
    assert ids.unique().tolist() == [1] and [(info["category_id"], info["area"]) for info in infos] == [(5, 63)]


def test_images_of_all_kinds_share_a_batch(device: torch.device) -> None:
    """No query first, in the middle and last, all removed, one query, target larger and smaller; any strides."""
    random = np.random.RandomState(3)
    wide = torch.from_numpy(smooth(random, 24, 8, 20)).permute(1, 2, 0).contiguous().permute(2, 0, 1)[::2, :, ::2]
    assert not wide.is_contiguous()
    padded, none = (30, 37), wide[:0]
    images = [
        image(none, [], (3, 30), (4, 5)),
        image(wide[:4], [1, 93, 93, 2], (30, 37), (41, 39)),
        image(none, [], (30, 37), (70, 2)),
        image(wide[4:7], [1, 93, 2], (30, 20), (2, 2)),
        image(wide[7:8], [120], (17, 37), (9, 70)),
        image(wide[8:], [93, 1, 93, 1], (11, 12), (10, 75)),
        image(none, [], (1, 1), (3, 3)),
    ]
    for ours in (True, False):
        check(padded, images, ours, device)
        nothing = launch(padded, images[::2][:2], ours, device)  # no query at all
        assert all(not ids.any() and infos == [] for ids, infos in nothing)


@pytest.mark.parametrize("ours", [True, False])
def test_more_queries_than_a_program_holds(ours: bool, device: torch.device) -> None:
    """More than 128, which the kernels over queries take at once, and than 255, which a byte holds."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(300, 4, 5, generator=generator)
    masks[::7] += 3
    labels = torch.randint(80, 110, (300,), generator=generator).tolist()
    check((16, 20), [image(masks, labels, (16, 20), (8, 25))], ours, device)


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_real_images(dtype: torch.dtype, ours: bool, device: torch.device) -> None:
    """Also the same bits each time: the counts are sums of integers, and no program waits for another."""
    random, images = np.random.RandomState(0), []
    sizes = [((800, 1066), (480, 640)), ((800, 1333), (1500, 2500)), ((608, 800), (427, 640))]
    for count, (processed, target) in zip((15, 60, 100), sizes, strict=True):
        masks = torch.from_numpy(smooth(random, count, 200, 334, knots=9)) + 0.3 * torch.randn(count, 200, 334)
        labels = random.choice([1, 2, 3, 93, 94, 95, 120], count).tolist()
        images.append(image(masks.to(dtype), labels, processed, target))
    first, *others = (launch((800, 1333), images, ours, device) for _ in range(10))
    for other in others:
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, other, strict=True))
    for one, (ids, infos) in zip(images, first, strict=True):
        expected, expected_infos = truth((800, 1333), one, ours)
        assert (ids != expected).float().mean() <= 5e-5
        assert [info["category_id"] for info in infos] == [info["category_id"] for info in expected_infos]


# ---- transformers' merge ----


def launch_weighted(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    fuse: list[int],
    counts: list[int],
    targets: list[Size],
    thresholds: tuple[float, float],
    device: torch.device,
) -> list[tuple[Tensor, list[Any]]]:
    fused = torch.zeros(250, dtype=torch.bool)
    fused[fuse] = True
    tensors = (tensor.to(device) for tensor in (masks, scores, labels, fused))
    results = kernels.launch_weighted_merge(*tensors, counts, flat(targets), *thresholds)
    ids, *per_query = (result.cpu() for result in results)
    split = [part.split(counts) for part in (*per_query, labels, scores)]
    found = []
    for target, part, segment, area, box, label, score in zip(
        targets, ids.split([h * w for h, w in targets]), *split, strict=True
    ):
        queries = (segment >= 0).nonzero().flatten().tolist()
        values = zip(segment[queries].tolist(), label[queries].tolist(), score[queries].tolist(), strict=True)
        infos = [{"id": i, "label_id": c, "was_fused": c in fuse, "score": value} for i, c, value in values]
        part = part.view(target).int()
        for i in segment[queries].unique():
            own = segment == i
            assert int(area[own].sum()) == int((part == i).sum())
            y, x = (part == i).nonzero().unbind(1)
            union = [*box[own, :2].amin(0).tolist(), *box[own, 2:].amax(0).tolist()]
            assert union == [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        found.append((part, infos))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "thresholds", "fuse"),
    [
        ("stuff", (0.5, 0.8), []),
        ("tiny", (0.3, 0.5), []),
        ("tiny", (0.3, 0.5), [93, 120, 1]),
        ("noise", (0.45, 0.4), [93]),
        ("nothing", (0.5, 0.5), []),
    ],
)
def test_weighted_merge_is_transformers(
    name: str, thresholds: tuple[float, float], fuse: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[name]
    outputs = SimpleNamespace(logits=case.logits.double(), pred_masks=case.masks.to(dtype).double())
    expected = postprocess.post_process_panoptic_segmentation(outputs, 0.85, *thresholds, set(fuse), case.target_sizes)
    kept = [case.kept(i) for i in range(len(case.masks))]
    counts = [len(scores) for _, scores, _ in kept]
    scores, labels = (torch.cat([part[i] for part in kept]) for i in (1, 2))
    kept_masks = torch.cat([part[0] for part in kept]).to(dtype)
    results = launch_weighted(kept_masks, scores, labels, fuse, counts, case.target_sizes, thresholds, device)
    for (ids, infos), result in zip(results, expected, strict=True):
        assert torch.equal(ids, result["segmentation"].clamp(min=0).int())
        for info, theirs in zip(infos, result["segments_info"], strict=True):
            assert info.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-6)
            assert info == theirs


def test_weighted_merge_counts_and_numbers_as_upstream(device: torch.device) -> None:
    """4 of 5 pixels are above 0.8 in float32; after a fused repeat the ids count on from the fused one."""
    on, off = 9.0, -9.0
    rows = [
        [on] * 4 + [off] * 16,  # 4 of its 4 pixels
        [off] * 4 + [on] * 5 + [off] * 11,  # 4 of 5: the ninth goes to the next query
        [off] * 8 + [on] * 4 + [off] * 8,  # all of its 4
        [off] * 12 + [on] * 4 + [off] * 4,
        [off] * 16 + [on] * 2 + [off] * 2,
        [off] * 18 + [on] * 2,
    ]
    masks = torch.tensor(rows).view(6, 4, 5)
    scores = torch.tensor([0.9, 0.9, 0.99, 0.9, 0.9, 0.9])
    labels = torch.tensor([93, 7, 93, 8, 7, 9])
    results = launch_weighted(masks, scores, labels, [93], [6], [(4, 5)], (0.5, 0.8), device)
    ((ids, infos),) = results
    assert [info["id"] for info in infos] == [1, 2, 1, 2, 3, 4]
    assert ids.flatten().tolist() == [1] * 4 + [2] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2
    ((ids, infos),) = launch_weighted(masks, scores, labels, [93], [6], [(4, 5)], (0.5, 0.80001), device)
    assert [info["id"] for info in infos] == [1, 1, 2, 3, 4] and ids.flatten()[4:8].tolist() == [0] * 4


def test_weighted_merge_of_nothing_and_of_many(device: torch.device) -> None:
    none = torch.zeros(0)
    results = launch_weighted(torch.zeros(0, 3, 4), none, none.long(), [], [0, 0], [(5, 6), (2, 3)], (0.5, 0.8), device)
    assert [ids.tolist() for ids, _ in results] == [[[0] * 6] * 5, [[0] * 3] * 2]
    masks = torch.randn(140, 4, 5, generator=torch.Generator().manual_seed(1))
    scores, labels = torch.linspace(0.5, 1, 140), torch.arange(140)
    one = [masks, scores, labels, torch.zeros(250, dtype=torch.bool), [140], [4, 5], 0.6, 0.1]
    on_device = [value.to(device) if isinstance(value, Tensor) else value for value in one]
    expected = kernels.weighted_merge(*one)
    assert expected[1].max() > 5
    for ours, theirs in zip(kernels.launch_weighted_merge(*on_device), expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_threshold_between_float32_numbers() -> None:
    below = kernels.float32_below(0.8)
    assert below < 0.8 < float(np.nextafter(np.float32(below), np.float32(1))) and kernels.float32_below(0.5) == 0.5


# ---- the operations, on a CPU ----


@pytest.mark.parametrize("ours", [True, False])
def test_operation_is_the_fast_cpu_merge(ours: bool) -> None:
    padded, images = images_of("stuff", torch.float32)
    one = crowd(11, 20, (15, 17))
    size = 4 * one.masks.shape[1], 4 * one.masks.shape[2]
    for whole, image in [(padded, images[0]), (padded, images[1]), (size, one)]:
        ids, segment, area, box = kernels.panoptic_merge(
            image.masks,
            image.labels,
            ISTHING,
            [len(image.labels)],
            list(whole if ours else image.processed),
            list(image.processed),
            list(image.target),
            ours,
        )
        sizes: dict[str, Any] = {"processed_size": image.processed, "target_size": image.target, "isthing": is_thing}
        if ours:
            expected, infos = postprocess.panoptic_merge(
                image.masks, image.scores, image.labels, padded_size=whole, **sizes
            )
        else:
            expected, infos = postprocess.upstream_panoptic_merge(image.masks, image.scores, image.labels, **sizes)
            infos = with_boxes(expected, infos)
        assert torch.equal(ids.view(image.target).int(), expected)
        assert segments(image, segment, area, box, ours) == infos


def test_operations() -> None:
    one = make(1, [[100, 2, 100, 4], [100, 2, 2, 101]], [(11, 9), (20, 17)])
    masks, labels = one.masks.flatten(0, 1)[:5], torch.tensor([100, 2, 100, 4, 2])
    sizes = [4, 0, 1], [30, 31] * 3, [30, 31, 5, 6, 20, 31], [11, 9, 3, 4, 20, 17]
    torch.library.opcheck(kernels.panoptic_merge, (masks, labels, ISTHING, *sizes, True))
    torch.library.opcheck(kernels.panoptic_merge, (masks, labels, ISTHING, *sizes, False))
    counts, *_, target = sizes
    torch.library.opcheck(kernels.weighted_merge, (masks, torch.rand(5), labels, ISTHING, counts, target, 0.5, 0.8))


def test_errors_name_the_argument() -> None:
    masks, labels = torch.zeros(3, 4, 5), torch.zeros(3).long()
    size = [8, 9, 8, 9]
    for merged in (kernels.panoptic_merge, kernels.launch_panoptic_merge):
        with pytest.raises(ValueError, match="masks must be"):
            merged(masks, labels, ISTHING, [1, 1], size, size, size, True)
        with pytest.raises(ValueError, match="labels must be"):
            merged(masks, labels.float(), ISTHING, [1, 2], size, size, size, True)
        with pytest.raises(ValueError, match="target must be"):
            merged(masks, labels, ISTHING, [1, 2], size, size, size[:2], True)
        with pytest.raises(ValueError, match="processed must lie within resized"):
            merged(masks, labels, ISTHING, [1, 2], size, [8, 9, 9, 9], size, True)
    with pytest.raises(TypeError, match="masks must be float16, bfloat16 or float32"):
        kernels.launch_panoptic_merge(masks.double(), labels, ISTHING, [1, 2], size, size, size, True)


def test_compiled_addresses_of_planes_are_64_bits_wide() -> None:
    found = bases("panoptic_merge")
    assert all(found[name] == {"i64"} for name in ("masks_ptr", "winners_ptr", "out_ptr")), found
