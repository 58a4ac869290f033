"""The upstream surfaces: transformers' classes, live models of both upstreams, Torch Hub's entry points."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from builders import ours, randomised, theirs
from detr_fast.checkpoint import CheckpointError, save_model
from detr_fast.compat import hub
from detr_fast.compat.accelerate import accelerate
from detr_fast.compat.transformers import DetrForObjectDetection, DetrForSegmentation
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm, build_detr
from detr_fast.postprocess import PostProcess, PostProcessPanoptic

ROOT = Path(__file__).parents[2]
NAMES = ["DetrForObjectDetection", "DetrForSegmentation"]


def batch() -> dict[str, torch.Tensor]:
    """Two images of odd sizes in one batch."""
    mask = torch.ones(2, 77, 99, dtype=torch.long)
    mask[0, 60:] = mask[1, :, 80:] = 0
    return {"pixel_values": torch.randn(2, 3, 77, 99, generator=torch.Generator().manual_seed(0)), "pixel_mask": mask}


def check(found: Any, expected: Any) -> None:
    assert list(found) == [name for name in expected if name in found]
    for name, tolerance in (("logits", 1e-4), ("pred_boxes", 1e-4), ("last_hidden_state", 1e-4)):
        if name in found:
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0)
    if "pred_masks" in expected:
        scale = expected.pred_masks.max() - expected.pred_masks.min()
        assert (found.pred_masks - expected.pred_masks).abs().max() <= 1e-3 * scale


# ---- transformers' classes ----


@pytest.mark.parametrize("name", NAMES)
def test_transformers_classes(tmp_path: Path, name: str) -> None:
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "theirs")
    cls = {"DetrForObjectDetection": DetrForObjectDetection, "DetrForSegmentation": DetrForSegmentation}[name]
    model = cls.from_pretrained(tmp_path / "theirs")
    assert not model.training and model.dtype == torch.float32 and model.device.type == "cpu"
    for key in ("id2label", "num_labels", "num_queries", "d_model", "hidden_size", "encoder_layers", "model_type"):
        assert getattr(model.config, key) == getattr(reference.config, key), key
    assert model.config.label2id["LABEL_3"] == 3
    inputs = batch()
    with torch.inference_mode():
        expected = reference(**inputs)
        check(model(**inputs), expected)
        check(model(inputs["pixel_values"], inputs["pixel_mask"].bool()), expected)
        check(model(inputs["pixel_values"]), reference(inputs["pixel_values"]))
        model.save_pretrained(tmp_path / "ours")
        back = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
        check(model(**inputs), back(**inputs))


def test_output_is_read_like_transformers() -> None:
    model = DetrForSegmentation(ours(aux_loss=True)).eval()
    with torch.inference_mode():
        out = model(**batch())
        row = model(**batch(), return_dict=False)
    assert out[0] is out.logits is out["logits"] and out[1] is out.pred_boxes and out[:3][2] is out.pred_masks
    assert isinstance(row, tuple) and len(row) == len(out) == len(out.keys()) and torch.equal(row[2], out.pred_masks)
    assert "pred_masks" in out and "loss" not in out and out.loss is None and out.get("loss") is None
    assert len(out.auxiliary_outputs) == 1 and out.auxiliary_outputs[0]["logits"].shape == out.logits.shape
    with pytest.raises(KeyError):
        out["loss"]


BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pixel_values": [1]}, TypeError, "pixel_values must be a Tensor"),
    ({"pixel_values": torch.zeros(3, 32, 32)}, ValueError, r"pixel_values must be .* got torch.float32 \[3, 32, 32\]"),
    ({"pixel_values": torch.zeros(1, 4, 32, 32)}, ValueError, "pixel_values must be"),
    (
        {"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
        ValueError,
        "pixel_values must be .* got torch.uint8",
    ),
    ({"pixel_mask": torch.ones(77, 99)}, ValueError, r"pixel_mask must be .*\[2, 77, 99\], got \[77, 99\]"),
    ({"pixel_mask": [1]}, TypeError, "pixel_mask must be"),
    ({"labels": []}, ValueError, "labels"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_INPUTS)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DetrForObjectDetection(ours(masks=False))(**batch() | change)


def test_another_set_of_classes(tmp_path: Path) -> None:
    model = ours()
    save_model(model, tmp_path)
    labels = {0: "balloon", 1: "kite"}
    with pytest.raises(ValueError, match="has 11 classes and 2 are asked for: pass ignore_mismatched_sizes=True"):
        DetrForSegmentation.from_pretrained(tmp_path, num_labels=2)
    for options in (
        {"id2label": labels, "label2id": {"balloon": 0, "kite": 1}},
        {"label2id": {"balloon": 0, "kite": 1}},
    ):
        tuned = DetrForSegmentation.from_pretrained(tmp_path, **options, ignore_mismatched_sizes=True)
        assert tuned.config.id2label == labels and tuned.config.num_labels == 2
        assert tuned.detr.detr.class_embed.weight.shape == (3, 64)
        assert torch.equal(tuned.detr.detr.query_embed.weight, model.detr.query_embed.weight)
    for options in (
        {"id2label": {1: "a"}},
        {"id2label": labels, "num_labels": 3},
        {"id2label": labels, "label2id": {}},
    ):
        with pytest.raises(ValueError, match="id2label"):
            DetrForSegmentation.from_pretrained(tmp_path, **options, ignore_mismatched_sizes=True)


def test_from_pretrained_options(tmp_path: Path) -> None:
    save_model(ours().half(), tmp_path / "panoptic")
    save_model(ours(masks=False), tmp_path / "detection")
    asked = {None: torch.float32, "auto": torch.float16, "bfloat16": torch.bfloat16, torch.float64: torch.float64}
    for given, dtype in asked.items():
        assert DetrForObjectDetection.from_pretrained(tmp_path / "panoptic", dtype=given).dtype == dtype
        assert DetrForObjectDetection.from_pretrained(tmp_path / "panoptic", torch_dtype=given).dtype == dtype
    with pytest.raises(CheckpointError, match="no mask head"):
        DetrForSegmentation.from_pretrained(tmp_path / "detection")
    with pytest.raises(ValueError, match="dtype must be"):
        DetrForSegmentation.from_pretrained(tmp_path / "panoptic", dtype="int8")
    with pytest.raises(TypeError, match="device_map"):
        DetrForSegmentation.from_pretrained(tmp_path / "panoptic", device_map="auto")
    with pytest.raises(TypeError, match="detr must be a detr_fast DETRsegm, got DETR"):
        DetrForSegmentation(ours(masks=False))


# ---- accelerate ----


@pytest.mark.parametrize("name", NAMES)
def test_accelerates_transformers(name: str) -> None:
    reference = theirs(name).double()
    model = accelerate(reference)
    assert type(model).__name__ == name and type(model).__module__ == "detr_fast.compat.transformers"
    assert model.dtype == torch.float64 and not model.training
    with torch.inference_mode():
        inputs = batch()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        expected = reference(**inputs)
        for parameter in reference.parameters():
            parameter.zero_()  # the fast model has its own
        check(model(**inputs), expected)
    assert accelerate(model) is model
    assert accelerate(theirs(name, auxiliary_loss=True).train()).training
    with pytest.raises(ValueError, match="position_embedding_type"):
        accelerate(theirs(name, position_embedding_type="learned"))


def stand_in(masks: bool, nheads: int = 16) -> nn.Module:
    """facebookresearch/detr's classes as `accelerate` sees them: torch's own transformer layers have the same names."""
    detr = ours(masks=False, nheads=nheads)
    options: dict[str, Any] = {"dropout": 0.25, "batch_first": True}
    transformer, position = nn.Module(), nn.Module()
    transformer.encoder, transformer.decoder = nn.Module(), nn.Module()
    transformer.encoder.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, nheads, 96, **options) for _ in range(2))
    transformer.decoder.layers = nn.ModuleList(nn.TransformerDecoderLayer(64, nheads, 96, **options) for _ in range(2))
    transformer.decoder.norm = nn.LayerNorm(64)
    transformer.nhead = nheads
    for layer in [*transformer.encoder.layers, *transformer.decoder.layers]:
        layer.normalize_before = False
    position.normalize, position.temperature, position.scale = True, 10000, 2 * torch.pi
    position.__class__ = type("PositionEmbeddingSine", (nn.Module,), {})
    live = type("DETR", (nn.Module,), {})()
    live.backbone = nn.ModuleList([detr.backbone[0], position])
    live.transformer, live.aux_loss = transformer, True
    for part in ("class_embed", "bbox_embed", "query_embed", "input_proj"):
        setattr(live, part, getattr(detr, part))
    if masks:
        panoptic = type("DETRsegm", (nn.Module,), {})()
        whole = ours(nheads=nheads)
        panoptic.detr, panoptic.bbox_attention, panoptic.mask_head = live, whole.bbox_attention, whole.mask_head
        live = panoptic
    return randomised(live)


@pytest.mark.parametrize("masks", [False, True])
def test_accelerates_facebookresearch(masks: bool) -> None:
    live = stand_in(masks).half().train()
    detector = live.detr if masks else live
    for block in detector.backbone[0].body.layer4[1:]:
        block.conv2.dilation = (2, 2)
    model = accelerate(live)
    assert type(model) is (DETRsegm if masks else DETR)
    assert model.training and model.aux_loss and model.config.dilation
    assert (model.config.nheads, model.config.dropout) == (16, 0.25)
    state = live.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, state[key])
        assert tensor.data_ptr() != state[key].data_ptr()
    assert accelerate(model) is model
    detector.transformer.decoder.layers[0].normalize_before = True
    with pytest.raises(ValueError, match="normalize_before"):
        accelerate(live)


@pytest.mark.parametrize("other", [nn.Linear(1, 1), "model", type("DETR", (nn.Module,), {})()])
def test_accelerate_refuses_other_models(other: Any) -> None:
    with pytest.raises(TypeError, match=f"got .*{type(other).__name__}"):
        accelerate(other)


# ---- Torch Hub ----

SIZES = {
    "detr_resnet50": ("resnet50", False, False),
    "detr_resnet50_dc5": ("resnet50", True, False),
    "detr_resnet101": ("resnet101", False, False),
    "detr_resnet101_dc5": ("resnet101", True, False),
    "detr_resnet50_panoptic": ("resnet50", False, True),
    "detr_resnet50_dc5_panoptic": ("resnet50", True, True),
    "detr_resnet101_panoptic": ("resnet101", False, True),
}


@pytest.mark.parametrize("name", SIZES)
def test_hub_entry_points(name: str) -> None:
    backbone, dilation, masks = SIZES[name]
    entry = getattr(hub, name)
    signature = [(p.name, p.default) for p in inspect.signature(entry).parameters.values()]
    expected = [("pretrained", False), ("num_classes", 250 if masks else 91)]
    assert signature == expected + [("threshold", 0.85)] * masks + [("return_postprocessor", False)]
    with torch.device("meta"):
        model, postprocessor = entry(num_classes=300, return_postprocessor=True)
        assert isinstance(entry(), DETRsegm if masks else DETR)
    assert (model.config.backbone, model.config.dilation, model.config.masks) == (backbone, dilation, masks)
    assert model.training and model.config.num_classes == 300
    assert type(postprocessor) is (PostProcessPanoptic if masks else PostProcess)
    if masks:
        assert postprocessor.threshold == 0.85
        assert [postprocessor.is_thing_map[index] for index in range(300)] == [index <= 90 for index in range(300)]


def test_hub_pretrained_reads_the_checkpoint_of_that_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = hub.PRESETS["detr_resnet50_panoptic"]
    seen = []

    def read(name: str) -> Any:
        seen.append(name)
        return hub_checkpoint

    small = build_detr(config.replace(backbone="resnet18", dim_feedforward=8))
    hub_checkpoint = type("Checkpoint", (), {})()
    hub_checkpoint.config, hub_checkpoint.state_dict = small.config, small.state_dict()
    hub_checkpoint.source, hub_checkpoint.categories = "detr_resnet50_panoptic", None
    monkeypatch.setattr(hub, "read_checkpoint", read)
    with pytest.raises(CheckpointError, match="detr_resnet50_panoptic: missing"):
        hub.detr_resnet50_panoptic(pretrained=True)
    monkeypatch.setitem(hub.PRESETS, "detr_resnet50_panoptic", small.config)
    model = hub.detr_resnet50_panoptic(pretrained=True)
    assert seen == ["detr_resnet50_panoptic"] * 2 and model.training
    assert torch.equal(model.detr.class_embed.weight, small.detr.class_embed.weight)


def test_hubconf() -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), "detr_resnet50", source="local", num_classes=3)
    assert type(model) is DETR and model.config.num_classes == 3
    assert set(SIZES) <= set(runpy.run_path(str(ROOT / "hubconf.py")))
