"""facebookresearch/detr's Torch Hub entry points, with its signatures."""

from __future__ import annotations

from typing import Any

from detr_fast.checkpoint import build_model, read_checkpoint
from detr_fast.config import PRESETS
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm, build_detr
from detr_fast.postprocess import PostProcess, PostProcessPanoptic


def detr_resnet50(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> Any:
    """DETR with a ResNet-50: 42.0 box AP on COCO val5k as published.

    Args:
        pretrained: load the official weights, from Torch Hub's cache or the network; needs the default num_classes.
        num_classes: without the no-object class.
        return_postprocessor: return (model, postprocessor) instead of the model.

    Returns: the model, in training mode as upstream returns it.

    Raises:
        CheckpointError: no network, a damaged download, or another number of classes than the weights have.
    """
    return _detection("detr_resnet50", num_classes, pretrained, return_postprocessor)


def detr_resnet50_dc5(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> Any:
    """DETR-DC5 with a ResNet-50, its last stage dilated: 43.3 box AP. See `detr_resnet50`."""
    return _detection("detr_resnet50_dc5", num_classes, pretrained, return_postprocessor)


def detr_resnet101(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> Any:
    """DETR with a ResNet-101: 43.5 box AP. See `detr_resnet50`."""
    return _detection("detr_resnet101", num_classes, pretrained, return_postprocessor)


def detr_resnet101_dc5(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> Any:
    """DETR-DC5 with a ResNet-101: 44.9 box AP. See `detr_resnet50`."""
    return _detection("detr_resnet101_dc5", num_classes, pretrained, return_postprocessor)


def detr_resnet50_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> Any:
    """Panoptic DETR with a ResNet-50: 43.4 PQ on COCO val5k as published.

    Args:
        threshold: of the postprocessor, the score below which a query is dropped.
        pretrained, num_classes, return_postprocessor: as for `detr_resnet50`.
    """
    return _panoptic("detr_resnet50_panoptic", num_classes, pretrained, threshold, return_postprocessor)


def detr_resnet50_dc5_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> Any:
    """Panoptic DETR-DC5 with a ResNet-50: 44.6 PQ. See `detr_resnet50_panoptic`."""
    return _panoptic("detr_resnet50_dc5_panoptic", num_classes, pretrained, threshold, return_postprocessor)


def detr_resnet101_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> Any:
    """Panoptic DETR with a ResNet-101: 45.1 PQ. See `detr_resnet50_panoptic`."""
    return _panoptic("detr_resnet101_panoptic", num_classes, pretrained, threshold, return_postprocessor)


def _model(name: str, num_classes: int, pretrained: bool) -> DETR | DETRsegm:
    config = PRESETS[name].replace(num_classes=num_classes)
    if pretrained:
        return build_model(read_checkpoint(name), **config.to_dict()).train()
    return build_detr(config)


def _detection(name: str, num_classes: int, pretrained: bool, return_postprocessor: bool) -> Any:
    model = _model(name, num_classes, pretrained)
    return (model, PostProcess()) if return_postprocessor else model


def _panoptic(name: str, num_classes: int, pretrained: bool, threshold: float, return_postprocessor: bool) -> Any:
    model = _model(name, num_classes, pretrained)
    # COCO's things are the classes up to 90; upstream's map of 250 entries lacks those above where there are more
    is_thing_map = {index: index <= 90 for index in range(num_classes)}
    return (model, PostProcessPanoptic(is_thing_map, threshold=threshold)) if return_postprocessor else model
