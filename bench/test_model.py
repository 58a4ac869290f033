"""The panoptic model and its parts, plain and ours, on one image."""

from contextlib import nullcontext

import pytest
import torch

from bench import cases
from bench.ladder import transformers_model
from bench.operations.case import BRAIN, HALF, SINGLE
from detr_fast import ops

LOW = {"cpu": BRAIN, "cuda": HALF}
WAYS = ["reference", "fast", "fast, low precision"]
MASKS = ["reference", "fast", "fast, all masks", "fast, low precision"]
OUTPUTS = ("pred_logits", "pred_boxes", "pred_masks")


class Subject:
    """A model, an image, and what the plain model in float64 makes of it."""

    def __init__(self, scale, device):
        self.model = cases.panoptic_model(scale.config).to(device)
        self.image = cases.images(1, scale.image).to(device)
        self.select = cases.keep(scale.kept)
        self.kept = self.select(torch.empty(1, scale.queries, 1, device=device))[0]
        self.shape = f"1 x 3 x {scale.image[0]} x {scale.image[1]}, {scale.kept} of {scale.queries} queries kept"
        self.model.double()
        with torch.inference_mode(), ops.plain():
            self.encoded = self.model.encode(self.image.double())
            out = self.model.predict(self.encoded, self.select)
        self.model.float()
        self.truth = self.outputs(out)

    def outputs(self, out):
        """The outcome, with the kept queries' masks [K,h,w]."""
        out = {name: out[name] for name in OUTPUTS if name in out}
        if "pred_masks" in out:
            masks = out["pred_masks"]
            out["pred_masks"] = masks[0] if isinstance(masks, list) else masks[0][self.kept]
        return out

    def dtype(self, way):
        return LOW[self.image.device.type] if "low precision" in way else SINGLE

    def call(self, way, function):
        """function(model), computed in a way."""
        rules = ops.plain if way == "reference" else nullcontext

        def run():
            with torch.inference_mode(), rules():
                return function(self.model)

        return run

    def encoded_for(self, way):
        """`encoded` in the dtypes and the memory layout in which a way's own encoder leaves it."""

        def left(name, x):
            x = x.to(self.dtype(way) if name in ("src", "features") else SINGLE)
            return x if way == "reference" or x.ndim != 4 else x.contiguous(memory_format=torch.channels_last)

        found = {name: x for name, x in self.encoded.items() if x is not None}
        as_left = {
            name: [left(name, y) for y in x] if name == "features" else left(name, x) for name, x in found.items()
        }
        return {"mask": None, **as_left}

    def selection(self, way):
        return None if way in ("reference", "fast, all masks") else self.select

    def check(self, dtype, exact):
        """The largest error of an outcome, in parts of the largest number of its tensor; TF32 has 10 bits, too."""
        allowed = 1e-4 if self.image.device.type == "cpu" and dtype == SINGLE else 0.1

        def check(out):
            errors = []
            for value, truth in zip(flat(out), flat(exact), strict=True):
                assert value.shape == truth.shape
                errors.append(((value.double() - truth).abs().max() / truth.abs().max()).item())
            assert all(error <= allowed for error in errors), f"errors {errors}, above {allowed}"  # a NaN is not below
            return max(errors)

        return check


def flat(x):
    parts = x.values() if isinstance(x, dict) else x
    return [x] if isinstance(x, torch.Tensor) else [leaf for part in parts for leaf in flat(part)]


@pytest.fixture(scope="module")
def subject(scale, device):
    return Subject(scale, device)


@pytest.fixture(scope="module")
def theirs(subject, device):
    """transformers' model with the same weights."""
    model = transformers_model(subject.model)
    if model is None:
        pytest.skip("transformers is not installed")
    return model.to(device)


def as_ours(out):
    """transformers' outcome by our names."""
    names = {"logits": "pred_logits", "pred_boxes": "pred_boxes", "pred_masks": "pred_masks"}
    return {ours: out[name] for name, ours in names.items() if name in out}


@pytest.mark.parametrize("way", WAYS)
def test_backbone(bench, subject, way):
    dtype = subject.dtype(way)
    call = subject.call(way, lambda model: model.detr.backbone[0].body(subject.image.to(dtype)))
    check = subject.check(dtype, subject.encoded["features"])
    bench("backbone", way, call, check, shape=subject.shape, dtype=dtype, count=True, seconds=3, memory=True)


@pytest.mark.parametrize("way", WAYS)
def test_transformer(bench, subject, way):
    dtype = subject.dtype(way)
    src = subject.encoded_for(way)["src"]
    pos = subject.model.detr.backbone[1].grid(*src.shape[-2:], src.device)
    call = subject.call(way, lambda model: model.detr.transformer(src, None, model.detr.query_embed.weight, pos))
    check = subject.check(dtype, [subject.encoded["hs"], subject.encoded["memory"]])
    bench("transformer", way, call, check, shape=subject.shape, dtype=dtype, count=True, seconds=2, memory=True)


@pytest.mark.parametrize("way", MASKS)
def test_mask_head(bench, subject, way):
    """The class and box heads included."""
    dtype = subject.dtype(way)
    encoded = subject.encoded_for(way)
    call = subject.call(way, lambda model: subject.outputs(model.predict(encoded, subject.selection(way))))
    check = subject.check(dtype, subject.truth)
    bench("mask head", way, call, check, shape=subject.shape, dtype=dtype, count=True, seconds=3, memory=True)


@pytest.mark.parametrize("way", [*MASKS, "transformers"])
def test_model(bench, subject, request, way):
    dtype, image, once = subject.dtype(way), subject.image, way == "transformers"
    if once:
        model = request.getfixturevalue("theirs")
        call = torch.inference_mode()(lambda: as_ours(model(image)))
    else:
        call = subject.call(way, lambda model: model(image, subject.selection(way), dtype))
    check = subject.check(dtype, subject.truth)
    bench(
        "whole model",
        way,
        call,
        lambda out: check(subject.outputs(out)),
        shape=subject.shape,
        dtype=dtype,
        seconds=4,
        once=once,
        count=True,
        memory=True,
    )


@pytest.mark.parametrize("way", [*WAYS, "transformers"])
def test_detection(bench, subject, request, way):
    dtype, image = subject.dtype(way), subject.image
    if way == "transformers":
        model = request.getfixturevalue("theirs").detr
        call = torch.inference_mode()(lambda: as_ours(model(image)))
    else:
        call = subject.call(way, lambda model: model.detr(image, dtype))
    check = subject.check(dtype, {name: subject.truth[name] for name in OUTPUTS[:2]})
    ours = way != "transformers"
    bench("detection", way, call, check, shape=subject.shape, dtype=dtype, count=ours, seconds=3, memory=ours)
