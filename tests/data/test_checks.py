"""Every image is decoded once; what is wrong with it is kept while its file is the same. Small objects are counted."""

import os

import numpy as np
import pytest
from helpers import data_flags, load_coco
from PIL import Image

from common.console import InputError
from common.data import checks
from common.data.checks import check_images, check_object_sizes
from common.data.sources import load_split


def annotation(**parts):
    return {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def forty(coco_file):
    """The data set of forty images, and their folder."""
    entries = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(1, 41)]
    path, images = coco_file([annotation()], parts={"images": entries})
    for entry in entries:
        pixels = np.random.default_rng(entry["id"]).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(images / entry["file_name"])
    return load_coco(path, images), images


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names, decode = [], checks._decode
    monkeypatch.setattr(checks, "_decode", lambda image: names.append(image.path.name) or decode(image))
    return names


def test_an_image_is_decoded_once_until_it_changes(forty, decoded):
    data, images = forty
    check_images(data.images, "x")
    assert len(decoded) == 40
    check_images(data.images[:39], "x")
    check_images(data.images, "x")
    assert len(decoded) == 40
    status = (images / "7.jpg").stat()
    (images / "7.jpg").write_bytes((images / "7.jpg").read_bytes()[:-300] + bytes(300))
    os.utime(images / "7.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same length and time
    check_images(data.images, "x")
    assert decoded[40:] == ["7.jpg"]


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", bytes(200), None])
def test_damaged_images_are_found_also_by_the_cache(forty, content):
    data, images = forty
    file = images / "3.jpg"
    file.write_bytes(file.read_bytes()[:400] if content is None else content)
    for _ in range(2):
        outcomes = check_images(data.images, "x")
        assert [i for i, outcome in enumerate(outcomes) if outcome[0]] == [2]
        assert outcomes[2][0] == "left out {} images that cannot be read"


def test_a_fault_that_passes_is_not_kept(forty, monkeypatch):
    data, _ = forty
    refused = PermissionError(13, "Permission denied")

    def open_locked(path, *rest):
        if str(path).endswith("5.jpg") and locked:
            raise refused
        return opened(path, *rest)

    opened, locked = Image.open, True
    monkeypatch.setattr(Image, "open", open_locked)
    assert sum(bool(outcome[0]) for outcome in check_images(data.images, "x")) == 4  # 5, 15, 25, 35
    locked = False
    assert not any(outcome[0] for outcome in check_images(data.images, "x"))


def test_half_a_line_and_a_cache_that_cannot_be_written_do_no_harm(forty, decoded, cache, caplog):
    data, _ = forty
    check_images(data.images, "x")
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:-30])
    decoded.clear()
    assert not any(outcome[0] for outcome in check_images(data.images, "x")) and len(decoded) == 1
    file.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    assert not any(outcome[0] for outcome in check_images(data.images, "x"))
    assert "they will be checked again" in caplog.text


def test_wrong_sizes_and_pages_are_noted(forty):
    data, images = forty
    Image.new("RGB", (30, 40)).save(images / "2.jpg")
    frames = [Image.new("L", (40, 30)), Image.new("L", (40, 30), 255)]
    frames[0].save(images / "4.jpg", "GIF", save_all=True, append_images=frames[1:])
    flags = data_flags("", val_json=data.source, val_images_dir=str(images))
    found = load_split(flags, "val")
    assert len(found) == 39 and sorted(found.notes) == [
        "left out 1 images of another size than annotated (2.jpg)",
        "used the first page or frame of 1 images that have several (4.jpg)",
    ]


def test_objects_that_are_too_small_for_the_input_are_counted(coco_file, caplog):
    """On an image of 100 x 60 pixels; at 98 pixels an object needs 2.04 of them, and only what is inside counts."""
    sides = [2.05, 2.0, 1.0, 0.5]
    entries = [annotation(image_id=11, bbox=[5 * i, 10, 30, side]) for i, side in enumerate(sides)]
    entries += [annotation(image_id=11, bbox=[98.5, 10, 30, 30]), annotation(image_id=11, bbox=[1, 1, 1, 1], iscrowd=1)]
    path, images = coco_file(entries)
    check_object_sizes(load_coco(path, images), 98, 14)
    message = "4 of 5 training objects are smaller than 2 pixels at --image-size 98 and cannot be learned"
    assert f"{path}: {message}: --image-size 406 would keep them" in caplog.text
    caplog.clear()
    check_object_sizes(load_coco(path, images), 406, 14)
    assert caplog.text == ""
    slivers = [annotation(image_id=11, bbox=box) for box in ([1, 1, 50, 1], [9, 9, 1, 50])]
    with pytest.raises(InputError, match=r"2 of 2 training objects .*: --image-size 210 would keep them$"):
        check_object_sizes(load_coco(*coco_file(slivers)), 56, 14)
