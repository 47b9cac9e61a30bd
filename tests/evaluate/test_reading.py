"""Files of detections whose image ids, categories, scores or boxes are not those of the data set; names of models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import numbers_of_table, truth_as_detections

from common.console import InputError
from common.data.memory import ImageFile
from common.evaluate.detections import ModelRun, coco_detections, detection_table, label_map, read_detections
from common.evaluate.evaluation import evaluate, unique_names


@pytest.fixture
def rows(demo_val):
    """Perfect detections of the six images as the entries of a file; scores from 0.5 to 1."""
    entries = plain_rows(demo_val)
    return [entry | {"score": 1 - 0.5 * n / len(entries)} for n, entry in enumerate(entries)]


def plain_rows(data):
    """Perfect detections with ids alone."""
    entries = coco_detections(detection_table(truth_as_detections(data), data), data, [""] * len(data))
    return [{key: entry[key] for key in ("image_id", "category_id", "bbox", "score")} for entry in entries]


CUT = ("its lowest score is 0.53: AP and AR are those of a list that was cut there",)  # of `rows`


@pytest.fixture
def read(tmp_path):
    def write_and_read(rows, data):
        path = tmp_path / "theirs.json"
        path.write_text(json.dumps(rows))
        return read_detections(str(path), data)

    return write_and_read


def renamed(data, names, ids=None):
    """The data set with other file names, and other image ids."""
    ids = ids or [image.id for image in data.images]
    images = (ImageFile(i, Path(n), p.width, p.height) for i, n, p in zip(ids, names, data.images, strict=True))
    return replace(data, images=tuple(images))


def ap(predictions, data):
    return numbers_of_table(predictions.table, data)["AP"]


def with_ids(rows, data, change):
    """The entries with `change(index, image)` in place of the fields of their image."""
    fields = {image.id: change(index, image) for index, image in enumerate(data.images)}
    rest = [{key: value for key, value in row.items() if key != "image_id"} for row in rows]
    return [entry | fields[row["image_id"]] for entry, row in zip(rest, rows, strict=True)]


NUMBERED = [f"{n}.jpg" for n in (1, 10, 11, 12, 2, 3)]
FOLDERS = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg"]
UNDERSTOOD = {  # file names of the data set, and what the entries say of an image
    "file_name beside another id": (NUMBERED, lambda i, p: {"image_id": int(p.path.stem), "file_name": str(p.path)}),
    "file_name of another machine": (NUMBERED, lambda i, p: {"file_name": "d:\\x\\" + str(p.path)}),
    "file_name in folders": (FOLDERS, lambda i, p: {"file_name": str(p.path)}),
    "equal file names in two folders, and ids": (FOLDERS, lambda i, p: {"image_id": p.id, "file_name": p.path.name}),
    "ids as text": (NUMBERED, lambda i, p: {"image_id": str(p.id)}),
    "ids as floats": (NUMBERED, lambda i, p: {"image_id": float(p.id)}),
}
REFUSED = {  # likewise, and words of the refusal
    "stems as ids": (list("abcdef"), lambda i, p: {"image_id": p.path.stem}, "not a whole number; or .* file_name"),
    "file names as ids": (NUMBERED, lambda i, p: {"image_id": p.path.name}, "not a whole number; or .* file_name"),
    "ids of another list": (
        NUMBERED,
        lambda i, p: {"image_id": 5000 + i},
        r"0 of the 6 images and on 6 others .* file_n",
    ),
    "names of other images": (NUMBERED, lambda i, p: {"file_name": f"x{i}.jpg"}, "image_id is missing"),
    "nothing": (NUMBERED, lambda i, p: {}, "image_id is missing; or give every row a file_name"),
    "one name for two ids": (
        NUMBERED,
        lambda i, p: {"image_id": p.id, "file_name": "1.jpg"},
        "1 and 2 share the file_name",
    ),
    "names that several folders have": (FOLDERS, lambda i, p: {"file_name": p.path.name}, "image_id is missing"),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_images_are_found_by_name_or_id(demo_val, rows, read, kind):
    names, change = UNDERSTOOD[kind]
    data = renamed(demo_val, names)
    run = read(with_ids(rows, data, change), data)
    assert ap(run, data) == pytest.approx(1) and run.warnings == CUT


@pytest.mark.parametrize("kind", REFUSED)
def test_other_names_of_images_are_refused(demo_val, rows, read, kind):
    names, change, words = REFUSED[kind]
    data = renamed(demo_val, names)
    with pytest.raises(InputError, match=words):
        read(with_ids(rows, data, change), data)


def test_ids_beyond_2_53_are_exact(demo_val, rows, read):
    data = renamed(demo_val, list("abcdef"), ids=[2**60 + n for n in range(6)])
    predictions = read(with_ids(rows, demo_val, lambda i, p: {"image_id": 2**60 + i}), data)
    assert ap(predictions, data) == pytest.approx(1) and predictions.warnings == CUT
    with pytest.raises(InputError, match="not a whole number"):
        read(with_ids(rows, demo_val, lambda i, p: {"image_id": float(2**60 + i)}), data)


def test_images_beyond_the_evaluated_ones_are_left_out_with_their_number(demo_val, rows, read):
    few = demo_val.first(2)
    predictions = read(rows, few)
    beyond = len(rows) - len(few.boxes)
    assert ap(predictions, few) == pytest.approx(1)
    assert f"{beyond} detections on 4 images beyond the 2 evaluated (3, 4, 5, …)" in predictions.warnings[0]
    assert predictions.conditions["detections_on_other_images"] == beyond


def test_images_without_detections_are_counted(demo_val, rows, read):
    first = [row for row in rows if row["image_id"] == 1]
    assert read(first, demo_val).warnings[0] == "5 of the 6 images with objects have no detections"
    assert read([], demo_val).warnings == ("6 of the 6 images with objects have no detections",)


def test_unknown_categories_are_counted_and_refused_where_all_are(demo_val, rows, read):
    some = [row | {"category_id": 77} if n < 3 else row for n, row in enumerate(rows)]
    predictions = read(some, demo_val)
    assert "3 detections of 1 unknown categories were left out: the file has 77" in predictions.warnings[0]
    with pytest.raises(InputError, match=r"no detection has a category .* the file has 77, .* 1 disc"):
        read([row | {"category_id": 77} for row in rows], demo_val)


def test_categories_by_name(demo_val, rows, read):
    names = dict(zip(demo_val.category_ids, demo_val.class_names, strict=True))
    named = [row | {"category_name": names[row["category_id"]].upper()} for row in rows]
    without_ids = [{key: value for key, value in row.items() if key != "category_id"} for row in named]
    assert ap(read(named, demo_val), demo_val) == ap(read(without_ids, demo_val), demo_val) == pytest.approx(1)
    with pytest.raises(InputError, match=r"category_id \d+ and category_name .* differ in .*: leave out the one"):
        read([row | {"category_id": row["category_id"] % 10 + 1} for row in named], demo_val)
    with pytest.raises(InputError, match=r"category_id is .*, not a whole number; or give every row a category_name"):
        read([row | {"category_id": names[row["category_id"]]} for row in rows], demo_val)


def test_lists_that_were_cut_at_a_score_are_named(demo_val, rows, read):
    assert "its lowest score is 0.53" in read(rows, demo_val).warnings[-1]
    assert read([*rows, rows[0] | {"score": 0.01}], demo_val).warnings == ()


def coco_classes(demo_val):
    """The data set with 80 classes, whose ids have COCO's gaps and run to 90."""
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = tuple(number for number in range(1, 91) if number not in gaps)
    labels = np.arange(len(demo_val.labels)) * 7 % 80
    return replace(demo_val, category_ids=ids, class_names=tuple(f"c{i}" for i in ids), labels=labels)


@pytest.mark.parametrize("start", [0, 1])
def test_80_classes_in_order_are_warned_of(demo_val, read, start):
    data = coco_classes(demo_val)
    predictions = read(plain_rows(replace(data, category_ids=tuple(range(start, start + 80)))), data)
    record = evaluate("theirs", "theirs.json", predictions, data, np.ones((6, 4), np.float32)).record
    assert "are these counted to 80" in record.warnings[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: {"score": 100 * row["score"]}, "divide per cent by 100"),
        (lambda row: {"score": row["score"] - 0.7}, "range from -0.168"),
        (lambda row: {"score": 1e6 * row["score"]}, "must be probabilities in 0..1"),
        (lambda row: {"bbox": [*row["bbox"][:2], *np.subtract(row["bbox"][2:], row["bbox"][:2])]}, "negative width"),
        (lambda row: {"bbox": None}, "does not hold detections"),
        (lambda row: {"bbox": "1234"}, "does not hold"),
        (lambda row: {"bbox": []}, "row 0 has bbox .. and score"),
        (lambda row: {"bbox": [*row["bbox"], 1]}, "not four numbers and one"),
        (lambda row: {"score": True}, "row 0 has .* score True"),
        (lambda row: {"bbox": [True, 1, 2, 3]}, "not four numbers and one"),
        (lambda row: {"image_id": [1]}, "not a whole number"),
        (lambda row: {"image_id": 1.5}, "not a whole number"),
        (lambda row: {"image_id": True}, "not a whole number"),
        (lambda row: {"category_id": {}}, "category_id"),
    ],
)
def test_numbers_that_mean_something_else_are_refused_in_one_short_line(demo_val, rows, read, change, words):
    with pytest.raises(InputError, match=words) as caught:
        read([row | change(row) for row in rows], demo_val)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG" + bytes(range(256)) * 200, b"[" * 100_000, b'"x"', b"[" + b"9" * 5000]
)
def test_other_files_are_refused_in_one_short_line(demo_val, tmp_path, content):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_detections(str(tmp_path / "d.json"), demo_val)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_class_names_are_matched_without_case_and_spaces_where_unique(demo_val):
    names = ("Person", "traffic light", "cat", "CAT", "dog", "Fire-Hydrant", "x")
    data = replace(demo_val, class_names=("person", "traffic_light", "Cat", "Dog", "DOG", "fire hydrant", *"abcd"))
    assert label_map(names, data).tolist() == [0, 1, -1, -1, -1, 5, -1]
    data = replace(demo_val, class_names=tuple(name.upper() for name in demo_val.class_names))
    predictions = ModelRun(detection_table(truth_as_detections(demo_val), demo_val), demo_val.class_names)
    record = evaluate("a", "a.pt", predictions, data).record
    assert pytest.approx(1) == record.detection.AP and record.warnings[0].startswith("10 classes were matched")
    record = evaluate("a", "a.pt", replace(predictions, class_names=(*demo_val.class_names[:9], "y")), demo_val).record
    assert record.warnings[0].startswith("the model lacks 1 of the 10 classes")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["det.pth", "det.json"], ["det", "det.json"]),
        (["a/x.json", "b/x.json", "x-2.json"], ["x", "x.json", "x-2"]),
        (["best.pt", "Best.pt"], ["best", "Best.pt"]),
        (["cafe\u0301.pt", "caf\u00e9.pt"], ["cafe\u0301", "caf\u00e9.pt"]),
        (["x" * 250 + ".pt", "x" * 250 + ".onnx"], None),
        (["a/./m.pt", "b.pt"], ["m", "b"]),
    ],
)
def test_names_of_models_differ_on_every_file_system(paths, names):
    given = unique_names(paths)
    assert len({name.casefold() for name in given}) == len(paths) and all(len(name) < 240 for name in given)
    assert names is None or given == names


def test_a_folder_gives_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert unique_names([".", "model.pth"]) == ["here", "model"]
