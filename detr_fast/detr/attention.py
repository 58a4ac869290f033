"""Where a DETR looks: attention weights, which the model itself never computes (Carion et al. 2020, figures 3, 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import reference
from detr_fast.detr.detector import DETR, Samples
from detr_fast.detr.segmentation import DETRsegm
from detr_fast.detr.transformer import Tokens


def decoder_attention(
    model: DETR | DETRsegm, samples: Samples, queries: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Cross-attention of object queries over the image, in the decoder's last layer.

    Args:
        model: in evaluation mode, or dropout changes what it sees.
        samples: images, as the model takes them.
        queries: bool [B,Q], as "selected" in the model's outputs.
        dtype: as for `DETR.forward`.

    Returns: [K,heads,h,w], float32 at least, of the K queries that are True, image by image, over the backbone's last
        feature map. Each head's weights sum to 1 and are 0 on padding.

    Raises:
        ValueError: `queries` is not bool [B,Q]; what the model raises.
    """
    detr = _detector(model)
    layer = detr.transformer.decoder.layers[-1]
    encoded, (tgt, k, _, biases, tokens) = _recorded(detr, layer, samples, dtype)
    _, q = layer.cross_queries(tgt, biases, k.dtype)
    if queries.dtype != torch.bool or queries.shape != q.shape[:2]:
        given = f"{queries.dtype} {list(queries.shape)}"
        raise ValueError(f"queries must be bool {list(q.shape[:2])}, one for each query, got {given}")
    wanted = [rows[kept] for rows, kept in zip(q, queries.to(q.device), strict=True)]
    maps = _weights(wanted, tokens.unpack(k), layer.multihead_attn.num_heads, tokens)
    return torch.cat(maps).unflatten(-1, encoded["src"].shape[-2:])


def encoder_attention(
    model: DETR | DETRsegm,
    samples: Samples,
    points: Sequence[tuple[float, float]],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Self-attention of points over the image, in the encoder's last layer.

    Args:
        model, samples, dtype: as for `decoder_attention`.
        points: (x, y) in [0,1) of the samples as padded; that of the feature map's cell around it is returned.

    Returns: [B,P,heads,h,w], float32 at least.

    Raises:
        ValueError: a point outside; what the model raises.
    """
    if outside := [point for point in points if not all(0 <= place < 1 for place in point)]:
        raise ValueError(f"points must be (x, y) in [0, 1), got {outside[0]}")
    detr = _detector(model)
    layer = detr.transformer.encoder.layers[-1]
    encoded, (x, position, tokens) = _recorded(detr, layer, samples, dtype)
    q, k, _ = layer.projected(x, position)
    height, width = encoded["src"].shape[-2:]
    cells = [int(y * height) * width + int(x * width) for x, y in points]
    maps = _weights(list(tokens.unpack(q)[:, cells]), tokens.unpack(k), layer.self_attn.num_heads, tokens)
    return torch.stack(maps).unflatten(-1, (height, width))


def _detector(model: DETR | DETRsegm) -> DETR:
    return model.detr if isinstance(model, DETRsegm) else model


def _recorded(
    detr: DETR, layer: nn.Module, samples: Samples, dtype: torch.dtype | None
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """`detr.encode(samples, dtype)`, and what it gave to one of its layers."""
    given: list[tuple[Any, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    try:
        encoded = detr.encode(samples, dtype)
    finally:
        hook.remove()
    return encoded, given[0]


def _weights(queries: list[Tensor], keys: Tensor, heads: int, tokens: Tokens) -> list[Tensor]:
    """softmax(q k^T / sqrt(head_dim)) for each image: queries [K_i,d] and keys [B,L,d] to [K_i,heads,L].

    Where all keys of an image are padding its weights are 0, as the model takes them.
    """
    weights = []
    for index, rows in enumerate(queries):
        one = slice(index, index + 1)
        padding = None if tokens.padding is None else tokens.padding[one]
        weights.append(reference.attention_weights(rows[None], keys[one], heads, padding)[0].transpose(0, 1))
    return weights
