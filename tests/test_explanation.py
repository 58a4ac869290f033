"""Attention weights against torch.nn.MultiheadAttention's and transformers', and the figure sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from builders import theirs
from detr_fast import ops
from detr_fast.checkpoint import save_model
from detr_fast.cli import main
from detr_fast.compat.accelerate import accelerate
from detr_fast.data.shapes import render
from detr_fast.detr.attention import decoder_attention, encoder_attention
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.explanation import explain
from detr_fast.predictor import Predictor
from detr_fast.visualize import draw_heat, draw_mask
from tiny import tiny_detr

SMALL = {"image_size": 96, "max_image_size": 160}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_detr(enc_layers=2, dec_layers=2).double()


@pytest.fixture(scope="module")
def padded() -> NestedTensor:
    """Two images, of which the second has padding at the right and below."""
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list(
        [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in ((160, 224), (130, 100))]
    )


def torch_weights(attention: nn.Module, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
    """[B,heads,Q,L] as torch.nn.MultiheadAttention returns them."""
    module = nn.MultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True).double().eval()
    module.load_state_dict(attention.state_dict())
    return module(query, key, key, key_padding_mask=padding, average_attn_weights=False)[1]


@torch.no_grad()
def expected(model: nn.Module, samples: NestedTensor) -> tuple[Tensor, Tensor]:
    """Weights of the encoder's and of the decoder's last layer, [B,heads,.,L], from the plain definitions."""
    detr = model.detr
    with ops.plain():
        encoded = detr.encode(samples)
        _, pos = detr.backbone(samples)
    x, pos = (map_.flatten(2).transpose(1, 2).double() for map_ in (encoded["src"], pos[-1]))
    padding = None if encoded["mask"] is None else encoded["mask"].flatten(1)
    for layer in detr.transformer.encoder.layers:
        encoder = torch_weights(layer.self_attn, x + pos, x + pos, padding)
        x = layer.norm1(x + layer.self_attn.definition(x + pos, x + pos, x, padding))
        x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    query_pos = detr.query_embed.weight.expand(len(x), -1, -1)
    tgt = torch.zeros_like(query_pos)
    for layer in detr.transformer.decoder.layers:
        tgt = layer.norm1(tgt + layer.self_attn.definition(tgt + query_pos, tgt + query_pos, tgt))
        decoder = torch_weights(layer.multihead_attn, tgt + query_pos, x + pos, padding)
        tgt = layer.norm2(tgt + layer.multihead_attn.definition(tgt + query_pos, x + pos, x, padding))
        tgt = layer.norm3(tgt + layer.linear2(layer.linear1(tgt).relu()))
    return encoder, decoder


def test_decoder_attention_is_that_of_multihead_attention(model: nn.Module, padded: NestedTensor) -> None:
    queries = torch.zeros(2, 12, dtype=torch.bool)
    queries[0, [1, 7]] = queries[1, [0, 7, 11]] = True
    with torch.no_grad():
        weights = decoder_attention(model, padded, queries)
        mask = model.encode(padded)["mask"]
    assert weights.shape == (5, 8, *mask.shape[-2:]) and mask[1].any()
    truth = expected(model, padded)[1].transpose(1, 2)[queries].view_as(weights)
    assert (weights - truth).abs().max() < 1e-12
    assert (weights.sum((2, 3)) - 1).abs().max() < 1e-12
    assert not weights[2:, :, mask[1]].any()
    assert weights.std(dim=0).max() > 1e-3  # of different queries they differ


def test_encoder_attention_is_that_of_multihead_attention(model: nn.Module, padded: NestedTensor) -> None:
    with torch.no_grad():
        weights = encoder_attention(model, padded, [(0.0, 0.0), (0.4, 0.35)])
    height, width = weights.shape[-2:]
    truth = expected(model, padded)[0][:, :, [0, int(0.35 * height) * width + int(0.4 * width)]].transpose(1, 2)
    assert (weights - truth.reshape(weights.shape)).abs().max() < 1e-12


def test_attention_is_that_of_transformers() -> None:
    upstream = theirs(attn_implementation="eager")
    pixels = torch.randn(1, 3, 90, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = upstream(pixel_values=pixels, output_attentions=True)
        ours = accelerate(upstream).detr
        weights = decoder_attention(ours, pixels, torch.ones(1, 7, dtype=torch.bool))
        encoder = encoder_attention(ours, pixels, [(0.0, 0.0)])
    assert (weights.flatten(2).transpose(0, 1) - out.cross_attentions[-1][0]).abs().max() < 1e-5
    assert (encoder[0, 0].flatten(1) - out.encoder_attentions[-1][0, :, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("queries", [torch.ones(1, 11, dtype=torch.bool), torch.ones(1, 12)])
def test_decoder_attention_names_wrong_queries(model: nn.Module, queries: Tensor) -> None:
    with pytest.raises(ValueError, match=r"queries must be bool \[1, 12\]"):
        decoder_attention(model, torch.zeros(1, 3, 64, 64), queries)


def test_encoder_attention_names_a_point_outside(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"points must be .* got \(0.5, 1.0\)"):
        encoder_attention(model, torch.zeros(1, 3, 64, 64), [(0.5, 1.0)])


def test_heat_and_mask_follow_the_numbers() -> None:
    grey = Image.new("RGB", (40, 20), (128, 128, 128))
    weights = np.zeros((2, 4), dtype=np.float32)
    weights[0, 3] = 1e-3
    heat = np.asarray(draw_heat(grey, weights)).astype(int).sum(2)
    assert heat.max() > 2 * heat[15, 4] and heat[0, 39] == heat.max()
    assert (draw_heat(grey, np.zeros((2, 4))).getextrema()) == ((89, 89),) * 3  # dimmed, and nothing else
    mask = np.asarray(draw_mask(grey, np.repeat([[1.0, 0.0]], 2, 0), (255, 0, 0)))
    assert tuple(mask[10, 2]) == (191, 64, 64)
    assert mask[10, 38].max() < 32


@pytest.mark.parametrize("masks", [True, False])
def test_explanation_describes_every_kept_query(masks: bool, tmp_path: Path) -> None:
    image = Image.fromarray(render(3, 0, (64, 96)).image)
    explanation = explain(Predictor(tiny_detr(masks=masks, **SMALL), device="cpu", threshold=0.4), image, [(90, 5)])
    kept = len(explanation.result.scores)
    assert 0 < kept < 12 and len(set(explanation.queries.tolist())) == kept
    assert explanation.attention.shape[:2] == (kept, 8)
    assert explanation.point_attention.shape[:2] == (1, 8)
    explanation.save(tmp_path / "new")
    kinds = ["box", "attention", "heads"] + (["mask"] if masks else [])
    names = {f"query-{query:03d}-{kind}" for query in explanation.queries for kind in kinds}
    names |= {"sheet", "image", "overlay", "point-90-5", "point-90-5-attention", "point-90-5-heads"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{name}.png" for name in names}
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width == 1184 and sheet.height > kept * 256
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        explanation.save(tmp_path / "new")


def test_nothing_found_is_a_sheet_of_the_image() -> None:
    explanation = explain(Predictor(tiny_detr(**SMALL), device="cpu", threshold=1.0), Image.new("RGB", (96, 64)))
    assert explanation.attention.shape[0] == 0 and explanation.sheet().width == 1184


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_detr(**SMALL), tmp_path / "model")
    Image.fromarray(render(3, 0, (64, 96)).image).save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("no image")
    right = {"image": tmp_path / "image.png", "--out": tmp_path / "out", "--model": tmp_path / "model"}
    right |= {"--device": "cpu", "--threshold": "0.4"}

    def run(**changes: object) -> tuple[int, str, str]:
        options = {**right, **{name if name == "image" else f"--{name}": value for name, value in changes.items()}}
        arguments = ["explain", options.pop("image"), *(part for pair in options.items() for part in pair)]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    code, printed, err = run(point="10,20")
    assert (code, err) == (0, "") and "sheet.png" in printed and (tmp_path / "out" / "sheet.png").is_file()
    wrong = [
        ("image", tmp_path / "missing.png", "missing.png"),
        ("image", tmp_path / "text.png", "text.png"),
        ("out", tmp_path / "out", "--out"),
        ("model", tmp_path / "missing", "--model"),
        ("threshold", "2", "--threshold"),
        ("point", "96,0", "96 x 64"),
        ("point", "far", "X,Y"),
    ]
    for name, value, named in wrong:
        code, printed, err = run(**{"out": tmp_path / "other", name: value})
        assert (code, printed, err.count("\n")) == (2, "", 1) and named in err, (name, err)
    assert not (tmp_path / "other").exists()
