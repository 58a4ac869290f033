"""Attention maps of DETR's mask head: one softmax over heads and positions for each query, written once.

Three kernels, as the softmax of a query runs over all its keys: one leaves the maximum and the sum over each block of
keys, one combines those, and one computes the scores again and writes the weights. A program walks over a group of
queries with BLOCK_L keys of their image in registers: neighbours are mostly of one image, whose keys are then read once
a group and not once a query. Scores are sums of products in float32 whatever the dtype of q and k, without tensor
cores, so the same on a V100.

What it saves: of N queries, L keys and H heads the plain definition writes float32 scores, and masking and softmax read
and write them again, 20*N*L*H bytes with k's copy in float32 beside them; here 4*N*L*H are written and nothing of that
size is read, 13 MB at N = 480 (15 queries in each of 32 images), L = 850, H = 8. The price are 4*N*L*d FLOP, twice
those of one pass. And all images of a batch are one launch.

Source: Carion et al. 2020, section 4.4; facebookresearch/detr, models/segmentation.py (MHAttentionMap).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.attention import LOG2_E, as_bytes
from detr_fast.kernels.common import Build, Target, build, device_of, dtypes_on, operation


@triton.jit
def load_keys(k_ptr, padding_ptr, image, rows, keys, stride_kb, stride_kl, stride_pb, stride_pl, cells, cell_mask):
    """Keys `rows` [BLOCK_L] of `image`, [BLOCK_L, BLOCK_H, BLOCK_C], and which of them are no padding, [BLOCK_L]."""
    valid = rows < keys
    ptrs = k_ptr + image * stride_kb + rows.to(tl.int64)[:, None, None] * stride_kl + cells
    k = tl.load(ptrs, mask=valid[:, None, None] & cell_mask, other=0.0)
    if padding_ptr is not None:
        padding = tl.load(padding_ptr + image * stride_pb + rows.to(tl.int64) * stride_pl, mask=valid, other=1)
        valid = padding == 0
    return k, valid


@triton.jit
def scores_of(q_ptr, k, valid, cells, cell_mask, head_mask):
    """[BLOCK_L, BLOCK_H]: a query's scores in base 2, -inf on padding."""
    q = tl.load(q_ptr + cells, mask=cell_mask, other=0.0)  # [1, BLOCK_H, BLOCK_C]
    scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), 2) * LOG2_E
    return tl.where(valid[:, None] & head_mask, scores, float("-inf"))


@triton.jit(do_not_specialize=["queries", "keys", "group", "stride_pb"])
def statistics_kernel(
    q_ptr,
    k_ptr,
    image_ptr,
    padding_ptr,
    maximum_ptr,
    total_ptr,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_pb,
    stride_pl,
    queries,
    keys,
    group,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Of `group` queries over BLOCK_L keys: the largest score, and the sum of 2^(score - largest); both [N, blocks]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_L)
    block = pid % blocks
    first = pid // blocks * group
    rows = block * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    heads = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    cols = tl.arange(0, BLOCK_C)[None, None, :]  # [1, 1, BLOCK_C]
    cells = heads[:, :, None] * HEAD_DIM + cols  # [1, BLOCK_H, BLOCK_C]
    cell_mask = (heads[:, :, None] < HEADS) & (cols < HEAD_DIM)

    current = tl.load(image_ptr + first).to(tl.int64)
    k, valid = load_keys(
        k_ptr, padding_ptr, current, rows, keys, stride_kb, stride_kl, stride_pb, stride_pl, cells, cell_mask
    )
    for n in range(first, tl.minimum(first + group, queries)):
        image = tl.load(image_ptr + n).to(tl.int64)
        if image != current:
            k, valid = load_keys(
                k_ptr, padding_ptr, image, rows, keys, stride_kb, stride_kl, stride_pb, stride_pl, cells, cell_mask
            )
            current = image
        query = tl.cast(n, tl.int64)
        scores = scores_of(q_ptr + query * stride_qn, k, valid, cells, cell_mask, heads < HEADS)  # [BLOCK_L, BLOCK_H]
        maximum = tl.max(tl.max(scores, 1), 0)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)  # only padding: no inf - inf
        total = tl.sum(tl.sum(tl.exp2(scores - shift), 1), 0)
        part = query * blocks + block
        tl.store(maximum_ptr + part, maximum)
        tl.store(total_ptr + part, total)


@triton.jit(do_not_specialize=["blocks"])
def combine_kernel(maximum_ptr, total_ptr, shift_ptr, scale_ptr, blocks, PARTS: tl.constexpr):
    """Of one query: its largest score, and the reciprocal of its sum; both [N], and 0 where all is padding."""
    query = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)  # [PARTS]
    maximum = tl.full([PARTS], float("-inf"), tl.float32)  # [PARTS]
    total = tl.zeros([PARTS], tl.float32)  # [PARTS]
    for start in range(0, blocks, PARTS):
        mask = start + parts < blocks
        part = tl.load(maximum_ptr + query * blocks + start + parts, mask=mask, other=float("-inf"))  # [PARTS]
        part_total = tl.load(total_ptr + query * blocks + start + parts, mask=mask, other=0.0)  # [PARTS]
        new_maximum = tl.maximum(maximum, part)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # only padding so far: no inf - inf
        total = total * tl.exp2(maximum - shift) + part_total * tl.exp2(part - shift)
        maximum = new_maximum
    largest = tl.max(maximum, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(total * tl.exp2(maximum - largest), 0)
    tl.store(shift_ptr + query, largest)
    tl.store(scale_ptr + query, tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0))


@triton.jit(do_not_specialize=["queries", "keys", "group", "stride_pb"])
def map_kernel(
    q_ptr,
    k_ptr,
    image_ptr,
    padding_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    stride_qn,
    stride_kb,
    stride_kl,
    stride_pb,
    stride_pl,
    stride_on,
    queries,
    keys,
    group,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The weights of `group` queries over BLOCK_L keys, from what `combine_kernel` left."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_L)
    first = pid // blocks * group
    rows = pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    heads = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    cols = tl.arange(0, BLOCK_C)[None, None, :]  # [1, 1, BLOCK_C]
    cells = heads[:, :, None] * HEAD_DIM + cols  # [1, BLOCK_H, BLOCK_C]
    cell_mask = (heads[:, :, None] < HEADS) & (cols < HEAD_DIM)
    out_mask = (rows < keys)[:, None] & (heads < HEADS)  # [BLOCK_L, BLOCK_H]

    current = tl.load(image_ptr + first).to(tl.int64)
    k, valid = load_keys(
        k_ptr, padding_ptr, current, rows, keys, stride_kb, stride_kl, stride_pb, stride_pl, cells, cell_mask
    )
    for n in range(first, tl.minimum(first + group, queries)):
        image = tl.load(image_ptr + n).to(tl.int64)
        if image != current:
            k, valid = load_keys(
                k_ptr, padding_ptr, image, rows, keys, stride_kb, stride_kl, stride_pb, stride_pl, cells, cell_mask
            )
            current = image
        query = tl.cast(n, tl.int64)
        shift = tl.load(shift_ptr + query)
        scale = tl.load(scale_ptr + query)
        scores = scores_of(q_ptr + query * stride_qn, k, valid, cells, cell_mask, heads < HEADS)  # [BLOCK_L, BLOCK_H]
        out_ptrs = out_ptr + query * stride_on + rows.to(tl.int64)[:, None] * HEADS + heads
        tl.store(out_ptrs, tl.exp2(scores - shift) * scale, mask=out_mask)


# ---- configuration ----

# Chosen from ahead-of-time builds, without a spill at d = 128 to 512 on any target; untimed until a GPU is at hand.
BLOCK_L = 32  # keys of a program, in 16 bits; half of them in 32
GROUP = 8  # queries that a program walks over at most
PARTS = 64


def group_for(queries: int, blocks: int, multiprocessors: int, most: int) -> int:
    """How many queries a program walks over: as many as leave four programs for each multiprocessor."""
    return max(1, min(most, queries * blocks // (4 * multiprocessors)))


# ---- launcher ----


def launch_attention_map(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """Runs the kernels: float32 [N,L,heads], as `attention_map` returns.

    Raises:
        ValueError: d is no multiple of nheads, image holds no integers, or shapes do not fit.
    """
    (queries, dim), keys = q.shape, k.shape[1]
    _check(q, k, image, nheads, padding)
    out = torch.empty((queries, keys, nheads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    device = device_of(q.device)
    sizes, warps = _sizes(device.target, k.dtype, dim, nheads)
    blocks = triton.cdiv(keys, sizes["BLOCK_L"])
    group = group_for(queries, blocks, device.multiprocessors, GROUP)
    grid = (triton.cdiv(queries, group) * blocks,)
    maximum = torch.empty((queries, blocks), dtype=torch.float32, device=q.device)
    total = torch.empty((queries, blocks), dtype=torch.float32, device=q.device)
    shift = torch.empty((queries,), dtype=torch.float32, device=q.device)
    scale = torch.empty((queries,), dtype=torch.float32, device=q.device)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    padding_bytes, padding_strides = as_bytes(padding)
    inputs = (q, k, image.contiguous(), padding_bytes)
    strides = (q.stride(0), k.stride(0), k.stride(1), *padding_strides)
    with torch.cuda.device_of(q):
        statistics_kernel[grid](*inputs, maximum, total, *strides, queries, keys, group, **sizes, num_warps=warps)
        combine_kernel[(queries,)](maximum, total, shift, scale, blocks, PARTS=PARTS, num_warps=1)
        map_kernel[grid](
            *inputs, shift, scale, out, *strides, out.stride(0), queries, keys, group, **sizes, num_warps=warps
        )
    return out


def _check(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None) -> None:
    (queries, dim), (batch, keys, key_dim) = q.shape, k.shape
    fits = key_dim == dim and image.shape == (queries,) and (padding is None or padding.shape == (batch, keys))
    if not fits:
        given = [list(x.shape) for x in (q, k, image, padding) if x is not None]
        raise ValueError(f"q, k, image and padding must be [N,d], [B,L,d], [N] and [B,L], got {given}")
    if image.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"image must be int32 or int64, got {image.dtype}")
    if dim % nheads:
        raise ValueError(f"d must be a multiple of nheads, got d={dim} and nheads={nheads}")


def _sizes(target: Target, dtype: torch.dtype, dim: int, nheads: int) -> tuple[dict[str, int], int]:
    """Of heads and keys, and of the tiles that hold them, powers of two; and the warps.

    Two threads for each number of a query: with fewer Triton distributes the query over them as it likes, and brings
    all keys into that layout, through shared memory, once a query.
    """
    head_dim = dim // nheads
    block_h, block_c = triton.next_power_of_2(nheads), triton.next_power_of_2(head_dim)
    block_l = BLOCK_L * 2 // dtype.itemsize
    sizes = {"HEADS": nheads, "HEAD_DIM": head_dim, "BLOCK_H": block_h, "BLOCK_C": block_c, "BLOCK_L": block_l}
    threads = min(max(2 * block_h * block_c, 128), 1024)
    return sizes, threads // (64 if isinstance(target, str) else 32)


# ---- operation ----


@operation("attention_map", launch_attention_map)
def attention_map(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """One softmax over heads and positions for each query: kernels on CUDA, plain PyTorch elsewhere.

    Args:
        q: [N,d], scaled queries, those of an image best side by side: a program reads its keys once for its queries.
        k: [B,L,d], the images' keys.
        image: int32 or int64 [N], the image that each query belongs to.
        padding: bool [B,L].

    Returns: float32 at least, [N,L,heads]; 0 where all of an image is padding.

    Raises:
        ValueError: on CUDA, d is no multiple of nheads, image holds no integers, or shapes do not fit.
    """
    return reference.attention_map(q, k, image, nheads, padding)


@attention_map.register_fake
def _(q: Tensor, k: Tensor, image: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    return q.new_empty((q.shape[0], k.shape[1], nheads), dtype=reference.at_least_float32(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, image, ctx.nheads, _ = inputs
    ctx.save_for_backward(q, k, image, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each query meets the keys of all images in one GEMM and keeps its own: no [N,L,d], and no atomic sum."""
    q, k, image, weights = ctx.saved_tensors
    dscores = weights * (grad - (grad * weights).sum((1, 2), keepdim=True))  # [N,L,heads]
    q_heads, k_heads = (x.to(weights.dtype).unflatten(-1, (ctx.nheads, -1)) for x in (q, k))
    own = (image[:, None] == torch.arange(k.shape[0], device=k.device)).to(weights.dtype)  # [N,B]
    dq = torch.einsum("nlh,blhc->nbhc", dscores, k_heads)
    dq = torch.einsum("nbhc,nb->nhc", dq, own).flatten(1)
    dk = torch.einsum("nlh,nbhc->blhc", dscores, q_heads[:, None] * own[:, :, None, None]).flatten(2)
    return dq.to(q.dtype), dk.to(k.dtype), None, None, None


attention_map.register_autograd(_backward, setup_context=_setup_context)


# ---- builds ----


def builds(target: Target) -> list[Build]:
    """The kernels at head_dim 16, 32 and 64 of 8 heads."""
    found = []
    for dtype, kind in dtypes_on(target).items():
        types = {"q_ptr": f"*{kind}", "k_ptr": f"*{kind}", "image_ptr": "*i64", "padding_ptr": "*u8"}
        aligned = ("stride_qn", "stride_kb", "stride_kl")
        for head_dim in (16, 32, 64):
            sizes, warps = _sizes(target, dtype, 8 * head_dim, 8)
            launch = {"num_warps": warps, "num_stages": 1}
            for name, kernel in (("statistics", statistics_kernel), ("map", map_kernel)):
                name = f"{name}-{kind}-{head_dim}"
                found.append(build(name, kernel, types, {"stride_pl": 1, **sizes}, **launch, aligned=aligned))
    return [*found, build("combine", combine_kernel, {}, {"PARTS": PARTS}, num_warps=1, num_stages=1)]
