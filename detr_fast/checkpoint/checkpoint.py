"""Reading and writing models: one reader for every dialect, and writers for ours and transformers'."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from detr_fast.categories import Category
from detr_fast.checkpoint import dialects
from detr_fast.checkpoint.dialects import Tensors
from detr_fast.config import RESNETS, DetrConfig
from detr_fast.detr.detector import DETR
from detr_fast.detr.segmentation import DETRsegm, build_detr

ACCEPTED = "a facebookresearch/detr .pth file, a transformers DETR folder, or a folder or file of detr_fast"

# facebookresearch/detr's hubconf.py; the last 8 digits of a name are how its SHA-256 begins
TORCH_HUB_URL = "https://dl.fbaipublicfiles.com/detr/"
TORCH_HUB_FILES = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    "detr_resnet50_panoptic": "detr-r50-panoptic-00ce5173.pth",
    "detr_resnet50_dc5_panoptic": "detr-r50-dc5-panoptic-da08f1b1.pth",
    "detr_resnet101_panoptic": "detr-r101-panoptic-40021d53.pth",
}

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"  # transformers': how large its images are
MODELS = Path(__file__).parents[1] / "models"
BUNDLED = ("shapes",)  # folders in MODELS, each with a card, README.md

HUB_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_FILES = (*HUB_WEIGHT_FILES, "checkpoint.pth")
MAX_JSON_BYTES = 2**26
# seconds until a server that does not answer counts as no network
TIMEOUT = 10

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".json")
# what shapes do not tell
_FIELDS = ("nheads", "dilation", "dropout", "aux_loss", "image_size", "max_image_size")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint cannot be used: one line that names it, what is wrong and, where that helps, what is accepted."""

    def __init__(self, message: str):
        super().__init__(message.replace("\n", " "))  # names of files and parameters may have some


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
        return _read_file(_torch_hub_file(name), name)
    if isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(_SUFFIXES):
        return _read_folder(_hub_folder(name, revision), name)
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
    _check(state, model.state_dict(), checkpoint.source)
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
    config = model.config.replace(aux_loss=model.aux_loss)
    categories = model.categories
    state = model.state_dict()
    if dialect == "detr_fast":
        settings = {"model_type": "detr_fast", "config": config.to_dict(), "categories": categories}
    elif dialect == "transformers":
        settings = dialects.transformers_config(config, categories)
        settings["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
        backbone = "timm" if config.dilation else "resnet"
        state = dialects.prefixed(dialects.from_canonical(dialects.unprefixed(state), backbone))
    else:
        raise ValueError(f"dialect must be detr_fast or transformers, got {dialect!r}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
            scratch / "model.safetensors",
            metadata={"format": "pt"},
        )
        files = {CONFIG_FILE: settings}
        if dialect == "transformers":
            files[PROCESSOR_FILE] = dialects.transformers_processor(config)
        for name, contents in files.items():
            (scratch / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        for name in ("model.safetensors", *files):
            os.replace(scratch / name, target / name)
    finally:
        shutil.rmtree(scratch)


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
        _fail(source, f"no DETR: its first parameters are {_listed(state)}; accepted are {ACCEPTED}")
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
            _fail(
                source, f"{CONFIG_FILE} says {name} is {str(value)[:40]}, but the weights have {getattr(config, field)}"
            )
    with torch.device("meta"):
        expected = dialects.unprefixed(build_detr(config).state_dict())
    originals = {dialects.plain_name(name): name for name in tensors}
    _check(state, dialects.from_canonical(expected, dialect), source, originals)
    _check_values(state, source, originals)
    return Checkpoint(config, dialects.prefixed(canonical), categories, source)


# ---- from tensors to a config ----


def _fail(source: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{source}: {problem}")


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(str(name)[:200] for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _plain_state(tensors: dict[str, Any], source: str) -> Tensors:
    if not tensors or not all(isinstance(name, str) for name in tensors):
        _fail(source, f"no weights in it; accepted are {ACCEPTED}")
    state: Tensors = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            _fail(source, f"{name[:200]} is no plain tensor but {type(tensor).__name__}; accepted are {ACCEPTED}")
        if dialects.is_state(name):
            plain = dialects.plain_name(name)
            if plain in state:
                _fail(source, f"{name} is there twice, with and without a prefix")
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
            _fail(source, f"missing {name}; accepted are {ACCEPTED}")
        if state[name].ndim != ndim:
            _fail(source, f"{name} has shape {list(state[name].shape)}, not {ndim} dimensions")
        return state[name].shape

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    depths = tuple(count(f"backbone.0.body.layer{number}.") for number in range(1, 5))
    expansion = 4 if "backbone.0.body.layer1.0.conv3.weight" in state else 1
    backbone = next((name for name, sizes in RESNETS.items() if sizes == (depths, expansion)), None)
    if backbone is None:
        blocks = f"{depths} blocks of {3 if expansion == 4 else 2} convolutions"
        _fail(source, f"a backbone with {blocks} is none of {_listed(RESNETS, 9)}")
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


def _check(state: Tensors, expected: Tensors, source: str, originals: dict[str, str] | None = None) -> None:
    """Names and shapes are exactly those expected."""
    originals = originals or {}
    if missing := [name for name in expected if name not in state]:
        _fail(source, f"missing {_listed(missing)}; accepted are {ACCEPTED}")
    if unexpected := [originals.get(name, name) for name in state if name not in expected]:
        _fail(source, f"unexpected {_listed(unexpected)}; accepted are {ACCEPTED}")
    if wrong := [
        f"{originals.get(name, name)} {list(state[name].shape)} instead of {list(x.shape)}"
        for name, x in expected.items()
        if state[name].shape != x.shape
    ]:
        _fail(source, f"mis-shaped {_listed(wrong)}")


def _check_values(state: Tensors, source: str, originals: dict[str, str]) -> None:
    if wrong := [f"{originals[name]} {x.dtype}" for name, x in state.items() if x.dtype not in _FLOATS]:
        _fail(source, f"weights of another type than {_listed(map(str, _FLOATS), 9)}: {_listed(wrong)}")
    if wrong := [originals[name] for name, x in state.items() if not x.isfinite().all()]:
        _fail(source, f"NaN or infinite weights in {_listed(wrong)}")


# ---- files and folders ----


def _read_folder(folder: Path, source: str) -> Checkpoint:
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        _fail(source, f"a folder without weights: it has none of {_listed(WEIGHT_FILES, 9)}")
    return _read_file(weights, source)


def _read_file(path: Path, source: str) -> Checkpoint:
    """A file of weights, with the config.json beside it where its name is one that has one."""
    beside = path.parent / CONFIG_FILE
    in_folder = path.suffix == ".safetensors" or path.name in HUB_WEIGHT_FILES
    settings = _read_json(beside, source) if in_folder and beside.is_file() else {}
    processor = path.parent / PROCESSOR_FILE
    if settings.get("model_type") == "detr" and processor.is_file():
        settings["processor"] = _read_json(processor, source)
    if path.name.endswith(".index.json"):
        return interpret(_read_shards(path, source), settings, source)
    contents = _read_tensors(path, source)
    if isinstance(contents.get("model"), dict):  # a training checkpoint: facebookresearch's, or ours with its config
        if "config" in contents:
            settings = {
                "model_type": "detr_fast",
                "config": contents["config"],
                "categories": contents.get("categories"),
            }
        elif "args" in contents:
            args = contents["args"]
            settings = {"args": dict(vars(args)) if isinstance(args, argparse.Namespace) else args}
            if not isinstance(settings["args"], dict):
                _fail(source, f'"args" must be an argparse.Namespace or a dict, got {type(args).__name__}')
        contents = contents["model"]
    if not settings and "dc5" in path.name.lower():  # nothing else in the published files tells
        settings = {"args": {"dilation": True}}
    return interpret(contents, settings, source)


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {path.name} cannot be read: {_reason(error)}") from error
    return values


def _shards(index: Path, source: str) -> list[str]:
    weight_map = _read_json(index, source).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(source, f'{index.name} has no "weight_map"')
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        _fail(source, f"{index.name} names files outside its folder: {_listed(outside)}")
    return names


def _read_shards(index: Path, source: str) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name in _shards(index, source):
        if not (index.parent / name).is_file():
            _fail(source, f"{index.name} names {name}, which is not there")
        tensors |= _read_tensors(index.parent / name, source)
    return tensors


def _read_tensors(path: Path, source: str) -> dict[str, Any]:
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


# All that a pickle may name besides what torch.load(weights_only=True) allows. None of it is run: see `_Ignored`.
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
    """A torch file, zip or legacy, without running what is in it or allocating what it claims."""
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


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _damaged(path: Path, error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if unsafe:
        return f"{path.name} is refused unrun, since its pickle asks for {unsafe[1]}, which could run code"
    return f"{path.name} cannot be read, it is damaged, truncated or no checkpoint ({_reason(error)})"


# ---- downloads ----

_WAYS_ON = "give the path of a local folder or file instead, or the small model shapes, which needs no network"


def _torch_hub_file(name: str) -> Path:
    """A checkpoint of facebookresearch/detr in Torch Hub's cache, downloaded if missing; its hash is verified."""
    import http.client
    import urllib.request

    file = TORCH_HUB_FILES[name]
    prefix = file.removesuffix(".pth").rpartition("-")[2]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # torch's download has no timeout, so whether the server answers is asked first
            request = urllib.request.Request(TORCH_HUB_URL + file, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
            torch.hub.download_url_to_file(TORCH_HUB_URL + file, str(path), hash_prefix=prefix, progress=True)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            raise CheckpointError(
                f"{name}: cannot download {TORCH_HUB_URL}{file} ({_reason(error)}); put it at {path}, or {_WAYS_ON}"
            ) from error
    sha256 = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    if not digest.startswith(prefix):
        _fail(name, f"{path} has SHA-256 {digest[:8]}..., not {prefix}...: delete it to download it again")
    return path


def _hub_folder(repo: str, revision: str | None) -> Path:
    """A snapshot in the Hugging Face hub's cache, completed from the network only where something is missing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            folder = _fetch(repo, revision, cached=True)
        except LocalEntryNotFoundError:
            folder = None
        if folder is None:
            # one request without the retries of a download shows within seconds that there is no network
            get_hf_file_metadata(hf_hub_url(repo, CONFIG_FILE, revision=revision), timeout=TIMEOUT)
            folder = _fetch(repo, revision, cached=False)
    except CheckpointError:
        raise
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo}: no such path, and the Hugging Face hub has no such model or does not give it ({_reason(error)}); "
            f"{_WAYS_ON}"
        ) from error
    except Exception as error:  # the hub's HTTP library, and with it its errors, differs between versions
        raise CheckpointError(
            f"{repo}: no such path, and the Hugging Face hub cannot be reached for a model of that name "
            f"({_reason(error)}); {_WAYS_ON}"
        ) from error
    if folder is None:
        _fail(repo, f"this model on the Hugging Face hub has none of {_listed(HUB_WEIGHT_FILES, 9)}; {_WAYS_ON}")
    return folder


def _fetch(repo: str, revision: str | None, cached: bool) -> Path | None:
    """The folder with config.json and one kind of weights, from the cache alone if `cached`; None without weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=cached))

    folder = get(CONFIG_FILE).parent
    for name in HUB_WEIGHT_FILES:
        try:
            path = get(name)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not cached:
                raise  # the network went away
            continue
        if name.endswith(".index.json"):
            for shard in _shards(path, repo):
                get(shard)
        return folder
    return None
