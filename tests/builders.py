"""Small DETRs with random weights, ours and transformers', for tests that compare them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from detr_fast.config import DetrConfig
from detr_fast.detr.segmentation import build_detr

SIZES = {"hidden_dim": 64, "nheads": 16, "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 96, "num_queries": 7}
CONFIG = DetrConfig(backbone_width=8, num_classes=11, masks=True, dropout=0.2, **SIZES)


def randomised(model: Any) -> Any:
    """Every parameter and buffer away from its initial value, so that none can be lost or swapped unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if "running_var" in name else tensor + 0.3 * (noise - 0.5))
    return model.eval()


def ours(**changes: Any) -> Any:
    model = randomised(build_detr(CONFIG.replace(**changes)))
    model.categories = None
    return model


def theirs(name: str = "DetrForSegmentation", **changes: Any) -> Any:
    resnet = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 64, 128, 256],
        depths=[3, 4, 6, 3],
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    sizes = {f"{coder}_{key}": value for coder in ("encoder", "decoder")
             for key, value in (("layers", 2), ("ffn_dim", 96), ("attention_heads", 16))}  # fmt: skip
    values = {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet, "d_model": 64, "num_queries": 7}
    config = transformers.DetrConfig(
        **values | sizes | {"id2label": {i: f"LABEL_{i}" for i in range(11)}, "dropout": 0.2} | changes
    )
    return randomised(getattr(transformers, name)(config))
