"""The `detr-fast` command.

Exit codes: 0 done; 1 the work failed; 2 a usage error; 130 and 143 after SIGINT and SIGTERM. Every failure is one line
on stderr. What a command needs is imported when it runs, so that `--help` and most usage errors come at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import detr_fast

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
    label.set_defaults(run=_label)

    synth = commands.add_parser(
        "synth",
        allow_abbrev=False,
        help="make a synthetic data set",
        description="Draw photograph-like scenes with COCO annotations; the same seed gives the same bytes.",
    )
    synth.add_argument("out", metavar="OUT", type=_output_folder, help="a new or an empty folder")
    synth.add_argument("--images", metavar="N", type=_positive, required=True)
    synth.add_argument("--seed", metavar="S", type=_seed, default=0, help="(%(default)s)")
    synth.add_argument("--size", metavar=("HEIGHT", "WIDTH"), nargs=2, type=_positive, default=(256, 256))
    synth.add_argument("--workers", metavar="N", type=_positive, default=1, help="changes the speed only (%(default)s)")
    synth.set_defaults(run=_synth)

    info = commands.add_parser("info", allow_abbrev=False, help="versions, devices and which code each operation runs")
    info.set_defaults(run=_info)
    return parser


def _folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder" if os.path.exists(text) else f"no folder {text!r}")
    return Path(text)


def _output_folder(text: str) -> Path:
    if not text or (os.path.lexists(text) and not os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


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
    from detr_fast.checkpoint import load_model
    from detr_fast.labeling.pipeline import find_images, label
    from detr_fast.predictor import Predictor, resolve_device, resolve_dtype

    with _argument("IMAGES_DIR"):
        find_images(args.images, args.out)
    with _argument("--device"):
        device = resolve_device(args.device)
    with _argument("--dtype"):
        dtype = resolve_dtype(args.dtype, device)
    with _argument("--model"):
        model = load_model(args.model)
        if not model.config.masks:
            raise ValueError(f"label needs a panoptic model, and {args.model} has no mask head")

    predictor = Predictor(model, device=device, dtype=dtype, threshold=args.threshold, batch_size=args.batch_size)
    summary = label(args.images, args.out, predictor, progress=sys.stderr.isatty())
    if summary.failures:
        first = summary.failures[0]
        raise WorkFailed(
            f"{len(summary.failures)} of {summary.labelled + len(summary.failures)} images failed, "
            f"see {args.out / 'failures.jsonl'}; the first is {first['file']}: {first['error']}"
        )
    print(f"labelled {summary.labelled} images with {summary.segments} segments in {args.out}")


def _synth(args: argparse.Namespace) -> None:
    from detr_fast.data.shapes import MIN_SIDE, write_dataset

    if min(args.size) < MIN_SIDE:
        raise UsageError(
            f"argument --size: must be at least {MIN_SIDE} pixels a side, got {args.size[0]} x {args.size[1]}"
        )
    with _argument("OUT"):
        write_dataset(args.out, args.images, args.seed, tuple(args.size), args.workers, sys.stderr.isatty())
    print(f"wrote {args.images} images in {args.out}")


def _info(args: argparse.Namespace) -> None:
    import torch

    from detr_fast import ops

    print(f"detr_fast {detr_fast.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "numpy", "transformers"):
        print(f"{name} {_version(name)}")
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {device.name}, capability {device.major}.{device.minor}, {device.total_memory >> 20} MiB")
    if not torch.cuda.device_count():
        print("cuda: no device")
    for operation, choice, reason in ops.explain():
        print(f"{operation}: {choice} ({reason})")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
