"""Values computed from weights, kept until a weight changes: folded convolutions, projected positions, cast weights."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detr_fast.ops.policy import is_plain

T = TypeVar("T")

# Of what depends on an input's shape, the last few shapes are kept: 18 MB each for a ResNet-50 DETR at 800 x 1333.
CAPACITY = 4

_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, OrderedDict[Hashable, tuple[Any, Any]]]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()  # of `_kept`: any number of threads may use one model
_holder: ContextVar[list[Any] | None] = ContextVar("_holder", default=None)


@contextmanager
def holding() -> Iterator[list[Any]]:
    """Collects what `kept` returns within it. A CUDA graph reads those tensors for as long as it is replayed, while
    here they are dropped once `CAPACITY` others came."""
    values: list[Any] = []
    token = _holder.set(values)
    try:
        yield values
    finally:
        _holder.reset(token)


def kept(owner: nn.Module, name: str, key: Hashable, sources: Sequence[Tensor], build: Callable[[], T]) -> T:
    """The value of `build`, computed anew only when one of `sources` has changed since the last call.

    Values live as long as `owner` does and are no part of its state: copies and pickles of it start empty. While
    gradients flow to a source, under torch.compile and torch.export, and where the rewrite "cache" is off, `build` runs
    each time.

    Args:
        owner: the module that the value belongs to.
        name: what the value is; the `CAPACITY` most recently used keys of each name are kept.
        key: everything besides `sources` that `build` depends on.
        sources: the tensors that `build` reads.
    """
    if is_plain("cache") or torch.compiler.is_compiling():
        return build()
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return build()
    fingerprint = [_fingerprint(source) for source in sources]
    with _lock:
        entry = _kept.setdefault(owner, {}).setdefault(name, OrderedDict()).get(key)
    if entry is None or entry[0] != fingerprint:
        # a value built in inference mode could not be used by autograd later
        with torch.inference_mode(False), torch.no_grad():
            entry = (fingerprint, build())
    with _lock:
        entries = _kept[owner][name]
        entries[key] = entry
        entries.move_to_end(key)
        while len(entries) > CAPACITY:
            entries.popitem(last=False)
    if (holder := _holder.get()) is not None:
        holder.append(entry[1])
    return entry[1]


def _fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    """Changes with the tensor's storage, its version counter and, on a CPU, its content.

    The content is summed because writes through `.data`, common in moving averages of weights, do not count in the
    version. The sum reads 25 GB/s here, under 1 % of a forward; on a GPU it would force a synchronisation.
    """
    version = -1 if tensor.is_inference() else tensor._version
    content = 0
    if tensor.device.type == "cpu":
        bits = tensor.detach()
        if bits.is_floating_point():
            bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        content = int(bits.sum(dtype=torch.int32 if bits.element_size() <= 4 else torch.int64))
    return tensor.data_ptr(), version, content
