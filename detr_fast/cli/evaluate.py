"""`detr-fast eval`."""

from __future__ import annotations

import argparse
import json
import sys

from detr_fast.cli.arguments import (
    WorkFailed,
    add_batch_size,
    add_data,
    add_device,
    add_dtype,
    add_model,
    add_threshold,
    argument,
    device_and_dtype,
    output_file,
    positive,
)

HELP = "score a model on a data set"
DESCRIPTION = (
    "Score a model on a data set: box and mask AP, and panoptic quality, in percent. Prints a JSON report on "
    "standard output and a table on standard error."
)


def add_options(evaluate: argparse.ArgumentParser) -> None:
    add_data(evaluate)
    evaluate.add_argument("--split", metavar="NAME", help="of a data set that has splits, as COCO (val2017)")
    add_model(evaluate)
    evaluate.add_argument("--out", metavar="FILE", type=output_file, help="write the report there, too")
    evaluate.add_argument("--limit", metavar="N", type=positive, help="take the first N images only")
    add_device(evaluate)
    add_dtype(evaluate)
    add_batch_size(evaluate, 1, "changes the speed only, unless --padded")
    evaluate.add_argument(
        "--padded", action="store_true", help="pad images of different shapes to one batch, as the original evaluation"
    )
    evaluate.add_argument(
        "--size", metavar="SHORT", type=positive, help="of the images' shorter side (what the model is made for)"
    )
    add_threshold(evaluate, "segment")
    evaluate.add_argument(
        "--mode",
        choices=("detr", "corrected", "transformers"),
        default="detr",
        help="how masks become segments: as in facebookresearch/detr, as in label, or as in transformers (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import load_model
    from detr_fast.evaluation.evaluate import evaluate, table
    from detr_fast.evaluation.ground_truth import GroundTruth
    from detr_fast.files import write_atomic
    from detr_fast.predictor import Predictor

    device, dtype = device_and_dtype(args)
    with argument("--data"):
        truth = GroundTruth.read(args.data, args.split, args.limit)
    with argument("--model"):
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
