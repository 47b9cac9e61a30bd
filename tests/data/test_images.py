"""Decoding image files."""

import pytest
from PIL import Image

from common.console import InputError
from common.data.coco import unlabelled_images
from common.data.images import open_image


def test_user_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("L", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    data = unlabelled_images([tmp_path], ("cat",), (1,))
    assert (data.images[0].width, data.images[0].height) == (40, 80)
    assert open_image(tmp_path / "turned.jpg", (40, 80)).size == (40, 80)
    assert open_image(tmp_path / "turned.jpg", (80, 40)).size == (80, 40)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_damaged_images_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    if content is None:
        Image.new("RGB", (64, 64), "red").save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jpg"):
        open_image(path)


def test_image_of_another_size_than_annotated(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="64x48 pixels, but its annotation says 50x48"):
        open_image(tmp_path / "a.png", (50, 48))
