"""Attention, and the attention maps of the mask head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import reference
from detr_fast.ops.choices import ATTENTION_ROWS, attention_choice
from detr_fast.ops.policy import gpu, on_cpu, trains, uses_kernels


def packs_tokens(padding: Tensor | None) -> bool:
    """Whether a transformer should drop the tokens on padding, bool [B,L], instead of masking them as keys.

    On a CPU attention then needs no mask and nothing is computed for padding. A GPU would have to wait for the counts
    and run one attention an image.
    """
    return padding is not None and on_cpu(padding.device) and not torch.compiler.is_compiling()


def attention(
    q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention without its projections: q [B,Q,d], k and v [B,L,d], padding bool [B,L] to [B,Q,d].

    Where all keys of an image are padding its rows are 0.
    """
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    device = gpu(q.device)
    if device is not None and uses_kernels(q) and not dropout:
        programs = q.shape[0] * nheads * -(-q.shape[1] // ATTENTION_ROWS)
        if attention_choice(device, q.shape[-1] // nheads, programs, padding is not None).kernel:
            return torch.ops.detr_fast.attention(q, k, v, nheads, padding)[0]
    if on_cpu(q.device) and q.dtype != torch.float32 and not dropout and trains(q, k, v):
        # the gradient of PyTorch's flash attention in bfloat16 is slow: 18 ms against 1.7 for 16 x 8 heads, 64 x 64
        return reference.attention(q, k, v, nheads, padding)
    q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
    allowed = None if padding is None else ~padding[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
    if padding is not None:
        out = out.masked_fill(padding.all(1)[:, None, None, None], 0)
    return out.transpose(1, 2).flatten(-2)


def attention_map(q: Tensor, k: Tensor, image: int | Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """`reference.attention_map`: each query's softmax over heads and positions together, float32 at least.

    Args:
        q: [N,d], scaled queries.
        k: [B,L,d], the images' keys.
        image: of all queries, or of each, int64 [N]; see `masks.chunks`.
        padding: bool [B,L].

    Returns: [N,L,heads].
    """
    if isinstance(image, Tensor) and uses_kernels(q):
        return torch.ops.detr_fast.attention_map(q, k, image, nheads, padding)
    return reference.attention_map(q, k, image, nheads, padding)
