"""Named tensors and settings of any dialect -> a checkpoint, checked to be complete and finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast.categories import Category
from detr_fast.checkpoint import dialects
from detr_fast.checkpoint.dialects import Tensors
from detr_fast.checkpoint.errors import ACCEPTED, CheckpointError, fail, listed
from detr_fast.checkpoint.weights import CONFIG_FILE
from detr_fast.config import RESNETS, DetrConfig
from detr_fast.detr.segmentation import build_detr

# `DetrConfig` fields that shapes do not tell
_FIELDS = ("nheads", "dilation", "dropout", "aux_loss", "image_size", "max_image_size")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A model as read, checked to be complete and finite.

    Attributes:
        config: sizes, taken from the tensors.
        state_dict: tensors under facebookresearch/detr's names, as saved; they may map the file.
        categories: dicts with "id", "name", "isthing" and "color", or None where the file has none of its own.
        source: the path or name it was read from.
    """

    config: DetrConfig
    state_dict: Tensors
    categories: list[Category] | None
    source: str


def interpret(tensors: dict[str, Any], settings: dict[str, Any], source: str) -> Checkpoint:
    """A checkpoint from named tensors in any dialect and the settings that came with them.

    Args:
        tensors: a state dict.
        settings: the contents of transformers' or our config.json, or {"args": facebookresearch/detr's as a dict}.
        source: named in errors.

    Raises:
        CheckpointError: no DETR, incomplete, mis-shaped, not finite, or a function that `DetrConfig` cannot express.
    """
    state = _plain_state(tensors, source)
    dialect = dialects.dialect_of(state)
    if dialect is None:
        fail(source, f"no DETR: its first parameters are {listed(state)}; accepted are {ACCEPTED}")
    canonical = dialects.to_canonical(state, dialect)
    try:
        fields, claims = _settings(settings, dialect)
        config = _config(canonical, fields, source)
        categories = _categories(settings, config)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: {error}") from error
    for name, (field, value) in claims.items():
        if value != getattr(config, field):
            fail(
                source, f"{CONFIG_FILE} says {name} is {str(value)[:40]}, but the weights have {getattr(config, field)}"
            )
    with torch.device("meta"):
        expected = dialects.unprefixed(build_detr(config).state_dict())
    originals = {dialects.plain_name(name): name for name in tensors}
    check(state, dialects.from_canonical(expected, dialect), source, originals)
    _check_values(state, source, originals)
    return Checkpoint(config, dialects.prefixed(canonical), categories, source)


def _plain_state(tensors: dict[str, Any], source: str) -> Tensors:
    if not tensors or not all(isinstance(name, str) for name in tensors):
        fail(source, f"no weights in it; accepted are {ACCEPTED}")
    state: Tensors = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            fail(source, f"{name[:200]} is no plain tensor but {type(tensor).__name__}; accepted are {ACCEPTED}")
        if dialects.is_state(name):
            plain = dialects.plain_name(name)
            if plain in state:
                fail(source, f"{name} is there twice, with and without a prefix")
            state[plain] = tensor
    return state


def _settings(settings: dict[str, Any], dialect: str) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """`DetrConfig` fields that weights do not tell, and what else the file says of them: {its name: (field, value)}."""
    if settings.get("model_type") == "detr_fast":
        if not isinstance(settings.get("config"), dict):
            raise ValueError('"config" must be an object of DetrConfig\'s fields')
        values = DetrConfig.from_dict(settings["config"]).to_dict()
        fields = {name: values.pop(name) for name in _FIELDS}
        return fields, {name: (name, value) for name, value in values.items()}
    if "model_type" in settings or dialect != "facebookresearch":
        sizes = dialects.TRANSFORMERS_SIZES
        claims = {name: (field, settings[name]) for name, field in sizes.items() if name in settings}
        sizes_of_images = dialects.image_sizes(settings.get("processor", {}))
        return {**dialects.transformers_settings(settings, dialect), **sizes_of_images}, claims
    args = settings.get("args", {})
    for name, accepted in (("pre_norm", (False,)), ("position_embedding", ("sine", "v2"))):
        if args.get(name, accepted[0]) not in accepted:
            raise ValueError(f"trained with {name}={args[name]!r}: another model than DETR as published")
    return {name: args[name] for name in _FIELDS if name in args}, {}


def _categories(settings: dict[str, Any], config: DetrConfig) -> list[Category] | None:
    if settings.get("model_type") != "detr_fast":
        return dialects.transformers_categories(settings.get("id2label"), config)
    categories = settings.get("categories")
    types = {"id": int, "name": str, "isthing": int, "color": list}
    if categories is not None and not (
        isinstance(categories, list)
        and all(
            isinstance(c, dict) and all(isinstance(c.get(key), kind) for key, kind in types.items()) for c in categories
        )
    ):
        raise ValueError('"categories" must be null or a list of objects with id, name, isthing and color')
    return categories


def _config(state: Tensors, fields: dict[str, Any], source: str) -> DetrConfig:
    """Sizes from the shapes of canonical tensors, whose names have no prefix."""

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in state:
            fail(source, f"missing {name}; accepted are {ACCEPTED}")
        if state[name].ndim != ndim:
            fail(source, f"{name} has shape {list(state[name].shape)}, not {ndim} dimensions")
        return state[name].shape

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    depths = tuple(count(f"backbone.0.body.layer{number}.") for number in range(1, 5))
    expansion = 4 if "backbone.0.body.layer1.0.conv3.weight" in state else 1
    backbone = next((name for name, sizes in RESNETS.items() if sizes == (depths, expansion)), None)
    if backbone is None:
        blocks = f"{depths} blocks of {3 if expansion == 4 else 2} convolutions"
        fail(source, f"a backbone with {blocks} is none of {listed(RESNETS, 9)}")
    num_queries, hidden_dim = shape("query_embed.weight", 2)
    masks = any(map(dialects.is_mask_head, state))
    if masks:
        fields = {"nheads": shape("mask_head.lay1.weight", 4)[0] - hidden_dim} | fields
    return DetrConfig(
        backbone=backbone,
        backbone_width=shape("backbone.0.body.conv1.weight", 4)[0],
        hidden_dim=hidden_dim,
        enc_layers=count("transformer.encoder.layers."),
        dec_layers=count("transformer.decoder.layers."),
        dim_feedforward=shape("transformer.decoder.layers.0.linear1.weight", 2)[0],
        num_queries=num_queries,
        num_classes=shape("class_embed.weight", 2)[0] - 1,
        masks=masks,
        **fields,
    )


def check(state: Tensors, expected: Tensors, source: str, originals: dict[str, str] | None = None) -> None:
    """Names and shapes are exactly those expected."""
    originals = originals or {}
    if missing := [name for name in expected if name not in state]:
        fail(source, f"missing {listed(missing)}; accepted are {ACCEPTED}")
    if unexpected := [originals.get(name, name) for name in state if name not in expected]:
        fail(source, f"unexpected {listed(unexpected)}; accepted are {ACCEPTED}")
    if wrong := [
        f"{originals.get(name, name)} {list(state[name].shape)} instead of {list(x.shape)}"
        for name, x in expected.items()
        if state[name].shape != x.shape
    ]:
        fail(source, f"mis-shaped {listed(wrong)}")


def _check_values(state: Tensors, source: str, originals: dict[str, str]) -> None:
    if wrong := [f"{originals[name]} {x.dtype}" for name, x in state.items() if x.dtype not in _FLOATS]:
        fail(source, f"weights of another type than {listed(map(str, _FLOATS), 9)}: {listed(wrong)}")
    if wrong := [originals[name] for name, x in state.items() if not x.isfinite().all()]:
        fail(source, f"NaN or infinite weights in {listed(wrong)}")
