"""`detr-fast info`."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import TYPE_CHECKING

import detr_fast

if TYPE_CHECKING:
    from detr_fast.kernels.common import Device

HELP = "versions, devices and which code each operation runs"
DESCRIPTION = None


def add_options(info: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> None:
    import torch

    from detr_fast import ops

    print(f"detr_fast {detr_fast.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "numpy", "transformers"):
        print(f"{name} {_version(name)}")
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    _explain(None)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {device.name}, capability {device.major}.{device.minor}, {device.total_memory >> 20} MiB")
        _explain(ops.gpu(torch.device("cuda", index)))
    if not torch.cuda.device_count():
        print("cuda: no device")


def _explain(device: Device | None) -> None:
    from detr_fast.ops import choices

    for operation, choice, reason in choices.table(device):
        print(f"  {operation}: {choice} ({reason})")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
