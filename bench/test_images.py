"""Everything around the model: before it, after it, evaluation, and labelling from files to files."""

from io import BytesIO
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

from bench import cases, definitions
from bench.operations.case import Draw
from detr_fast import ops, reference
from detr_fast.evaluation.panoptic_quality import PanopticQuality
from detr_fast.images import panoptic_png, run_lengths
from detr_fast.labeling.pipeline import label
from detr_fast.postprocess import PostProcess, PostProcessPanoptic, PostProcessSegm, rgb_to_id
from detr_fast.predictor import Predictor
from detr_fast.preprocess import image_to_tensor, images_to_batch

BOTH = pytest.mark.parametrize("way", ["reference", "fast"])
THINGS = {index: index <= 90 for index in range(251)}


def same(expected, allowed=1e-5):
    """A check that every integer is right, but for a share of pixels whose two best scores are nearly equal."""

    def check(out):
        ours, theirs = (np.concatenate([np.asarray(ids).ravel() for ids in maps]) for maps in (out, expected))
        assert ours.shape == theirs.shape
        share = float((ours != theirs).mean())
        assert share <= allowed, f"{share:.1e} of {ours.size} differ"
        return share

    return check


def size_name(size):
    return "x".join(map(str, size))


# ---- before ----


@BOTH
def test_preprocessing(bench, scale, device, way):
    """Pillow's resizing and torchvision's normalisation; on a GPU ours does both there."""
    height, width = scale.target
    arrays = cases.photographs(scale.batches[device.type == "cuda"], [(width, height)])
    pictures = [Image.fromarray(array) for array in arrays]
    sides = (min(scale.image), 1333)

    def reference():
        return torch.stack([definitions.preprocess(picture, *sides) for picture in pictures]).to(device)

    def fast():
        if device.type == "cuda":
            return images_to_batch(arrays, *sides, device=device)
        return torch.stack([image_to_tensor(picture, *sides) for picture in pictures])

    expected = reference()

    def check(out):
        assert torch.equal(out, expected)
        return 0.0

    shape = f"{len(arrays)} of {size_name(scale.target)} to {size_name(expected.shape[-2:])}"
    bench("preprocessing", way, reference if way == "reference" else fast, check, shape=shape)


# ---- after ----


def outputs_of(scale, device):
    """A model's outputs on an image with `scale.kept` objects, of classes that differ."""
    draw = Draw(device, 0)
    logits = draw.normal(1, scale.queries, 251)
    classes = torch.arange(scale.queries, device=device) % 250
    classes[~cases.keep(scale.kept)(logits)[0]] = 250
    logits[0, torch.arange(scale.queries, device=device), classes] += 20
    boxes = draw.normal(1, scale.queries, 4).sigmoid()
    return {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": draw.masks(scale.queries, scale.level(4))[None]}


@BOTH
def test_panoptic(bench, scale, device, way):
    """facebookresearch/detr's PostProcessPanoptic: from logits to a PNG."""
    outputs = outputs_of(scale, device)

    def plain():
        scores, labels = outputs["pred_logits"][0].softmax(-1).max(-1)
        kept = (labels != 250) & (scores > 0.85)
        masks = outputs["pred_masks"][0, kept]
        things = torch.tensor([bool(THINGS[label]) for label in range(250)], device=device)
        merged = reference.panoptic_merge(
            masks, labels[kept], things, scale.image, scale.image, scale.target, merge_for_good=False
        )
        classes = labels[kept][merged.segment >= 0].tolist()
        return definitions.png(merged.ids.cpu().numpy()), [{"category_id": label} for label in classes]

    def fast():
        result = PostProcessPanoptic(THINGS)(outputs, [scale.image], [scale.target])[0]
        return result["png_string"], result["segments_info"]

    expected = same([decoded(plain()[0])])

    def check(out):
        assert [segment["category_id"] for segment in out[1]] == [segment["category_id"] for segment in plain()[1]]
        return expected([decoded(out[0])])

    shape = f"{scale.kept} of {scale.queries} queries, {size_name(scale.target)}"
    bench("PostProcessPanoptic", way, plain if way == "reference" else fast, check, shape=shape, memory=True)


def decoded(png):
    return rgb_to_id(np.array(Image.open(BytesIO(png))))


@BOTH
def test_masks(bench, scale, device, way):
    """facebookresearch/detr's PostProcessSegm: a mask of each query."""
    outputs = outputs_of(scale, device)
    sizes, targets = torch.tensor([scale.image]), torch.tensor([scale.target])
    results = PostProcess()(outputs, targets.to(device))

    def plain():
        sizes = (scale.image, scale.image, scale.target)
        return reference.mask_upsample(outputs["pred_masks"][0], *sizes, 0.5).flatten().cpu()

    def fast():
        return PostProcessSegm()([dict(results[0])], outputs, targets, sizes)[0]["masks"].flatten()

    shape = f"{scale.queries} queries, {size_name(scale.target)}"
    call = plain if way == "reference" else fast
    check = same([plain()])
    bench("PostProcessSegm", way, call, lambda out: check([out]), shape=shape, seconds=3, memory=True)


# ---- files ----


def id_maps(scale, number):
    """Pairs of id maps, int32 [H,W], with `scale.kept` segments and some void; each second is the first, moved."""
    draw, (height, width) = Draw(torch.device("cpu"), 0), scale.target
    maps = []
    for _ in range(number):
        ids = draw.masks(scale.kept + 1, scale.target).argmax(0).numpy().astype(np.int32)
        maps.append((ids, np.roll(ids, (1 + height // 100, 1 + width // 100), (0, 1))))
    return maps


@BOTH
def test_png(bench, scale, way):
    ids = id_maps(scale, 1)[0][0]
    call = {"reference": definitions.png, "fast": panoptic_png}[way]
    check = same([ids])
    shape = f"{size_name(scale.target)}, {scale.kept} segments"
    bench("panoptic PNG", way, lambda: call(ids), lambda out: check([decoded(out)]), shape=shape)


@BOTH
def test_run_lengths(bench, scale, way):
    ids = id_maps(scale, 1)[0][0]
    wanted = np.unique(ids).tolist()
    call = {"reference": definitions.run_lengths, "fast": run_lengths}[way]
    expected = definitions.run_lengths(ids, wanted)

    def check(out):
        assert out == expected
        return 0.0

    shape = f"{size_name(scale.target)}, {scale.kept} segments"
    bench("COCO run lengths", way, lambda: call(ids, wanted), check, shape=shape)


@BOTH
def test_panoptic_quality(bench, scale, way):
    """Of id maps in memory."""
    maps = id_maps(scale, scale.batches[1])
    categories = {segment: 1 + segment % 5 for segment in range(1, scale.kept + 1)}

    def annotation(number, ids):
        values, areas = np.unique(ids[ids != 0], return_counts=True)
        segments = [
            {"id": i, "category_id": categories[i], "area": area, "iscrowd": 0}
            for i, area in zip(values.tolist(), areas.tolist(), strict=True)
        ]
        return {"image_id": number, "segments_info": segments}

    annotated = [[annotation(number, ids) for ids in pair] for number, pair in enumerate(maps)]

    def fast():
        quality = PanopticQuality([{"id": category, "isthing": 1} for category in range(1, 6)])
        for pair, ids in zip(annotated, maps, strict=True):
            quality.counts += quality.count(*pair, *ids)
        return quality.summary()["All"]["pq"]

    def plain():
        return definitions.panoptic_quality(maps, categories)

    expected = plain()

    def check(out):
        assert 0 < out < 1 and abs(out - expected) < 1e-9
        return abs(out - expected)

    shape = f"{len(maps)} of {size_name(scale.target)}, {scale.kept} segments"
    bench("panoptic quality", way, plain if way == "reference" else fast, check, shape=shape)


@pytest.fixture(scope="module")
def labelled(scale, device, tmp_path_factory):
    """A tiny model, a folder of JPEGs, and the id maps that the plain model gives, one image at a time."""
    folder, (height, width) = tmp_path_factory.mktemp("images"), scale.target
    for number, array in enumerate(cases.photographs(scale.pictures, [(width, height), (height, width)])):
        Image.fromarray(array).save(folder / f"{number:03}.jpg")
    model = cases.finding_model(cases.TINY.config).to(device)
    predictor = Predictor(model, device=device, dtype="fp32", threshold=0.0, max_size=max(scale.image), batch_size=4)
    return predictor, folder, label_plainly(predictor, folder, tmp_path_factory.mktemp("plain") / "out")


def label_plainly(predictor, folder, out):
    with ops.plain():
        definitions.label(predictor, folder, out)
    return id_maps_in(out)


def id_maps_in(out):
    return [decoded(path.read_bytes()) for path in sorted((out / "panoptic").iterdir())]


@BOTH
def test_labelling(bench, scale, device, way, labelled, tmp_path):
    """Files to files, by a tiny model; what is read again to be checked counts on both sides."""
    predictor, folder, expected = labelled
    outs = map(tmp_path.joinpath, map(str, count()))

    def fast():
        out = next(outs)
        label(folder, out, predictor)
        return id_maps_in(out)

    call = fast if way == "fast" else lambda: label_plainly(predictor, folder, next(outs))
    # random masks are nearly equal at more pixels than a trained model's, and a GPU convolves in TF32
    check = same(expected, 1e-4 if device.type == "cpu" else 1e-2)
    shape = f"{scale.pictures} of {size_name(scale.target)}, both ways up"
    bench("labelling, files to files", way, call, check, shape=shape, seconds=4, once=way == "reference")
