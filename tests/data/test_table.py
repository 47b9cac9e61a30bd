"""What is wrong with annotations is counted, left out or refused; boxes in another form than documented are refused."""

import copy
import json
import tracemalloc
from array import array
from pathlib import Path

import numpy as np
import pytest
from helpers import load_coco
from PIL import Image

from common.console import InputError
from common.data.table import LAYOUTS, Table


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


LEFT_OUT = {
    "no box": ({"bbox": None}, "left out 2 boxes that are not four finite numbers (a.png)"),
    "three sides": ({"bbox": [1, 2, 3]}, "left out 2 boxes that are not four finite numbers (a.png)"),
    "words": ({"bbox": ["1", "2", "3", "4"]}, "left out 2 boxes that are not four finite numbers (a.png)"),
    "infinite": ({"bbox": [1, 2, float("inf"), 9]}, "left out 2 boxes that are not four finite numbers (a.png)"),
    "zero width": ({"bbox": [1, 2, 0, 9]}, "left out 2 boxes without area (a.png)"),
    "negative height": ({"bbox": [1, 20, 5, -9]}, "left out 2 boxes without area (a.png)"),
    "wholly outside": ({"bbox": [100, 2, 5, 9]}, "left out 2 boxes that lie outside their image (a.png)"),
    "wholly above": ({"bbox": [10, -9, 5, 9]}, "left out 2 boxes that lie outside their image (a.png)"),
    "unknown image": ({"image_id": 99}, "left out 2 boxes of images that are not used"),
    "unknown class": ({"category_id": 99}, "left out 2 boxes of a class that is not listed (a.png)"),
}
REFUSED = {
    "no images": ({"images": None}, "NoneType"),
    "no image": ({"images": []}, "no image can be used: none is listed"),
    "no classes": ({"categories": []}, "lists no classes"),
    "annotation of nothing": ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, "it lacks 'category_id'"),
    "an id as text": ({"annotations": [annotation(image_id="11")]}, "'11' is not a whole number"),
    "crowd flag a word": ({"annotations": [annotation(iscrowd="no")]}, "'no'"),
    "classes share an id": ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "share an id"),
    "classes share a name": ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": " a"}]}, "are called a: list"),
    "no such image": ({"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, r"\(gone.png\)"),
    "images share an id": ({"images": [{"id": 1, "file_name": f"{n}.png"} for n in "ab"]}, "two images have the id 1"),
    "a file under two ids": ({"images": [{"id": i, "file_name": "a.png"} for i in (1, 2)]}, "listed twice: a.png"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_boxes_that_cannot_be_used_are_left_out_and_counted(coco_file, case):
    bad, note = LEFT_OUT[case]
    faulty = annotation(**{"id": 2} | bad), annotation(**{"id": 3, "category_id": 7} | bad)
    data = load_coco(*coco_file([annotation(bbox=[1, 2, 3, 4]), *faulty]))
    assert data.boxes.tolist() == [[1, 2, 3, 4]] and data.notes == (note,)


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_in_one_line(coco_file, case):
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


def test_what_coco_leaves_optional_needs_no_note(coco_file):
    """Annotation ids are looked at by nobody, and Roboflow's begin with 0."""
    bare = {"image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5]}
    data = load_coco(*coco_file([bare, annotation(id=0, iscrowd=True), annotation(id=0, bbox=[70, 20, 30.6, 40.4])]))
    assert data.areas.tolist() == [150, 99, 99] and data.crowd.tolist() == [False, True, False] and data.notes == ()


def test_boxes_beyond_the_edge_are_kept_and_counted(coco_file):
    data = load_coco(*coco_file([annotation(bbox=[90, 50, 30, 30])]))
    assert data.boxes.tolist() == [[90, 50, 30, 30]]
    assert data.notes == ("clipped 1 boxes at the edge of their image, for training (a.png)",)


@pytest.mark.parametrize("shift", [0, 0.04])
def test_boxes_that_repeat_another_are_kept_and_counted(coco_file, shift):
    """Of one class on one image, also where they were written with other digits; COCO counts each of them."""
    same = [annotation(), annotation(id=2, bbox=[10 + shift, 20, 30, 5 - shift])]
    other = [annotation(category_id=7), annotation(iscrowd=1), annotation(image_id=5), annotation(bbox=[10, 20, 30, 9])]
    data = load_coco(*coco_file([*same, *other]))
    assert len(data.labels) == 6 and len(data.notes) == 1
    assert data.notes[0].startswith("kept 1 boxes that repeat one of their class on their image")


def test_classes_that_differ_in_case_alone_are_noted_and_accents_in_any_form_are_one(coco_file):
    names = ("Red", "red", "traffic light", "traffic_light", "a", "A", "cafe\u0301")
    data = load_coco(*coco_file([], categories=enumerate(names)))
    assert data.class_names[-1] == "caf\u00e9" and len(data.notes) == 1
    assert (
        data.notes[0].startswith("4 classes differ from another in case")
        and "(Red, red, traffic light, …)" in data.notes[0]
    )


@pytest.mark.parametrize("used", [(1, 2), (1,), (0, 1, 2)])
def test_roboflows_group_of_all_classes_is_no_class_unless_it_has_boxes(coco_file, used):
    listed = [("things", "none"), ("red", "things"), ("blue", "things")]
    categories = [{"id": i, "name": name, "supercategory": group} for i, (name, group) in enumerate(listed)]
    data = load_coco(*coco_file([annotation(category_id=i) for i in used], parts={"categories": categories}))
    assert data.category_ids == ((0, 1, 2) if 0 in used else (1, 2)) and data.notes == ()
    assert [data.category_ids[label] for label in data.labels] == list(used)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
def test_images_outside_their_folder_are_left_out(coco_file, name):
    good = {"id": 11, "file_name": "a.png", "width": 100, "height": 60}
    data = load_coco(*coco_file([], parts={"images": [good, good | {"id": 2, "file_name": name}]}))
    assert len(data) == 1 and "lead out of their folder" in data.notes[0]


def test_missing_sizes_are_read_and_file_names_found_in_either_form_of_accents(coco_file):
    entries = [
        {"id": 1, "file_name": "b.png"},
        {"id": 2, "file_name": "e\u0301.png", "width": 0},
        {"id": 3, "file_name": "gone"},
    ]
    path, images = coco_file([], parts={"images": entries})
    Image.new("RGB", (30, 20)).save(images / "\u00e9.png")
    data = load_coco(path, images)
    assert [(image.width, image.height) for image in data.images] == [(40, 80), (30, 20)]
    assert data.images[1].open().size == (30, 20)
    assert data.notes == ("left out 1 images that are not in the images' folder (gone)",)


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


def test_polygons_do_not_fill_the_memory(coco_file):
    """3,000 boxes with long polygons: reading them takes little more memory than the file is long."""
    polygon = [[float(j) for j in range(400)]]
    path, images = coco_file(
        [annotation(id=i + 1, bbox=[i / 40, 20, 9, 30], segmentation=polygon) for i in range(3000)]
    )
    tracemalloc.start()
    data = load_coco(path, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.labels) == 3000 and peak < 2.5 * path.stat().st_size


SIZE = np.array([640, 480])


def table_of(boxes, given=""):
    """The table of boxes (A, 4) on one image, before its check."""
    rows = np.column_stack([np.full((len(boxes), 2), (0, 3)), boxes, np.zeros((len(boxes), 2))])
    images, objects = [(11, "a.png", 640, 480)], array("d", rows.ravel())
    return Table("some.json", Path(), {3: "cat"}, "xywh", given=given, images=images, objects=objects)


def scattered(count, seed=0):
    """Boxes (count, 4) xywh of all sizes anywhere on the image."""
    rng = np.random.default_rng(seed)
    sides = SIZE * rng.uniform(0.05, 0.95, (count, 2))
    return np.hstack([rng.uniform(0, 1, (count, 2)) * (SIZE - sides), sides])


WRONG = {
    "xyxy": (lambda xy, wh: np.hstack([xy, xy + wh]), "--box-format xyxy reads 400"),
    "cxcywh": (lambda xy, wh: np.hstack([xy + wh / 2, wh]), "--box-format cxcywh reads 400"),
    "fractions": (lambda xy, wh: np.hstack([xy, wh]) / np.tile(SIZE, 2), "like fractions"),
    "per cent": (lambda xy, wh: np.hstack([xy, wh]) / np.tile(SIZE, 2) * 100, "like fractions, per cent"),
    "thousandths": (lambda xy, wh: np.hstack([xy, wh]) / np.tile(SIZE, 2) * 1000, "nor as another layout"),
    "half the frame": (lambda xy, wh: np.hstack([xy, wh]) / 2, "pixels of smaller images"),
    "twice the frame": (lambda xy, wh: np.hstack([xy, wh]) * 2, "nor as another layout"),
    "x and y exchanged": (lambda xy, wh: np.hstack([xy[:, ::-1], wh[:, ::-1]]), "nor as another layout"),
}


@pytest.mark.parametrize("form", WRONG)
def test_boxes_in_another_form_are_refused_with_the_mend(form):
    write, message = WRONG[form]
    boxes = scattered(400)
    wrong = write(boxes[:, :2], boxes[:, 2:])
    with pytest.raises(InputError, match=message):
        table_of(wrong).check()
    if form in LAYOUTS:
        assert np.allclose(table_of(wrong, form).check().boxes, boxes)


@pytest.mark.parametrize("count", [1, 3, 10, 20, 50])
def test_right_boxes_are_never_refused(count):
    for seed in range(100):
        assert len(table_of(scattered(count, seed)).check().boxes) == count


def test_a_few_fractions_are_refused_and_a_given_format_is_trusted():
    with pytest.raises(InputError, match="write them in pixels"):
        table_of(scattered(3) / np.tile(SIZE, 2), "xywh").check()
    corners = np.array([[500, 50, 600, 90], [400, 10, 600, 400], [9, 300, 80, 400], [1, 1, 5, 5.0]])
    with pytest.raises(InputError, match=r"1 of 4 boxes lie inside .*; --box-format xyxy reads 4"):
        table_of(corners).check()
    camera = np.tile([1, 1, 300, 200.0], (30, 1)) + np.arange(30)[:, None]
    with pytest.raises(InputError, match="--box-format xywh: right as they are"):
        table_of(camera).check()
    assert (table_of(camera, "xywh").check().boxes == camera).all()
