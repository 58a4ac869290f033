"""Which images share a batch. Only those of one size do: padding changes what a DETR computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches_of_one_size(
    images: Iterable[T], size: Callable[[T], Hashable], batch_size: int, patience: float = math.inf
) -> Iterator[list[T]]:
    """Groups images whose size, as the model sees them, is the same.

    Which images share a batch depends on their order alone, not on the time that their reading takes.

    Args:
        size: gives an image's size.
        batch_size: the most images of a batch.
        patience: an image whose batch is not full waits for so many further images at most.
    """
    held: dict[Hashable, tuple[int, list[T]]] = {}  # by size, with the first one's number; the oldest first
    for number, image in enumerate(images):
        key = size(image)
        _, batch = held.setdefault(key, (number, []))
        batch.append(image)
        if len(batch) == batch_size:
            del held[key]
            yield batch
        for oldest, (first, waiting) in list(held.items())[:1]:
            if number - first >= patience:
                del held[oldest]
                yield waiting
    for _, batch in held.values():
        yield batch
