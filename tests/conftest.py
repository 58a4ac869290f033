"""Where Triton's kernels run: on a CUDA device if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported, so before any test module is


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels are launched. On a CUDA device a test that asks for it is a `gpu` test."""
    return torch.device(request.param)


@pytest.fixture
def far_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes tensors larger than all memory."""
    if CUDA:
        pytest.skip("memory that need not exist is the interpreter's alone")
    from triton.runtime import interpreter

    # it would copy all of the memory onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    torch.use_deterministic_algorithms(False)  # they would fill it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
