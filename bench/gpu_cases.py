"""The kernels at the shapes that DETR-R50 panoptic gives them: inputs, definitions, rivals, bytes and FLOP of each.

Every case runs on any device: on a CPU an operation is its own plain implementation, at `TINY` in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import REAL, Scale
from detr_fast import reference
from detr_fast.categories import COCO_PANOPTIC
from detr_fast.ops import merge
from detr_fast.postprocess import post_process_panoptic_segmentation

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAMES = {HALF: "fp16", BRAIN: "bf16", SINGLE: "fp32"}

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


class Draw:
    """Random inputs on a device, the same for the same seed."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def image_layout(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)

    def masks(self, count: int, size: tuple[int, int]) -> Tensor:
        """Logits float32 [count, *size] as smooth as a mask head's: blobs of a few cells, each with its own level."""
        coarse = self.normal(count, 1, 6, 8) * 4 + self.normal(count, 1, 1, 1)
        return F.interpolate(coarse, size=size, mode="bicubic")[:, 0]

    def padding(self, batch: int, size: tuple[int, int]) -> Tensor:
        """bool [batch, h*w]: images 10 to 30 % narrower than the batch, but for each fourth."""
        mask = torch.zeros((batch, *size), dtype=torch.bool, device=self.device)
        for index in range(batch):
            mask[index, :, size[1] - index % 4 * size[1] // 10 :] = index % 4 > 0
        return mask.flatten(1)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: its file in kernels/.
        name: of the shape, dtype and options, unique with `op`.
        batch: images.
        inputs: makes the arguments of everything below.
        ours: the operation; integers are compared as such.
        plain: the definition. Its time is the one to beat, and in float64 it is the truth.
        rivals: other ways to compute the same.
        bytes: what must cross the memory at least, each input read and each output written once.
        flops: multiplications and additions of the definition.
        dtype: what it computes in.
        graph: whether a CUDA graph can hold it: not what copies from the host, nor PyTorch's autograd.
    """

    op: str
    name: str
    batch: int
    inputs: Callable[[Draw], tuple[Any, ...]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    bytes: int
    flops: int
    dtype: torch.dtype
    graph: bool = True
    rivals: dict[str, Callable[..., Any]] = field(default_factory=dict)


def kernel(op: str, file: str | None = None) -> Callable[..., Any]:
    """The operation as kernels/ has it, imported when it is first needed: a machine without CUDA may lack Triton."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"detr_fast.kernels.{file or op}"), op)(*arguments)

    return call


def all_cases(scale: Scale = REAL) -> list[Case]:
    families = (
        attention,
        attention_map,
        group_norm_relu_upsample,
        bias_relu,
        add_layer_norm,
        mask_upsample,
        panoptic_merge,
    )
    return [case for family in families for case in family(scale)]


# ---- attention ----


def attention(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    encoder, decoder, own = (s.tokens, s.tokens), (s.queries, s.tokens), (s.queries, s.queries)
    for batch, lengths, dtype, padded in (
        (some, encoder, HALF, False),
        (some, encoder, HALF, True),
        (some, decoder, HALF, False),
        (some, decoder, HALF, True),
        (some, own, HALF, False),
        (one, encoder, HALF, False),
        (one, decoder, HALF, False),
        (many, encoder, HALF, True),
        (many, decoder, HALF, True),
        (some, encoder, BRAIN, True),
        (some, encoder, SINGLE, True),
        (some, decoder, SINGLE, True),
    ):
        yield attention_case(s, batch, lengths, dtype, padded)
    yield attention_training(s, some)


def attention_case(s: Scale, batch: int, lengths: tuple[int, int], dtype: torch.dtype, padded: bool) -> Case:
    queries, keys = lengths

    def inputs(draw: Draw) -> tuple[Any, ...]:
        """Slices of one GEMM: of Q, K and V, or of the keys and values of two decoder layers."""
        first, *pair = draw.normal(batch, keys, 4 * s.dim, dtype=dtype).chunk(4, -1)[:3]
        q = first if queries == keys else draw.normal(batch, queries, s.dim, dtype=dtype)
        return q, *pair, s.heads, draw.padding(batch, s.level(32)) if padded else None

    size = dtype.itemsize
    moved = batch * (2 * queries + 2 * keys) * s.dim * size + 4 * batch * s.heads * queries + padded * batch * keys
    backends = {name: backend for name, backend in BACKENDS.items() if not (padded and name == "SDPA flash")}
    return Case(
        op="attention",
        name=f"{queries} x {keys}, B {batch}, {NAMES[dtype]}{', padded' if padded else ''}",
        batch=batch,
        inputs=inputs,
        ours=kernel("attention"),
        plain=reference.attention,
        bytes=moved,
        flops=4 * batch * queries * keys * s.dim,
        dtype=dtype,
        rivals={"SDPA": sdpa} | {name: forced(backend) for name, backend in backends.items()},
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
    allowed = None if padding is None else ~padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(-2)


def forced(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(*arguments)

    return call


def attention_training(s: Scale, batch: int) -> Case:
    def inputs(draw: Draw) -> tuple[Any, ...]:
        q, k, v = draw.normal(3, batch, s.tokens, s.dim, dtype=HALF)
        return draw.normal(batch, s.tokens, s.dim, dtype=HALF), q, k, v, s.heads, draw.padding(batch, s.level(32))

    numbers = batch * s.tokens * s.dim
    return Case(
        op="attention",
        name=f"{s.tokens} x {s.tokens}, B {batch}, fp16, padded, forward and backward",
        batch=batch,
        inputs=inputs,
        ours=trained(kernel("attention"), 3),
        plain=trained(reference.attention, 3),
        bytes=12 * numbers * HALF.itemsize + 2 * batch * s.tokens,  # reads q, k, v twice, out and its gradient
        flops=12 * batch * s.tokens**2 * s.dim,
        dtype=HALF,
        graph=False,
        rivals={"SDPA": trained(sdpa, 3)},
    )


def trained(call: Callable[..., Tensor], count: int) -> Callable[..., Tensor]:
    """The outcome and the gradients of the first `count` arguments, flat, from the gradient of the outcome."""

    def run(grad: Tensor, *arguments: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            wanted = [argument.detach().requires_grad_() for argument in arguments[:count]]
            out = call(*wanted, *arguments[count:])
            gradients = torch.autograd.grad(out, wanted, grad.to(out.dtype))
        return torch.cat([x.detach().flatten() for x in (out, *gradients)])

    return run


# ---- attention map ----


def attention_map(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    for batch, dtype, padded in (
        (some, HALF, False),
        (some, HALF, True),
        (one, HALF, False),
        (many, HALF, False),
        (some, BRAIN, True),
        (some, SINGLE, True),
    ):
        yield attention_map_case(s, batch, dtype, padded)


def attention_map_case(s: Scale, batch: int, dtype: torch.dtype, padded: bool) -> Case:
    count, scale = s.kept * batch, (s.dim // s.heads) ** -0.5

    def inputs(draw: Draw) -> tuple[Any, ...]:
        q, k = draw.normal(count, s.dim, dtype=dtype) * scale, draw.normal(batch, s.tokens, s.dim, dtype=dtype)
        image = torch.arange(batch, device=draw.device).repeat_interleave(s.kept)
        return q, k, image, s.heads, draw.padding(batch, s.level(32)) if padded else None

    size = dtype.itemsize
    return Case(
        op="attention_map",
        name=f"{s.kept} x {s.tokens}, B {batch}, {NAMES[dtype]}{', padded' if padded else ''}",
        batch=batch,
        inputs=inputs,
        ours=kernel("attention_map"),
        plain=plain_attention_map,
        bytes=(count + batch * s.tokens) * s.dim * size + 4 * count * s.tokens * s.heads + padded * batch * s.tokens,
        flops=2 * count * s.tokens * s.dim,
        dtype=dtype,
    )


def plain_attention_map(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None) -> Tensor:
    """`reference.attention_map` of projected queries [N,d] and keys [B,L,d], each query's image given: [N,L,heads]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(dtype).unflatten(-1, (nheads, -1)) for x in (q, k))
    scores = torch.einsum("nhc,nlhc->nlh", q, k[image])
    if padding is not None:
        scores = scores.masked_fill(padding[image, :, None], float("-inf"))
    return scores.flatten(1).softmax(-1).view_as(scores)


# ---- normalisations ----


def group_norm_relu_upsample(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    wide = s.dim + s.heads
    # (channels, stride, stride that it is upsampled to): gn1 to gn5 of the mask head
    layers = ((wide, 32, 32), (s.dim // 2, 32, 16), (s.dim // 4, 16, 8), (s.dim // 8, 8, 4), (s.dim // 16, 4, 4))
    for layer in layers:
        yield group_norm_case(s, some, layer, HALF)
    yield group_norm_case(s, one, layers[3], HALF)
    yield group_norm_case(s, many, layers[3], HALF)
    yield group_norm_case(s, some, layers[3], BRAIN)
    yield group_norm_case(s, some, layers[3], SINGLE)


def group_norm_case(s: Scale, batch: int, layer: tuple[int, int, int], dtype: torch.dtype) -> Case:
    channels, stride, new_stride = layer
    low, high, count = s.level(stride), s.level(new_stride), s.kept * batch
    upsampled = stride != new_stride

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x = draw.image_layout(count, channels, *low, dtype=dtype)
        weight, bias = 1 + draw.normal(channels) / 4, draw.normal(channels) / 4
        shared = draw.image_layout(batch, channels, *high, dtype=dtype) if upsampled else None
        image = torch.arange(batch, device=draw.device).repeat_interleave(s.kept) if upsampled else None
        return x, weight, bias, min(8, channels), 1e-5, shared, image, *high

    read = count * math.prod(low) + upsampled * batch * math.prod(high)
    written = count * math.prod(high)
    size = "x".join(map(str, low)) + (f" to {'x'.join(map(str, high))}" if upsampled else "")
    return Case(
        op="group_norm_relu_upsample",
        name=f"{s.kept} x {channels} x {size}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=inputs,
        ours=kernel("group_norm_relu_upsample"),
        plain=plain_group_norm,
        bytes=channels * dtype.itemsize * (read + written),
        flops=channels * (8 * count * math.prod(low) + upsampled * written),
        dtype=dtype,
    )


def plain_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shared: Tensor | None,
    image: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps).relu()
    if shared is None:
        return y
    return F.interpolate(y, size=(height, width)) + shared[image]


def bias_relu(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    # (channels, stride, residual): the last convolutions of a ResNet-50's first and third stage, and its stem
    block, deep, stem = (s.dim, 4, True), (4 * s.dim, 16, True), (s.dim // 4, 2, False)
    for batch, layer, dtype in (
        (some, block, HALF),
        (some, deep, HALF),
        (some, stem, HALF),
        (one, block, HALF),
        (many, block, HALF),
        (some, block, BRAIN),
        (some, block, SINGLE),
    ):
        yield bias_relu_case(s, batch, layer, dtype)


def bias_relu_case(s: Scale, batch: int, layer: tuple[int, int, bool], dtype: torch.dtype) -> Case:
    channels, stride, residual = layer
    size = s.level(stride)
    numbers = batch * channels * math.prod(size)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x, more = (draw.image_layout(batch, channels, *size, dtype=dtype) for _ in range(2))
        return x, draw.normal(channels, dtype=dtype), more if residual else None, True

    return Case(
        op="bias_relu",
        name=f"{channels} x {'x'.join(map(str, size))}{', residual' if residual else ''}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=inputs,
        ours=kernel("bias_relu"),
        plain=plain_bias_relu,
        bytes=(2 + residual) * numbers * dtype.itemsize,
        flops=(2 + residual) * numbers,
        dtype=dtype,
    )


def plain_bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = x + bias[:, None, None]
    return (y if residual is None else y + residual).relu()


def add_layer_norm(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    for batch, tokens, dtype in (
        (some, s.tokens, HALF),
        (many, s.tokens, HALF),
        (one, s.tokens, HALF),
        (some, s.queries, HALF),
        (some, s.tokens, BRAIN),
        (some, s.tokens, SINGLE),
    ):
        yield add_layer_norm_case(s, batch, tokens, dtype)
    yield add_layer_norm_training(s, some)


def layer_norm_inputs(s: Scale, draw: Draw, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, update = draw.normal(batch, tokens, s.dim), draw.normal(batch, tokens, s.dim, dtype=dtype)
    return x, update, 1 + draw.normal(s.dim) / 4, draw.normal(s.dim) / 4, 1e-5


def plain_add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x + update, x.shape[-1:], weight, bias, eps)


def add_layer_norm_case(s: Scale, batch: int, tokens: int, dtype: torch.dtype) -> Case:
    numbers = batch * tokens * s.dim
    return Case(
        op="add_layer_norm",
        name=f"{tokens} x {s.dim}, B {batch}, {NAMES[dtype]}",
        batch=batch,
        inputs=lambda draw: layer_norm_inputs(s, draw, batch, tokens, dtype),
        ours=kernel("add_layer_norm"),
        plain=plain_add_layer_norm,
        bytes=numbers * (8 + dtype.itemsize),
        flops=8 * numbers,
        dtype=dtype,
    )


def add_layer_norm_training(s: Scale, batch: int) -> Case:
    numbers = batch * s.tokens * s.dim

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(batch, s.tokens, s.dim), *layer_norm_inputs(s, draw, batch, s.tokens, HALF)

    return Case(
        op="add_layer_norm",
        name=f"{s.tokens} x {s.dim}, B {batch}, fp16, forward and backward",
        batch=batch,
        inputs=inputs,
        ours=trained(kernel("add_layer_norm"), 4),
        plain=trained(plain_add_layer_norm, 4),
        bytes=numbers * (10 + 4 + 6 + 6),  # forward; the gradient, x and update read; two gradients written
        flops=22 * numbers,
        dtype=HALF,
        graph=False,
    )


# ---- masks ----


def ragged(size: tuple[int, int], batch: int) -> list[tuple[int, int]]:
    """Sizes of a padded batch's images: every other one a fifth narrower or lower."""
    height, width = size
    shapes = (size, (height, width - width // 5), size, (height - height // 5, width))
    return [shapes[index % 4] for index in range(batch)]


def flat(sizes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for size in sizes for side in size]


def mask_upsample(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    yield mask_upsample_case(s, some, s.kept)
    yield mask_upsample_case(s, some, s.queries)
    yield mask_upsample_case(s, one, s.queries)
    yield mask_upsample_case(s, many, s.kept)


def mask_upsample_case(s: Scale, batch: int, queries: int) -> Case:
    processed, targets = ragged(s.image, batch), ragged(s.target, batch)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        masks = draw.masks(batch * queries, s.level(4))
        return masks, [queries] * batch, list(s.image), flat(processed), flat(targets), 0.5

    written = sum(queries * math.prod(target) for target in targets)
    return Case(
        op="mask_upsample",
        name=f"{queries} of {'x'.join(map(str, s.level(4)))} to about {'x'.join(map(str, s.target))}, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=kernel("mask_upsample"),
        plain=plain_mask_upsample,
        bytes=4 * batch * queries * math.prod(s.level(4)) + written,
        flops=11 * written,
        dtype=SINGLE,
        graph=False,
    )


def plain_mask_upsample(
    masks: Tensor, counts: list[int], padded: list[int], processed: list[int], target: list[int], threshold: float
) -> Tensor:
    """facebookresearch/detr's PostProcessSegm, image by image."""
    parts = []
    for index, logits in enumerate(masks.split(counts)):
        (height, width), size = processed[2 * index :][:2], target[2 * index :][:2]
        large = F.interpolate(logits[:, None], size=tuple(padded), mode="bilinear", align_corners=False)
        binary = (large.sigmoid() > threshold)[:, :, :height, :width]
        parts.append(F.interpolate(binary.float(), size=tuple(size), mode="nearest").byte().flatten())
    return torch.cat(parts)


# ---- panoptic merges ----

CLASSES = 250
THINGS = [index <= 90 for index in range(CLASSES)]


def panoptic_merge(s: Scale) -> Iterator[Case]:
    one, some, many = s.batches
    yield panoptic_merge_case(s, some, s.kept, True)
    yield panoptic_merge_case(s, some, s.kept, False)
    yield panoptic_merge_case(s, one, s.kept, True)
    yield panoptic_merge_case(s, many, s.kept, True)
    yield panoptic_merge_case(s, one, s.queries, True)
    yield weighted_merge_case(s, some)


def merge_bytes_and_flops(s: Scale, counts: int, targets: list[tuple[int, int]]) -> tuple[int, int]:
    """Logits read and ids, one byte, written; each query's logit, 11 FLOP and 3 of the argmax, at each pixel kept."""
    pixels = [min(math.prod(target), math.prod(s.image)) for target in targets]
    moved = 4 * counts * len(targets) * math.prod(s.level(4)) + sum(math.prod(target) for target in targets)
    return moved, 14 * counts * sum(pixels)


def panoptic_merge_case(s: Scale, batch: int, queries: int, merge_for_good: bool) -> Case:
    processed, targets = ragged(s.image, batch), ragged(s.target, batch)
    resized = [s.image] * batch if merge_for_good else processed
    classes = torch.tensor([category["id"] for category in COCO_PANOPTIC])

    def inputs(draw: Draw) -> tuple[Any, ...]:
        masks, count = draw.masks(batch * queries, s.level(4)), batch * queries
        labels = classes.to(draw.device)[draw.integers(len(classes), count)]
        isthing = torch.tensor(THINGS, device=draw.device)
        sizes = (flat(resized), flat(processed), flat(targets))
        return masks, labels, isthing, [queries] * batch, *sizes, merge_for_good

    moved, flops = merge_bytes_and_flops(s, queries, targets)
    return Case(
        op="panoptic_merge",
        name=f"{'ours' if merge_for_good else 'upstream'}, {queries} queries, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=lambda *arguments: kernel("panoptic_merge")(*arguments)[0],
        plain=merged_by(reference.panoptic_merge, reference.upstream_panoptic_merge),
        bytes=moved,
        flops=flops,
        dtype=SINGLE,
        graph=False,
        rivals={"detr_fast.merge": merged_by(merge.panoptic_merge, merge.upstream_panoptic_merge)},
    )


def merged_by(ours: Callable[..., Any], upstream: Callable[..., Any]) -> Callable[..., Tensor]:
    """Ids of all images, flat, by a merge of one image."""

    def run(
        masks: Tensor,
        labels: Tensor,
        isthing: Tensor,
        counts: list[int],
        resized: list[int],
        processed: list[int],
        target: list[int],
        merge_for_good: bool,
    ) -> Tensor:
        parts = []
        with torch.device(masks.device):  # the definitions make their small tensors on the default device
            for index, (logits, classes) in enumerate(zip(masks.split(counts), labels.split(counts), strict=True)):
                padded, size, final = (sides[2 * index :][:2] for sides in (resized, processed, target))
                options = {"processed_size": size, "target_size": final, "isthing": THINGS.__getitem__}
                if merge_for_good:
                    ids, _ = ours(logits, torch.ones_like(logits[:, 0, 0]), classes, padded_size=padded, **options)
                else:
                    ids, _ = upstream(logits, torch.ones_like(logits[:, 0, 0]), classes, **options)
                parts.append(ids.flatten())
        return torch.cat(parts)

    return run


def weighted_merge_case(s: Scale, batch: int) -> Case:
    targets = ragged(s.target, batch)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        """The definition reads logits of the classes, the kernel their scores and labels: both are given."""
        classes = draw.normal(batch, s.kept, CLASSES + 1) * 2
        classes[..., -1] = -100  # nothing is no object
        scores, labels = classes.softmax(-1).flatten(0, 1).max(-1)
        masks = draw.masks(batch * s.kept, s.level(4))
        return masks, scores, labels, ~torch.tensor(THINGS, device=draw.device), flat(targets), classes

    def ours(masks: Tensor, scores: Tensor, labels: Tensor, fuse: Tensor, target: list[int], _: Tensor) -> Tensor:
        counts = [s.kept] * batch
        weighted_merge = kernel("weighted_merge", "panoptic_merge")
        return weighted_merge(masks, scores, labels, fuse, counts, target, 0.5, 0.8)[0]

    def plain(masks: Tensor, _scores: Tensor, _labels: Tensor, _: Tensor, target: list[int], classes: Tensor) -> Tensor:
        stuff = [index for index, thing in enumerate(THINGS) if not thing]
        outputs = {"logits": classes, "pred_masks": masks.unflatten(0, classes.shape[:2])}
        sizes = list(zip(target[::2], target[1::2], strict=True))
        results = post_process_panoptic_segmentation(outputs, 0.0, 0.5, 0.8, stuff, sizes)
        return torch.cat([result["segmentation"].flatten() for result in results])

    moved, flops = merge_bytes_and_flops(s, s.kept, targets)
    return Case(
        op="panoptic_merge",
        name=f"transformers, {s.kept} queries, B {batch}",
        batch=batch,
        inputs=inputs,
        ours=ours,
        plain=plain,
        bytes=moved,
        flops=flops,
        dtype=SINGLE,
        graph=False,
    )


# ---- right or wrong ----


def wrong(case: Case, inputs: tuple[Any, ...]) -> str | None:
    """Why the operation's outcome must not be timed, or None.

    Numbers may be off by twice what the definition is off in the same dtype, against the definition in float64;
    integers may differ at one pixel of 100,000, where two scores are nearly equal.
    """
    truth, plain = case.plain(*(_double(value) for value in inputs)), case.plain(*inputs)
    out = poisoned(lambda: case.ours(*inputs))  # last, as it may overwrite its inputs
    if out.shape != truth.shape:
        return f"shape {list(out.shape)}, not {list(truth.shape)}"
    if not out.is_floating_point():
        different = int((out != truth).sum())
        return f"{different} of {truth.numel()} differ" if different > 1e-5 * truth.numel() else None
    error, plain_error = (float((x.double() - truth).abs().max()) for x in (out, plain))
    bound = 2 * plain_error + 1e-6
    return None if error <= bound else f"error {error:.1e}, above {bound:.1e}"  # a NaN is not below


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """`call()` with NaN, or the largest integer, in all memory that it does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
