"""What the benchmarks and the tests measure: models with random weights at real sizes, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_fast.config import DetrConfig
from detr_fast.detr import build_detr

# (height, width) of a processed image: what most COCO photographs become, the nearest size that doubles at every
# level of the mask head, and the largest
TYPICAL, DOUBLING, LARGEST = (800, 1066), (800, 1088), (800, 1333)
KEPT = 15  # queries of 100 that a photograph keeps


def panoptic_model(config: DetrConfig | None = None, seed: int = 0) -> nn.Module:
    """DETR-R50 panoptic, or another size, with random weights and normalisation that keep activations near 1."""
    torch.manual_seed(seed)
    model = build_detr(config or DetrConfig(num_classes=250, masks=True)).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0.7 if name.endswith("weight") else 0, 0.1)
    return model


def images(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Noise with the spread of normalised photographs, [batch,3,*size]."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def keep(count: int):
    """A `select` that keeps `count` queries, spread over all of them, whatever the logits are."""

    def select(logits: Tensor) -> Tensor:
        queries = logits.shape[1]
        kept = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        kept[:, torch.arange(count) * queries // count] = True
        return kept

    return select
