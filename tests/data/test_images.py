"""Finding and decoding image files: formats, orientations, pixels of every kind, and damage."""

import io
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import encoded, random_image
from PIL import Image

from common.console import InputError
from common.data.sources import unlabelled_images
from common.images import ImageFault, find_images, open_image, read_header, read_pixels


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("size", [(8, 4), (6, 6)])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 do not exist, and turn nothing
def test_user_images_are_turned_upright(tmp_path, orientation, size, suffix):
    path, upright = tmp_path / f"a{suffix}", random_image(*size)
    path.write_bytes(encoded(upright, orientation, suffix))
    (image,) = unlabelled_images([tmp_path]).images
    assert (image.width, image.height) == size == read_header(path).upright
    for pixels in (image.open(), open_image(path), read_pixels(path.read_bytes()).permute(1, 2, 0)):
        assert np.array_equal(np.asarray(pixels), np.asarray(upright))


def test_the_header_has_both_sizes_and_whether_there_are_pages(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(encoded(random_image(40, 80), 6, ".jpg"))
    assert read_header(tmp_path / "turned.jpg") == ((80, 40), (40, 80), 6, False)
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    for name in ("a.gif", "a.tif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert read_header(tmp_path / name).has_pages and np.asarray(open_image(tmp_path / name)).max() < 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".gif", ".webp", ".avif", ".bmp", ".jp2", ".tga"])
def test_damage_ends_in_a_fault_that_names_the_file(tmp_path, suffix):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    random_image(32, 32).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    assert open_image(path).size == (32, 32)
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 4].tobytes()):
        path.write_bytes(content)
        with pytest.raises(ImageFault, match=path.name):
            open_image(path)
    for _ in range(40):
        content = whole[: rng.integers(0, len(whole))].copy() if rng.random() < 0.3 else whole.copy()
        content[rng.integers(0, min(len(content), 300) or 1, 4)[: len(content)]] = rng.integers(0, 256)
        path.write_bytes(content.tobytes())
        for read in (read_header, open_image):
            try:
                read(path)
            except ImageFault as fault:
                assert path.name in str(fault)


def test_images_that_are_too_large_or_of_another_size_than_annotated(tmp_path, monkeypatch):
    Image.new("1", (100, 60)).save(tmp_path / "a.png")
    with pytest.raises(ImageFault, match="100x60 pixels, but its annotation says 50x60"):
        open_image(tmp_path / "a.png", (50, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for read in (open_image, read_header):
        with pytest.raises(ImageFault, match=r"a\.png is too large to decode, scale it down: .*6000 pixels"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_pixel_format_becomes_rgb(tmp_path, mode):
    """An image whose left half is dark and whose right half is bright stays so."""
    grey = np.zeros((20, 40), np.uint8)
    grey[:, 20:] = 255 if mode == "1" else 200
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    (deep if mode == "I;16" else Image.fromarray(grey).convert("RGB").convert(mode)).save(path)
    pixels = np.asarray(open_image(path, (40, 20))).astype(int)
    assert pixels.shape == (20, 40, 3) and abs(pixels[:, 25:].mean() - grey.max()) < 20 and pixels[:, :15].max() < 20


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize(("top", "expected"), [(65535, 255), (51400, 200), (4095, None), (200, None), (200_000, None)])
def test_deep_images_are_scaled_by_the_range_of_16_bits_or_refused(tmp_path, dtype, top, expected):
    if top > np.iinfo(dtype).max:
        return
    path, mode = tmp_path / "a.tif", {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype]
    Image.frombytes(mode, (8, 8), np.full((8, 8), top).astype(dtype).tobytes()).save(path)
    if expected is not None:
        assert (np.asarray(open_image(path)) == expected).all()
        return
    Image.fromarray(np.ones((20, 40), np.float32)).save(tmp_path / "float.tif")
    for deep in (path, tmp_path / "float.tif"):
        with pytest.raises(ImageFault, match=r"\.tif: .*do not fill the range of 16: write it with 8") as caught:
            open_image(deep)
        assert "more than 8 bits" in caught.value.sentence


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_twelve_bits_are_refused_beside_alpha_and_broken_pixels_and_from_an_opened_image(tmp_path, channels):
    """PNG, which Pillow reads with 16 bits in all these modes but does not write so."""
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64, channels))
    if channels % 2 == 0:
        pixels[..., -1] = 65535
    for factor, broken in ((1, 0), (1, 65535), (16, 0)):
        pixels[0, 0] = broken
        rows = np.insert((pixels * factor).clip(max=65535).reshape(64, -1).astype(">u2").view(np.uint8), 0, 0, axis=1)
        header = struct.pack(">IIBBBBB", 64, 64, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
        parts = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes()), b"IEND": b""}
        chunks = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts.items()]
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        for read in (open_image, lambda path: read_pixels(Image.open(path))):
            expected = pytest.raises(ImageFault, match="do not fill the range of 16") if factor == 1 else nullcontext()
            with expected:
                assert 100 < np.asarray(read(tmp_path / "a.png")).mean() < 150


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("grey", "alpha"), [(0, 255), (255, 255), (0, 0)])
def test_what_is_transparent_is_white_and_refused_where_nothing_else_is_left(tmp_path, mode, grey, alpha):
    image = random_image(8, 8).convert("LA" if mode == "LA" else "RGBA")
    image.putalpha(0)
    image.paste((grey, alpha) if mode == "LA" else (grey, grey, grey, alpha), (0, 0, 4, 4))
    (image.quantize() if mode == "P" else image).save(tmp_path / "a.png")
    if grey or not alpha:
        with pytest.raises(ImageFault, match=r"a\.png: it is white or transparent everywhere"):
            open_image(tmp_path / "a.png")
        return
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels[:4, :4].max() < 3 and (pixels[4:] == 255).all() and (pixels[:, 4:] == 255).all()


def test_pixels_of_every_form_that_programs_have(tmp_path):
    image = random_image(7, 5)
    image.putpixel((0, 0), (255, 255, 255))
    whole, content = np.asarray(image), encoded(image, 1, ".png")
    (tmp_path / "a.png").write_bytes(content)
    tensor = torch.from_numpy(whole.copy()).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content), image, whole]
    forms += [tensor, tensor.double() / 255, (tensor / 255).half(), tensor / 255 * (1 + 1e-7)]
    forms += [torch.where(tensor == 255, 1.001, tensor / 255).half()]  # which has no number nearer to 1
    for form in forms:
        assert torch.equal(read_pixels(form), tensor)
    wrong = {"to 2$": tensor / 255 * 2, "nan to nan": tensor * torch.nan, "int64": tensor.long(), "not list": [1]}
    wrong |= {r"\(5, 7\) uint8": whole[..., 0], r"\(7, 5, 3\)": tensor.permute(2, 1, 0)}
    for message, form in wrong.items():
        with pytest.raises(InputError, match=message):
            read_pixels(form)


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


def test_unreadable_user_images_are_left_out_and_counted_and_refused_where_there_are_no_others(tmp_path, caplog):
    folder = tmp_path / "new"
    folder.mkdir()
    random_image(30, 20).save(folder / "b.tif")
    random_image(9, 9).save(tmp_path / "d.jpg")
    (folder / "g.png").write_bytes(encoded(random_image(64, 64), 1, ".png")[:5000])
    for name in ("a.jpg", "._b.tif", "e.heic", "f.png"):
        (folder / name).write_bytes(b"damaged")
    data = unlabelled_images([folder, tmp_path / "d.jpg"])
    found = [(image.id, image.path.name, image.width, image.height) for image in data.images]
    assert found == [(2, "b.tif", 30, 20), (5, "d.jpg", 9, 9)]
    assert (data.class_names, data.category_ids, len(data.boxes)) == ((), (), 0)
    assert f"left out 2 images that cannot be read ({folder}/a.jpg, {folder}/f.png)" in caplog.text
    assert "left out 1 images that cannot be read (g.png)" in caplog.text
    assert "does not read (e.heic)" in caplog.text
    (folder / "b.tif").unlink()
    (tmp_path / "empty").mkdir()
    for name, message in {
        "new": r"no image can be used: .*e\.heic.*a\.jpg, .*f\.png.*g\.png",
        "new/f.png": r"no image can be used: left out 1 images .*f\.png",
        "empty": "none is listed",
        "gone.jpg": r"no such image: .*gone",
    }.items():
        with pytest.raises(InputError, match=message):
            unlabelled_images([tmp_path / name])
