"""Files of detections: what is understood, what is refused with the mend; names of classes and of models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import evaluated, truth_as_detections

from common.console import InputError
from common.evaluate.detections import ModelRun, coco_detections, detection_table, label_map, read_detections
from common.evaluate.evaluation import evaluate, unique_names


@pytest.fixture
def rows(demo_val):
    """Perfect detections of the six images with ids alone; scores from 0.5 to 1."""
    rows = coco_detections(detection_table(truth_as_detections(demo_val), demo_val), demo_val, [""] * 6)
    rows = [{key: row[key] for key in ("image_id", "category_id", "bbox")} for row in rows]
    return [row | {"score": 1 - 0.5 * n / len(rows)} for n, row in enumerate(rows)]


CUT = ("its lowest score is 0.53: AP and AR are those of a list that was cut there",)  # of `rows`


@pytest.fixture
def read(tmp_path, demo_val):
    def write_and_read(rows, data=demo_val):
        path = tmp_path / "theirs.json"
        path.write_text(json.dumps(rows))
        return read_detections(str(path), data)

    return write_and_read


def ap(run, data):
    return evaluated(run.table, data).record.detection.AP


NUMBERED = [f"{n}.jpg" for n in (1, 10, 11, 12, 2, 3)]
FOLDERS = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg"]
KINDS = {  # file names of the data set, what the rows say of an image, and words of the refusal
    "file_name beside another id": (NUMBERED, lambda i, p: {"image_id": 70 - i, "file_name": str(p.path)}, ""),
    "file_name of another machine": (NUMBERED, lambda i, p: {"file_name": "d:\\x\\" + str(p.path)}, ""),
    "file_name in folders": (FOLDERS, lambda i, p: {"file_name": str(p.path)}, ""),
    "ids as floats": (NUMBERED, lambda i, p: {"image_id": float(p.id)}, ""),
    "floats beyond 2^53": (NUMBERED, lambda i, p: {"image_id": float(2**60 + i)}, "0: image_id must be a whole number"),
    "text as ids": (NUMBERED, lambda i, p: {"image_id": p.path.name}, "image_id must be a whole number, not 1.jpg"),
    "ids of another list": (NUMBERED, lambda i, p: {"image_id": 5000 + i}, r"only .* of 6 \(5000, .* or file_name of"),
    "names of other images": (NUMBERED, lambda i, p: {"file_name": f"x{i}.jpg"}, r"only .* of 6 \(x0.jpg"),
    "nothing": (NUMBERED, lambda i, p: {}, "image_id is missing; or give every row a file_name"),
    "one name for two ids": (NUMBERED, lambda i, p: {"image_id": p.id, "file_name": "1.jpg"}, "1 and 2 share the file"),
    "names that several folders have": (FOLDERS, lambda i, p: {"file_name": p.path.name}, r"only .* of 3 \(1.jpg"),
}


@pytest.mark.parametrize(("names", "change", "words"), KINDS.values(), ids=KINDS)
def test_images_are_found_by_name_or_id_or_refused(demo_val, rows, read, names, change, words):
    images = [replace(image, path=Path(name)) for image, name in zip(demo_val.images, names, strict=True)]
    fields = {image.id: change(index, image) for index, image in enumerate(images)}
    rows = [{k: v for k, v in row.items() if k != "image_id"} | fields[row["image_id"]] for row in rows]
    data = replace(demo_val, images=tuple(images))
    if words:
        with pytest.raises(InputError, match=words):
            read(rows, data)
    else:
        run = read(rows, data)
        assert ap(run, data) == pytest.approx(1) and run.warnings == CUT


def test_what_is_left_out_or_doubtful_is_counted(demo_val, rows, read):
    few = demo_val.select(np.arange(2))
    run = read(rows, few)
    assert ap(run, few) == pytest.approx(1)
    assert run.warnings[0].startswith(f"{len(rows) - len(few.boxes)} detections of 4 (3, 4, 5, …) images that ")
    first = [row for row in rows if row["image_id"] == 1]
    assert read(first).warnings[0] == "5 of the 6 images with objects have no detections"
    assert read([]).warnings == ("6 of the 6 images with objects have no detections",)
    some = [row | {"category_id": 77} if n < 3 else row for n, row in enumerate(rows)]
    assert read(some).warnings[0].startswith("3 detections of 1 (77) categories that ")
    with pytest.raises(InputError, match=r"only .* \(77\) categories .*it has 1 disc, .* give the data's"):
        read(some[:3])
    with pytest.raises(InputError, match=r"only .* images .*: give each detection the file_name of the data"):
        read(rows, replace(demo_val, own_ids=False))  # positions in a list that another program cannot know
    assert read(rows).warnings == CUT and read([*rows, rows[0] | {"score": 0.06}]).warnings == ()


def test_categories_by_name(demo_val, rows, read):
    names = dict(zip(demo_val.category_ids, demo_val.class_names, strict=True))
    named = [row | {"category_name": names[row["category_id"]].upper()} for row in rows]
    without_ids = [{key: value for key, value in row.items() if key != "category_id"} for row in named]
    assert ap(read(named), demo_val) == ap(read(without_ids), demo_val) == pytest.approx(1)


WRONG = [  # fields of a row that are changed, and words of the refusal
    ({"score": 70}, r"9: score must be a probability in 0..1 \(divide per cent by 100.* not 70"),
    ({"score": -0.7}, "take the sigmoid or softmax of logits.*, not -0.7"),
    ({"score": 10**400}, "9: score must be a prob"),
    ({"score": True}, "not True"),
    ({"score": None}, "not None"),
    ({"bbox": [1, 1, -3, 2]}, r"9: bbox must be x, y, width, height .* \(for corners: x1, .*, not .1, 1, -3"),
    ({"bbox": [1, 1, float("nan"), 2]}, "9: bbox must be .*nan"),
    ({"bbox": None}, "not None"),
    ({"bbox": []}, r"9: bbox must be x, y, width, .* not \[\]"),
    ({"bbox": [1, 2, 3, 4, 5]}, "1, 2, 3, 4, 5"),
    ({"bbox": [True, 1, 2, 3]}, "not .True"),
    ({"bbox": ["1", 1, 2, 3]}, "not .'1'"),
    ({"image_id": 1.5}, "9: image_id must be a whole number, not 1.5"),
    ({"category_id": {}}, "9: category_id must be a whole number"),
    ({"category_id": None}, "9: category_id is missing; or give every row a category_name"),
    ({"category_name": "cube"}, r"category_id \d+ and category_name cube, which differ in .*: leave out"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_numbers_that_mean_something_else_are_refused_in_one_short_line(rows, read, change, words):
    rows[9] |= change
    with pytest.raises(InputError, match=words) as caught:
        read(rows)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG" + bytes(range(256)) * 200, b"[" * 100_000, b'"x"', b'{"a": 1}', b"[3]", b"[{}]", None]
)
def test_other_files_are_refused_in_one_short_line(demo_val, tmp_path, content):
    if content is not None:
        (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_detections(str(tmp_path / "d.json"), demo_val)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_class_names_are_matched_without_case_and_spaces_where_unique(demo_val):
    names = ("Person", "traffic light", "cat", "CAT", "dog", "Fire-Hydrant", "cafe\u0301")
    data = replace(demo_val, class_names=("person", "traffic_light", "Cat", "Dog", "DOG", "fire hydrant", "caf\u00e9"))
    assert label_map(names, data).tolist() == [0, 1, -1, -1, -1, 5, 6]
    data = replace(demo_val, class_names=("airplane", "couch", "tv", "TV"))
    assert label_map(("aeroplane", "Sofa", "tvmonitor"), data).tolist() == [0, 1, -1]  # Pascal VOC's and COCO's
    run = ModelRun(detection_table(truth_as_detections(demo_val), demo_val), demo_val.class_names)
    capitals = tuple(name.upper() for name in demo_val.class_names)
    record = evaluate("a", "a.pt", replace(run, class_names=capitals), demo_val).record
    assert pytest.approx(1) == record.detection.AP and record.warnings[0].startswith("10 classes were matched")
    record = evaluate("a", "a.pt", replace(run, class_names=(*demo_val.class_names[:9], "y")), demo_val).record
    assert record.warnings[0].startswith("the model lacks 1 of the 10 classes")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["det.pth", "det.json"], ["det", "det-2"]),
        (["a/x.json", "b/x.json", "x-2.json"], ["x", "x-2", "x-2-2"]),
        (["best.pt", "Best.pt"], ["best", "Best-2"]),
        (["cafe\u0301.pt", "caf\u00e9.pt"], ["cafe\u0301", "caf\u00e9-2"]),
        (["a/./m.pt", "b.pt", "."], ["m", "b", "evaluate"]),
        (["x" * 250 + ".pt", "x" * 250 + ".onnx"], ["x" * 200, "x" * 200 + "-2"]),
    ],
)
def test_names_of_models_differ_on_every_file_system(paths, names, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    assert unique_names(paths) == names
