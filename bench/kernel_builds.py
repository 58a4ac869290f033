"""Builds every Triton kernel for every supported GPU, none of which need be there, and checks what the compiler made.

    python -m bench.kernel_builds                       # a table; exit status 1 if a build breaks a rule
    python -m bench.kernel_builds --check               # and if one is over bench/kernel_budget.json
    python -m bench.kernel_builds --out bench/kernel_budget.json     # write the results, the budget from now on

Rules: nothing spilled, shared and tensor memory within the target's limits, and tensor-core instructions exactly where
a kernel expects them (one that expects none would lose float32's precision to them).

Budget: what one version of Triton made of each build. The same version may later take at most REGISTER_SLACK registers
more, no more shared memory, and no fewer tensor-core instructions; new and dropped builds must be written to it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from detr_fast.kernels.common import NAMES

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "bench" / "kernel_budget.json"


class Limits(NamedTuple):
    """What a multiprocessor (of AMD: a compute unit) has for the blocks that run on it at once."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_of_block: int  # bytes that one block may have
    shared_unit: int  # bytes that a block's are rounded up to
    registers: int = 65536  # of 32 bits, for all lanes
    register_unit: int = 256  # that a warp's registers are rounded up to
    warp_size: int = 32
    tensor_memory: int = 0  # columns


KIB = 1024
PARTITIONS = 4  # of a multiprocessor; a warp's registers are those of one
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA, section 3
TARGETS: dict[int | str, Limits] = {
    70: Limits(64, 32, 96 * KIB, 96 * KIB, 256),
    75: Limits(32, 16, 64 * KIB, 64 * KIB, 256),
    80: Limits(64, 32, 164 * KIB, 163 * KIB, 128),
    86: Limits(48, 16, 100 * KIB, 99 * KIB, 128),
    89: Limits(48, 24, 100 * KIB, 99 * KIB, 128),
    90: Limits(64, 32, 228 * KIB, 227 * KIB, 128),
    100: Limits(64, 32, 228 * KIB, 227 * KIB, 128, tensor_memory=512),
    "gfx942": Limits(32, 32, 64 * KIB, 64 * KIB, 512, registers=4 * 512 * 64, register_unit=8 * 64, warp_size=64),
}
REGISTER_SLACK = 8  # a thread; a multiprocessor hands them out in eights
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wmma\.mma|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_smfmac)")


class Result(NamedTuple):
    """What the compiler made of one `Build`."""

    registers: int  # of a thread; on AMD vector registers, accumulators included
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a block
    tensor_cores: int  # instructions
    tensor_memory: int  # columns of a block, on sm_100


class Outcome(NamedTuple):
    """A build by name, and its result or the error that the compiler ended with."""

    name: str
    num_warps: int
    expects_tensor_cores: bool
    result: Result | None
    error: str = ""


# ---- one target, in a process of its own, as LLVM may abort ----


def builds(target: int | str, pattern: str) -> dict[str, Any]:
    """The builds whose name, "module/build", matches `pattern`."""
    modules = {name: importlib.import_module(f"detr_fast.kernels.{name}") for name in NAMES}
    named = {f"{name}/{build.name}": build for name, module in modules.items() for build in module.builds(target)}
    return {name: build for name, build in named.items() if re.search(pattern, name)}


def compile_target(target: int | str, pattern: str) -> Iterator[Outcome]:
    """Compiles `builds`."""
    for name, build in builds(target, pattern).items():
        print(f"building {name}", file=sys.stderr, flush=True)  # should the process die of it
        try:
            result, error = compile_build(build, target), ""
        except Exception as exception:
            result, error = None, f"{type(exception).__name__}: {exception}".partition("\n")[0]
        yield Outcome(name, build.num_warps, build.tensor_cores, result, error)


def compiled(build: Any, target: int | str) -> Any:
    """Triton's compiled kernel, never loaded."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {name: (index,) for index, name in enumerate(build.kernel.arg_names)}
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.signature[name] for name in arguments},
        constexprs={arguments[name]: value for name, value in build.constexprs.items()},
        attrs={arguments[name]: [["tt.divisibility", 16]] for name in build.attrs},
    )
    return triton.compile(
        source,
        target=GPUTarget("hip" if isinstance(target, str) else "cuda", target, TARGETS[target].warp_size),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )


def compile_build(build: Any, target: int | str) -> Result:
    kernel = compiled(build, target)
    metadata = kernel.metadata
    if "cubin" in kernel.asm:
        tensor_cores = len(TENSOR_CORES.findall(kernel.asm["ptx"]))
        return Result(*cubin_resources(kernel.asm["cubin"]), metadata.shared, tensor_cores, metadata.tmem_size or 0)
    assembly = kernel.asm["amdgcn"]
    fields = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", assembly, re.M)}
    tensor_cores = len(TENSOR_CORES.findall(assembly))
    return Result(fields["vgpr_count"], fields["private_segment_fixed_size"], metadata.shared, tensor_cores, 0)


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of stack and local memory: none of our kernels has any but for spills."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"]


def build_target(target: int | str, pattern: str) -> list[Outcome]:
    """`compile_target` in a subprocess. If that dies, the build it died of is the last outcome, an error."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernel_builds", "--worker", str(target), "--only", pattern]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    outcomes = []
    for line in done.stdout.splitlines():
        name, num_warps, expected, result, error = json.loads(line)
        outcomes.append(Outcome(name, num_warps, expected, Result(*result) if result else None, error))
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        fatal = next((line.split()[1] for line in reversed(lines) if line.startswith("building ")), "before any build")
        outcomes.append(Outcome(fatal, 0, False, None, f"exit status {done.returncode}: {lines[-1]}"))
    return outcomes


# ---- rules and budget ----


def broken_rules(target: int | str, outcome: Outcome) -> list[str]:
    """What is wrong with a build on `target`."""
    result, limits = outcome.result, TARGETS[target]
    if result is None:
        return [outcome.error]
    broken = []
    if result.spilled:
        broken.append(f"spills {result.spilled} bytes")
    if result.shared > limits.shared_of_block:
        broken.append(f"needs {result.shared} bytes of shared memory of {limits.shared_of_block}")
    if result.tensor_memory > limits.tensor_memory:
        broken.append(f"needs {result.tensor_memory} columns of tensor memory of {limits.tensor_memory}")
    if outcome.expects_tensor_cores and not result.tensor_cores:
        broken.append("has no tensor-core instruction")
    if result.tensor_cores and not outcome.expects_tensor_cores:
        broken.append("has tensor-core instructions, unexpectedly")
    return broken


def occupancy(target: int | str, num_warps: int, result: Result) -> float:
    """The share of a multiprocessor's warps that can be there at once, as NVIDIA's cuda_occupancy.h computes it."""
    limits = TARGETS[target]
    registers = _rounded_up(max(result.registers, 1) * limits.warp_size, limits.register_unit)
    warps = limits.registers // PARTITIONS // registers * PARTITIONS
    blocks = [limits.blocks, limits.warps // num_warps, warps // num_warps]
    reserved = KIB if isinstance(target, int) and target >= 80 else 0
    shared = _rounded_up(result.shared + reserved, limits.shared_unit)
    if shared:
        blocks.append(limits.shared // shared)
    if result.tensor_memory:
        blocks.append(limits.tensor_memory // result.tensor_memory)
    return min(blocks) * num_warps / limits.warps


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def over_budget(outcomes: Sequence[Outcome], budget: dict[str, Result]) -> list[tuple[str, str]]:
    """The builds of a target that are worse than the budget, or not those of the budget, and why."""
    found = [(name, "was not built, but the budget has it") for name in budget.keys() - {o.name for o in outcomes}]
    for name, _, _, result, _ in outcomes:
        if name not in budget:
            found.append((name, "is not in the budget"))
        elif result is not None:
            found += [(name, text) for text in _excesses(result, budget[name])]
    return sorted(found)


def _excesses(result: Result, budget: Result) -> list[str]:
    found = []
    if result.registers > budget.registers + REGISTER_SLACK:
        found.append(f"takes {result.registers} registers, {budget.registers} in the budget")
    if result.shared > budget.shared:
        found.append(f"takes {result.shared} bytes of shared memory, {budget.shared} in the budget")
    if result.tensor_cores < budget.tensor_cores:
        found.append(f"has {result.tensor_cores} tensor-core instructions, {budget.tensor_cores} in the budget")
    return found


def read_budget(pattern: str = "") -> tuple[str, dict[str, dict[str, Result]]]:
    """The version of Triton, and what it made on each target of each build whose name matches `pattern`."""
    table = json.loads(BUDGET.read_text())
    version = table.pop("triton")
    return version, {
        target: {name: Result(*row) for name, row in rows.items() if re.search(pattern, name)}
        for target, rows in table.items()
    }


def write_budget(path: Path, version: str, built: dict[int | str, list[Outcome]]) -> None:
    """One line a build, so that changes read well."""
    table: dict[str, Any] = {"triton": version}
    for target, outcomes in built.items():
        table[str(target)] = {o.name: o.result for o in sorted(outcomes) if o.result is not None}
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\[[\s\d,]+\]", lambda row: json.dumps(json.loads(row[0])), text) + "\n")


# ---- command ----


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_builds", description=__doc__.partition("\n")[0])
    names = {str(target): target for target in TARGETS}
    parser.add_argument("--targets", nargs="+", choices=names, default=list(names), metavar="TARGET")
    parser.add_argument("--only", default="", metavar="REGEX", help="builds whose name, kernel/build, matches")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the results")
    parser.add_argument("--check", action="store_true", help="compare with bench/kernel_budget.json, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at once")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        for outcome in compile_target(names[options.worker], options.only):
            print(json.dumps(outcome), flush=True)
        return 0

    import triton

    targets = [names[name] for name in options.targets]
    with ThreadPoolExecutor(options.jobs) as pool:
        built = dict(zip(targets, pool.map(lambda target: build_target(target, options.only), targets), strict=True))
    if not any(built.values()):
        parser.error(f"--only must match a build, got {options.only}")
    print(f"Triton {triton.__version__}")
    print(f"{'target':7} {'kernel':50} registers spilled shared tensor cores tensor memory occupancy")
    for target, outcomes in built.items():
        for outcome in outcomes:
            print(f"{target!s:7} {outcome.name:50} {_columns(target, outcome)}")
    problems = [
        f"{target} {outcome.name}: {problem}"
        for target, outcomes in built.items()
        for outcome in outcomes
        for problem in broken_rules(target, outcome)
    ]
    print(_summary(built))
    if options.check:
        problems += check(triton.__version__, built, options.only)
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.out:
        write_budget(options.out, triton.__version__, built)
    return int(bool(problems))


def _columns(target: int | str, outcome: Outcome) -> str:
    result = outcome.result
    if result is None:
        return outcome.error
    numbers = f"{result.registers:9} {result.spilled:7} {result.shared:6} {result.tensor_cores:12}"
    return f"{numbers} {result.tensor_memory:13} {occupancy(target, outcome.num_warps, result):9.0%}"


def _summary(built: dict[int | str, list[Outcome]]) -> str:
    results = [outcome.result for outcomes in built.values() for outcome in outcomes]
    made = [result for result in results if result is not None]
    most = max((result.registers for result in made), default=0)
    spilling = sum(result.spilled > 0 for result in made)
    return f"{len(results)} builds, {len(results) - len(made)} failed, {spilling} spill; at most {most} registers"


def check(version: str, built: dict[int | str, list[Outcome]], pattern: str) -> list[str]:
    """`over_budget` of all targets, if the budget is for this version of Triton."""
    budget_version, budget = read_budget(pattern)
    if version != budget_version:
        return [f"{BUDGET.name} is for Triton {budget_version}, this is {version}"]
    return [
        f"{target} {name}: {problem}"
        for target, outcomes in built.items()
        for name, problem in over_budget(outcomes, budget.get(str(target), {}))
    ]


if __name__ == "__main__":
    sys.exit(main())
