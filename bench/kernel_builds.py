"""Builds every Triton kernel for every supported GPU, none of which need be there, and checks what the compiler made.

    python -m bench.kernel_builds                       # a table; exit status 1 if a build breaks a rule
    python -m bench.kernel_builds --check               # and if one differs from bench/kernel_budget.json
    python -m bench.kernel_builds --out bench/kernel_budget.json     # add this Triton's table to a file

Rules: nothing spilled, shared memory within the target's limit, and tensor-core instructions exactly where a kernel
expects them (one that expects none would lose float32's precision to them).
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

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "bench" / "kernel_budget.json"


class Limits(NamedTuple):
    """What a multiprocessor (of AMD: a compute unit) has for the blocks that run on it at once."""

    warps: int
    blocks: int
    registers: int  # of 32 bits, for all lanes
    register_unit: int  # that a warp's registers are rounded up to
    shared: int  # bytes
    shared_of_block: int  # bytes that one block may have
    warp_size: int = 32


KIB = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA, section 3
TARGETS: dict[int | str, Limits] = {
    70: Limits(64, 32, 65536, 256, 96 * KIB, 96 * KIB),
    75: Limits(32, 16, 65536, 256, 64 * KIB, 64 * KIB),
    80: Limits(64, 32, 65536, 256, 164 * KIB, 163 * KIB),
    86: Limits(48, 16, 65536, 256, 100 * KIB, 99 * KIB),
    89: Limits(48, 24, 65536, 256, 100 * KIB, 99 * KIB),
    90: Limits(64, 32, 65536, 256, 228 * KIB, 227 * KIB),
    100: Limits(64, 32, 65536, 256, 228 * KIB, 227 * KIB),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 8 * 64, 64 * KIB, 64 * KIB, 64),
}
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wmma\.mma|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_smfmac)")


class Result(NamedTuple):
    """What the compiler made of one `Build`."""

    registers: int  # of a thread; on AMD vector registers, accumulators included
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a block
    tensor_cores: int  # instructions


class Outcome(NamedTuple):
    """A build by name, and its result or the error that the compiler ended with."""

    name: str
    num_warps: int
    expects_tensor_cores: bool
    result: Result | None
    error: str = ""


# ---- one target, in a process of its own, as LLVM may abort ----


def kernel_modules() -> list[Any]:
    """The modules in kernels/ that have builds."""
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    modules = [importlib.import_module(f"detr_fast.kernels.{name}") for name in names]
    return [module for module in modules if hasattr(module, "builds")]


def compile_target(target: int | str, pattern: str) -> Iterator[Outcome]:
    """Compiles the builds whose name, "module/build", matches `pattern`."""
    for module in kernel_modules():
        for build in module.builds(target):
            name = f"{module.__name__.rpartition('.')[2]}/{build.name}"
            if re.search(pattern, name):
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
    shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        return Result(*cubin_resources(kernel.asm["cubin"]), shared, len(TENSOR_CORES.findall(kernel.asm["ptx"])))
    assembly = kernel.asm["amdgcn"]
    fields = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", assembly, re.M)}
    return Result(
        fields["vgpr_count"], fields["private_segment_fixed_size"], shared, len(TENSOR_CORES.findall(assembly))
    )


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


# ---- rules ----


def broken_rules(target: int | str, outcome: Outcome) -> list[str]:
    """What is wrong with a build on `target`."""
    result, limit = outcome.result, TARGETS[target].shared_of_block
    if result is None:
        return [outcome.error]
    broken = []
    if result.spilled:
        broken.append(f"spills {result.spilled} bytes")
    if result.shared > limit:
        broken.append(f"needs {result.shared} bytes of shared memory of {limit}")
    if outcome.expects_tensor_cores and not result.tensor_cores:
        broken.append("has no tensor-core instruction")
    if result.tensor_cores and not outcome.expects_tensor_cores:
        broken.append("has tensor-core instructions, unexpectedly")
    return broken


def occupancy(target: int | str, num_warps: int, result: Result) -> float:
    """The share of a multiprocessor's warps that can be there at once."""
    limits = TARGETS[target]
    unit = limits.register_unit
    registers = -(-max(result.registers, 1) * limits.warp_size // unit) * unit
    reserved = KIB if isinstance(target, int) and target >= 80 else 0
    blocks = min(
        limits.blocks,
        limits.warps // num_warps,
        limits.registers // registers // num_warps,
        limits.shared // (result.shared + reserved) if result.shared + reserved else limits.blocks,
    )
    return blocks * num_warps / limits.warps


def differences(target: int | str, outcomes: Sequence[Outcome], budget: dict[str, list[int]]) -> list[str]:
    """Where the results are not exactly those of the budget."""
    built = {outcome.name: list(outcome.result) for outcome in outcomes if outcome.result is not None}
    return [
        f"sm {target} {name}: {built.get(name, 'nothing')} was built, the budget has {budget.get(name, 'nothing')}"
        for name in sorted({*built, *budget})
        if built.get(name) != budget.get(name)
    ]


# ---- command ----


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_builds", description=__doc__.partition("\n")[0])
    names = {str(target): target for target in TARGETS}
    parser.add_argument("--targets", nargs="+", choices=names, default=list(names), metavar="TARGET")
    parser.add_argument("--only", default="", metavar="REGEX", help="builds whose name, kernel/build, matches")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to add this Triton's results")
    parser.add_argument("--check", action="store_true", help=f"compare with {BUDGET.relative_to(ROOT)}")
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
    print(f"Triton {triton.__version__}")
    print(f"{'target':7} {'kernel':60} registers  spilled   shared tensor cores occupancy")
    for target, outcomes in built.items():
        for outcome in outcomes:
            print(f"{target!s:7} {outcome.name:60} {_columns(target, outcome)}")
    problems = [
        f"sm {target} {outcome.name}: {problem}"
        for target, outcomes in built.items()
        for outcome in outcomes
        for problem in broken_rules(target, outcome)
    ]
    if options.check:
        problems += check(triton.__version__, built, options.only)
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.out:
        write(options.out, triton.__version__, built, options.only)
    return int(bool(problems))


def _columns(target: int | str, outcome: Outcome) -> str:
    result = outcome.result
    if result is None:
        return outcome.error
    share = occupancy(target, outcome.num_warps, result)
    return f"{result.registers:9} {result.spilled:8} {result.shared:8} {result.tensor_cores:12} {share:9.0%}"


def check(version: str, built: dict[int | str, list[Outcome]], pattern: str) -> list[str]:
    """`differences` of all targets from the budget for this version of Triton."""
    budgets = json.loads(BUDGET.read_text())
    if version not in budgets:
        return [f"{BUDGET.name} has nothing for Triton {version}, only for {', '.join(budgets)}"]
    found = []
    for target, outcomes in built.items():
        budget = budgets[version].get(str(target), {})
        found += differences(target, outcomes, {k: v for k, v in budget.items() if re.search(pattern, k)})
    return found


def write(path: Path, version: str, built: dict[int | str, list[Outcome]], pattern: str = "") -> None:
    """Replaces what the file has for this version, these targets and builds; a line each, so that changes read well."""
    table = json.loads(path.read_text()) if path.exists() else {}
    mine = table.setdefault(version, {})
    for target, outcomes in built.items():
        others = {k: v for k, v in mine.get(str(target), {}).items() if not re.search(pattern, k)}
        results = {outcome.name: outcome.result for outcome in outcomes if outcome.result is not None}
        mine[str(target)] = dict(sorted({**others, **results}.items()))
    text = json.dumps(dict(sorted(table.items())), indent=1)
    path.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
