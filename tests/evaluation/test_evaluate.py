"""Evaluation against known answers, and against the plain protocol: all masks, PNGs on disk, COCOeval at the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fast import cli
from detr_fast.checkpoint import save_model
from detr_fast.data.layout import find_split, read_annotations
from detr_fast.data.shapes import CATEGORIES, render
from detr_fast.detr.detector import DETR
from detr_fast.detr.nested import nested_tensor_from_tensor_list
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.evaluation.average_precision import METRICS, AveragePrecision, check_instances
from detr_fast.evaluation.evaluate import evaluate
from detr_fast.evaluation.ground_truth import GroundTruth
from detr_fast.evaluation.panoptic_quality import panoptic_quality, read_ids
from detr_fast.postprocess import PostProcessPanoptic, id_to_rgb
from detr_fast.predictor import Predictor
from detr_fast.preprocess import image_to_tensor
from tiny import CONFIG, tiny_detr

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((96, 128), (128, 96), (80, 120), (96, 128), (128, 96), (96, 128))  # (height, width)
CLASSES = 1 + max(category["id"] for category in CATEGORIES)
THINGS = {category["id"]: bool(category["isthing"]) for category in CATEGORIES}


def write_data(folder: Path, crowds_and_void: bool) -> Path:
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for index, (height, width) in enumerate(SIZES):
        scene, image_id, name = render(5, index, (height, width)), 70 - 10 * index, f"{index}.png"
        ids, segments = scene.ids.copy(), [dict(segment) for segment in scene.segments]
        if crowds_and_void:
            ids[:10, 5:50] = 0
            segments = [{**segment, "area": int((ids == segment["id"]).sum())} for segment in segments]
            segments[-1]["iscrowd"] = index % 2
        Image.fromarray(scene.image).save(folder / "images" / name)
        Image.fromarray(id_to_rgb(ids)).save(folder / "panoptic" / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        panoptic.append({"image_id": image_id, "file_name": name, "segments_info": segments})
        for segment in segments:
            if THINGS[segment["category_id"]]:
                rle = coco_mask.encode(np.asfortranarray(scene.ids == segment["id"], dtype=np.uint8))
                rle["counts"] = rle["counts"].decode()
                # COCO's ids start at 1; those of others at 0, which pycocotools takes for no match
                instance = {**segment, "id": len(instances), "image_id": image_id, "segmentation": rle}
                instances.append(instance)
    things = [category for category in CATEGORIES if category["isthing"]]
    for name, found, categories in (("panoptic", panoptic, CATEGORIES), ("instances", instances, things)):
        content = {"images": images, "annotations": found, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), crowds_and_void=True)


class Known(DETRsegm):
    """Finds what it is told, with `noise`: in 0, everything that is there.

    It knows images by their first pixels. Masks are as large as the image and its padding, divided by `stride`.
    """

    def __init__(self, folder: Path, size: int, noise: float, stride: int):
        super().__init__(DETR(CONFIG.replace(num_classes=CLASSES, num_queries=20)))
        self.categories = CATEGORIES
        self.stride = stride
        self.known = {}
        truth = GroundTruth.read(folder)
        rng = torch.Generator().manual_seed(1)
        for image in truth.images:
            tensor = image_to_tensor(truth.read_image(image), size, round(size * 1333 / 800))
            annotation = truth.panoptic[image["id"]]
            ids = torch.from_numpy(read_ids(folder / "panoptic" / annotation["file_name"]).astype(np.int64))
            logits = torch.zeros(20, CLASSES + 1)
            logits[:, -1] = 20
            boxes = torch.rand(20, 4, generator=rng) * 0.2 + 0.4
            masks = torch.full((20, *tensor.shape[1:]), -20.0)
            for query, segment in enumerate(annotation["segments_info"], start=3):
                x, y, w, h = segment["bbox"]
                scale = torch.tensor([image["width"], image["height"]] * 2)
                boxes[query] = torch.tensor([x + w / 2, y + h / 2, w, h]) / scale
                logits[query, segment["category_id"]] = 40
                mask = (ids == segment["id"]).float()[None, None] * 40 - 20
                masks[query] = F.interpolate(mask, size=tensor.shape[1:], mode="bilinear")[0, 0]
            logits += noise * 8 * torch.randn(logits.shape, generator=rng)
            logits[:, 0] = -1000  # no category has this id
            boxes += noise * 0.05 * torch.randn(boxes.shape, generator=rng)
            coarse = torch.randn(1, 20, 6, 8, generator=rng)
            masks += noise * 8 * F.interpolate(coarse, size=tensor.shape[1:], mode="bicubic")[0]
            self.known[key(tensor)] = logits, boxes, masks

    def forward(self, samples: Any, select: Any = None) -> dict[str, Any]:
        tensors = samples.tensors if hasattr(samples, "tensors") else samples
        height, width = tensors.shape[2:]
        logits, boxes, masks = zip(*(self.known[key(tensor)] for tensor in tensors), strict=True)
        large = torch.stack([F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1]), value=5.0) for m in masks])
        size = (-(-height // self.stride), -(-width // self.stride))
        out = {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}
        out["pred_masks"] = F.interpolate(large, size=size, mode="bilinear")
        if select is not None:
            out["selected"] = select(out["pred_logits"])
            out["pred_masks"] = [m[chosen] for m, chosen in zip(out["pred_masks"], out["selected"], strict=True)]
        return out


def key(tensor: torch.Tensor) -> bytes:
    return tensor[:, :8, :8].numpy().tobytes()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ---- the plain protocol ----


def plain_stats(instances: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """pycocotools as its demo uses it, over all images at once."""
    with silent():
        truth = COCO()
        numbered = [{**annotation, "id": n} for n, annotation in enumerate(instances["annotations"], start=1)]
        truth.dataset = {**instances, "annotations": numbered}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if v < 0 else 100 * v for name, v in zip(METRICS, evaluation.stats.tolist(), strict=True)}


@torch.no_grad()
def plain_scores(
    model: Any, folder: Path, scratch: Path, size: int, batch_size: int, threshold: float
) -> dict[str, Any]:
    """facebookresearch/detr's evaluation in padded batches, except that panoptic maps lose their padding."""
    instances = json.loads((folder / "instances.json").read_text())
    results: dict[str, list[dict[str, Any]]] = {"bbox": [], "segm": []}
    annotations = []
    records = instances["images"]
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        pictures = [Image.open(folder / "images" / record["file_name"]) for record in batch]
        tensors = [image_to_tensor(picture, size, round(size * 1333 / 800)) for picture in pictures]
        outputs = model(nested_tensor_from_tensor_list(tensors))
        padded = [max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2)]
        scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
        large = F.interpolate(outputs["pred_masks"], size=padded, mode="bilinear", align_corners=False)
        for i, (record, tensor) in enumerate(zip(batch, tensors, strict=True)):
            (height, width), target = tensor.shape[1:], (record["height"], record["width"])
            cropped = large[i, :, :height, :width]
            masks = F.interpolate((cropped.sigmoid() > 0.5).float()[None], size=target, mode="nearest")[0]
            for query in range(len(scores[i])):
                cx, cy, w, h = (outputs["pred_boxes"][i, query] * torch.tensor(target[::-1] * 2)).tolist()
                found = {
                    "image_id": record["id"],
                    "category_id": labels[i, query].item(),
                    "score": scores[i, query].item(),
                }
                rle = coco_mask.encode(np.asfortranarray(masks[query].numpy(), dtype=np.uint8))
                results["bbox"].append({**found, "bbox": [cx - w / 2, cy - h / 2, w, h]})
                results["segm"].append({**found, "segmentation": rle})
            one = {name: outputs[name][i : i + 1] for name in ("pred_logits", "pred_boxes")}
            one["pred_masks"] = outputs["pred_masks"][i : i + 1] if len(batch) == 1 else cropped[None]
            is_thing = {label: THINGS.get(label, True) for label in range(250)}
            (merged,) = PostProcessPanoptic(is_thing, threshold)(one, [(height, width)], [target])
            file = f"{record['id']}.png"
            (scratch / file).write_bytes(merged["png_string"])
            annotations.append({"image_id": record["id"], "file_name": file, "segments_info": merged["segments_info"]})
    quality = panoptic_quality(folder / "panoptic.json", folder / "panoptic", {"annotations": annotations}, scratch)
    return {
        **{kind: plain_stats(instances, found, kind) for kind, found in results.items()},
        "panoptic": {key.upper(): 100 * quality["All"][key] for key in ("pq", "sq", "rq")},
        "per_class": {category: 100 * found["pq"] for category, found in quality["per_class"].items()},
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind in ("bbox", "segm"):
        assert {name: found[kind][name] for name in METRICS} == pytest.approx(expected[kind], abs=1e-9), kind
    assert {name: found["panoptic"][name] for name in ("PQ", "SQ", "RQ")} == pytest.approx(expected["panoptic"])
    per_class = {int(category): one["PQ"] for category, one in found["panoptic"]["per_class"].items()}
    assert per_class == pytest.approx(expected["per_class"])


@pytest.mark.parametrize("size", [96, 64])
def test_what_it_finds_is_what_the_plain_protocol_finds(data: Path, tmp_path: Path, size: int) -> None:
    model = Known(data, size, noise=1.0, stride=4)
    expected = plain_scores(model, data, tmp_path, size, 1, 0.85)
    assert 5 < expected["bbox"]["AP"] < 95 and 5 < expected["segm"]["AP"] < 95
    assert 5 < expected["panoptic"]["PQ"] < 95
    for batch_size in (1, 2):
        assert_equal(evaluate(model, data, size=size, batch_size=batch_size), expected)


def test_padded_batches_lose_their_padding_before_they_are_scored(data: Path, tmp_path: Path) -> None:
    model = Known(data, 96, noise=1.0, stride=4)
    expected = plain_scores(model, data, tmp_path, 96, 4, 0.85)
    assert_equal(evaluate(model, data, size=96, batch_size=4, padded=True), expected)
    predictor = Predictor(model, device="cpu", mode="corrected")
    corrected = [evaluate(predictor, data, size=96, batch_size=b, padded=True)["panoptic"]["PQ"] for b in (1, 4)]
    assert corrected[0] == pytest.approx(corrected[1], abs=2)


def test_a_real_model_is_asked_only_for_masks_that_count(data: Path, tmp_path: Path) -> None:
    model = tiny_detr(seed=2)
    with torch.no_grad():
        model.detr.class_embed.bias[CLASSES:-1] = -1000
    expected = plain_scores(model, data, tmp_path, 96, 1, 0.4)
    found = evaluate(Predictor(model, device="cpu", mode="detr", threshold=0.4), data, size=96)
    assert_equal(found, expected)
    assert sum(one["fp"] for one in found["panoptic"]["per_class"].values()) > 5
    assert any("others in the model" in note for note in found["notes"])


# ---- known answers ----


@pytest.mark.parametrize("mode", ["detr", "corrected", "transformers"])
def test_finding_everything_scores_100(tmp_path: Path, mode: str) -> None:
    folder = write_data(tmp_path, crowds_and_void=False)
    model = Known(folder, 96, noise=0.0, stride=1)
    for options in ({"batch_size": 3}, {"batch_size": 4, "padded": True}):
        found = evaluate(Predictor(model, device="cpu", mode=mode), folder, size=96, **options)
        # at 80 x 120 resizing moves the outlines
        assert found["bbox"]["AP"] == pytest.approx(100)
        assert found["bbox"]["APl"] is None
        assert found["segm"]["AP50"] == pytest.approx(100) and found["segm"]["AP"] > 95
        assert found["panoptic"]["All"] == {**found["panoptic"]["All"], "RQ": 100.0, "n": len(CATEGORIES)}
        assert found["panoptic"]["PQ"] > 95
        assert found["panoptic"]["per_class"]["1"]["name"] == "disc"
        assert found["images"] == len(SIZES) and found["notes"] == []


def test_finding_nothing_scores_0(data: Path) -> None:
    model = Known(data, 96, noise=0.0, stride=4)
    for logits, *_ in model.known.values():
        logits[:, :-1] = 0
        logits[:, 9] = 1  # stuff, which AP does not count
        logits[:, -1] = 20
    found = evaluate(model, data, size=96)
    assert found["bbox"]["AP"] == found["segm"]["AP"] == found["bbox"]["AR100"] == found["panoptic"]["PQ"] == 0.0
    assert found["panoptic"]["per_class"]["9"]["fp"] == 0 and found["panoptic"]["per_class"]["9"]["fn"] > 0


def test_segments_of_classes_that_the_data_set_lacks_are_void(data: Path) -> None:
    model = Known(data, 96, noise=0.0, stride=4)
    full = evaluate(model, data, size=96)["panoptic"]["per_class"]
    for logits, *_ in model.known.values():
        logits[:, 0] = logits[:, 1]
        logits[:, 1] = 0
    found = evaluate(model, data, size=96)
    missed = full["1"]["tp"]
    assert missed > 0 and found["panoptic"]["per_class"]["1"]["tp"] == 0
    assert found["panoptic"]["per_class"]["2"] == full["2"]
    assert any("segments count as void" in note for note in found["notes"])


def test_ap_of_images_one_by_one_is_that_of_all_at_once() -> None:
    rng = np.random.default_rng(0)
    images = [{"id": image, "width": 200, "height": 150} for image in (9, 4, 7, 1)]
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}, {"id": 20, "name": "never"}]

    def box() -> list[float]:
        return [*rng.integers(0, 60, 2).tolist(), *rng.integers(5, 90, 2).tolist()]

    truth, results = [], []
    for image in images:
        for index in range(12):
            annotation = {"image_id": image["id"], "category_id": (3, 8)[index % 2], "bbox": box()}
            truth.append({**annotation, "area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": index // 11})
            jittered = (np.array(annotation["bbox"]) + rng.integers(-3, 4, 4)).tolist()
            for found in (jittered, box()):  # scores that tie, across images too
                results.append({**annotation, "bbox": found, "score": float(rng.integers(1, 4)) / 4})
    instances = {"images": images, "annotations": truth, "categories": categories}
    expected = plain_stats(instances, results, "bbox")
    assert 10 < expected["AP"] < 90 and expected["APl"] is None
    checked = check_instances(instances, {image["id"] for image in images}, "instances.json")
    precision = AveragePrecision(checked, "bbox")
    for image in images:
        precision.add(image, [result for result in results if result["image_id"] == image["id"]])
    found = precision.summary()
    assert {name: found[name] for name in METRICS} == expected
    per_class = [one["AP"] for one in found["per_class"].values()]
    assert per_class[2] is None and sum(per_class[:2]) / 2 == pytest.approx(expected["AP"])


# ---- what is missing ----


def test_only_what_can_be_scored_is(data: Path, tmp_path: Path) -> None:
    boxes = tiny_detr(masks=False)
    found = evaluate(boxes, data, size=64, limit=2)
    assert found["images"] == 2 and "bbox" in found and not {"segm", "panoptic"} & set(found)
    assert any("no mask head" in note for note in found["notes"])
    for name in ("images", "panoptic"):
        (tmp_path / name).symlink_to(data / name)
    for name, other in (("panoptic", "instances"), ("instances", "panoptic")):
        (tmp_path / f"{name}.json").write_bytes((data / f"{name}.json").read_bytes())
        found = evaluate(tiny_detr(), tmp_path, size=64, limit=1)
        assert ("panoptic" in found, "segm" in found) == (name == "panoptic", name == "instances")
        assert any(f"no {other.replace('instances', 'instance')} annotations" in note for note in found["notes"])
        if name == "panoptic":
            with pytest.raises(ValueError, match="nothing to score"):
                evaluate(boxes, tmp_path)
        (tmp_path / f"{name}.json").unlink()


def test_the_model_is_left_as_it_was(data: Path) -> None:
    model = tiny_detr().train()
    evaluate(model, data, size=64, limit=1)
    assert model.training
    for wrong in ({"batch_size": 0}, {"size": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            evaluate(model, data, **wrong)
    with pytest.raises(TypeError, match="Predictor"):
        evaluate("model", data)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("instances.json", lambda content: content["annotations"][1].pop("bbox"), "annotations[1] must have 'bbox'"),
        ("instances.json", lambda content: content["annotations"][0].update(area="9"), "'area', got '9'"),
        ("instances.json", lambda content: content["annotations"][0].update(category_id=77), "category_id 77"),
        ("instances.json", lambda content: content["annotations"][0].update(iscrowd=None), "'iscrowd'"),
        ("instances.json", lambda content: content["annotations"][0].update(segmentation=[[1, 2]]), "'segmentation'"),
        (
            "instances.json",
            lambda content: content["annotations"][0]["segmentation"].update(size=[2, 3]),
            "size [2, 3]",
        ),
        ("instances.json", lambda content: content["images"][0].pop("width"), "images[0] must have 'width'"),
        ("instances.json", lambda content: content.update(categories={}), "list 'categories'"),
        ("panoptic.json", lambda content: content["categories"][0].pop("isthing"), "'isthing' 0 or 1, got None"),
        ("panoptic.json", lambda content: content["annotations"][0].pop("segments_info"), "'segments_info'"),
        ("panoptic.json", lambda content: content["annotations"][0]["segments_info"][0].pop("area"), "area"),
        ("panoptic.json", lambda content: content["annotations"][0].update(file_name="no.png"), "no.png"),
        ("panoptic.json", lambda content: content.update(annotations=[]), "no images with annotations"),
    ],
)
def test_wrong_annotations_are_named(data: Path, tmp_path: Path, file: str, change: Change, named: str) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = json.loads((data / file).read_text())
    change(content)
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        GroundTruth.read(tmp_path)
    assert named in str(error.value) and file in str(error.value) or named == "no.png"


def test_pictures_are_read_as_they_were_annotated(data: Path, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "images").unlink()
    (tmp_path / "images").mkdir()
    for path in (data / "images").iterdir():
        exif = Image.Exif()
        exif[0x112] = 6  # to be turned by a quarter
        Image.open(path).save(tmp_path / "images" / path.name, exif=exif)
    truth = GroundTruth.read(tmp_path)
    record = truth.images[0]
    assert truth.read_image(record).size == (record["width"], record["height"])
    turned = {**record, "width": record["height"], "height": record["width"]}
    assert truth.read_image(turned).size == (record["height"], record["width"])
    with pytest.raises(ValueError, match="in its annotations 5 x 6"):
        truth.read_image({**record, "width": 5, "height": 6})


def test_both_layouts_are_found_and_gaps_named(data: Path, tmp_path: Path) -> None:
    assert find_split(data).panoptic_pngs == data / "panoptic"
    with pytest.raises(ValueError, match="no splits"):
        find_split(data, "val2017")
    with pytest.raises(ValueError, match="no folder .*missing"):
        find_split(tmp_path / "missing")
    with pytest.raises(ValueError, match="images"):
        find_split(tmp_path)
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (tmp_path / "val2017").mkdir()
    with pytest.raises(ValueError, match="neither .*instances_val2017.json nor .*panoptic_val2017.json"):
        find_split(tmp_path)
    (annotations / "instances_val2017.json").touch()
    split = find_split(tmp_path)
    assert (split.images, split.panoptic_json, split.panoptic_pngs) == (tmp_path / "val2017", None, None)
    (annotations / "panoptic_val2017.json").touch()
    (annotations / "panoptic_val2017.zip").touch()
    with pytest.raises(ValueError, match="unpack .*panoptic_val2017.zip"):
        find_split(tmp_path)
    (tmp_path / "panoptic_val2017").mkdir()
    assert find_split(tmp_path, "val2017").panoptic_pngs == tmp_path / "panoptic_val2017"
    with pytest.raises(ValueError, match="train2017"):
        find_split(tmp_path, "train2017")
    for text in ("", "[]", '{"images": 3}', "\xff"):
        (annotations / "wrong.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="wrong.json"):
            read_annotations(annotations / "wrong.json")


# ---- the command ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_detr(), folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`detr-fast eval` in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = cli.main(["eval", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def test_eval_prints_the_report_that_it_writes(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    arguments = ["--data", data, "--model", model, "--out", out, "--limit", "3", "--size", "64", "--threshold", "0.4"]
    command = [sys.executable, "-m", "detr_fast", "eval", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text() and done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert report["images"] == 3 and report["model"] == str(model) and report["mode"] == "detr"
    predictor = Predictor(tiny_detr(), device="cpu", mode="detr", threshold=0.4)
    found = evaluate(predictor, data, size=64, limit=3)
    assert {**report, **found, "seconds": 0} == {**report, "seconds": 0}
    assert "category" in done.stderr and "disc" in done.stderr and "Traceback" not in done.stderr


def test_eval_usage_errors_are_one_line_and_exit_2(
    data: Path, model: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    save_model(tiny_detr(masks=False), tmp_path / "boxes")
    for name in ("images", "panoptic", "panoptic.json"):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "empty").mkdir()
    right: dict[str, Any] = {"--data": data, "--model": model, "--device": "cpu"}
    wrong = [
        ({"--data": tmp_path / "missing"}, "missing"),
        ({"--data": tmp_path / "empty"}, "--data"),
        ({"--split": "val2017"}, "no splits"),
        ({"--model": tmp_path / "missing"}, "--model"),
        ({"--model": tmp_path / "boxes", "--data": tmp_path}, "no mask head"),
        ({"--device": "tpu"}, "--device"),
        ({"--dtype": "int3"}, "--dtype"),
        ({"--batch-size": "0"}, "--batch-size"),
        ({"--limit": "0"}, "--limit"),
        ({"--size": "-1"}, "--size"),
        ({"--mode": "new"}, "--mode"),
        ({"--out": tmp_path}, "--out"),
    ]
    for changes, named in wrong:
        options = {**right, **changes}
        code, out, err = run(*(part for option in options.items() for part in option))
        assert (code, out, err.count("\n")) == (2, "", 1), (changes, err)
        assert named in err


def test_eval_names_an_image_that_cannot_be_read_and_exits_1(
    data: Path, model: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("panoptic", "panoptic.json", "instances.json"):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "images").mkdir()
    for path in (data / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes()[: 2000 if path.stem == "2" else None])
    code, out, err = run("--data", tmp_path, "--model", model, "--size", "32", "--out", tmp_path / "report.json")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "2.png" in err and not (tmp_path / "report.json").exists()
