"""Parameter names and settings of the two upstream implementations, and ours for the same things.

Our names are facebookresearch/detr's. transformers has others, packs attention projections differently, and has two
ResNets: its own ("resnet") and timm's ("timm"). Names here leave out the "detr." that comes before all but the mask
head's parameters in panoptic models; `conversion.interpret` and `prefixed` deal with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from detr_fast.categories import Category, categories_for, palette_color
from detr_fast.config import RESNETS, DetrConfig

Tensors = dict[str, Tensor]

# ---- names ----

# Each rule rewrites the start of a name; {} stands for a layer's number.
_BODY = "backbone.0.body."
_CONV_ENCODER = "model.backbone.conv_encoder.model."
_ENCODER = {
    "self_attn": "self_attn",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
}
_DECODER = _ENCODER | {
    "multihead_attn": "encoder_attn",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
}
_TRANSFORMERS = {
    **{f"transformer.encoder.layers.{{}}.{ours}.": f"model.encoder.layers.{{}}.{x}." for ours, x in _ENCODER.items()},
    **{f"transformer.decoder.layers.{{}}.{ours}.": f"model.decoder.layers.{{}}.{x}." for ours, x in _DECODER.items()},
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "query_embed.": "model.query_position_embeddings.",
    "input_proj.": "model.input_projection.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
}
_TIMM = {_BODY: _CONV_ENCODER}
_RESNET = {
    f"{_BODY}conv1.": f"{_CONV_ENCODER}embedder.embedder.convolution.",
    f"{_BODY}bn1.": f"{_CONV_ENCODER}embedder.embedder.normalization.",
}
for _stage in range(4):
    _ours, _theirs = f"{_BODY}layer{_stage + 1}.{{}}.", f"{_CONV_ENCODER}encoder.stages.{_stage}.layers.{{}}."
    for _kind, _conv, _norm in [("shortcut", "downsample.0", "downsample.1")] + [
        (f"layer.{number - 1}", f"conv{number}", f"bn{number}") for number in (1, 2, 3)
    ]:
        _RESNET[f"{_ours}{_conv}."] = f"{_theirs}{_kind}.convolution."
        _RESNET[f"{_ours}{_norm}."] = f"{_theirs}{_kind}.normalization."

# transformers 4 to transformers 5, whose live models have the new names; its files still have the old ones
_TRANSFORMERS_5 = {
    _CONV_ENCODER: "model.backbone.model.",
    **{f"model.{coder}.layers.{{}}.{fc}.": f"model.{coder}.layers.{{}}.mlp.{fc}."
       for coder in ("encoder", "decoder") for fc in ("fc1", "fc2")},
    **{f"model.{coder}.layers.{{}}.{attn}.out_proj.": f"model.{coder}.layers.{{}}.{attn}.o_proj."
       for coder, attn in (("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn"))},
    "bbox_attention.q_linear.": "bbox_attention.q_proj.",
    "bbox_attention.k_linear.": "bbox_attention.k_proj.",
    "mask_head.out_lay.": "mask_head.output_conv.",
}  # fmt: skip
for _number in (1, 2):
    _TRANSFORMERS_5[f"mask_head.lay{_number}."] = f"mask_head.conv{_number}.conv."
    _TRANSFORMERS_5[f"mask_head.gn{_number}."] = f"mask_head.conv{_number}.norm."
for _stage in range(3):
    _TRANSFORMERS_5[f"mask_head.adapter{_stage + 1}."] = f"mask_head.fpn_stages.{_stage}.fpn_adapter."
    _TRANSFORMERS_5[f"mask_head.lay{_stage + 3}."] = f"mask_head.fpn_stages.{_stage}.refine.conv."
    _TRANSFORMERS_5[f"mask_head.gn{_stage + 3}."] = f"mask_head.fpn_stages.{_stage}.refine.norm."

# what DistributedDataParallel, torch.compile, panoptic models and timm's wrapper in transformers 4 put into names
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|detr)\.)+|(?<=conv_encoder\.model\.)_backbone\.")
_PROJECTIONS = re.compile(r"(.*_attn\.)([qkv])_proj\.(weight|bias)")


def _renamer(rules: dict[str, str]) -> Callable[[str], str]:
    """Rewrites a name by the first rule that fits its start; other names stay as they are."""
    compiled = [
        (re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new.replace("{}", r"\1")) for old, new in rules.items()
    ]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            if match := pattern.match(name):
                return match.expand(replacement) + name[match.end() :]
        return name

    return rename


def _inverse(rules: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in rules.items()}


_FROM_5 = _renamer(_inverse(_TRANSFORMERS_5))
_TO = {"timm": _renamer(_TRANSFORMERS | _TIMM), "resnet": _renamer(_TRANSFORMERS | _RESNET)}
_FROM = {"timm": _renamer(_inverse(_TRANSFORMERS | _TIMM)), "resnet": _renamer(_inverse(_TRANSFORMERS | _RESNET))}


def plain_name(name: str) -> str:
    """A name as it is in a file of facebookresearch/detr or transformers 4, without wrappers' prefixes."""
    return _FROM_5(_WRAPPERS.sub("", name))


def is_state(name: str) -> bool:
    """False for a counter of batch normalisation, which nothing reads."""
    return not name.endswith(".num_batches_tracked")


def dialect_of(names: Iterable[str]) -> str | None:
    """ "facebookresearch", or transformers' "resnet" or "timm" by its backbone, or None for no DETR; plain names."""
    starts = {tuple(name.split(".")[:2]) for name in names}
    if any(first in ("transformer", "query_embed") for first, *_ in starts):
        return "facebookresearch"
    if not any(first == "model" for first, *_ in starts):
        return None
    return "resnet" if any(name.startswith(f"{_CONV_ENCODER}embedder.") for name in names) else "timm"


def to_canonical(state: Tensors, dialect: str) -> Tensors:
    """Plain names to ours, with attention projections packed."""
    if dialect == "facebookresearch":
        return state
    canonical: Tensors = {}
    packed: dict[str, Tensors] = {}
    for name, tensor in state.items():
        name = _FROM[dialect](name)
        if match := _PROJECTIONS.fullmatch(name):
            attention, projection, kind = match.groups()
            packed.setdefault(f"{attention}in_proj_{kind}", {})[projection] = tensor
        else:
            canonical[name] = tensor
    for name, parts in packed.items():
        shapes = {tuple(part.shape[1:]) for part in parts.values()}
        if len(parts) == 3 and len(shapes) == 1 and all(part.ndim for part in parts.values()):
            canonical[name] = torch.cat([parts[projection] for projection in "qkv"])
    return canonical


def from_canonical(state: Tensors, dialect: str) -> Tensors:
    """The inverse of `to_canonical`; works on meta tensors too."""
    if dialect == "facebookresearch":
        return state
    plain: Tensors = {}
    for name, tensor in state.items():
        attention, in_proj, kind = name.rpartition("in_proj_")
        parts = (
            {f"{attention}{p}_proj.{kind}": x for p, x in zip("qkv", tensor.chunk(3), strict=True)} if in_proj else {}
        )
        for part, value in (parts or {name: tensor}).items():
            plain[_TO[dialect](part)] = value
    return plain


def is_mask_head(name: str) -> bool:
    """Whether a plain name is a parameter that panoptic models have on top."""
    return name.startswith(("bbox_attention.", "mask_head."))


def prefixed(state: Tensors) -> Tensors:
    """Names as in the model: in a panoptic one, "detr." before all but the mask head's."""
    if not any(map(is_mask_head, state)):
        return state
    return {name if is_mask_head(name) else f"detr.{name}": tensor for name, tensor in state.items()}


def unprefixed(state: Tensors) -> Tensors:
    return {name.removeprefix("detr."): tensor for name, tensor in state.items()}


# ---- settings ----

_ONLY = {"model_type": "detr", "activation_function": "relu", "position_embedding_type": "sine", "num_channels": 3}
_ONLY_RESNET = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "num_channels": 3,
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_TIMM_NAME = re.compile(r"(?:tv_)?(resnet18|resnet34|resnet50|resnet101)(?:\..*)?")

# transformers' settings that only repeat what the weights' shapes say
TRANSFORMERS_SIZES = {
    "d_model": "hidden_dim",
    "num_queries": "num_queries",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "encoder_ffn_dim": "dim_feedforward",
    "decoder_ffn_dim": "dim_feedforward",
}


def transformers_settings(values: dict[str, Any], dialect: str) -> dict[str, Any]:
    """What weights do not say, as `DetrConfig` fields, from a transformers DetrConfig as a dict.

    Raises:
        ValueError: it asks for a function that `DetrConfig` cannot express.
    """
    _require(values, _ONLY)
    heads = {
        values[f"{coder}_attention_heads"] for coder in ("encoder", "decoder") if f"{coder}_attention_heads" in values
    }
    if len(heads) > 1:
        raise ValueError(
            "encoder_attention_heads and decoder_attention_heads must be equal, got "
            f"{values['encoder_attention_heads']} and {values['decoder_attention_heads']}"
        )
    settings: dict[str, Any] = {"dilation": _dilation(values, dialect)}
    if heads:
        settings["nheads"] = heads.pop()
    settings |= {ours: values[x] for x, ours in (("dropout", "dropout"), ("auxiliary_loss", "aux_loss")) if x in values}
    return settings


def _require(values: dict[str, Any], accepted: dict[str, Any]) -> None:
    for name, value in accepted.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {values[name]!r}: another model than DETR")


def _dilation(values: dict[str, Any], dialect: str) -> bool:
    backbone = values.get("backbone_config") or {}
    extra = values.get("backbone_kwargs") or {}
    if not isinstance(backbone, dict) or not isinstance(extra, dict):
        raise ValueError("backbone_config and backbone_kwargs must be objects or null")
    if dialect == "resnet":
        _require(backbone, _ONLY_RESNET)
        return False  # transformers' own ResNet cannot dilate, and ignores the setting
    _require(backbone, {"model_type": "timm_backbone"})
    name = backbone.get("backbone") or values.get("backbone") or "resnet50"
    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name):
        raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, got {name!r}")
    stride = backbone.get("output_stride") or extra.get("output_stride")
    if stride is None:
        stride = 16 if values.get("dilation") and not backbone else 32
    if stride not in (16, 32):
        raise ValueError(f"output_stride must be 16 or 32, got {stride!r}")
    return stride == 16


def transformers_categories(id2label: Any, config: DetrConfig) -> list[Category] | None:
    """Categories from transformers' id2label; None where it says nothing or the same as COCO, which needs no list.

    transformers does not tell things from stuff: of COCO panoptic's 250 classes those up to 90 are things, else all.

    Raises:
        ValueError: id2label is not a dict of class numbers to names.
    """
    if not id2label:
        return None
    if not isinstance(id2label, dict) or not all(str(key).isdecimal() for key in id2label):
        raise ValueError(f"id2label must map class numbers to names, got {str(id2label)[:80]}")
    names = {int(key): str(name) for key, name in id2label.items()}
    names = {index: name for index, name in names.items() if name not in ("N/A", f"LABEL_{index}")}
    coco = {category["id"]: category["name"] for category in categories_for(config, None)}
    if config.num_classes in (91, 250) and all(coco.get(index) == name for index, name in names.items()):
        return None
    stuff = 91 if config.num_classes == 250 else config.num_classes
    return [
        {"id": index, "name": name, "isthing": int(index < stuff), "color": palette_color(index)}
        for index, name in sorted(names.items())
        if index < config.num_classes
    ] or None


def id2label(config: DetrConfig, categories: list[Category] | None) -> dict[int, str]:
    """A name for every class number, as transformers wants it: COCO's where a model has none and is of COCO's size."""
    if categories is None and config.num_classes in (91, 250):
        names = {category["id"]: category["name"] for category in categories_for(config, None)}
        return {index: names.get(index, "N/A") for index in range(config.num_classes)}
    names = {category["id"]: category["name"] for category in categories or []}
    return {index: names.get(index, f"LABEL_{index}") for index in range(config.num_classes)}


def transformers_config(config: DetrConfig, categories: list[Category] | None) -> dict[str, Any]:
    """A transformers DetrConfig as a dict, ready for config.json but for the dtype.

    Its own ResNet needs no other package; only it cannot dilate, for which timm's is named.
    """
    labels = id2label(config, categories)
    return {
        "architectures": ["DetrForSegmentation" if config.masks else "DetrForObjectDetection"],
        "model_type": "detr",
        "is_encoder_decoder": True,
        "d_model": config.hidden_dim,
        "num_queries": config.num_queries,
        "encoder_layers": config.enc_layers,
        "decoder_layers": config.dec_layers,
        "encoder_ffn_dim": config.dim_feedforward,
        "decoder_ffn_dim": config.dim_feedforward,
        "encoder_attention_heads": config.nheads,
        "decoder_attention_heads": config.nheads,
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dropout": config.dropout,
        "auxiliary_loss": config.aux_loss,
        "num_channels": 3,
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
        **_backbone_config(config),
    }


def transformers_processor(config: DetrConfig) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' DetrImageProcessor."""
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_panoptic" if config.masks else "coco_detection",
        "size": {"shortest_edge": config.image_size, "longest_edge": config.max_image_size},
    }


def image_sizes(processor: dict[str, Any]) -> dict[str, int]:
    """`DetrConfig`'s fields from a preprocessor_config.json of transformers 5 or 4; none where it has no such sizes."""
    size = processor.get("size")
    if isinstance(size, dict):
        short, long = size.get("shortest_edge"), size.get("longest_edge")
    else:
        short, long = size, processor.get("max_size")
    return {"image_size": short, "max_image_size": long} if isinstance(short, int) and isinstance(long, int) else {}


def _backbone_config(config: DetrConfig) -> dict[str, Any]:
    if config.dilation:
        if config.backbone_width != 64:
            raise ValueError(
                "transformers has dilated ResNets of the published width only: "
                f"backbone_width must be 64, got {config.backbone_width}"
            )
        return {
            "use_timm_backbone": True,
            "backbone": config.backbone,
            "use_pretrained_backbone": False,
            "dilation": True,
        }
    depths, expansion = RESNETS[config.backbone]
    resnet = {
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": config.backbone_width,
        "hidden_sizes": list(config.stage_channels),
        "depths": list(depths),
        "layer_type": "bottleneck" if expansion == 4 else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": [f"stage{number}" for number in range(1, 5)],
    }
    return {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "backbone_config": resnet}
