"""Masks for DETR's objects: the panoptic head (Carion et al. 2020, section 4.4 and figure 8).

Exact rewrites of the definition in `reference.mask_head`. Normalisation is per query, so queries that nobody asks for
need no mask. A convolution is linear in its input: where that is a sum or a concatenation of something an image's
queries share (the encoded image, feature maps) and something of each query, the shared part is convolved once an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast import ops, reference
from detr_fast.categories import Category
from detr_fast.config import DetrConfig
from detr_fast.detr.detector import DETR, Samples

Select = Callable[[Tensor], Tensor]

# Queries are worked through in chunks whose largest feature map stays under this, so that the memory needed does not
# grow with their number. Measured on 2 cores with 32 MiB of L3 at 800 x 1066: chunks of 4 take half the time of 15.
CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 2**30  # the same on a GPU, where chunks only bound the memory


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

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.detr.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, value: torch.dtype | None) -> None:
        self.detr.compute_dtype = value

    def forward(self, samples: Samples, select: Select | None = None) -> dict[str, Any]:
        """Detects objects and segments them.

        Args:
            samples: images, as `DETR.forward` takes them.
            select: maps pred_logits [B,Q,num_classes+1] to bool [B,Q], the queries whose masks are wanted; None: all.

        Returns:
            What `DETR.forward` returns, and "pred_masks", logits at stride 4: [B,Q,h,w], or, with `select`, a list of
            [K_i,h,w], one for each image, of its selected queries in order; then "selected" is what `select` returned.

        Raises:
            ValueError: `select` returns something else than bool [B,Q].
        """
        return self.predict(self.encode(samples), select)

    def encode(self, samples: Samples) -> dict[str, Any]:
        """As `DETR.encode`."""
        return self.detr.encode(samples)

    def predict(self, encoded: dict[str, Any], select: Select | None = None) -> dict[str, Any]:
        """Classes, boxes and masks from `encode`'s outcome."""
        out = self.detr.predict(encoded)
        if select is None:
            selected = None
        else:
            selected = out["selected"] = _checked_selection(select(out["pred_logits"]), out["pred_logits"])
        out["pred_masks"] = self._selected_masks(encoded, selected)
        return out

    def _selected_masks(self, encoded: dict[str, Any], selected: Tensor | None) -> Tensor | list[Tensor]:
        """As `forward` returns them."""
        hs = encoded["hs"][-1]
        if ops.is_plain("mask_head") or not ops.uses_kernels(encoded["src"]):
            if selected is None:
                return torch.stack(self._image_by_image(list(hs), encoded))
            return self._image_by_image(list(hs[selected].split(selected.sum(1).tolist())), encoded)
        if selected is None:
            image = torch.arange(hs.shape[0], device=hs.device).repeat_interleave(hs.shape[1])
            return self.masks(hs.flatten(0, 1), image, encoded).unflatten(0, hs.shape[:2])
        masks = self.masks(hs[selected], selected.nonzero()[:, 0], encoded)
        return list(masks.split(selected.sum(1).tolist()))

    def masks(self, queries: Tensor, image: Tensor, encoded: dict[str, Any]) -> Tensor:
        """Mask logits [N,h,w] for queries [N,d] of the images `image`, int64 [N], all at once and never waiting for the
        device: what a GPU runs, and a CUDA graph can record."""
        src, padding = encoded["src"], encoded["mask"]
        padding = None if padding is None else padding.flatten(1)
        head, keys = self.mask_head, self.bbox_attention.keys(encoded["memory"])
        lay1, levels = head.shared_lay1(src), head.adapted(encoded["features"][2::-1], src.dtype)
        size = max(1, GPU_CHUNK_BYTES // max(level[0].numel() * level.element_size() for level in levels))
        chunks = []
        for some, own in zip(queries.split(size), image.split(size), strict=True):
            maps = self.bbox_attention.batched_maps(some, keys, own, padding).unflatten(1, src.shape[-2:])
            chunks.append(head.batched_queries(maps.permute(0, 3, 1, 2).to(src.dtype), own, lay1, levels))
        return torch.cat(chunks)

    def _image_by_image(self, queries: list[Tensor], encoded: dict[str, Any]) -> list[Tensor]:
        """Mask logits [K_i,h,w] for each image's queries [K_i,d], as many at a time as a CPU's cache holds."""
        if ops.is_plain("mask_head"):
            return self._plain_masks(queries, encoded)
        src, mask = encoded["src"], encoded["mask"]
        shared = self.mask_head.shared(src, encoded["features"][2::-1])
        keys = self.bbox_attention.keys(encoded["memory"])
        masks = []
        for index, wanted in enumerate(queries):
            padding = None if mask is None else mask[index].flatten()
            image = shared.image(index)
            chunks = []
            for chunk in wanted.split(self._chunk(image)):
                maps = self.bbox_attention.maps(chunk, keys[index], padding).unflatten(1, src.shape[-2:])
                chunks.append(self.mask_head.queries(maps.permute(0, 3, 1, 2).to(src.dtype), image))
            masks.append(torch.cat(chunks))
        return masks

    def _plain_masks(self, queries: list[Tensor], encoded: dict[str, Any]) -> list[Tensor]:
        src, memory, mask, fpns = encoded["src"], encoded["memory"], encoded["mask"], encoded["features"][2::-1]
        masks = []
        for index, wanted in enumerate(queries):
            one = slice(index, index + 1)
            padding = None if mask is None else mask[one]
            maps = reference.attention_map(self.bbox_attention, wanted[None], memory[one], padding).to(src.dtype)
            masks.append(reference.mask_head(self.mask_head, src[one], maps, [fpn[one] for fpn in fpns])[:, 0])
        return masks

    def _chunk(self, image: Shared) -> int:
        """Queries at once, for all of whose chunks `CHUNK_BYTES` hold."""
        largest = max(level[0].numel() * level.element_size() for level in image.levels)
        return max(1, CHUNK_BYTES // largest)


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
        size = k.shape[-2:]
        paddings = [None] * len(q) if mask is None else list(mask.flatten(1))
        maps = [self.maps(*image) for image in zip(q, self.keys(k), paddings, strict=True)]
        return torch.stack(maps).transpose(2, 3).unflatten(-1, size)

    def keys(self, memory: Tensor) -> Tensor:
        """[B,L,d] from memory [B,d,h,w]."""
        return ops.linear(self.k_linear, memory.flatten(2).transpose(1, 2))

    def maps(self, q: Tensor, keys: Tensor, padding: Tensor | None) -> Tensor:
        """[K,L,heads] for queries [K,d] of one image, its keys [L,d] and padding bool [L]."""
        return ops.attention_map(ops.linear(self.q_linear, q) * self.normalize_fact, keys, self.num_heads, padding)

    def batched_maps(self, q: Tensor, keys: Tensor, image: Tensor, padding: Tensor | None) -> Tensor:
        """[N,L,heads] for queries [N,d] of the images `image`, int64 [N]; all images' keys and padding."""
        q = ops.linear(self.q_linear, q.to(keys.dtype)) * self.normalize_fact
        return ops.attention_maps(q, keys, image, self.num_heads, padding)


class Shared(NamedTuple):
    """What all queries of an image add to the mask head's convolutions, biases included.

    Attributes:
        lay1: [B,d+heads,h,w].
        levels: the same for lay3, lay4 and lay5, coarse to fine.
    """

    lay1: Tensor
    levels: tuple[Tensor, Tensor, Tensor]

    def image(self, index: int) -> Shared:
        """One image's, with a batch of 1."""
        first, second, third = (level[index : index + 1] for level in self.levels)
        return Shared(self.lay1[index : index + 1], (first, second, third))


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
            return reference.mask_head(self, x, bbox_mask, list(fpns))
        shared = self.shared(x, fpns)
        return torch.cat([self.queries(maps, shared.image(i)) for i, maps in enumerate(bbox_mask)])[:, None]

    def shared(self, x: Tensor, fpns: Sequence[Tensor]) -> Shared:
        """What does not depend on the query, from x [B,d,h,w] and fpns [B,C_i,h_i,w_i], coarse to fine."""
        levels = []
        layers = (self.lay3, self.lay4, self.lay5)
        for adapted, layer in zip(self.adapted(fpns, x.dtype), layers, strict=True):
            levels.append(ops.conv2d(adapted, *ops.weights(layer, x.dtype), padding=1))
        return Shared(self.shared_lay1(x), (levels[0], levels[1], levels[2]))

    def shared_lay1(self, x: Tensor) -> Tensor:
        """What x [B,d,h,w] adds to lay1: [B,d+heads,h,w]."""
        weight, bias = ops.weights(self.lay1, x.dtype)
        return ops.conv2d(ops.image_layout(x), weight[:, : self.context_dim], bias, padding=1)

    def adapted(self, fpns: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The feature maps [B,C_i,h_i,w_i], coarse to fine, in the channels of the convolutions that see them."""
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        return [
            ops.conv2d(ops.image_layout(fpn), *ops.weights(adapter, dtype))
            for fpn, adapter in zip(fpns, adapters, strict=True)
        ]

    def queries(self, maps: Tensor, shared: Shared) -> Tensor:
        """Mask logits [K,H,W], float32 at least, from the attention maps [K,heads,h,w] of one image's queries."""
        dtype = maps.dtype
        x = ops.group_norm_relu(self._attention_lay1(maps).add_(shared.lay1), self.gn1)
        x = ops.group_norm_relu(ops.conv2d(x, *ops.weights(self.lay2, dtype), padding=1), self.gn2)
        layers = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (layer, norm), level in zip(layers, shared.levels, strict=True):
            weight, _ = ops.weights(layer, dtype)
            x = ops.upsample_conv(x, weight, self._phases(layer, dtype), (level.shape[2], level.shape[3])).add_(level)
            x = ops.group_norm_relu(x, norm)
        x = ops.conv2d(x, *ops.weights(self.out_lay, dtype), padding=1)
        return x[:, 0].to(torch.promote_types(dtype, torch.float32))

    def batched_queries(self, maps: Tensor, image: Tensor, lay1: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Mask logits [N,H,W], float32 at least, from the attention maps [N,heads,h,w] of the images' queries.

        Each normalisation is fused with what follows: upsampling, and the sum with the image's feature map.

        Args:
            image: int64 [N].
            lay1: `shared_lay1`.
            levels: `adapted`.
        """
        dtype = maps.dtype
        x = ops.group_norm_relu(self._attention_lay1(maps) + lay1[image], self.gn1)
        x = ops.conv2d(x, *ops.weights(self.lay2, dtype), padding=1)
        layers = ((self.gn2, self.lay3), (self.gn3, self.lay4), (self.gn4, self.lay5))
        for (norm, layer), level in zip(layers, levels, strict=True):
            x = ops.group_norm_relu_upsample(x, norm, level, image, (level.shape[2], level.shape[3]))
            x = ops.conv2d(x, *ops.weights(layer, dtype), padding=1)
        x = ops.conv2d(ops.group_norm_relu(x, self.gn5), *ops.weights(self.out_lay, dtype), padding=1)
        return x[:, 0].to(torch.promote_types(dtype, torch.float32))

    def _attention_lay1(self, maps: Tensor) -> Tensor:
        """What the attention maps [N,heads,h,w] add to lay1."""
        weight, _ = ops.weights(self.lay1, maps.dtype)
        return ops.conv2d(ops.image_layout(maps), weight[:, self.context_dim :], None, padding=1)

    def _phases(self, layer: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        return ops.kept(
            layer, "phases", dtype, (layer.weight,), lambda: ops.image_layout(ops.phase_kernels(layer.weight).to(dtype))
        )


def _checked_selection(selected: Any, logits: Tensor) -> Tensor:
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool or selected.shape != logits.shape[:2]:
        given = f"{selected.dtype} {list(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
        raise ValueError(f"select must return bool {list(logits.shape[:2])}, one for each query, got {given}")
    return selected
