"""Batches in an order that a seed alone decides: not workers, processes, or where a run was interrupted."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from detr_fast.data.coco import AnnotationError, CocoDataset
from detr_fast.data.transforms import Target
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.training.workers import made_ahead


class Draw(NamedTuple):
    """Image number `image` of the data set as augmented in `epoch`."""

    epoch: int
    image: int


class Batch(NamedTuple):
    """Padded images, their targets, and the bad annotations met on the way."""

    samples: NestedTensor
    targets: list[Target]
    problems: list[str]


class Order:
    """The endless sequence of draws: epoch after epoch, each a permutation from (seed, epoch).

    Step s of a training with B images a step takes draws [s B, (s + 1) B); no image is dropped at the end of an epoch.
    """

    def __init__(self, images: int, seed: int):
        self.images = images
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Draw:
        epoch, place = divmod(position, self.images)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        return Draw(epoch, int(self._permutation[place]))


class Portions:
    """The share of one of `world` processes: `accumulate` lists of `batch_size` draws for each step."""

    def __init__(self, order: Order, batch_size: int, accumulate: int, steps: range, rank: int = 0, world: int = 1):
        self.order = order
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.steps = steps
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self.steps:
            for part in range(self.accumulate):
                start = ((step * self.accumulate + part) * self.world + self.rank) * self.batch_size
                yield [self.order[position] for position in range(start, start + self.batch_size)]


class Augmented:
    """A data set indexed by `Draw`; a draw gives the same image and target in every process.

    An item is an image, its target and the faults found on the way. With `bad_annotations="skip"` the next image takes
    the place of an unusable one; with "fail", or when no image is usable, the item is the list of faults alone.
    """

    def __init__(self, dataset: CocoDataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, Target, list[str]] | list[str]:
        problems: list[str] = []
        for offset in range(len(self.dataset)):
            try:
                sample = self.dataset.read((draw.image + offset) % len(self.dataset))
            except AnnotationError as error:
                problems.append(str(error))
            else:
                problems += sample.problems
                with seeded(self.seed, *draw):
                    return *self.dataset.transformed(sample), problems
            if self.dataset.bad_annotations == "fail":
                break
        return problems


def collate(samples: Sequence[Any]) -> Batch:
    """One batch of items of `Augmented`; a batch without a usable image has no targets."""
    problems = [problem for sample in samples for problem in (sample if isinstance(sample, list) else sample[2])]
    usable = [sample for sample in samples if not isinstance(sample, list)]
    if not usable:
        return Batch(NestedTensor(torch.zeros(1, 3, 1, 1)), [], problems)
    return Batch(nested_tensor_from_tensor_list([s[0] for s in usable]), [s[1] for s in usable], problems)


def batches(
    dataset: CocoDataset, portions: Portions, workers: int, pin_memory: bool, stop: Sequence[int] = ()
) -> Generator[Batch, None, None]:
    """The batches of `portions`, made by `workers` processes, or by this one if 0.

    Args:
        stop: the batches end early once this has an item.

    Raises:
        WorkerDied: one of the processes ended by itself.
    """
    make = partial(_make, Augmented(dataset, portions.order.seed))
    finish = partial(_pinned, device=torch.cuda.current_device()) if pin_memory else _as_it_is
    if workers:
        yield from made_ahead(make, portions, workers, finish, stop)
    else:
        yield from (finish(make(draws)) for draws in portions)


def _make(images: Augmented, draws: Sequence[Draw]) -> Batch:
    return collate([images[draw] for draw in draws])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _pinned(batch: Batch, device: int) -> Batch:
    """The batch in memory that the GPU reads by itself."""
    torch.cuda.set_device(device)  # each thread has its own, and memory is pinned for that
    samples = NestedTensor(batch.samples.tensors.pin_memory(), batch.samples.mask)
    targets = [{key: value.pin_memory() for key, value in target.items()} for target in batch.targets]
    return Batch(samples, targets, batch.problems)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """`random` and torch's CPU generator start from `key` within it, and are as before afterwards."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    seed = mixed(*key)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)


def mixed(*key: int) -> int:
    """A seed in [0, 2**63) for a tuple of numbers; neighbours have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
