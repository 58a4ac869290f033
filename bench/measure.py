"""Times, peak memory and counted arithmetic of one call, and the machine they were measured on."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """How far the process's resident memory rises during one call. Linux only; memory the call keeps counts."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def gmac(call: Callable[[], Any]) -> float:
    """Multiply-accumulates, in 1e9, of the convolutions, matrix products and attention of one call."""

    def convolution(x, weight, *_, out_shape=None, **__):
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    def convolution_into_sum(residual, x, weight, *_, out_shape=None, **__):
        return convolution(x, weight, out_shape=out_shape)

    def attention(q, k, *_, **__):
        return 4 * math.prod(q) * k[-2]  # two products, of q with k and of the weights with v

    onednn = torch.ops.mkldnn
    counted = {
        onednn._convolution_pointwise: convolution,
        onednn._convolution_pointwise_: convolution_into_sum,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        call()
    return counter.get_total_flops() / 2e9


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":unknown")
    return {
        "cpu": model.split(":", 1)[1].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "clean": not _git("status", "--porcelain", "--untracked-files=no"),
    }


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
