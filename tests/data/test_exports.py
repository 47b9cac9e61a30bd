"""Exports of labelling tools are read as they write them; other files of theirs are refused with the export to take."""

import json

import pytest
from helpers import data_flags, random_image

from common.console import InputError
from common.data.sources import load_split

LINE = "0 0.5 0.5 0.2 0.4"  # of the class red: 40, 15, 20, 20 of 100 x 50 pixels
VOC = "<annotation><source><database>Unknown</database></source><object><name>red</name><bndbox><xmin>40</xmin>"
VOC += "<ymin>15</ymin><xmax>60</xmax><ymax>35</ymax></bndbox></object></annotation>"
RED = [{"id": 1, "name": "red"}]
PROJECT = [{"id": 0, "name": "things", "supercategory": "none"}, RED[0] | {"supercategory": "none"}]


def coco(name, other, categories=RED):
    images = [{"id": i, "file_name": file, "width": 100, "height": 50} for i, file in enumerate((name, other))]
    boxes = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [40, 15, 20, 20]}]
    return json.dumps({"images": images, "categories": categories, "annotations": boxes})


NOTES = json.dumps({"categories": [{"id": "1", "name": "blue"}, {"id": 0, "name": "red"}]})
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [red]"
EXPORTS = {  # the files of each, None for an image; the image a has a box
    "Label Studio's YOLO": {
        **{"classes.txt": "blue\nred", "notes.json": NOTES, "labels/0123abcd-a.txt": LINE, "labels/0123abcd-b.txt": ""},
        **dict.fromkeys(("images/0123abcd-a.png", "images/0123abcd-b.png")),
    },
    "Label Studio's COCO": {
        "result.json": coco("images/0123abcd__a.png", "images/0123abcd__b.png"),
        **dict.fromkeys(("images/0123abcd__a.png", "images/0123abcd__b.png")),
    },
    "Label Studio's COCO of uploads": {
        "result.json": coco("../../media/upload/1/a.png", "..\\..\\upload\\b.png"),
        **dict.fromkeys(("images/a.png", "images/b.png")),
    },
    "Label Studio's VOC": {"Annotations/a.xml": VOC, "images/a.png": None, "images/b.png": None},
    "CVAT's COCO": {
        "annotations/instances_default.json": coco("day 1/a.png", "day 2/a b.png"),
        **dict.fromkeys(("images/default/day 1/a.png", "images/default/day 2/a b.png")),
    },
    "CVAT's COCO of a subset": {
        "annotations/instances_Mine.json": coco("a.png", "b.png"),
        **dict.fromkeys(("images/Mine/a.png", "images/Mine/b.png")),
    },
    "CVAT's Ultralytics YOLO": {
        **{"data.yaml": "names: {0: red}\npath: .\ntrain: train.txt", "labels/train/a.txt": f"{LINE} 17"},  # a track
        "train.txt": "data/images/train/a.png\ndata/images/train/b.png",
        **dict.fromkeys(("images/train/a.png", "images/train/b.png")),
    },
    "CVAT's YOLO 1.1": {
        **{"obj.names": "red", "obj.data": "classes = 1", "train.txt": "data/obj_train_data/a.png"},
        **{"obj_train_data/a.txt": LINE, "obj_train_data/a.png": None, "obj_train_data/b.png": None},
    },
    "CVAT's VOC": {
        **{"Annotations/s/a.xml": VOC, "ImageSets/Main/default.txt": "s/a\ns/b", "ImageSets/Action/default.txt": "s/a"},
        **dict.fromkeys(("JPEGImages/s/a.png", "JPEGImages/s/b.png")),
    },
    "labelImg's VOC": {"a.xml": VOC, "a.png": None, "b.png": None},
    "labelImg's YOLO": {"classes.txt": "red", "a.txt": LINE, "a.png": None, "b.png": None},
    "Roboflow's COCO": {
        "train/_annotations.coco.json": coco("a_png.rf.0f.png", "b.png", PROJECT),
        **dict.fromkeys(("train/a_png.rf.0f.png", "train/b.png")),
    },
    "Roboflow's YOLO": {
        **{"data.yaml": ROBOFLOW, "train/labels/a.txt": LINE, "train/labels/b.txt": ""},
        **dict.fromkeys(("train/images/a.png", "train/images/b.png")),
    },
    "Roboflow's VOC": {"train/a.xml": VOC, "train/a.png": None, "train/b.png": None},
}


def write(root, files):
    for number, (name, content) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            random_image(100, 50, number).save(root / name)
        else:
            (root / name).write_text(content)
    return root


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_are_read_with_all_their_images_and_boxes(tmp_path, export):
    write(tmp_path, EXPORTS[export])
    parts = [load_split(data_flags(tmp_path), split) for split in ("train", "val")]
    images = sorted(image.path.relative_to(tmp_path).as_posix() for part in parts for image in part.images)
    assert images == sorted(name for name, content in EXPORTS[export].items() if content is None)
    (part,) = (part for part in parts if len(part.labels))
    assert part.boxes.round(6).tolist() == [[40, 15, 20, 20]] and [
        image.path.stem.count("a") > 0 for image in part.images
    ]
    assert part.class_names[part.labels[0]] == "red" and "things" not in part.class_names


def test_parts_of_a_project_are_found_in_any_case(tmp_path):
    parts = {"Train": ("a.png", "b.png"), "VALIDATION": ("c.png", "d.png")}
    files = {f"annotations/instances_{part}.json": coco(*names) for part, names in parts.items()}
    write(tmp_path, files | {f"images/{part}/{name}": None for part, names in parts.items() for name in names})
    found = [load_split(data_flags(tmp_path, strict=True), split).images for split in ("train", "val")]
    assert [[image.path.name for image in images] for images in found] == [["a.png", "b.png"], ["c.png", "d.png"]]


REFUSED = {
    r"Label Studio's own JSON: export YOLO, COCO": {"project-1.json": '[{"id": 1}]', "images/a.png": None},
    r"labelme's files: export COCO or": {
        "day/a.json": '{"version": "5", "flags": {}, "shapes": []}',
        "day/a.png": None,
    },
    r"CVAT's own XML: export COCO": {"annotations.xml": "<annotations/>", "images/a.png": None},
    r"Datumaro's JSON: export COCO": {"annotations/default.json": '{"info": {}, "categories": {"label": {}}}'},
    r"a table of boxes: export COCO": {"_annotations.csv": "filename", "a.png": None},
    r"has classes\.txt and obj\.names: rename or": EXPORTS["labelImg's YOLO"] | {"obj.names": "blue"},
    r"is COCO and YOLO with a list of classes: ": EXPORTS["labelImg's YOLO"] | EXPORTS["Label Studio's COCO"],
    r"is YOLO and YOLO with a list of classes: ": EXPORTS["Roboflow's YOLO"] | {"classes.txt": "blue"},
    r"no train split: it has default, result$": EXPORTS["CVAT's COCO"] | {"result.json": coco("a.png", "b.png")},
    r"may be predictions": EXPORTS["labelImg's YOLO"] | {"a.txt": f"{LINE} 0.9"},
    r"lacks 'name'": EXPORTS["Label Studio's YOLO"] | {"notes.json": '{"categories": [{"id": 1}]}'},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_files_of_the_tools_and_two_candidates_are_refused_in_a_line(tmp_path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_split(data_flags(write(tmp_path, REFUSED[message])), "train")
    assert "\n" not in str(caught.value)
