"""Generated scenes: a small COCO-format data set generated in seconds, for trials without data.

Each scene holds one to six shapes of ten classes on a cluttered background. Only the polygons tell the classes
apart: size, angle, colour, texture and occlusion vary. Boxes and areas are those of the visible part, as in COCO, and
the category ids have gaps, as COCO's do.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.data.readers import Request, read_coco
from common.data.table import Table
from common.files import atomic_folder, cache_folder

log = logging.getLogger(__name__)
SIZES = ((480, 360), (360, 480), (480, 320), (420, 420))  # width, height, pixels
OBJECTS = (1, 6)  # per scene
ATTEMPTS = 20  # to place an object
SIDES = (36, 210)  # an object's side, pixels
LEAST_VISIBLE = 0.5  # fraction of an object that occlusion leaves visible at least
SUPERSAMPLING = 2


def _polar(radii: Sequence[float] | np.ndarray, start: float = 0.0, x: float = 0.0) -> list[tuple[float, float]]:
    """Corners at these distances from (x, 0), at equal angles that begin with `start`."""
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(np.sin(t) ** 3, -y / 17, strict=True))


SHAPES = {  # polygons in -1..1, of which the second is a hole
    "disc": [_polar([1] * 48)],
    "ring": [_polar([1] * 48), _polar([0.55] * 48)],
    "moon": [_polar([1] * 48), _polar([0.8] * 48, x=0.45)],
    "square": [_polar([1.2] * 4, math.pi / 4)],
    "triangle": [_polar([1.1] * 3, -math.pi / 2)],
    "star": [_polar([1, 0.42] * 5, -math.pi / 2)],
    "flower": [_polar(0.72 + 0.28 * np.cos(np.linspace(0, 12 * math.pi, 90, endpoint=False))), _polar([0.2] * 48)],
    "heart": [_heart()],
    "cross": [[(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1),
               (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)]],
    "arrow": [[(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)]],
}  # fmt: skip
CATEGORY_IDS = (1, 2, 3, 5, 8, 10, 11, 12, 20, 33)


@dataclass
class _Scene:
    pixels: np.ndarray  # (H, W, 3) float 0..255
    owner: np.ndarray  # (H, W) index of the visible object, -1 for the background
    labels: list[int]
    full_areas: list[int]  # pixels of each object before anything covered it


def read_demo(request: Request) -> Table:
    """The demo data set, generated into the cache where it is not there yet."""
    folder = cache_folder("demo-seed0")
    if not folder.is_dir():
        log.info(f"generating the demo's scenes in {folder}")
        make_demo(folder)
    return read_coco(replace(request, data=str(folder)))


def make_demo(folder: Path, train: int = 320, val: int = 100, seed: int = 0) -> None:
    """Write the demo data set to `folder` in COCO's layout, as a whole or not at all.

    Scene i of a split depends on (seed, split, i) alone.
    """
    categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in zip(CATEGORY_IDS, SHAPES, strict=True)]
    with atomic_folder(folder) as made, ThreadPoolExecutor(os.cpu_count()) as pool:
        (made / "annotations").mkdir()
        for number, (split, count) in enumerate((("train2017", train), ("val2017", val))):
            (made / split).mkdir()
            images, annotations = list[dict](), list[dict]()
            paths = [made / split / f"{i + 1:06d}.jpg" for i in range(count)]
            drawn = pool.map(_write_scene, paths, [(seed, number, i) for i in range(count)])
            for i, (path, ((height, width), boxes)) in enumerate(zip(paths, drawn, strict=True), 1):
                images.append({"id": i, "file_name": path.name, "width": width, "height": height})
                for box, area, label in boxes:
                    entry = {"id": len(annotations) + 1, "image_id": i, "category_id": CATEGORY_IDS[label]}
                    annotations.append(entry | {"bbox": box, "area": area, "iscrowd": 0})
            content = {"images": images, "annotations": annotations, "categories": categories}
            (made / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_scene(path: Path, seed: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[list[int], int, int]]]:
    """Draw a scene into a file; returns its (height, width) and its `visible_boxes`."""
    scene = draw_scene(np.random.default_rng(seed))
    Image.fromarray(scene.pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return scene.owner.shape, visible_boxes(scene)


def draw_scene(rng: np.random.Generator) -> _Scene:
    """Background, clutter, then objects from back to front, none of which hides more than half of another."""
    width, height = SIZES[rng.integers(len(SIZES))]
    scene = _Scene(_background(rng, width, height), np.full((height, width), -1), [], [])
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        any(_place(rng, scene) for _ in range(ATTEMPTS))
    return scene


def visible_boxes(scene: _Scene) -> list[tuple[list[int], int, int]]:
    """Box (x, y, width, height) and area of the visible part of each object, in pixels, and its label."""
    objects = []
    for index, label in enumerate(scene.labels):
        rows, columns = np.nonzero(scene.owner == index)
        x, y = int(columns.min()), int(rows.min())
        objects.append(([x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y], len(rows), label))
    return objects


def _place(rng: np.random.Generator, scene: _Scene) -> bool:
    """Paint one random object; False, with the scene unchanged, if it would hide too much or lie too far outside."""
    height, width = scene.owner.shape
    label = int(rng.integers(len(SHAPES)))
    side = math.exp(rng.uniform(math.log(SIDES[0]), math.log(SIDES[1])))
    center = rng.uniform((0.3 * side, 0.3 * side), (width - 0.3 * side, height - 0.3 * side))
    left, top = np.maximum(center - 0.8 * side, 0).astype(int)
    right, bottom = np.minimum(center + 0.8 * side, (width, height)).astype(int)
    window, size = np.s_[top:bottom, left:right], (int(right - left), int(bottom - top))
    cover = _coverage(label, center - (left, top), side, rng.uniform(-0.4, 0.4), size)
    solid = cover > 0.5
    owners = scene.owner[window][solid], scene.owner
    hidden, shown = (np.bincount(o.ravel() + 1, minlength=len(scene.labels) + 1)[1:] for o in owners)
    if solid.sum() < 0.2 * side**2 or (shown - hidden < LEAST_VISIBLE * np.array(scene.full_areas)).any():
        return False
    paint = _texture(rng, *size, contrast=rng.uniform(25, 90))
    scene.pixels[window] += cover[..., None] * (paint - scene.pixels[window])
    scene.owner[window][solid] = len(scene.labels)
    scene.labels.append(label)
    scene.full_areas.append(int(solid.sum()))
    return True


def _coverage(label: int, center: np.ndarray, side: float, angle: float, size: tuple[int, int]) -> np.ndarray:
    """(H, W) fraction of each pixel, 0..1, that the rotated and scaled shape covers."""
    mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for number, polygon in enumerate(list(SHAPES.values())[label]):
        points = (np.array(polygon) @ rotation.T * side / 2 + center) * SUPERSAMPLING
        draw.polygon([tuple(p) for p in points], fill=0 if number else 255)
    return np.asarray(mask.resize(size, Image.Resampling.BOX), np.float32) / 255


def _texture(rng: np.random.Generator, width: int, height: int, contrast: float) -> np.ndarray:
    """(H, W, 3) of two colours `contrast` apart, mixed by a random pattern: slope, stripes, squares, dots, clouds."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    pattern = rng.integers(5)
    if pattern == 4:
        cells = rng.integers(4, 14)
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
        mix = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    else:
        wave, other = (np.sin(places * 2 * math.pi / period) for places in (along, across))
        mix = (along / max(width, height), wave > 0, (wave > 0) ^ (other > 0), wave * other > 0.4)[pattern]
    color = rng.uniform(30, 225, 3)
    second = (color + contrast * rng.choice((-1, 1)) * rng.uniform(0.4, 1, 3)).clip(0, 255)
    return (color * (1 - mix[..., None]) + second * mix[..., None]).astype(np.float32)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W, 3): a soft texture, a few strokes, which are not objects, and noise."""
    image = Image.fromarray(_texture(rng, width, height, rng.uniform(10, 50)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 8)):
        ends = rng.uniform((0, 0, 0, 0), (width, height, width, height))
        draw.line(tuple(ends), fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 5)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    return np.asarray(image, np.float32) + rng.normal(0, rng.uniform(1, 8), (height, width, 1)).astype(np.float32)
