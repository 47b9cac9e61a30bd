"""What is wrong with annotations is counted, left out or refused; boxes in another form than documented are refused."""

import copy
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import annotation, load_coco
from PIL import Image

from common.console import InputError
from common.data.table import LAYOUTS, Table

NO_NUMBERS, NO_AREA = "boxes that are not four finite numbers (a.png)", "boxes without area (a.png)"
LEFT_OUT = [
    ({"bbox": None}, NO_NUMBERS),
    ({"bbox": [1, 2, 3]}, NO_NUMBERS),
    ({"bbox": ["1", "2", "3", "4"]}, NO_NUMBERS),
    ({"bbox": [1, 2, float("inf"), 9]}, NO_NUMBERS),
    ({"bbox": [1, 2, 0, 9]}, NO_AREA),
    ({"bbox": [1, 20, 5, -9]}, NO_AREA),
    ({"bbox": [100, 2, 5, 9]}, "boxes that lie outside their image (a.png)"),
    ({"bbox": [10, -9, 5, 9]}, "boxes that lie outside their image (a.png)"),
    ({"bbox": [0.1, 0.5, 0.9, 0.3]}, "boxes that end within 2 pixels of a corner, like fractions (a.png)"),
    ({"image_id": 99}, "boxes of images that are not used"),
    ({"category_id": 99}, "boxes of a class that is not listed (a.png)"),
]
REFUSED = [
    ({"images": None}, "NoneType"),
    ({"images": []}, "no image can be used: none is listed"),
    ({"categories": []}, "lists no classes"),
    ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, "it lacks 'category_id'"),
    ({"annotations": [annotation(image_id="11")]}, "'11' is not a whole number"),
    ({"annotations": [annotation(iscrowd="no")]}, "'no'"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "share an id"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": " a"}]}, "are called a: list"),
    ({"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, r"\(gone.png\)"),
    ({"images": [{"id": 1, "file_name": f"{n}.png"} for n in "ab"]}, "two images have the id 1"),
    (
        {"images": [{"id": i, "file_name": name} for i, name in enumerate(("a.png", "./a.png"))]},
        "listed twice: .*a.png",
    ),
    ({"annotations": [annotation(category_id=i) for i in (2, 3)]}, "classes 2 to 3, the list 3 to 7: number both"),
    ({"annotations": [annotation(category_id=i) for i in (7, 8)]}, "classes 7 to 8, the list 3 to 7: number both"),
]


@pytest.mark.parametrize(("bad", "note"), LEFT_OUT)
def test_boxes_that_cannot_be_used_are_left_out_and_counted(coco_file, bad, note):
    data = load_coco(*coco_file([annotation(bbox=[1, 2, 3, 4]), annotation(**bad), annotation(category_id=7) | bad]))
    assert data.boxes.tolist() == [[1, 2, 3, 4]] and data.notes == (f"left out 2 {note}",)


@pytest.mark.parametrize(("parts", "message"), REFUSED)
def test_other_files_are_refused_in_one_line(coco_file, parts, message):
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


@pytest.mark.parametrize("shift", [0, 0.04, 0.5])
def test_boxes_beyond_the_edge_and_repeated_ones_are_kept_and_counted(coco_file, shift):
    """Repeated: of one class on one image, also where written with other digits; COCO counts each of them."""
    same = [annotation(), annotation(bbox=[10 + shift, 20, 30, 5 - shift])]
    changes = {"category_id": 7, "iscrowd": 1, "image_id": 5, "bbox": [90, 50, 30, 30]}
    other = [annotation(**{name: value}) for name, value in changes.items()]
    data = load_coco(*coco_file([*same, *other]))
    assert len(data.labels) == 6 and [90, 50, 30, 30] in data.boxes.tolist()
    assert data.notes[0] == "clipped 1 boxes at the edge of their image, for training (a.png)"
    assert data.notes[1].startswith("kept 1 boxes that repeat one of their class on their image")
    assert len(data.notes) == 2


def test_classes_that_differ_in_case_alone_are_noted_and_accents_in_any_form_are_one(coco_file):
    names = ("Red", "red", "traffic light", "a", "A", "cafe\u0301", "traffic_light", "traffic\u200b light")
    data = load_coco(*coco_file([], categories=enumerate(names)))
    assert data.class_names[5] == "caf\u00e9" and len(data.notes) == 1
    assert data.notes[0].startswith("5 classes differ from another in case")
    assert data.notes[0].endswith("(Red, red, traffic light, …)")


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
    names = enumerate(("b.png", "e\u0301.png", "gone"))
    path, images = coco_file([], parts={"images": [{"id": i, "file_name": name, "width": 0} for i, name in names]})
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
    whole, loaded = json.loads(path.read_text()), 0
    for *keys, last in list(places_in(whole)):
        for value in ABSURD:
            content = part = copy.deepcopy(whole)
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
    boxes = [annotation(bbox=[i / 40, 20, 9, 30], segmentation=polygon) for i in range(3000)]
    path, images = coco_file(boxes)
    tracemalloc.start()
    data = load_coco(path, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.labels) == 3000 and peak < 2.5 * path.stat().st_size


SIZE = np.array([640, 480])


def checked(boxes, given=""):
    """The boxes of a table with boxes (A, 4) on one image, after its check."""
    table = Table("some.json", Path(), {3: "cat"}, "xywh", given=given)
    table.add_image(11, "a.png", (640, 480))
    for box in np.asarray(boxes, float).tolist():
        table.add(11, 3, box)
    return table.check().boxes


def scattered(count, seed=0):
    """Boxes (count, 4) xywh of all sizes anywhere on the image."""
    rng = np.random.default_rng(seed)
    sides = SIZE * rng.uniform(0.05, 0.95, (count, 2))
    return np.hstack([rng.uniform(0, 1, (count, 2)) * (SIZE - sides), sides])


WRONG = {
    "xyxy": (lambda xy, wh: [xy, xy + wh], "--box-format xyxy reads 400"),
    "cxcywh": (lambda xy, wh: [xy + wh / 2, wh], "--box-format cxcywh reads 400"),
    "fractions": (lambda xy, wh: [xy / SIZE, wh / SIZE], "like fractions"),
    "per cent": (lambda xy, wh: [xy / SIZE * 100, wh / SIZE * 100], "like fractions, per cent"),
    "thousandths": (lambda xy, wh: [xy / SIZE * 1000, wh / SIZE * 1000], "nor as another layout"),
    "half the frame": (lambda xy, wh: [xy / 2, wh / 2], "pixels of smaller images"),
    "twice the frame": (lambda xy, wh: [xy * 2, wh * 2], "nor as another layout"),
    "x and y exchanged": (lambda xy, wh: [xy[:, ::-1], wh[:, ::-1]], "nor as another layout"),
}


@pytest.mark.parametrize("form", WRONG)
def test_boxes_in_another_form_are_refused_with_the_mend(form):
    write, message = WRONG[form]
    boxes = scattered(400)
    wrong = np.hstack(write(boxes[:, :2], boxes[:, 2:]))
    with pytest.raises(InputError, match=message):
        checked(wrong)
    if form in LAYOUTS:
        assert np.allclose(checked(wrong, form), boxes)


@pytest.mark.parametrize("count", [1, 3, 10, 20, 50])
def test_right_boxes_are_never_refused(count):
    assert all(len(checked(scattered(count, seed))) == count for seed in range(100))


def test_a_few_fractions_are_refused_and_a_given_format_is_trusted():
    with pytest.raises(InputError, match="write them in pixels"):
        checked(scattered(3) / np.tile(SIZE, 2), "xywh")
    with pytest.raises(InputError, match=r"1 of 4 boxes lie inside .*; --box-format xyxy reads 4"):
        checked([[500, 50, 600, 90], [400, 10, 600, 400], [9, 300, 80, 400], [1, 1, 5, 5]])
    camera = np.tile([1, 1, 300, 200], (30, 1)) + np.arange(30)[:, None]
    with pytest.raises(InputError, match="--box-format xywh: right as they are"):
        checked(camera)
    assert (checked(camera, "xywh") == camera).all()
