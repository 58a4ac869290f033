"""The operations that detr_fast accelerates. The only place that chooses how each is computed.

Every operation has its plain definition in `reference.py`; `with plain(...)` runs those instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import reference
from detr_fast.ops.cache import derived

# Registers `torch.ops.detr_fast.*`. Only where they can be used: importing Triton takes a while.
HAS_KERNELS = torch.cuda.is_available() and find_spec("triton") is not None
if HAS_KERNELS:
    for _name in (
        "add_layer_norm",
        "attention",
        "attention_map",
        "bias_relu",
        "group_norm_relu_upsample",
        "mask_upsample",
        "panoptic_merge",
    ):
        import_module(f"detr_fast.kernels.{_name}")

T = TypeVar("T")

# What `plain` can switch off, from the largest part of the model to the smallest.
REWRITES = {
    "backbone": "FrozenBatchNorm, ReLU and the residual sum folded into the convolutions",
    "channels_last": "images and feature maps in NHWC memory",
    "transformer": "one GEMM for Q, K and V, positions projected apart, K and V of all decoder layers in one GEMM",
    "cache": "projections of positions and queries, and folded weights, kept between calls",
    "mask_head": "what a mask head shares between queries is computed once an image",
    "upsample_conv": "nearest x2 upsampling and 3x3 convolution as 2x2 convolutions at low resolution",
    "kernels": "fused Triton kernels on a GPU",
}

_plain: frozenset[str] = frozenset()  # of the process, as torch.compile can read no context variable


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Within it the named `REWRITES` (all of them when none is named) are off: `reference.py` computes.

    Raises:
        ValueError: a name that is none of `REWRITES`.
    """
    unknown = sorted(set(names) - set(REWRITES))
    if unknown:
        raise ValueError(f"unknown rewrites {', '.join(unknown)}; accepted are {', '.join(REWRITES)}")
    global _plain
    before, _plain = _plain, frozenset(names or REWRITES)
    try:
        yield
    finally:
        _plain = before


def is_plain(name: str) -> bool:
    return name in _plain


def kept(owner: nn.Module, name: str, key: Hashable, sources: Sequence[Tensor], build: Callable[[], T]) -> T:
    """`cache.derived`, or `build()` anew where the cache is switched off."""
    return build() if is_plain("cache") else derived(owner, name, key, sources, build)


# ---- the device ----

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels compute with x: on a GPU, in the dtypes they have."""
    return HAS_KERNELS and x.is_cuda and x.dtype in KERNEL_DTYPES and not is_plain("kernels")


class Gpu(NamedTuple):
    """What the choices below depend on.

    Attributes:
        tensor_cores: whether Triton's `tl.dot` uses them: sm_80 and newer, or AMD's CDNA.
        multiprocessors: how many programs run side by side at least.
    """

    tensor_cores: bool
    multiprocessors: int


@lru_cache
def gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(bool(torch.version.hip) or properties.major >= 8, properties.multi_processor_count)


# ---- convolutions and linear layers ----

# oneDNN convolutions that add the bias, the residual and the ReLU before they write: what torch.compile emits on a CPU.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
CHAIN = 576  # products that such a convolution adds up one after the other


def image_layout(x: Tensor) -> Tensor:
    """x [B,C,H,W] in the memory layout that the convolutions are fastest in: NHWC."""
    return x if is_plain("channels_last") else x.contiguous(memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """relu(conv(x) + bias + residual): x [B,C,H,W], weight [O,C,k,k]; the outcome may overwrite residual."""
    if _fuses_convolutions(x, weight):
        geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, 1)
        *first, last = _chains(x, weight)
        for part in first:
            residual, bias = _fused_conv2d(*part, bias, geometry, False, residual), None
        return _fused_conv2d(*last, bias, geometry, relu, residual)
    if bias is not None and uses_kernels(x) and not _trains(x, weight, bias, residual):
        y = image_layout(F.conv2d(x, weight, None, stride, padding, dilation))
        residual = None if residual is None else image_layout(residual)
        return torch.ops.detr_fast.bias_relu(y, bias, residual, relu)
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if residual is not None:
        y = y + residual
    return _finite(y.relu_() if relu else y)


def _fused_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], relu: bool, residual: Tensor | None
) -> Tensor:
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, *geometry, "add", 1.0, "relu" if relu else None, [], None
    )


def _chains(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x [B,C,H,W] and weight [O,C,k,k] in parts of some input channels, of which the convolutions are to be added.

    A 3x3 convolution in NHWC has oneDNN add up all products of an output one after the other in float32. Over the 2304
    of the mask head's first layer, whose normalisation enlarges the error, that cost three times the error of NCHW, and
    over the 4608 of the backbone's last stage nine times. Chains of 576 keep to the contract, for 3 % more time.
    """
    taps = weight.shape[2] * weight.shape[3]
    if x.dtype != torch.float32 or taps == 1:
        return [(x, weight)]
    return list(zip(*(tensor.split(max(1, CHAIN // taps), 1) for tensor in (x, weight)), strict=True))


def _fuses_convolutions(x: Tensor, weight: Tensor) -> bool:
    """Static facts, and no gradient: oneDNN's fused convolutions have none."""
    return (
        _ONEDNN
        and x.device.type == "cpu"
        and x.dtype in _ONEDNN_DTYPES
        and not torch.compiler.is_compiling()
        and not _trains(x, weight)
    )


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _finite(x: Tensor) -> Tensor:
    """float16 ends at 65504: what would be infinite stays there, so that no NaN can follow."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


def cast(owner: nn.Module, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weights `tensors` of `owner` in `dtype`."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    return kept(owner, "cast", dtype, tensors, lambda: tuple(tensor.to(dtype) for tensor in tensors))


def weights(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The layer's weight and bias in `dtype`."""
    assert layer.bias is not None
    weight, bias = cast(layer, (layer.weight, layer.bias), dtype)
    return weight, bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), computed in the dtype of x [...,C]."""
    return _finite(F.linear(x, *weights(layer, x.dtype)))


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight^T + bias for x [B,L,C], weight [O,C] and a bias for each position: [L,O] or [B,L,O]."""
    return _finite(F.linear(x, weight).add_(bias))


# ---- attention ----


def packs_tokens(padding: Tensor | None) -> bool:
    """Whether a transformer should drop the tokens on padding, bool [B,L], instead of masking them as keys.

    On a CPU attention then needs no mask and nothing is computed for padding. A GPU would have to wait for the counts
    and run one attention an image.
    """
    return padding is not None and padding.device.type == "cpu" and not torch.compiler.is_compiling()


def attention(
    q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention without its projections: q [B,Q,d], k and v [B,L,d], padding bool [B,L] to [B,Q,d].

    Where all keys of an image are padding its rows are 0.
    """
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    if uses_kernels(q) and not dropout:
        programs = q.shape[0] * nheads * -(-q.shape[1] // ATTENTION_ROWS)
        if attention_choice(gpu(q.device), q.shape[-1] // nheads, programs, padding is not None).kernel:
            return torch.ops.detr_fast.attention(q, k, v, nheads, padding)[0]
    if q.device.type == "cpu" and q.dtype != torch.float32 and not dropout and _trains(q, k, v):
        # the gradient of PyTorch's flash attention in bfloat16 is slow: 18 ms against 1.7 for 16 x 8 heads, 64 x 64
        return reference.attention(q, k, v, nheads, padding)
    q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
    allowed = None if padding is None else ~padding[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
    if padding is not None:
        out = out.masked_fill(padding.all(1)[:, None, None, None], 0)
    return out.transpose(1, 2).flatten(-2)


ATTENTION_HEAD_DIMS = (16, 32, 64)
ATTENTION_ROWS = 64  # queries that one program of flash attention works on


class Choice(NamedTuple):
    """Whether a Triton kernel computes something, and why or why not."""

    kernel: bool
    reason: str


def attention_choice(gpu: Gpu, head_dim: int, programs: int, padded: bool) -> Choice:
    """Triton's attention or PyTorch's, for so many programs: images x heads x blocks of queries."""
    if not gpu.tensor_cores:
        return Choice(False, "Triton has no tensor cores below sm_80, and PyTorch's CUTLASS kernels do")
    if head_dim not in ATTENTION_HEAD_DIMS:
        return Choice(False, f"head_dim {head_dim} is none of {', '.join(map(str, ATTENTION_HEAD_DIMS))}")
    if padded:
        return Choice(True, "a padding mask keeps PyTorch from flash attention")
    if programs < gpu.multiprocessors:
        return Choice(True, f"keys are split: {programs} programs leave {gpu.multiprocessors} multiprocessors idle")
    return Choice(False, "PyTorch's flash attention fills the device")


def attention_maps(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """`attention_map` for the queries of several images at once: q [N,d], k [B,L,d], image int64 [N], padding [B,L]."""
    return torch.ops.detr_fast.attention_map(q, k, image, nheads, padding)


def attention_map(q: Tensor, k: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """One softmax over heads and positions for each query, in float32 at least.

    Args:
        q: [N,d], scaled queries of one image.
        k: [L,d], that image's keys.
        padding: bool [L].

    Returns: [N,L,heads]; 0 where all of L is padding.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(dtype).unflatten(-1, (nheads, -1)) for x in (q, k))
    scores = torch.einsum("nhc,lhc->nlh", q, k)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], float("-inf"))
    weights = scores.flatten(1).softmax(-1).view_as(scores)
    return weights if padding is None else weights.masked_fill(padding.all(), 0)


# ---- normalisation ----

LAYER_NORM_CHANNELS = 2048  # the widest row of Triton's kernel


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x), in the dtype of x [...,C]."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def add_layer_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x + update), in the dtype of the residual stream x [...,C]."""
    if uses_kernels(x) and x.shape[-1] <= LAYER_NORM_CHANNELS:
        return torch.ops.detr_fast.add_layer_norm(x, update, norm.weight, norm.bias, norm.eps)
    return layer_norm(x + update, norm)


def group_norm_relu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """relu(norm(x)) for x [N,C,H,W], which may be overwritten; statistics in float32 at least."""
    if uses_kernels(x):
        return group_norm_relu_upsample(x, norm, None, None, (x.shape[2], x.shape[3]))
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    if x.device.type == "cpu" and _trains(x, weight):
        x = x.contiguous()  # PyTorch's gradient in NHWC takes 5 to 30 times as long
    if x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16) or x.is_contiguous():
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps).relu_()
    # PyTorch's own CPU kernel for NHWC takes E[x^2] - E[x]^2, with errors 100 times those of its kernel for NCHW. Two
    # passes, each a sum of sums, are as exact as the latter, and faster than the former.
    n, channels, height, width = x.shape

    def group_mean(x: Tensor) -> Tensor:
        """[N,C,1,1]: the mean over pixels and the channels of the group."""
        rows = x.permute(0, 2, 3, 1).reshape(n, height, width * channels)  # adds long rows: a quarter of the time
        columns = rows.sum(1).view(n, width, channels)
        sums = columns.sum(1, dtype=torch.float64).unflatten(1, (norm.num_groups, -1))
        mean = sums.mean(2, keepdim=True).expand_as(sums) / (height * width)
        return mean.reshape(n, channels, 1, 1).to(x.dtype)

    x = x.sub_(group_mean(x))
    scale = (group_mean(x * x) + norm.eps).rsqrt() * weight[:, None, None]
    return torch.addcmul(bias[:, None, None], x, scale).relu_()


def group_norm_relu_upsample(
    x: Tensor, norm: nn.GroupNorm, shared: Tensor | None, image: Tensor | None, size: tuple[int, int]
) -> Tensor:
    """relu(norm(x)), upsampled by "nearest", plus the feature map of each one's image.

    Args:
        x: [N,C,h,w].
        shared: [B,C,*size], or None.
        image: int64 [N], or None.
        size: (height, width), for each n of h and w itself, or 2n or 2n - 1.

    Returns: [N,C,*size].
    """
    height, width = size
    arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps, shared, image, height, width)
    return torch.ops.detr_fast.group_norm_relu_upsample(x, *arguments)


# ---- upsampling and convolution ----


def upsample_conv(x: Tensor, weight: Tensor, phases: Tensor, size: tuple[int, int]) -> Tensor:
    """`reference.upsample_conv`: nearest upsampling of x [N,C,h,w] to `size`, then a 3x3 convolution, zero padded.

    An upsampled pixel repeats, so of the nine taps over 2x2 equal pixels only four differ: each of the four positions
    (phases) in an upsampled 2x2 block is a 2x2 convolution at low resolution. Stride-2 layers make every `size` 2n or
    2n - 1 of n, where nearest upsampling is doubling, cropped; then the pixels just beyond the crop, which the phases
    see and the definition does not, are subtracted.

    Args:
        weight: [O,C,3,3].
        phases: [4*O,C,2,2], `phase_kernels(weight)`.
        size: (height, width); others than 2n and 2n - 1 are computed as defined.

    Returns: [N,O,*size].
    """
    h, w = x.shape[-2:]
    height, width = size
    # Measured on 2 cores (AMD EPYC, AVX-512), float32 and bfloat16, at all three layers of the head: 1.9 to 2.3 times
    # as fast as upsampling first, so there is no size at which a doubling takes the plain road.
    if is_plain("upsample_conv") or height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
        return reference.upsample_conv(x, weight, size)
    out_channels = weight.shape[0]
    low = conv2d(x, phases, None, padding=1)
    out = low.new_empty((x.shape[0], out_channels, height, width)).contiguous(memory_format=torch.channels_last)
    for row in (0, 1):
        for column in (0, 1):
            target = out[:, :, row::2, column::2]
            phase = 2 * row + column
            source = low[:, phase * out_channels : (phase + 1) * out_channels, row:, column:]
            target.copy_(source[:, :, : target.shape[2], : target.shape[3]])
    if height < 2 * h:  # the row below the crop, its last pixel beyond the corner included
        beyond = x[:, :, -1:].repeat_interleave(2, 3)
        out[:, :, -1:] -= F.conv2d(beyond, weight[:, :, 2:], padding=(0, 1))[..., :width]
    if width < 2 * w:
        beyond = x[..., -1:].repeat_interleave(2, 2)[:, :, :height]
        out[..., -1:] -= F.conv2d(beyond, weight[..., 2:], padding=(1, 0))
    return out


def phase_kernels(weight: Tensor) -> Tensor:
    """[4*O,C,2,2] from [O,C,3,3]: which taps of the 3x3 kernel fall on the same low-resolution pixel, summed."""

    def fold(taps: tuple[Tensor, ...], dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = taps
        return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)

    rows = fold(weight.unbind(2), 2)
    return torch.cat([kernel for row in rows for kernel in fold(row.unbind(3), 3)])


# ---- what runs here ----


def explain(gpu: Gpu | None) -> list[tuple[str, str, str]]:
    """(operation, what computes it, why) for each operation on a CPU, or on a GPU; from facts other than the input."""
    shared = [
        ("frozen batch norm", "folded into the convolution", "exact, and kept until a weight changes"),
        ("positions", "projected once a shape", "they depend on nothing but the size and the weights"),
        ("mask head", "kept queries, shared parts once an image", "normalisation is per query, convolution linear"),
    ]
    return shared + (_explain_cpu() if gpu is None else _explain_gpu(gpu))


def _explain_cpu() -> list[tuple[str, str, str]]:
    onednn = (
        ("oneDNN, fused", "bias, residual sum and ReLU are added before the result is written")
        if _ONEDNN
        else ("PyTorch", "this build of PyTorch has no oneDNN")
    )
    return [
        ("convolution", *onednn),
        ("attention", "PyTorch SDPA", "flash attention; weights are never returned"),
        ("padded tokens", "dropped", "attention then needs no mask"),
        ("attention map", "PyTorch", "float32 softmax over heads and positions"),
        ("residual + LayerNorm", "PyTorch", "Triton needs a GPU"),
        ("group norm + ReLU", "two-pass sums in NHWC", "PyTorch's NHWC kernel takes E[x^2] - E[x]^2"),
        ("upsample + convolution", "2x2 convolutions at low resolution", "16 of 36 multiplications remain"),
        ("mask upsampling", "PyTorch, some queries at a time", "memory stays bounded"),
        ("panoptic merge", "PyTorch, kept pixels only", "NEAREST resizing reads no others"),
    ]


def _explain_gpu(gpu: Gpu) -> list[tuple[str, str, str]]:
    if not HAS_KERNELS:
        return [("all operations", "PyTorch", "Triton is not installed")]
    memory = "bound by memory, and fused"
    padded, alone, large = (
        attention_choice(gpu, 32, programs, padding)
        for programs, padding in ((1, True), (1, False), (gpu.multiprocessors, False))
    )
    return [
        ("convolution", "cuDNN", "tensor cores, and its own choice of algorithm"),
        ("bias + residual + ReLU", "Triton", memory),
        *(
            (f"attention, {case}", "Triton" if choice.kernel else "PyTorch SDPA", choice.reason)
            for case, choice in (("padded", padded), ("small batch", alone), ("large batch", large))
        ),
        ("attention map", "Triton", memory),
        ("residual + LayerNorm", "Triton", memory),
        ("group norm + ReLU + upsample + sum", "Triton", memory),
        ("mask upsampling", "Triton", "straight to bytes, all images at once"),
        ("panoptic merge", "Triton", "all images at once, no wait for the device in between"),
        ("launches", "CUDA graphs", "one for each shape and bucket of kept queries, in Predictor"),
    ]
