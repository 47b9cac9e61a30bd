"""Every image is decoded once; what is wrong with it is kept while its file is the same. Small objects are counted."""

import os

import numpy as np
import pytest
from helpers import annotation, data_flags, load_coco
from PIL import Image

from common.console import InputError
from common.data.checks import check_images, check_object_sizes
from common.data.sources import NO_OBJECT, load_split
from common.types import InputSize


@pytest.fixture
def forty(coco_file):
    """The data set of forty images, and their folder."""
    entries = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(1, 41)]
    path, images = coco_file([], parts={"images": entries})
    for entry in entries:
        pixels = np.random.default_rng(entry["id"]).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(images / entry["file_name"])
    return load_coco(path, images), images


@pytest.fixture
def opened(monkeypatch):
    """The names of the images that are opened, to look into the header and to decode; some cannot be opened."""
    names, locked, open_file = [], set(), Image.open

    def open_counted(path, *rest):
        names.append(path.name)
        if path.name in locked:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *rest)

    monkeypatch.setattr(Image, "open", open_counted)
    return names, locked


def faulty(data):
    """The numbers of the images with a fault."""
    checks = zip(data.images, check_images(data.images, data.source), strict=True)
    return [image.id for image, check in checks if check.fault]


def test_an_image_is_decoded_once_until_it_or_the_program_changes(forty, opened, monkeypatch):
    (data, images), (names, _) = forty, opened
    assert faulty(data) == [] and len(set(names)) == 40
    names.clear()
    assert faulty(data.select(np.arange(39))) == faulty(data) == [] and names == []
    status = (images / "7.jpg").stat()
    (images / "7.jpg").write_bytes((images / "7.jpg").read_bytes()[:-300] + bytes(300))
    os.utime(images / "7.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same length and time
    faulty(data)
    assert set(names) == {"7.jpg"}
    monkeypatch.setattr("common.data.memory.DECODING", "of another release")
    assert faulty(data) == [] and len(set(names)) == 40


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", bytes(200), None])
def test_damaged_images_are_found_each_time(forty, content):
    data, images = forty
    file = images / "3.jpg"
    file.write_bytes(file.read_bytes()[:400] if content is None else content)
    assert faulty(data) == faulty(data) == [3]


def test_a_fault_that_passes_is_not_kept(forty, opened):
    opened[1].update(("5.jpg", "15.jpg"))
    assert faulty(forty[0]) == [5, 15]
    opened[1].clear()
    assert faulty(forty[0]) == []


def test_half_a_line_and_a_cache_that_cannot_be_written_do_no_harm(forty, opened, cache, caplog):
    data, names = forty[0], opened[0]
    faulty(data)
    (file,) = (cache / "checked").iterdir()
    file.write_text(file.read_text()[:-30])
    names.clear()
    assert faulty(data) == [] and len(set(names)) == 1
    assert faulty(data) == [] and len(set(names)) == 1  # what was added stands on a line of its own
    file.unlink()
    (cache / "checked").rmdir()
    (cache / "checked").write_text("no folder")
    assert faulty(data) == [] and "they will be checked again" in caplog.text


def test_wrong_sizes_and_pages_are_noted(forty):
    data, images = forty
    Image.new("RGB", (30, 40)).save(images / "2.jpg")
    frames = [Image.new("L", (40, 30)), Image.new("L", (40, 30), 255)]
    frames[0].save(images / "4.jpg", "GIF", save_all=True, append_images=frames[1:])
    found = load_split(data_flags("", val_json=data.source, val_images_dir=str(images)), "val")
    assert len(found) == 39 and sorted(found.notes) == [
        "left out 1 images of another size than annotated (2.jpg)",
        f"{NO_OBJECT.format(0)}, so that mAP cannot be computed; take more images",
        "used the first page or frame of 1 images that have several (4.jpg)",
    ]


def test_objects_that_are_too_small_for_the_input_are_counted(coco_file, caplog):
    """On an image of 100 x 60 pixels; at 98 pixels an object needs 2.04 of them, and only what is inside counts."""
    boxes = [[5 * i, 10, 30, side] for i, side in enumerate((2.05, 2.0, 1.0, 0.5))] + [[98.5, 10, 30, 30]]
    data = load_coco(*coco_file([*(annotation(bbox=box) for box in boxes), annotation(bbox=[1, 1, 1, 1], iscrowd=1)]))
    check_object_sizes(data, InputSize(98, 14))
    message = "4 of 5 training objects are smaller than 2 pixels at --image-size 98 and cannot be learned"
    assert f"{data.source}: {message}: --image-size 406 would keep them" in caplog.text
    caplog.clear()
    check_object_sizes(data, InputSize(406, 14))
    assert caplog.text == ""
    slivers = [annotation(bbox=box) for box in ([1, 1, 50, 1], [9, 9, 1, 50])]
    with pytest.raises(InputError, match=r"2 of 2 training objects .*: --image-size 210 would keep them$"):
        check_object_sizes(load_coco(*coco_file(slivers)), InputSize(56, 14))
