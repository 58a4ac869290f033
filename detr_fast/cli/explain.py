"""`detr-fast explain`."""

from __future__ import annotations

import argparse

from detr_fast.cli.arguments import (
    add_device,
    add_dtype,
    add_model,
    add_threshold,
    argument,
    device_and_dtype,
    file,
    output_folder,
    pixel,
)

HELP = "show what a model sees in an image"
DESCRIPTION = (
    "Show what a model sees in an image: sheet.png with the overlay and, for each query that is kept, its box, "
    "its attention in the decoder and its mask; and each of these as a PNG."
)


def add_options(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("image", metavar="IMAGE", type=file)
    explain.add_argument("--out", metavar="DIR", type=output_folder, required=True, help="a new or an empty folder")
    add_model(explain)
    add_device(explain)
    add_dtype(explain)
    add_threshold(explain, "query")
    explain.add_argument(
        "--point",
        metavar="X,Y",
        type=pixel,
        action="append",
        default=[],
        help="a pixel whose attention in the encoder is shown, too; several by repeating it",
    )


def run(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import load_model
    from detr_fast.explanation import check_output, check_points, explain
    from detr_fast.images import read_image
    from detr_fast.predictor import Predictor

    with argument("IMAGE"):
        image = read_image(args.image)
    with argument("--point"):
        check_points(args.point, image)
    with argument("--out"):
        check_output(args.out)
    device, dtype = device_and_dtype(args)
    with argument("--model"):
        model = load_model(args.model)
    predictor = Predictor(model, device=device, dtype=dtype, threshold=args.threshold)
    with argument("IMAGE"):
        explanation = explain(predictor, image, args.point)
    explanation.save(args.out)
    print(f"explained {len(explanation.queries)} queries in {args.out / 'sheet.png'}")
