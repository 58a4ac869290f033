"""DETR, fast: the same weights and the same numbers as facebookresearch/detr and transformers, in less time."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HUB = (
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_resnet50_panoptic",
    "detr_resnet50_dc5_panoptic",
    "detr_resnet101_panoptic",
)
_POSTPROCESS = ("PostProcess", "PostProcessSegm", "PostProcessPanoptic", "rgb_to_id", "id_to_rgb")

# Each public name and the module it lives in; imported when first used, so that `import detr_fast` is quick.
_HOME = {
    "DetrConfig": "config",
    "build_detr": "detr.segmentation",
    "DETR": "detr.detector",
    "DETRsegm": "detr.segmentation",
    "NestedTensor": "detr.nested",
    "nested_tensor_from_tensor_list": "detr.nested",
    "CheckpointError": "checkpoint",
    "read_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "accelerate": "compat.accelerate",
    "DetrForObjectDetection": "compat.transformers",
    "DetrForSegmentation": "compat.transformers",
    "DetrImageProcessor": "compat.image_processor",
    "DetrFeatureExtractor": "compat.image_processor",
    "HungarianMatcher": "training.matcher",
    "SetCriterion": "training.criterion",
    "Predictor": "predictor",
    "label": "labeling.pipeline",
    "PanopticResult": "predictor",
    "evaluate": "evaluation.evaluate",
    "explain": "explanation",
    "Explanation": "explanation",
    "decoder_attention": "detr.attention",
    "encoder_attention": "detr.attention",
    **{name: "compat.hub" for name in _HUB},
    **{name: "postprocess" for name in _POSTPROCESS},
}
_MODULES = ("data", "evaluation", "labeling", "ops", "position", "reference", "training", "visualize")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"detr_fast.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"detr_fast.{name}")
    else:
        raise AttributeError(f"module 'detr_fast' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
