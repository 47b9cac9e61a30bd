"""Boxes and labels on images."""

import pytest
from PIL import Image

from common.show.drawing import LabelledBox, contact_sheet, draw_boxes, side_by_side


def test_drawn_labels_stay_inside_small_and_large_images():
    for size in ((60, 40), (3000, 2000)):
        boxes = [LabelledBox((0, 0, size[0], size[1]), 0, "hippopotamus 0.99")]
        drawn = draw_boxes(Image.new("RGB", size), boxes)
        assert min(drawn.size) >= 480 and max(drawn.size) <= 1600
        assert len(drawn.getcolors(100000)) > 3


NAN, INF = float("nan"), float("inf")
INVISIBLE = [(90, 90, 10, 10), (50, 10, 20, 90), (10, 50, 90, 20), (NAN, 0, 9, 9), (200, 0, 300, 9), (-90, -90, -1, -1)]


@pytest.mark.parametrize("box", INVISIBLE)
@pytest.mark.parametrize("crowd", [False, True])
def test_boxes_of_negative_size_and_outside_the_image_are_left_out(box, crowd):
    image = Image.new("RGB", (100, 100))
    assert draw_boxes(image, [LabelledBox(box, 0, "a", crowd)]).getcolors() == [(480 * 480, (0, 0, 0))]


@pytest.mark.parametrize(
    "box", [(-INF, 0, INF, 50), (-1e300, -1e300, 1e300, 1e300), (10, 10, 10, 10), (0, 0, 100, 100)]
)
@pytest.mark.parametrize("crowd", [False, True])
def test_boxes_of_any_other_size_are_drawn(box, crowd):
    drawn = draw_boxes(Image.new("RGB", (100, 100)), [LabelledBox(box, 0, "a", crowd)])
    assert len(drawn.getcolors(100000)) > 1


@pytest.mark.parametrize("size", [(10, 6000), (20000, 4), (1, 1), (3000, 1), (1, 3000)])
def test_images_of_extreme_shapes_are_drawn(size):
    drawn = draw_boxes(Image.new("RGB", size), [LabelledBox((0, 0, *size), 0, "cat 0.99")])
    strip = side_by_side([("ground truth", drawn), ("a model", drawn)])
    sheet = contact_sheet([strip, strip])
    assert max(drawn.size) <= 1600 and sheet.width == 1800


@pytest.mark.parametrize("text", ["", "\n", "\0\x1b", "\udcff", "猫", "a" * 1000, "$\\frac$"])
def test_any_text_can_be_a_caption_or_a_title(text):
    drawn = draw_boxes(Image.new("RGB", (100, 100)), [LabelledBox((10, 10, 50, 50), 0, text)])
    assert side_by_side([(text, drawn)]).width == 480
