"""Published sizes against transformers with the same random weights: the numerics contract for whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from detr_fast.compat.accelerate import accelerate


def theirs(name: str, depths: tuple[int, ...], classes: int, dilation: bool) -> Any:
    resnet = transformers.ResNetConfig(depths=list(depths), out_features=[f"stage{i}" for i in range(1, 5)])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=resnet, id2label={i: str(i) for i in range(classes)}
    )
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # activations near 1 through 101 layers, and no two normalisations alike
        for key, buffer in model.named_buffers():
            low = 0.5 if key.endswith(("weight", "running_var")) else -0.1
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * (0.4 if low > 0 else 0.2) + low)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if dilation:  # transformers' own ResNet cannot dilate: what timm does to the last stage for DC5
        (stage,) = (module for key, module in model.named_modules() if key.endswith("encoder.stages.3"))
        for conv in stage.modules():
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                conv.stride = (1, 1)
            elif isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "depths", "classes", "dilation"),
    [
        ("DetrForSegmentation", (3, 4, 6, 3), 250, False),
        ("DetrForSegmentation", (3, 4, 6, 3), 250, True),
        ("DetrForObjectDetection", (3, 4, 23, 3), 91, False),
        ("DetrForObjectDetection", (3, 4, 23, 3), 91, True),
    ],
    ids=["R50 panoptic", "R50-DC5 panoptic", "R101", "R101-DC5"],
)
def test_equals_transformers(name: str, depths: tuple[int, ...], classes: int, dilation: bool) -> None:
    reference = theirs(name, depths, classes, dilation)
    model = accelerate(reference)
    assert model.detr.config.dilation == dilation
    pixel_values = torch.randn(2, 3, 131, 165, generator=torch.Generator().manual_seed(1))
    pixel_mask = torch.ones(2, 131, 165, dtype=torch.long)
    pixel_mask[0, 100:] = pixel_mask[1, :, 130:] = 0
    with torch.inference_mode():
        expected, found = reference(pixel_values, pixel_mask), model(pixel_values, pixel_mask)
    assert (found.logits - expected.logits).abs().max() <= 1e-4
    assert (found.pred_boxes - expected.pred_boxes).abs().max() <= 1e-4
    assert expected.logits.std() > 0.1  # a model whose outputs are all alike would prove nothing
    if classes == 250:
        spread = expected.pred_masks.max() - expected.pred_masks.min()
        assert (found.pred_masks - expected.pred_masks).abs().max() <= 1e-3 * spread
