"""Masks for DETR's objects: the panoptic head (Carion et al. 2020, section 4.4 and figure 8).

Exact rewrites of `MaskHeadSmallConv.definition`. Normalisation is per query, so only the selected queries need masks. A
convolution is linear in its input: where that is a sum or a concatenation of something that an image's queries share
(the encoded image, feature maps) and something of each query, the shared part is convolved once an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import ops, reference
from detr_fast.categories import Category
from detr_fast.config import DetrConfig
from detr_fast.detr.detector import DETR, Samples

Select = Callable[[Tensor], Tensor]


class DETRsegm(nn.Module):
    """DETR with masks (facebookresearch/detr, models/segmentation.py).

    Args:
        detr: the detector, built with `masks` so that its backbone returns all stages.
        freeze_detr: train the mask head alone.

    Attributes:
        categories: as `DETR.categories`.
    """

    categories: list[Category] | None = None

    def __init__(self, detr: DETR, freeze_detr: bool = False):
        super().__init__()
        self.detr = detr
        if freeze_detr:
            detr.requires_grad_(False)
        config = detr.config
        d, nheads = config.hidden_dim, config.nheads
        self.bbox_attention = MHAttentionMap(d, d, nheads)
        self.mask_head = MaskHeadSmallConv(d + nheads, list(config.stage_channels[2::-1]), d)

    @property
    def config(self) -> DetrConfig:
        return self.detr.config

    @property
    def aux_loss(self) -> bool:
        return self.detr.aux_loss

    @aux_loss.setter
    def aux_loss(self, value: bool) -> None:
        self.detr.aux_loss = value

    def forward(
        self, samples: Samples, select: Select | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """Detects objects and segments them.

        Args:
            samples, dtype: as `DETR.forward` takes them.
            select: maps pred_logits [B,Q,num_classes+1] to bool [B,Q], the queries that get masks; None: all.

        Returns:
            What `DETR.forward` returns, and "pred_masks", logits at stride 4: [B,Q,h,w], or, with `select`, a list of
            [K_i,h,w], one for each image, of its selected queries in order; then "selected" is what `select` returned.

        Raises:
            ValueError: `select` returns something else than bool [B,Q].
        """
        return self.predict(self.encode(samples, dtype), select)

    def encode(self, samples: Samples, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """As `DETR.encode`."""
        return self.detr.encode(samples, dtype)

    def predict(self, encoded: dict[str, Any], select: Select | None = None) -> dict[str, Any]:
        """Classes, boxes and masks from `encode`'s outcome."""
        out = self.detr.predict(encoded)
        hs = encoded["hs"][-1]  # [B,Q,d]
        if select is None:
            counts = [hs.shape[1]] * hs.shape[0]
            image = torch.arange(hs.shape[0], device=hs.device).repeat_interleave(hs.shape[1])  # [B*Q]
            masks = self.masks(hs.flatten(0, 1), image, encoded, counts)  # [B*Q,h,w]
            out["pred_masks"] = masks.unflatten(0, hs.shape[:2])
            return out
        selected = out["selected"] = _checked_selection(select(out["pred_logits"]), out["pred_logits"])
        counts = selected.sum(1).tolist()
        masks = self.masks(hs[selected], selected.nonzero()[:, 0], encoded, counts)  # [N,h,w]
        out["pred_masks"] = list(masks.split(counts))
        return out

    def masks(
        self, queries: Tensor, image: Tensor, encoded: dict[str, Any], counts: Sequence[int] | None = None
    ) -> Tensor:
        """Mask logits [N,h,w] of queries, float32 at least.

        Args:
            queries: [N,d], those of one image side by side.
            image: int64 [N], the image of each, in rising order.
            encoded: `encode`'s outcome.
            counts: queries of each image. None: the host does not know; needs a GPU's kernels, which never wait for the
                device, so that a CUDA graph can record them.
        """
        if ops.is_plain("mask_head"):
            assert counts is not None
            return self._defined_masks(queries, encoded, counts)
        src, mask = encoded["src"], encoded["mask"]
        padding = None if mask is None else mask.flatten(1)  # [B,L]
        keys = self.bbox_attention.keys(encoded["memory"])  # [B,L,d]
        shared = self.mask_head.shared(src, encoded["features"][2::-1])
        parts = []
        for rows, own in ops.chunks(src, image, counts, shared.query_bytes):
            maps = self.bbox_attention.maps(queries[rows], keys, own, padding)  # [n,L,heads]
            maps = maps.unflatten(1, src.shape[-2:]).permute(0, 3, 1, 2).to(src.dtype)  # [n,heads,h/32,w/32]
            parts.append(self.mask_head.queries(maps, own, shared))
        return torch.cat(parts)

    def _defined_masks(self, queries: Tensor, encoded: dict[str, Any], counts: Sequence[int]) -> Tensor:
        """The definition of `masks`, image by image."""
        src, memory, mask, fpns = encoded["src"], encoded["memory"], encoded["mask"], encoded["features"][2::-1]
        masks = []
        for index, some in enumerate(queries.split(list(counts))):
            one = slice(index, index + 1)
            padding = None if mask is None else mask[one]
            maps = self.bbox_attention.definition(some[None], memory[one], padding).to(src.dtype)
            masks.append(self.mask_head.definition(src[one], maps, [fpn[one] for fpn in fpns])[:, 0])
        return torch.cat(masks)


class MHAttentionMap(nn.Module):
    """Attention weights of queries over a feature map, one softmax over heads and positions.

    facebookresearch/detr, models/segmentation.py; its dropout is 0 and left out.
    """

    def __init__(self, query_dim: int, hidden_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.q_linear = nn.Linear(query_dim, hidden_dim)
        self.k_linear = nn.Linear(query_dim, hidden_dim)
        for layer in (self.q_linear, self.k_linear):
            nn.init.zeros_(layer.bias)
            nn.init.xavier_uniform_(layer.weight)
        self.normalize_fact = float(hidden_dim / num_heads) ** -0.5

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,Q,heads,h,w] from q [B,Q,d], k [B,d,h,w] and mask bool [B,h,w], True on padding."""
        size, padding = k.shape[-2:], None if mask is None else mask.flatten(1)
        keys = self.keys(k)
        maps = [self.maps(rows, keys, index, padding) for index, rows in enumerate(q)]  # [Q,L,heads]
        return torch.stack(maps).transpose(2, 3).unflatten(-1, size)

    def keys(self, memory: Tensor) -> Tensor:
        """[B,L,d] from memory [B,d,h,w]."""
        return ops.linear(self.k_linear, memory.flatten(2).transpose(1, 2))

    def maps(self, q: Tensor, keys: Tensor, image: int | Tensor, padding: Tensor | None) -> Tensor:
        """[N,L,heads] for queries [N,d] of `image`, one or int64 [N], and all images' keys and padding bool [B,L]."""
        q = ops.linear(self.q_linear, q.to(keys.dtype)) * self.normalize_fact
        return ops.attention_map(q, keys, image, self.num_heads, padding)

    def definition(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """`forward` as facebookresearch/detr computes it."""
        q = self.q_linear(q) * self.normalize_fact
        keys = self.k_linear(k.flatten(2).transpose(1, 2))
        padding = None if mask is None else mask.flatten(1)
        maps = [reference.attention_map(rows, keys, index, self.num_heads, padding) for index, rows in enumerate(q)]
        return torch.stack(maps).transpose(2, 3).unflatten(-1, k.shape[-2:])


class Shared(NamedTuple):
    """What all queries of an image add to the mask head's layers.

    Attributes:
        lay1: [B,d+heads,h,w], bias included.
        levels: of lay3, lay4 and lay5, coarse to fine, as `ops.level` gives them.
    """

    lay1: Tensor
    levels: tuple[Tensor, ...]

    @property
    def query_bytes(self) -> int:
        """Of a query's largest feature map."""
        return max(level[0].numel() * level.element_size() for level in self.levels)


class MaskHeadSmallConv(nn.Module):
    """Convolutions with GroupNorm, upsampled onto the backbone's feature maps.

    facebookresearch/detr, models/segmentation.py; the groups of narrow models as in transformers.

    Args:
        dim: channels of the encoded image and of the attention maps together.
        fpn_dims: channels of the three feature maps, coarse to fine.
        context_dim: channels of the encoded image.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int):
        super().__init__()
        self.context_dim = context_dim
        widths = [dim, *(context_dim // divisor for divisor in (2, 4, 8, 16))]
        norms = [nn.GroupNorm(min(8, width), width) for width in widths]
        self.lay1, self.gn1 = nn.Conv2d(dim, dim, 3, padding=1), norms[0]
        self.lay2, self.gn2 = nn.Conv2d(dim, widths[1], 3, padding=1), norms[1]
        self.lay3, self.gn3 = nn.Conv2d(widths[1], widths[2], 3, padding=1), norms[2]
        self.lay4, self.gn4 = nn.Conv2d(widths[2], widths[3], 3, padding=1), norms[3]
        self.lay5, self.gn5 = nn.Conv2d(widths[3], widths[4], 3, padding=1), norms[4]
        self.out_lay = nn.Conv2d(widths[4], 1, 3, padding=1)
        self.adapter1 = nn.Conv2d(fpn_dims[0], widths[1], 1)
        self.adapter2 = nn.Conv2d(fpn_dims[1], widths[2], 1)
        self.adapter3 = nn.Conv2d(fpn_dims[2], widths[3], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, bbox_mask: Tensor, fpns: Sequence[Tensor]) -> Tensor:
        """Mask logits [B*Q,1,H,W] from x [B,d,h,w], bbox_mask [B,Q,heads,h,w], fpns [B,C_i,h_i,w_i], coarse to fine."""
        if ops.is_plain("mask_head"):
            return self.definition(x, bbox_mask, fpns)
        batch, queries = bbox_mask.shape[:2]
        maps, shared = bbox_mask.flatten(0, 1), self.shared(x, fpns)  # [B*Q,heads,h,w]
        image = torch.arange(batch, device=x.device).repeat_interleave(queries)
        parts = ops.chunks(x, image, [queries] * batch, shared.query_bytes)
        return torch.cat([self.queries(maps[rows], own, shared) for rows, own in parts])[:, None]

    def shared(self, x: Tensor, fpns: Sequence[Tensor]) -> Shared:
        """What does not depend on the query, from x [B,d,h,w] and fpns [B,C_i,h_i,w_i], coarse to fine."""
        weight, bias = ops.weights(self.lay1, x.dtype)
        lay1 = ops.conv2d(ops.image_layout(x), weight[:, : self.context_dim], bias, padding=1)  # [B,d+heads,h,w]
        levels = []
        adapters = ((self.adapter1, self.lay3), (self.adapter2, self.lay4), (self.adapter3, self.lay5))
        for fpn, (adapter, layer) in zip(fpns, adapters, strict=True):
            adapted = ops.conv2d(ops.image_layout(fpn), *ops.weights(adapter, x.dtype))  # in the layer's channels
            levels.append(ops.level(adapted, layer))
        return Shared(lay1, tuple(levels))

    def queries(self, maps: Tensor, image: int | Tensor, shared: Shared) -> Tensor:
        """Mask logits [N,H,W], float32 at least, from the attention maps [N,heads,h,w] of queries.

        Args:
            image: of all queries, or of each, int64 [N].
            shared: of all images.
        """
        dtype = maps.dtype
        weight, _ = ops.weights(self.lay1, dtype)
        x = ops.conv2d(ops.image_layout(maps), weight[:, self.context_dim :], None, padding=1)
        x = ops.group_norm_relu(x.add_(shared.lay1[image]), self.gn1)  # [N,d+heads,h,w]
        x = ops.conv2d(x, *ops.weights(self.lay2, dtype), padding=1)  # [N,d/2,h,w]
        layers = ((self.gn2, self.lay3), (self.gn3, self.lay4), (self.gn4, self.lay5))
        for (norm, layer), level in zip(layers, shared.levels, strict=True):
            x = ops.norm_upsample_conv(x, norm, layer, level, image)  # [N,d/4,2h,2w], [N,d/8,4h,4w], [N,d/16,8h,8w]
        x = ops.conv2d(ops.group_norm_relu(x, self.gn5), *ops.weights(self.out_lay, dtype), padding=1)  # [N,1,H,W]
        return x[:, 0].to(reference.at_least_float32(dtype))

    def definition(self, x: Tensor, bbox_mask: Tensor, fpns: Sequence[Tensor]) -> Tensor:
        """`forward` as facebookresearch/detr computes it: all feature maps are repeated for each query."""
        queries = bbox_mask.shape[1]
        x = torch.cat([x.repeat_interleave(queries, 0), bbox_mask.flatten(0, 1)], 1)  # [B*Q,d+heads,h,w]
        x = self.gn1(self.lay1(x)).relu()
        x = self.gn2(self.lay2(x)).relu()
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        layers = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for fpn, adapter, (conv, norm) in zip(fpns, adapters, layers, strict=True):
            fpn = adapter(fpn).repeat_interleave(queries, 0)  # [B*Q,C,H,W]
            x = norm(conv(fpn + F.interpolate(x, size=fpn.shape[-2:]))).relu()
        return self.out_lay(x)


def _checked_selection(selected: Any, logits: Tensor) -> Tensor:
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool or selected.shape != logits.shape[:2]:
        given = f"{selected.dtype} {list(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
        raise ValueError(f"select must return bool {list(logits.shape[:2])}, one for each query, got {given}")
    return selected


def build_detr(config: DetrConfig) -> DETR | DETRsegm:
    """A DETR of any size with random weights, as the paper initialises it; with the mask head where `config.masks`."""
    detr = DETR(config)
    return DETRsegm(detr) if config.masks else detr
