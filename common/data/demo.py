"""Generated scenes: a small COCO-format data set generated in seconds, for trials without data.

Each scene holds one to six shapes of ten classes on a cluttered background. Only the polygons tell the classes
apart: size, angle, colour, texture and occlusion vary. Boxes and areas are those of the visible part, as in COCO, and
the category ids have gaps, as COCO's do.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.data.readers import Request, read_coco_folder
from common.data.table import Table
from common.files import atomic_folder, cache_folder

log = logging.getLogger(__name__)
SEED = 0
SIZES = ((480, 360), (360, 480), (480, 320), (420, 420))  # width, height, pixels
OBJECTS = (1, 6)  # per scene
SIDES = (36, 210)  # an object's side, pixels
LEAST_VISIBLE = 0.5  # fraction of an object that occlusion leaves visible at least
SUPERSAMPLING = 2

Polygons = list[list[tuple[float, float]]]  # in -1..1; the second and later ones are holes


def _ring(radius: float, points: int = 48, center: float = 0.0, start: float = 0.0) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / points for i in range(points)]
    return [(center + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    angles = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(np.sin(t) ** 3, -y / 17, strict=True))


def _flower(petals: int) -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    radii = 0.72 + 0.28 * np.cos(petals * angles)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


SHAPES: dict[str, Polygons] = {
    "disc": [_ring(1)],
    "ring": [_ring(1), _ring(0.55)],
    "moon": [_ring(1), _ring(0.8, center=0.45)],
    "square": [_ring(1.2, 4, start=math.pi / 4)],
    "triangle": [_ring(1.1, 3, start=-math.pi / 2)],
    "star": [_star(5, 0.42)],
    "flower": [_flower(6), _ring(0.2)],
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
    folder = cache_folder(f"demo-seed{SEED}")
    if not folder.is_dir():
        log.info(f"generating the demo's scenes in {folder}")
        make_demo(folder, seed=SEED)
    return read_coco_folder(replace(request, data=str(folder)))


def make_demo(folder: Path, train: int = 320, val: int = 100, seed: int = 0) -> None:
    """Write the demo data set to `folder` in COCO's layout; the same seed gives the same scenes.

    Scene i of a split depends on (seed, split, i) alone. The folder appears whole or not at all.
    """
    with atomic_folder(folder) as made:
        for number, (split, count) in enumerate((("train2017", train), ("val2017", val))):
            _write_split(made, split, [np.random.default_rng((seed, number, i)) for i in range(count)])


def _write_split(folder: Path, split: str, generators: list[np.random.Generator]) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, rng in enumerate(generators, 1):
        scene = draw_scene(rng)
        height, width = scene.owner.shape
        name = f"{image_id:06d}.jpg"
        Image.fromarray(scene.pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for box, area, label in visible_boxes(scene):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORY_IDS[label]}
            annotations.append(entry | {"bbox": box, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in zip(CATEGORY_IDS, SHAPES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_scene(rng: np.random.Generator) -> _Scene:
    """Background, clutter, then objects from back to front, none of which hides more than half of another."""
    width, height = SIZES[rng.integers(len(SIZES))]
    scene = _Scene(_background(rng, width, height), np.full((height, width), -1), [], [])
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        for _attempt in range(20):
            if _place(rng, scene):
                break
    return scene


def visible_boxes(scene: _Scene) -> list[tuple[list[int], int, int]]:
    """Box (x, y, width, height) and area of the visible part of each object, in pixels, and its label."""
    objects = []
    for index, label in enumerate(scene.labels):
        rows, columns = np.nonzero(scene.owner == index)
        x, y = int(columns.min()), int(rows.min())
        box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
        objects.append((box, len(rows), label))
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
    cover = _coverage(list(SHAPES.values())[label], center - (left, top), side, rng.uniform(-0.4, 0.4), size)
    solid = cover > 0.5
    hidden = np.bincount(scene.owner[window][solid] + 1, minlength=len(scene.labels) + 1)[1:]
    shown = np.bincount(scene.owner.ravel() + 1, minlength=len(scene.labels) + 1)[1:]
    if solid.sum() < 0.2 * side**2 or (shown - hidden < LEAST_VISIBLE * np.array(scene.full_areas)).any():
        return False
    paint = _texture(rng, *size, contrast=rng.uniform(25, 90))
    scene.pixels[window] += cover[..., None] * (paint - scene.pixels[window])
    scene.owner[window][solid] = len(scene.labels)
    scene.labels.append(label)
    scene.full_areas.append(int(solid.sum()))
    return True


def _coverage(polygons: Polygons, center: np.ndarray, side: float, angle: float, size: tuple[int, int]) -> np.ndarray:
    """(H, W) fraction of each pixel, 0..1, that the rotated and scaled polygons cover."""
    mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for number, polygon in enumerate(polygons):
        points = (np.array(polygon) @ rotation.T * side / 2 + center) * SUPERSAMPLING
        draw.polygon([tuple(p) for p in points], fill=0 if number else 255)
    return np.asarray(mask.resize(size, Image.Resampling.BOX), np.float32) / 255


def _texture(rng: np.random.Generator, width: int, height: int, contrast: float) -> np.ndarray:
    """(H, W, 3) of two colours `contrast` apart, mixed by a random pattern."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    patterns: list[Callable[[], np.ndarray]] = [
        lambda: along / max(width, height),
        lambda: np.sin(along * 2 * math.pi / period) > 0,
        lambda: (np.sin(along * 2 * math.pi / period) > 0) ^ (np.sin(across * 2 * math.pi / period) > 0),
        lambda: np.sin(along * 2 * math.pi / period) * np.sin(across * 2 * math.pi / period) > 0.4,
        lambda: _clouds(rng, width, height),
    ]
    mix = patterns[rng.integers(len(patterns))]()[..., None]
    color = rng.uniform(30, 225, 3)
    other = (color + contrast * rng.choice((-1, 1)) * rng.uniform(0.4, 1, 3)).clip(0, 255)
    return (color * (1 - mix) + other * mix).astype(np.float32)


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W) smooth random values in 0..1."""
    cells = rng.integers(4, 14)
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W, 3) background: a soft texture, a few strokes, which are not objects, and noise."""
    texture = _texture(rng, width, height, contrast=rng.uniform(10, 50)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(texture)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 8)):
        ends = rng.uniform((0, 0, 0, 0), (width, height, width, height))
        draw.line(tuple(ends), fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 5)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    return np.asarray(image, np.float32) + rng.normal(0, rng.uniform(1, 8), (height, width, 1)).astype(np.float32)
