"""A folder of images to a labelled data set: the call `label`, its options, and the claim of its output folder.

    listing -> decode and resize -> batches of one size -> model and merge -> encode and write -> manifest -> results

Every stage holds a bounded number of images. The engine runs the stages between the listing and the manifest:
`local.py` on this machine, `cluster.py` on Ray. The results are made at the end, from the manifest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detr_fast import __version__
from detr_fast.files import OccupiedError, locked, remove_temporary
from detr_fast.labeling import report
from detr_fast.labeling.formats import FOLDERS, FORMATS
from detr_fast.labeling.interrupt import Interrupt, Interrupted
from detr_fast.labeling.listing import find_images, listing_hash, without_place
from detr_fast.labeling.local import Job, LocalEngine, default_workers
from detr_fast.labeling.manifest import RESULTS, Manifest, Run, occupied
from detr_fast.labeling.results import LabelSummary, write_results
from detr_fast.labeling.stages import Reading, Writing
from detr_fast.ops import is_gpu, resolve_device
from detr_fast.predictor import Predictor

PACKAGES: dict[str, tuple[str, ...]] = {"local": (), "ray": ("ray", "pyarrow")}  # that each engine needs


@dataclass(frozen=True)
class Options:
    """The options of `label`, which explains them.

    Raises:
        ValueError: an option is not as `label` accepts it.
    """

    workers: int | None = None
    devices: Sequence[str] = ()
    engine: str = "local"
    classes: Iterable[int | str] | None = None
    min_area: int = 0
    limit: int | None = None
    shard: tuple[int, int] | None = None
    formats: Sequence[str] = ("panoptic", "instances")
    exif: bool = True
    resume: bool = False
    overwrite: bool = False
    preview: int = 0

    def __post_init__(self) -> None:
        check_engine(self.engine, self.workers, self.devices)
        least = {"workers": 1, "min_area": 0, "limit": 1}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None and value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise ValueError(f"shard must be (i, n) with i from 1 to n, got {self.shard}")
        if not self.formats or not set(self.formats) <= set(FORMATS):
            raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(self.formats) or 'none'}")
        if self.preview < 0 or (self.preview and "panoptic" not in self.formats):
            raise ValueError(f"preview must be at least 0 and needs the format panoptic, got {self.preview}")
        if len({resolve_device(device).type for device in self.devices}) > 1:
            raise ValueError(f"devices must be all GPUs or all cpu, got {', '.join(self.devices)}")


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
    `listing.png_name`), `panoptic.json`, `instances.json` (COCO results with RLE, of the things), `semantic/` with a
    grey PNG of class ids for each image, and `failures.jsonl`, one `{"file", "error"}` a line for each image that could
    not be labelled. Image ids count from 1 in the order of the listing. While it runs there are `manifest.jsonl` and
    `run.json`, from which `resume` goes on; the JSON comes at the end. Nothing of this depends on `batch_size`,
    `workers`, shards, or on where a run was interrupted. Memory does not grow with the number of images.

    SIGINT and SIGTERM end the run once the images that have been started are written (on Ray at once), and are then
    raised again, if this is called in the main thread.

    Args:
        images: the folder; `out` may lie in it and is then not searched.
        model: a `Predictor` of a panoptic model, or a hub id, folder or file for `Predictor.from_pretrained`.
        progress: show a progress bar on stderr: besides the failures how many images are read ahead of the model (none:
            reading is the bottleneck) and how many wait to be written (many: writing is).
        workers: processes that read and write images; by default one for each four processors, on a GPU's machine all
            but one of them.
        devices: run the model on these devices, with a process for each, instead of on its own; all GPUs or all "cpu".
        engine: "local", or "ray" for all machines of the Ray cluster that `ray.init` finds, or this one alone if it
            finds none: CPUs read and write, and each GPU runs the model if `model` is on one. All machines see `images`
            and `out` under the same paths. The labels are the same; `workers` and `devices` are the local engine's.
        classes: names or ids of the only classes to label; the pixels of others become void.
        min_area: segments of fewer pixels become void.
        limit: take the first so many images of the listing only.
        shard: (i, n) takes each n-th image, beginning with the i-th, i from 1 to n; `merge_shards` joins the
            outputs of all.
        formats: the formats to write, of "panoptic", "instances" and "semantic".
        exif: turn images the way their EXIF orientation says.
        resume: go on with the run that `out` holds, if any. Images that failed are tried again, and images whose PNG
            is missing or cut off are labelled again.
        overwrite: remove the run that `out` holds.
        preview: write report.html, a page that shows this number of the images with their labels, and statistics.

    Raises:
        ValueError: an argument is not as above, `images` holds no images, the model has no mask head, Ray is not
            installed.
        OccupiedError: (a ValueError) `out` holds another run, or other files in the place of its own.
        OSError: a folder cannot be read or a file cannot be written; earlier labels are kept.
        RuntimeError: Ray cannot be started or reached, its cluster lacks a GPU or CPU for the model, or it gives up.
    """
    options = Options(
        workers, devices, engine, classes, min_area, limit, shard, formats, exif, resume, overwrite, preview
    )
    images, out = Path(images), Path(out)
    files = find_images(images, out)
    predictor = model if isinstance(model, Predictor) else Predictor.from_pretrained(model)
    return label_files(images, files, out, predictor, options, progress)


def label_files(
    images: Path, files: Sequence[str], out: Path, predictor: Predictor, options: Options, progress: bool = False
) -> LabelSummary:
    """`label` of a folder whose images are listed.

    Args:
        files: as `find_images` gives them for `images` and `out`.
    """
    started = time.monotonic()
    if not predictor.panoptic:
        raise ValueError("labeling needs a panoptic model, got one without a mask head")
    limit = None if options.limit is None or options.limit >= len(files) else options.limit
    files = files[:limit]
    wanted = None if options.classes is None else frozenset(class_ids(options.classes, predictor.categories))
    formats = tuple(name for name in FORMATS if name in options.formats)
    # absolute paths, as the current folder of other processes is another
    writing = Writing(out.absolute(), formats, wanted, options.min_area, predictor.model.config.num_classes)
    on_gpu = is_gpu(resolve_device(options.devices[0] if options.devices else predictor.device))
    reading = Reading(options.exif, predictor.size, predictor.max_size, on_gpu)
    i, n = options.shard or (1, 1)
    run = Run(
        _settings(predictor, writing, options.exif),
        os.fspath(images.resolve()),
        f"{i}/{n}" if options.shard else None,
        predictor.categories,
        len(files),
        listing_hash(files),
        limit,
    )
    out.mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt, locked(out, "labeling into"):
        claim(out, run, options.resume, options.overwrite)
        for folder in (FORMATS[name].folder for name in formats):
            if folder is not None:
                (out / folder).mkdir(exist_ok=True)
        with Manifest(out, run.key, files, formats) as manifest:
            mine = files[i - 1 :: n]
            todo = [file for file in mine if not manifest.done(file)]
            done = len(mine) - len(todo)
            with tqdm(total=len(mine), initial=done, unit="image", smoothing=0.05, disable=not progress) as bar:
                job = Job(predictor, images.absolute(), reading, writing, manifest, interrupt, bar)
                if options.engine == "ray":
                    from detr_fast.labeling.cluster import ClusterEngine

                    ClusterEngine(job).run(todo, without_place(files))
                else:
                    workers = options.workers or default_workers(on_gpu)
                    LocalEngine(job, workers, options.devices).run(todo, without_place(files))
            if interrupt.number is None:
                with suppress(Interrupted), interrupt.computing():
                    summary, labelled = write_results(manifest, run, out)
                    summary.computed, summary.seconds = len(todo), time.monotonic() - started
                    if options.preview:
                        report.write(out, run, summary, manifest, labelled, options.preview)
                    return summary
    raise AssertionError("the signal that ended the run was raised again")


def check_engine(engine: str, workers: int | None = None, devices: Sequence[str] = ()) -> None:
    """Raises ValueError for an engine that is unknown, not installed, or does not go with the other options."""
    if engine not in PACKAGES:
        raise ValueError(f"engine must be one of {', '.join(PACKAGES)}, got {engine!r}")
    if missing := [package for package in PACKAGES[engine] if importlib.util.find_spec(package) is None]:
        raise ValueError(f"{engine} needs {' and '.join(missing)}: pip install 'detr_fast[{engine}]'")
    given = [name for name, value in (("workers", workers), ("devices", devices)) if value]
    if engine == "ray" and given:
        raise ValueError(f"ray does not go with {' and '.join(given)}: the CPUs and GPUs of its cluster decide")


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


def claim(out: Path, run: Run, resume: bool, overwrite: bool) -> None:
    """Makes `out` a folder with no labels but this run's.

    Raises:
        OccupiedError: it holds another run's, or other files in the place of labels.
    """
    if overwrite and occupied(out):
        Run.read(out)
        for name in ("manifest.jsonl", *RESULTS, *FOLDERS, "run.json"):  # in this order it can be broken off
            path = out / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
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
    if links := [name for name in FOLDERS if (out / name).is_symlink()]:
        raise OccupiedError(f"{out / links[0]} is a symbolic link")
    if before != run:  # the listing or the limit is another
        run.write(out)
    remove_temporary(out)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def _settings(predictor: Predictor, writing: Writing, exif: bool) -> dict[str, Any]:
    """Everything that decides the labels of an image, in types that JSON gives back."""
    names = {category["id"]: category["name"] for category in predictor.categories}
    return {
        "detr_fast": __version__,
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
