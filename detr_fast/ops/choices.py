"""Choices between implementations with their reasons, and the table of them that `detr-fast info` prints."""

from __future__ import annotations

from typing import NamedTuple

from detr_fast.kernels.common import Device
from detr_fast.ops.dense import HAS_ONEDNN
from detr_fast.ops.policy import HAS_TRITON

ATTENTION_HEAD_DIMS = (16, 32, 64)
ATTENTION_ROWS = 64  # queries that one program of flash attention works on


class Choice(NamedTuple):
    """Whether a Triton kernel computes something, and why or why not."""

    kernel: bool
    reason: str


def attention_choice(device: Device, head_dim: int, programs: int, padded: bool) -> Choice:
    """Triton's attention or PyTorch's, for so many programs: images x heads x blocks of queries."""
    if not device.tensor_cores:
        return Choice(False, "Triton has no tensor cores below sm_80, and PyTorch's CUTLASS kernels do")
    if head_dim not in ATTENTION_HEAD_DIMS:
        return Choice(False, f"head_dim {head_dim} is none of {', '.join(map(str, ATTENTION_HEAD_DIMS))}")
    if padded:
        return Choice(True, "a padding mask keeps PyTorch from flash attention")
    if programs < device.multiprocessors:
        return Choice(True, f"keys are split: {programs} programs leave {device.multiprocessors} multiprocessors idle")
    return Choice(False, "PyTorch's flash attention fills the device")


def table(device: Device | None) -> list[tuple[str, str, str]]:
    """(operation, what computes it, why) for each operation on a GPU, or on a CPU where `device` is None; from facts
    other than the input."""
    shared = [
        ("frozen batch norm", "folded into the convolution", "exact, and kept until a weight changes"),
        ("positions", "projected once a shape", "they depend on nothing but the size and the weights"),
        ("mask head", "kept queries, shared parts once an image", "normalisation is per query, convolution linear"),
    ]
    return shared + (_on_cpu() if device is None else _on_gpu(device))


def _on_cpu() -> list[tuple[str, str, str]]:
    onednn = (
        ("oneDNN, fused", "bias, residual sum and ReLU are added before the result is written")
        if HAS_ONEDNN
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


def _on_gpu(device: Device) -> list[tuple[str, str, str]]:
    if not HAS_TRITON:
        return [("all operations", "PyTorch", "Triton is not installed")]
    memory = "bound by memory, and fused"
    padded, alone, large = (
        attention_choice(device, 32, programs, padding)
        for programs, padding in ((1, True), (1, False), (device.multiprocessors, False))
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
