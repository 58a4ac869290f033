"""`detr-fast merge`."""

from __future__ import annotations

import argparse

from detr_fast.cli.arguments import WorkFailed, argument, folder, output_folder

HELP = "join the outputs of label --shard"
DESCRIPTION = "Join the outputs of label --shard to what one run over all the images writes."


def add_options(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("shards", metavar="OUT_DIR", nargs="+", type=folder, help="of label, one for each shard")
    merge.add_argument("--out", metavar="OUT_DIR", type=output_folder, required=True, help="a new or an empty folder")


def run(args: argparse.Namespace) -> None:
    from detr_fast.labeling.shards import IncompleteError, merge_shards

    with argument("OUT_DIR"):
        try:
            summary = merge_shards(args.shards, args.out)
        except IncompleteError as error:
            raise WorkFailed(str(error)) from error
    print(f"merged {summary.labelled} images with {summary.segments} segments in {args.out}")
