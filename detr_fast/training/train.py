"""Training (Carion et al. 2020, section A.4; facebookresearch/detr, main.py and engine.py).

settings = TrainSettings(data="DIR", config="detr_resnet50_panoptic")
config, _ = starting_config(settings, checkpoint=None)
dataset = open_dataset(settings, config)
model, notes = initial_model(settings, dataset, checkpoint=None)
with world(torch.device("cpu")) as processes:
    trainer = Trainer(model, settings, processes, len(dataset))
    train(trainer, dataset, RunFolder("RUN", settings.to_dict()))
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from detr_fast import ops
from detr_fast.checkpoint import Checkpoint, dialects
from detr_fast.config import PRESETS, DetrConfig
from detr_fast.data.coco import (
    AnnotationError,
    CocoDataset,
    CocoDetection,
    CocoPanoptic,
    find_training_split,
    training_transforms,
)
from detr_fast.detr.backbone import LiveBatchNorm2d, thaw_batch_norm
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm, build_detr
from detr_fast.predictor import Predictor
from detr_fast.training.criterion import SetCriterion, forward_matched
from detr_fast.training.loader import Batch, Order, Portions, batches, mixed
from detr_fast.training.matcher import HungarianMatcher
from detr_fast.training.pictures import curves, predictions
from detr_fast.training.run import LOG, RunFolder
from detr_fast.training.workers import WorkerDied

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask": 1.0, "loss_dice": 1.0}
EOS_COEF = 0.1
ATTENTION_GAIN = 256.0
QUERIES = "query_embed.weight"
PICTURES = 4  # rows of a sample of predictions
LOGGED = ("class_error", "cardinality_error", *WEIGHTS)


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training; defaults are facebookresearch/detr's.

    Attributes:
        data: the data set's folder.
        split: which of its splits; None: the only one, or train2017.
        annotations: "panoptic" or "instances"; None: panoptic for a model with masks, instances for one without, as
            far as the data set has them.
        config: a name of `config.PRESETS`, a JSON file of `DetrConfig`'s fields, or such JSON itself; None: that of
            `start`, or detr_resnet50_panoptic.
        masks: with or without the mask head, whatever `config` says; None: as it says.
        start: a checkpoint to start from: hub id, folder or file.
        freeze_detr: train the mask head alone.
        batch_norm: "frozen", for a pretrained backbone, whose stem and first stage are then frozen too, or "train".
        epochs, steps: the training ends after the fewer; steps=None: by epochs alone.
        batch_size: images that a process computes at once.
        accumulate: such batches a step.
        lr, lr_backbone: AdamW's rates; a backbone with rate 0 is frozen.
        weight_decay: AdamW's.
        clip: largest norm of the gradient; 0: any.
        schedule: "step": a tenth of the rates after each `lr_drop` epochs; "cosine": half a cosine down to 0.
        lr_drop: epochs.
        warmup: steps over which the rates grow linearly from 0.
        query_groups: sets of object queries that learn beside each other, of which the first is kept (Group DETR, Chen
            et al. 2023): an object then teaches as many queries at once. Boxes only: a mask head is trained afterwards.
        ema: decay of a moving average of the weights, which is then saved in their place; 0: none.
        amp: compute in bfloat16 what `DETR.forward`'s `dtype` covers.
        size: pixels of the images' short side, the long one having at most 5 / 3 of them; None: as the config says.
        augment: "paper", "flip" or "none", as `training_transforms` takes it.
        seed: of weights, order, augmentation and dropout.
        bad_annotations: "fail" or "skip".
        workers: processes that read images, for each that trains.
        save_every: steps.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    data: str
    split: str | None = None
    annotations: str | None = None
    config: str | None = None
    masks: bool | None = None
    start: str | None = None
    freeze_detr: bool = False
    batch_norm: str = "frozen"
    epochs: int = 300
    steps: int | None = None
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 1e-4
    lr_backbone: float = 1e-5
    weight_decay: float = 1e-4
    clip: float = 0.1
    schedule: str = "step"
    lr_drop: int = 200
    warmup: int = 0
    query_groups: int = 1
    ema: float = 0.0
    amp: bool = False
    size: int | None = None
    augment: str = "paper"
    seed: int = 0
    bad_annotations: str = "fail"
    workers: int = 2
    save_every: int = 1000
    device: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Summary:
    """How a training ended: after so many steps in all, and by which signal if not by itself."""

    steps: int
    loss: float
    signal: int | None
    bad_annotations: int


class Diverged(RuntimeError):
    """Predictions, losses or gradients are no longer finite, and the training cannot go on."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"step {step}: {reason}; a lower --lr or a longer --warmup may help")


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, joined by NCCL or on CPUs by gloo; else this one alone."""
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(0, 1, device)
        return
    if ops.is_gpu(device):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if ops.is_gpu(device) else "gloo")
    try:
        yield World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    finally:
        torch.distributed.destroy_process_group()


# ---- data set and first weights ----


def open_dataset(settings: TrainSettings, config: DetrConfig) -> CocoDataset:
    """The data set with its augmentation, for a model of `config`.

    Raises:
        ValueError: as `CocoDataset`, or annotations that the data set lacks.
    """
    split = find_training_split(settings.data, settings.split)
    kind = settings.annotations
    if kind is None:
        panoptic = split.panoptic_json is not None and (config.masks or split.instances_json is None)
        kind = "panoptic" if panoptic else "instances"
    opened = {"panoptic": CocoPanoptic, "instances": CocoDetection}[kind]
    transforms = training_transforms(config.image_size, config.max_image_size, settings.augment)
    return opened(split, masks=config.masks, transforms=transforms, bad_annotations=settings.bad_annotations)


def read_config(text: str) -> tuple[DetrConfig, bool]:
    """A config by name, file or JSON, and whether it says how many classes there are.

    Raises:
        ValueError: no such name or file, not JSON, or not a `DetrConfig`'s fields.
    """
    if text in PRESETS:
        return PRESETS[text], False
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"no config {text!r}: give one of {', '.join(PRESETS)}, a JSON file, or JSON")
        text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be an object of DetrConfig's fields, got {type(fields).__name__}")
    try:
        return DetrConfig.from_dict(fields), "num_classes" in fields
    except TypeError as error:
        raise ValueError(str(error)) from error


def starting_config(settings: TrainSettings, checkpoint: Checkpoint | None) -> tuple[DetrConfig, bool]:
    """The config that `settings` ask for, and whether its number of classes is meant, or is the data set's to say.

    Raises:
        ValueError: as `read_config`, or a mask head to train alone, but none there.
    """
    if settings.config is not None:
        config, says_classes = read_config(settings.config)
    else:
        config, says_classes = checkpoint.config if checkpoint else PRESETS["detr_resnet50_panoptic"], False
    if settings.masks is not None:
        config = config.replace(masks=settings.masks)
    if settings.size is not None:
        config = config.replace(image_size=settings.size, max_image_size=settings.size * 1333 // 800)
    if settings.query_groups > 1 and config.masks:
        raise ValueError("query_groups is for boxes: train without masks, then the mask head alone with freeze_detr")
    if settings.freeze_detr and not config.masks:
        raise ValueError("it has no mask head to train while the rest is frozen")
    return config, says_classes


def initial_model(
    settings: TrainSettings, dataset: CocoDataset, checkpoint: Checkpoint | None
) -> tuple[DETR | DETRsegm, list[str]]:
    """The model before the first step, and a line for each part that is not from its checkpoint.

    Raises:
        ValueError: a config and a checkpoint of different sizes, or too few classes for the data set.
    """
    config, says_classes = starting_config(settings, checkpoint)
    if not says_classes:
        config = config.replace(num_classes=dataset.num_classes)
    elif config.num_classes < dataset.num_classes:
        raise ValueError(f"num_classes is {config.num_classes}, but {dataset.path} needs {dataset.num_classes}")
    torch.manual_seed(settings.seed)
    model = build_detr(config)
    if isinstance(model, DETRsegm):
        _wake_attention(model)
    notes = _load(model, checkpoint) if checkpoint else []
    model.categories = dataset.categories
    return model, notes


def _wake_attention(model: DETRsegm) -> None:
    """Attention maps are a softmax over heads and positions, thousandths at first: with the first weights of an
    ordinary layer a mask head takes hundreds of steps to see that queries differ."""
    with torch.no_grad():
        model.mask_head.lay1.weight[:, model.config.hidden_dim :] *= ATTENTION_GAIN


def _load(model: DETR | DETRsegm, checkpoint: Checkpoint) -> list[str]:
    """Copies all of a checkpoint that the model has, except the class head where the number of classes differs."""
    ours, theirs = model.config, checkpoint.config
    free = ("num_classes", "masks", "dropout", "aux_loss", "image_size", "max_image_size")
    for name, value in ours.to_dict().items():
        if name not in free and value != getattr(theirs, name):
            raise ValueError(f"{checkpoint.source} has {name} {getattr(theirs, name)}, the config {value}")
    state = dialects.unprefixed(checkpoint.state_dict)
    target = dialects.unprefixed(model.state_dict())
    notes = []
    skipped: tuple[str, ...] = ()
    if ours.num_classes != theirs.num_classes:
        skipped = ("class_embed.weight", "class_embed.bias")
        notes.append(
            f"class_embed starts anew: {ours.num_classes} classes, not {theirs.num_classes} as in the checkpoint"
        )
    if ours.masks and not theirs.masks:
        notes.append("the mask head starts anew: the checkpoint has none")
    with torch.no_grad():
        for name, tensor in target.items():
            if name in state and name not in skipped:
                tensor.copy_(state[name])
    return notes


# ---- one step ----


class LossModule(nn.Module):
    """A model and its criterion as one module, as DistributedDataParallel needs them."""

    def __init__(
        self,
        model: DETR | DETRsegm,
        criterion: SetCriterion,
        query_groups: int = 1,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.query_groups = query_groups
        self.dtype = dtype

    def forward(self, samples: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.query_groups == 1:
            return forward_matched(self.model, samples, targets, self.criterion, self.dtype)[1]
        # self-attention keeps the groups apart, and each is matched on its own, as if it were another image's
        outputs = self.model(samples, dtype=self.dtype)
        grouped = [_one_group_an_image(layer, self.query_groups) for layer in (outputs, *outputs["aux_outputs"])]
        repeated = [target for target in targets for _ in range(self.query_groups)]
        return self.criterion({**grouped[0], "aux_outputs": grouped[1:]}, repeated)


def _one_group_an_image(outputs: dict[str, Any], groups: int) -> dict[str, Tensor]:
    """Predictions [B,groups*Q,...] as those of groups * B images: their losses are then means over the groups."""
    return {name: outputs[name].unflatten(1, (groups, -1)).flatten(0, 1) for name in ("pred_logits", "pred_boxes")}


def build_criterion(config: DetrConfig, aux_loss: bool = True) -> SetCriterion:
    """Upstream's losses and weights, which each auxiliary layer has too."""
    weights = {
        name: weight for name, weight in WEIGHTS.items() if config.masks or name not in ("loss_mask", "loss_dice")
    }
    for layer in range(config.dec_layers - 1 if aux_loss else 0):
        weights |= {f"{name}_{layer}": WEIGHTS[name] for name in ("loss_ce", "loss_bbox", "loss_giou")}
    losses = ["labels", "boxes", "cardinality", *(["masks"] if config.masks else [])]
    return SetCriterion(config.num_classes, HungarianMatcher(1, 5, 2), weights, EOS_COEF, losses)


class Trainer:
    """A model with its optimiser and its average, and the step that changes them."""

    def __init__(self, model: DETR | DETRsegm, settings: TrainSettings, world: World, images: int):
        self.model = model
        self.settings = settings
        self.world = world
        self.images_per_step = settings.batch_size * settings.accumulate * world.size
        self.steps_per_epoch = images / self.images_per_step
        self.total_steps = math.ceil(settings.epochs * images / self.images_per_step)
        self.total_steps = min(self.total_steps, settings.steps or self.total_steps)
        self.step_number = 0  # steps done
        detr = model.detr if isinstance(model, DETRsegm) else model
        if settings.batch_norm == "train" and not settings.freeze_detr:
            thaw_batch_norm(detr.backbone)
        _freeze(model, settings)
        if settings.query_groups > 1:
            _add_query_groups(detr, settings.query_groups)
        model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as gradients are
        model.aux_loss = not settings.freeze_detr  # without gradients, losses of inner layers are of no use
        criterion = build_criterion(model.config, model.aux_loss).to(world.device)
        self.losses: nn.Module = LossModule(
            model, criterion, settings.query_groups, torch.bfloat16 if settings.amp else None
        )
        self.weights = criterion.weight_dict
        if world.size > 1:
            self.losses = DistributedDataParallel(
                self.losses, device_ids=[world.device.index] if ops.is_gpu(world.device) else None
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        backbone = [p for n, p in model.named_parameters() if p.requires_grad and "backbone" in n]
        others = [p for n, p in model.named_parameters() if p.requires_grad and "backbone" not in n]
        groups = [{"params": others, "base": settings.lr}, {"params": backbone, "base": settings.lr_backbone}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.average = {name: x.clone() for name, x in model.state_dict().items()} if settings.ema else None
        live = [module for module in model.modules() if isinstance(module, LiveBatchNorm2d)]
        self.statistics = [x for norm in live for x in (norm.running_mean, norm.running_var)]

    def step(self, portions: Sequence[Batch]) -> dict[str, float]:
        """One update from `accumulate` batches: `learn`, then `update`."""
        numbers = self.learn(portions)
        self.update()
        return numbers

    def learn(self, portions: Sequence[Batch]) -> dict[str, float]:
        """The gradients of `accumulate` batches; returns the numbers of the log.

        Whatever is raised, a signal's exception too, leaves the model as before.

        Raises:
            Diverged: a loss or gradient that is not finite.
        """
        before = [x.clone() for x in self.statistics]
        try:
            return self._learn(portions)
        except BaseException:
            for x, value in zip(self.statistics, before, strict=True):
                x.copy_(value)
            self.optimizer.zero_grad()
            raise

    def _learn(self, portions: Sequence[Batch]) -> dict[str, float]:
        self._train_mode()
        rates = self._set_rates()
        # Nothing random outlives a step, so none of it has to be saved.
        seed = mixed(self.settings.seed, self.step_number, self.world.rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        ddp = self.losses if isinstance(self.losses, DistributedDataParallel) else None
        sums: dict[str, Tensor] = {}
        for part, batch in enumerate(portions):
            more = part < len(portions) - 1
            with ddp.no_sync() if ddp is not None and more else nullcontext():
                losses = self._losses(batch)
                total = sum((weight * losses[name] for name, weight in self.weights.items()), start=torch.zeros(()))
                (total / len(portions)).backward()
            for name, value in {"loss": total, **losses}.items():
                if name == "loss" or name in LOGGED:
                    sums[name] = sums.get(name, 0) + value.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        values = torch.stack([x.float() for x in sums.values()]) / len(portions)
        if self.world.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.world.size
        *numbers, grad_norm = torch.cat([values, norm.float()[None]]).tolist()
        named = dict(zip(sums, numbers, strict=True))
        if not math.isfinite(named["loss"]) or not math.isfinite(grad_norm):
            reason = f"the loss is {named['loss']} and the gradient's norm {grad_norm}"
            raise Diverged(self.step_number + 1, reason)
        return {**named, "grad_norm": grad_norm, "lr": rates}

    def update(self) -> None:
        """Changes the weights by the gradients of `learn`."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        self._update_average()

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        device = self.world.device
        samples = batch.samples.to(device)
        targets = [{key: value.to(device, non_blocking=True) for key, value in t.items()} for t in batch.targets]
        try:
            return self.losses(samples, targets)
        except ValueError as error:  # the matcher refuses predictions that are not finite
            raise Diverged(self.step_number + 1, str(error)) from error

    def _train_mode(self) -> None:
        self.model.train()
        if self.settings.freeze_detr:
            assert isinstance(self.model, DETRsegm)
            self.model.detr.eval()  # the mask head learns from what inference will give it

    def _set_rates(self) -> float:
        """Sets the rates of this step and returns that of the transformer, or mask head."""
        factor = rate_factor(self.settings, self.step_number, self.total_steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor
        return self.optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        # the first weights are random: they must not weigh 1 / (1 - decay) steps
        decay = min(self.settings.ema, (1 + self.step_number) / (10 + self.step_number))
        averages, current = zip(*((self.average[n], x) for n, x in self.model.state_dict().items()), strict=True)
        torch._foreach_lerp_(averages, current, 1 - decay)

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint: the model for use, and under "training" the state to resume from."""
        weights = self.model.state_dict()
        training: dict[str, Any] = {"step": self.step_number, "optimizer": self.optimizer.state_dict()}
        usable = dict(self.average or weights)
        if self.average is not None:
            training["model"] = weights
        if self.settings.query_groups > 1:
            training["queries"] = usable[QUERIES]
            usable[QUERIES] = usable[QUERIES][: self.model.config.num_queries].clone()  # saved without the rest
        return {
            "model": usable,
            "config": self.model.config.to_dict(),
            "categories": self.model.categories,
            "training": training,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`; raises ValueError where it does not fit."""
        training = state["training"]
        try:
            usable = dict(state["model"])
            if self.settings.query_groups > 1:
                usable[QUERIES] = training["queries"]
            self.model.load_state_dict(training.get("model", usable))
            self.optimizer.load_state_dict(training["optimizer"])
            if self.average is not None:
                for name, x in self.average.items():
                    x.copy_(usable[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the checkpoint is of another model: {' '.join(str(error).split())[:200]}") from error
        self.step_number = training["step"]

    def usable_model(self) -> DETR | DETRsegm:
        """A copy in evaluation mode, with averaged weights if there are any, on the CPU."""
        model = build_detr(self.model.config)
        model.load_state_dict(self.state()["model"])
        model.categories = self.model.categories
        return model.eval()


def _add_query_groups(detr: DETR, groups: int) -> None:
    """More sets of queries, at random, beside those that a model has."""
    first = detr.query_embed.weight.detach()
    detr.query_embed = nn.Embedding(groups * len(first), first.shape[1])
    with torch.no_grad():
        detr.query_embed.weight[: len(first)] = first
    for layer in detr.transformer.decoder.layers:
        layer.query_groups = groups


def rate_factor(settings: TrainSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """The factor of the rates at step `step` (from 0)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, total_steps - settings.warmup)))
    return 0.1 ** (step // (settings.lr_drop * steps_per_epoch))


def _freeze(model: DETR | DETRsegm, settings: TrainSettings) -> None:
    """As upstream: a pretrained stem and first stage keep their weights, and so does a backbone of rate 0."""
    if settings.freeze_detr:
        assert isinstance(model, DETRsegm)
        model.detr.requires_grad_(False)
    for name, parameter in model.named_parameters():
        _, within, layer = name.partition("backbone.0.body.")
        early = settings.batch_norm == "frozen" and not layer.startswith(("layer2", "layer3", "layer4"))
        if within and (early or not settings.lr_backbone):
            parameter.requires_grad_(False)


# ---- the training ----


def train(trainer: Trainer, dataset: CocoDataset, run: RunFolder, progress: bool = False) -> Summary:
    """Trains in the folder `run` until all steps are done.

    SIGINT or SIGTERM ends it with a checkpoint, whatever the workers do; a second one ends it at once. One process
    abandons the step it is in; several end after the same step.

    Args:
        trainer: restored from `run.load()`, if there is something.
        dataset: with the number of images that the trainer was told.
        run: of the first process; others do not write.
        progress: show a progress bar on stderr.

    Raises:
        OccupiedError: another process trains in the folder.
        Diverged: a loss is not finite.
        WorkerDied: a process that reads images died; the steps before are in the checkpoint.
        RuntimeError: a bad annotation that is not to be skipped.
        OSError: the folder cannot be written.
    """
    settings, world, total = trainer.settings, trainer.world, trainer.total_steps
    order = Order(len(dataset), settings.seed)
    steps = range(trainer.step_number, total)
    portions = Portions(order, settings.batch_size, settings.accumulate, steps, world.rank, world.size)
    writes = world.rank == 0
    problems, loss = list(dataset.problems), math.nan
    with run.locked() if writes else nullcontext(), StopSignals() as stop:
        if writes:
            run.start(trainer.step_number)
        with (
            tqdm(total=total, initial=steps.start, unit="step", disable=not (progress and writes)) as bar,
            open(run.folder / LOG if writes else os.devnull, "a", buffering=1, encoding="utf-8") as log,
            closing(batches(dataset, portions, settings.workers, ops.is_gpu(world.device), stop.received)) as source,
        ):
            clock = time.perf_counter()
            while trainer.step_number < total:
                try:
                    numbers = _learn_next(trainer, source, stop, problems)
                except WorkerDied:
                    if writes:
                        run.save(trainer.state())
                    raise
                if numbers is None:
                    break
                trainer.update()
                step, loss = trainer.step_number, numbers["loss"]
                clock, before = time.perf_counter(), clock
                epoch = order[step * trainer.images_per_step - 1].epoch + 1
                speed = trainer.images_per_step / (clock - before)
                entry = {"step": step, "epoch": epoch, **numbers, "images_per_s": speed}
                log.write(json.dumps({key: _short(value) for key, value in entry.items()}) + "\n")
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if writes and step % settings.save_every == 0:
                    run.save(trainer.state())
                ends_epoch = order[step * trainer.images_per_step].epoch + 1 != epoch
                if writes and (ends_epoch or step == total):
                    with suppress(Stopped), stop.interrupting():
                        draw(trainer, dataset, run, epoch)
        if writes:
            run.save(trainer.state())
            run.note_bad(problems)
    return Summary(trainer.step_number, loss, stop.received[0] if stop.received else None, len(problems))


def _learn_next(
    trainer: Trainer, source: Iterator[Batch], stop: StopSignals, problems: list[str]
) -> dict[str, float] | None:
    """The numbers of the step from the next batches of `source`, before its update; None if the training is to stop."""
    alone = trainer.world.size == 1  # the steps of several processes wait for each other: none may leave one
    with suppress(Stopped), stop.interrupting() if alone else nullcontext():
        batch = list(islice(source, trainer.settings.accumulate))
        if not _anyone(stop.received, trainer.world):
            _note_problems(batch, problems, trainer.settings)
            return trainer.learn(batch)
    return None


def draw(trainer: Trainer, dataset: CocoDataset, run: RunFolder, epoch: int) -> None:
    """Draws the curves so far, and the model's predictions on the data set's first images without augmentation."""
    run.save_picture("loss.png", curves(run.log()))
    predictor = Predictor(trainer.usable_model(), device="cpu", threshold=0.5)
    samples = []
    for index in range(min(PICTURES, len(dataset))):
        with suppress(AnnotationError):
            samples.append(dataset.read(index))
    if samples:
        run.save_picture(f"predictions/epoch_{epoch:04d}.jpg", predictions(predictor, samples))


def _short(value: Any) -> Any:
    """Floats with as many digits as float32 has."""
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _note_problems(batch: Sequence[Batch], problems: list[str], settings: TrainSettings) -> None:
    new = [problem for portion in batch for problem in portion.problems if problem not in problems]
    if new and settings.bad_annotations == "fail":
        raise RuntimeError(f"bad annotation: {new[0]}")
    problems += new
    if any(not portion.targets for portion in batch):
        raise RuntimeError(f"no image can be used, the last fault: {problems[-1]}")


class Stopped(BaseException):
    """A signal that `StopSignals` received tells the training to stop."""


class StopSignals:
    """Collects the first SIGINT or SIGTERM within it; the second goes to the handler that was there before."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._interrupts = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: object) -> None:
        self.received.append(number)
        self._restore()
        if self._interrupts:
            raise Stopped

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block that the signal ends with `Stopped`, wherever it is in it."""
        self._interrupts = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._interrupts = False


def _anyone(stop: list[int], world: World) -> bool:
    """Whether any process was told to stop: all must end after the same step."""
    if world.size == 1:
        return bool(stop)
    flag = torch.tensor(float(stop[0]) if stop else 0.0, device=world.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    if flag.item() and not stop:
        stop.append(int(flag.item()))
    return bool(stop)
