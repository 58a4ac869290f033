"""CUDA graphs of the panoptic model, for a device that computes faster than Python can launch.

Two graphs a shape: everything up to the heads; and the mask head, for a number of queries that is known only once the
heads have run, and that is therefore rounded up to a bucket. Padding repeats query 0 and is cut off again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast import ops
from detr_fast.detr.segmentation import DETRsegm, Select

BUCKETS = (8, 16, 32, 64)  # kept queries an image, on the average of a batch; beyond the last, all queries
SHAPES = 4  # whose graphs are kept: about 1 GB each for 8 images of 800 x 1066 in float16


class Recording(NamedTuple):
    """A computation on fixed memory: `replay` runs it again, and writes `outputs` anew."""

    replay: Callable[[], Any]
    outputs: Any
    held: list[Any]  # kept values (`ops.kept`) that it reads


class Recorder:
    """Makes CUDA graphs. They share one pool of memory, which is safe as they are replayed in one stream, one after
    the other, and as every tensor that one of them leaves for another is held by its `Recording`."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Any]) -> Recording:
        """Of `call`, which reads and writes the same memory each time and never waits for the device."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # what is compiled or kept must be there before it is recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with ops.holding() as held, torch.cuda.graph(graph, pool=self.pool):
            outputs = call()
        return Recording(graph.replay, outputs, held)


def bucket(count: int, batch: int, queries: int) -> int:
    """The number of queries that `count` kept ones of `batch` images are padded to, at most all `queries` of each."""
    a_image = -(-count // batch)
    return batch * next((size for size in BUCKETS if a_image <= size < queries), queries)


class ShapeGraphs:
    """The graphs for batches of one shape."""

    def __init__(
        self,
        model: DETRsegm,
        select: Select,
        samples: Tensor,
        record: Callable[..., Recording],
        dtype: torch.dtype | None,
    ):
        self.model, self.record, self.dtype = model, record, dtype
        self.samples = samples.clone(memory_format=torch.preserve_format)
        self.heads = record(lambda: self._heads(select))
        self.masks: dict[int, tuple[Tensor, Recording]] = {}

    def _heads(self, select: Select) -> tuple[dict[str, Any], dict[str, Any]]:
        encoded = self.model.encode(self.samples, self.dtype)
        out = self.model.detr.predict(encoded)
        out["selected"] = select(out["pred_logits"])
        return encoded, out

    def __call__(self, samples: Tensor) -> dict[str, Any]:
        self.samples.copy_(samples, non_blocking=True)
        self.heads.replay()
        encoded, out = self.heads.outputs
        selected = out["selected"].cpu()  # the one wait for the device in a batch
        kept = selected.flatten().nonzero()[:, 0]
        counts = selected.sum(1).tolist()
        index, masks = self._masks(kept, encoded)
        return {**out, "index": index, "pred_masks": list(masks.split(counts))}

    def _masks(self, kept: Tensor, encoded: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`kept`, int64 [N], on the device, and the mask logits [N,h,w] of those queries."""
        if len(kept) == 0:
            nothing = encoded["src"].new_empty((0, 1, 1), dtype=torch.float32)
            return kept.to(nothing.device), nothing
        hs = encoded["hs"][-1]
        batch, queries, _ = hs.shape
        size = bucket(len(kept), batch, queries)
        padded = torch.zeros(size, dtype=torch.int64)
        padded[: len(kept)] = kept
        if size not in self.masks:
            index = padded.to(hs.device)
            call = lambda: self.model.masks(hs.flatten(0, 1)[index], index // queries, encoded)  # noqa: E731
            self.masks[size] = index, self.record(call)
        index, recording = self.masks[size]
        index.copy_(padded, non_blocking=True)
        recording.replay()
        return index[: len(kept)], recording.outputs[: len(kept)]


class Graphs:
    """`model(samples, select)` through CUDA graphs: the same outputs, overwritten by the next call on the same shape,
    and "index", int64 [N]: the selected queries, counted through the batch.

    A shape is recorded when it comes a second time, and dropped when `SHAPES` others came since, or when the model's
    weights change.

    Args:
        select: as `DETRsegm.forward` takes it; must not wait for the device.
        record: a `Recorder`; tests give one that needs no CUDA.
        dtype: as for `DETRsegm.forward`.
    """

    def __init__(
        self,
        model: DETRsegm,
        select: Select,
        record: Callable[..., Recording],
        dtype: torch.dtype | None = None,
    ):
        self.model, self.select, self.record, self.dtype = model, select, record, dtype
        self._shapes: OrderedDict[torch.Size, ShapeGraphs | None] = OrderedDict()
        self._weights: list[tuple[int, int]] = []

    def __call__(self, samples: Tensor) -> dict[str, Any]:
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in tensors]
        if weights != self._weights:
            self._shapes.clear()
            self._weights = weights
        key = samples.shape
        if key not in self._shapes:
            self._shapes[key] = None
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
            out = self.model(samples, self.select, self.dtype)
            return {**out, "index": out["selected"].flatten().nonzero()[:, 0]}
        shape = self._shapes[key]
        if shape is None:
            shape = self._shapes[key] = ShapeGraphs(self.model, self.select, samples, self.record, self.dtype)
        self._shapes.move_to_end(key)
        return shape(samples)
