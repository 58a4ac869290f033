"""The exact engine against the plain definition, step by step and all together: see docs/numerics.md."""

import pytest
import torch

from contract import assert_contract
from detr_fast import ops, reference
from detr_fast.config import DetrConfig
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.detr.segmentation import build_detr

CONFIG = DetrConfig(
    backbone="resnet50",
    backbone_width=8,
    hidden_dim=128,
    enc_layers=2,
    dec_layers=2,
    dim_feedforward=64,
    num_queries=17,
    num_classes=5,
    masks=True,
)
# sizes that double at every level, that double at none, and padded batches
BATCHES = {
    "doubling": [(64, 96)] * 2,
    "odd": [(67, 101)],
    "padded": [(65, 97), (80, 70)],
    "thin": [(33, 200), (150, 60), (64, 64)],
}


def make_model(config=CONFIG, seed=0):
    """Random weights, normalisation included, of a size that keeps activations near 1."""
    torch.manual_seed(seed)
    model = build_detr(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0.7 if name.endswith("weight") else 0, 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def images(sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def truth(model, samples, **kwargs):
    """The plain model in float64."""
    model.double()
    with torch.no_grad(), ops.plain():
        out = model([image.double() for image in samples], **kwargs)
    model.float()
    return out


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("step", [*ops.REWRITES, "all"])
def test_each_rewrite_alone_and_all_together(model, step, sizes):
    samples = images(sizes)
    others = [name for name in ops.REWRITES if name != step]
    with torch.no_grad():
        with ops.plain():
            plain = model(samples)
        if step == "all":
            fast = model(samples)
        else:
            with ops.plain(*others):
                fast = model(samples)
    exact = truth(model, samples)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        assert_contract(fast[name], plain[name], exact[name])


@pytest.mark.parametrize("kept", [(0, 0), (1, 0), (5, 17), (17, 17)])
def test_selected_masks_are_those_of_the_full_call(model, kept):
    samples = images(BATCHES["padded"])
    wanted = torch.zeros(2, 17, dtype=torch.bool)
    for row, count in zip(wanted, kept, strict=True):
        row[torch.randperm(17, generator=torch.Generator().manual_seed(count))[:count]] = True
    with torch.no_grad():
        every = model(samples)
        out = model(samples, select=lambda logits: wanted)
    assert torch.equal(out["selected"], wanted)
    assert [len(masks) for masks in out["pred_masks"]] == list(kept)
    for masks, all_masks, row in zip(out["pred_masks"], every["pred_masks"], wanted, strict=True):
        assert masks.shape[1:] == all_masks.shape[1:]
        torch.testing.assert_close(masks, all_masks[row], rtol=0, atol=1e-5)


def test_chunks_do_not_change_the_masks(model, monkeypatch):
    samples = images(BATCHES["odd"])
    with torch.no_grad():
        whole = model(samples)["pred_masks"]
        monkeypatch.setattr("detr_fast.ops.masks.CHUNK_BYTES", 1)
        torch.testing.assert_close(model(samples)["pred_masks"], whole, rtol=0, atol=1e-5)


def gradients(model, samples, wanted):
    """Of every parameter, for a loss of classes, boxes and the masks of the `wanted` queries."""
    model.zero_grad()
    out = model(samples, select=lambda logits: wanted)
    loss = out["pred_logits"].square().mean() + out["pred_boxes"].square().mean()
    (loss + sum(masks.square().mean() for masks in out["pred_masks"])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dilation", [False, True])
def test_gradients_equal_the_plain_ones(dilation):
    model = make_model(CONFIG.replace(dilation=dilation)).double()
    samples = [image.double() for image in images(BATCHES["padded"])]
    wanted = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) < 0.4

    fast = gradients(model, samples, wanted)
    with ops.plain():
        plain = gradients(model, samples, wanted)
    assert fast.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-6, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", [(12, 14), (11, 14), (12, 13), (11, 13), (6, 7), (9, 20)])
def test_upsample_conv_is_exact_at_every_size(size):
    """Doubling, cropped doubling in one or both directions, no upsampling, and a size that no stride-2 layer gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    fast = ops.upsample_conv(x, weight, ops.phase_kernels(weight), size)
    plain = reference.upsample_conv(x, weight, size)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for fast_grad, plain_grad in zip(
        torch.autograd.grad(fast, (x, weight), upstream), torch.autograd.grad(plain, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-12, atol=1e-12)


def test_group_norm_does_not_cancel():
    """A mean 1000 times the deviation costs E[x^2] - E[x]^2 all digits."""
    norm = torch.nn.GroupNorm(8, 16)
    x = torch.randn(2, 16, 30, 40, generator=torch.Generator().manual_seed(0)) + 1000
    exact = torch.nn.functional.group_norm(x.double(), 8).relu()
    plain = torch.nn.functional.group_norm(x, 8).relu()
    assert_contract(ops.group_norm_relu(x.to(memory_format=torch.channels_last), norm), plain, exact)


def test_an_image_that_is_all_padding_gives_no_nan(model):
    samples = NestedTensor(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    samples.mask[1] = True
    for run in (ops.plain, lambda: ops.plain("mask_head")):
        with torch.no_grad(), run():
            out = model(samples)
        assert all(torch.isfinite(out[name]).all() for name in ("pred_logits", "pred_boxes", "pred_masks"))
    with torch.no_grad():
        fast = model(samples)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        assert torch.isfinite(fast[name]).all()
        torch.testing.assert_close(fast[name], out[name], rtol=0, atol=1e-4)


def test_nothing_reads_the_padding(model):
    """An image gives the same alone and in a batch, whatever the memory holds where it is padded."""
    samples = nested_tensor_from_tensor_list(images(BATCHES["padded"]))
    with torch.no_grad():
        batch = model(samples)
        alone = model(NestedTensor(samples.tensors[:1], samples.mask[:1]))
        for name in ("pred_logits", "pred_boxes", "pred_masks"):
            torch.testing.assert_close(alone[name], batch[name][:1], rtol=0, atol=1e-5)
        encoded = model.detr.encode(samples)
        encoded["memory"] = torch.where(encoded["mask"][:, None], 1e3, encoded["memory"])
        masks = model.predict(encoded)["pred_masks"]
    torch.testing.assert_close(masks, batch["pred_masks"], rtol=0, atol=1e-5)


def multiply_in_place(parameter):
    with torch.no_grad():
        parameter.mul_(1.5)


def write_through_data(parameter):
    parameter.data.mul_(1.5)


def replace_data(parameter):
    parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("change", [multiply_in_place, write_through_data, replace_data])
@pytest.mark.parametrize(
    "name",
    [
        "detr.backbone.0.body.layer1.0.conv1.weight",
        "detr.transformer.encoder.layers.0.self_attn.in_proj_weight",
        "detr.transformer.decoder.layers.1.multihead_attn.in_proj_bias",
        "detr.query_embed.weight",
        "mask_head.lay4.weight",
    ],
)
def test_nothing_kept_goes_stale(name, change):
    model = make_model()
    samples = images(BATCHES["odd"])
    with torch.inference_mode():
        before = model(samples)
    change(model.get_parameter(name))
    with torch.inference_mode():
        after = model(samples)
    fresh = build_detr(CONFIG).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected = fresh(samples)
    assert not torch.equal(after["pred_masks"], before["pred_masks"])
    for key in expected:
        assert torch.equal(after[key], expected[key])


def test_what_is_kept_is_bounded():
    owner = torch.nn.Identity()
    built = []
    for key in [*range(6), 5, 4, 0]:
        ops.kept(owner, "squares", key, (), lambda key=key: built.append(key))
    assert built == [0, 1, 2, 3, 4, 5, 0]  # 5 and 4 were kept, 0 was the first to go


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_and_finite(model, dtype):
    samples = images(BATCHES["padded"])
    exact = truth(model, samples)
    with torch.no_grad():
        out = model(samples, dtype=dtype)
        loud = model([1e4 * image for image in samples], dtype=dtype)
    digits = 2.0 ** -(7 if dtype == torch.bfloat16 else 10)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        assert out[name].dtype == torch.float32
        spread = (exact[name].max() - exact[name].min()).item()
        assert (out[name] - exact[name]).abs().max().item() <= 16 * digits * spread
        assert torch.isfinite(loud[name]).all()


def test_compiles_whole_and_exports(model):
    samples = torch.stack(images(BATCHES["doubling"]))
    with torch.no_grad():
        eager = model(samples)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(samples)
        exported = torch.export.export(model, (samples,)).module()(samples)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-5)


def test_bad_samples_and_selections_are_named(model):
    with pytest.raises(TypeError, match="samples must be a Tensor"):
        model("image.jpg")
    with pytest.raises(ValueError, match="empty list"):
        model([])
    with pytest.raises(ValueError, match=r"\[B,3,H,W\].*uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"mask must be a bool Tensor \[1, 8, 8\].*\[1, 4, 4\]"):
        NestedTensor(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"select must return bool \[1, 17\]"):
        model(torch.zeros(1, 3, 64, 64), select=lambda logits: logits > 0)
    with pytest.raises(ValueError, match="unknown rewrites folding"), ops.plain("folding"):
        pass
