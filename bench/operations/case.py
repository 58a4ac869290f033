"""What a benchmark of one operation is: inputs, the operation, its definition, rivals, bytes and FLOP.

Every case runs on any device: on a CPU an operation is its own plain implementation, at `TINY` in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAMES = {HALF: "fp16", BRAIN: "bf16", SINGLE: "fp32"}


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


CHUNK_QUERIES = 4  # that a CPU takes through the mask head at once


def both_layouts(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """A feature map in NHWC, for ours, and in NCHW, for the definition, which knows no other."""
    x = draw.image_layout(*shape, dtype=SINGLE)
    return x, x.contiguous()


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: its name.
        name: of the shape, dtype and options, unique with `op`.
        batch: images.
        inputs: makes the arguments of everything below.
        ours: the operation; integers are compared as such.
        plain: the definition, in `reference`; in float64 it is the truth.
        rivals: other ways to compute the same, whose time is to be beaten.
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


def trained(call: Callable[..., Tensor], count: int) -> Callable[..., Tensor]:
    """The outcome and the gradients of the first `count` arguments, flat, from the gradient of the outcome."""

    def run(grad: Tensor, *arguments: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            wanted = [argument.detach().requires_grad_() for argument in arguments[:count]]
            out = call(*wanted, *arguments[count:])
            gradients = torch.autograd.grad(out, wanted, grad.to(out.dtype))
        return torch.cat([x.detach().flatten() for x in (out, *gradients)])

    return run


def flat(sizes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for size in sizes for side in size]


def pairs(sides: Sequence[int]) -> list[tuple[int, int]]:
    """The inverse of `flat`."""
    return list(zip(sides[::2], sides[1::2], strict=True))


def ragged(size: tuple[int, int], batch: int) -> list[tuple[int, int]]:
    """Sizes of a padded batch's images: every other one a fifth narrower or lower."""
    height, width = size
    shapes = (size, (height, width - width // 5), size, (height - height // 5, width))
    return [shapes[index % 4] for index in range(batch)]


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
