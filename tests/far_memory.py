"""Tensors that span more than 2^31 elements, in memory that need not exist.

For kernels in Triton's interpreter, in tests with the fixture `far_memory`.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

STEP = 2**30 + 64  # two of them are beyond 32 bits, one is not, so that Triton has it in 32


def sparse(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of a size that no memory need have: pages exist once written.

    They lie on both sides of the tensor: an offset that wraps around finds zeros, and not a crash.
    """
    reach = 2**31 + 2**20
    noreserve = 0x4000
    memory = mmap.mmap(-1, 2 * reach * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, reach)


def spread(x: Tensor, *strides: int) -> Tensor:
    return sparse(tuple(x.shape), strides, x.dtype).copy_(x)
