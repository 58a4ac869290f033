"""Synthetic photographs with exact annotations, as a COCO panoptic data set.

A scene is a landscape or a floor seen from above, made of textured stuff, with shaded and patterned solids of eight
shapes standing and floating in it. A class has its typical hue, as many real things have; strength, brightness,
pattern, lighting, size, rotation, occlusion and truncation vary. Every pixel belongs to a segment.
"""

from __future__ import annotations

import colorsys
import math
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import special
from tqdm import tqdm

from detr_fast import __version__
from detr_fast.files import open_atomic, write_json

THINGS = ("disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart")
STUFF = ("sky", "mountain", "grass", "sand", "water", "pavement")
SKY, MOUNTAIN, GRASS, SAND, WATER, PAVEMENT = range(len(STUFF))
STUFF_COLORS = ((110, 170, 230), (120, 105, 120), (80, 150, 60), (225, 200, 140), (40, 90, 170), (150, 150, 150))

# Things have ids 1 to 8 and stuff 9 to 14: as in COCO, things come first and no category is 0.
CATEGORIES: list[dict[str, Any]] = [
    {
        "id": index + 1,
        "name": name,
        "supercategory": "shape",
        "isthing": 1,
        "color": [round(255 * c) for c in colorsys.hsv_to_rgb(index / len(THINGS), 0.8, 0.95)],
    }
    for index, name in enumerate(THINGS)
] + [
    {
        "id": len(THINGS) + index + 1,
        "name": name,
        "supercategory": "ground" if index >= GRASS else "background",
        "isthing": 0,
        "color": list(STUFF_COLORS[index]),
    }
    for index, name in enumerate(STUFF)
]

MIN_SIDE = 32  # pixels
MIN_AREA = 0.003  # of the image: the least that is seen of any segment
MIN_VISIBLE = 0.35  # of a thing: the least that is neither hidden nor outside the image
MAX_COVER = 0.6  # of the image: the most that all things together can hide
MAX_THINGS = 7  # in an image; with all of STUFF fewer than the 32 bits of `_segments`
RADIUS = (0.08, 0.26)  # of the shorter side
HUES = 0.06  # by which a thing's colours differ from those of its class, of 1 for the whole circle

TILE = 512  # side of the textures, which repeat; a power of two
LEVELS = 256
CHUNK = 32  # images a worker makes at a time

_Part = tuple[Path, int, tuple[int, int], range]  # folder, seed, (height, width) and the images' indices
_Annotations = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # panoptic, and of instances


@dataclass(frozen=True)
class Scene:
    """A picture and its segments.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        ids: int32 [H, W], the segment of each pixel; from 1 without a gap.
        segments: of each id in order {"id", "category_id", "area", "bbox" (x, y, width, height), "iscrowd"}. Stuff
            comes first, then things from the farthest to the nearest.
        jpeg_quality: how to store the picture, 60 to 95.
    """

    image: np.ndarray
    ids: np.ndarray
    segments: list[dict[str, Any]]
    jpeg_quality: int


@dataclass(frozen=True)
class _Thing:
    """A solid that may be partly outside the image; `rows` and `columns` are its window, cut to the image.

    `u` and `v` are coordinates in its own frame, in which it reaches about 1, and `distance` from its outline is in
    the same unit, negative inside: float32, of the window's size.
    """

    kind: int
    x: float
    y: float
    radius: float
    flying: bool
    rows: slice
    columns: slice
    u: np.ndarray
    v: np.ndarray
    distance: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return self.distance < 0


def render(seed: int, index: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Image `index` of the endless series `seed`, the same one however many are made.

    Args:
        size: (height, width) in pixels, each at least 32.

    Raises:
        ValueError: `seed` or `index` is negative or `size` is too small.
    """
    height, width = size
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size must be at least {MIN_SIDE} pixels a side, got {height} x {width}")
    rng = np.random.default_rng((seed, index))
    horizon = _horizon(rng, height)
    stuff = _layout(rng, height, width, horizon)
    things = _visible(stuff, _place(rng, height, width, horizon))
    stuff = _without_slivers(stuff, things)

    light = _Light.draw(rng)
    image = _landscape(rng, stuff, horizon)
    for thing in things:
        _cast_shadow(image, thing, light, from_above=horizon < 0)
        _paint(rng, image, thing, light)
    ids, segments = _segments(stuff, things)
    return Scene(_expose(rng, image, light), ids, segments, int(rng.integers(60, 96)))


def write_dataset(
    out: str | os.PathLike[str],
    images: int,
    seed: int,
    size: tuple[int, int] = (256, 256),
    workers: int = 1,
    progress: bool = False,
) -> None:
    """Writes images 0 to `images` - 1 of the series `seed` in COCO's formats; equal arguments give equal bytes.

    Below `out`: `images/*.jpg`, `panoptic/*.png` (id = R + 256 G + 65536 B), `panoptic.json` and `instances.json`
    (the things, with compressed RLE). `render(seed, i)` becomes the image with id i + 1.

    Args:
        out: a folder that is new or empty.
        size: (height, width) in pixels, each at least 32.
        workers: processes; they change the speed only. With more than one, a script that calls this needs the
            `if __name__ == "__main__"` of multiprocessing.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `out` is not empty, `images` or `workers` is below 1, or `render` does not accept the rest.
        OSError: a file cannot be written.
    """
    out = Path(out)
    if images < 1 or workers < 1:
        raise ValueError(f"images and workers must be at least 1, got {images} and {workers}")
    render(seed, 0, size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}")
    for name in ("images", "panoptic"):
        (out / name).mkdir(parents=True)

    parts = [(out, seed, size, range(start, min(start + CHUNK, images))) for start in range(0, images, CHUNK)]
    with tqdm(total=images, unit="image", disable=not progress) as bar:
        annotations, instances = _write_parts(parts, workers, bar)
    _write_annotations(out, images, seed, size, annotations, instances)


def _write_parts(parts: list[_Part], workers: int, bar: tqdm) -> _Annotations:
    """Writes the images of all parts; their panoptic and instance annotations, in order."""
    annotations: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    pool = None
    if workers > 1:
        # the parent alone answers Ctrl-C, so that the workers print nothing
        ignore = (signal.SIGINT, signal.SIG_IGN)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore)
    try:
        done = pool.map(_write_part, parts) if pool else map(_write_part, parts)
        for part_annotations, part_instances in done:
            annotations += part_annotations
            instances += part_instances
            bar.update(len(part_annotations))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return annotations, instances


def _write_annotations(
    out: Path,
    images: int,
    seed: int,
    size: tuple[int, int],
    annotations: list[dict[str, Any]],
    instances: list[dict[str, Any]],
) -> None:
    """Writes panoptic.json and instances.json."""
    height, width = size
    records = [
        {"id": index + 1, "file_name": f"{index + 1:06d}.jpg", "width": width, "height": height}
        for index in range(images)
    ]
    info = {"description": f"synthetic shapes, seed {seed}", "version": __version__}
    things = [{key: c[key] for key in ("id", "name", "supercategory")} for c in CATEGORIES if c["isthing"]]
    instances = [{"id": number, **instance} for number, instance in enumerate(instances, start=1)]
    for name, found, categories in (("panoptic", annotations, CATEGORIES), ("instances", instances, things)):
        content = {"info": info, "images": records, "annotations": found, "categories": categories}
        write_json(out / f"{name}.json", content)


def _write_part(part: _Part) -> _Annotations:
    """Writes the images of one part; their panoptic and instance annotations."""
    out, seed, size, indices = part
    annotations, instances = [], []
    for index in indices:
        scene, image_id, name = render(seed, index, size), index + 1, f"{index + 1:06d}"
        with open_atomic(out / "images" / f"{name}.jpg") as file:
            Image.fromarray(scene.image).save(file, "JPEG", quality=scene.jpeg_quality)
        # ids stay below 256, so red holds all of them
        red, empty = Image.fromarray(scene.ids.astype(np.uint8)), Image.new("L", (size[1], size[0]))
        with open_atomic(out / "panoptic" / f"{name}.png") as file:
            Image.merge("RGB", (red, empty, empty)).save(file, "PNG", compress_level=3)
        annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": scene.segments})
        columns = np.ascontiguousarray(scene.ids.T)
        for segment in scene.segments:
            if segment["category_id"] > len(THINGS):
                continue
            rle = coco_mask.encode((columns == segment["id"]).view(np.uint8).T)
            rle["counts"] = rle["counts"].decode("ascii")
            instance = {key: segment[key] for key in ("category_id", "bbox", "area", "iscrowd")}
            instances.append({"image_id": image_id, **instance, "segmentation": rle})
    return annotations, instances


# ---- where things and stuff are ----


def _horizon(rng: np.random.Generator, height: int) -> float:
    """The row of the horizon; below 0 the ground is seen from above."""
    return rng.uniform(0.2, 0.55) * height if rng.random() < 0.75 else -1.0


def _layout(rng: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """The stuff of each pixel, an index of STUFF: uint8 [H, W]."""
    ground = rng.permutation([GRASS, SAND, WATER, PAVEMENT])
    y = np.arange(height, dtype=np.float32)[:, None]
    unit = min(height, width)
    if horizon > 0:
        layers, edges = [SKY, ground[0]], [horizon + _profile(rng, width, rng.uniform(0, 0.01) * unit, 1.0)]
        if rng.random() < 0.5:
            ridge = horizon - rng.uniform(0.08, 0.2) * unit + _profile(rng, width, 0.06 * unit, 1.5)
            layers.insert(1, MOUNTAIN)
            edges.insert(0, np.minimum(ridge, edges[0]))
        for kind in ground[1 : rng.integers(1, 4)]:
            step = rng.uniform(0.15, 0.4) * (height - horizon) + _profile(rng, width, 0.04 * unit, 0.7)
            layers.append(kind)
            edges.append(edges[-1] + np.maximum(step, 0))
        stuff = np.asarray(layers, np.uint8)[sum((y >= edge).view(np.uint8) for edge in edges)]
    else:
        stuff = np.full((height, width), ground[0], np.uint8)
        if rng.random() < 0.6:  # a second ground beyond a border of any direction
            angle, x = rng.uniform(0, 2 * np.pi), np.arange(width, dtype=np.float32)
            side = np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2)
            side += _patch(rng, height, width) * 0.05 * unit
            stuff[side > rng.uniform(-0.3, 0.3) * unit] = ground[1]
    if rng.random() < 0.4:  # a pond, a lawn, a clearing
        x = np.arange(width, dtype=np.float32)
        center_x, center_y = rng.uniform(0, width), max(horizon, 0) + rng.uniform(0.3, 1) * (height - max(horizon, 0))
        radius = rng.uniform(0.2, 0.45) * unit
        flat = 0.45 if horizon > 0 else 1.0
        blob = ((x - center_x) / radius) ** 2 + ((y - center_y) / (flat * radius)) ** 2
        blob += _patch(rng, height, width) * 0.25
        stuff[(blob < 1) & (y > horizon + 0.02 * height)] = ground[3]
    return stuff


def _profile(rng: np.random.Generator, width: int, amplitude: float, stretch: float) -> np.ndarray:
    """A random line of hills, float32 [width] of about +-2 amplitude."""
    line = _clouds()[rng.integers(TILE)]
    at = rng.integers(TILE) + np.arange(width) * (stretch * 256 / width)
    return np.interp(at, np.arange(TILE), amplitude * line, period=TILE).astype(np.float32)


def _patch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A window of smooth noise of mean 0 and deviation 1, float32 [H, W]."""
    step = 256 / max(height, width)
    rows = (rng.integers(TILE) + np.arange(height) * step).astype(np.intp) % TILE
    columns = (rng.integers(TILE) + np.arange(width) * step).astype(np.intp) % TILE
    return _clouds().take(rows, axis=0).take(columns, axis=1)


def _place(rng: np.random.Generator, height: int, width: int, horizon: float) -> list[_Thing]:
    """Things from the farthest to the nearest; some may be hidden."""
    things: list[_Thing] = []
    unit, cover = min(height, width), 0.0
    for _ in range(rng.integers(1, MAX_THINGS + 1)):
        kind = int(rng.integers(len(THINGS)))
        y = rng.uniform(0.05, 0.98) * height
        depth = 0.8 + 0.4 * y / height  # what is lower in the picture is nearer, thus larger
        radius = (
            unit * math.exp(rng.uniform(math.log(RADIUS[0]), math.log(RADIUS[1]))) * (depth if horizon > 0 else 1.0)
        )
        thing = _thing(rng, kind, rng.uniform(0, width), y, radius, height, width, y + radius < horizon + 0.1 * unit)
        cover += thing.mask.sum() / (height * width)
        if cover > MAX_COVER:
            break
        things.append(thing)
    return sorted(things, key=lambda thing: thing.y + thing.radius)


def _thing(
    rng: np.random.Generator, kind: int, x: float, y: float, radius: float, height: int, width: int, flying: bool
) -> _Thing:
    reach = 1.3 * radius
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 2, height))
    columns = slice(max(int(x - reach), 0), min(int(x + reach) + 2, width))
    dx = (np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(x)) / np.float32(radius)
    dy = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y)) / np.float32(radius)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (cos * dx + sin * dy) * np.float32(stretch), (cos * dy - sin * dx) / np.float32(stretch)
    return _Thing(kind, x, y, radius, flying, rows, columns, u, v, OUTLINES[kind](u, v))


def _visible(stuff: np.ndarray, things: list[_Thing]) -> list[_Thing]:
    """Those that enough is seen of. Leaving others out only uncovers more of them."""
    seen = _count(stuff, things)[len(STUFF) :]
    least = [max(MIN_VISIBLE * _areas()[t.kind] * t.radius**2, MIN_AREA * stuff.size) for t in things]
    return [thing for thing, area, enough in zip(things, seen, least, strict=True) if area >= enough]


def _without_slivers(stuff: np.ndarray, things: list[_Thing]) -> np.ndarray:
    """Gives the stuff of which too little is seen to the stuff of which most is seen."""
    seen = _count(stuff, things)[: len(STUFF)]
    kept = np.where(seen >= MIN_AREA * stuff.size, np.arange(len(STUFF)), seen.argmax())
    return kept.astype(np.uint8).take(stuff)


def _count(stuff: np.ndarray, things: list[_Thing]) -> np.ndarray:
    """Pixels that are seen of each of STUFF, then of each thing."""
    return np.bincount(_overlay(stuff, things).ravel(), minlength=len(STUFF) + len(things))


def _overlay(stuff: np.ndarray, things: list[_Thing]) -> np.ndarray:
    """What each pixel shows, an index of STUFF or, after those, of `things`: uint8 [H, W]."""
    seen = stuff.copy()
    for label, thing in enumerate(things, start=len(STUFF)):
        seen[thing.rows, thing.columns][thing.mask] = label
    return seen


def _segments(stuff: np.ndarray, things: list[_Thing]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    labels, areas = _overlay(stuff, things), _count(stuff, things)
    categories = [len(THINGS) + kind + 1 for kind in range(len(STUFF))] + [thing.kind + 1 for thing in things]
    bits = (np.uint32(1) << np.arange(len(areas), dtype=np.uint32)).take(labels)
    in_column, in_row = np.bitwise_or.reduce(bits, axis=0), np.bitwise_or.reduce(bits, axis=1)
    segments: list[dict[str, Any]] = []
    for label in np.flatnonzero(areas).tolist():
        x, y = np.flatnonzero(in_column >> label & 1), np.flatnonzero(in_row >> label & 1)
        segments.append(
            {
                "id": len(segments) + 1,
                "category_id": categories[label],
                "area": int(areas[label]),
                "bbox": [int(x[0]), int(y[0]), int(x[-1] - x[0]) + 1, int(y[-1] - y[0]) + 1],
                "iscrowd": 0,
            }
        )
    return np.cumsum(areas > 0, dtype=np.int32).take(labels), segments


# ---- outlines: signed distance, exact near the outline or almost ----


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - np.float32(0.95)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, np.float32(0.75**0.5) * np.abs(u) - np.float32(0.5) * v) - np.float32(0.55)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points; folded onto half of one, its outline is a line from the point to a notch."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(u, v) + sector / 2) % sector - sector / 2)
    point, notch = np.array([1.1, 0.0]), 0.5 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1], point[0] - notch[0]])
    normal /= np.linalg.norm(normal)
    along, across = normal.astype(np.float32)
    return np.hypot(u, v) * (along * np.cos(angle) + across * np.sin(angle)) - np.float32(normal @ point)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(long - np.float32(1.0), short - np.float32(0.36))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - np.float32(0.75)) - np.float32(0.25)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(u, v) - np.float32(1.0), np.float32(0.75) - np.hypot(u - np.float32(0.6), v))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A square on its corner and a disc on each upper side."""
    half = np.float32(0.62)
    side, u = half / np.float32(2**0.5), np.abs(u)
    square = (u + np.abs(v)) / np.float32(2**0.5) - half
    return np.minimum(square, np.hypot(u - side, v + side) - half)


OUTLINES = (_disc, _square, _triangle, _star, _cross, _ring, _crescent, _heart)  # in the order of THINGS


@cache
def _areas() -> list[float]:
    """Of each of THINGS with radius 1."""
    side = np.linspace(-1.3, 1.3, 261, dtype=np.float32)
    return [float((outline(side, side[:, None]) < 0).mean()) * 2.6**2 for outline in OUTLINES]


# ---- how they look ----

# Colours from the texture's darkest to its lightest, some for each stuff.
Ramp = tuple[tuple[int, int, int], ...]
RAMPS: dict[int, tuple[Ramp, ...]] = {
    SKY: (
        ((58, 118, 200), (96, 152, 222), (168, 200, 236), (244, 246, 250)),
        ((120, 138, 160), (158, 172, 188), (196, 204, 212), (228, 230, 234)),
        ((122, 116, 172), (206, 150, 150), (244, 188, 140), (255, 226, 180)),
    ),
    MOUNTAIN: (
        ((52, 50, 58), (92, 86, 92), (130, 122, 124), (178, 172, 172)),
        ((62, 46, 40), (110, 82, 66), (150, 118, 94), (196, 168, 140)),
        ((44, 54, 68), (78, 92, 108), (124, 136, 150), (224, 230, 238)),
    ),
    GRASS: (
        ((26, 50, 16), (60, 98, 32), (98, 140, 54), (160, 186, 92)),
        ((44, 58, 20), (96, 112, 46), (140, 150, 70), (188, 190, 112)),
    ),
    SAND: (
        ((158, 126, 82), (204, 174, 122), (226, 202, 154), (246, 230, 192)),
        ((140, 104, 76), (184, 146, 108), (208, 174, 136), (234, 208, 174)),
    ),
    WATER: (
        ((8, 40, 70), (22, 74, 116), (50, 112, 154), (196, 222, 236)),
        ((10, 58, 66), (30, 104, 112), (70, 148, 150), (206, 236, 232)),
    ),
    PAVEMENT: (
        ((66, 64, 64), (118, 116, 114), (146, 144, 142), (176, 174, 172)),
        ((74, 50, 44), (132, 84, 70), (156, 106, 90), (182, 136, 118)),
    ),
}


@dataclass(frozen=True)
class _Light:
    """Where light comes from (x right, y down, z to the viewer; of length 1), its colour, how bright a face is that is
    turned away, and how dark a cast shadow."""

    direction: np.ndarray
    color: np.ndarray
    ambient: float
    shadow: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Light:
        direction = np.array([rng.uniform(-1, 1), rng.uniform(-0.9, -0.3), rng.uniform(0.5, 1.0)])
        warmth = rng.uniform(-0.1, 0.1)
        color = rng.uniform(0.75, 1.12) * np.array([1 + warmth, 1.0, 1 - warmth])
        direction /= np.linalg.norm(direction)
        return cls(
            direction.astype(np.float32), color.astype(np.float32), rng.uniform(0.4, 0.65), rng.uniform(0.2, 0.6)
        )


def _landscape(rng: np.random.Generator, stuff: np.ndarray, horizon: float) -> np.ndarray:
    """The scene without things, float32 [3, H, W] in 0 to 255."""
    height, width = stuff.shape
    y, x = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    zoom = np.full(height, rng.uniform(0.7, 1.3) * 256 / min(height, width), np.float32)  # texture pixels a pixel
    if horizon > 0:  # many near the horizon, few close by
        zoom[y > horizon] *= 2.2 - 1.4 * (y[y > horizon] - horizon) / (height - horizon)
    rows = (rng.integers(TILE) + np.cumsum(zoom)).astype(np.intp) & (TILE - 1)
    columns = ((x - width / 2) * zoom[:, None] + float(rng.integers(TILE))).astype(np.intp) & (TILE - 1)
    columns += rows[:, None] * TILE
    kinds = stuff.astype(np.intp)
    texture = _textures().take(kinds * TILE**2 + columns)

    levels = kinds * LEVELS + texture
    jitter = rng.uniform(0.88, 1.12, (3, len(STUFF), 1)).astype(np.float32)
    chosen = [palettes[:, rng.integers(palettes.shape[1])] for palettes in _palettes()]
    colors = (np.stack(chosen, axis=1) * jitter).reshape(3, -1)
    image = colors.take(levels, axis=1)
    if horizon > 0:
        haze = rng.uniform(0.1, 0.6) * np.exp(-np.abs(y[:, None] - np.float32(horizon)) / (0.15 * height))
        image *= 1 - haze
        image += rng.uniform(190, 235, (3, 1, 1)).astype(np.float32) * haze
    slope_y, slope_x = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    shade = (1 + slope_y * (y / height - 0.5))[:, None] + slope_x * (x / width - 0.5)
    shade += _patch(rng, height, width) * np.float32(rng.uniform(0, 0.1))  # shadows of clouds
    image *= shade
    return image


def _cast_shadow(image: np.ndarray, thing: _Thing, light: _Light, from_above: bool) -> None:
    """Darkens the ground below a thing, or beside it if seen from above."""
    if thing.flying:
        return
    height, width = image.shape[1:]
    reach, flat, drop = 1.15 * thing.radius, 1.0 if from_above else 0.3, 0.35 if from_above else 0.8
    x, y = thing.x - light.direction[0] * 0.6 * thing.radius, thing.y + drop * thing.radius
    rows = slice(max(int(y - flat * reach), 0), max(min(int(y + flat * reach) + 1, height), 0))
    columns = slice(max(int(x - reach), 0), max(min(int(x + reach) + 1, width), 0))
    dx = (np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(x)) / np.float32(reach)
    dy = (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(y)) / np.float32(flat * reach)
    dark = np.clip(1 - dx**2 - dy[:, None] ** 2, 0, 0.6) * np.float32(light.shadow / 0.6)
    image[:, rows, columns] *= 1 - dark


def _paint(rng: np.random.Generator, image: np.ndarray, thing: _Thing, light: _Light) -> None:
    """Draws a thing over the image, smooth at its outline."""
    first, second = (_color(rng, thing.kind / len(THINGS) + rng.uniform(-HUES, HUES)) for _ in range(2))
    color = first + _pattern(rng, thing) * np.float32(rng.uniform(0.3, 1.0)) * (second - first)

    # its surface is round within `bevel` of the outline and flat further in
    bevel = np.float32(rng.uniform(0.12, 0.9))
    inside = np.clip(1 + thing.distance / bevel, 0, 1)
    relief = np.sqrt(1 - inside * inside) * (bevel * np.float32(thing.radius))
    slope_y, slope_x = np.gradient(relief)
    facing = light.direction[2] - slope_x * light.direction[0] - slope_y * light.direction[1]
    facing /= np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing = np.maximum(facing, 0)
    shade = np.float32(light.ambient) + np.float32(1.25 - light.ambient) * facing
    color *= shade
    for _ in range(4):
        facing *= facing  # to the 16th, Phong's highlight
    color += facing * np.float32(rng.uniform(0, 110))

    # full at the outline and inside, so that a pixel of the thing looks like the thing; then gone within a pixel
    cover = np.clip(1 - thing.distance * np.float32(thing.radius), 0, 1)
    window = image[:, thing.rows, thing.columns]
    color -= window
    color *= cover
    window += color


def _color(rng: np.random.Generator, hue: float) -> np.ndarray:
    """Of a thing: a random strength and brightness of the hue, float32 [3, 1, 1]."""
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.35, 1), rng.uniform(0.4, 1))
    return 255 * np.array(rgb, np.float32)[:, None, None]


def _pattern(rng: np.random.Generator, thing: _Thing) -> np.ndarray:
    """How much of its second colour each pixel of a thing has, float32 in 0 to 1."""
    choice, frequency, phase = rng.integers(5), np.float32(rng.uniform(6, 14)), np.float32(rng.uniform(0, 6))
    if choice == 0:
        wave = np.sin(frequency * thing.u + phase)
    elif choice == 1:
        wave = np.sin(frequency * thing.u + phase) * np.sin(frequency * thing.v) * 2
    elif choice == 2:
        wave = thing.v / 3
    else:  # a worn or a grained surface
        texture = _textures()[[MOUNTAIN, SAND][choice - 3]]
        y, x = rng.integers(TILE, size=2)
        rows = (y + np.arange(thing.u.shape[0])) % TILE
        wave = texture[rows[:, None], (x + np.arange(thing.u.shape[1])) % TILE] * np.float32(1 / 128) - 1
    return np.clip(np.float32(0.5) + np.float32(1.5) * wave, 0, 1)


def _expose(rng: np.random.Generator, image: np.ndarray, light: _Light) -> np.ndarray:
    """The scene as a camera's photograph, with noise: uint8 [H, W, 3]."""
    image *= light.color[:, None, None]
    noise = _normal() * np.float32(rng.uniform(1, 9))
    image += noise.take(rng.integers(0, LEVELS, image.shape, np.uint8))
    np.clip(image, 0, 255, out=image)
    photograph = np.empty((*image.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(image):  # a plane at a time, which is faster than transposing all
        photograph[..., channel] = plane
    return photograph


@cache
def _normal() -> np.ndarray:
    """Equally likely values of a normal distribution: a random byte picks one, much faster than drawing it."""
    return special.ndtri((np.arange(LEVELS) + 0.5) / LEVELS).astype(np.float32)


@cache
def _palettes() -> list[np.ndarray]:
    """For each of STUFF the colours of its texture's levels, some sets of them: float32 [3, sets, LEVELS]."""
    at = np.linspace(0, 1, LEVELS)
    palettes = []
    for kind in range(len(STUFF)):
        ramps = np.array(RAMPS[kind])
        steps = np.linspace(0, 1, ramps.shape[1])
        sets = [[np.interp(at, steps, ramp[:, channel]) for ramp in ramps] for channel in range(3)]
        palettes.append(np.array(sets, np.float32))
    return palettes


@cache
def _clouds() -> np.ndarray:
    """Smooth noise that repeats, float32 [TILE, TILE]."""
    return _noise(np.random.default_rng(7), 2.6, tall=1, wide=1)


@cache
def _textures() -> np.ndarray:
    """A texture that repeats for each of STUFF, uint8 [stuff, TILE, TILE]."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[:TILE, :TILE]
    grain = _noise(rng, 0.6, 1, 1)
    ridges = 1 - 1.4 * np.abs(_noise(rng, 1.8, 1, 1)) + 0.6 * _noise(rng, 1.4, 1, 2)
    ripples = np.sin(2 * np.pi * 24 / TILE * y + 3 * _noise(rng, 2.2, 1, 1)) + 0.5 * grain
    waves = _noise(rng, 1.6, 1, 4) + 0.5 * _noise(rng, 1.0, 1, 3)
    blades = _noise(rng, 1.0, 3, 1) + 0.8 * _noise(rng, 2.0, 1, 1) + 0.3 * grain

    course = y // 32
    shifted = (x + 32 * (course % 2)) % TILE
    tone = rng.normal(size=(TILE // 32, TILE // 64))[course, shifted // 64]
    joint = (y % 32 < 3) | (shifted % 64 < 3)
    stones = np.where(joint, -2.5, 0.5 + 0.5 * tone + 0.35 * grain)

    clouds = _noise(rng, 2.4, 2, 4)
    of_stuff = {
        SKY: np.maximum(clouds, -0.4) * 1.2,
        MOUNTAIN: ridges,
        GRASS: blades,
        SAND: ripples * 0.6,
        WATER: np.sign(waves) * np.abs(waves) ** 1.4,
        PAVEMENT: stones,
    }
    return np.stack([_levels(of_stuff[kind]) for kind in range(len(STUFF))])


def _levels(values: np.ndarray) -> np.ndarray:
    """Values of about -3 to 3 as bytes."""
    return np.clip(np.round(values * (LEVELS / 6)) + LEVELS // 2, 0, LEVELS - 1).astype(np.uint8)


def _noise(rng: np.random.Generator, falloff: float, tall: float, wide: float) -> np.ndarray:
    """Noise with a spectrum of 1 / frequency ** falloff and features of tall x wide; float32 [TILE, TILE]."""
    frequency_y = np.fft.fftfreq(TILE)[:, None] * tall
    frequency_x = np.fft.rfftfreq(TILE) * wide
    frequency = np.hypot(frequency_y, frequency_x)
    frequency[0, 0] = np.inf
    # waves longer than a quarter of the tile would make one look different from the next
    spectrum = np.fft.rfft2(rng.normal(size=(TILE, TILE))) * np.maximum(frequency, 4 / TILE) ** -falloff
    values = np.fft.irfft2(spectrum, (TILE, TILE))
    return ((values - values.mean()) / values.std()).astype(np.float32)
