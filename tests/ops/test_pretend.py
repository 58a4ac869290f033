"""What a GPU runs, on a CPU: the choices of a GPU, with the operations' own CPU definitions in place of the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from test_rewrites import BATCHES, CONFIG, gradients, images, make_model, truth
from torch.utils._python_dispatch import TorchDispatchMode

from contract import assert_contract
from detr_fast import ops
from detr_fast.detr.segmentation import build_detr
from detr_fast.kernels import (  # noqa: F401
    add_layer_norm,
    attention,
    attention_map,
    bias_relu,
    group_norm_relu_upsample,
    mask_upsample,
    panoptic_merge,
)
from detr_fast.kernels.common import DEVICES
from detr_fast.ops import choices

MODERN, VOLTA = DEVICES["sm_90"], DEVICES["sm_70"]
OUTPUTS = ("pred_logits", "pred_boxes", "pred_masks")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU, but for its kernels, in whose place the operations' CPU bodies run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with ops.pretend(getattr(request, "param", "sm_90")):
        yield


class Calls(TorchDispatchMode):
    """Counts the calls of detr_fast's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        if function.namespace == "detr_fast":
            self.counts[function.name().removeprefix("detr_fast::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_computes_the_definition(model, sizes, gpu):
    """In float64, where nothing but the algebra is left to differ."""
    samples = images(sizes)
    exact = truth(model, samples)
    model.double()
    try:
        with ops.pretend("sm_90", float64=True), torch.no_grad(), Calls() as calls:
            fast = model([image.double() for image in samples])
    finally:
        model.float()
    assert calls.counts["group_norm_relu_upsample"] == 5
    for name in OUTPUTS:
        torch.testing.assert_close(fast[name], exact[name], rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
def test_contract_on_a_gpu(sizes):
    model = make_model().cuda()
    samples = [image.cuda() for image in images(sizes)]
    with torch.no_grad():
        with ops.plain():
            plain = model(samples)
        with Calls() as calls:
            fast = model(samples)
    assert calls.counts["group_norm_relu_upsample"] == 5
    exact = truth(model, samples)
    for name in OUTPUTS:
        assert_contract(fast[name], plain[name], exact[name])


@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize("kept", [(0, 0), (2, 0), (5, 17)])
def test_selected_masks_and_chunks(kept, dilation, gpu, monkeypatch):
    model = make_model(CONFIG.replace(dilation=dilation))
    samples = images(BATCHES["padded"])
    wanted = torch.zeros(2, 17, dtype=torch.bool)
    for row, count in zip(wanted, kept, strict=True):
        row[torch.randperm(17, generator=torch.Generator().manual_seed(count))[:count]] = True
    with torch.no_grad():
        every = model(samples)["pred_masks"]
        monkeypatch.setattr("detr_fast.ops.masks.GPU_CHUNK_BYTES", 1)
        some = model(samples, select=lambda logits: wanted)["pred_masks"]
    for masks, all_masks, row in zip(some, every, wanted, strict=True):
        assert masks.shape == (int(row.sum()), *all_masks.shape[1:])
        torch.testing.assert_close(masks, all_masks[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [BATCHES["odd"], BATCHES["padded"]], ids=["alone", "padded"])
@pytest.mark.parametrize("gpu", ["sm_90", "sm_70"], indirect=True)
def test_which_operations_run(model, sizes, gpu, request):
    modern = "sm_90" in request.node.name
    with torch.no_grad(), Calls() as calls:
        model(images(sizes))
    layers = CONFIG.enc_layers + 2 * CONFIG.dec_layers
    # one small image's queries leave most of 132 multiprocessors idle; tl.dot on sm_70 would leave its tensor cores so
    assert calls.counts["attention"] == (layers if modern else 0)
    assert calls.counts["add_layer_norm"] == 2 * CONFIG.enc_layers + 3 * CONFIG.dec_layers
    assert calls.counts["attention_map"] == 1
    assert calls.counts["group_norm_relu_upsample"] == 5
    assert (
        calls.counts["bias_relu"] == 53 + 1 + 1 + 3 + 5
    )  # ResNet-50, the projection, lay1, adapters, the other layers
    with torch.no_grad(), ops.plain("kernels"), Calls() as calls:
        model(images(sizes))
    assert not calls.counts


def test_trains(gpu):
    """In float64, where nothing but the algebra is left to differ."""
    model = make_model().double()
    samples = [image.double() for image in images(BATCHES["padded"])]
    wanted = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) < 0.4

    with ops.pretend("sm_90", float64=True), Calls() as calls:
        fast = gradients(model, samples, wanted)
    assert calls.counts["attention_backward"] and calls.counts["add_layer_norm_backward"]
    assert not calls.counts["bias_relu"]  # which has no gradient
    with ops.plain():
        plain = gradients(model, samples, wanted)
    assert fast.keys() == plain.keys()
    for name in fast:
        torch.testing.assert_close(
            fast[name], plain[name], rtol=1e-6, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_compiles_whole_and_exports_with_the_operations(model, gpu):
    samples = torch.stack(images(BATCHES["doubling"]))
    with torch.no_grad():
        eager = model(samples)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(samples)
        program = torch.export.export(model, (samples,))
        exported = program.module()(samples)
    assert {"attention", "attention_map", "add_layer_norm", "bias_relu", "group_norm_relu_upsample"} <= {
        node.target.name().removeprefix("detr_fast::")
        for node in program.graph.nodes
        if getattr(node.target, "namespace", "") == "detr_fast"
    }
    for name in OUTPUTS:
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(exported[name], eager[name], rtol=0, atol=1e-5)


def test_float16_stays_close_and_finite(model, gpu):
    samples = images(BATCHES["padded"])
    exact = truth(model, samples)
    with torch.no_grad():
        out = model(samples, dtype=torch.float16)
        loud = model([1e4 * image for image in samples], dtype=torch.float16)
    for name in OUTPUTS:
        spread = (exact[name].max() - exact[name].min()).item()
        assert (out[name] - exact[name]).abs().max().item() <= 16 * 2.0**-10 * spread
        assert torch.isfinite(loud[name]).all()


@pytest.mark.parametrize(
    ("arguments", "kernel", "reason"),
    [
        ((MODERN, 32, 1000, True), True, "a padding mask keeps PyTorch"),
        ((MODERN, 32, 112, False), True, "112 programs leave 132 multiprocessors idle"),
        ((MODERN, 32, 896, False), False, "fills the device"),
        ((MODERN, 40, 1, True), False, "head_dim 40 is none of 16, 32, 64"),
        ((VOLTA, 32, 1, True), False, "no tensor cores below sm_80"),
    ],
)
def test_attention_choice(arguments, kernel, reason):
    choice = choices.attention_choice(*arguments)
    assert choice.kernel == kernel and reason in choice.reason


def test_detection_alone(gpu):
    model = build_detr(CONFIG.replace(masks=False)).eval()
    samples = images(BATCHES["odd"])
    with torch.no_grad():
        fast = model(samples)
        with ops.plain():
            plain = model(samples)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(fast[name], plain[name], rtol=0, atol=1e-5)


def test_info_explains_each_kind_of_gpu(monkeypatch):
    volta, modern = ({name: choice for name, choice, _ in choices.table(kind)} for kind in (VOLTA, MODERN))
    assert volta.keys() == modern.keys()
    assert {name for name in volta if volta[name] != modern[name]} == {"attention, padded", "attention, small batch"}
    assert volta["attention, padded"] == "PyTorch SDPA" and modern["attention, padded"] == "Triton"
    assert volta["panoptic merge"] == volta["group norm + ReLU + upsample + sum"] == "Triton"
    monkeypatch.setattr(choices, "HAS_TRITON", False)
    assert ("all operations", "PyTorch", "Triton is not installed") in choices.table(MODERN)


def test_a_gpu_in_nchw_computes_the_definition(model, gpu):
    """Where the convolutions' layout is off, the kernels that need it are, too."""
    samples = images(BATCHES["padded"])
    with torch.no_grad():
        with ops.plain("channels_last"):
            fast = model(samples)
        with ops.plain():
            plain = model(samples)
    exact = truth(model, samples)
    for name in OUTPUTS:
        assert_contract(fast[name], plain[name], exact[name])


def test_another_target_is_refused():
    with pytest.raises(ValueError, match="sm_70"), ops.pretend("sm_42"):
        pass


def test_a_device_that_is_neither_takes_no_cpus_choices():
    """As on an accelerator of another kind."""
    with torch.device("meta"), torch.no_grad():
        masks = build_detr(CONFIG).eval()(torch.empty(1, 3, 64, 96))["pred_masks"]
    assert masks.shape == (1, 17, 16, 24)
