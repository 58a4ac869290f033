"""What the benchmarks and the tests measure: models with random weights at real sizes, and their inputs."""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast.config import DetrConfig
from detr_fast.detr.segmentation import build_detr

# (height, width) of a processed image: what most COCO photographs become, the nearest size that doubles at every
# level of the mask head, and the largest
TYPICAL, DOUBLING, LARGEST = (800, 1066), (800, 1088), (800, 1333)
KEPT = 15  # queries of 100 that a photograph keeps


class Scale(NamedTuple):
    """The sizes that all benchmarks are made of; feature maps follow from the image's, rounded up at every stride."""

    image: tuple[int, int] = TYPICAL  # processed
    target: tuple[int, int] = (480, 640)  # the photograph
    batches: tuple[int, int, int] = (1, 8, 32)
    dim: int = 256
    heads: int = 8
    queries: int = 100
    kept: int = KEPT  # an image
    backbone: str = "resnet50"
    width: int = 64
    layers: int = 6  # of the encoder, and of the decoder
    feedforward: int = 2048
    trained: tuple[int, int] = (400, 533)  # the image of a training step
    pictures: int = 16  # that are labelled

    def level(self, stride: int) -> tuple[int, int]:
        height, width = self.image
        return math.ceil(height / stride), math.ceil(width / stride)

    @property
    def tokens(self) -> int:
        return math.prod(self.level(32))

    @property
    def config(self) -> DetrConfig:
        """The panoptic model's."""
        return DetrConfig(
            backbone=self.backbone,
            backbone_width=self.width,
            hidden_dim=self.dim,
            nheads=self.heads,
            enc_layers=self.layers,
            dec_layers=self.layers,
            dim_feedforward=self.feedforward,
            num_queries=self.queries,
            num_classes=250,
            masks=True,
        )


REAL = Scale()
TINY = Scale(
    image=(70, 93),
    target=(31, 44),
    batches=(1, 2, 3),
    dim=128,
    heads=8,
    queries=7,
    kept=3,
    backbone="resnet18",
    width=16,
    layers=1,
    feedforward=128,
    trained=(70, 93),
    pictures=3,
)


def panoptic_model(config: DetrConfig | None = None, seed: int = 0) -> nn.Module:
    """DETR-R50 panoptic, or another size, with random weights and normalisation that keep activations near 1."""
    torch.manual_seed(seed)
    model = build_detr(config or REAL.config).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0.7 if name.endswith("weight") else 0, 0.1)
    return model


def finding_model(config: DetrConfig) -> nn.Module:
    """`panoptic_model` whose queries are sure of different classes at different places."""
    model = panoptic_model(config)
    model.detr.query_embed.weight *= 5
    model.detr.class_embed.weight *= 10
    model.bbox_attention.q_linear.weight *= 5
    model.mask_head.lay1.weight[:, -config.nheads :] *= 10_000  # the attention maps outweigh what all queries share
    return model


def photographs(count: int, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Blurred noise, uint8 [H, W, 3]."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    resample = Image.Resampling.BICUBIC
    pairs = zip(coarse, islice(cycle(sizes), count), strict=True)
    return [np.asarray(Image.fromarray(pixels).resize(size, resample)) for pixels, size in pairs]


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
