"""Finding and decoding image files, and data sets of images without labels."""

import json

import numpy as np
import pytest
from helpers import data_flags
from PIL import Image

from common.console import InputError
from common.data.memory import unlabelled_images
from common.data.sources import load_split
from common.images import find_images, open_image, read_size, read_sizes

TURNS = {  # what turns the stored pixels upright, by the EXIF standard
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def save_turned(path, orientation, size):
    """An image of random pixels with an EXIF orientation; returns it upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    stored.save(path, exif=exif)
    return stored.transpose(TURNS[orientation]) if orientation in TURNS else stored


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("size", [(8, 4), (6, 6)])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 do not exist, and turn nothing
def test_user_images_are_turned_upright(tmp_path, orientation, size, suffix):
    path = tmp_path / f"a{suffix}"
    upright = save_turned(path, orientation, size)
    data = unlabelled_images([tmp_path], ("cat",), (1,))
    assert (data.images[0].width, data.images[0].height) == upright.size == read_size(path)
    for image in (data.images[0].open(), open_image(path)):
        assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_size_of_a_file_as_stored_and_upright(tmp_path):
    save_turned(tmp_path / "turned.jpg", 6, (80, 40))
    assert read_sizes(tmp_path / "turned.jpg") == ((80, 40), (40, 80))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    assert read_size(tmp_path / "bad.jpg") is None and read_size(tmp_path / "none.jpg") is None


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_damaged_images_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    if content is None:
        Image.new("RGB", (64, 64), "red").save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jpg"):
        open_image(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".gif", ".webp", ".avif", ".bmp", ".jp2", ".tga", ".ico"])
def test_no_damage_ends_in_another_error(tmp_path, suffix):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    assert open_image(path).size == (32, 32)
    for _ in range(40):
        content = whole[: rng.integers(0, len(whole))] if rng.random() < 0.3 else whole.copy()
        content = content.copy()
        places = rng.integers(0, min(len(content), 300) or 1, 4)
        content[places[: len(content)]] = rng.integers(0, 256, min(4, len(content)))
        path.write_bytes(content.tobytes())
        read_sizes(path)
        try:
            open_image(path)
        except InputError as error:
            assert path.name in str(error)


def test_image_of_another_size_than_annotated(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="64x48 pixels, but its annotation says 50x48"):
        open_image(tmp_path / "a.png", (50, 48))


def test_huge_images_are_refused_with_reason_and_size(coco_file, tmp_path, monkeypatch):
    json_path, folder = coco_file([])
    content = json.loads(json_path.read_text())
    Image.new("1", (100, 60)).save(folder / "a.png")
    Image.new("1", (40, 40)).save(folder / "b.png")
    content["images"][1]["height"] = 40
    json_path.write_text(json.dumps(content))
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    reason = "too large to decode, scale .* down.*6000 pixels. exceeds limit of 4000"
    for size in (None, (100, 60)):
        with pytest.raises(InputError, match=reason):
            open_image(folder / "a.png", size)
    flags = data_flags(val_json=str(json_path), val_images_dir=str(folder))
    (note,) = load_split(flags, "val").notes
    assert note.startswith("left out 1 images that are too large to decode, scale them down (a.png: ")
    assert "6000 pixels" in note
    del content["images"][0]["width"]
    json_path.write_text(json.dumps(content))
    assert load_split(flags, "val").notes == (note,)


def test_folders_are_searched_for_the_formats_that_pillow_reads(tmp_path):
    names = ["a.TIF", "b.gif", "c.jpeg", "d.webp", "e.avif", "f.jfif", "g h.Png"]
    others = ["notes.txt", "data.h5", "movie.mpeg", "figure.eps", "k.pdf", "._c.jpeg", "i.HEIC", "j.nef"]
    for name in (*names, *others, "below/z.png", ".hidden/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    images, skipped = find_images(tmp_path)
    assert [path.name for path in images] == names
    assert [path.name for path, _ in skipped] == ["._c.jpeg", "i.HEIC", "j.nef"]
    assert [path.name for path in find_images(tmp_path, subfolders=True)[0]] == [
        *names[:1],
        *names[1:2],
        "z.png",
        *names[2:],
    ]


def test_unreadable_user_images_are_left_out_and_counted(tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "b.tif")
    Image.new("L", (20, 30)).save(folder / "c.gif")
    Image.new("RGB", (9, 9)).save(tmp_path / "d.jpg")
    for name in ("a.jpg", "._b.tif", "e.heic", "f.png"):
        (folder / name).write_bytes(b"damaged")
    data = unlabelled_images([folder, tmp_path / "d.jpg"], ("cat",), (1,))
    assert [(p.id, p.path.name, p.width, p.height) for p in data.images] == [
        (1, "b.tif", 30, 20),
        (2, "c.gif", 20, 30),
        (3, "d.jpg", 9, 9),
    ]
    printed = capsys.readouterr().out
    assert printed.startswith("left out 4 of 7 images: ") and printed.count("\n") == 1
    assert "._b.tif (macOS metadata" in printed and "e.heic (an image format that Pillow does not read)" in printed
    assert "cannot read the image" in printed and printed.endswith("; …\n")
    (folder / "._b.tif").unlink()
    unlabelled_images([folder], ("cat",), (1,))
    assert "f.png" in capsys.readouterr().out


def test_user_images_of_which_none_can_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such image: .*gone"):
        unlabelled_images([tmp_path / "gone.jpg"], ("cat",), (1,))
    with pytest.raises(InputError, match="no images in the folder"):
        unlabelled_images([tmp_path], ("cat",), (1,))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for path in (tmp_path, tmp_path / "bad.jpg"):
        with pytest.raises(InputError, match=r"left out 1 of 1 images: cannot read the image .*bad\.jpg"):
            unlabelled_images([path], ("cat",), (1,))
