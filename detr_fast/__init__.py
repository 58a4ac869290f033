"""DETR, fast: the same weights and the same numbers as facebookresearch/detr and transformers, in less time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The lazy names below, for type checkers, which cannot follow `__getattr__`; a test holds that the two agree.
if TYPE_CHECKING:
    from detr_fast import data as data
    from detr_fast import evaluation as evaluation
    from detr_fast import labeling as labeling
    from detr_fast import ops as ops
    from detr_fast import position as position
    from detr_fast import reference as reference
    from detr_fast import training as training
    from detr_fast import visualize as visualize
    from detr_fast.checkpoint import CheckpointError as CheckpointError
    from detr_fast.checkpoint import load_model as load_model
    from detr_fast.checkpoint import read_checkpoint as read_checkpoint
    from detr_fast.checkpoint import save_model as save_model
    from detr_fast.compat.accelerate import accelerate as accelerate
    from detr_fast.compat.hub import detr_resnet50 as detr_resnet50
    from detr_fast.compat.hub import detr_resnet50_dc5 as detr_resnet50_dc5
    from detr_fast.compat.hub import detr_resnet50_dc5_panoptic as detr_resnet50_dc5_panoptic
    from detr_fast.compat.hub import detr_resnet50_panoptic as detr_resnet50_panoptic
    from detr_fast.compat.hub import detr_resnet101 as detr_resnet101
    from detr_fast.compat.hub import detr_resnet101_dc5 as detr_resnet101_dc5
    from detr_fast.compat.hub import detr_resnet101_panoptic as detr_resnet101_panoptic
    from detr_fast.compat.image_processor import DetrFeatureExtractor as DetrFeatureExtractor
    from detr_fast.compat.image_processor import DetrImageProcessor as DetrImageProcessor
    from detr_fast.compat.transformers import DetrForObjectDetection as DetrForObjectDetection
    from detr_fast.compat.transformers import DetrForSegmentation as DetrForSegmentation
    from detr_fast.config import DetrConfig as DetrConfig
    from detr_fast.detr.attention import decoder_attention as decoder_attention
    from detr_fast.detr.attention import encoder_attention as encoder_attention
    from detr_fast.detr.detector import DETR as DETR
    from detr_fast.detr.nested import NestedTensor as NestedTensor
    from detr_fast.detr.nested import nested_tensor_from_tensor_list as nested_tensor_from_tensor_list
    from detr_fast.detr.segmentation import DETRsegm as DETRsegm
    from detr_fast.detr.segmentation import build_detr as build_detr
    from detr_fast.evaluation.evaluate import evaluate as evaluate
    from detr_fast.explanation import Explanation as Explanation
    from detr_fast.explanation import explain as explain
    from detr_fast.labeling.pipeline import label as label
    from detr_fast.postprocess import PostProcess as PostProcess
    from detr_fast.postprocess import PostProcessPanoptic as PostProcessPanoptic
    from detr_fast.postprocess import PostProcessSegm as PostProcessSegm
    from detr_fast.postprocess import id_to_rgb as id_to_rgb
    from detr_fast.postprocess import rgb_to_id as rgb_to_id
    from detr_fast.predictor import PanopticResult as PanopticResult
    from detr_fast.predictor import Predictor as Predictor
    from detr_fast.training.criterion import SetCriterion as SetCriterion
    from detr_fast.training.matcher import HungarianMatcher as HungarianMatcher

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


if not TYPE_CHECKING:

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
