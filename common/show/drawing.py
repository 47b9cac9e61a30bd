"""Boxes on images, and contact sheets. Lines and fonts grow with the image, so that labels are readable on any."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.console import to_one_line
from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.show.fonts import class_labels, image_text
from common.types import convert_boxes

SMALLEST_SIDE = 480  # pixels; smaller images are enlarged before anything is drawn
LARGEST_SIDE = 1600  # pixels; larger ones are reduced
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
    crowd: bool = False  # drawn with a thin line


def true_boxes(data: DetectionData, index: int) -> list[LabelledBox]:
    """The boxes of image `index` of a data set, crowds with thin lines."""
    target = data.target(index)
    rows = zip(target.boxes.tolist(), target.labels.tolist(), target.crowd.tolist(), strict=True)
    names = class_labels(data.class_names)
    return [LabelledBox(tuple(b), k, names[k] + (" (crowd)" if crowd else ""), crowd) for b, k, crowd in rows]


def detected_boxes(
    table: DetectionTable, index: int, class_names: Sequence[str], min_score: float = 0.0
) -> list[LabelledBox]:
    """The detections on image `index` with at least that score, captioned with class and score, best first."""
    own = table.select((table.image == index) & (table.score >= min_score))
    own, names = own.select(np.argsort(-own.score, kind="stable")), class_labels(class_names)
    corners = convert_boxes(own.boxes, "xywh", "xyxy")
    rows = zip(corners.tolist(), own.score.tolist(), own.label.tolist(), strict=True)
    return [LabelledBox(tuple(b), k, f"{names[k]} {s:.2f}") for b, s, k in rows]


def draw_boxes(image: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A copy with the boxes on it, the first in front, captions above them, or inside where there is no room.

    Boxes of negative size, and those outside the image, are left out.
    """
    factor = min(max(1.0, SMALLEST_SIDE / min(image.size)), LARGEST_SIDE / max(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw, unit = ImageDraw.Draw(canvas), max(canvas.size) / 320  # line width
    visible = [(corners, b) for b in boxes if (corners := _clipped([s * factor for s in b.box], canvas.size))]
    for corners, b in reversed(visible):
        draw.rectangle(corners, outline=PALETTE[b.label % len(PALETTE)], width=1 if b.crowd else max(2, round(unit)))
    for corners, b in reversed(visible):
        _caption(draw, corners, b, max(12, round(7 * unit)), canvas.size)
    return canvas


def _clipped(corners: Sequence[float], size: tuple[int, int]) -> Corners | None:
    """The part of a box (xyxy, pixels) inside an image of (width, height) `size`; None where there is none."""
    x1, y1, x2, y2 = corners
    if not (x1 <= x2 and y1 <= y2 and x1 <= size[0] and y1 <= size[1] and x2 >= 0 and y2 >= 0):
        return None
    return max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])


def _caption(
    draw: ImageDraw.ImageDraw, corners: Corners, b: LabelledBox, font_size: int, size: tuple[int, int]
) -> None:
    text, font = image_text(b.text, font_size)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0, corners[0]), max(0, size[0] - width))
    y = corners[1] - height if corners[1] >= height else min(corners[1], size[1] - height)
    color = PALETTE[b.label % len(PALETTE)]
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 3 - left, y + 3 - top), text, font=font, fill=(0, 0, 0) if luminance > 120 else (255, 255, 255))


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
    """All strips on one sheet, in columns of equal width. Sizes in pixels."""
    scaled = [ImageOps.contain(strip, (width - 2 * GAP, height), Image.Resampling.LANCZOS) for strip in strips]
    step = max(strip.width for strip in scaled) + GAP
    columns = max(1, (width - GAP) // step)
    sheet = Image.new("RGB", (width, GAP + -(-len(scaled) // columns) * (height + GAP)), BACKGROUND)
    for place, strip in enumerate(scaled):
        sheet.paste(strip, (GAP + place % columns * step, GAP + place // columns * (height + GAP)))
    return sheet
