"""Faults of annotations and images are counted, and repaired, left out or refused."""

import copy
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers import corners_of, data_flags
from PIL import Image

from common.console import InputError
from common.data.box_format import to_xywh
from common.data.sources import load_split, load_train_and_val
from common.data.table import check_object_sizes, load_coco
from common.images import open_image


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


LEFT_OUT = {
    "no box": ({"bbox": None}, "left out 2 objects without a box"),
    "three sides": ({"bbox": [1, 2, 3]}, "left out 2 objects without a box"),
    "words": ({"bbox": ["1", "2", "3", "4"]}, "left out 2 objects without a box"),
    "zero width": ({"bbox": [1, 2, 0, 9]}, "left out 2 boxes without area"),
    "negative height": ({"bbox": [1, 20, 5, -9]}, "left out 2 boxes of negative width or height"),
    "not a number": ({"bbox": [1, 2, float("nan"), 9]}, "left out 2 boxes with inf or NaN"),
    "infinite": ({"bbox": [1, 2, float("inf"), 9]}, "left out 2 boxes with inf or NaN"),
    "wholly outside": ({"bbox": [100, 2, 5, 9]}, "left out 2 boxes that lie outside their image"),
    "wholly above": ({"bbox": [10, -9, 5, 9]}, "left out 2 boxes that lie outside their image"),
    "unknown image": ({"image_id": 99}, "left out 2 boxes of images that are not listed"),
    "unknown category": ({"category_id": 99}, "left out 2 boxes of a category that is not listed"),
    "no category": ({"category_id": None}, "left out 2 boxes of a category that is not listed"),
    "a list for a category": ({"category_id": [3]}, "left out 2 boxes of a category that is not listed"),
}
REPAIRED = {
    "partly outside": ({"bbox": [90, 50, 30, 30]}, "clipped 2 boxes at the edge of their image"),
    "id 0": ({"id": 0}, "gave new ids to 2 boxes whose id is 0, repeated or not an integer"),
    "id of another": ({"id": 1}, "gave new ids to 2 boxes whose id is 0, repeated or not an integer"),
    "id a word": ({"id": "one"}, "gave new ids to 2 boxes whose id is 0, repeated or not an integer"),
    "image id as text": ({"image_id": "11"}, "read 2 ids that are written as text"),
    "no crowd flag": ({"iscrowd": None}, "read 2 boxes without iscrowd as single objects"),
    "crowd flag is a word": ({"iscrowd": "no"}, "read 2 boxes without iscrowd as single objects"),
    "no area": ({"area": None}, "used the area of the box for 2 objects without area"),
    "area not a number": ({"area": float("nan")}, "used the area of the box for 2 objects without area"),
}


def twice(bad):
    faulty = annotation(**{"id": 2} | bad), annotation(**{"id": 3, "category_id": 7} | bad)
    return [annotation(bbox=[1, 2, 3, 4]), *faulty]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_invalid_boxes_are_left_out_and_counted(coco_file, case):
    bad, note = LEFT_OUT[case]
    data = load_coco(*coco_file(twice(bad)))
    assert len(data.labels) == 1 and len(data.notes) == 1 and data.notes[0].startswith(note)


@pytest.mark.parametrize("case", REPAIRED)
def test_boxes_with_repairable_faults_are_kept_and_counted(coco_file, case):
    bad, note = REPAIRED[case]
    data = load_coco(*coco_file(twice(bad)))
    assert len(data.labels) == 3 and len(data.notes) == 1 and data.notes[0].startswith(note)
    assert np.isfinite(data.areas).all() and (data.areas > 0).all() and not data.crowd.any()


@pytest.mark.parametrize(("flag", "crowd"), [(0, False), ("0", False), (False, False), (1, True), ("1", True)])
def test_crowd_flags_as_numbers_text_and_booleans(coco_file, flag, crowd):
    data = load_coco(*coco_file([annotation(iscrowd=flag)]))
    assert data.crowd.tolist() == [crowd] and data.notes == ()


def test_rounding_at_the_edge_needs_no_note(coco_file):
    assert load_coco(*coco_file([annotation(bbox=[70, 20, 30.6, 40.4])])).notes == ()


def test_category_ids_as_text(coco_file):
    path, images = coco_file([annotation(category_id="7")], categories=(("3", "cat"), ("7", "dog")))
    data = load_coco(path, images)
    assert data.category_ids == (3, 7) and data.labels.tolist() == [1]


REFUSED = {
    "images are no list": ({"images": {}}, "no list 'images'"),
    "no annotations": ({"annotations": None}, "no list 'annotations'"),
    "no images": ({"images": []}, "'images' is empty"),
    "no categories": ({"categories": []}, "'categories' is empty"),
    "annotation of nothing": ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, "lacks image_id"),
    "annotation is a word": ({"annotations": ["box"]}, "lacks image_id"),
    "categories share an id": ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "share an id"),
    "categories share a name": (
        {
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}],
            "annotations": [annotation(category_id=1), annotation(id=2, category_id=2)],
        },
        "are called 'a'",
    ),
    "category without number": ({"categories": [{"id": "one", "name": "a"}]}, "'one' is not a whole number"),
    "no such image": ({"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, "none of its 1"),
    "images share an id": (
        {"images": [{"id": 1, "file_name": f"{name}.png", "width": 9, "height": 9} for name in "ab"]},
        "two images share the id 1: a.png and b.png",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_files_are_refused_in_one_line(coco_file, case):
    parts, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        load_coco(*coco_file([], parts=parts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"[]", b"3"])
def test_files_without_annotations_are_refused(coco_file, content):
    path, images = coco_file([])
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_coco(path, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
def test_images_outside_their_folder_are_left_out(coco_file, name):
    good = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    path, images = coco_file([], parts={"images": [good, {"id": 2, "file_name": name, "width": 9, "height": 9}]})
    data = load_coco(path, images)
    assert len(data) == 1 and "lead out of their folder" in data.notes[0]


ABSURD = [None, True, 0, -1, 1.5, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "-", "--1", "²", "9" * 5000]
ABSURD += ["a" * 5000, "a\0b", "\ud800", "a\nb", "/", ".", [], [[1]], {}, {"a": 1}]


def places_in(content, above=()):
    """The path of keys to every value in nested lists and dictionaries."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*above, key))


def test_no_value_in_any_place_ends_in_a_traceback(coco_file):
    """Every absurd value in every place: a refusal of one line, or a data set."""
    path, images = coco_file([annotation()])
    whole = json.loads(path.read_text())
    loaded = 0
    for *keys, last in list(places_in(whole)):
        for value in ABSURD:
            content = copy.deepcopy(whole)
            part = content
            for key in keys:
                part = part[key]
            part[last] = value
            path.write_text(json.dumps(content))
            try:
                data = load_coco(path, images)
            except InputError as error:
                assert len(str(error).splitlines()) == 1, (keys, last, value)
                continue
            loaded += 1
            assert len(data.fingerprint()) == 16 and all(len(data.target(i).boxes) < 2 for i in range(len(data)))
            assert all(note.isprintable() for note in data.notes)
    assert loaded > 100


def images_of(coco_file, *images):
    good = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    path, images = coco_file([annotation()], parts={"images": [good, *images]})
    return data_flags("", val_json=str(path), val_images_dir=str(images)), images


def test_a_folder_with_braces_in_its_name(coco_file):
    path, images = coco_file([annotation(image_id=5)])
    images = images.rename(images.with_name("{images}"))
    (images / "a.png").unlink()
    assert load_coco(path, images).notes == (f"left out 1 images that are not in {images} (a.png)",)


def test_missing_and_repeated_images_are_counted(coco_file):
    source, _ = images_of(
        coco_file,
        {"id": 12, "file_name": "gone.png", "width": 9, "height": 9},
        {"id": 11, "file_name": "a.png", "width": 100, "height": 60},
    )
    data = load_split(source, "val")
    assert len(data) == 1 and len(data.notes) == 2
    assert "are not in" in data.notes[0] and "listed twice" in data.notes[1]


def test_missing_sizes_are_read_from_the_files(coco_file):
    source, images = images_of(
        coco_file, {"id": 12, "file_name": "b.png"}, {"id": 13, "file_name": "c.png", "width": 0}
    )
    Image.new("RGB", (40, 80)).save(images / "c.png")
    data = load_split(source, "val")
    assert [(p.width, p.height) for p in data.images] == [(100, 60), (40, 80), (40, 80)]
    assert data.notes[0].startswith("read the sizes of 2 images from their files")


def damaged(path, kind):
    """A damaged JPEG file of 40 x 80 pixels."""
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
    for _ in range(2):  # the second time from the cache
        data = load_split(source, "val")
        assert len(data) == 1 and data.notes == ("left out 1 images that cannot be read (c.jpg)",)
        assert "c.jpg" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"c\.jpg.*--strict"):
        load_split(replace(source, strict=True), "val")
    Image.new("RGB", (40, 80)).save(images / "c.jpg")
    assert len(load_split(replace(source, strict=True), "val")) == 2


def test_images_of_another_size_are_left_out_unless_rotated(coco_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"id": 12, "file_name": "turned.jpg", "width": 40, "height": 80}
    source, images = images_of(coco_file, turned, {"id": 13, "file_name": "b.png", "width": 50, "height": 80})
    Image.new("RGB", (80, 40)).save(images / "turned.jpg", exif=exif)
    data = load_split(source, "val")
    assert [p.id for p in data.images] == [11, 12]
    assert data.notes == ("left out 1 images of another size than annotated (b.png)",)


def test_no_usable_image_is_refused(coco_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    source, images = images_of(coco_file)
    (images / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 1 images can be used: .*cannot be read \(a\.png\)"):
        load_split(source, "val")


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


def test_float_images_and_huge_images_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.ones((20, 40), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="range is unknown"):
        open_image(tmp_path / "a.tiff")
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png"):
        open_image(tmp_path / "bomb.png")


def test_polygons_do_not_fill_the_memory(coco_file):
    """3,000 boxes with long polygons: reading them takes little more memory than the file is long."""
    polygon = [[float(j) for j in range(400)]]
    path, images = coco_file([annotation(id=i + 1, segmentation=polygon) for i in range(3000)])
    tracemalloc.start()
    data = load_coco(path, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.labels) == 3000 and peak < 2.5 * path.stat().st_size


def boxes_by_name(data):
    return {image.path.name: data.image_boxes(index)[0].tolist() for index, image in enumerate(data.images)}


def test_repeated_boxes_are_kept_and_counted(coco_file):
    """Only equal boxes of one class on one image; COCO's own evaluation counts each of them."""
    same = [annotation(), annotation(id=2), annotation(id=3, category_id=7), annotation(id=4, iscrowd=1)]
    other = [annotation(id=5, image_id=5), annotation(id=6, bbox=[10, 20, 30, 5.5])]
    data = load_coco(*coco_file([*same, *other]))
    assert len(data.labels) == 6
    assert data.notes == (
        "kept 1 boxes that repeat one of their class on the same image, each counts as an object: remove them (a.png)",
    )


def listed_twice(**parts):
    """a.png under the ids 11 and 12, and b.png."""
    first = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    return [first, {"id": 5, "file_name": "b.png", "width": 40, "height": 80}, first | {"id": 12} | parts]


@pytest.mark.parametrize("limit", [0, 2])
def test_a_file_under_two_ids_becomes_one_image_with_all_boxes(coco_file, limit):
    entries = [annotation(), annotation(id=2, image_id=12), annotation(id=3, image_id=12, bbox=[50, 20, 30, 5])]
    path, images = coco_file(entries, parts={"images": listed_twice()})
    data = load_coco(path, images, limit)
    assert [image.id for image in data.images] == [11, 5]
    assert boxes_by_name(data) == {"a.png": [[10, 20, 40, 25], [50, 20, 80, 25]], "b.png": []}
    assert data.notes == ("merged 1 images with an earlier one of the same file (a.png)",)


def test_links_to_one_file_are_one_image_and_equal_files_are_two(coco_file):
    path, images = coco_file([annotation(), annotation(id=2, image_id=12, bbox=[50, 20, 30, 5])])
    content = json.loads(path.read_text())
    for name, count in (("link.png", 2), ("copy.png", 3)):
        path.write_text(json.dumps(content | {"images": listed_twice(file_name=name)}))
        if name == "link.png":
            (images / name).symlink_to("a.png")
        else:
            (images / name).write_bytes((images / "a.png").read_bytes())
        data = load_coco(path, images)
        assert len(data) == count and len(data.labels) == 2 and bool(data.notes) == (count == 2)


def test_ids_with_different_sizes_of_one_file_are_not_merged(coco_file, tmp_path, monkeypatch):
    """Their boxes have different units; the one of another size than the file is left out."""
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    entries = [annotation(), annotation(id=2, image_id=12, bbox=[100, 40, 60, 10])]
    path, images = coco_file(entries, parts={"images": listed_twice(width=200, height=120)})
    data = load_split(data_flags("", val_json=str(path), val_images_dir=str(images)), "val")
    assert boxes_by_name(data) == {"a.png": [[10, 20, 40, 25]], "b.png": []}
    assert data.notes == ("left out 1 images of another size than annotated (a.png)",)


ROBOFLOW = (("blue", "none"), ("red", "blue"), ("blue", "blue"))
CATEGORIES = {
    "group with the name of a class": (ROBOFLOW, (1, 2), (1, 2), "called like another one (blue)"),
    "group with the name of a class without boxes": (ROBOFLOW, (1,), (1, 2), "called like another one (blue)"),
    "group": ((("things", "none"), ("red", "things")), (1,), (1,), "that are groups of others (things)"),
    "group with boxes": ((("things", "none"), ("red", "things")), (0, 1), (0, 1), None),
    "class without boxes": ((("red", "none"), ("blue", "none")), (1,), (0, 1), None),
    "COCO's person": ((("person", "person"), ("car", "vehicle")), (1,), (0, 1), None),
    "repeated, without boxes": ((("red", ""), ("blue", ""), ("red", "")), (0, 1), (0, 1), "like another one (red)"),
}


@pytest.mark.parametrize("case", CATEGORIES)
def test_categories_that_are_no_classes_are_left_out(coco_file, case):
    categories, used, kept, note = CATEGORIES[case]
    listed = [{"id": i, "name": name, "supercategory": parent} for i, (name, parent) in enumerate(categories)]
    entries = [annotation(id=i + 1, category_id=i) for i in used]
    data = load_coco(*coco_file(entries, parts={"categories": listed}))
    assert data.category_ids == kept and data.class_names == tuple(categories[i][0] for i in kept)
    assert [data.category_ids[label] for label in data.labels] == list(used)
    assert data.notes == () if note is None else data.notes[0].endswith(note) and len(data.notes) == 1


def splits(coco_file, tmp_path, train, val):
    """Flags of a data set with these annotations of image 11, a.png of 100 x 60 pixels, in its splits."""
    path, images = coco_file([])
    content = json.loads(path.read_text())
    files = {}
    for split, boxes in (("train", train), ("val", val)):
        entries = [annotation(id=i + 1, bbox=list(map(float, box))) for i, box in enumerate(boxes)]
        files[split] = tmp_path / f"{split}.json"
        files[split].write_text(json.dumps(content | {"annotations": entries}))
    paths = {f"{split}_json": str(path) for split, path in files.items()}
    return data_flags("", **paths, train_images_dir=str(images), val_images_dir=str(images))


def in_layout(corners, layout, normalised):
    """(N, 4) xyxy boxes as a file of this format has them, of an image of 100 x 60 pixels."""
    low, high = corners[:, :2], corners[:, 2:]
    first = {"xywh": low, "xyxy": low, "cxcywh": (low + high) / 2}[layout]
    boxes = np.concatenate([first, high if layout == "xyxy" else high - low], axis=1)
    return boxes / [100, 60, 100, 60] if normalised else boxes


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("layout", ["xywh", "xyxy", "cxcywh"])
def test_the_format_of_the_boxes_is_found(coco_file, tmp_path, layout, normalised):
    rng = np.random.default_rng(0)
    corners = np.concatenate([low := rng.uniform((0, 0), (70, 40), (40, 2)), low + rng.uniform(5, 20, (40, 2))], axis=1)
    boxes = in_layout(corners, layout, normalised)
    pixels = boxes * [100, 60, 100, 60] if normalised else boxes
    assert np.allclose(corners_of(to_xywh(pixels, layout)), corners)
    flags = splits(coco_file, tmp_path, boxes, boxes[:2])  # of the two alone the layout is not certain
    for data in load_train_and_val(flags):
        assert np.allclose(corners_of(data.boxes), corners[: len(data.boxes)])
        assert np.allclose(data.areas, 99 if not data.notes else np.prod(data.boxes[:, 2:], axis=1))
        unit = "normalised coordinates" if normalised else "pixels"
        expected = layout != "xywh" or normalised
        assert [note.split(" (")[0] for note in data.notes] == [
            f"read {len(data.boxes)} boxes as {layout} in {unit}"
        ] * expected
    if layout != "xywh" or normalised:
        with pytest.raises(InputError, match=r"read 40 boxes as .*--box-format decides.*refused by --strict"):
            load_split(replace(flags, strict=True), "train")


@pytest.mark.parametrize("seed", range(30))
def test_correct_xywh_boxes_are_never_read_otherwise(coco_file, seed):
    """Small and large objects anywhere, some of which reach beyond their image."""
    rng = np.random.default_rng(seed)
    count, size = rng.integers(1, 30), rng.uniform(0.05, 0.95)
    sides = np.array([100, 60]) * rng.uniform(size / 2, size, (count, 2))
    low = rng.uniform(0, 1, (count, 2)) * ([100, 60] - sides) + rng.normal(0, seed % 3, (count, 2))
    boxes = np.concatenate([low, sides], axis=1).tolist()
    data = load_coco(*coco_file([annotation(id=i + 1, bbox=box) for i, box in enumerate(boxes)]))
    assert not any(note.startswith("read") for note in data.notes)
    assert (data.boxes == boxes).all()


def test_boxes_of_one_pixel_are_not_normalised(coco_file):
    data = load_coco(*coco_file([annotation(bbox=[0, 0, 1, 1])]))
    assert data.boxes.tolist() == [[0, 0, 1, 1]] and data.notes == ()


def test_box_format_sets_the_layout(coco_file):
    path, images = coco_file([annotation(bbox=[10, 20, 40, 30])])
    expected = {
        "auto": [10, 20, 40, 30],
        "xywh": [10, 20, 40, 30],
        "xyxy": [10, 20, 30, 10],
        "cxcywh": [-10, 5, 40, 30],
    }
    for box_format, box in expected.items():
        assert load_coco(path, images, box_format=box_format).boxes.tolist() == [box]


def test_boxes_that_fit_in_no_format_are_counted(coco_file):
    """Boxes of images of twice the size."""
    boxes = [[20, 20, 120, 90], [60, 40, 130, 70], [90, 10, 100, 30], [10, 50, 20, 60]]
    data = load_coco(*coco_file([annotation(id=i + 1, bbox=box) for i, box in enumerate(boxes)]))
    assert data.notes[0].startswith("read 4 boxes as xywh, although 4 of them do not fit their images")


def test_training_data_of_crowds_alone_are_refused(coco_file, tmp_path):
    path, images = coco_file([annotation(id=i, iscrowd=1) for i in (1, 2, 3)])
    files = {"train_json": str(path), "val_json": str(path)}
    folders = {"train_images_dir": str(images), "val_images_dir": str(images)}
    with pytest.raises(
        InputError, match=r"all 3 boxes are crowds \(iscrowd=1, in VOC difficult\) on the 2 training images"
    ):
        load_train_and_val(data_flags("", **files, **folders))


def test_objects_that_are_too_small_for_the_input_are_counted(coco_file, capsys):
    """On an image of 100 x 60 pixels; at 98 pixels an object needs 2.04 of them, and only what is inside counts."""
    sides = [2.05, 2.0, 1.0, 0.5]
    entries = [annotation(id=i + 1, bbox=[5 * i, 10, 30, side]) for i, side in enumerate(sides)]
    entries += [annotation(id=8, bbox=[98.5, 10, 30, 30]), annotation(id=9, bbox=[1, 1, 1, 1], iscrowd=1)]
    path, images = coco_file(entries)
    check_object_sizes(load_coco(path, images), 98, 14)
    message = "4 of 5 training objects are smaller than 2 pixels at --image-size 98 and cannot be learned"
    assert f"{path}: {message}: --image-size 406 would keep them, 168 half of them" in capsys.readouterr().out
    check_object_sizes(load_coco(path, images), 406, 14)
    assert capsys.readouterr().out == ""


def test_no_object_that_is_large_enough_is_refused(coco_file):
    data = load_coco(*coco_file([annotation(bbox=[1, 1, 50, 1]), annotation(id=2, bbox=[9, 9, 1, 50])]))
    with pytest.raises(InputError, match=r"2 of 2 training objects .*: --image-size 210 would keep them$"):
        check_object_sizes(data, 56, 14)
