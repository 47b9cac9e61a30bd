"""Everything that can be wrong with annotations and images: told, and repaired, left out or refused."""

import copy
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers import data_flags
from PIL import Image

from common.console import InputError
from common.data.annotations import load_coco
from common.data.images import open_image
from common.data.sources import load_split


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


LEFT_OUT = {
    "no box": ({"bbox": None}, "left out 2 objects without a box"),
    "three sides": ({"bbox": [1, 2, 3]}, "left out 2 objects without a box"),
    "words": ({"bbox": ["1", "2", "3", "4"]}, "left out 2 objects without a box"),
    "zero width": ({"bbox": [1, 2, 0, 9]}, "left out 2 boxes without area"),
    "negative height": ({"bbox": [1, 20, 5, -9]}, "left out 2 boxes of negative width or height"),
    "not a number": ({"bbox": [1, 2, float("nan"), 9]}, "left out 2 boxes that are not numbers"),
    "infinite": ({"bbox": [1, 2, float("inf"), 9]}, "left out 2 boxes that are not numbers"),
    "wholly outside": ({"bbox": [100, 2, 5, 9]}, "left out 2 boxes that lie outside their image"),
    "wholly above": ({"bbox": [10, -9, 5, 9]}, "left out 2 boxes that lie outside their image"),
    "unknown image": ({"image_id": 99}, "left out 2 boxes of images that are not listed"),
    "unknown category": ({"category_id": 99}, "left out 2 boxes of a category that is not listed"),
    "no category": ({"category_id": None}, "left out 2 boxes of a category that is not listed"),
    "a list for a category": ({"category_id": [3]}, "left out 2 boxes of a category that is not listed"),
}
REPAIRED = {
    "partly outside": ({"bbox": [90, 50, 30, 30]}, "cut 2 boxes at the edge of their image"),
    "id 0": ({"id": 0}, "gave new ids to 2 boxes whose id is 0, another's or no number"),
    "id of another": ({"id": 1}, "gave new ids to 2 boxes whose id is 0, another's or no number"),
    "id a word": ({"id": "one"}, "gave new ids to 2 boxes whose id is 0, another's or no number"),
    "image id as text": ({"image_id": "11"}, "read 2 ids that are written as text"),
    "no crowd flag": ({"iscrowd": None}, "took 2 boxes without iscrowd for single objects"),
    "crowd flag is a word": ({"iscrowd": "no"}, "took 2 boxes without iscrowd for single objects"),
    "no area": ({"area": None}, "took the box's area for 2 objects without one"),
    "area not a number": ({"area": float("nan")}, "took the box's area for 2 objects without one"),
}


def twice(bad):
    entries = [annotation(id=2, **bad), annotation(id=3, **bad)] if "id" not in bad else [annotation(**bad)] * 2
    return [annotation(), *entries]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_boxes_that_teach_nothing_are_left_out_and_counted(coco_file, case):
    bad, note = LEFT_OUT[case]
    data = load_coco(*coco_file(twice(bad)))
    assert len(data.labels) == 1 and len(data.notes) == 1 and data.notes[0].startswith(note)


@pytest.mark.parametrize("case", REPAIRED)
def test_boxes_that_can_be_understood_are_kept_and_counted(coco_file, case):
    bad, note = REPAIRED[case]
    data = load_coco(*coco_file(twice(bad)))
    assert len(data.labels) == 3 and len(data.notes) == 1 and data.notes[0].startswith(note)
    assert np.isfinite(data.areas).all() and (data.areas > 0).all() and not data.crowd.any()


@pytest.mark.parametrize(("flag", "crowd"), [(0, False), ("0", False), (False, False), (1, True), ("1", True)])
def test_crowd_flags_may_be_written_in_many_ways(coco_file, flag, crowd):
    data = load_coco(*coco_file([annotation(iscrowd=flag)]))
    assert data.crowd.tolist() == [crowd] and data.notes == ()


def test_rounding_at_the_edge_is_not_worth_a_word(coco_file):
    assert load_coco(*coco_file([annotation(bbox=[70, 20, 30.6, 40.4])])).notes == ()


def test_text_that_is_a_number_is_one(coco_file):
    path, images = coco_file([annotation(category_id="7")], categories=(("3", "cat"), ("7", "dog")))
    data = load_coco(path, images)
    assert data.category_ids == (3, 7) and data.labels.tolist() == [1]


REFUSED = {
    "images are no list": ({"images": {}}, "no list 'images'"),
    "no annotations": ({"annotations": None}, "no list 'annotations'"),
    "no images": ({"images": []}, "'images' is empty"),
    "no categories": ({"categories": []}, "'categories' is empty"),
    "annotation of nothing": ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, "lacks one of image_id"),
    "annotation is a word": ({"annotations": ["box"]}, "lacks one of image_id"),
    "categories share an id": ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "share an id"),
    "categories share a name": ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "are called 'a'"),
    "category without number": ({"categories": [{"id": "one", "name": "a"}]}, "'one' is not a whole number"),
    "no such image": ({"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, "none of its 1"),
    "images share an id": (
        {"images": [{"id": 1, "file_name": f"{name}.png", "width": 9, "height": 9} for name in "ab"]},
        "two images share the id 1: a.png and b.png",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(coco_file, case):
    parts, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        load_coco(*coco_file([], parts=parts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"[]", b"3"])
def test_files_that_are_no_annotations(coco_file, content):
    path, images = coco_file([])
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_coco(path, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
def test_file_names_do_not_lead_out_of_the_folder(coco_file, name):
    good = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    path, images = coco_file([], parts={"images": [good, {"id": 2, "file_name": name, "width": 9, "height": 9}]})
    data = load_coco(path, images)
    assert len(data) == 1 and "lead out of their folder" in data.notes[0]


ABSURD = [None, True, 0, -1, 1.5, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "-", "--1", "²", "9" * 5000]
ABSURD += ["a" * 5000, "a\0b", "\ud800", "a\nb", "/", ".", [], [[1]], {}, {"a": 1}]


def places_in(content, above=()):
    """The way to everything in nested lists and dictionaries."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*above, key))


def test_no_value_anywhere_ends_in_a_traceback(coco_file):
    """Each in turn in the place of each: one line that refuses it, or a data set."""
    path, images = coco_file([annotation()])
    whole = json.loads(path.read_text())
    loaded = 0
    for *way, last in list(places_in(whole)):
        for value in ABSURD:
            content = copy.deepcopy(whole)
            part = content
            for key in way:
                part = part[key]
            part[last] = value
            path.write_text(json.dumps(content))
            try:
                data = load_coco(path, images)
            except InputError as error:
                assert len(str(error).splitlines()) == 1, (way, last, value)
                continue
            loaded += 1
            assert len(data.fingerprint()) == 16 and all(len(data.target(i).boxes) < 2 for i in range(len(data)))
            assert all(note.isprintable() for note in data.notes)
    assert loaded > 100


def images_of(coco_file, *images):
    good = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    path, images = coco_file([annotation()], parts={"images": [good, *images]})
    return data_flags("", val_json=str(path), val_images_dir=str(images)), images


def test_missing_images_and_images_listed_twice(coco_file):
    source, _ = images_of(
        coco_file,
        {"id": 12, "file_name": "gone.png", "width": 9, "height": 9},
        {"id": 11, "file_name": "a.png", "width": 100, "height": 60},
    )
    data = load_split(source, "val")
    assert len(data) == 1 and len(data.notes) == 2
    assert "are not in" in data.notes[0] and "listed twice" in data.notes[1]


def test_sizes_that_are_not_annotated_are_read_from_the_files(coco_file):
    source, _ = images_of(coco_file, {"id": 12, "file_name": "b.png"}, {"id": 13, "file_name": "b.png", "width": 0})
    data = load_split(source, "val")
    assert [(p.width, p.height) for p in data.images] == [(100, 60), (40, 80), (40, 80)]
    assert data.notes[0].startswith("took the sizes of 2 images from their files")


def damaged(path, kind):
    """A file that calls itself an image of 40 x 80 pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 40, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    content = path.read_bytes()
    changed = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "noise": bytes(200),
    }
    path.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "a web page", "noise"])
def test_damaged_images_are_left_out_and_counted(coco_file, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    source, images = images_of(coco_file, {"id": 12, "file_name": "c.jpg", "width": 40, "height": 80})
    damaged(images / "c.jpg", kind)
    for _ in range(2):  # the second time it is known
        data = load_split(source, "val")
        assert len(data) == 1 and data.notes == ("left out 1 images that cannot be read (c.jpg)",)
        assert "c.jpg" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"c\.jpg.*--strict"):
        load_split(replace(source, strict=True), "val")
    Image.new("RGB", (40, 80)).save(images / "c.jpg")
    assert len(load_split(replace(source, strict=True), "val")) == 2


def test_images_of_another_size_are_left_out_unless_they_are_turned(coco_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"id": 12, "file_name": "turned.jpg", "width": 40, "height": 80}
    source, images = images_of(coco_file, turned, {"id": 13, "file_name": "b.png", "width": 50, "height": 80})
    Image.new("RGB", (80, 40)).save(images / "turned.jpg", exif=exif)
    data = load_split(source, "val")
    assert [p.id for p in data.images] == [11, 12]
    assert data.notes == ("left out 1 images of another size than annotated (b.png)",)


def test_no_usable_image_at_all(coco_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    source, images = images_of(coco_file)
    (images / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 1 images can be used: .*cannot be read \(a\.png\)"):
        load_split(source, "val")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(tmp_path, mode):
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


def test_images_whose_range_is_unknown_or_whose_size_is_absurd_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.ones((20, 40), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="range is unknown"):
        open_image(tmp_path / "a.tiff")
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png"):
        open_image(tmp_path / "bomb.png")


def test_outlines_do_not_fill_the_memory(coco_file):
    """3,000 outlined boxes; the file is read whole, what is kept of it is small."""
    outline = [[float(j) for j in range(400)]]
    path, images = coco_file([annotation(id=i + 1, segmentation=outline) for i in range(3000)])
    tracemalloc.start()
    data = load_coco(path, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.labels) == 3000 and peak < 2.5 * path.stat().st_size
