"""Which rewrites are on, and what the device of a tensor is: the facts that every choice in `ops` depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from detr_fast.kernels import common
from detr_fast.kernels.common import Device

HAS_TRITON = find_spec("triton") is not None

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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Both are of the process, as torch.compile can read no context variable.
_plain: frozenset[str] = frozenset()
_float64 = False


def register_kernels() -> None:
    """Defines `torch.ops.detr_fast.*`: only where they can be used, as importing Triton takes a while."""
    for name in common.NAMES:
        import_module(f"detr_fast.kernels.{name}")


if HAS_TRITON and torch.cuda.is_available():
    register_kernels()


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Switches the named `REWRITES` off within it, all of them when none is named: the definitions compute.

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


@contextmanager
def pretend(target: str, *, float64: bool = False) -> Iterator[None]:
    """Makes every choice as on a GPU, for tensors on a CPU: operations, layouts, merges, post-processing.

    With TRITON_INTERPRET=1, set before this is called first, the real launchers run in Triton's interpreter; else the
    operations' CPU bodies, which are the definitions of `reference`.

    Args:
        target: "sm_70" (V100), "sm_75" (T4), "sm_80" (A100), "sm_86", "sm_89", "sm_90" (H100), "sm_100" or "gfx942".
        float64: also choose the kernels' operations in float64, which no kernel has and the CPU bodies have: there
            nothing but the algebra is left to differ.

    Raises:
        ValueError: another target.
        RuntimeError: Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError("pretend needs Triton, whose operations a GPU would run: pip install triton")
    global _float64
    with common.pretended(target):
        register_kernels()
        before, _float64 = _float64, float64
        try:
            yield
        finally:
            _float64 = before


def gpu(device: torch.device) -> Device | None:
    """The facts of the GPU `device`, or of the pretended one; None where it is none."""
    return common.device_of(device) if device.type == "cuda" or common.is_pretended() else None


def on_cpu(device: torch.device) -> bool:
    """Whether what is chosen for a CPU holds: neither on another device nor on a pretended one."""
    return device.type == "cpu" and not common.is_pretended()


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels compute with x: on a GPU, in the dtypes they have."""
    has_dtype = x.dtype in common.DTYPES or (_float64 and x.dtype == torch.float64)
    return HAS_TRITON and gpu(x.device) is not None and has_dtype and not is_plain("kernels")


def trains(*tensors: Tensor | None) -> bool:
    """Whether a gradient flows to one of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_gpu(device: torch.device) -> bool:
    """Whether what is on `device` has to be copied to it, and is computed while the host goes on. Not pretended."""
    return device.type == "cuda"


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N".

    Raises:
        ValueError: an unknown name, or a device that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one of this machine's {torch.cuda.device_count()} CUDA devices, got {device!r}"
        )
    if resolved.type == "cuda" and resolved.index is None:  # fixed here, as each thread has a current one of its own
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is fp16 on a GPU, elsewhere fp32, which changes nothing.

    Raises:
        ValueError: none of the names and dtypes in `DTYPES`.
    """
    if dtype == "auto":
        return torch.float16 if is_gpu(device) else torch.float32
    for name, resolved in DTYPES.items():
        if dtype in (name, resolved):
            return resolved
    raise ValueError(f"dtype must be auto, {', '.join(DTYPES)} or a torch.dtype of these, got {dtype!r}")
