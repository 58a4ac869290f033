"""What all kernels share: the facts of a device, the form of an operation, and that of an ahead-of-time build.

Importable without Triton, which takes a while and is not everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

# The files with kernels. Importing one defines its operations in `torch.ops.detr_fast`.
NAMES = (
    "add_layer_norm",
    "attention",
    "attention_map",
    "bias_relu",
    "group_norm_relu_upsample",
    "mask_upsample",
    "panoptic_merge",
)

# What kernels compute with, by Triton's name.
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

Target = int | str

# ---- the device ----


class Device(NamedTuple):
    """A GPU.

    Attributes:
        target: the compute capability, as 90, or an AMD architecture.
        tensor_cores: whether Triton's `tl.dot` uses them: sm_80 and newer, or AMD's CDNA.
        multiprocessors: how many programs run side by side at least.
    """

    target: Target
    tensor_cores: bool
    multiprocessors: int


DEVICES = {
    "sm_70": Device(70, False, 80),  # V100
    "sm_75": Device(75, False, 40),  # T4
    "sm_80": Device(80, True, 108),  # A100
    "sm_86": Device(86, True, 72),  # A10
    "sm_89": Device(89, True, 58),  # L4
    "sm_90": Device(90, True, 132),  # H100
    "sm_100": Device(100, True, 148),  # B200
    "gfx942": Device("gfx942", True, 304),  # MI300X
}
_INTERPRETER = Device(80, True, 1)

_pretended: Device | None = None  # of the process, as torch.compile can read no context variable


def device_of(device: torch.device) -> Device:
    """The facts of the GPU `device`, or of the pretended one. A CPU's are those of Triton's interpreter."""
    return _pretended or _read(device)


def is_pretended() -> bool:
    return _pretended is not None


@contextmanager
def pretended(target: str) -> Iterator[None]:
    """Makes `device_of` answer as on a GPU of `DEVICES`, in the whole process.

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
    if device.type != "cuda":
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], True, properties.multi_processor_count)
    target = 10 * properties.major + properties.minor
    return Device(target, target >= 80, properties.multi_processor_count)


Row = TypeVar("Row")


def config_for(table: Mapping[Target, Row], target: Target) -> Row:
    """The row of `table` for `target`.

    Args:
        table: configurations by the capability, as 80, from which each holds, up to the next one in the table. The
            lowest one's is the default; AMD's, where it differs, is that of "gfx942".
    """
    capabilities = sorted(key for key in table if isinstance(key, int))
    default = capabilities[0]
    if isinstance(target, str):
        return table["gfx942" if "gfx942" in table else default]
    return table[max((key for key in capabilities if key <= target), default=default)]


# ---- operations ----


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raises TypeError with the name of a tensor that is of none of `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be of one of {list(DTYPES)}, got {tensor.dtype}")


def operation(name: str, launch: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Defines `torch.ops.detr_fast.<name>`, with the signature of the decorated function.

    `launch` computes it for tensors on a GPU, and the decorated function for tensors on a CPU. Within `pretended` with
    TRITON_INTERPRET=1, `launch` computes it there too, in Triton's interpreter: so that tests of a launcher go through
    the dispatcher, which refuses outputs that share storage with each other or with an input.

    Args:
        launch: takes the arguments of the operation, allocates the outputs and runs the kernels.
    """

    def define(body: Callable[..., Any]) -> CustomOpDef:
        @wraps(body)
        def on_cpu(*arguments: Any) -> Any:
            interpreted = is_pretended() and os.environ.get("TRITON_INTERPRET") == "1"
            return (launch if interpreted else body)(*arguments)

        schema = torch.library.infer_schema(body, mutates_args=())
        defined = torch.library.custom_op(f"detr_fast::{name}", on_cpu, mutates_args=(), schema=schema)
        defined.register_kernel("cuda")(launch)
        return defined

    return define


# ---- ahead-of-time builds ----


class Build(NamedTuple):
    """A kernel with everything the compiler needs, on a target that need not be there.

    Attributes:
        name: unique within a target and a file.
        kernel: the `triton.jit` function.
        signature: the type of each argument, "*fp16" or "i32"; "constexpr" where `constexprs` has the value.
        constexprs: values known when compiling.
        num_warps, num_stages: launch options.
        attrs: names of the arguments that are divisible by 16.
        tensor_cores: whether the build must hold tensor-core instructions.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    attrs: tuple[str, ...]
    tensor_cores: bool


def build(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
    aligned: Sequence[str] = (),
    tensor_cores: bool = False,
) -> Build:
    """A `Build` of `kernel`, whose pointers are all divisible by 16.

    Args:
        types: of arguments; without one a pointer (x_ptr) is to float32, anything else a 32-bit integer.
        constexprs: values known when compiling; None for a pointer that is absent.
        aligned: further arguments that are divisible by 16.

    Names in these three that are no arguments of the kernel are left out, so that kernels of a file can share them.
    """
    values = {argument: constexprs[argument] for argument in kernel.arg_names if argument in constexprs}
    defaults = {argument: "*fp32" if argument.endswith("_ptr") else "i32" for argument in kernel.arg_names}
    signature = {
        argument: "constexpr" if argument in values else types.get(argument, default)
        for argument, default in defaults.items()
    }
    attrs = tuple(a for a, kind in signature.items() if kind.startswith("*") or (a in aligned and kind != "constexpr"))
    return Build(name, kernel, signature, values, num_warps, num_stages, attrs, tensor_cores)


def dtypes_on(target: Target) -> dict[torch.dtype, str]:
    """`DTYPES` of `target`: bfloat16 needs sm_80."""
    old = isinstance(target, int) and target < 80
    return {dtype: name for dtype, name in DTYPES.items() if not (old and dtype == torch.bfloat16)}
