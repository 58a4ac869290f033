"""The facts of a device, which every kernel asks for here. Importable without Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

NAMES = (
    "add_layer_norm",
    "attention",
    "attention_map",
    "bias_relu",
    "group_norm_relu_upsample",
    "mask_upsample",
    "panoptic_merge",
)


class Device(NamedTuple):
    """A GPU.

    Attributes:
        target: the compute capability, as 90, or an AMD architecture.
        tensor_cores: whether Triton's `tl.dot` uses them: sm_80 and newer, or AMD's CDNA.
        multiprocessors: how many programs run side by side at least.
    """

    target: int | str
    tensor_cores: bool
    multiprocessors: int


DEVICES = {
    "sm_70": Device(70, False, 80),
    "sm_75": Device(75, False, 40),
    "sm_80": Device(80, True, 108),
    "sm_86": Device(86, True, 72),
    "sm_89": Device(89, True, 58),
    "sm_90": Device(90, True, 132),
    "sm_100": Device(100, True, 148),
    "gfx942": Device("gfx942", True, 304),
}

_pretended: Device | None = None


def device_of(device: torch.device) -> Device:
    """The facts of a GPU, or of the pretended one."""
    return _pretended or _read(device)


def is_pretended() -> bool:
    return _pretended is not None


@contextmanager
def pretended(target: str) -> Iterator[None]:
    """Makes `device_of` answer as on such a GPU.

    Raises:
        ValueError: a target that is none of `DEVICES`.
    """
    if target not in DEVICES:
        raise ValueError(f"target must be one of {', '.join(DEVICES)}, got {target!r}")
    global _pretended
    before, _pretended = _pretended, DEVICES[target]
    try:
        yield
    finally:
        _pretended = before


@lru_cache
def _read(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], True, properties.multi_processor_count)
    target = 10 * properties.major + properties.minor
    return Device(target, target >= 80, properties.multi_processor_count)
