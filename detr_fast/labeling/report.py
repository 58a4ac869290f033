"""report.html: some of the images with their labels, and statistics, in one page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from array import array
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr_fast.files import write_atomic
from detr_fast.images import read_image
from detr_fast.labeling.formats import PANOPTIC
from detr_fast.labeling.manifest import Manifest, Run
from detr_fast.labeling.results import LabelSummary, found_categories
from detr_fast.visualize import caption, draw_segments

PICTURE_SIDE = 800  # pixels of the longer side

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 2rem; color: #222;
  background: #fff; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 .5rem; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .5rem; margin: 0; }}
dl div {{ background: #f2f2f2; border-radius: .4rem; padding: .4rem .7rem; }}
dt {{ color: #666; font-size: .8rem; }}
dd {{ font-size: 1.3rem; margin: 0; }}
figure {{ margin: 0; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }}
img {{ border-radius: .4rem; display: block; height: auto; width: 100%; }}
figcaption {{ font-size: .85rem; }}
ul.legend {{ display: flex; flex-wrap: wrap; gap: 0 .8rem; list-style: none; margin: 0; padding: 0; }}
.chip {{ border: 1px solid #0003; border-radius: .2rem; display: inline-block; height: .8em; margin-right: .3em;
  vertical-align: -.05em; width: .8em; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ padding: .1rem .5rem .1rem 0; vertical-align: top; }}
td:first-child {{ min-width: 8rem; }}
td.number {{ text-align: right; white-space: nowrap; width: 1%; }}
td.bar {{ width: 45%; }}
td.bar span {{ background: #4477aa; display: block; height: .8em; margin-top: .35em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<dl>{numbers}</dl>
<h2>Images</h2>
<div class="pictures">{pictures}</div>
<h2>Segments by class</h2>
<table>{classes}</table>
<h2>Segments by area in pixels</h2>
<table>{areas}</table>
<h2>Failures</h2>
{failures}
<h2>Settings</h2>
<table>{settings}</table>
</body>
</html>
"""


def write(out: Path, run: Run, summary: LabelSummary, manifest: Manifest, labelled: array[int], count: int) -> None:
    """Writes report.html.

    Args:
        labelled: ids of the images that are labelled, of which `count`, evenly spaced, are shown.

    Raises:
        OSError: it cannot be written, or a PNG cannot be read.
    """
    categories = found_categories(run, summary)
    chosen = [labelled[k * len(labelled) // count] for k in range(min(count, len(labelled)))]
    figures = (_figure(out, run, manifest[image_id], categories) for image_id in chosen)
    page = PAGE.format(
        title=f"Labels of {escape(Path(run.images).name)}",
        numbers="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _numbers(summary)),
        pictures="".join(figures),
        classes=_class_rows(summary, categories),
        areas=_area_rows(summary),
        failures=_failures(summary),
        settings=_rows((name, json.dumps(value)) for name, value in run.settings.items()),
    )
    write_atomic(out / "report.html", page.encode(errors="replace"))


def _numbers(summary: LabelSummary) -> Iterator[tuple[str, str]]:
    yield "labelled", f"{summary.labelled:,}"
    yield "failed", f"{summary.failed:,}"
    yield "segments", f"{summary.segments:,}"
    yield "segments an image", f"{summary.segments / max(1, summary.labelled):.1f}"
    if summary.computed:
        yield "images/s", f"{summary.computed / summary.seconds:.2f}"
        yield "seconds", f"{summary.seconds:,.0f}"


def _figure(out: Path, run: Run, record: dict[str, Any], categories: list[dict[str, Any]]) -> str:
    file, segments_info = record["file"], record["segments_info"]
    try:
        image = read_image(Path(run.images, file), exif=run.settings["exif_orientation"] == "apply")
    except (ValueError, OSError) as error:  # it has been moved or changed since
        return f"<figure><figcaption>{_text(file)}: {_text(str(error))}</figcaption></figure>"
    with Image.open(out / PANOPTIC.path(file)) as png:
        colors = np.asarray(png).astype(np.int32)
    ids = colors[:, :, 0] | colors[:, :, 1] << 8 | colors[:, :, 2] << 16
    scale = min(1.0, PICTURE_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    ids = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    visible = [info for info in segments_info if (ids == info["id"]).any()]
    picture = draw_segments(image.resize(size), ids, visible, categories)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    by_id = {category["id"]: category for category in categories}
    legend = "".join(
        f"<li>{_chip(by_id[info['category_id']])}"
        f"{_text(caption(by_id[info['category_id']]['name'], info.get('score')))}</li>"
        for info in segments_info
    )
    return (
        f'<figure><img alt="{_text(file)}" width="{size[0]}" height="{size[1]}" '
        f'src="data:image/jpeg;base64,{encoded}"><figcaption>{_text(file)}'
        f'<ul class="legend">{legend}</ul></figcaption></figure>'
    )


def _class_rows(summary: LabelSummary, categories: list[dict[str, Any]]) -> str:
    by_id = {category["id"]: category for category in categories}
    most = max(summary.classes.values(), default=1)
    return "".join(
        f"<tr><td>{_chip(by_id[index])}{_text(by_id[index]['name'])}</td>{_bar(number, most)}</tr>"
        for index, number in summary.classes.most_common()
    )


def _area_rows(summary: LabelSummary) -> str:
    """A row for each doubling of the area."""
    most = max(summary.areas.values(), default=1)
    digits = range(min(summary.areas, default=1), 1 + max(summary.areas, default=0))
    return "".join(
        f"<tr><td>{1 << (digit - 1):,} to {(1 << digit) - 1:,}</td>{_bar(summary.areas[digit], most)}</tr>"
        for digit in digits
    )


def _failures(summary: LabelSummary) -> str:
    if not summary.failed:
        return "<p>None.</p>"
    more = summary.failed - len(summary.failures)
    rows = _rows((failure["file"], failure["error"]) for failure in summary.failures)
    return f"<table>{rows}</table>" + (f"<p>and {more:,} more in failures.jsonl</p>" if more else "")


def _rows(pairs: Iterator[tuple[str, str]]) -> str:
    return "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in pairs)


def _bar(number: int, most: int) -> str:
    width = 100 * number / most
    return f'<td class="number">{number:,}</td><td class="bar"><span style="width:{width:.1f}%"></span></td>'


def _chip(category: dict[str, Any]) -> str:
    red, green, blue = category["color"]
    return f'<span class="chip" style="background:rgb({red},{green},{blue})"></span>'


def _text(text: str) -> str:
    return escape(text.encode(errors="backslashreplace").decode())
