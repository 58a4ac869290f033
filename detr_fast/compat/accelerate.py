"""From a DETR of either upstream implementation that is already loaded to the fast one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from detr_fast.checkpoint import build_model, interpret
from detr_fast.compat.transformers import DetrForObjectDetection, DetrForSegmentation, DetrPreTrainedModel
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm

_WRAPPERS: dict[str, type[DetrPreTrainedModel]] = {
    "DetrForObjectDetection": DetrForObjectDetection,
    "DetrForSegmentation": DetrForSegmentation,
}
_PARTS = ("transformer", "class_embed", "bbox_embed", "query_embed", "input_proj", "backbone")


def accelerate(model: nn.Module) -> DETR | DETRsegm | DetrPreTrainedModel:
    """The fast model of a live one: same outputs, device, dtype, mode and aux_loss, and a copy of the weights.

    Args:
        model: transformers' DetrForObjectDetection or DetrForSegmentation (4 or 5), which gives detr_fast's classes of
            these names; facebookresearch/detr's DETR or DETRsegm, which gives detr_fast's; one of detr_fast's, which is
            returned as it is.

    Raises:
        TypeError: any other object.
        ValueError: such a model that computes another function, pre-norm for example, or has NaN weights.
    """
    if isinstance(model, (DETR, DETRsegm, DetrPreTrainedModel)):
        return model
    for base in type(model).__mro__:
        if base.__module__.startswith("transformers.models.detr.") and base.__name__ in _WRAPPERS:
            settings: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
            return _WRAPPERS[base.__name__](_copy(model, settings)).train(model.training)
    detector = model.detr if type(model).__name__ == "DETRsegm" and hasattr(model, "detr") else model
    if type(detector).__name__ == "DETR" and all(hasattr(detector, part) for part in _PARTS):
        return _copy(model, {"args": _facebookresearch_args(detector)})
    raise TypeError(
        "model must be a DetrForObjectDetection or DetrForSegmentation of transformers, or a DETR or DETRsegm of "
        f"facebookresearch/detr, got {type(model).__module__}.{type(model).__name__}"
    )


def _copy(model: nn.Module, settings: dict[str, Any]) -> DETR | DETRsegm:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    checkpoint = interpret(state, settings, source=type(model).__name__)
    backbone = next(module for name, module in model.named_modules() if name.endswith("backbone"))
    dilation = any(max(m.dilation) > 1 for m in backbone.modules() if isinstance(m, nn.Conv2d))
    checkpoint = dataclasses.replace(checkpoint, config=checkpoint.config.replace(dilation=dilation))
    parameter = next(model.parameters())
    return build_model(checkpoint, dtype=parameter.dtype, device=parameter.device).train(model.training)


def _facebookresearch_args(detr: Any) -> dict[str, Any]:
    """The settings of a live model under the names of facebookresearch/detr's command line."""
    transformer, position = detr.transformer, detr.backbone[1]
    layer = transformer.decoder.layers[0]
    sine = type(position).__name__ == "PositionEmbeddingSine" and position.normalize and position.temperature == 10000
    if not sine or abs(position.scale - 2 * torch.pi) > 1e-6:
        raise ValueError(f"model must have normalised sine positions, got {type(position).__name__}")
    if layer.normalize_before:
        raise ValueError("model must normalise after each block, got normalize_before=True")
    if layer.activation is not F.relu:
        raise ValueError(f"model must have ReLU activations, got {layer.activation}")
    return {"nheads": transformer.nhead, "dropout": layer.dropout.p, "aux_loss": bool(detr.aux_loss)}
