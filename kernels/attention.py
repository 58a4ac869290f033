"""Multi-head attention, fused: softmax(q k^T / sqrt(head_dim)) v without its scores in memory.

Forward, one kernel: a program holds BLOCK_M queries of one head and walks over the keys with an online softmax (Milakov
and Gimelshein 2018; FlashAttention-2, Dao 2023), in float32 and base 2. A decoder's 100 queries and 8 heads are 16
programs, too few for a GPU: the keys are then split between programs (Flash-Decoding, Dao et al. 2023), and a second
kernel combines their outcomes. Backward, two kernels that compute the weights again from the saved log-sum-exp: one
walks over keys for dq, one over queries for dk and dv, so that no sum depends on the order of programs.

What it saves: of B images, H heads, Q queries and L keys the plain definition writes and reads B*H*Q*L scores several
times, 92 MB each at B = 8, H = 8, Q = L = 850 in 16 bits; here q, k and v are read and the outcome written once,
4*B*Q*d numbers, 14 MB for d = 256 (k and v again for every block of queries, from L2). The FLOP are the same,
4*B*Q*L*d, and 14*B*Q*L*d backward, 4 of them for weights and their gradients computed twice. q, k and v are read where
the projection left them, slices of one GEMM, and padding costs one byte a key; PyTorch's SDPA then leaves flash
attention for a mask of B*H*Q*L.

Source: Carion et al. 2020, appendix A.1; facebookresearch/detr, models/transformer.py (torch.nn.MultiheadAttention).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from detr_fast import reference
from detr_fast.kernels.common import DTYPES, Build, Target, build, config_for, device_of, dtypes_on, operation

HEAD_DIMS = (16, 32, 64)
LOG2_E = tl.constexpr(1.4426950408889634)  # weights are powers of 2, which is what the hardware has


@triton.jit
def load_rows(ptr, rows, stride, mask, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr):
    """One head's part of `rows` [ROWS]: [ROWS, HEAD_DIM], 0 where `mask` is off."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    x = tl.load(ptrs, mask=mask[:, None], other=0.0)  # [ROWS, HEAD_DIM]
    if UPCAST:  # without tensor cores products are taken one by one, in float32
        x = x.to(tl.float32)
    return x


@triton.jit
def is_key(padding_ptr, image, keys, rows, stride_pb, stride_pn):
    """[ROWS]: which of `rows` [ROWS] are keys of `image` and no padding."""
    valid = rows < keys
    if padding_ptr is not None:
        padding = tl.load(padding_ptr + image * stride_pb + rows.to(tl.int64) * stride_pn, mask=valid, other=1)
        valid = padding == 0
    return valid


@triton.jit(do_not_specialize=["nheads", "queries", "keys", "splits", "stride_pb", "stride_ls"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    stride_pb,
    stride_pn,
    stride_os,
    stride_ob,
    stride_om,
    stride_ls,
    nheads,
    queries,
    keys,
    splits,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_M queries of one head over one of `splits` equal parts of the keys."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    split = pid // blocks % splits
    head = pid // (blocks * splits) % nheads
    image = (pid // (blocks * splits * nheads)).to(tl.int64)

    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = rows < queries
    q_ptr += image * stride_qb + head * HEAD_DIM
    q = load_rows(q_ptr, rows, stride_qm, row_mask, HEAD_DIM, UPCAST)  # [BLOCK_M, HEAD_DIM]
    part = tl.cdiv(tl.cdiv(keys, BLOCK_N), splits) * BLOCK_N
    first = split * part
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_ptr += image * stride_kb + head * HEAD_DIM + first.to(tl.int64) * stride_kn
    v_ptr += image * stride_vb + head * HEAD_DIM + first.to(tl.int64) * stride_vn
    block = tl.full([], BLOCK_N, tl.int64)

    scale_log2 = scale * LOG2_E
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)  # [BLOCK_M, HEAD_DIM]
    for start_n in range(first, tl.minimum(first + part, keys), BLOCK_N):
        k = load_rows(k_ptr, n, stride_kn, start_n + n < keys, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
        v = load_rows(v_ptr, n, stride_vn, start_n + n < keys, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
        k_ptr += block * stride_kn
        v_ptr += block * stride_vn
        key_mask = is_key(padding_ptr, image, keys, start_n + n, stride_pb, stride_pn)  # [BLOCK_N]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # only padding so far: no inf - inf
        weights = tl.exp2(scores * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)  # [BLOCK_M, HEAD_DIM]
    lse = tl.where(seen, maximum + tl.log2(total), float("-inf"))  # [BLOCK_M]
    out_ptr += split.to(tl.int64) * stride_os + image * stride_ob + head * HEAD_DIM
    tile = rows.to(tl.int64)[:, None] * stride_om + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_M, HEAD_DIM]
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(lse_ptr + split.to(tl.int64) * stride_ls + (image * nheads + head) * queries + rows, lse, mask=row_mask)


@triton.jit(do_not_specialize=["nheads", "queries", "splits", "stride_ls"])
def combine_kernel(
    parts_ptr,
    parts_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_os,
    stride_ob,
    stride_om,
    stride_ls,
    nheads,
    queries,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The attention of BLOCK_M queries of one head over all keys, from that over each split of them."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = pid // blocks % nheads
    image = (pid // (blocks * nheads)).to(tl.int64)

    cols = tl.arange(0, HEAD_DIM)  # [HEAD_DIM]
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = rows < queries
    tile = image * stride_ob + head * HEAD_DIM + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    tile_lse = (image * nheads + head) * queries + rows  # [BLOCK_M]
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)  # [BLOCK_M, HEAD_DIM]
    for _ in range(splits):
        lse = tl.load(parts_lse_ptr + tile_lse, mask=row_mask, other=float("-inf"))  # [BLOCK_M]
        part = tl.load(parts_ptr + tile, mask=row_mask[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        new_maximum = tl.maximum(maximum, lse)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - shift)
        weight = tl.exp2(lse - shift)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + part * weight[:, None]
        maximum = new_maximum
        parts_ptr += stride_os
        parts_lse_ptr += stride_ls

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)  # [BLOCK_M, HEAD_DIM]
    lse = tl.where(seen, maximum + tl.log2(total), float("-inf"))  # [BLOCK_M]
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(lse_ptr + tile_lse, lse, mask=row_mask)


@triton.jit(do_not_specialize=["nheads", "queries", "keys", "stride_pb"])
def backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    delta_ptr,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    stride_pb,
    stride_pn,
    stride_ob,
    stride_om,
    stride_gb,
    stride_gm,
    stride_db,
    stride_dm,
    nheads,
    queries,
    keys,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dq of BLOCK_M queries of one head, and delta = sum(out * grad), which dk needs. Strides stride_d are dq's."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = pid // blocks % nheads
    image = (pid // (blocks * nheads)).to(tl.int64)

    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = rows < queries
    row_lse = (image * nheads + head) * queries + rows  # [BLOCK_M]
    q_ptr += image * stride_qb + head * HEAD_DIM
    grad_ptr += image * stride_gb + head * HEAD_DIM
    out_ptr += image * stride_ob + head * HEAD_DIM
    q = load_rows(q_ptr, rows, stride_qm, row_mask, HEAD_DIM, UPCAST)  # [BLOCK_M, HEAD_DIM]
    grad = load_rows(grad_ptr, rows, stride_gm, row_mask, HEAD_DIM, UPCAST)  # [BLOCK_M, HEAD_DIM]
    out = load_rows(out_ptr, rows, stride_om, row_mask, HEAD_DIM, True)  # [BLOCK_M, HEAD_DIM]
    delta = tl.sum(out * grad.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta_ptr + row_lse, delta, mask=row_mask)
    lse = tl.load(lse_ptr + row_lse, mask=row_mask, other=0.0)  # [BLOCK_M]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_ptr += image * stride_kb + head * HEAD_DIM
    v_ptr += image * stride_vb + head * HEAD_DIM
    block = tl.full([], BLOCK_N, tl.int64)

    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)  # [BLOCK_M, HEAD_DIM]
    for start_n in range(0, keys, BLOCK_N):
        k = load_rows(k_ptr, n, stride_kn, start_n + n < keys, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
        v = load_rows(v_ptr, n, stride_vn, start_n + n < keys, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
        k_ptr += block * stride_kn
        v_ptr += block * stride_vn
        key_mask = is_key(padding_ptr, image, keys, start_n + n, stride_pb, stride_pn)  # [BLOCK_N]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores = tl.where(key_mask[None, :], scores * scale_log2 - lse[:, None], float("-inf"))
        weights = tl.exp2(scores)  # [BLOCK_M, BLOCK_N]
        dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dscores = weights * (dweights - delta[:, None])  # [BLOCK_M, BLOCK_N]
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    tile = rows.to(tl.int64)[:, None] * stride_dm + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_M, HEAD_DIM]
    dq_ptr += image * stride_db + head * HEAD_DIM
    tl.store(dq_ptr + tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_mask[:, None])


@triton.jit(do_not_specialize=["nheads", "queries", "keys", "stride_pb"])
def backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    stride_pb,
    stride_pn,
    stride_gb,
    stride_gm,
    stride_db,
    stride_dn,
    nheads,
    queries,
    keys,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head; both have the strides stride_db, stride_dn."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    head = pid // blocks % nheads
    image = (pid // (blocks * nheads)).to(tl.int64)

    rows = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask = rows < keys
    k_ptr += image * stride_kb + head * HEAD_DIM
    v_ptr += image * stride_vb + head * HEAD_DIM
    k = load_rows(k_ptr, rows, stride_kn, row_mask, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
    v = load_rows(v_ptr, rows, stride_vn, row_mask, HEAD_DIM, UPCAST)  # [BLOCK_N, HEAD_DIM]
    key_mask = is_key(padding_ptr, image, keys, rows, stride_pb, stride_pn)  # [BLOCK_N]
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q_ptr += image * stride_qb + head * HEAD_DIM
    grad_ptr += image * stride_gb + head * HEAD_DIM
    lse_ptr += (image * nheads + head) * queries
    delta_ptr += (image * nheads + head) * queries
    block = tl.full([], BLOCK_M, tl.int64)

    scale_log2 = scale * LOG2_E
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)  # [BLOCK_N, HEAD_DIM]
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)  # [BLOCK_N, HEAD_DIM]
    for start_m in range(0, queries, BLOCK_M):
        query_mask = start_m + m < queries
        q = load_rows(q_ptr, m, stride_qm, query_mask, HEAD_DIM, UPCAST)  # [BLOCK_M, HEAD_DIM]
        grad = load_rows(grad_ptr, m, stride_gm, query_mask, HEAD_DIM, UPCAST)  # [BLOCK_M, HEAD_DIM]
        q_ptr += block * stride_qm
        grad_ptr += block * stride_gm
        lse = tl.load(lse_ptr + start_m + m, mask=query_mask, other=0.0)  # [BLOCK_M]
        delta = tl.load(delta_ptr + start_m + m, mask=query_mask, other=0.0)  # [BLOCK_M]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        # queries beyond the last need no mask: their grad and delta are 0
        scores = tl.where(key_mask[:, None], scores * scale_log2 - lse[None, :], float("-inf"))
        weights = tl.exp2(scores)  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(grad), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dscores = weights * (dweights - delta[None, :])  # [BLOCK_N, BLOCK_M]
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    tile = rows.to(tl.int64)[:, None] * stride_dn + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_N, HEAD_DIM]
    dk_ptr += image * stride_db + head * HEAD_DIM
    dv_ptr += image * stride_db + head * HEAD_DIM
    tl.store(dk_ptr + tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(dv_ptr + tile, dv.to(dv_ptr.dtype.element_ty), mask=row_mask[:, None])


# ---- configurations ----


class Config(NamedTuple):
    """How a kernel is tiled and launched."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    forward: Config
    backward_queries: Config
    backward_keys: Config


# Chosen from ahead-of-time builds, without a spill at any head_dim from Triton 3.6 on; untimed until a GPU is at hand.
# Without tensor cores in Triton, operands of 32 x 64 float32 in registers are all that fits, over 8 warps.
_SCALAR = Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1))
_AMPERE = Configs(Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 3))
_ADA = Configs(Config(64, 64, 4, 3), Config(64, 32, 4, 3), Config(32, 64, 4, 3))
_BLACKWELL = Configs(Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 2))
# float32 products are "ieee", the contract's: on NVIDIA scalar, so tiles are small. 64 queries must not be tried on
# sm_100: Triton 3.7 then takes tcgen05 with tf32 operands, whatever the precision asked for.
_SINGLE = Configs(Config(32, 16, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 2))
_MFMA_HALF = Configs(Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(32, 32, 4, 1))
_MFMA_SINGLE = Configs(*[Config(32, 32, 4, 1)] * 3)

# bits of the operands -> target -> tiles
CONFIGS: dict[int, dict[Target, Configs]] = {
    16: {70: _SCALAR, 80: _AMPERE, 86: _ADA, 90: _AMPERE, 100: _BLACKWELL, "gfx942": _MFMA_HALF},
    32: {70: _SCALAR, 80: _SINGLE, "gfx942": _MFMA_SINGLE},
}
COMBINE = Config(16, 1, 2, 1)


def configs_for(target: Target, dtype: torch.dtype) -> Configs:
    return config_for(CONFIGS[dtype.itemsize * 8], target)


def upcasts(target: Target) -> bool:
    """Whether operands are widened to float32 first: below sm_80 Triton has no tensor cores."""
    return isinstance(target, int) and target < 80


def splits_for(programs: int, keys: int, block_n: int, multiprocessors: int) -> int:
    """Into how many parts to split the keys: as many as fill the multiprocessors once, of two blocks at least."""
    return max(1, min(multiprocessors // max(programs, 1), triton.cdiv(keys, block_n) // 2))


# ---- launchers ----


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernels, with the keys split in `splits` parts (`splits_for`'s choice when None).

    Returns: out [B,Q,d] in the dtype of q, and float32 [B,heads,Q], the log-sum-exp of the scores in base 2.

    Raises:
        TypeError, ValueError: dtype or d / nheads are none of `DTYPES` and `HEAD_DIMS`, or shapes do not fit.
    """
    batch, queries, dim = q.shape
    keys = k.shape[1]
    head_dim = _checked_head_dim(q, k, v, nheads, padding)
    device = device_of(q.device)
    config = configs_for(device.target, q.dtype).forward
    programs = batch * nheads * triton.cdiv(queries, config.block_m)
    splits = splits or splits_for(programs, keys, config.block_n, device.multiprocessors)

    out = torch.empty((batch, queries, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    parts, parts_lse = out[None], lse[None]
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        parts_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    q, k, v = _rows(q), _rows(k), _rows(v)
    padding_bytes, padding_strides = as_bytes(padding)
    with torch.cuda.device_of(q):
        forward_kernel[(programs * splits,)](
            *(q, k, v, padding_bytes, parts, parts_lse),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *padding_strides),
            *(*parts.stride()[:3], parts_lse.stride(0)),
            *(nheads, queries, keys, splits, head_dim**-0.5),
            **_options(config, head_dim, device.target),
        )
        if splits > 1:
            combine_kernel[(batch * nheads * triton.cdiv(queries, COMBINE.block_m),)](
                *(parts, parts_lse, out, lse),
                *(*parts.stride()[:3], parts_lse.stride(0)),
                *(nheads, queries, splits),
                HEAD_DIM=head_dim,
                BLOCK_M=COMBINE.block_m,
                num_warps=COMBINE.num_warps,
                num_stages=COMBINE.num_stages,
            )
    return out, lse


def launch_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, nheads: int, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward kernels on the gradient [B,Q,d] of `out` and what `launch_attention` returned.

    Returns: dq [B,Q,d], dk and dv [B,L,d].

    Raises:
        TypeError, ValueError: dtype or d / nheads are none of `DTYPES` and `HEAD_DIMS`, or shapes do not fit.
    """
    batch, queries, dim = q.shape
    keys = k.shape[1]
    head_dim = _checked_head_dim(q, k, v, nheads, padding)
    target = device_of(q.device).target
    configs = configs_for(target, q.dtype)

    dq = torch.empty((batch, queries, dim), dtype=q.dtype, device=q.device)
    dk = torch.empty((batch, keys, dim), dtype=k.dtype, device=k.device)
    dv = torch.empty((batch, keys, dim), dtype=v.dtype, device=v.device)
    delta = torch.empty((batch, nheads, queries), dtype=torch.float32, device=q.device)
    grad, q, k, v, out = _rows(grad), _rows(q), _rows(k), _rows(v), _rows(out)
    padding_bytes, padding_strides = as_bytes(padding)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *padding_strides)
    sizes = (nheads, queries, keys, head_dim**-0.5)
    with torch.cuda.device_of(q):
        if dq.numel() > 0:
            config = configs.backward_queries
            backward_queries_kernel[(batch * nheads * triton.cdiv(queries, config.block_m),)](
                *(q, k, v, padding_bytes, out, lse, grad, dq, delta),
                *(*strides, *out.stride()[:2], *grad.stride()[:2], *dq.stride()[:2]),
                *sizes,
                **_options(config, head_dim, target),
            )
        if dk.numel() > 0:
            config = configs.backward_keys
            backward_keys_kernel[(batch * nheads * triton.cdiv(keys, config.block_n),)](
                *(q, k, v, padding_bytes, lse, grad, delta, dk, dv),
                *(*strides, *grad.stride()[:2], *dk.stride()[:2]),
                *sizes,
                **_options(config, head_dim, target),
            )
    return dq, dk, dv


def _options(config: Config, head_dim: int, target: Target) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "UPCAST": upcasts(target),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _checked_head_dim(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None) -> int:
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must all be of one of {list(DTYPES)}, got {q.dtype}, {k.dtype} and {v.dtype}")
    (batch, _, dim), keys = q.shape, k.shape[1]
    if not k.shape == v.shape == (batch, keys, dim) or (padding is not None and padding.shape != (batch, keys)):
        given = [list(x.shape) for x in (q, k, v, padding) if x is not None]
        raise ValueError(f"q, k, v and padding must be [B,Q,d], [B,L,d], [B,L,d] and [B,L], got {given}")
    head_dim, rest = divmod(dim, nheads)
    if rest or head_dim not in HEAD_DIMS:
        raise ValueError(f"d / nheads must be one of {HEAD_DIMS}, got d={dim} and nheads={nheads}")
    return head_dim


def _rows(x: Tensor) -> Tensor:
    """x [...,d] with d contiguous, all that the kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(padding: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """padding [B,L] as bytes, and its strides."""
    if padding is None:
        return None, (0, 1)
    return padding.view(torch.uint8), (padding.stride(0), padding.stride(1))


# ---- operations ----


@operation("attention", launch_attention)
def attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.attention`, and the log-sum-exp [B,heads,Q] of its scores in base 2, -inf where all is padding."""
    dtype = q.dtype
    q, k, v = (x.to(reference.at_least_float32(dtype)) for x in (q, k, v))  # float16's scores can overflow
    out = reference.attention(q, k, v, nheads, padding).to(dtype).contiguous()
    scores = _heads(q * (q.shape[-1] // nheads) ** -0.5, nheads) @ _heads(k, nheads).mT  # [B,heads,Q,L]
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    return out, scores.logsumexp(-1) * LOG2_E.value


@attention_and_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], nheads, q.shape[1]), dtype=reference.at_least_float32(q.dtype))
    return q.new_empty(q.shape), lse


@operation("attention_backward", launch_attention_backward)
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, nheads: int, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from the gradient [B,Q,d] of `out`."""
    dtype, scale = q.dtype, (q.shape[-1] // nheads) ** -0.5
    weights = reference.attention_weights(q, k, nheads, padding)  # [B,heads,Q,L]
    grad, q, k, v, out = (_heads(x.to(weights.dtype), nheads) for x in (grad, q, k, v, out))
    dscores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    heads = (dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ grad)
    dq, dk, dv = (x.transpose(1, 2).flatten(-2).to(dtype).contiguous() for x in heads)
    return dq, dk, dv


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, nheads: int, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _heads(x: Tensor, nheads: int) -> Tensor:
    """[B,L,d] to [B,heads,L,head_dim]."""
    return x.unflatten(-1, (nheads, -1)).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.nheads, padding = inputs
    ctx.save_for_backward(q, k, v, padding, *output)


def _backward(ctx: Any, grad: Tensor, _lse_grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, padding, out, lse = ctx.saved_tensors
    return *attention_backward(grad, q, k, v, out, lse, ctx.nheads, padding), None, None


attention_and_lse.register_autograd(_backward, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in heads, differentiable once.

    Kernels compute it on CUDA, `reference.attention` elsewhere.

    Args:
        q: [B,Q,d], of any batch and row strides, and so k and v [B,L,d]; all of one dtype, on CUDA one of `DTYPES`.
        nheads: on CUDA d / nheads is one of `HEAD_DIMS`.
        padding: bool [B,L], True on keys that nothing may attend to.

    Returns: [B,Q,d]; 0 for images where all keys are padding.

    Raises:
        TypeError, ValueError: on CUDA, another dtype or d / nheads, or shapes that do not fit.
    """
    return attention_and_lse(q, k, v, nheads, padding)[0]


# ---- builds ----

_FLOAT32 = ("lse_ptr", "delta_ptr", "parts_ptr", "parts_lse_ptr")
_UNALIGNED = ("stride_pb", "stride_ls")


def builds(target: Target) -> list[Build]:
    """Every kernel that the launchers can choose on `target`.

    Without padding, and writing float32 parts, for DETR's head_dim of 32 alone: one load less, another store.
    """
    found = []
    for dtype in dtypes_on(target):
        configs = configs_for(target, dtype)
        for head_dim in HEAD_DIMS:
            for kernel, config in (
                (forward_kernel, configs.forward),
                (backward_queries_kernel, configs.backward_queries),
                (backward_keys_kernel, configs.backward_keys),
                (combine_kernel, COMBINE),
            ):
                found.append(_build(kernel.__name__.removesuffix("_kernel"), kernel, target, dtype, head_dim, config))
        forward = (forward_kernel, target, dtype, 32, configs.forward)
        found.append(_build("forward_unpadded", *forward, padded=False))
        found.append(_build("forward_parts", *forward, parts=True))
    return found


def _build(
    name: str,
    kernel: Any,
    target: Target,
    dtype: torch.dtype,
    head_dim: int,
    config: Config,
    *,
    padded: bool = True,
    parts: bool = False,
) -> Build:
    kind = DTYPES[dtype]
    types = {pointer: f"*{kind}" for pointer in kernel.arg_names if pointer.endswith("_ptr")}
    types |= dict.fromkeys(_FLOAT32, "*fp32") | {"padding_ptr": "*u8", "scale": "fp32"}
    types |= {"out_ptr": "*fp32"} if parts else {}
    absent = {} if padded else {"padding_ptr": None}
    options = _options(config, head_dim, target)
    launch = {option: options.pop(option) for option in ("num_warps", "num_stages")}
    aligned = [name for name in kernel.arg_names if name.startswith("stride_") and name not in _UNALIGNED]
    tensor_cores = not upcasts(target) and (dtype.itemsize == 2 or target == "gfx942")
    return build(
        f"{name}-{kind}-{head_dim}",
        kernel,
        types,
        {"stride_pn": 1, **options, **absent},
        **launch,
        aligned=aligned,
        tensor_cores=tensor_cores and kernel is not combine_kernel,
    )
