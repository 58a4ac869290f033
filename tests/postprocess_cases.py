"""Seeded model outputs for the tests of post-processing, and for the scripts that recorded what upstream made of them.

Made by NumPy's RandomState, whose numbers never change, and by float64 arithmetic, so that every machine has the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_OBJECT = 250
THINGS = frozenset(range(91))


def is_thing(label: int) -> bool:
    return label in THINGS


@dataclass
class Case:
    logits: Tensor  # [B,Q,251]
    boxes: Tensor  # [B,Q,4]
    masks: Tensor  # [B,Q,h,w]
    padded_size: tuple[int, int]
    processed_sizes: list[tuple[int, int]]
    target_sizes: list[tuple[int, int]]

    @property
    def facebookresearch(self) -> dict[str, Tensor]:
        return {"pred_logits": self.logits.clone(), "pred_boxes": self.boxes.clone(), "pred_masks": self.masks.clone()}

    @property
    def transformers(self) -> Any:
        return SimpleNamespace(logits=self.logits.clone(), pred_boxes=self.boxes.clone(), pred_masks=self.masks.clone())

    def kept(self, image: int, threshold: float = 0.85) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [K,h,w], scores [K], labels [K] of one image's objects."""
        scores, labels = self.logits[image].softmax(-1).max(-1)
        keep = (labels != NO_OBJECT) & (scores > threshold)
        return self.masks[image][keep], scores[keep], labels[keep]


def smooth(random: np.random.RandomState, count: int, height: int, width: int, knots: int = 5) -> np.ndarray:
    """Low-resolution noise, resized linearly, as the mask logits of a trained model look: float32 [count,h,w]."""
    noise = random.randn(count, knots, knots)
    y, x = (np.linspace(0, knots - 1.001, size) for size in (height, width))
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None], (x - left)[None, :]
    rows = noise[:, top] * (1 - down) + noise[:, top + 1] * down
    return (5 * (rows[:, :, left] * (1 - right) + rows[:, :, left + 1] * right)).astype(np.float32)


def make(
    seed: int, labels: list[list[int]], targets: list[tuple[int, int]], noise: bool = False, bias: float = 0.0
) -> Case:
    """One image for each list of labels, one query for each label: -1 is no object, and every third is unsure.

    `noise` has no neighbouring pixels alike; `bias` is how much some queries win everywhere.
    """
    random = np.random.RandomState(seed)
    height, width = random.randint(12, 26, 2)
    images = []
    for row in labels:
        count = len(row)
        logits = random.randn(count, NO_OBJECT + 1).astype(np.float32)
        strength = np.where(np.arange(count) % 3 == 1, 7.0, 12.0) + 3 * random.rand(count)  # every third is unsure
        logits[np.arange(count), [label if label >= 0 else NO_OBJECT for label in row]] += strength
        masks = random.randn(count, height, width) if noise else smooth(random, count, height, width)
        masks = (masks + bias * random.randn(count, 1, 1)).astype(np.float32)
        boxes = (0.1 + 0.8 * random.rand(count, 4)).astype(np.float32)
        images.append([torch.from_numpy(array) for array in (logits, boxes, masks)])
    logits, boxes, masks = (torch.stack(parts) for parts in zip(*images, strict=True))
    padded = (4 * int(height) - 1, 4 * int(width) - 2)
    processed = [padded, (padded[0] - 17, padded[1] - 9)][: len(labels)]
    return Case(logits, boxes, masks, padded, processed, targets)


CASES = {
    # several queries of one stuff class (upstream's merge is undone), things of one class, two sizes in one batch
    "stuff": make(
        0, [[1, 120, 120, 7, 8, 120, 1, -1, 93, 93], [120, 3, 120, 93, 2, 120, 93, 93, 5, 1]], [(37, 53), (41, 29)]
    ),
    "up": make(1, [[100, 2, 100, 4, 9, 101], [100, 2, 2, 101, 9, 101]], [(97, 140), (111, 75)]),
    # offsets so that many queries win a few pixels or none
    "tiny": make(2, [[1, 120, 2, 120, 9, 3, 4, 93, 5, 120, 6, 93]], [(23, 31)], bias=4.0),
    "noise": make(3, [[1, 120, 2, 120, 9, 93, 93]], [(40, 61)], noise=True),
    "single": make(4, [[17]], [(33, 21)]),
    "nothing": make(5, [[-1, -1, -1], [-1, 200, -1]], [(20, 30), (31, 18)]),
    # every segment has at most 4 pixels in the end
    "vanish": make(6, [[1, 2, 150, 3]], [(2, 3)]),
    "line": make(7, [[1, 150, 2, 150, 8, 3]], [(1, 90)]),
}
