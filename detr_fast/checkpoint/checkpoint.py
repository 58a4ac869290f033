"""Reading and writing models: one reader for every dialect, and writers for ours and transformers'."""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from detr_fast.checkpoint import dialects
from detr_fast.checkpoint.conversion import Checkpoint, check, interpret
from detr_fast.checkpoint.dialects import Tensors
from detr_fast.checkpoint.download import TORCH_HUB_FILES, hub_folder, torch_hub_file
from detr_fast.checkpoint.errors import ACCEPTED, CheckpointError, fail, listed
from detr_fast.checkpoint.weights import (
    CONFIG_FILE,
    HUB_WEIGHT_FILES,
    PROCESSOR_FILE,
    WEIGHT_FILES,
    read_json,
    read_shards,
    read_tensors,
)
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm, build_detr
from detr_fast.files import open_atomic

MODELS = Path(__file__).parents[1] / "models"
BUNDLED = ("shapes",)  # folders in MODELS, each with a card, README.md

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".json")


def read_checkpoint(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Reads a DETR in any dialect.

    Args:
        name_or_path: a folder or file; else one of `BUNDLED`, which the package brings; else one of
            facebookresearch/detr's Torch Hub names ("detr_resnet50_panoptic"), cached under TORCH_HOME; else a Hugging
            Face hub id ("facebook/detr-resnet-50"), cached under HF_HOME. What a cache has is used without asking the
            network.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: nothing there, no network, not a DETR, unsafe, damaged, incomplete, mis-shaped or not finite.
        TypeError: name_or_path is neither a string nor a path.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a string or a path, got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return _read_folder(Path(name), name)
    if os.path.exists(name):
        return _read_file(Path(name), name)
    if name in BUNDLED:
        return _read_folder(MODELS / name, name)
    if name in TORCH_HUB_FILES:
        return _read_file(torch_hub_file(name), name)
    if isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(_SUFFIXES):
        return _read_folder(hub_folder(name, revision), name)
    raise CheckpointError(
        f"{name[:200]!r}: no such file or folder, nor a model's name; accepted are {ACCEPTED}, a hub id such as "
        f"facebook/detr-resnet-50, and {', '.join((*BUNDLED, *TORCH_HUB_FILES))}"
    )


def load_model(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, **config_changes: Any
) -> DETR | DETRsegm:
    """A model in evaluation mode, float32, on the CPU; `categories` is the checkpoint's list or None.

    Args:
        name_or_path, revision: as for `read_checkpoint`.
        config_changes: `DetrConfig` fields that need no other weights, such as aux_loss, dropout or dilation;
            masks=False leaves the mask head out.

    Raises:
        CheckpointError: as `read_checkpoint`, or the changed config needs other weights.
        TypeError, ValueError: not a `DetrConfig` field, or out of range.
    """
    return build_model(read_checkpoint(name_or_path, revision), **config_changes)


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **config_changes: Any,
) -> DETR | DETRsegm:
    """The model of a checkpoint, with its own copy of the weights, in evaluation mode."""
    config = checkpoint.config.replace(**config_changes)
    state = checkpoint.state_dict
    if checkpoint.config.masks and not config.masks:
        state = {name: x for name, x in dialects.unprefixed(state).items() if not dialects.is_mask_head(name)}
    with torch.device("meta"):
        model = build_detr(config)
    check(state, model.state_dict(), checkpoint.source)
    copies = {name: tensor.detach().to(device, dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    model.categories = checkpoint.categories
    return model.eval()


def save_model(model: DETR | DETRsegm, folder: str | os.PathLike[str], dialect: str = "detr_fast") -> None:
    """Writes config.json and model.safetensors (and transformers' preprocessor_config.json) into a folder, made if
    missing; a reader never sees half of a file.

    Args:
        model: its `categories`, if it has any, become the names of the classes.
        folder: other files in it stay.
        dialect: "detr_fast", or "transformers" for a folder that its from_pretrained loads, version 4 or 5, which needs
            timm for a dilated model.

    Raises:
        TypeError: model is not a detr_fast model.
        ValueError: another dialect, or a model that transformers cannot represent.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    if not isinstance(model, (DETR, DETRsegm)):
        raise TypeError(f"model must be a detr_fast DETR or DETRsegm, got {type(model).__name__}")
    if dialect not in ("detr_fast", "transformers"):
        raise ValueError(f"dialect must be detr_fast or transformers, got {dialect!r}")
    state, files = _for_transformers(model) if dialect == "transformers" else _for_detr_fast(model)
    with ExitStack() as stack:  # all files take their names when all are written
        for name, contents in files.items():
            file = stack.enter_context(open_atomic(Path(folder, name)))
            file.write((json.dumps(contents, indent=2) + "\n").encode())
            file.flush()
        weights = stack.enter_context(open_atomic(Path(folder, "model.safetensors")))
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(contiguous, weights.name, metadata={"format": "pt"})


def _for_detr_fast(model: DETR | DETRsegm) -> tuple[Tensors, dict[str, Any]]:
    """The weights and the JSON files of our own dialect."""
    config = model.config.replace(aux_loss=model.aux_loss)
    settings = {"model_type": "detr_fast", "config": config.to_dict(), "categories": model.categories}
    return model.state_dict(), {CONFIG_FILE: settings}


def _for_transformers(model: DETR | DETRsegm) -> tuple[Tensors, dict[str, Any]]:
    """The weights and the JSON files of transformers' dialect."""
    config = model.config.replace(aux_loss=model.aux_loss)
    settings = dialects.transformers_config(config, model.categories)
    state = model.state_dict()
    settings["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    backbone = "timm" if config.dilation else "resnet"
    state = dialects.prefixed(dialects.from_canonical(dialects.unprefixed(state), backbone))
    return state, {CONFIG_FILE: settings, PROCESSOR_FILE: dialects.transformers_processor(config)}


def _read_folder(folder: Path, source: str) -> Checkpoint:
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        fail(source, f"a folder without weights: it has none of {listed(WEIGHT_FILES, 9)}")
    return _read_file(weights, source)


def _read_file(path: Path, source: str) -> Checkpoint:
    """A file of weights, with the config.json beside it where its name is one that has one."""
    beside = path.parent / CONFIG_FILE
    in_folder = path.suffix == ".safetensors" or path.name in HUB_WEIGHT_FILES
    settings = read_json(beside, source) if in_folder and beside.is_file() else {}
    processor = path.parent / PROCESSOR_FILE
    if settings.get("model_type") == "detr" and processor.is_file():
        settings["processor"] = read_json(processor, source)
    if path.name.endswith(".index.json"):
        return interpret(read_shards(path, source), settings, source)
    contents = read_tensors(path, source)
    if isinstance(contents.get("model"), dict):
        settings = _settings_of_training(contents, source) or settings
        contents = contents["model"]
    if not settings and "dc5" in path.name.lower():  # nothing else in the published files tells
        settings = {"args": {"dilation": True}}
    return interpret(contents, settings, source)


def _settings_of_training(contents: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings in a training checkpoint: our config, or facebookresearch/detr's arguments."""
    if "config" in contents:
        return {"model_type": "detr_fast", "config": contents["config"], "categories": contents.get("categories")}
    if "args" not in contents:
        return {}
    args = contents["args"]
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        fail(source, f'"args" must be an argparse.Namespace or a dict, got {type(args).__name__}')
    return {"args": dict(args)}
