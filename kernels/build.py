"""One ahead-of-time build of a kernel, as `bench.kernel_builds` and the kernels' own `builds` describe it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Build(NamedTuple):
    """A kernel with everything the compiler needs, on a target that need not be there.

    Attributes:
        name: unique within a target.
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
