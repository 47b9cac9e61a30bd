"""Boxes and labels on images."""

from PIL import Image

from common.show.drawing import LabelledBox, draw_boxes


def test_drawn_labels_stay_inside_small_and_large_images():
    for size in ((60, 40), (3000, 2000)):
        boxes = [LabelledBox((0, 0, size[0], size[1]), 0, "hippopotamus 0.99")]
        drawn = draw_boxes(Image.new("RGB", size), boxes)
        assert min(drawn.size) >= 480 and max(drawn.size) <= 1600
        assert len(drawn.getcolors(100000)) > 3
