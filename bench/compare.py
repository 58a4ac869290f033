"""Compares two measurements, and fails where the second is slower.

    python -m bench.compare OLD.json NEW.json [--threshold 1.15]

Takes two files of one kind: what `pytest bench --benchmark-json`, `bench.ladder`, `bench.gpu`, `bench.roofline` or
`bench.kernel_builds` wrote. Machines are noisy, and differ: what is judged is a time over the time of the plain
reference in the same run. It is slower if the best and the median of its rounds both say so, by more than the threshold
times the spread, which is how far medians are above the best; between the two it is unclear. What is counted (FLOP,
bytes, registers, spills) is compared exactly. Exits with 1 if anything of ours became slower or is gone, or a count
changed; with 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]
THRESHOLD = 1.15


class Ratio(NamedTuple):
    """Time over the reference's.

    Attributes:
        best, median: of the rounds.
        spread: median over best, of its own time or of the reference's, whichever is larger.
        ours: whether it is judged; another implementation's is only shown.
    """

    best: float
    median: float
    spread: float
    ours: bool

    @classmethod
    def of(cls, own: tuple[float, float], reference: tuple[float, float], ours: bool = True) -> Ratio:
        """From the best and the median of the times."""
        spread = max(own[1] / own[0], reference[1] / reference[0])
        return cls(own[0] / reference[0], own[1] / reference[1], spread, ours)


def best_and_median(seconds: list[float]) -> tuple[float, float]:
    return min(seconds), statistics.median(seconds)


@dataclass
class Run:
    """What a file says, by name.

    Attributes:
        ratios: of everything that has a reference.
        counts: what must not change by itself.
        settings: what a ratio depends on; where they differ it is not judged.
    """

    ratios: dict[str, Ratio] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


# ---- the kinds of files ----


def read_benchmarks(found: Json) -> Run:
    """pytest-benchmark's, with what bench/conftest.py adds."""
    run, groups = Run(), {}
    for row in found["benchmarks"]:
        groups.setdefault(row["group"], {})[row["extra_info"]["way"]] = row
    for group, ways in groups.items():
        for way, row in ways.items():
            name, info = f"{group}, {way}", row["extra_info"]
            run.settings[name] = {key: info[key] for key in ("shape", "dtype", "device", "quick")}
            run.counts |= {f"{name}, {key}": info[key] for key in ("flops", "bytes") if key in info}
            if way != "reference" and "reference" in ways:
                times = [(x["stats"]["min"], x["stats"]["median"]) for x in (row, ways["reference"])]
                run.ratios[name] = Ratio.of(*times, ours=way.startswith("fast"))
    return run


def read_ladder(found: Json) -> Run:
    run, rows = Run(), found["rows"]
    for name, row in rows.items():
        if "gmac" in row:
            run.counts[f"{name}, gmac"] = row["gmac"]
        if name != "plain" and "seconds" in row:
            times = best_and_median(row["seconds"]), best_and_median(rows["plain"]["seconds"])
            run.ratios[name] = Ratio.of(*times, ours=not name.startswith("transformers"))
            run.settings[name] = [found["size"], found["target"], found["kept"]]
    run.counts |= {f"mask head at {size}, gmac": value for size, value in found["mask_head_gmac"].items()}
    return run


def read_gpu(found: Json) -> Run:
    run = Run()
    for row in found["sections"].get("kernels", {"rows": []})["rows"]:
        if "ours" in row:
            name = f"{row['op']}: {row['name']}"
            run.ratios[name] = Ratio.of(*(best_and_median(row[way]["cold"]) for way in ("ours", "plain")))
            run.counts |= {f"{name}, {key}": row[key] for key in ("flops", "bytes")}
    rows = [row for row in found["sections"].get("ladder", {"rows": []})["rows"] if "seconds" in row]
    plain = {row["batch"]: best_and_median(row["seconds"]) for row in rows if row["name"] == "plain fp32 eager"}
    for row in rows:
        if row["batch"] in plain and row["name"] != "plain fp32 eager":
            times = best_and_median(row["seconds"]), plain[row["batch"]]
            run.ratios[f"batch {row['batch']}, {row['name']}"] = Ratio.of(*times, row["name"].startswith("ours"))
    run.settings = {name: found["machine"]["device"] for name in run.ratios}
    return run


def read_counts(found: Json) -> Run:
    """`bench.roofline`'s and `bench.kernel_builds`': every number is a count, but for estimates and measurements."""
    return Run(counts=dict(leaves({name: value for name, value in found.items() if name != "estimates"})))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from leaves(child, f"{path}, {name}" if path else name)
    else:
        yield path, value


KINDS = {
    "benchmarks": ("pytest-benchmark", read_benchmarks),
    "mask_head_gmac": ("ladder", read_ladder),
    "sections": ("gpu", read_gpu),
    "stages": ("roofline", read_counts),
    "triton": ("kernel builds", read_counts),
}


def read(path: Path) -> tuple[str, Run]:
    """The kind of a file, and what it says.

    Raises:
        ValueError: not JSON, or of none of `KINDS`.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = next((kind for key, kind in KINDS.items() if isinstance(found, dict) and key in found), None)
    if kind is None:
        raise ValueError(f"{path}: none of {', '.join(name for name, _ in KINDS.values())}")
    name, reader = kind
    try:
        return name, reader(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no {name} file that bench wrote: {type(error).__name__} {error}") from error


# ---- the comparison ----


class Finding(NamedTuple):
    """Something that differs.

    Attributes:
        word: "slower", "unclear", "faster", "changed", "resized", "gone" or "new".
        name: of the ratio or count.
        detail: how.
        fails: whether it makes the comparison fail.
    """

    word: str
    name: str
    detail: str = ""
    fails: bool = False


def compare(old: Run, new: Run, threshold: float = THRESHOLD) -> list[Finding]:
    """What differs, the worst first."""
    found = [Finding("gone", name, fails=old.ratios[name].ours) for name in old.ratios.keys() - new.ratios.keys()]
    found += [Finding("gone", name, fails=True) for name in old.counts.keys() - new.counts.keys()]
    found += [Finding("new", name) for name in (new.ratios | new.counts).keys() - (old.ratios | old.counts).keys()]
    for name in old.ratios.keys() & new.ratios.keys():
        if old.settings.get(name) != new.settings.get(name):
            detail = f"{old.settings.get(name)} before, {new.settings.get(name)} now: not judged"
            found.append(Finding("resized", name, detail, fails=True))
        else:
            found += _judged(name, old.ratios[name], new.ratios[name], threshold)
    for name in old.counts.keys() & new.counts.keys():
        if old.counts[name] != new.counts[name]:
            found.append(Finding("changed", name, f"{old.counts[name]} before, {new.counts[name]} now", fails=True))
    return sorted(found, key=lambda finding: (not finding.fails, finding.word, finding.name))


def _judged(name: str, old: Ratio, new: Ratio, threshold: float) -> list[Finding]:
    changes, spread = (new.best / old.best, new.median / old.median), max(old.spread, new.spread)
    detail = (
        f"x {changes[0]:.2f} (median x {changes[1]:.2f}, spread x {spread:.2f}): "
        f"{old.best:.3g} of the reference's time, now {new.best:.3g}"
    )
    if min(changes) > threshold * spread:
        return [Finding("slower", name, detail, fails=old.ours)]
    if min(changes) > threshold:
        return [Finding("unclear", name, detail)]
    if max(changes) < 1 / (threshold * spread):
        return [Finding("faster", name, detail)]
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=f"by which a ratio may grow ({THRESHOLD})")
    options = parser.parse_args(arguments)
    try:
        if not options.threshold > 1:
            raise ValueError(f"--threshold must be above 1, got {options.threshold}")
        (kind, old), (new_kind, new) = read(options.old), read(options.new)
        if kind != new_kind:
            raise ValueError(f"{options.old} is of the kind {kind}, {options.new} of the kind {new_kind}")
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    found = compare(old, new, options.threshold)
    for finding in found:
        print(f"{finding.word:8} {finding.name}{': ' + finding.detail if finding.detail else ''}")
    failed = sum(finding.fails for finding in found)
    both = len(old.ratios.keys() & new.ratios.keys()), len(old.counts.keys() & new.counts.keys())
    print(f"{both[0]} ratios and {both[1]} counts compared: {len(found)} differ, {failed} of them must not")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
