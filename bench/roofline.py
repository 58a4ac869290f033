"""An estimate: the least time that each stage of the model needs on a device, from counted operations and bytes.

    python -m bench.roofline --device v100|t4|a100|h200|cpu [--batch N] [--dtype fp32|fp16|bf16] [--out FILE.json]

Counts what PyTorch is asked to do, plain and ours, without doing it: FLOP of convolutions, matrix products and
attention, and the bytes of every operation's inputs and outputs. The floor of an operation is what its FLOP take at the
device's peak rate or its bytes at its bandwidth, whichever is longer; a stage's is the sum. Real devices reach no peak,
and launch no operation in no time; their caches, on the other hand, save bytes that are counted here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import measure
from bench.cases import REAL, Scale
from bench.operations.case import BRAIN, HALF, NAMES, SINGLE, Case, Draw
from bench.operations.masks import mask_upsample_case, upsampled
from bench.operations.merge import merged, panoptic_merge_case
from detr_fast import ops
from detr_fast.detr.segmentation import build_detr

RESULTS = Path(__file__).parent / "results"
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Device(NamedTuple):
    """Peak rates of a device.

    Attributes:
        flops: a second, by dtype; float32 as TF32 where cuDNN's convolutions compute in it unless told not to.
        bytes: a second.
        gpu: as for `ops.pretend`; None: a CPU.
        source: of the rates.
    """

    flops: dict[torch.dtype, float]
    bytes: float
    gpu: str | None
    source: str


DEVICES = {
    "v100": Device({SINGLE: 15.7e12, HALF: 125e12}, 900e9, "sm_70", "NVIDIA V100 SXM2 data sheet"),
    "t4": Device({SINGLE: 8.1e12, HALF: 65e12}, 320e9, "sm_75", "NVIDIA T4 data sheet"),
    "a100": Device({SINGLE: 156e12, HALF: 312e12, BRAIN: 312e12}, 2039e9, "sm_80", "NVIDIA A100 80 GB SXM data sheet"),
    "h200": Device(
        {SINGLE: 494e12, HALF: 989e12, BRAIN: 989e12},
        4.8e12,
        "sm_90",
        "NVIDIA H200 SXM data sheet, without sparsity",
    ),
}


def this_cpu(dtype: torch.dtype) -> Device:
    ceilings = measure.Ceilings(measure.CPU)
    source = f"a matrix product and a copy, measured on {measure.device_name(measure.CPU)}"
    return Device({dtype: ceilings.flops_per_second(dtype)}, ceilings.bytes_per_second, None, source)


# ---- counting ----

# The stage that a parameter belongs to, by the beginning of its name; the first that fits. What has no parameter
# belongs to the stage before it.
STAGES = {
    "detr.backbone.0.body.layer1": "backbone, stage 1",
    "detr.backbone.0.body.layer2": "backbone, stage 2",
    "detr.backbone.0.body.layer3": "backbone, stage 3",
    "detr.backbone.0.body.layer4": "backbone, stage 4",
    "detr.backbone.0.body": "backbone, stem",
    "detr.input_proj": "input projection",
    "detr.transformer.encoder": "transformer, encoder",
    "detr.transformer.decoder": "transformer, decoder",
    "detr.query_embed": "transformer, decoder",
    "detr.class_embed": "class and box heads",
    "detr.bbox_embed": "class and box heads",
    "bbox_attention": "mask head, attention maps",
    "mask_head.adapter1": "mask head, stride 16",
    "mask_head.adapter2": "mask head, stride 8",
    "mask_head.adapter3": "mask head, stride 4",
    "mask_head.lay3": "mask head, stride 16",
    "mask_head.lay4": "mask head, stride 8",
    "mask_head.lay5": "mask head, stride 4",
    "mask_head.gn3": "mask head, stride 16",
    "mask_head.gn4": "mask head, stride 8",
    "mask_head.gn5": "mask head, stride 4",
    "mask_head.out_lay": "mask head, stride 4",
    "mask_head": "mask head, stride 32",
}
FIRST, MERGE, UPSAMPLING = "backbone, stem", "panoptic merge", "mask upsampling"
ORDER = [
    FIRST,
    *(f"backbone, stage {number}" for number in range(1, 5)),
    "input projection",
    "transformer, encoder",
    "transformer, decoder",
    "class and box heads",
    "mask head, attention maps",
    *(f"mask head, stride {stride}" for stride in (32, 16, 8, 4)),
    MERGE,
    UPSAMPLING,
]
MODEL = tuple(stage for stage in ORDER if stage not in (MERGE, UPSAMPLING))
WHOLE = "whole model"


class Operation(NamedTuple):
    stage: str
    flops: int
    bytes: int


class Stages(measure.Tally):
    """Notes each operation with its stage: that of the first weight it reads, or of the operation before it.

    What is made of weights alone, such as a folded convolution, counts as a weight of their stage.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.operations: list[Operation] = []
        self.stage = FIRST
        self._weights: dict[int, tuple[Tensor, str]] = {}  # by id; holds the tensor, so that no other has its id
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._weights[id(tensor)] = tensor, next(stage for start, stage in STAGES.items() if name.startswith(start))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        # in place, so its outcome is its first argument, which it does not tell without computing it
        return args[0] if func.name() == "mkldnn::_convolution_pointwise_.binary" else func(*args, **kwargs)

    def count(self, inputs: list[Tensor], outputs: list[Tensor], flops: int, moved: int) -> None:
        weights = [self._weights[id(x)][1] for x in inputs if id(x) in self._weights]
        self.stage = weights[0] if weights else self.stage
        if weights and len(weights) == len(inputs):
            self._weights |= {id(x): (x, self.stage) for x in outputs}
        if moved:
            self.operations.append(Operation(self.stage, flops, moved))


@contextmanager
def pretending(gpu: str | None) -> Iterator[None]:
    """The choices that `ops` makes on a GPU, or on a CPU, for tensors that hold nothing."""
    with (
        mock.patch("detr_fast.ops.cache._fingerprint", lambda x: x.untyped_storage()._cdata),
        nullcontext() if gpu is None else ops.pretend(gpu),
    ):
        yield


@contextmanager
def empty_model(scale: Scale, dtype: torch.dtype = SINGLE) -> Iterator[Any]:
    """The model with weights that hold nothing, and within it all tensors hold nothing."""
    with torch.device("meta"):
        model = build_detr(scale.config).eval().requires_grad_(False)
    with FakeTensorMode(), torch.no_grad():
        yield model._apply(lambda x: torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype))


@cache
def count_plain(scale: Scale, batch: int, dtype: torch.dtype) -> list[Operation]:
    """The plain model, all of it in `dtype`, with the masks of all queries."""
    with empty_model(scale, dtype) as model, pretending(None), ops.plain():
        images = torch.empty(batch, 3, *scale.image, dtype=dtype)
        return counted(model, lambda: model(images))


@cache
def count_ours(scale: Scale, batch: int, dtype: torch.dtype, gpu: str | None) -> list[Operation]:
    """Ours, with the masks of the kept queries, once all that is kept between calls is there."""
    with empty_model(scale) as model, pretending(gpu):
        images = torch.empty(batch, 3, *scale.image)
        owner = torch.arange(batch).repeat_interleave(scale.kept)

        def forward() -> None:
            encoded = model.encode(images, dtype)
            model.detr.predict(encoded)
            queries = encoded["hs"][-1][:, : scale.kept].flatten(0, 1)
            model.masks(queries, owner, encoded, [scale.kept] * batch)

        return counted(model, forward)


def counted(model: nn.Module, forward: Callable[[], Any]) -> list[Operation]:
    """The operations of a second call."""
    with Stages(model) as stages:
        forward()
        stages.operations, stages.stage = [], FIRST
        forward()
    return stages.operations


@cache
def count_masks(scale: Scale, batch: int, gpu: str | None, ours: bool) -> list[Operation]:
    """The panoptic merge of the kept queries and, as facebookresearch/detr's PostProcessSegm, the masks of all.

    The merge is computed, as it depends on the masks: here on vertical stripes, of which none is too small to stay.
    """
    merge = panoptic_merge_case(scale, batch, scale.kept, merge_for_good=True)
    masks, *others = merge.inputs(Draw(measure.CPU, 0))
    inputs = (stripes(batch, scale.kept, masks.shape[1:]), *others)
    upsampling = mask_upsample_case(scale, batch, scale.queries)
    if gpu is None:
        merge, upsampling = replace(merge, ours=merged), replace(upsampling, ours=upsampled)
    operations = [*case_operations(MERGE, merge, inputs, ours)]
    with FakeTensorMode(), torch.no_grad():
        empty = (torch.empty(batch * scale.queries, *scale.level(4)), *upsampling.inputs(Draw(measure.CPU, 0))[1:])
        return [*operations, *case_operations(UPSAMPLING, upsampling, empty, ours)]


def stripes(batch: int, count: int, size: torch.Size) -> Tensor:
    """Logits [batch*count,*size] of stripes side by side."""
    place = torch.linspace(0, count, size[1])
    return -(place - torch.arange(count)[:, None] - 0.5).abs()[:, None].expand(-1, *size).repeat(batch, 1, 1)


def case_operations(stage: str, case: Case, inputs: tuple[Any, ...], ours: bool) -> Iterator[Operation]:
    call = case.ours if ours else case.plain
    call(*inputs)  # tables that are kept between calls are there then, whatever ran before
    stages = Stages(nn.Module())
    stages.stage = stage
    with stages:
        call(*inputs)
    yield from stages.operations


# ---- the table ----


@dataclass(frozen=True)
class Total:
    """Of some operations: multiply-accumulates in 1e9, bytes, how many they are, and their floor in seconds."""

    gmac: float
    bytes: int
    calls: int
    floor: float

    @classmethod
    def of(cls, operations: list[Operation], device: Device, dtype: torch.dtype) -> Total:
        rate = device.flops[dtype]
        floor = sum(max(operation.flops / rate, operation.bytes / device.bytes) for operation in operations)
        flops, moved = (sum(getattr(operation, name) for operation in operations) for name in ("flops", "bytes"))
        return cls(flops / 2e9, moved, len(operations), floor)


def run(device: Device, name: str, batch: int, dtype: torch.dtype, scale: Scale = REAL) -> dict[str, Any]:
    """Counts, which depend on nothing but the code, and estimates and measurements, as JSON."""
    ways = {
        "plain": [*count_plain(scale, batch, dtype), *count_masks(scale, batch, device.gpu, ours=False)],
        "ours": [*count_ours(scale, batch, dtype, device.gpu), *count_masks(scale, batch, device.gpu, ours=True)],
    }
    counts: dict[str, Any] = {}
    floors: dict[str, Any] = {}
    for stage, parts in [
        *((stage, (stage,)) for stage in ORDER),
        (WHOLE, MODEL),
        (f"{WHOLE} and merge", (*MODEL, MERGE)),
    ]:
        for way, operations in ways.items():
            chosen = [operation for operation in operations if operation.stage in parts]
            total = Total.of(chosen, device, dtype)
            counts.setdefault(stage, {})[way] = {"gmac": total.gmac, "bytes": total.bytes, "calls": total.calls}
            floors.setdefault(stage, {})[way] = total.floor
    return {
        "device": name,
        "batch": batch,
        "dtype": NAMES[dtype],
        "image": list(scale.image),
        "kept": scale.kept,
        "torch": torch.__version__.partition("+")[0],
        "stages": counts,
        "estimates": {
            "floor_seconds": floors,
            "flops_per_second": device.flops[dtype],
            "bytes_per_second": device.bytes,
            "source": device.source,
            "measured_seconds": measured(name, batch, dtype) if scale is REAL else {},
        },
    }


# ---- measurements ----

# The stages that a group of `pytest bench` measures: those whose names begin so.
MEASURED = {
    "backbone": ("backbone",),
    "transformer": ("transformer",),
    "mask head": ("class and box heads", "mask head"),
    WHOLE: MODEL,
    f"{WHOLE} and merge": (*MODEL, MERGE),
}


def measured(name: str, batch: int, dtype: torch.dtype, folder: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Best seconds of plain and ours, by what was measured, as far as bench/results/ has them for this device."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        machine = content.get("machine") or content.get("machine_info") or {}
        on = str(machine.get("device", machine.get("cpu", "")))
        is_cpu = on == machine.get("cpu")
        if not (is_cpu if name == "cpu" else name in on.lower()):
            continue
        if "benchmarks" in content and batch == 1:
            for row in content["benchmarks"]:
                way = {"reference": "plain", "fast": "ours", "fast, low precision": "ours"}.get(
                    row["extra_info"]["way"]
                )
                if way and row["group"] in MEASURED and row["extra_info"]["dtype"] == NAMES[dtype]:
                    found.setdefault(row["group"], {})[way] = row["stats"]["min"]
        if "mask_head_gmac" in content and batch == 1 and dtype == SINGLE:
            rows = {"plain": content["rows"]["plain"], "ours": content["rows"]["merge"]}
            found[f"{WHOLE} and merge"] = {way: min(row["seconds"]) for way, row in rows.items()}
        if "sections" in content:
            names = {"plain fp32 eager": ("plain", SINGLE), "plain fp16 autocast": ("plain", HALF)}
            names |= {f"ours {NAMES[kind]}": ("ours", kind) for kind in NAMES}
            for row in content["sections"].get("ladder", {"rows": []})["rows"]:
                way, kind = names.get(row["name"], ("", None))
                if row["batch"] == batch and kind == dtype and "seconds" in row:
                    found.setdefault(WHOLE, {})[way] = min(row["seconds"])
    return found


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    estimates, stages = result["estimates"], result["stages"]
    rate, bandwidth = estimates["flops_per_second"] / 1e12, estimates["bytes_per_second"] / 1e9
    height, width = result["image"]
    lines = [
        f"ESTIMATE, no measurement: the least time on {result['device']} at {rate:.3g} TFLOP/s in {result['dtype']} "
        f"and {bandwidth:.4g} GB/s ({estimates['source']}), batch {result['batch']}, {height} x {width}, "
        f"{result['kept']} queries kept by ours.",
        "",
        "| stage | plain: GMAC | MB | operations | floor ms | ours: GMAC | MB | operations | floor ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, ways in stages.items():
        cells = [
            f"{total['gmac']:.2f} | {total['bytes'] / 1e6:.1f} | {total['calls']} | "
            f"{1e3 * estimates['floor_seconds'][stage][way]:.3f}"
            for way, total in ways.items()
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    for name, seconds in estimates["measured_seconds"].items():
        times = ", ".join(f"{way} {1e3 * value:.1f} ms" for way, value in seconds.items())
        lines.append(f"\nMEASURED, {name}: {times}{floor_of(name, estimates['floor_seconds'])}.")
    return "\n".join(lines)


def floor_of(name: str, floors: dict[str, dict[str, float]]) -> str:
    """The floor of what was measured under a name."""
    stages = [stage for stage in ORDER if stage.startswith(MEASURED[name])]
    sums = {way: sum(floors[stage][way] for stage in stages) for way in ("plain", "ours")}
    return "; floor " + ", ".join(f"{way} {1e3 * value:.1f} ms" for way, value in sums.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], required=True)
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="default fp16, on a CPU fp32")
    parser.add_argument("--out", type=Path, help="write counts, floors and measurements to this JSON file")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype or ("fp32" if options.device == "cpu" else "fp16")]
    device = this_cpu(dtype) if options.device == "cpu" else DEVICES[options.device]
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if dtype not in device.flops:
        accepted = ", ".join(NAMES[known] for known in device.flops)
        parser.error(f"--dtype must be one of {accepted} on {options.device}, got {NAMES[dtype]}")
    result = run(device, options.device, options.batch, dtype)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
