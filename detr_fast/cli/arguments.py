"""The values that options take, the options that several commands have, and how a wrong one is reported."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "facebook/detr-resnet-50-panoptic"


class UsageError(Exception):
    """The command line asks for something that cannot be; the message names the option or path."""


class WorkFailed(Exception):
    """The command was right and its work went wrong."""


@contextmanager
def argument(name: str) -> Iterator[None]:
    """Blames an argument for a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"argument {name}: {error}") from error


# ---- options of several commands ----


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", default=DEFAULT_MODEL, help="hub id, folder or file (%(default)s)"
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (%(default)s)")


def add_threshold(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--threshold", metavar="T", type=unit, default=0.85, help=f"least score of a {what}, 0 to 1 (%(default)s)"
    )


def add_batch_size(parser: argparse._ActionsContainer, default: int, about: str) -> None:
    parser.add_argument("--batch-size", metavar="N", type=positive, default=default, help=f"{about} (%(default)s)")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", type=folder, required=True, help="as synth writes it, or COCO's folder"
    )


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The values of `--device` and `--dtype`.

    Raises:
        UsageError: an unknown name, or a device that this machine lacks.
    """
    from detr_fast.ops import resolve_device, resolve_dtype

    with argument("--device"):
        device = resolve_device(args.device)
    with argument("--dtype"):
        return device, resolve_dtype(args.dtype, device)


# ---- types of values ----


def folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder" if os.path.exists(text) else f"no folder {text!r}")
    return Path(text)


def file(text: str) -> Path:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file" if os.path.exists(text) else f"no file {text!r}")
    return Path(text)


def output_folder(text: str) -> Path:
    if not text or (os.path.lexists(text) and not os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def output_file(text: str) -> Path:
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder" if text else "must be a path, got none")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def names(text: str) -> list[str]:
    if not all(entries := [entry.strip() for entry in text.split(",")]):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return entries


def shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text}")
    return int(i), int(n)


def pixel(text: str) -> tuple[int, int]:
    x, _, y = text.partition(",")
    if not (x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be X,Y in pixels, got {text}")
    return int(x), int(y)


def class_thresholds(text: str) -> dict[str, float]:
    pairs = [entry.rpartition("=") for entry in names(text)]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"must be CLASS=T, got {text!r}")
    return {name: unit(value) for name, _, value in pairs}


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def unit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value
