"""The plain PyTorch definition of every operation that detr_fast accelerates: facebookresearch/detr's algorithm.

Slow on purpose. Every fast path is tested against these functions; nothing else in the package is. They
read the parameters of detr_fast's modules in whatever dtype those have: float64 gives the truth to measure errors by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from detr_fast.detr.backbone import FrozenBatchNorm2d, ResNet
    from detr_fast.detr.segmentation import MaskHeadSmallConv, MHAttentionMap
    from detr_fast.detr.transformer import MultiheadAttention, Transformer

# ---- backbone ----


def frozen_batch_norm(x: Tensor, norm: FrozenBatchNorm2d) -> Tensor:
    """[B,C,H,W] to [B,C,H,W]: facebookresearch/detr, models/backbone.py."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def resnet(body: ResNet, x: Tensor) -> list[Tensor]:
    """The outputs of the four stages for images [B,3,H,W]: each convolution, norm, ReLU and sum by itself."""

    def convolve(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
        weight = conv.weight.to(x.dtype)
        return frozen_batch_norm(F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation), norm)

    x = F.max_pool2d(convolve(x, body.conv1, body.bn1).relu(), 3, 2, 1)
    stages = []
    for stage in body.stages():
        for block in stage:
            y, units = x, block.units()
            for index, (conv, norm) in enumerate(units):
                y = convolve(y, conv, norm)
                y = y.relu() if index < len(units) - 1 else y
            identity = x if block.downsample is None else convolve(x, *block.downsample)
            x = (y + identity).relu()
        stages.append(x)
    return stages


# ---- transformer ----


def attention(q: Tensor, k: Tensor, v: Tensor, nheads: int, padding: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in heads: q [B,Q,d], k and v [B,L,d], padding bool [B,L] to [B,Q,d].

    Where all keys of an image are padding its rows are 0.
    """
    q, k, v = (x.unflatten(-1, (nheads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1)
    if padding is not None:
        weights = weights.masked_fill(padding.all(1)[:, None, None, None], 0)
    return (weights @ v).transpose(1, 2).flatten(-2)


def multihead_attention(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
) -> Tensor:
    """torch.nn.MultiheadAttention without its weights: query [B,Q,d], key and value [B,L,d] to [B,Q,d]."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return module.out_proj(attention(q, k, v, module.num_heads, padding))


def transformer(
    module: Transformer, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor]:
    """hs [layers,B,Q,d] and memory [B,d,h,w] for src and pos_embed [B,d,h,w], mask bool [B,h,w], query_embed [Q,d].

    In evaluation: without dropout. facebookresearch/detr, models/transformer.py, normalising after each block.
    """
    x, pos = (map_.flatten(2).transpose(1, 2) for map_ in (src, pos_embed.to(src.dtype)))
    padding = None if mask is None else mask.flatten(1)
    for layer in module.encoder.layers:
        x = layer.norm1(x + multihead_attention(layer.self_attn, x + pos, x + pos, x, padding))
        x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    query_pos = query_embed.expand(src.shape[0], -1, -1)
    tgt, hs = torch.zeros_like(query_pos), []
    for layer in module.decoder.layers:
        q = tgt + query_pos
        tgt = layer.norm1(tgt + multihead_attention(layer.self_attn, q, q, tgt))
        tgt = layer.norm2(tgt + multihead_attention(layer.multihead_attn, tgt + query_pos, x + pos, x, padding))
        tgt = layer.norm3(tgt + layer.linear2(layer.linear1(tgt).relu()))
        hs.append(module.decoder.norm(tgt))
    return torch.stack(hs), x.transpose(1, 2).unflatten(-1, src.shape[-2:])


# ---- mask head ----


def attention_map(module: MHAttentionMap, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B,Q,heads,h,w], each query's softmax over heads and positions: q [B,Q,d], k [B,d,h,w], mask bool [B,h,w].

    Where all of an image is padding its maps are 0. facebookresearch/detr, models/segmentation.py.
    """
    q = module.q_linear(q).unflatten(-1, (module.num_heads, -1)) * module.normalize_fact
    k = F.conv2d(k, module.k_linear.weight[..., None, None], module.k_linear.bias).unflatten(1, (module.num_heads, -1))
    scores = torch.einsum("bqnc,bnchw->bqnhw", q, k)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
    weights = scores.flatten(2).softmax(-1).view_as(scores)
    return weights if mask is None else weights.masked_fill(mask.flatten(1).all(1)[:, None, None, None, None], 0)


def upsample_conv(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest upsampling of x [N,C,h,w] to `size`, then the 3x3 convolution [O,C,3,3], zero padded: [N,O,*size]."""
    return F.conv2d(F.interpolate(x, size=size), weight, padding=1)


def mask_head(module: MaskHeadSmallConv, x: Tensor, bbox_mask: Tensor, fpns: list[Tensor]) -> Tensor:
    """Mask logits [B*Q,1,H,W] for x [B,d,h,w], bbox_mask [B,Q,heads,h,w] and fpns [B,C_i,h_i,w_i], coarse to fine.

    All feature maps are repeated for each query. facebookresearch/detr, models/segmentation.py.
    """
    queries = bbox_mask.shape[1]
    x = torch.cat([x.repeat_interleave(queries, 0), bbox_mask.flatten(0, 1)], 1)
    x = module.gn1(module.lay1(x)).relu()
    x = module.gn2(module.lay2(x)).relu()
    adapters = (module.adapter1, module.adapter2, module.adapter3)
    layers = ((module.lay3, module.gn3), (module.lay4, module.gn4), (module.lay5, module.gn5))
    for fpn, adapter, (conv, norm) in zip(fpns, adapters, layers, strict=True):
        fpn = adapter(fpn).repeat_interleave(queries, 0)
        x = norm(conv(fpn + F.interpolate(x, size=fpn.shape[-2:]))).relu()
    return module.out_lay(x)


# ---- bilinear resizing ----


class Taps(NamedTuple):
    """One axis of a bilinear resize at n output positions: two source indices and their weights, each [n]."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor

    def at(self, positions: Tensor | slice) -> Taps:
        return Taps(*(tap[positions] for tap in self))


def bilinear_weights(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size_in,size_out], what each input adds to each output of `F.interpolate(mode="bilinear", align_corners=False)`
    along one axis.

    Read off what it does to the unit vectors: its source coordinates are float32 and may be rounded once or twice
    (with or without fused multiply-add), and at coordinate 200 one rounding already moves a weight by 1e-5.
    """
    unit = torch.eye(size_in, dtype=dtype, device=device)[None, :, None]
    return F.interpolate(unit, size=(1, size_out), mode="bilinear", align_corners=False)[0, :, 0]


def bilinear_taps(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Taps:
    """`bilinear_weights` as the two inputs of each output and their weights."""
    weights = bilinear_weights(size_in, size_out, dtype, device)
    low = (weights != 0).to(torch.uint8).argmax(0)
    high = (low + 1).clamp(max=size_in - 1)
    low_weight, high_weight = weights.gather(0, low[None])[0], weights.gather(0, high[None])[0]
    return Taps(low, high, low_weight, torch.where(high > low, high_weight, 0))


# ---- the panoptic merges ----

SMALLEST_AREA = 4  # pixels; a segment must be larger


def nearest_as_pil(ids: Tensor, size: Sequence[int]) -> Tensor:
    """An id map [h,w] resized to `size` (height, width) by Pillow's NEAREST."""
    image = Image.fromarray(ids.cpu().numpy().astype(np.int32))
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))).to(ids.device)


def upstream_panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: Callable[[int], Any],
) -> tuple[Tensor, list[dict[str, Any]]]:
    """facebookresearch/detr's merge of the kept queries' masks [K,h,w]; see detr_fast.merge."""
    logits = F.interpolate(pred_masks[None], size=tuple(processed_size), mode="bilinear", align_corners=False)[0]
    kept, classes = list(range(len(labels))), labels.tolist()
    merge_stuff = True
    while kept:
        winner = logits[kept].softmax(0).argmax(0)
        for k, label in enumerate(classes if merge_stuff else []):
            if not isthing(label):
                winner[winner == k] = classes.index(label)
        merge_stuff = False
        ids = nearest_as_pil(winner, target_size)
        areas = [int((ids == i).sum()) for i in range(len(kept))]
        if min(areas) > SMALLEST_AREA:
            return ids, [
                {"id": i, "isthing": isthing(classes[k]), "category_id": classes[k], "area": area}
                for i, (k, area) in enumerate(zip(kept, areas, strict=True))
            ]
        kept = [k for k, area in zip(kept, areas, strict=True) if area > SMALLEST_AREA]
    return torch.zeros(tuple(target_size), dtype=torch.int32, device=pred_masks.device), []


def panoptic_merge(
    pred_masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    padded_size: Sequence[int],
    processed_size: Sequence[int],
    target_size: Sequence[int],
    isthing: Callable[[int], Any],
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The corrected merge of the kept queries' masks [K,h,w]; see detr_fast.merge."""
    logits = F.interpolate(pred_masks[None], size=tuple(padded_size), mode="bilinear", align_corners=False)[0]
    logits = logits[:, : processed_size[0], : processed_size[1]]
    classes = labels.tolist()
    first = [k if isthing(label) else classes.index(label) for k, label in enumerate(classes)]
    kept = list(range(len(labels)))
    while kept:
        winner = logits[kept].argmax(0)
        segment_of = torch.tensor([first[k] for k in kept], device=winner.device)[winner]
        shown = nearest_as_pil(segment_of, target_size)
        areas = [int((shown == k).sum()) for k in first]
        if all(areas[k] > SMALLEST_AREA for k in kept):
            break
        kept = [k for k in kept if areas[k] > SMALLEST_AREA]
    ids = torch.zeros(tuple(target_size), dtype=torch.int32, device=pred_masks.device)
    segments: list[dict[str, Any]] = []
    for k in [k for k in kept if first[k] == k]:
        ids[shown == k] = len(segments) + 1
        y, x = (shown == k).nonzero().unbind(1)
        left, top = int(x.min()), int(y.min())
        segments.append(
            {
                "id": len(segments) + 1,
                "category_id": classes[k],
                "isthing": bool(isthing(classes[k])),
                "score": max(float(scores[j]) for j, lead in enumerate(first) if lead == k),
                "area": areas[k],
                "bbox": [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1],
            }
        )
    return ids, segments
