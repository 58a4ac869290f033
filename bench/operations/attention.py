"""Attention, and the attention maps of the mask head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Scale
from bench.operations.case import BRAIN, HALF, NAMES, SINGLE, Case, Draw, kernel, trained
from detr_fast import ops, reference

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def on_gpu(s: Scale) -> Iterator[Case]:
    yield from attention(s)
    yield from attention_map(s)


def on_cpu(s: Scale) -> Iterator[Case]:
    for lengths in ((s.tokens, s.tokens), (s.queries, s.tokens), (s.queries, s.queries)):
        yield replace(attention_case(s, 1, lengths, SINGLE, padded=False), ours=ops.attention, rivals={})
    case = attention_map_case(s, 1, SINGLE, padded=False)
    yield replace(case, ours=lambda q, k, _, *rest: ops.attention_map(q, k, 0, *rest))


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
        plain=reference.attention_map,
        bytes=(count + batch * s.tokens) * s.dim * size + 4 * count * s.tokens * s.heads + padded * batch * s.tokens,
        flops=2 * count * s.tokens * s.dim,
        dtype=dtype,
    )
