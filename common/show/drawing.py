"""Boxes on images, and contact sheets. Lines and fonts grow with the image, so that labels are readable on any."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.console import to_one_line
from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.show.fonts import font_for
from common.show.tables import short_names
from common.types import convert_boxes

SMALLEST_SIDE = 480  # pixels; smaller images are enlarged before anything is drawn
LARGEST_SIDE = 1600  # pixels; larger ones are reduced
PALETTE = (  # Okabe and Ito's, distinguishable for colour-blind readers too; used in turn
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255)),
)
GAP, BACKGROUND, TEXT_COLOR = 8, (245, 245, 245), (20, 20, 20)


@dataclass(frozen=True)
class LabelledBoxes:
    """N boxes to draw: (N, 4) float xyxy pixels of the image, (N,) labels, which select colours, and captions."""

    boxes: np.ndarray
    labels: np.ndarray
    captions: list[str]


def true_boxes(data: DetectionData, index: int) -> LabelledBoxes:
    """The boxes of image `index` of a data set, captioned with their class."""
    target, names = data.target(index), short_names(data.class_names)
    labels = target.labels.numpy()
    captions = [names[k] + " (crowd)" * crowd for k, crowd in zip(labels, target.crowd.tolist(), strict=True)]
    return LabelledBoxes(target.boxes.numpy(), labels, captions)


def detected_boxes(
    table: DetectionTable, index: int, class_names: Sequence[str], min_score: float = 0.0
) -> LabelledBoxes:
    """The detections on image `index` with at least that score, captioned with class and score, best first."""
    rows = np.nonzero((table.image == index) & (table.score >= min_score))[0]
    own, names = table.select(rows[np.argsort(-table.score[rows], kind="stable")]), short_names(class_names)
    captions = [f"{names[k]} {score:.2f}" for k, score in zip(own.label, own.score, strict=True)]
    return LabelledBoxes(convert_boxes(own.boxes, "xywh", "xyxy"), own.label, captions)


def draw_boxes(image: Image.Image, boxes: LabelledBoxes) -> Image.Image:
    """A copy with the boxes on it, the first in front, captions above them, or inside where there is no room.

    Boxes of negative size, and those outside the image, are left out.
    """
    factor = min(max(1.0, SMALLEST_SIDE / min(image.size)), LARGEST_SIDE / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw, unit, texts = ImageDraw.Draw(canvas), max(size) / 320, [to_one_line(text) for text in boxes.captions]
    font = ImageFont.truetype(font_for("".join(texts)), max(12, round(7 * unit)))
    low, high = boxes.boxes[:, :2] * factor, boxes.boxes[:, 2:] * factor
    visible = np.nonzero(((low <= high) & (high >= 0) & (low <= size)).all(1))[0][::-1]
    corners = np.hstack([np.maximum(low, 0), np.minimum(high, size)])
    colours = [PALETTE[label % len(PALETTE)] for label in boxes.labels]
    for place in visible:
        draw.rectangle(corners[place].tolist(), outline=colours[place], width=max(2, round(unit)))
    line = 1.4 * font.size
    for place in visible:
        length = draw.textlength(texts[place], font) + 6
        x, y = max(0, min(corners[place, 0], size[0] - length)), max(corners[place, 1], line)
        draw.rectangle((x, y - line, x + length, y), fill=colours[place])
        dark = np.dot(colours[place], (0.299, 0.587, 0.114)) < 120  # luminance
        draw.text((x + 3, y - line / 2), texts[place], "white" if dark else "black", font, anchor="lm")
    return canvas


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Images of equal height in a row, each under its title."""
    height = max(image.height for _, image in panels)
    size = max(14, height // 26)
    header = round(1.6 * size)
    images = [image.resize((max(1, round(image.width * height / image.height)), height)) for _, image in panels]
    strip = Image.new("RGB", (sum(i.width for i in images) + GAP * (len(images) - 1), height + header), BACKGROUND)
    draw, x = ImageDraw.Draw(strip), 0
    for (title, _), image in zip(panels, images, strict=True):
        font, text = ImageFont.truetype(font_for(title), size), to_one_line(title, 100)
        while len(text) > 1 and draw.textlength(text, font) > image.width - 8:
            text = to_one_line(text, len(text) - 1)
        draw.text((x + 4, header // 6), text, TEXT_COLOR, font)
        strip.paste(image, (x, header))
        x += image.width + GAP
    return strip


def contact_sheet(strips: Sequence[Image.Image], width: int = 1800, height: int = 260) -> Image.Image:
    """All strips on one sheet, in columns of equal width, as many as fit the width. Sizes in pixels."""
    scaled = [ImageOps.contain(strip, (width - 2 * GAP, height), Image.Resampling.LANCZOS) for strip in strips]
    step = max(strip.width for strip in scaled) + GAP
    columns = max(1, min(len(scaled), (width - GAP) // step))
    sheet = Image.new("RGB", (GAP + columns * step, GAP + -(-len(scaled) // columns) * (height + GAP)), BACKGROUND)
    for place, strip in enumerate(scaled):
        sheet.paste(strip, (GAP + place % columns * step, GAP + place // columns * (height + GAP)))
    return sheet
