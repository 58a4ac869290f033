"""The speed-up ladder as a chart.

    python -m bench.chart bench/results/ladder-cpu.json docs/images/ladder-cpu.svg

The same JSON gives the same SVG, and a test holds the committed one to it. Colours follow the reader's light or dark
theme.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

# What each step of `bench.ladder` adds; in the chart's order, slowest upstream first
STEPS = {
    "transformers": "transformers {version}, no merge",
    "plain": "plain: facebookresearch's algorithm",
    "pruned": "+ masks of the kept queries only",
    "splits": "+ what queries share, once an image",
    "sub-pixel": "+ upsampling inside the convolutions",
    "folded": "+ norms folded into the convolutions",
    "channels_last": "+ NHWC memory",
    "projections": "+ fewer, larger GEMMs",
    "caches": "+ constants kept between calls",
    "merge": "+ merge of the needed pixels only",
    "bf16": "+ bfloat16, which changes the numbers",
}

WIDTH, LABELS, VALUES, ROW, BAR, TOP = 880, 290, 130, 26, 16, 56

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }}
.title {{ font-size: 15px; font-weight: 600; }}
.note, .value {{ fill: #57606a; }}
.theirs {{ fill: #8c959f; }}
.exact {{ fill: #0969da; }}
.inexact {{ fill: #bf8700; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }}
.note, .value {{ fill: #9198a1; }}
.theirs {{ fill: #6e7681; }}
.exact {{ fill: #4493f8; }}
.inexact {{ fill: #d29922; }}
}}
</style>
<text class="title" x="0" y="18">{title}</text>
<text class="note" x="0" y="38">{note}</text>
{rows}
</svg>
"""


def chart(result: dict[str, Any]) -> str:
    """SVG of what `bench.ladder` measured: a bar for each step's best round."""
    rows, machine = result["rows"], result["machine"]
    best = {name: min(rows[name]["seconds"]) for name in STEPS if name in rows}
    longest = max(best.values())
    height, width = result["size"]
    return SVG.format(
        width=WIDTH,
        height=TOP + ROW * len(best),
        title=f"Seconds for a panoptic picture: DETR-R50, {height} x {width}, {result['kept']} of 100 queries kept",
        note=escape(
            f"{machine['cores']} cores of an {machine['cpu']}, torch {machine['torch']}; "
            f"best of {len(rows['plain']['seconds'])} rounds; shorter is better"
        ),
        rows="\n".join(
            _row(number, name, seconds, best["plain"], longest, rows[name])
            for number, (name, seconds) in enumerate(best.items())
        ),
    )


def _row(number: int, name: str, seconds: float, plain: float, longest: float, row: dict[str, Any]) -> str:
    y = TOP + ROW * number
    length = (WIDTH - LABELS - VALUES) * seconds / longest
    kind = {"transformers": "theirs", "plain": "theirs", "bf16": "inexact"}.get(name, "exact")
    value = f"{seconds:.2f} s" + (f", {plain / seconds:.1f} x plain" if kind != "theirs" else "")
    return (
        f'<text x="0" y="{y + 12}">{escape(STEPS[name].format(version=row.get("version")), quote=False)}</text>'
        f'<rect class="{kind}" x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
        f'<text class="value" x="{LABELS + length + 8:.1f}" y="{y + 12}">{value}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, metavar="FILE.json", help="of bench.ladder")
    parser.add_argument("out", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    arguments.out.write_text(chart(json.loads(arguments.result.read_text())))


if __name__ == "__main__":
    main()
