"""What every benchmark needs: the sizes, the device, and `bench`, which checks an outcome before it times a call.

    pytest bench --benchmark-only                         # at real sizes: minutes, on a quiet machine
    pytest bench --benchmark-only --quick                 # each once, at tiny sizes: whether it works, not how fast
    pytest bench --benchmark-only --benchmark-save=NAME   # kept in .benchmarks/, which git ignores
    pytest bench --benchmark-only --benchmark-compare     # beside the last that was saved
    python -m bench.compare OLD.json NEW.json             # judges two saved ones, by ratios to the references

A group compares ways to compute one thing, on the same inputs, one right after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch

from bench import measure
from bench.cases import REAL, TINY, Scale
from bench.operations.case import NAMES, SINGLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run each benchmark once, at tiny sizes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SCALE] = TINY if config.getoption("--quick") else REAL


SCALE = pytest.StashKey[Scale]()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Which machine it is, not what it is called."""
    machine_info.clear()
    machine_info.update(measure.machine(), device=measure.device_name(DEVICE))


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return request.config.stash[SCALE]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def ceilings(scale: Scale, device: torch.device) -> measure.Ceilings:
    return measure.Ceilings(device, side=64 if scale is TINY else None)


class Bench(Protocol):
    """Times a call, once its outcome is known to be right.

    Args:
        group: what is computed; a group has a "reference" and is judged by the ratios to it.
        way: how: "reference", "fast", "fast" and a variant, or the name of another implementation.
        call: what is timed.
        check: takes the outcome; returns the largest error. One that raises keeps the call from being timed.
        shape: sizes that the time depends on, to be read by people.
        flops, bytes: of the definition, where they are known.
        count: count them in the call itself; for what does not depend on the numbers in its input.
        seconds: to spend, about; at least two rounds.
        once: a single round, whose own outcome is checked: for what takes long and is not ours.
        memory: also measure the memory that a call needs.
    """

    def __call__(
        self,
        group: str,
        way: str,
        call: Callable[[], Any],
        check: Callable[[Any], float],
        *,
        shape: str,
        dtype: torch.dtype = SINGLE,
        flops: int | None = None,
        bytes: int | None = None,
        count: bool = False,
        seconds: float = 1.0,
        once: bool = False,
        memory: bool = False,
    ) -> None: ...


@pytest.fixture
def bench(benchmark: Any, scale: Scale, device: torch.device, ceilings: measure.Ceilings) -> Bench:
    def run(
        group: str,
        way: str,
        call: Callable[[], Any],
        check: Callable[[Any], float],
        *,
        shape: str,
        dtype: torch.dtype = SINGLE,
        flops: int | None = None,
        bytes: int | None = None,
        count: bool = False,
        seconds: float = 1.0,
        once: bool = False,
        memory: bool = False,
    ) -> None:
        def finished() -> Any:
            return measure.until_done(call, device)

        benchmark.group = group
        info = {"way": way, "shape": shape, "dtype": NAMES[dtype], "device": device.type, "quick": scale is TINY}
        rounds = iterations = 1
        if not once:
            info["max_error"] = check(finished())
            took = 0.0
            if count or memory:
                started = time.perf_counter()
                with measure.Tally() as tally:
                    peak = measure.peak_extra_bytes(finished, device) if memory else finished()
                took = time.perf_counter() - started
                if memory:
                    info["peak_extra_bytes"] = peak
                if count:
                    flops, bytes = tally.flops, tally.bytes
            if scale is not TINY and not benchmark.disabled:
                took = took if took > 1 else measure.seconds(finished)  # counting delays what is short
                rounds = max(2 if took > 1 else 5, min(100, int(seconds / took)))
                iterations = max(1, int(1e-3 / took))
        out = benchmark.pedantic(finished, rounds=rounds, iterations=iterations)
        if once:
            info["max_error"] = check(out)
        if flops is not None and bytes is not None:
            info |= {"flops": flops, "bytes": bytes}
            if benchmark.stats is not None:
                info["share_of_ceiling"] = ceilings.floor(flops, bytes, dtype) / benchmark.stats.stats.min
        benchmark.extra_info.update(info)

    return run
