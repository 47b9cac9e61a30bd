"""Boxes and labels on images."""

import numpy as np
import pytest
from PIL import Image

from common.show.drawing import LabelledBoxes, contact_sheet, draw_boxes, side_by_side

NAN, INF = float("nan"), float("inf")
INVISIBLE = [(90, 90, 10, 10), (50, 10, 20, 90), (10, 50, 90, 20), (NAN, 0, 9, 9), (200, 0, 300, 9), (-90, -90, -1, -1)]
VISIBLE = [(-INF, 0, INF, 50), (-1e300, -1e300, 1e300, 1e300), (10, 10, 10, 10), (0, 0, 100, 100)]


def boxes_of(*boxes, text="a"):
    return LabelledBoxes(np.array(boxes, np.float64).reshape(-1, 4), np.arange(len(boxes)), [text] * len(boxes))


@pytest.mark.parametrize("size", [(60, 40), (3000, 2000)])
def test_captions_are_readable_and_inside_small_and_large_images(size):
    drawn = draw_boxes(Image.new("RGB", size), boxes_of((0, 0, *size), (size[0] - 2, 0, *size), text="zebra 0.99"))
    assert min(drawn.size) >= 480 and max(drawn.size) <= 1600
    colours = np.array(drawn)[: drawn.height // 8]
    assert (colours[:, 0] == (230, 159, 0)).all(1).any()  # at the left edge
    columns = np.nonzero((colours == (86, 180, 233)).all(2).any(0))[0]
    assert columns.max() - columns.min() > drawn.width / 10  # the caption of the box at the right edge is whole


@pytest.mark.parametrize(("boxes", "visible"), [((), False), (INVISIBLE, False), *(([box], True) for box in VISIBLE)])
def test_boxes_of_negative_size_and_outside_the_image_are_left_out(boxes, visible):
    drawn = draw_boxes(Image.new("RGB", (100, 100)), boxes_of(*boxes))
    assert (drawn.getcolors(100000) != [(480 * 480, (0, 0, 0))]) == visible


@pytest.mark.parametrize("size", [(10, 6000), (20000, 4), (1, 1), (3000, 1), (1, 3000)])
def test_images_of_extreme_shapes_are_drawn(size):
    drawn = draw_boxes(Image.new("RGB", size), boxes_of((0, 0, *size)))
    strip = side_by_side([("ground truth", drawn), ("a model", drawn)])
    assert max(drawn.size) <= 1600 and contact_sheet([strip, strip]).width <= 1800
    assert [contact_sheet([Image.new("RGB", (400, 260))] * n).size for n in (2, 5)] == [(824, 276), (1640, 544)]


@pytest.mark.parametrize("text", ["", "\n", "\0\x1b", "\udcff", "猫", "a" * 1000, "$\\frac$"])
def test_any_text_can_be_a_caption_or_a_title(text):
    drawn = draw_boxes(Image.new("RGB", (100, 100)), boxes_of((10, 10, 50, 50), text=text))
    assert side_by_side([(text, drawn)]).width == 480
