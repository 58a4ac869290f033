"""`detr-fast synth`."""

from __future__ import annotations

import argparse
import sys

from detr_fast.cli.arguments import UsageError, argument, natural, output_folder, positive

HELP = "make a synthetic data set"
DESCRIPTION = "Draw photograph-like scenes with COCO annotations; the same seed gives the same bytes."


def add_options(synth: argparse.ArgumentParser) -> None:
    synth.add_argument("out", metavar="OUT", type=output_folder, help="a new or an empty folder")
    synth.add_argument("--images", metavar="N", type=positive, required=True)
    synth.add_argument("--seed", metavar="S", type=natural, default=0, help="(%(default)s)")
    synth.add_argument("--size", metavar=("HEIGHT", "WIDTH"), nargs=2, type=positive, default=(256, 256))
    synth.add_argument("--workers", metavar="N", type=positive, default=1, help="changes the speed only (%(default)s)")


def run(args: argparse.Namespace) -> None:
    from detr_fast.data.shapes import MIN_SIDE, write_dataset

    if min(args.size) < MIN_SIDE:
        raise UsageError(
            f"argument --size: must be at least {MIN_SIDE} pixels a side, got {args.size[0]} x {args.size[1]}"
        )
    with argument("OUT"):
        write_dataset(args.out, args.images, args.seed, tuple(args.size), args.workers, sys.stderr.isatty())
    print(f"wrote {args.images} images in {args.out}")
