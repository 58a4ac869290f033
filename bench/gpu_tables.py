"""The tables of `bench.gpu`, in Markdown, from the JSON that it writes."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]


def broken(result: Row) -> list[str]:
    """What failed or was wrong, one line each; what was not run is neither."""
    found = []
    for name, section in result["sections"].items():
        if section["status"].startswith("failed"):
            found.append(f"{name}: {section['status']}")
        for row in section["rows"]:
            reason = row.get("failed") or row.get("wrong")
            if reason:
                found.append(f"{name}, {label(row)}: {reason}")
    return found


def label(row: Row) -> str:
    parts = (row.get("op"), row["name"], f"batch {row['batch']}" if "batch" in row else None)
    return ", ".join(part for part in parts if part)


def tables(result: Row) -> str:
    """All sections in Markdown."""
    found, sections = result["machine"], result["sections"]
    versions = found["versions"]
    lines = [
        f"{found['device']} (sm_{found['capability'].replace('.', '')}), driver {found['driver']}, "
        f"torch {versions['torch']}, CUDA {found['cuda']}, Triton {versions['triton']}, "
        f"commit {found['commit'][:10] or 'unknown'}. Times are medians.",
    ]
    headings = {"kernels": kernel_table, "ladder": ladder_table, "compiled": ladder_table, "predictor": predictor_table}
    for name, section in sections.items():
        lines += ["", f"{name}: {section['status']}, {section['seconds']:.0f} s", ""]
        if name == "ceilings":
            lines += [f"- {row['name']}: {rate(row)}" for row in section["rows"] if "seconds" in row]
        elif name == "tests":
            lines += [f"- {row.get('summary', 'not run')}" for row in section["rows"]]
        else:
            lines += headings[name](section["rows"], ceilings_of(sections))
        lines += [f"- not run: {label(row)}, {row['not_run']}" for row in section["rows"] if "not_run" in row]
    return "\n".join([*lines, "", *(f"- BROKEN {line}" for line in broken(result))])


def rate(row: Row) -> str:
    seconds = statistics.median(row["seconds"])
    return (
        f"{row['bytes'] / seconds / 1e9:.0f} GB/s" if "bytes" in row else f"{row['flops'] / seconds / 1e12:.0f} TFLOP/s"
    )


def ceilings_of(sections: Row) -> dict[str, float]:
    """Bytes and FLOP a second by name, as measured."""
    rows = sections.get("ceilings", {"rows": []})["rows"]
    timed = [row for row in rows if "seconds" in row]
    return {row["name"]: (row.get("bytes") or row["flops"]) / statistics.median(row["seconds"]) for row in timed}


def kernel_table(rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """Rates are of the graph where there is one, else of the cold call."""
    lines = [
        "| kernel | shape | cold us | graph us | GB/s | % of copy | TFLOP/s | % of GEMM | x plain | x best rival |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (row for row in rows if "ours" in row):
        cold, best = median(row["ours"], "cold"), fastest(row["ours"])
        graph = f"{median(row['ours'], 'graph') * 1e6:.1f}" if "graph" in row["ours"] else ""
        bandwidth, arithmetic = row["bytes"] / best, row["flops"] / best
        share, gemm = (
            f"{value / ceilings[name]:.0%}" if name in ceilings else ""
            for value, name in ((bandwidth, "copy"), (arithmetic, f"GEMM {row['dtype']}"))
        )
        known = ("op", "name", "dtype", "bytes", "flops", "ours", "plain")
        rivals = {name: fastest(value) for name, value in row.items() if name not in known and "cold" in value}
        rival = min(rivals, key=lambda name: rivals[name]) if rivals else None
        against = f"{rivals[rival] / best:.2f} ({rival})" if rival else ""
        lines.append(
            f"| {row['op']} | {row['name']} | {cold * 1e6:.1f} | {graph} | {bandwidth / 1e9:.0f} | {share} | "
            f"{arithmetic / 1e12:.2f} | {gemm} | {median(row['plain'], 'cold') / cold:.1f} | {against} |"
        )
    return lines


def median(timing: Row, kind: str) -> float:
    return statistics.median(timing[kind])


def fastest(timing: Row) -> float:
    return median(timing, "graph" if "graph" in timing else "cold")


def ladder_table(rows: list[Row], _: dict[str, float]) -> list[str]:
    lines = [
        "| model | batch | ms | images/s | x plain fp32 | x plain fp16 | peak MiB | error: logits | boxes | masks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    seconds = {(row["name"], row["batch"]): statistics.median(row["seconds"]) for row in rows if "seconds" in row}
    for row in (row for row in rows if "seconds" in row):
        own, batch = seconds[row["name"], row["batch"]], row["batch"]
        bases = (seconds.get((name, batch)) for name in ("plain fp32 eager", "plain fp16 autocast"))
        ratios = " | ".join(f"{base / own:.1f}" if base else "" for base in bases)
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else ""
        error = " | ".join(f"{row['error'][name]:.1e}" for name in ("logits", "boxes", "masks"))
        lines.append(f"| {row['name']} | {batch} | {own * 1e3:.1f} | {batch / own:.1f} | {ratios} | {peak} | {error} |")
    return lines


def predictor_table(rows: list[Row], _: dict[str, float]) -> list[str]:
    lines = [
        "| pictures | batch | dtype | images/s | of which prepared/s | kept queries | segments |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (row for row in rows if "seconds" in row):
        speed, prepared = (row["images"] / statistics.median(row[name]) for name in ("seconds", "prepare"))
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['dtype']} | {speed:.1f} | {prepared:.1f} | {row['kept']:.1f} | "
            f"{row['segments']:.1f} |"
        )
    return lines
