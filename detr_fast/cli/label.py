"""`detr-fast label`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from detr_fast.cli.arguments import (
    UsageError,
    WorkFailed,
    add_batch_size,
    add_device,
    add_dtype,
    add_model,
    add_threshold,
    argument,
    class_thresholds,
    folder,
    names,
    natural,
    output_folder,
    positive,
    shard,
    unit,
)

if TYPE_CHECKING:
    from detr_fast.predictor import Predictor

HELP = "label a folder of images"
DESCRIPTION = "Label a folder of images: writes COCO panoptic PNGs and JSON, and COCO results of the things."


def add_options(label: argparse.ArgumentParser) -> None:
    label.add_argument("images", metavar="IMAGES_DIR", type=folder, help="searched with its sub-folders")
    label.add_argument("--out", metavar="OUT_DIR", type=output_folder, required=True, help="made if missing")
    add_model(label)
    add_device(label)
    add_dtype(label)
    add_batch_size(label, 4, "changes the speed only")
    add_threshold(label, "segment")
    label.add_argument(
        "--class-threshold",
        metavar="CLASS=T",
        type=class_thresholds,
        action="append",
        default=[],
        help="the least score of a class, by name or id; several with commas or by repeating it",
    )
    label.add_argument(
        "--classes",
        metavar="A,B,...",
        type=names,
        help="names or ids of the only classes wanted; the rest becomes void",
    )
    label.add_argument(
        "--min-area", metavar="PIXELS", type=natural, default=0, help="smaller segments become void (%(default)s)"
    )
    label.add_argument(
        "--max-size",
        metavar="PIXELS",
        type=positive,
        help="the most of the long side that the model sees (what it is made for, 1333)",
    )
    label.add_argument(
        "--mode",
        choices=("corrected", "detr", "transformers"),
        default="corrected",
        help="how masks become segments: without upstream's flaws, or exactly as one of them does (%(default)s)",
    )
    label.add_argument(
        "--formats",
        metavar="A,B,...",
        type=names,
        default=["panoptic", "instances"],
        help="panoptic,instances,semantic",
    )
    label.add_argument(
        "--exif-orientation", choices=("apply", "ignore"), default="apply", help="turn images upright (%(default)s)"
    )
    label.add_argument("--workers", metavar="N", type=positive, help="processes that read and write images")
    label.add_argument("--devices", metavar="A,B,...", type=names, help="several devices, with a process for each")
    label.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: all machines of a Ray cluster, which share both folders; RAY_ADDRESS, or one on this machine; needs "
        "pip install 'detr_fast[ray]' (%(default)s)",
    )
    label.add_argument("--limit", metavar="N", type=positive, help="take the first N images of the listing only")
    label.add_argument("--shard", metavar="I/N", type=shard, help="each N-th image, beginning with the I-th of them")
    going_on = label.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="go on with what OUT_DIR holds, if anything")
    going_on.add_argument("--overwrite", action="store_true", help="remove the run that OUT_DIR holds")
    label.add_argument(
        "--preview", metavar="N", type=natural, default=0, help="write report.html with N images and statistics"
    )
    label.add_argument(
        "--max-failure-rate",
        metavar="R",
        type=unit,
        default=0.1,
        help="the part of the images that may fail, 0 to 1, without exit code 1 (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from detr_fast.files import OccupiedError
    from detr_fast.labeling.listing import find_images
    from detr_fast.labeling.pipeline import Options, label_files

    with argument("IMAGES_DIR"):
        files = find_images(args.images, args.out)
    _check(args)
    predictor, classes = _predictor(args)
    options = Options(
        workers=args.workers,
        devices=args.devices or (),
        engine=args.engine,
        classes=classes,
        min_area=args.min_area,
        limit=args.limit,
        shard=args.shard,
        formats=args.formats,
        exif=args.exif_orientation == "apply",
        resume=args.resume,
        overwrite=args.overwrite,
        preview=args.preview,
    )
    try:
        summary = label_files(args.images, files, args.out, predictor, options, progress=sys.stderr.isatty())
    except OccupiedError as error:
        raise UsageError(f"argument --out: {error}") from error
    except OSError as error:
        raise WorkFailed(f"{error}; what is done is kept, and --resume goes on with it") from error
    found = summary.labelled + summary.failed
    if summary.failed > args.max_failure_rate * found:
        first = summary.failures[0]
        raise WorkFailed(
            f"{summary.failed} of {found} images failed, see {args.out / 'failures.jsonl'}; "
            f"the first is {first['file']}: {first['error']}"
        )
    failed = f"; {summary.failed} of {found} images failed" if summary.failed else ""
    print(f"labelled {summary.labelled} images with {summary.segments} segments in {args.out}{failed}")


def _check(args: argparse.Namespace) -> None:
    """Blames the options that do not go together, before the model is loaded."""
    from detr_fast.labeling.formats import FORMATS
    from detr_fast.labeling.pipeline import check_engine

    with argument("--engine"):
        check_engine(args.engine, args.workers, args.devices or ())
    with argument("--formats"):
        if not set(args.formats) <= set(FORMATS):
            raise ValueError(f"must be of {', '.join(FORMATS)}, got {','.join(args.formats)}")
    with argument("--preview"):
        if args.preview and "panoptic" not in args.formats:
            raise ValueError("shows what is in panoptic/, which --formats leaves out")


def _predictor(args: argparse.Namespace) -> tuple[Predictor, list[int] | None]:
    """The model with its options, and the ids of `--classes`."""
    from detr_fast.categories import categories_for
    from detr_fast.checkpoint import load_model
    from detr_fast.labeling.pipeline import class_ids
    from detr_fast.ops import resolve_device, resolve_dtype
    from detr_fast.predictor import Predictor

    with argument("--device"):
        device = resolve_device(args.device)
    with argument("--devices"):
        devices = [resolve_device(name) for name in args.devices or []]
        if len({other.type for other in devices}) > 1:
            raise ValueError(f"must be all GPUs or all cpu, got {','.join(args.devices)}")
    with argument("--dtype"):
        dtype = resolve_dtype(args.dtype, (devices or [device])[0])
    with argument("--model"):
        model = load_model(args.model)
        if not model.config.masks:
            raise ValueError(f"label needs a panoptic model, and {args.model} has no mask head")
    categories = categories_for(model.config, model.categories)
    with argument("--classes"):
        classes = None if args.classes is None else class_ids(args.classes, categories)
    with argument("--class-threshold"):
        given = [pair for group in args.class_threshold for pair in group.items()]
        ids = class_ids([name for name, _ in given], categories)
    predictor = Predictor(
        model,
        device="cpu" if devices else device,
        dtype=dtype,
        threshold=args.threshold,
        class_thresholds=dict(zip(ids, (value for _, value in given), strict=True)),
        mode=args.mode,
        batch_size=args.batch_size,
        max_size=args.max_size,
    )
    return predictor, classes
