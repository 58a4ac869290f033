"""Torch Hub: torch.hub.load("/path/to/this/repository", "detr_resnet50_panoptic", source="local", pretrained=True)."""

dependencies = ["torch", "numpy", "PIL", "safetensors", "huggingface_hub"]

from detr_fast.compat.hub import (  # noqa: E402, F401
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)
