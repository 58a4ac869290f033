"""Labeling on Ray Data, which takes the stages to all machines of a cluster.

    names -> decode and resize -> batches of one size, model, merge -> encode, write, sync -> manifest
             (tasks)              (actors)                             (tasks)                (this process)

Every machine reads the folder of images and writes the output folder under the same paths. Arrow tables go from stage
to stage, with one row an image: its name and the last stage's value, pickled. Ray holds a bounded number of tables in
its object store. Tasks do not import torch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import cache, cached_property, partial, wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from detr_fast import ops
from detr_fast.images import Pixels, batches_of_one_size
from detr_fast.labeling import stages
from detr_fast.labeling.interrupt import Interrupted
from detr_fast.labeling.ray_session import connected, plain_errors, quiet
from detr_fast.labeling.stages import Found, Reading, Slot, Writing
from detr_fast.labeling.workers import SharedMemory, WorkerDied, WorkerPool, portable

if TYPE_CHECKING:
    from detr_fast.labeling.local import Job

# The CPUs of an actor without a GPU: more than 0, for machines that have no CPU to give, and less than 1, as reading
# takes, or Ray Data would let the actor read, too.
MODEL_CPUS = 0.5
WINDOW_BATCHES = 4  # an actor is given so many batches of images at once, of which images of one size share a batch


class ClusterEngine:
    """Takes images from the disk through the model and back to it, on all machines of a Ray cluster.

    The model runs in an actor for each GPU of the cluster if the predictor's device is one, otherwise in one for each
    machine.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failed = 0

    def run(self, files: Sequence[str], hopeless: dict[str, str]) -> None:
        """Labels images and records them all in the manifest.

        Args:
            hopeless: the images that are known to fail, with the reason.

        Raises:
            RuntimeError: Ray cannot be started or reached, its cluster lacks what the model needs, or it gives up.
        """
        self._record((file, _Failure(hopeless[file])) for file in files if file in hopeless)
        files = [file for file in files if file not in hopeless]
        if not files:
            return
        with (
            suppress(Interrupted),
            quiet(),
            connected(self._job.interrupt),
            plain_errors(),
            closing(self._results(files)) as tables,  # before Ray ends, which closing them would start anew
        ):
            missing = len(files)
            while missing and self._job.interrupt.number is None:
                with self._job.interrupt.computing(grace=0.01):
                    table = next(tables, None)
                if table is None:  # a DataContext of the caller's may let Ray drop what its workers die over
                    raise RuntimeError(f"Ray gave no result for {missing} of {len(files)} images")
                missing -= self._record(_rows(table))

    def _results(self, files: Sequence[str]) -> Generator[pa.Table, None, None]:
        """Rows of (file, record for the manifest, or the exception of a stage)."""
        from detr_fast.labeling.model import slot_bytes

        on_gpu = ops.is_gpu(self._job.predictor.device)
        window = WINDOW_BATCHES * self._job.predictor.batch_size
        place = slot_bytes(self._job.predictor)
        names = [_table((file, None) for file in files[k : k + window]) for k in range(0, len(files), window)]
        dataset = (
            ray.data.from_arrow(names)
            .map_batches(
                partial(_decode, self._job.images, self._job.reading, place), batch_size=None, batch_format="pyarrow"
            )
            .map_batches(
                _Model,
                batch_size=window,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=_actors(on_gpu)),
                fn_constructor_kwargs=self._model(window, place),
                num_cpus=0 if on_gpu else MODEL_CPUS,
                num_gpus=1 if on_gpu else None,
            )
            .map_batches(partial(_write, self._job.writing, place), batch_size=None, batch_format="pyarrow")
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")

    def _model(self, window: int, slot_bytes: int) -> dict[str, Any]:
        """The arguments of `_Model`."""
        import torch

        from detr_fast.labeling.model import options_of

        copy = io.BytesIO()
        torch.save(self._job.predictor.model, copy)
        return {
            "model": ray.put(copy.getvalue()),
            "slots": window,
            "slot_bytes": slot_bytes,
            "device": self._job.predictor.device.type,
            "options": options_of(self._job.predictor),
            "threads": torch.get_num_threads(),  # of the local engine: the last bits of a score may depend on them
        }

    def _record(self, rows: Iterable[tuple[str, Any]]) -> int:
        """Adds images to the manifest whose files are safe on the disk, and counts them. Raises a stage's exception."""
        lines: list[tuple[str, dict[str, Any]]] = []
        for file, value in rows:
            if isinstance(value, _Failure):
                self._failed += 1
                lines.append((file, {"error": str(value)}))
            elif isinstance(value, Exception):
                raise value
            else:
                lines.append((file, value))
        self._job.manifest.append(lines)
        self._job.bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._job.bar.update(len(lines))
        return len(lines)


def _actors(on_gpu: bool) -> int:
    """How many run the model.

    Raises:
        RuntimeError: the cluster lacks what they need.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node.get("CPU", 0) for node in nodes]
    count = sum(int(node.get("GPU", 0)) for node in nodes) if on_gpu else sum(cpu >= 1 for cpu in cpus)
    if not count:
        raise RuntimeError(f"the Ray cluster has no {'GPU' if on_gpu else 'CPU'} to run the model on")
    if max(cpus) < (1 if on_gpu else 2):
        raise RuntimeError(f"no machine of the Ray cluster has a CPU left to read and write images, of {max(cpus):g}")
    return count


# ---- the stages ----


class _Failure(Exception):
    """Why an image could not be labelled."""


def _table(rows: Iterable[tuple[str, Any]]) -> pa.Table:
    # the name is pickled, too: not every name is Unicode, as Arrow's strings are
    return pa.table({"row": pa.array([pickle.dumps(row, protocol=5) for row in rows], pa.large_binary())})


def _rows(table: pa.Table) -> Iterator[tuple[str, Any]]:
    for row in table["row"]:
        yield pickle.loads(row.as_buffer())


def _stage(function: Callable[..., Iterator[pa.Table]]) -> Callable[..., Iterator[pa.Table]]:
    """Sends a stage's exception on in the place of its images, to be raised where the run is recorded: Ray Data would
    change it, print it, and start an actor anew."""

    @wraps(function)
    def stage(*args: Any) -> Iterator[pa.Table]:
        try:
            yield from function(*args)
        except Exception as error:
            yield _table((file, portable(error)) for file, _ in _rows(args[-1]))

    return stage


@_stage
def _decode(images: Path, reading: Reading, slot_bytes: int, names: pa.Table) -> Iterator[pa.Table]:
    """Rows of (file, Pixels)."""
    worker = _worker(slot_bytes)
    for file, _ in _rows(names):
        yield _table([(file, worker.decode(images / file, reading))])


class _Model:
    """The model of a `Predictor`, for rows of (file, (ids, segments_info)).

    It runs in a process beside the Ray worker that this is, as Ray would start a killed one anew, and repeat its task,
    for ever. The images of a call that kills the process twice are tried again one by one, so that only the image fails
    that kills it.

    Args:
        model: the model as torch saved it, in Ray's object store.
        slots, slot_bytes: memory for the images that are given at once.
        device, options, threads: as `model.model_process` has them.
    """

    def __init__(
        self,
        model: ray.ObjectRef[bytes],
        slots: int,
        slot_bytes: int,
        device: str,
        options: dict[str, Any],
        threads: int,
    ) -> None:
        self._model = model
        self._memory = SharedMemory(slots, slot_bytes)
        self._arguments = (device, options, threads)
        self._batch_size = options["batch_size"]
        self._stack = ExitStack()  # which ends with this process

    @cached_property
    def _process(self) -> WorkerPool:
        """Started when a stage needs it, so that an exception is the stage's."""
        from detr_fast.labeling.model import in_memory, model_process

        model = self._stack.enter_context(in_memory(lambda file: file.write(ray.get(self._model))))
        return self._stack.enter_context(model_process(self._memory, model, *self._arguments))

    @_stage
    def __call__(self, decoded: pa.Table) -> Iterator[pa.Table]:
        rows = list(_rows(decoded))
        yield _table((file, value) for file, value in rows if isinstance(value, Exception))
        images = [(file, value) for file, value in rows if not isinstance(value, Exception)]
        batches = list(batches_of_one_size(images, lambda image: image[1].size, self._batch_size))
        try:
            yield from self._find(batches)
        except WorkerDied:
            for image in images:
                try:
                    yield from self._find([[image]])
                except WorkerDied as error:
                    yield _table([(image[0], _Failure(str(error)))])

    def _find(self, batches: list[list[tuple[str, Pixels]]]) -> Iterator[pa.Table]:
        from detr_fast.labeling.model import find

        images = list(chain.from_iterable(batches))
        numbers = iter(range(len(images)))
        slots = [[self._slot(next(numbers), image) for _, image in batch] for batch in batches]
        found = chain.from_iterable(self._process.submit(find, slots).result())
        for number, ((file, _), what) in enumerate(zip(images, found, strict=True)):
            if what.error is not None:
                yield _table([(file, _Failure(what.error))])
            else:
                yield _table([(file, (what.ids(self._memory, number), what.segments_info))])
            self._memory.empty(number)

    def _slot(self, number: int, pixels: Pixels) -> Slot:
        self._memory.array(number, pixels.array.shape, pixels.array.dtype)[:] = pixels.array
        return Slot.of(number, pixels)


@_stage
def _write(writing: Writing, slot_bytes: int, found: pa.Table) -> Iterator[pa.Table]:
    """Rows of (file, record for the manifest), of files that are safe on the disk."""
    worker = _worker(slot_bytes)
    rows: list[tuple[str, Any]] = []
    paths: list[Path] = []
    for file, value in _rows(found):
        written: list[Path] = []
        if not isinstance(value, Exception):
            value, written = worker.write(writing, file, *value)
        rows.append((file, value))
        paths += written
    worker.sync(paths)
    yield _table(rows)


class _Worker:
    """A worker process of the local engine, beside the Ray worker that this is.

    A library that crashes over a damaged file takes it along and not the Ray worker, whose task Ray would repeat for
    ever.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._memory = SharedMemory(1, slot_bytes)
        descriptor = self._memory.descriptor
        self._pool = WorkerPool(1, (stages.attach, (1, slot_bytes, descriptor)), (descriptor,))

    def decode(self, path: Path, reading: Reading) -> Pixels | _Failure:
        """The pixels of an image, which stay until the next call."""
        self._memory.empty(0)
        try:
            return self._pool.submit(stages.decode_into, 0, path, reading).result().pixels(self._memory)
        except stages.UNREADABLE as error:
            return _Failure(stages.why_unreadable(error, path))

    def write(
        self, writing: Writing, file: str, ids: np.ndarray, segments_info: list[dict[str, Any]]
    ) -> tuple[dict[str, Any] | _Failure, list[Path]]:
        """The record of an image, and its files."""
        self._memory.empty(0)
        found = Found(ids.shape, ids.dtype.str, 0, segments_info)
        try:
            found.ids(self._memory, 0)[:] = ids
        except ValueError as error:
            return _Failure(str(error)), []
        try:
            return self._pool.submit(stages.encode_from, 0, found, file, writing).result()
        except (WorkerDied, OSError) as error:
            return _Failure(stages.why_unwritable(error)), []

    def sync(self, paths: list[Path]) -> None:
        self._pool.submit(stages.sync_written, paths).result()


_worker = cache(_Worker)  # of this process, which lasts for longer than a task
