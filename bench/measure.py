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
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

CPU = torch.device("cpu")


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def until_done(call: Callable[[], Any], device: torch.device) -> Any:
    """What `call` returns, once the device has computed it."""
    out = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out


# ---- memory ----


def peak_extra_bytes(call: Callable[[], Any], device: torch.device = CPU) -> int | None:
    """How far the memory that the process has on the device rises during one call; memory the call keeps counts.

    On a CPU resident memory, which only Linux tells: None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("self", "VmRSS")
    call()
    return _status("self", "VmHWM") - before


def peak_resident(pid: int) -> dict[int, int]:
    """The most bytes that a process and each of its children has had resident so far, by process; on Linux."""
    peaks = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):  # it has ended
            if int(path.name) == pid or _status(path.name, "PPid") == pid:
                peaks[int(path.name)] = _status(path.name, "VmHWM")
    return peaks


def _status(process: str, field: str) -> int:
    lines = Path("/proc", process, "status").read_text().splitlines()
    value = next(line for line in lines if line.startswith(f"{field}:")).split()[1:]
    return int(value[0]) * (1024 if value[-1] == "kB" else 1)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=32 * 2**20)


def rotations(moved: int, device: torch.device) -> int:
    """How many sets of inputs of a call that moves so many bytes outgrow the cache three times over; at most 16."""
    return min(16, 1 + 3 * cache_bytes(device) // moved)


# ---- counts ----


def _convolution(x, weight, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _convolution_into_sum(residual, x, weight, *_, out_shape=None, **__):
    return _convolution(x, weight, out_shape=out_shape)


def _attention(q, k, *_, **__):
    return 4 * math.prod(q) * k[-2]  # two products, of q with k and of the weights with v


def _attention_map(q, k, *_, **__):
    return 2 * math.prod(q) * k[-2]


# FLOP of what PyTorch's own table lacks, by name: detr_fast's operations are there only once they are imported.
_FORMULAS = {
    "mkldnn::_convolution_pointwise": _convolution,
    "mkldnn::_convolution_pointwise_": _convolution_into_sum,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "detr_fast::attention": _attention,
    "detr_fast::attention_map": _attention_map,
}
FORMULAS = {name: shape_wrapper(formula) for name, formula in _FORMULAS.items()}


class Tally(TorchDispatchMode):
    """Counts what the operations within it compute and move.

    Attributes:
        flops: of convolutions, matrix products and attention, by torch.utils.flop_counter's formulas.
        bytes: inputs and outputs of every operation but views and allocations.
        calls: such operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        formula = flop_registry.get(packet) or FORMULAS.get(packet._qualified_op_name)
        if formula is None and func.namespace == "aten":
            with self:  # of what inference mode has not taken apart
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self.run(func, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        moves = outputs and not func.is_view and "empty" not in func.name()
        self.count(inputs, outputs, flops, sum(x.nbytes for x in inputs + outputs) if moves else 0)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def count(self, inputs: list[Tensor], outputs: list[Tensor], flops: int, moved: int) -> None:
        self.flops += flops
        self.bytes += moved
        self.calls += moved > 0


def gmac(call: Callable[[], Any]) -> float:
    """Multiply-accumulates, in 1e9, of the convolutions, matrix products and attention of one call."""
    with Tally() as tally:
        call()
    return tally.flops / 2e9


# ---- the device ----


class Ceilings:
    """What a device gives at most, measured when it is first asked for: the best of 10 large copies or products."""

    def __init__(self, device: torch.device, side: int | None = None):
        self.device = device
        self.side = side or (8192 if device.type == "cuda" else 2048)
        self._flops_per_second: dict[torch.dtype, float] = {}

    @cached_property
    def bytes_per_second(self) -> float:
        source = torch.ones(16 * self.side**2, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def flops_per_second(self, dtype: torch.dtype) -> float:
        if dtype not in self._flops_per_second:
            a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
            self._flops_per_second[dtype] = 2 * self.side**3 / self._best(lambda: a @ b)
        return self._flops_per_second[dtype]

    def _best(self, call: Callable[[], Any]) -> float:
        until_done(call, self.device)
        return min(seconds(lambda: until_done(call, self.device)) for _ in range(10))

    def is_memory_bound(self, flops: float, moved: float, dtype: torch.dtype) -> bool:
        return moved / self.bytes_per_second > flops / self.flops_per_second(dtype)

    def floor(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Seconds that so many FLOP and bytes take at least."""
        return max(flops / self.flops_per_second(dtype), moved / self.bytes_per_second)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":unknown")
    return model.split(":", 1)[1].strip()


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "cpu": device_name(CPU),
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
