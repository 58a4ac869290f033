"""Files of weights and settings -> named tensors and dicts, without running code in them or trusting their claims."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_fast.checkpoint.errors import ACCEPTED, CheckpointError, fail, listed, reason

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"  # transformers': how large its images are
HUB_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_FILES = (*HUB_WEIGHT_FILES, "checkpoint.pth")
MAX_JSON_BYTES = 2**26


def read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {path.name} cannot be read: {reason(error)}") from error
    return values


def shard_names(index: Path, source: str) -> list[str]:
    weight_map = read_json(index, source).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(source, f'{index.name} has no "weight_map"')
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        fail(source, f"{index.name} names files outside its folder: {listed(outside)}")
    return names


def read_shards(index: Path, source: str) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name in shard_names(index, source):
        if not (index.parent / name).is_file():
            fail(source, f"{index.name} names {name}, which is not there")
        tensors |= read_tensors(index.parent / name, source)
    return tensors


def read_tensors(path: Path, source: str) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if not path.is_file() or not size:
            raise ValueError("it is empty" if path.is_file() else "it is no file")
        return _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path, size)
    except Exception as error:  # parsers given damaged bytes raise anything
        raise CheckpointError(f"{source}: {_damaged(path, error)}; accepted are {ACCEPTED}") from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class _Ignored:
    """Stands for a harmless object that training scripts save beside the weights; nothing reads it."""

    def __new__(cls, *args: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# The objects that a pickle may name besides those of torch.load(weights_only=True). None of them runs: see `_Ignored`.
_HARMLESS: list[Any] = [(argparse.Namespace, "argparse.Namespace")] + [
    (_Ignored, name)
    for name in (
        *(f"{module}.{path}" for module in ("pathlib", "pathlib._local") for path in ("PosixPath", "WindowsPath")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
    )
]


def _load_torch(path: Path, size: int) -> dict[Any, Any]:
    """The contents of a torch file, zip or legacy. No code in it runs; no tensor takes more memory than the file."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(e.file_size for e in entries) > size
        ):
            raise ValueError("its archive claims more than the file holds")
    with torch.serialization.safe_globals(_HARMLESS):
        # mapped, so that tensors are views of the file and none can be larger
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(contents, dict):
        raise ValueError(f"it holds {type(contents).__name__}, not a dict of tensors")
    model = contents.get("model")
    for name, value in {**contents, **(model if isinstance(model, dict) else {})}.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(f"{str(name)[:80]} claims more than the file holds")
    return contents


def _damaged(path: Path, error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if unsafe:
        return f"{path.name} is refused unrun, since its pickle asks for {unsafe[1]}, which could run code"
    return f"{path.name} cannot be read, it is damaged, truncated or no checkpoint ({reason(error)})"
