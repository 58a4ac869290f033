"""DETR: object detection as set prediction (Carion et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.categories import Category
from detr_fast.config import DetrConfig
from detr_fast.detr.backbone import build_backbone
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.detr.transformer import Transformer

Samples = Tensor | Sequence[Tensor] | NestedTensor

COMPUTE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MLP(nn.Module):
    """Linear layers with ReLU between them (facebookresearch/detr, models/detr.py)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers: Any = nn.ModuleList(nn.Linear(n, k) for n, k in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[...,input_dim] to [...,output_dim]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = ops.linear(layer, x).relu_()
        return ops.linear(last, x)


class DETR(nn.Module):
    """The detector. Parameter names are facebookresearch/detr's, so its checkpoints load with strict=True.

    Attributes:
        config: every size.
        aux_loss: also return the predictions of all decoder layers but the last, as "aux_outputs".
        categories: dicts with "id", "name", "isthing" and "color", one a class; None: COCO's.
    """

    categories: list[Category] | None = None

    def __init__(self, config: DetrConfig):
        super().__init__()
        self.config = config
        self.num_queries = config.num_queries
        self.aux_loss = config.aux_loss
        d = config.hidden_dim
        self.transformer = Transformer(
            d, config.nheads, config.enc_layers, config.dec_layers, config.dim_feedforward, config.dropout
        )
        self.class_embed = nn.Linear(d, config.num_classes + 1)
        self.bbox_embed = MLP(d, d, 4, 3)
        self.query_embed = nn.Embedding(config.num_queries, d)
        self.backbone = build_backbone(config)
        self.input_proj = nn.Conv2d(self.backbone.num_channels, d, kernel_size=1)

    def forward(self, samples: Samples, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Detects objects.

        Args:
            samples: images [B,3,H,W], a list of images [3,H_i,W_i], or a NestedTensor; normalised floating point.
            dtype: what convolutions and GEMMs compute in, None for the parameters' dtype. Softmax, normalisations,
                positions, the residual stream and the class and box heads stay float32 at least.

        Returns:
            "pred_logits" [B,Q,num_classes+1], the last class being no-object; "pred_boxes" [B,Q,4], (cx, cy, w, h) in
            [0,1] of the image without its padding; "aux_outputs", a list of such dicts, when `aux_loss` is set.

        Raises:
            TypeError, ValueError: samples of another type, dtype or shape; a `dtype` that is none of COMPUTE_DTYPES.
        """
        return self.predict(self.encode(samples, dtype))

    def encode(self, samples: Samples, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Everything before the heads.

        Returns: "hs" [layers,B,Q,d], "memory" and "src" [B,d,h,w], "features", the backbone's maps [B,C_i,h_i,w_i],
        coarser last, and "mask" bool [B,h,w] or None.
        """
        nested = self._nested(samples, dtype)  # [B,3,H,W]
        features, pos = self.backbone(nested)  # [B,C_i,H/4,W/4] to [B,C,h,w] at stride 32; [B,d,h,w]
        tensors, mask = features[-1].decompose()
        src = ops.conv2d(tensors, *ops.weights(self.input_proj, tensors.dtype))  # [B,d,h,w]
        hs, memory = self.transformer(src, mask, self.query_embed.weight, pos[-1])
        return {"hs": hs, "memory": memory, "src": src, "features": [f.tensors for f in features], "mask": mask}

    def predict(self, encoded: dict[str, Any]) -> dict[str, Any]:
        """Classes and boxes from `encode`'s outcome."""
        hs = encoded["hs"] if self.aux_loss else encoded["hs"][-1:]
        heads = (
            ops.linear(self.class_embed, hs),
            self.bbox_embed(hs).sigmoid(),
        )  # [layers,B,Q,classes+1], [layers,B,Q,4]
        layers = [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in zip(*heads, strict=True)]
        out: dict[str, Any] = layers.pop()
        if self.aux_loss:
            out["aux_outputs"] = layers
        return out

    def _nested(self, samples: Samples, dtype: torch.dtype | None) -> NestedTensor:
        """Checked samples in the dtype to compute in; the mask is None unless a pixel is padding."""
        if isinstance(samples, (list, tuple)):
            nested = nested_tensor_from_tensor_list(samples)
        elif isinstance(samples, Tensor):
            nested = NestedTensor(samples)
        elif hasattr(samples, "tensors") and hasattr(samples, "mask"):  # facebookresearch's own class will do
            nested = NestedTensor(samples.tensors, samples.mask)
        else:
            accepted = "a Tensor [B,3,H,W], a list of Tensors [3,H,W] or a NestedTensor"
            raise TypeError(f"samples must be {accepted}, got {type(samples).__name__}")
        tensors, mask = nested.decompose()
        if tensors.ndim != 4 or tensors.shape[1] != 3 or not tensors.numel() or not tensors.is_floating_point():
            raise ValueError(
                "samples must be normalised images, floating point [B,3,H,W] with no zero size, "
                f"got {tensors.dtype} {list(tensors.shape)}"
            )
        if mask is not None and not torch.compiler.is_compiling() and not mask.any():
            mask = None
        dtype = dtype or self.query_embed.weight.dtype
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, COMPUTE_DTYPES))}, got {dtype}")
        return NestedTensor(tensors.to(dtype), mask)
