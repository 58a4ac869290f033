"""A DETR small enough for tests, with random weights that find things."""

from __future__ import annotations

import torch

from detr_fast.categories import COCO_PANOPTIC
from detr_fast.config import DetrConfig
from detr_fast.detr.segmentation import build_detr

CONFIG = DetrConfig(
    backbone="resnet18",
    backbone_width=16,
    hidden_dim=128,
    nheads=8,
    enc_layers=1,
    dec_layers=1,
    dim_feedforward=128,
    num_queries=12,
    num_classes=250,
    masks=True,
)


def tiny_detr(seed: int = 1, **changes: object) -> torch.nn.Module:
    """Random weights, larger than those a training starts from: its queries look at different places and are sure of
    different classes, all of them classes that COCO has.
    """
    torch.manual_seed(seed)
    config = CONFIG.replace(**changes)
    model = build_detr(config).eval()
    detr = model.detr if config.masks else model
    unnamed = sorted(set(range(config.num_classes)) - {category["id"] for category in COCO_PANOPTIC})
    with torch.no_grad():
        detr.query_embed.weight *= 5
        for layer in detr.transformer.decoder.layers:
            layer.self_attn.in_proj_weight *= 3
            layer.multihead_attn.in_proj_weight *= 3
        if config.masks:
            # masks that differ by more than rounding: the attention maps outweigh what all queries share
            model.bbox_attention.q_linear.weight *= 5
            model.mask_head.lay1.weight[:, -config.nheads :] *= 10_000
            for adapter in (model.mask_head.adapter1, model.mask_head.adapter2, model.mask_head.adapter3):
                adapter.weight *= 0.1
        detr.class_embed.weight *= 10
        detr.class_embed.bias[unnamed] = -1000
    model.categories = None
    return model
