"""A folder of images to a COCO panoptic data set.

    listing -> decode and resize -> batches of one shape -> model and merge -> encode and write -> manifest -> JSON
               (workers)                                    (this process)     (workers)

Every stage holds a bounded number of images, in slots of shared memory. JSON is made at the end, from the manifest.
`cluster.py` has the same stages on Ray.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import queue
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import detr_fast
from detr_fast.files import remove_temporary
from detr_fast.labeling import report, stages, writers
from detr_fast.labeling.engines import DevicesEngine, Engine, Found, LocalEngine, Slot, slot_bytes
from detr_fast.labeling.interrupt import Interrupt, Interrupted
from detr_fast.labeling.labeler import Labeler
from detr_fast.labeling.manifest import PNG_FOLDERS, RESULTS, Manifest, OccupiedError, Run, locked, occupied
from detr_fast.labeling.results import LabelSummary, write_results
from detr_fast.labeling.stages import FORMATS, Reading, Writing
from detr_fast.labeling.workers import SharedMemory, WorkerDied, WorkerPool
from detr_fast.predictor import Predictor, resolve_device

# Batches are made of images of one shape. An image waits for others of its shape while this many batches are read.
BATCHES_AHEAD = 2
COMMIT_IMAGES = 64  # the manifest is written after so many images,
COMMIT_SECONDS = 2.0  # or after this time
ENGINES: dict[str, tuple[str, ...]] = {"local": (), "ray": ("ray", "pyarrow")}  # and what each needs installed


def find_images(folder: Path, out: Path) -> list[str]:
    """The images of a folder and its sub-folders, sorted, as POSIX paths relative to it.

    An image is what has one of `writers.IMAGE_SUFFIXES` in any case. Symbolic links to folders are not followed, and
    `out` is left out if it lies within.

    Raises:
        ValueError: `folder` is none, is `out` itself, or holds no images.
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {folder}")
    skipped = out.resolve()
    if folder.resolve() == skipped:
        raise ValueError(f"images and out must be different folders, got {folder} for both")
    root, files = os.fspath(folder), []
    for parent, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name != skipped.name or Path(parent, name).resolve() != skipped]
        below = Path(os.path.relpath(parent, root)).as_posix()
        prefix = "" if below == "." else f"{below}/"
        files += [prefix + name for name in names if name.lower().endswith(writers.IMAGE_SUFFIXES)]
    if not files:
        raise ValueError(f"no images in {folder}: no file ends in {', '.join(writers.IMAGE_SUFFIXES)}")
    return sorted(files)


def label(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Predictor | str | os.PathLike[str],
    progress: bool = False,
    *,
    workers: int | None = None,
    devices: Sequence[str] = (),
    engine: str = "local",
    classes: Iterable[int | str] | None = None,
    min_area: int = 0,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    formats: Sequence[str] = ("panoptic", "instances"),
    exif: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    preview: int = 0,
) -> LabelSummary:
    """Labels every image of a folder and writes the result in COCO's formats.

    Writes below `out`: `panoptic/` with a PNG for each image (id = R + 256 G + 65536 B, 0 = void; named by
    `writers.png_name`), `panoptic.json`, `instances.json` (COCO results with RLE, of the things), `semantic/` with a
    grey PNG of class ids for each image, and `failures.jsonl`, one `{"file", "error"}` a line for each image that could
    not be labelled. Image ids count from 1 in the order of the listing. While it runs there are `manifest.jsonl` and
    `run.json`, from which `resume` goes on; the JSON comes at the end. Nothing of this depends on `batch_size`,
    `workers`, shards, or on where a run was interrupted. Memory does not grow with the number of images.

    SIGINT and SIGTERM end the run once what has been started is written (on Ray at once), and are then raised again, if
    this is called in the main thread.

    Args:
        images: the folder; `out` may lie in it and is then not searched.
        model: a `Predictor` of a panoptic model, or what `Predictor.from_pretrained` reads.
        progress: show a progress bar on stderr: besides the failures how many images are read ahead of the model (none:
            reading is the bottleneck) and how many wait to be written (many: writing is).
        workers: processes that read and write images; by default one for each four processors, on a GPU's machine all
            but one of them.
        devices: run the model on these, with a process and a copy of the model for each, instead of on its own device;
            all GPUs or all "cpu".
        engine: "local", or "ray" for all machines of the Ray cluster that `ray.init` finds, or this one alone if it
            finds none: CPUs read and write, and each GPU runs the model if `model` is on one. All machines see `images`
            and `out` under the same paths. The labels are the same; `workers` and `devices` are the local engine's.
        classes: names or ids of the only classes that are wanted; the pixels of others become void.
        min_area: segments of fewer pixels become void.
        limit: take the first so many images of the listing only.
        shard: (i, n) takes each n-th image, beginning with the i-th, i from 1 to n; `merge` joins the outputs of all.
        formats: which to write, of "panoptic", "instances" and "semantic".
        exif: turn images the way their EXIF orientation says.
        resume: go on with what `out` holds, if anything. Images that failed are tried again.
        overwrite: remove the run that `out` holds.
        preview: write report.html, a page that shows so many of the images with their labels, and statistics.

    Raises:
        ValueError: an argument is not as above, `images` holds no images, the model has no mask head, Ray is not
            installed.
        OccupiedError: (a ValueError) `out` holds another run, or something else in the place of its files.
        OSError: a folder cannot be read or a file cannot be written; what was written before is kept.
        RuntimeError: Ray cannot be started or reached, its cluster lacks what the model needs, or it gives up.
    """
    started = time.monotonic()
    images, out = Path(images), Path(out)
    check_engine(engine, workers, devices)
    check_options(workers, min_area, limit, shard, formats, preview)
    if len({resolve_device(device).type for device in devices}) > 1:
        raise ValueError(f"devices must be all GPUs or all cpu, got {', '.join(devices)}")
    files = find_images(images, out)[:limit]
    predictor = model if isinstance(model, Predictor) else Predictor.from_pretrained(model)
    if not predictor.panoptic:
        raise ValueError("labeling needs a panoptic model, got one without a mask head")
    wanted = None if classes is None else frozenset(class_ids(classes, predictor.categories))
    bits = 8 if predictor.model.config.num_classes <= 256 else 16
    # absolute paths, as the current folder of other processes is another
    writing = Writing(out.absolute(), tuple(name for name in FORMATS if name in formats), wanted, min_area, bits)
    used: Sequence[str | torch.device] = devices or [predictor.device]
    on_gpu = resolve_device(used[0]).type == "cuda"
    i, n = shard or (1, 1)
    run = Run(
        _settings(predictor, writing, exif),
        os.fspath(images.resolve()),
        f"{i}/{n}" if shard else None,
        predictor.categories,
    )
    out.mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt, locked(out):
        claim(out, run, resume, overwrite)
        for name in PNG_FOLDERS:
            if name in formats:
                (out / name).mkdir(exist_ok=True)
        with Manifest(out, run.key, files) as manifest:
            mine = files[i - 1 :: n]
            todo = [file for file in mine if not manifest.done(file)]
            done = len(mine) - len(todo)
            with tqdm(total=len(mine), initial=done, unit="image", smoothing=0.05, disable=not progress) as bar:
                reading = Reading(exif, predictor.size, predictor.max_size, on_gpu)
                inputs = (predictor, images.absolute(), reading, writing, manifest, interrupt, bar)
                if engine == "ray":
                    from detr_fast.labeling.cluster import ClusterLabeler

                    ClusterLabeler(*inputs).run(todo, without_place(files))
                else:
                    _Labeler(*inputs).run(todo, without_place(files), workers or default_workers(on_gpu), devices)
            if interrupt.number is None:
                with suppress(Interrupted), interrupt.computing():
                    summary, labelled = write_results(manifest, run, out)
                    summary.computed, summary.seconds = len(todo), time.monotonic() - started
                    if preview:
                        report.write(out, run, summary, manifest, labelled, preview)
                    return summary
    raise AssertionError("the signal that ended the run was raised again")


def check_engine(engine: str, workers: int | None = None, devices: Sequence[str] = ()) -> None:
    """Raises ValueError for an engine that is unknown, not installed, or does not take what else is given."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if missing := [package for package in ENGINES[engine] if importlib.util.find_spec(package) is None]:
        raise ValueError(f"{engine} needs {' and '.join(missing)}: pip install 'detr_fast[{engine}]'")
    given = [name for name, value in (("workers", workers), ("devices", devices)) if value]
    if engine == "ray" and given:
        raise ValueError(f"ray does not go with {' and '.join(given)}: the CPUs and GPUs of its cluster decide")


def check_options(
    workers: int | None,
    min_area: int,
    limit: int | None,
    shard: tuple[int, int] | None,
    formats: Sequence[str],
    preview: int,
) -> None:
    """Raises ValueError for what `label` does not accept."""
    for name, value, least in (("workers", workers, 1), ("min_area", min_area, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be (i, n) with i from 1 to n, got {shard}")
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(formats) or 'none'}")
    if preview < 0 or (preview and "panoptic" not in formats):
        raise ValueError(f"preview must be at least 0 and needs the format panoptic, got {preview}")


def class_ids(classes: Iterable[int | str], categories: list[dict[str, Any]]) -> list[int]:
    """The ids of classes that are given by name or id.

    Raises:
        ValueError: the model has no such class.
    """
    by_name = {category["name"]: category["id"] for category in categories}
    by_id = {str(index): index for index in by_name.values()}
    ids = []
    for entry in classes:
        ids.append(by_name.get(str(entry), by_id.get(str(entry), -1)))
        if ids[-1] < 0:
            raise ValueError(
                f"classes must be names or ids of the model's, as {', '.join(list(by_name)[:5])}, got {entry!r}"
            )
    return ids


def default_workers(on_gpu: bool) -> int:
    """A CPU's model keeps all processors busy for far longer than it takes to read and write its images."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors - 1) if on_gpu else max(1, min(2, processors // 4))


def without_place(files: Sequence[str]) -> dict[str, str]:
    """Those images whose PNG would have to have the name of a folder of PNGs, with the reason."""
    folders = set()
    for folder in {file.rpartition("/")[0] for file in files}:
        parts = folder.split("/")
        folders |= {"/".join(parts[:end]) for end in range(1, 1 + len(parts)) if parts[end - 1].endswith(".png")}
    if not folders:
        return {}
    reason = "its PNG would have the name of a folder"
    return {file: reason for file in files if writers.png_name(file) in folders}


def claim(out: Path, run: Run, resume: bool, overwrite: bool) -> None:
    """Makes `out` a folder in which nothing but this run's files are mixed.

    Raises:
        OccupiedError: it is not.
    """
    if overwrite and occupied(out):
        Run.read(out)
        for name in ("manifest.jsonl", *RESULTS, *PNG_FOLDERS, "run.json"):  # in this order it can be broken off
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    names = occupied(out)
    if not names:
        run.write(out)
        return
    if not resume:
        raise OccupiedError(f"{out} holds {names[0]} already; --resume goes on with a run, --overwrite removes it")
    before = Run.read(out)
    old, new = ({**r.settings, "images": r.images, "shard": r.shard} for r in (before, run))
    different = [f"{name} was {old.get(name)} and is {new.get(name)}" for name in new if old.get(name) != new.get(name)]
    if different:
        raise OccupiedError(f"{out} holds another run: {'; '.join(different)}")
    remove_temporary(out)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def _settings(predictor: Predictor, writing: Writing, exif: bool) -> dict[str, Any]:
    """All that decides the labels of an image, as JSON gives it back."""
    names = {category["id"]: category["name"] for category in predictor.categories}
    return {
        "detr_fast": detr_fast.__version__,
        "model": _fingerprint(predictor.model),
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "mode": predictor.mode,
        "threshold": predictor.threshold,
        "class_thresholds": {names.get(k, str(k)): v for k, v in sorted(predictor.class_thresholds.items())},
        "size": predictor.size,
        "max_size": predictor.max_size,
        "exif_orientation": "apply" if exif else "ignore",
        "classes": None if writing.classes is None else sorted(writing.classes),
        "min_area": writing.min_area,
        "formats": list(writing.formats),
    }


def _fingerprint(model: torch.nn.Module) -> str:
    """Hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Image:
    """An image that lies in a slot."""

    number: int
    file: str
    slot: Slot


class _Labeler(Labeler):
    """Takes images from the disk through the model and back to it.

    An image keeps one slot of shared memory from its reading to its writing. The slots are as many as images may be
    waiting for a batch, in reading, in the model and in writing, so that no stage can starve another.
    """

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        self._encoded: queue.SimpleQueue[tuple[_Image, Future[Any]]] = queue.SimpleQueue()
        self._started: deque[tuple[list[_Image], Callable[[], list[Found]]]] = deque()
        self._window: deque[tuple[int, str, int, Future[Any]]] = deque()
        self._encoding = 0
        self._uncommitted: list[tuple[str, dict[str, Any], list[Path]]] = []
        self._committed = time.monotonic()
        self._syncing: deque[tuple[Future[None], list[tuple[str, dict[str, Any]]]]] = deque()

    def run(self, files: Sequence[str], hopeless: dict[str, str], workers: int, devices: Sequence[str]) -> None:
        """Labels the images, except for those that are known to fail, and records all in the manifest."""
        if not files:
            return
        size = self._predictor.batch_size
        self._ahead = size + 2 * workers
        in_model = size * 2 * max(1, len(devices))
        slots = BATCHES_AHEAD * size + self._ahead + in_model + self._ahead
        self._memory = SharedMemory(slots, slot_bytes(self._predictor))
        for slot in reversed(range(slots)):
            self._free.put(slot)
        shared = (slots, self._memory.slot_bytes, self._memory.descriptor)
        with ExitStack() as stack:
            self._pool = stack.enter_context(
                WorkerPool(min(workers, len(files)), (stages.attach, shared), (self._memory.descriptor,))
            )
            self._engine: Engine = LocalEngine(self._predictor, self._memory)
            if devices:
                self._engine = engine = DevicesEngine(self._predictor, self._memory, devices)
                stack.callback(engine.close)
            for batch in self._batches(self._decoded(files, hopeless)):
                self._compute(batch)
                self._record()
            while self._started:
                self._finish(*self._started.popleft())
            while self._encoding:
                self._record(wait=True)
            self._commit(at_once=True)

    def _decoded(self, files: Sequence[str], hopeless: dict[str, str]) -> Iterator[_Image]:
        """The images that can be read, in their order; until a signal comes."""
        waiting = enumerate(files)
        while self._interrupt.number is None:
            while len(self._window) < self._ahead and (following := next(waiting, None)) is not None:
                number, file = following
                if file in hopeless:
                    self._fail(file, hopeless[file])
                    continue
                slot = self._free.get()
                future = self._pool.submit(stages.decode_into, slot, self._images / file, self._reading)
                self._window.append((number, file, slot, future))
            if not self._window:
                return
            number, file, slot, future = self._window.popleft()
            try:
                found = future.result()
            except stages.UNREADABLE as error:
                self._release(slot)
                self._fail(file, stages.why_unreadable(error, self._images / file))
            else:
                yield _Image(number, file, Slot(slot, *found))

    def _batches(self, images: Iterable[_Image]) -> Iterator[list[_Image]]:
        """Images of one shape, up to `batch_size`; a rare shape waits for the reading of BATCHES_AHEAD batches only.

        Which images share a batch depends on their order alone, not on the time that their reading takes.
        """
        size = self._predictor.batch_size
        held: dict[tuple[int, int], list[_Image]] = {}  # by shape; the first has waited for longest
        for image in images:
            batch = held.setdefault(image.slot.size, [])
            batch.append(image)
            if len(batch) == size:
                yield held.pop(image.slot.size)
            for shape, (first, *_) in list(held.items())[:1]:
                if image.number - first.number >= BATCHES_AHEAD * size:
                    yield held.pop(shape)
        if self._interrupt.number is None:
            yield from held.values()

    def _compute(self, batch: list[_Image]) -> None:
        with suppress(Interrupted), self._interrupt.computing():
            self._started.append((batch, self._engine.start([image.slot for image in batch])))
        while len(self._started) >= self._engine.depth:
            self._finish(*self._started.popleft())

    def _finish(self, batch: list[_Image], wait: Callable[[], list[Found]]) -> None:
        try:
            with self._interrupt.computing():
                results = wait()
        except Interrupted:
            return
        except WorkerDied as error:
            results = [Found((0, 0), "", 0, [], str(error))] * len(batch)
        for image, found in zip(batch, results, strict=True):
            if found.error is not None:
                self._release(image.slot.number)
                self._fail(image.file, found.error)
                continue
            place = (image.slot.number, found.shape, found.dtype, found.offset)
            encoding = self._pool.submit(stages.encode_from, *place, image.file, found.segments_info, self._writing)
            self._encoding += 1
            encoding.add_done_callback(partial(self._written, image))

    def _written(self, image: _Image, future: Future[Any]) -> None:
        """Called in the pool's thread, so that a slot is free before this one has time."""
        self._release(image.slot.number)
        self._encoded.put((image, future))

    def _release(self, slot: int) -> None:
        self._memory.empty(slot)
        self._free.put(slot)

    def _record(self, wait: bool = False) -> None:
        """Takes the results of the writers, and waits for one if asked to."""
        while self._encoding and (wait or not self._encoded.empty()):
            image, future = self._encoded.get()
            self._encoding -= 1
            wait = False
            try:
                record, paths = future.result()
            except (WorkerDied, OSError) as error:
                self._fail(image.file, stages.why_unwritable(error))
            else:
                self._uncommitted.append((image.file, record, paths))
                self._bar.update()
        self._commit()
        if not self._bar.disable:
            ready = sum(future.done() for *_, future in self._window)
            self._bar.set_postfix_str(
                f"{self._failed} failed, {ready} of {self._ahead} read ahead, {self._encoding} to be written",
                refresh=False,
            )

    def _fail(self, file: str, reason: str) -> None:
        self._failed += 1
        self._uncommitted.append((file, {"error": reason}, []))
        self._bar.update()

    def _commit(self, at_once: bool = False) -> None:
        """The manifest's lines follow the images' files onto the disk, many at once."""
        due = len(self._uncommitted) >= COMMIT_IMAGES or time.monotonic() - self._committed >= COMMIT_SECONDS
        if self._uncommitted and (due or at_once):
            paths = [path for *_, written in self._uncommitted for path in written]
            lines = [(file, record) for file, record, _ in self._uncommitted]
            self._syncing.append((self._pool.submit(stages.sync_written, paths), lines))
            self._uncommitted, self._committed = [], time.monotonic()
        while self._syncing and (at_once or self._syncing[0][0].done()):
            future, lines = self._syncing.popleft()
            future.result()
            self._manifest.append(lines)
