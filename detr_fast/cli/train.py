"""`detr-fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from detr_fast.cli.arguments import (
    UsageError,
    add_batch_size,
    add_data,
    add_device,
    argument,
    natural,
    non_negative,
    output_folder,
    positive,
    unit,
)

HELP = "train or fine-tune a model"
DESCRIPTION = "Train or fine-tune a model; several processes by torchrun. RUN then works as --model."


def add_options(train: argparse.ArgumentParser) -> None:
    add_data(train)
    train.add_argument("--out", metavar="RUN", type=output_folder, required=True, help="made if missing")
    train.add_argument("--resume", action="store_true", help="go on where the run in RUN stopped, if there is one")
    train.add_argument("--split", metavar="NAME", help="of a data set that has splits, as COCO (train2017)")
    train.add_argument(
        "--annotations",
        choices=("panoptic", "instances"),
        help="what is learnt where there are both (panoptic with a mask head, instances without)",
    )
    train.add_argument("--bad-annotations", choices=("fail", "skip"), default="fail", help="(%(default)s)")

    _add_model_options(train.add_argument_group("model"))
    _add_length_options(train.add_argument_group("length and rates"))
    _add_machine_options(train.add_argument_group("images and machine"))


def _add_model_options(network: argparse._ArgumentGroup) -> None:
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


def _add_length_options(length: argparse._ArgumentGroup) -> None:
    length.add_argument("--epochs", metavar="N", type=positive, default=300, help="(%(default)s)")
    length.add_argument("--steps", metavar="N", type=positive, help="stop after so many at the latest")
    add_batch_size(length, 2, "of a process")
    length.add_argument("--accumulate", metavar="N", type=positive, default=1, help="batches a step (%(default)s)")
    for name, value, about in (
        ("lr", 1e-4, "AdamW's rate"),
        ("lr-backbone", 1e-5, "its rate for the backbone; 0 freezes it"),
        ("weight-decay", 1e-4, "AdamW's"),
        ("clip", 0.1, "largest norm of the gradient; 0: any"),
    ):
        length.add_argument(f"--{name}", metavar="X", type=non_negative, default=value, help=f"{about} (%(default)s)")
    length.add_argument("--schedule", choices=("step", "cosine"), default="step", help="(%(default)s)")
    length.add_argument(
        "--lr-drop", metavar="N", type=positive, default=200, help="epochs until the rates are a tenth (%(default)s)"
    )
    length.add_argument("--warmup", metavar="N", type=natural, default=0, help="steps of growing rates (%(default)s)")
    length.add_argument(
        "--ema", metavar="DECAY", type=unit, default=0.0, help="average the weights; 0: do not (%(default)s)"
    )
    length.add_argument(
        "--query-groups",
        metavar="N",
        type=positive,
        default=1,
        help="sets of queries that learn beside each other, of which one is kept; without masks (%(default)s)",
    )


def _add_machine_options(machine: argparse._ArgumentGroup) -> None:
    machine.add_argument("--size", metavar="SHORT", type=positive, help="of the short side (as the config says, 800)")
    machine.add_argument("--augment", choices=("paper", "flip", "none"), default="paper", help="(%(default)s)")
    machine.add_argument("--seed", metavar="S", type=natural, default=0, help="(%(default)s)")
    machine.add_argument(
        "--workers", metavar="N", type=natural, default=2, help="read images; change the speed only (%(default)s)"
    )
    add_device(machine)
    machine.add_argument("--amp", action="store_true", help="compute in bfloat16")
    machine.add_argument(
        "--save-every",
        metavar="STEPS",
        type=positive,
        default=1000,
        help="steps from checkpoint to checkpoint (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from detr_fast.checkpoint import read_checkpoint
    from detr_fast.files import OccupiedError
    from detr_fast.ops import resolve_device
    from detr_fast.training import train as training
    from detr_fast.training.run import PREVIOUS, RunFolder

    fields = {field.name for field in dataclasses.fields(training.TrainSettings)}
    settings = training.TrainSettings(**{name: value for name, value in vars(args).items() if name in fields})
    settings = dataclasses.replace(settings, data=os.path.abspath(args.data))
    with argument("--device"):
        device = resolve_device(args.device)
    with training.world(device) as world:
        with argument("--out"):
            run = RunFolder(args.out, settings.to_dict() | {"processes": world.size}, args.resume)
            saved = run.load()
        with argument("--from"):
            checkpoint = read_checkpoint(args.start) if args.start is not None else None
        with argument("--config"):
            config, _ = training.starting_config(settings, checkpoint)
        with argument("--data"):
            dataset = training.open_dataset(settings, config)
        with argument("--config" if checkpoint is None else "--from"):
            model, notes = training.initial_model(settings, dataset, checkpoint)
        trainer = training.Trainer(model, settings, world, len(dataset))
        if saved is not None:
            with argument("--out"):
                trainer.restore(saved)
        first = world.rank == 0
        if first and run.damage is not None:
            print(
                f"detr-fast train: {run.damage}; going on from {PREVIOUS}, step {trainer.step_number}", file=sys.stderr
            )
        for note in notes if first else []:
            print(note, flush=True)
        try:
            summary = training.train(trainer, dataset, run, progress=first and sys.stderr.isatty())
        except OccupiedError as error:
            raise UsageError(f"argument --out: {error}") from error
    if first and summary.bad_annotations:
        print(f"{summary.bad_annotations} bad annotations skipped, see {args.out / 'bad_annotations.txt'}")
    if summary.signal is not None:
        if first:
            print(f"detr-fast train: stopped after step {summary.steps}; --resume goes on with it", file=sys.stderr)
        raise SystemExit(128 + summary.signal)
    if first:
        print(f"trained {summary.steps} steps in {args.out}")
