"""Finding and decoding image files: formats, orientations, pixels of every kind, and damage."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common.console import InputError
from common.data.sources import unlabelled_images
from common.images import ImageFault, find_images, open_image, read_header, read_pixels

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


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("size", [(8, 4), (6, 6)])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 do not exist, and turn nothing
def test_user_images_are_turned_upright(tmp_path, orientation, size, suffix):
    path = tmp_path / f"a{suffix}"
    upright = save_turned(path, orientation, size)
    data = unlabelled_images([tmp_path])
    assert (data.images[0].width, data.images[0].height) == upright.size == read_header(path).upright
    for image in (data.images[0].open(), open_image(path)):
        assert np.array_equal(np.asarray(image), np.asarray(upright))
    assert np.array_equal(read_pixels(path.read_bytes()).permute(1, 2, 0), np.asarray(upright))


def test_the_header_has_both_sizes_and_whether_there_are_pages(tmp_path):
    save_turned(tmp_path / "turned.jpg", 6, (80, 40))
    assert read_header(tmp_path / "turned.jpg") == ((80, 40), (40, 80), 6, False)
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    for name in ("a.gif", "a.tif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert read_header(tmp_path / name).has_pages and np.asarray(open_image(tmp_path / name)).max() < 5


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_damaged_images_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    if content is None:
        Image.new("RGB", (64, 64), "red").save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(ImageFault, match=r"bad\.jpg"):
        open_image(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".gif", ".webp", ".avif", ".bmp", ".jp2", ".tga"])
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
        for read in (read_header, open_image):
            try:
                read(path)
            except ImageFault as fault:
                assert path.name in str(fault)


def test_image_of_another_size_than_annotated(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(ImageFault, match="64x48 pixels, but its annotation says 50x48"):
        open_image(tmp_path / "a.png", (50, 48))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_pixel_format_becomes_rgb(tmp_path, mode):
    """An image whose left half is dark and whose right half is bright stays so."""
    grey = np.zeros((20, 40), np.uint8)
    grey[:, 20:] = 200
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "1":
        image = Image.fromarray(grey > 100)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = np.asarray(open_image(path, (40, 20)))
    assert pixels.shape == (20, 40, 3) and pixels[:, :15].max() < 20 and 180 < pixels[:, 25:].mean() < 256
    assert mode == "1" or pixels[:, 25:].mean() < 220


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize(("top", "expected"), [(65535, 255), (51400, 200), (4095, None), (200, None), (200_000, None)])
def test_deep_images_are_scaled_by_the_range_of_16_bits_or_refused(tmp_path, dtype, top, expected):
    if top > np.iinfo(dtype).max:
        return
    values = np.full((8, 8), top).astype(dtype)
    Image.frombytes({"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype], (8, 8), values.tobytes()).save(
        tmp_path / "a.tif"
    )
    if expected is not None:
        assert (np.asarray(open_image(tmp_path / "a.tif")) == expected).all()
        return
    with pytest.raises(ImageFault, match=r"a\.tif: .*do not fill the range of 16: write it with 8") as caught:
        open_image(tmp_path / "a.tif")
    assert "more than 8 bits" in caught.value.sentence


def test_floats_are_refused_and_what_is_transparent_is_white(tmp_path):
    Image.fromarray(np.ones((20, 40), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ImageFault, match="do not fill the range"):
        open_image(tmp_path / "a.tiff")
    hidden = np.random.default_rng(0).integers(0, 99, (8, 8, 4), np.uint8)
    hidden[..., 3] = 0
    Image.fromarray(hidden).save(tmp_path / "t.png")
    assert (np.asarray(open_image(tmp_path / "t.png")) == 255).all()
    black = Image.new("P", (8, 8), 0)
    black.save(tmp_path / "p.png", transparency=0)
    assert (np.asarray(open_image(tmp_path / "p.png")) == 255).all()


def test_pixels_of_every_form_that_programs_have(tmp_path):
    whole = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(whole).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    tensor = torch.from_numpy(whole).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content), Image.fromarray(whole), whole]
    forms += [tensor, tensor.double() / 255, (tensor / 255).half(), tensor / 255 * (1 + 1e-7)]
    for form in forms:
        assert torch.equal(read_pixels(form), tensor)
    wrong = {"to 1.9": tensor / 255 * 2, "nan to nan": tensor * torch.nan, "int64": tensor.long(), "not list": [1]}
    wrong |= {r"\(5, 7\) uint8": whole[..., 0], r"\(7, 5, 3\)": tensor.permute(2, 1, 0)}
    for message, form in wrong.items():
        with pytest.raises(InputError, match=message):
            read_pixels(form)


def test_huge_images_are_refused_with_the_size(tmp_path, monkeypatch):
    Image.new("1", (100, 60)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for read in (open_image, read_header):
        with pytest.raises(ImageFault, match=r"a\.png is too large to decode, scale it down: .*6000 pixels"):
            read(tmp_path / "a.png")


def test_the_warnings_of_a_program_are_its_own(tmp_path):
    """Importing the project changes no filter: what Pillow warns of reaches a program that asks for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.warn_explicit("x", UserWarning, "PIL/Image.py", 1, module="PIL.Image")
    assert len(caught) == 1


def test_folders_are_searched_for_the_formats_that_pillow_reads(tmp_path):
    names = ["a.TIF", "b.gif", "c.jpeg", "d.webp", "e.avif", "f.jfif", "g h.Png"]
    others = ["notes.txt", "data.h5", "movie.mpeg", "figure.eps", "k.pdf", "._c.jpeg", "a.psd", "i.HEIC", "j.nef"]
    for name in (*names, *others, "below/z.png", ".hidden/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    images, skipped = find_images(tmp_path)
    assert [path.name for path in images] == names and [path.name for path in skipped] == ["i.HEIC", "j.nef"]
    below = [path.name for path in find_images(tmp_path, subfolders=True)[0]]
    assert below == [*names[:2], "z.png", *names[2:]]


def test_unreadable_user_images_are_left_out_and_counted(tmp_path, caplog):
    folder = tmp_path / "new"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "b.tif")
    Image.new("L", (20, 30)).save(folder / "c.gif")
    Image.new("RGB", (9, 9)).save(tmp_path / "d.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "g.png")
    (folder / "g.png").write_bytes((folder / "g.png").read_bytes()[:5000])
    for name in ("a.jpg", "._b.tif", "e.heic", "f.png"):
        (folder / name).write_bytes(b"damaged")
    data = unlabelled_images([folder, tmp_path / "d.jpg"])
    assert [(p.id, p.path.name, p.width, p.height) for p in data.images] == [
        (2, "b.tif", 30, 20),
        (3, "c.gif", 20, 30),
        (6, "d.jpg", 9, 9),
    ]
    assert (data.class_names, data.category_ids, len(data.boxes)) == ((), (), 0)
    assert f"left out 2 images that cannot be read ({folder}/a.jpg, {folder}/f.png)" in caplog.text
    assert "left out 1 images that cannot be read (g.png)" in caplog.text
    assert "does not read (e.heic)" in caplog.text


def test_user_images_of_which_none_can_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such image: .*gone"):
        unlabelled_images([tmp_path / "gone.jpg"])
    with pytest.raises(InputError, match="none is listed"):
        unlabelled_images([tmp_path])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for path in (tmp_path, tmp_path / "bad.jpg"):
        with pytest.raises(InputError, match=r"no image can be used: left out 1 images .*bad\.jpg"):
            unlabelled_images([path])
