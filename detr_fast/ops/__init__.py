"""The operations that detr_fast accelerates, and the only place that chooses how each is computed.

Each has its definition in `reference` under the same name; `with plain(...)` computes those instead, and
`with pretend("sm_90")` makes every choice as on such a GPU.
"""

from detr_fast.ops.attention import attention, attention_map, packs_tokens
from detr_fast.ops.cache import holding, kept
from detr_fast.ops.choices import Choice, attention_choice
from detr_fast.ops.dense import cast, conv2d, image_layout, linear, project, weights
from detr_fast.ops.masks import chunks, level, mask_upsample, norm_upsample_conv, phase_kernels, upsample_conv
from detr_fast.ops.merge import Merges, panoptic_merge, weighted_merge
from detr_fast.ops.norm import add_layer_norm, group_norm_relu, layer_norm
from detr_fast.ops.policy import (
    HAS_TRITON,
    REWRITES,
    gpu,
    is_gpu,
    is_plain,
    plain,
    pretend,
    resolve_device,
    resolve_dtype,
    uses_kernels,
)

__all__ = [
    "HAS_TRITON",
    "REWRITES",
    "Choice",
    "Merges",
    "add_layer_norm",
    "attention",
    "attention_choice",
    "attention_map",
    "cast",
    "chunks",
    "conv2d",
    "gpu",
    "group_norm_relu",
    "holding",
    "image_layout",
    "is_gpu",
    "is_plain",
    "kept",
    "layer_norm",
    "level",
    "linear",
    "mask_upsample",
    "norm_upsample_conv",
    "packs_tokens",
    "panoptic_merge",
    "phase_kernels",
    "plain",
    "pretend",
    "project",
    "resolve_device",
    "resolve_dtype",
    "upsample_conv",
    "uses_kernels",
    "weighted_merge",
    "weights",
]
