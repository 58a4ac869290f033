"""Batches from worker processes: whole, in order, and with what went wrong there."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from detr_fast.detr.nested import NestedTensor
from detr_fast.training.workers import WorkerDied, made_ahead, packed, unpacked


def same(value: Any) -> Any:
    return value


def test_a_value_comes_out_as_it_went_in() -> None:
    strided = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)
    tensors = [strided, torch.empty(0, 5, 7, dtype=torch.bool), torch.tensor(3), torch.arange(7, dtype=torch.uint8)]
    nested, out, text = unpacked(*packed((NestedTensor(torch.ones(1, 3, 4, 5)), tensors, "text")))
    assert torch.equal(nested.tensors, torch.ones(1, 3, 4, 5)) and nested.mask is None and text == "text"
    for one, other in zip(out, tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    out[0][:] = 0  # what it lies in can be written to


def test_results_are_in_order_and_finished_here() -> None:
    here = os.getpid()
    results = list(made_ahead(same, range(23), 3, lambda x: (x, os.getpid())))
    assert results == [(number, here) for number in range(23)]
    assert list(made_ahead(same, [], 2, same)) == []


class Odd(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def failing(task: int) -> int:
    if task == 2:
        raise FileNotFoundError(2, "gone", "a.jpg")
    if task == 3:
        raise Odd(1, 2)
    if task == 4:
        os._exit(7)
    return task


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [(2, FileNotFoundError, "a.jpg"), (3, RuntimeError, "Odd: 1 and 2"), (4, WorkerDied, "7")],
)
def test_what_is_raised_in_a_worker_is_raised_here(task: int, error: type[Exception], says: str) -> None:
    results = made_ahead(failing, [0, 1, task, 5], 2, same)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(error, match=says):
        next(results)


def test_it_stops_whatever_the_workers_do() -> None:
    stop: list[int] = []
    results = made_ahead(time.sleep, [0, 0, 1000], 2, same, stop)
    assert [next(results), next(results)] == [None, None]
    stop.append(15)
    began = time.monotonic()
    assert list(results) == []
    assert time.monotonic() - began < 5
