"""Every dialect reads as the same model, and everything else is refused in one line."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import CONFIG, ours, theirs
from detr_fast.categories import COCO_PANOPTIC
from detr_fast.checkpoint import CheckpointError, download, load_model, read_checkpoint, save_model
from detr_fast.checkpoint.dialects import plain_name, to_canonical, unprefixed
from detr_fast.config import DetrConfig
from detr_fast.detr.nested import NestedTensor
from detr_fast.detr.segmentation import build_detr


def timm_name(name: str) -> str:
    """transformers' ResNet to torchvision's and timm's, written down here apart from the code under test."""
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    if match := re.search(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:layer\.(\d)|shortcut)\.(convolution|normalization)", name
    ):
        stage, block, conv, kind = match.groups()
        norm = kind == "normalization"
        part = f"downsample.{int(norm)}" if conv is None else f"{'bn' if norm else 'conv'}{int(conv) + 1}"
        name = name.replace(match[0], f"layer{int(stage) + 1}.{block}.{part}")
    return name


def as_timm(folder: Path) -> None:
    state = {timm_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    bn = "detr.model.backbone.conv_encoder.model.layer1.0.downsample.1."
    state[bn + "num_batches_tracked"] = torch.tensor(0)
    os.remove(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"use_timm_backbone": True, "backbone_config": None, "backbone": "resnet50"}
    (folder / "config.json").write_text(json.dumps(settings))


def compare(model: Any, reference: Any) -> None:
    """Padded, of odd sizes; model is detr_fast's, reference transformers'."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 75, 101)
    mask = torch.ones(2, 75, 101, dtype=torch.bool)
    mask[1, 50:] = mask[1, :, 70:] = False
    with torch.inference_mode():
        out = model(NestedTensor(images, ~mask))
        expected = reference(pixel_values=images, pixel_mask=mask.long())
    torch.testing.assert_close(out["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(out["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=0)
    if "pred_masks" in out:
        scale = expected.pred_masks.max() - expected.pred_masks.min()
        assert (out["pred_masks"] - expected.pred_masks).abs().max() <= 1e-3 * scale


# ---- transformers' dialects ----

SAVE: dict[str, Callable[[Any, Path], None]] = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "renamed keys": lambda model, folder: model.save_pretrained(folder, save_original_format=False),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="1MB"),
    "timm, pytorch_model.bin": lambda model, folder: (model.save_pretrained(folder), as_timm(folder))[0],
}


@pytest.mark.parametrize("save", SAVE)
def test_reads_transformers(tmp_path: Path, save: str) -> None:
    reference = theirs()
    SAVE[save](reference, tmp_path)
    assert "sharded" not in save or len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = load_model(tmp_path)
    assert model.config == CONFIG
    assert not model.training
    compare(model, reference)


def test_reads_transformers_detection_with_basic_blocks(tmp_path: Path) -> None:
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"]
    )
    reference = theirs("DetrForObjectDetection", backbone_config=resnet, id2label={0: "cat", 1: "LABEL_1", 2: "dog"})
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert (model.config.backbone, model.config.masks, model.config.num_classes) == ("resnet18", False, 3)
    assert [(c["id"], c["name"], c["isthing"]) for c in model.categories] == [(0, "cat", 1), (2, "dog", 1)]
    compare(model, reference)


@pytest.mark.parametrize("dialect", ["detr_fast", "transformers"])
def test_the_size_of_images_comes_along(tmp_path: Path, dialect: str) -> None:
    save_model(build_detr(ours().config.replace(image_size=256, max_image_size=400)), tmp_path, dialect=dialect)
    config = read_checkpoint(tmp_path).config
    assert (config.image_size, config.max_image_size) == (256, 400)
    if dialect == "transformers":
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        assert dict(processor.size) == {"shortest_edge": 256, "longest_edge": 400}
        older = {"size": 300, "max_size": 500}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
        config = read_checkpoint(tmp_path).config
        assert (config.image_size, config.max_image_size) == (300, 500)


@pytest.mark.parametrize("masks", [True, False])
def test_transformers_loads_what_we_save(tmp_path: Path, masks: bool) -> None:
    model = ours(masks=masks, num_classes=250)
    save_model(model, tmp_path, dialect="transformers")
    cls = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    reference, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert reference.config.id2label[1] == "person" and reference.config.num_labels == 250
    compare(model, reference.eval())
    again = read_checkpoint(tmp_path)
    assert again.config == model.config and again.categories is None
    assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_full_size_names_and_shapes_equal_transformers(backbone: str) -> None:
    masks = backbone == "resnet50"
    depths = [3, 4, 6 if masks else 23, 3]
    with torch.device("meta"):
        config = transformers.DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=transformers.ResNetConfig(
                depths=depths, out_features=["stage1", "stage2", "stage3", "stage4"]
            ),
            num_labels=250,
        )
        cls = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
        reference = cls(config).state_dict()
        expected = unprefixed(build_detr(DetrConfig(backbone=backbone, num_classes=250, masks=masks)).state_dict())
    found = to_canonical({plain_name(name): tensor for name, tensor in reference.items()}, "resnet")
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}


UNSUPPORTED = [
    ({"activation_function": "gelu"}, "activation_function"),
    ({"position_embedding_type": "learned"}, "position_embedding_type"),
    ({"model_type": "conditional_detr"}, "model_type"),
    ({"decoder_attention_heads": 8}, "encoder_attention_heads and decoder_attention_heads must be equal"),
    ({"decoder_ffn_dim": 97}, "decoder_ffn_dim is 97, but the weights have 96"),
    ({"d_model": 10**15}, "d_model is 1000000000000000, but the weights have 64"),
    ({"encoder_attention_heads": "four"}, "encoder_attention_heads"),
    ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "nheads"),
    ({"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}}, "downsample_in_bottleneck"),
    ({"backbone_config": {"model_type": "swin"}}, "model_type"),
    ({"backbone_config": ["resnet"]}, "backbone_config"),
    ({"id2label": ["cat"]}, "id2label"),
]


@pytest.mark.parametrize(("changes", "named"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_refuses_transformers_settings_of_another_function(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    save_model(ours(), tmp_path, dialect="transformers")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    refused(tmp_path, named)


def test_timm_backbones_dilate_or_are_refused(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    as_timm(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())

    def write(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(settings | changes))

    write(dilation=True, auxiliary_loss=True)
    assert read_checkpoint(tmp_path).config == CONFIG.replace(dilation=True, aux_loss=True)
    write(backbone_config={"model_type": "timm_backbone", "backbone": "resnet50.a1_in1k", "output_stride": 16})
    assert read_checkpoint(tmp_path).config.dilation
    write(backbone="resnet50d")
    refused(tmp_path, "resnet50d")
    write(backbone_kwargs={"output_stride": 8})
    refused(tmp_path, "output_stride")


# ---- facebookresearch's and our own ----


def training_checkpoint(state: dict[str, Tensor], **args: Any) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 200).state_dict(),
        "epoch": 299,
        "args": argparse.Namespace(
            pre_norm=False, position_embedding="sine", output_dir=pathlib.Path("out"), best=np.float64(0.42), **args
        ),
    }


def test_reads_facebookresearch(tmp_path: Path) -> None:
    panoptic, detection = ours(), ours(masks=False, aux_loss=True)
    bare, whole = panoptic.state_dict(), detection.state_dict()
    args = {"nheads": 16, "dropout": 0.2, "aux_loss": True, "dilation": True}
    torch.save({"model": bare}, tmp_path / "panoptic.pth")
    torch.save({f"module.{name}": tensor for name, tensor in bare.items()}, tmp_path / "ddp-dc5.pt")
    torch.save({"model": bare}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(training_checkpoint(whole, **args), tmp_path / "checkpoint.pth")
    torch.save({f"detr.{name}": tensor for name, tensor in whole.items()}, tmp_path / "prefixed.bin")

    for name, changes in (("panoptic.pth", {}), ("ddp-dc5.pt", {"dilation": True}), ("legacy.pth", {})):
        found = read_checkpoint(tmp_path / name)
        assert found.config == CONFIG.replace(dropout=0.1, **changes), name  # heads are told by the mask head
        assert found.state_dict.keys() == bare.keys()
        assert all(torch.equal(found.state_dict[key], bare[key]) for key in bare)
    trained = read_checkpoint(tmp_path)
    assert trained.config == CONFIG.replace(masks=False, aux_loss=True, dilation=True)
    prefixed = read_checkpoint(tmp_path / "prefixed.bin")
    assert prefixed.config == CONFIG.replace(masks=False, nheads=8, dropout=0.1)
    for found in (trained, prefixed):
        assert found.state_dict.keys() == whole.keys()
        assert all(torch.equal(found.state_dict[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    "args", [{"pre_norm": True}, {"position_embedding": "learned"}, {"nheads": 5}, {"nheads": "16"}]
)
def test_refuses_facebookresearch_settings_of_another_function(tmp_path: Path, args: dict[str, Any]) -> None:
    contents = training_checkpoint(ours(masks=False).state_dict())
    vars(contents["args"]).update(args)
    torch.save(contents, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", next(iter(args)))


def test_own_dialect_round_trip(tmp_path: Path) -> None:
    model = ours(dilation=True)
    model.categories = [{"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]}]
    model.aux_loss = True
    save_model(model, tmp_path / "new" / "folder")
    again = load_model(tmp_path / "new" / "folder")
    assert again.config == CONFIG.replace(dilation=True, aux_loss=True)
    assert again.categories == model.categories
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    assert load_model(tmp_path / "new" / "folder" / "model.safetensors").categories == model.categories

    torch.save(
        {"model": state, "config": model.config.to_dict(), "categories": model.categories}, tmp_path / "step.pth"
    )
    trained = read_checkpoint(tmp_path / "step.pth")
    assert trained.config == model.config and trained.categories == model.categories

    settings = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    for key, value in (("num_queries", 8), ("hidden_dim", 2**40), ("mystery", 1), ("nheads", None)):
        changed = settings | {"config": settings["config"] | {key: value}}
        (tmp_path / "new" / "folder" / "config.json").write_text(json.dumps(changed))
        refused(tmp_path / "new" / "folder", key)


def test_config_changes(tmp_path: Path) -> None:
    model = ours()
    save_model(model, tmp_path)
    detector = load_model(tmp_path, masks=False, aux_loss=True)
    assert torch.equal(detector.class_embed.weight, model.detr.class_embed.weight) and detector.aux_loss
    with pytest.raises(CheckpointError, match=r"class_embed\.weight \[12, 64\] instead of \[6, 64\]"):
        load_model(tmp_path, num_classes=5)
    with pytest.raises(TypeError, match="colour"):
        load_model(tmp_path, colour=1)


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    save_model(ours(masks=False).half(), tmp_path)
    assert read_checkpoint(tmp_path).state_dict["class_embed.bias"].dtype == torch.float16
    assert {x.dtype for x in load_model(tmp_path).state_dict().values()} == {torch.float32}


def test_saving_never_leaves_half_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ours(), ours(num_queries=9)
    save_model(first, tmp_path)
    (tmp_path / "notes.txt").write_text("stays")

    def full(*args: object, **options: object) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("safetensors.torch.save_file", full)
        save_model(second, tmp_path)
    assert read_checkpoint(tmp_path).config == first.config
    save_model(second, tmp_path)
    assert read_checkpoint(tmp_path).config == second.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_save_refuses() -> None:
    with pytest.raises(TypeError, match="model must be"):
        save_model(torch.nn.Linear(1, 1), "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dialect must be"):
        save_model(ours(), "x", dialect="onnx")
    with pytest.raises(ValueError, match="backbone_width must be 64"):
        save_model(ours(dilation=True), "x", dialect="transformers")
    assert not os.path.exists("x")


# ---- what is refused ----


def refused(path: Path, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and named in message, message


class Bomb:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["model", "args"])
def test_pickles_that_run_code_are_refused_unrun(tmp_path: Path, where: str, legacy: bool) -> None:
    trace = tmp_path / "trace"
    contents = {"model": ours(masks=False).state_dict()}
    contents |= {"args": Bomb(trace)} if where == "args" else {"model": contents["model"] | {"x": Bomb(trace)}}
    torch.save(contents, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "evil.pth", "open")
    assert not trace.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert trace.exists()  # it would have


def test_reading_leaves_torchs_own_allow_list_as_it_was(tmp_path: Path) -> None:
    torch.save(training_checkpoint(ours(masks=False).state_dict(), nheads=16), tmp_path / "x.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(tmp_path / "x.pth")
        assert set(torch.serialization.get_safe_globals()) == before


WEIGHT = "transformer.encoder.layers.1.linear2.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: s.pop(WEIGHT), f"missing {WEIGHT}"),
    "missing size": (lambda s: s.pop("query_embed.weight"), "missing query_embed.weight"),
    "unexpected": (lambda s: s.update({"ex\ntra": torch.zeros(1)}), "unexpected ex tra"),
    "pre-norm": (lambda s: s.update({"transformer.encoder.norm.bias": torch.zeros(64)}), "unexpected transformer"),
    "twice": (lambda s: s.update({f"module.{WEIGHT}": s[WEIGHT]}), "twice"),
    "mis-shaped": (lambda s: s.update({WEIGHT: torch.zeros(64, 95)}), f"{WEIGHT} [64, 95] instead of [64, 96]"),
    "scalar": (lambda s: s.update({"query_embed.weight": torch.zeros(())}), "query_embed.weight"),
    "NaN": (lambda s: s[WEIGHT].view(-1)[5:6].fill_(float("nan")), f"NaN or infinite weights in {WEIGHT}"),
    "infinite": (lambda s: s["backbone.0.body.bn1.running_var"][:1].fill_(float("inf")), "bn1.running_var"),
    "whole numbers": (lambda s: s.update({WEIGHT: s[WEIGHT].int()}), f"{WEIGHT} torch.int32"),
    "not a tensor": (lambda s: s.update({WEIGHT: "weights"}), WEIGHT),
    "sparse": (lambda s: s.update({WEIGHT: s[WEIGHT].to_sparse()}), WEIGHT),
    "meta": (lambda s: s.update({WEIGHT: torch.empty(2**40, device="meta")}), WEIGHT),
    "expanded": (lambda s: s.update({"query_embed.weight": torch.zeros(1, 1).expand(60000, 60000)}), "query_embed"),
    "other backbone": (lambda s: [s.pop(k) for k in list(s) if "layer3.5." in k], "none of resnet18"),
    "empty": (lambda s: s.clear(), "no weights"),
    "other model": (lambda s: (s.clear(), s.update(weight=torch.zeros(1))), "no DETR"),
    "no names": (lambda s: s.update({3: torch.zeros(1)}), "no weights"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_damaged_state(tmp_path: Path, damage: str) -> None:
    change, named = DAMAGE[damage]
    state = {name: tensor.clone() for name, tensor in ours(masks=False).state_dict().items()}
    change(state)
    torch.save({"model": state}, tmp_path / "damaged.pth")
    refused(tmp_path / "damaged.pth", named)


def test_names_in_errors_are_the_files_own(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    missing = "model.decoder.layers.1.encoder_attn.k_proj.bias"
    del state[f"detr.{missing}"]
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, f"missing {missing};")


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "legacy.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_refuses_truncated_files(tmp_path: Path, name: str, kept: float) -> None:
    state = ours(masks=False).state_dict()
    path = tmp_path / name
    if name == "model.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "weights.pth")
    contents = path.read_bytes()
    assert read_checkpoint(path)
    path.write_bytes(contents[: int(kept * len(contents))])
    refused(path, name)


def rewritten(source: Path, target: Path, change: Callable[[bytes], bytes], compression: int) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)


def test_refuses_claims_of_absurd_size(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"query_embed.weight": torch.ones(200, 2)}, good)
    # 400 elements in 200 x 2, claimed to be 2^30 in 2^29 x 2: the pickle's small integers widened
    rewritten(good, bad, lambda p: p.replace(b"M\x90\x01", b"J\0\0\0\x40").replace(b"K\xc8", b"J\0\0\0\x20"), 0)
    refused(bad, "bad.pth")
    contents = bytearray(good.read_bytes())
    entry = contents.index(b"PK\x01\x02")  # the archive's list of its entries; sizes are at 20 and 24
    contents[entry + 20 : entry + 28] = (2**31 - 1).to_bytes(4, "little") * 2
    bad.write_bytes(contents)
    refused(bad, "claims more than the file holds")
    torch.save({"query_embed.weight": torch.rand(400)}, good)
    rewritten(good, bad, lambda pickle: pickle, zipfile.ZIP_DEFLATED)
    refused(bad, "claims more than the file holds")
    header = json.dumps({"query_embed.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refused(tmp_path / "x.safetensors", "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    refused(tmp_path / "x.safetensors", "x.safetensors")


def test_refuses_broken_folders(tmp_path: Path) -> None:
    refused(tmp_path, "none of model.safetensors")
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.rename(tmp_path / "gone")
    refused(tmp_path, shard.name)
    (tmp_path / "gone").rename(shard)
    contents = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": contents["weight_map"] | {"x": "../../etc/passwd"}}))
    refused(tmp_path, "../../etc/passwd")
    index.write_text("{}")
    refused(tmp_path, "weight_map")
    index.write_text(json.dumps(contents))
    for broken in (
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"model_type": "detr_fast"}',
        '{"model_type": "detr_fast", "config": {}}',
    ):
        (tmp_path / "config.json").write_text(broken)
        refused(tmp_path, "config")


@pytest.mark.parametrize(
    "name", ["", "nowhere.pth", "no/such.pth", "./a/b", "/a/b", "a/b/c", "\0", "a" * 5000, "/dev/null"]
)
def test_refuses_what_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointError, match="accepted are"):
        read_checkpoint(name)


def test_refuses_what_is_no_name() -> None:
    with pytest.raises(TypeError, match="name_or_path must be a string or a path, got int"):
        read_checkpoint(3)  # type: ignore[arg-type]


# ---- downloads ----


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server, which also answers as the Hugging Face hub does, and the folder that it serves."""
    root = tmp_path / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(root))

        def send_head(self) -> Any:
            if self.path.startswith("/api/") or not (root / self.path.lstrip("/")).is_file():
                self.send_response(404)
                self.send_header(
                    "X-Error-Code", "EntryNotFound" if (root / self.path.split("/")[1]).exists() else "RepoNotFound"
                )
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            return super().send_head()

        def end_headers(self) -> None:
            self.send_header("X-Repo-Commit", "0123456789" * 4)
            self.send_header("ETag", f'"{hashlib.md5(self.path.encode()).hexdigest()}"')
            super().end_headers()

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", root
    httpd.shutdown()
    httpd.server_close()


def test_torch_hub_names(tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, root = server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "TORCH_HUB_URL", f"{url}/")
    torch.save({"model": ours(masks=False).state_dict()}, root / "good")
    file = f"detr-r50-{hashlib.sha256((root / 'good').read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(download.TORCH_HUB_FILES, "detr_resnet50", file)
    cached = tmp_path / "home" / "hub" / "checkpoints"

    with pytest.raises(CheckpointError, match=r"detr_resnet50: cannot download .*404"):
        read_checkpoint("detr_resnet50")
    (root / file).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"detr_resnet50: cannot download .*hash"):
        read_checkpoint("detr_resnet50")
    assert not list(cached.iterdir())
    shutil.copy(root / "good", root / file)
    assert read_checkpoint("detr_resnet50").source == "detr_resnet50"
    shutil.rmtree(root)
    assert read_checkpoint("detr_resnet50").config.num_classes == 11
    (cached / file).write_bytes(b"rotten")
    with pytest.raises(CheckpointError, match=f"{file} has SHA-256 .*: delete it"):
        read_checkpoint("detr_resnet50")


HUB_PROGRAM = """
import sys
from detr_fast.checkpoint import CheckpointError, read_checkpoint
for name in sys.argv[1:]:
    try:
        print(name, "has", read_checkpoint(name).config.num_queries)
    except CheckpointError as error:
        print(error)
"""


def hub_program(program: str, endpoint: str, home: Path, *names: str) -> list[str]:
    """The lines that a program prints, with a hub of its own and without a retry."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", program, *names]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "Retrying" not in ran.stderr
    return ran.stdout.splitlines()


def test_hub_ids(tmp_path: Path, server: tuple[str, Path]) -> None:
    url, root = server
    folder = root / "org" / "tiny" / "resolve" / "main"
    save_model(ours(), folder, dialect="transformers")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")  # tried after two names that are not there
    (root / "org" / "empty" / "resolve" / "main").mkdir(parents=True)
    shutil.copy(folder / "config.json", root / "org" / "empty" / "resolve" / "main")

    def read(endpoint: str, *names: str) -> list[str]:
        return hub_program(HUB_PROGRAM, endpoint, tmp_path / "hf", *names)

    downloaded, empty, unknown = read(url, "org/tiny", "org/empty", "unknown/model")
    assert downloaded == "org/tiny has 7"
    assert empty.startswith("org/empty: ") and "none of model.safetensors" in empty
    assert unknown.startswith("unknown/model: ") and "no such model" in unknown and "local folder or file" in unknown
    offline, unreachable = read("http://127.0.0.1:9", "org/tiny", "org/other")
    assert offline == "org/tiny has 7"
    assert unreachable.startswith("org/other: ") and "cannot be reached" in unreachable
    assert "local folder or file" in unreachable


PROCESSOR_PROGRAM = """
import sys
from detr_fast import DetrImageProcessor
for name in sys.argv[1:]:
    try:
        print(name, "has", DetrImageProcessor.from_pretrained(name).size["shortest_edge"])
    except ValueError as error:
        print(error)
"""


def test_processors_of_hub_ids(tmp_path: Path, server: tuple[str, Path]) -> None:
    url, root = server
    save_model(ours(image_size=64), root / "org" / "tiny" / "resolve" / "main", dialect="transformers")
    (root / "org" / "bare" / "resolve" / "main").mkdir(parents=True)

    def read(endpoint: str, *names: str) -> list[str]:
        return hub_program(PROCESSOR_PROGRAM, endpoint, tmp_path / "hf", *names)

    downloaded, bare, unknown = read(url, "org/tiny", "org/bare", "unknown/model")
    assert downloaded == "org/tiny has 64"
    assert bare == "org/bare has 800"
    assert unknown.startswith("unknown/model: no such folder or file, and the Hugging Face hub has no such model")
    offline, unreachable, invalid = read("http://127.0.0.1:9", "org/tiny", "org/other", "no/such/id")
    assert offline == "org/tiny has 64"
    assert unreachable.startswith("org/other: ") and "cannot be reached" in unreachable
    assert invalid.startswith("no/such/id: no such folder or file, and it is no hub id")


def test_coco_names_need_no_list(tmp_path: Path) -> None:
    labels = {index: f"LABEL_{index}" for index in range(250)} | {c["id"]: c["name"] for c in COCO_PANOPTIC}
    theirs(id2label=labels).save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path).categories is None
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["id2label"] |= {"17": "moggy", "200": "carpet"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    categories = {c["id"]: c for c in read_checkpoint(tmp_path).categories or []}
    assert (categories[17]["name"], categories[17]["isthing"]) == ("moggy", 1)
    assert (categories[200]["name"], categories[200]["isthing"]) == ("carpet", 0)
