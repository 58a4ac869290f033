"""The `detr-fast` command.

Exit codes: 0 done; 1 the work failed; 2 a usage error; 130 and 143 after SIGINT and SIGTERM. Every failure is one line
on stderr. What a command needs is imported when it runs, so that `--help` and most usage errors come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import detr_fast

if TYPE_CHECKING:
    from detr_fast import ops

DEFAULT_MODEL = "facebook/detr-resnet-50-panoptic"


class UsageError(Exception):
    """The command line asks for something that cannot be; the message names the option or path."""


class WorkFailed(Exception):
    """The command was right and its work went wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    # SIGINT too: scripts start their background jobs with it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # multiprocessing's Pythons would import from the current folder
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UsageError as error:
        return _fail(args.command, error, 2)
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 128 + signal.SIGINT)
    except (WorkFailed, OSError, RuntimeError, MemoryError) as error:
        return _fail(args.command, error, 1)
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(command: str, error: object, code: int) -> int:
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"detr-fast {command}: error: {reason}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="detr-fast", description="DETR: detection and panoptic segmentation.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    label = commands.add_parser(
        "label",
        allow_abbrev=False,
        help="label a folder of images",
        description="Label a folder of images: writes COCO panoptic PNGs and JSON, and COCO results of the things.",
    )
    label.add_argument("images", metavar="IMAGES_DIR", type=_folder, help="searched with its sub-folders")
    label.add_argument("--out", metavar="OUT_DIR", type=_output_folder, required=True, help="made if missing")
    label.add_argument(
        "--model", metavar="NAME_OR_PATH", default=DEFAULT_MODEL, help="hub id, folder or file (%(default)s)"
    )
    label.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    label.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (%(default)s)")
    label.add_argument(
        "--batch-size", metavar="N", type=_positive, default=4, help="changes the speed only (%(default)s)"
    )
    label.add_argument(
        "--threshold", metavar="T", type=_unit, default=0.85, help="least score of a segment, 0 to 1 (%(default)s)"
    )
    label.add_argument(
        "--class-threshold",
        metavar="CLASS=T",
        type=_class_thresholds,
        action="append",
        default=[],
        help="the least score of a class, by name or id; several with commas or by repeating it",
    )
    label.add_argument(
        "--classes",
        metavar="A,B,...",
        type=_list,
        help="names or ids of the only classes wanted; the rest becomes void",
    )
    label.add_argument(
        "--min-area", metavar="PIXELS", type=_natural, default=0, help="smaller segments become void (%(default)s)"
    )
    label.add_argument(
        "--max-size",
        metavar="PIXELS",
        type=_positive,
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
        type=_list,
        default=["panoptic", "instances"],
        help="panoptic,instances,semantic",
    )
    label.add_argument(
        "--exif-orientation", choices=("apply", "ignore"), default="apply", help="turn images upright (%(default)s)"
    )
    label.add_argument("--workers", metavar="N", type=_positive, help="processes that read and write images")
    label.add_argument("--devices", metavar="A,B,...", type=_list, help="several devices, with a process for each")
    label.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: all machines of a Ray cluster, which share both folders; RAY_ADDRESS, or one on this machine; needs "
        "pip install 'detr_fast[ray]' (%(default)s)",
    )
    label.add_argument("--limit", metavar="N", type=_positive, help="take the first N images of the listing only")
    label.add_argument("--shard", metavar="I/N", type=_shard, help="each N-th image, beginning with the I-th of them")
    going_on = label.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="go on with what OUT_DIR holds, if anything")
    going_on.add_argument("--overwrite", action="store_true", help="remove the run that OUT_DIR holds")
    label.add_argument(
        "--preview", metavar="N", type=_natural, default=0, help="write report.html with N images and statistics"
    )
    label.add_argument(
        "--max-failure-rate",
        metavar="R",
        type=_unit,
        default=0.1,
        help="the part of the images that may fail, 0 to 1, without exit code 1 (%(default)s)",
    )
    label.set_defaults(run=_label)

    merge = commands.add_parser(
        "merge",
        allow_abbrev=False,
        help="join the outputs of label --shard",
        description="Join the outputs of label --shard to what one run over all the images writes.",
    )
    merge.add_argument("shards", metavar="OUT_DIR", nargs="+", type=_folder, help="of label, one for each shard")
    merge.add_argument("--out", metavar="OUT_DIR", type=_output_folder, required=True, help="a new or an empty folder")
    merge.set_defaults(run=_merge)

    synth = commands.add_parser(
        "synth",
        allow_abbrev=False,
        help="make a synthetic data set",
        description="Draw photograph-like scenes with COCO annotations; the same seed gives the same bytes.",
    )
    synth.add_argument("out", metavar="OUT", type=_output_folder, help="a new or an empty folder")
    synth.add_argument("--images", metavar="N", type=_positive, required=True)
    synth.add_argument("--seed", metavar="S", type=_natural, default=0, help="(%(default)s)")
    synth.add_argument("--size", metavar=("HEIGHT", "WIDTH"), nargs=2, type=_positive, default=(256, 256))
    synth.add_argument("--workers", metavar="N", type=_positive, default=1, help="changes the speed only (%(default)s)")
    synth.set_defaults(run=_synth)

    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="score a model on a data set",
        description="Score a model on a data set: box and mask AP, and panoptic quality, in percent. Prints a JSON "
        "report on standard output and a table on standard error.",
    )
    evaluate.add_argument(
        "--data", metavar="DIR", type=_folder, required=True, help="as synth writes it, or COCO's folder"
    )
    evaluate.add_argument("--split", metavar="NAME", help="of a data set that has splits, as COCO (val2017)")
    evaluate.add_argument(
        "--model", metavar="NAME_OR_PATH", default=DEFAULT_MODEL, help="hub id, folder or file (%(default)s)"
    )
    evaluate.add_argument("--out", metavar="FILE", type=_output_file, help="write the report there, too")
    evaluate.add_argument("--limit", metavar="N", type=_positive, help="take the first N images only")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    evaluate.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (%(default)s)")
    evaluate.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=1,
        help="changes the speed only, unless --padded (%(default)s)",
    )
    evaluate.add_argument(
        "--padded", action="store_true", help="pad images of different shapes to one batch, as the original evaluation"
    )
    evaluate.add_argument(
        "--size", metavar="SHORT", type=_positive, help="of the images' shorter side (what the model is made for)"
    )
    evaluate.add_argument(
        "--threshold", metavar="T", type=_unit, default=0.85, help="least score of a segment, 0 to 1 (%(default)s)"
    )
    evaluate.add_argument(
        "--mode",
        choices=("detr", "corrected", "transformers"),
        default="detr",
        help="how masks become segments: as in facebookresearch/detr, as in label, or as in transformers (%(default)s)",
    )
    evaluate.set_defaults(run=_eval)

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train or fine-tune a model",
        description="Train or fine-tune a model; several processes by torchrun. RUN then works as --model.",
    )
    train.add_argument(
        "--data", metavar="DIR", type=_folder, required=True, help="as synth writes it, or COCO's folder"
    )
    train.add_argument("--out", metavar="RUN", type=_output_folder, required=True, help="made if missing")
    train.add_argument("--resume", action="store_true", help="go on where the run in RUN stopped, if there is one")
    train.add_argument("--split", metavar="NAME", help="of a data set that has splits, as COCO (train2017)")
    train.add_argument(
        "--annotations",
        choices=("panoptic", "instances"),
        help="what is learnt where there are both (panoptic with a mask head, instances without)",
    )
    train.add_argument("--bad-annotations", choices=("fail", "skip"), default="fail", help="(%(default)s)")

    network = train.add_argument_group("model")
    network.add_argument(
        "--config",
        metavar="NAME_OR_JSON",
        help="a name, a JSON file or JSON (detr_resnet50_panoptic, or that of --from)",
    )
    network.add_argument(
        "--masks", action=argparse.BooleanOptionalAction, help="with a mask head or without (as the config says)"
    )
    network.add_argument("--from", dest="start", metavar="CHECKPOINT", help="start from a hub id, a folder or a file")
    network.add_argument("--freeze-detr", action="store_true", help="train the mask head alone")
    network.add_argument(
        "--batch-norm",
        choices=("frozen", "train"),
        default="frozen",
        help="frozen for a pretrained backbone, train for a new one (%(default)s)",
    )

    length = train.add_argument_group("length and rates")
    length.add_argument("--epochs", metavar="N", type=_positive, default=300, help="(%(default)s)")
    length.add_argument("--steps", metavar="N", type=_positive, help="stop after so many at the latest")
    length.add_argument("--batch-size", metavar="N", type=_positive, default=2, help="of a process (%(default)s)")
    length.add_argument("--accumulate", metavar="N", type=_positive, default=1, help="batches a step (%(default)s)")
    for name, value, about in (
        ("lr", 1e-4, "AdamW's rate"),
        ("lr-backbone", 1e-5, "its rate for the backbone; 0 freezes it"),
        ("weight-decay", 1e-4, "AdamW's"),
        ("clip", 0.1, "largest norm of the gradient; 0: any"),
    ):
        length.add_argument(f"--{name}", metavar="X", type=_non_negative, default=value, help=f"{about} (%(default)s)")
    length.add_argument("--schedule", choices=("step", "cosine"), default="step", help="(%(default)s)")
    length.add_argument(
        "--lr-drop", metavar="N", type=_positive, default=200, help="epochs until the rates are a tenth (%(default)s)"
    )
    length.add_argument("--warmup", metavar="N", type=_natural, default=0, help="steps of growing rates (%(default)s)")
    length.add_argument(
        "--ema", metavar="DECAY", type=_unit, default=0.0, help="average the weights; 0: do not (%(default)s)"
    )

    length.add_argument(
        "--query-groups",
        metavar="N",
        type=_positive,
        default=1,
        help="sets of queries that learn beside each other, of which one is kept; without masks (%(default)s)",
    )

    machine = train.add_argument_group("images and machine")
    machine.add_argument("--size", metavar="SHORT", type=_positive, help="of the short side (as the config says, 800)")
    machine.add_argument("--augment", choices=("paper", "flip", "none"), default="paper", help="(%(default)s)")
    machine.add_argument("--seed", metavar="S", type=_natural, default=0, help="(%(default)s)")
    machine.add_argument(
        "--workers", metavar="N", type=_natural, default=2, help="read images; change the speed only (%(default)s)"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    machine.add_argument("--amp", action="store_true", help="compute in bfloat16")
    machine.add_argument(
        "--save-every",
        metavar="STEPS",
        type=_positive,
        default=1000,
        help="steps from checkpoint to checkpoint (%(default)s)",
    )
    train.set_defaults(run=_train)

    explain = commands.add_parser(
        "explain",
        allow_abbrev=False,
        help="show what a model sees in an image",
        description="Show what a model sees in an image: sheet.png with the overlay and, for each query that is kept, "
        "its box, its attention in the decoder and its mask; and each of these as a PNG.",
    )
    explain.add_argument("image", metavar="IMAGE", type=_file)
    explain.add_argument("--out", metavar="DIR", type=_output_folder, required=True, help="a new or an empty folder")
    explain.add_argument(
        "--model", metavar="NAME_OR_PATH", default=DEFAULT_MODEL, help="hub id, folder or file (%(default)s)"
    )
    explain.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    explain.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (%(default)s)")
    explain.add_argument(
        "--threshold", metavar="T", type=_unit, default=0.85, help="least score of a query, 0 to 1 (%(default)s)"
    )
    explain.add_argument(
        "--point",
        metavar="X,Y",
        type=_pixel,
        action="append",
        default=[],
        help="a pixel whose attention in the encoder is shown, too; several by repeating it",
    )
    explain.set_defaults(run=_explain_image)

    info = commands.add_parser("info", allow_abbrev=False, help="versions, devices and which code each operation runs")
    info.set_defaults(run=_info)
    return parser


def _folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder" if os.path.exists(text) else f"no folder {text!r}")
    return Path(text)


def _file(text: str) -> Path:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file" if os.path.exists(text) else f"no file {text!r}")
    return Path(text)


def _output_folder(text: str) -> Path:
    if not text or (os.path.lexists(text) and not os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def _output_file(text: str) -> Path:
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder" if text else "must be a path, got none")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def _list(text: str) -> list[str]:
    if not all(entries := [entry.strip() for entry in text.split(",")]):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return entries


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text}")
    return int(i), int(n)


def _pixel(text: str) -> tuple[int, int]:
    x, _, y = text.partition(",")
    if not (x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be X,Y in pixels, got {text}")
    return int(x), int(y)


def _class_thresholds(text: str) -> dict[str, float]:
    pairs = [entry.rpartition("=") for entry in _list(text)]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"must be CLASS=T, got {text!r}")
    return {name: _unit(value) for name, _, value in pairs}


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def _unit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value


@contextmanager
def _argument(name: str) -> Iterator[None]:
    """A ValueError inside is the fault of this argument."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"argument {name}: {error}") from error


def _label(args: argparse.Namespace) -> None:
    from detr_fast.categories import categories_for
    from detr_fast.checkpoint import load_model
    from detr_fast.labeling.manifest import OccupiedError
    from detr_fast.labeling.pipeline import FORMATS, check_engine, class_ids, find_images, label
    from detr_fast.predictor import Predictor, resolve_device, resolve_dtype

    with _argument("IMAGES_DIR"):
        find_images(args.images, args.out)
    with _argument("--engine"):
        check_engine(args.engine, args.workers, args.devices or ())
    with _argument("--formats"):
        if not set(args.formats) <= set(FORMATS):
            raise ValueError(f"must be of {', '.join(FORMATS)}, got {','.join(args.formats)}")
    with _argument("--preview"):
        if args.preview and "panoptic" not in args.formats:
            raise ValueError("shows what is in panoptic/, which --formats leaves out")
    with _argument("--device"):
        device = resolve_device(args.device)
    with _argument("--devices"):
        devices = [resolve_device(name) for name in args.devices or []]
        if len({other.type for other in devices}) > 1:
            raise ValueError(f"must be all GPUs or all cpu, got {','.join(args.devices)}")
    with _argument("--dtype"):
        dtype = resolve_dtype(args.dtype, (devices or [device])[0])
    with _argument("--model"):
        model = load_model(args.model)
        if not model.config.masks:
            raise ValueError(f"label needs a panoptic model, and {args.model} has no mask head")
    categories = categories_for(model.config, model.categories)
    with _argument("--classes"):
        classes = None if args.classes is None else class_ids(args.classes, categories)
    with _argument("--class-threshold"):
        given = [pair for group in args.class_threshold for pair in group.items()]
        ids = class_ids([name for name, _ in given], categories)
        class_thresholds = dict(zip(ids, (value for _, value in given), strict=True))

    predictor = Predictor(
        model,
        device="cpu" if devices else device,
        dtype=dtype,
        threshold=args.threshold,
        class_thresholds=class_thresholds,
        mode=args.mode,
        batch_size=args.batch_size,
        max_size=args.max_size,
    )
    try:
        summary = label(
            args.images,
            args.out,
            predictor,
            progress=sys.stderr.isatty(),
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


def _merge(args: argparse.Namespace) -> None:
    from detr_fast.labeling.shards import merge

    with _argument("OUT_DIR"):
        summary = merge(args.shards, args.out)
    print(f"merged {summary.labelled} images with {summary.segments} segments in {args.out}")


def _synth(args: argparse.Namespace) -> None:
    from detr_fast.data.shapes import MIN_SIDE, write_dataset

    if min(args.size) < MIN_SIDE:
        raise UsageError(
            f"argument --size: must be at least {MIN_SIDE} pixels a side, got {args.size[0]} x {args.size[1]}"
        )
    with _argument("OUT"):
        write_dataset(args.out, args.images, args.seed, tuple(args.size), args.workers, sys.stderr.isatty())
    print(f"wrote {args.images} images in {args.out}")


def _eval(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import load_model
    from detr_fast.evaluation.evaluate import evaluate, table
    from detr_fast.evaluation.ground_truth import GroundTruth
    from detr_fast.files import write_atomic
    from detr_fast.predictor import Predictor, resolve_device, resolve_dtype

    with _argument("--device"):
        device = resolve_device(args.device)
    with _argument("--dtype"):
        dtype = resolve_dtype(args.dtype, device)
    with _argument("--data"):
        truth = GroundTruth.read(args.data, args.split, args.limit)
    with _argument("--model"):
        model = load_model(args.model)
        if truth.instances is None and not model.config.masks:
            raise ValueError(f"{args.model} has no mask head, and {args.data} no instance annotations to score it with")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    predictor = Predictor(model, device=device, dtype=dtype, threshold=args.threshold, mode=args.mode)
    options = {"batch_size": args.batch_size, "padded": args.padded, "size": args.size}
    try:
        found = evaluate(predictor, truth, **options, progress=sys.stderr.isatty())
    except ValueError as error:  # an image or a PNG of the data set
        raise WorkFailed(str(error)) from error
    settings = {"model": args.model, "data": str(args.data), "split": args.split, "limit": args.limit}
    computed = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threshold": args.threshold,
        "mode": args.mode,
    }
    report = json.dumps({**settings, **computed, **options, **found}) + "\n"
    print(table(found), file=sys.stderr)
    if args.out is not None:
        write_atomic(args.out, report.encode())
    sys.stdout.write(report)


def _train(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import read_checkpoint
    from detr_fast.predictor import resolve_device
    from detr_fast.training import train as training
    from detr_fast.training.run import Run

    fields = {field.name for field in dataclasses.fields(training.TrainSettings)}
    settings = training.TrainSettings(**{name: value for name, value in vars(args).items() if name in fields})
    settings = dataclasses.replace(settings, data=os.path.abspath(args.data))
    with _argument("--device"):
        device = resolve_device(args.device)
    with training.world(device) as world:
        with _argument("--out"):
            run = Run(args.out, settings.to_dict() | {"processes": world.size}, args.resume)
            saved = run.load()
        with _argument("--from"):
            checkpoint = read_checkpoint(args.start) if args.start is not None else None
        with _argument("--config"):
            config, _ = training.starting_config(settings, checkpoint)
        with _argument("--data"):
            dataset = training.open_dataset(settings, config)
        with _argument("--config" if checkpoint is None else "--from"):
            model, notes = training.initial_model(settings, dataset, checkpoint)
        trainer = training.Trainer(model, settings, world, len(dataset))
        if saved is not None:
            with _argument("--out"):
                trainer.restore(saved)
        first = world.rank == 0
        for note in notes if first else []:
            print(note, flush=True)
        summary = training.train(trainer, dataset, run, progress=first and sys.stderr.isatty())
    if first and summary.bad_annotations:
        print(f"{summary.bad_annotations} bad annotations skipped, see {args.out / 'bad_annotations.txt'}")
    if summary.signal is not None:
        if first:
            print(f"detr-fast train: stopped after step {summary.steps}; --resume goes on with it", file=sys.stderr)
        raise SystemExit(128 + summary.signal)
    if first:
        print(f"trained {summary.steps} steps in {args.out}")


def _explain_image(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import load_model
    from detr_fast.explanation import check_output, check_points, explain
    from detr_fast.images import read_image
    from detr_fast.predictor import Predictor, resolve_device, resolve_dtype

    with _argument("IMAGE"):
        image = read_image(args.image)
    with _argument("--point"):
        check_points(args.point, image)
    with _argument("--out"):
        check_output(args.out)
    with _argument("--device"):
        device = resolve_device(args.device)
    with _argument("--dtype"):
        dtype = resolve_dtype(args.dtype, device)
    with _argument("--model"):
        model = load_model(args.model)
    predictor = Predictor(model, device=device, dtype=dtype, threshold=args.threshold)
    with _argument("IMAGE"):
        explanation = explain(predictor, image, args.point)
    explanation.save(args.out)
    print(f"explained {len(explanation.queries)} queries in {args.out / 'sheet.png'}")


def _info(args: argparse.Namespace) -> None:
    import torch

    from detr_fast import ops

    print(f"detr_fast {detr_fast.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "numpy", "transformers"):
        print(f"{name} {_version(name)}")
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    _explain(None)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {device.name}, capability {device.major}.{device.minor}, {device.total_memory >> 20} MiB")
        _explain(ops.gpu(torch.device("cuda", index)))
    if not torch.cuda.device_count():
        print("cuda: no device")


def _explain(gpu: ops.Gpu | None) -> None:
    from detr_fast import ops

    for operation, choice, reason in ops.explain(gpu):
        print(f"  {operation}: {choice} ({reason})")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
