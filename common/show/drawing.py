"""Boxes on images, and contact sheets. Lines and fonts grow with the image, so that labels are readable on any."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from common.console import to_one_line
from common.data.memory import DetectionData
from common.show.fonts import class_labels, image_text
from common.types import Detections

SMALLEST_SIDE = 480  # pixels; smaller images are enlarged before anything is drawn
LARGEST_SIDE = 1600  # pixels; larger ones are reduced
SHEET_IMAGES = 12
PALETTE = (  # Okabe and Ito's, distinguishable for colour-blind readers too; used in turn
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255)),
)
GAP, BACKGROUND, TEXT_COLOR = 8, (245, 245, 245), (20, 20, 20)

Corners = tuple[float, float, float, float]  # xyxy, pixels


@dataclass(frozen=True)
class LabelledBox:
    """One box to draw."""

    box: Corners  # of the image
    label: int  # selects the colour
    text: str  # the caption
    dashed: bool = False  # crowds


def true_boxes(data: DetectionData, index: int) -> list[LabelledBox]:
    """The boxes of image `index` of a data set, crowds dashed."""
    rows = zip(*(column.tolist() for column in data.image_boxes(index)), strict=True)
    names = class_labels(data.class_names)
    return [LabelledBox(tuple(b), k, names[k] + (" (crowd)" if crowd else ""), crowd) for b, k, crowd in rows]


def detected_boxes(
    boxes: np.ndarray | Tensor,
    scores: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    class_names: Sequence[str],
) -> list[LabelledBox]:
    """Detections captioned with class and score, in the order given.

    Args:
        boxes: (N, 4) xyxy, pixels of the image.
        scores: (N,) in 0..1.
        labels: (N,) indices into `class_names`.
        class_names: of the model or the data set that the labels are of.
    """
    names = class_labels(class_names)
    rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [LabelledBox(tuple(b), k, f"{names[k]} {s:.2f}") for b, s, k in rows]


def draw_boxes(image: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A copy with the boxes on it, the first in front; captions avoid each other where there is room.

    Boxes of negative size, and those outside the image, are left out.
    """
    factor = min(max(1.0, SMALLEST_SIDE / min(image.size)), LARGEST_SIDE / max(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    unit = max(canvas.size) / 320  # line width
    visible = [(corners, b) for b in boxes if (corners := _clipped([s * factor for s in b.box], canvas.size))]
    for corners, b in reversed(visible):
        _outline(draw, corners, PALETTE[b.label % len(PALETTE)], max(2, round(unit)), b.dashed)
    occupied: list[Corners] = []
    for corners, b in visible:
        _caption(draw, corners, b, max(12, round(7 * unit)), canvas.size, occupied)
    return canvas


def _clipped(corners: Sequence[float], size: tuple[int, int]) -> Corners | None:
    """The part of a box (xyxy, pixels) inside an image of (width, height) `size`; None where there is none."""
    x1, y1, x2, y2 = corners
    if not (x1 <= x2 and y1 <= y2 and x1 <= size[0] and y1 <= size[1] and x2 >= 0 and y2 >= 0):
        return None
    return max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])


def _outline(
    draw: ImageDraw.ImageDraw, corners: Corners, color: tuple[int, int, int], width: int, dashed: bool
) -> None:
    x1, y1, x2, y2 = corners
    if not dashed:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=width + 2)
        draw.rectangle(corners, outline=color, width=width)
        return
    for start, end in pairwise([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]):
        steps = max(2, int(np.hypot(end[0] - start[0], end[1] - start[1]) / (4 * width)))
        marks = np.linspace(start, end, steps)
        for a, b in list(pairwise(marks))[::2]:
            draw.line((*a, *b), fill=color, width=width)


def _caption(
    draw: ImageDraw.ImageDraw, corners: Corners, b: LabelledBox, font_size: int, size: tuple[int, int], occupied: list
) -> None:
    text, font = image_text(b.text, font_size)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0, corners[0]), max(0, size[0] - width))
    heights = (corners[1] - height, corners[1], corners[3] - height, corners[3], (corners[1] + corners[3] - height) / 2)
    places = [(x, min(max(0, y), size[1] - height)) for y in heights]
    free = [p for p in places if not any(_overlap((*p, p[0] + width, p[1] + height), t) for t in occupied)]
    x, y = (free or places)[0]
    occupied.append((x, y, x + width, y + height))
    color = PALETTE[b.label % len(PALETTE)]
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    draw.rectangle(occupied[-1], fill=color)
    draw.text((x + 3 - left, y + 3 - top), text, font=font, fill=(0, 0, 0) if luminance > 120 else (255, 255, 255))


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Images of equal height in a row, each under its title."""
    height = max(image.height for _, image in panels)
    size = max(14, height // 26)
    header = round(1.6 * size)
    images = [image.resize((max(1, round(image.width * height / image.height)), height)) for _, image in panels]
    strip = Image.new("RGB", (sum(i.width for i in images) + GAP * (len(images) - 1), height + header), BACKGROUND)
    draw, x = ImageDraw.Draw(strip), 0
    for (title, _), image in zip(panels, images, strict=True):
        text, font = image_text(to_one_line(title, 100), size)
        while len(text) > 1 and draw.textlength(text, font=font) > image.width - 8:
            text = to_one_line(text, len(text) - 1)
        draw.text((x + 4, header // 6), text, font=font, fill=TEXT_COLOR)
        strip.paste(image, (x, header))
        x += image.width + GAP
    return strip


def contact_sheet(strips: Sequence[Image.Image], width: int = 1800, height: int = 260) -> Image.Image:
    """All strips on one sheet, scaled to one height, each on the first line with room for it. Sizes in pixels."""
    lines: list[list[Image.Image]] = []
    for strip in strips:
        factor = min(height / strip.height, (width - 2 * GAP) / strip.width)
        size = max(1, round(strip.width * factor)), max(1, round(strip.height * factor))
        image = strip.resize(size, Image.Resampling.LANCZOS)
        line = next((line for line in lines if _length([*line, image]) <= width + GAP), None)
        if line is None:
            lines.append(line := [])
        line.append(image)
    sheet = Image.new("RGB", (width, GAP + len(lines) * (height + GAP)), BACKGROUND)
    for row, line in enumerate(lines):
        for position, image in enumerate(line):
            sheet.paste(image, (_length(line[:position]), GAP + row * (height + GAP)))
    return sheet


def detection_sheet(
    data: DetectionData, detections: Sequence[Detections], class_names: Sequence[str], min_score: float
) -> Image.Image:
    """The first `SHEET_IMAGES` images of a data set on one sheet, ground truth beside detections from a score on."""
    strips = []
    for index in range(min(SHEET_IMAGES, len(data))):
        image, found = data.images[index].open(), detections[index].at_least(min_score)
        truth = draw_boxes(image, true_boxes(data, index))
        drawn = draw_boxes(image, detected_boxes(found.boxes, found.scores, found.labels, class_names))
        strips.append(side_by_side([("ground truth", truth), ("detections", drawn)]))
    return contact_sheet(strips)


def _length(line: Sequence[Image.Image]) -> int:
    """Where the next strip of a line begins, pixels from the left edge."""
    return GAP + sum(image.width + 2 * GAP for image in line)
