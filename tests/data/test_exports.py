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


def coco(name, categories=RED):
    images = [{"id": i, "file_name": name.format("ab"[i]), "width": 100, "height": 50} for i in range(2)]
    boxes = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [40, 15, 20, 20]}]
    return json.dumps({"images": images, "categories": categories, "annotations": boxes})


PNG = coco("{}.png")
NOTES = json.dumps({"categories": [{"id": "1", "name": "blue"}, {"id": 0, "name": "red"}]})
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [red]"
EXPORTS = {  # where the images a and b are, of which a has a box, and the other files
    "Label Studio's YOLO": ("images/0123abcd-{}.png", {"classes.txt": "blue\nred", "notes.json": NOTES,
                                                       "labels/0123abcd-a.txt": LINE, "labels/0123abcd-b.txt": ""}),
    "Label Studio's COCO": ("images/0123abcd__{}.png", {"result.json": coco("images/0123abcd__{}.png")}),
    "its COCO of uploads": ("images/{}.png", {"result.json": coco("../../media/upload/1/{}.png")}),
    "its COCO of uploads to Windows": ("images/{}.png", {"result.json": coco("..\\upload\\{}.png")}),
    "COCO of another name, from Windows": ("images/{}.png", {"annotations/annotations.json": coco(r"images\\{}.png")}),
    "YOLO with composed accents and a number without a class": ("images/e\u0301 ({}).png", {
        "obj.names": "blue\n\nred\n", "labels/\u00e9 (a).txt": f"2{LINE[1:]}"}),
    "Label Studio's VOC": ("images/{}.png", {"Annotations/a.xml": VOC}),
    "CVAT's COCO": ("images/default/day 1/{}.png", {"annotations/instances_default.json": coco("day 1/{}.png")}),
    "CVAT's COCO of a subset": ("images/Mine/{}.png", {"annotations/instances_Mine.json": PNG}),
    "CVAT's Ultralytics YOLO": ("images/train/{}.png", {  # with a track
        "data.yaml": "names: {0: red}\npath: .\ntrain: train.txt", "labels/train/a.txt": f"{LINE} 17",
        "train.txt": "data/images/train/a.png\ndata/images/train/b.png"}),
    "CVAT's YOLO 1.1": ("obj_train_data/{}.png", {"obj.names": "red", "obj_train_data/a.txt": LINE,
                                                  "train.txt": "data/obj_train_data/a.png"}),
    "CVAT's VOC with accents": ("JPEGImages/e\u0301{}.png", {
        "Annotations/\u00e9a.xml": VOC, "ImageSets/Main/._default.txt": "",
        "ImageSets/Main/default.txt": "\u00e9a\n\u00e9b"}),
    "CVAT's VOC": ("JPEGImages/s/{}.png", {"Annotations/s/a.xml": VOC, "ImageSets/Main/default.txt": "s/a\ns/b",
                                           "ImageSets/Action/default.txt": "s/a"}),
    "labelImg's VOC": ("{}.png", {"a.xml": VOC}),
    "labelImg's VOC in subfolders, from macOS": ("day 1/{}.png", {"day 1/a.xml": VOC, "day 1/._a.xml": "\0"}),
    "labelImg's VOC in a folder": ("{}.png", {"annotations/a.xml": VOC}),
    "labelImg's YOLO": ("{}.png", {"classes.txt": "red", "a.txt": LINE}),
    "labelImg's YOLO in a folder": ("images/{}.png", {"labels/classes.txt": "red", "labels/a.txt": LINE}),
    "Roboflow's COCO": ("train/{}_png.rf.0f.png", {"train/_annotations.coco.json": coco("{}_png.rf.0f.png", PROJECT)}),
    "Roboflow's YOLO": ("train/images/{}.png", {"data.yaml": ROBOFLOW, "train/labels/a.txt": LINE}),
    "Roboflow's VOC": ("train/{}.png", {"train/a.xml": VOC}),
}  # fmt: skip


def write(root, images, files):
    for number, name in enumerate("ab"):
        (root / images.format(name)).parent.mkdir(parents=True, exist_ok=True)
        random_image(100, 50, number).save(root / images.format(name))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_are_read_with_all_their_images_and_boxes(tmp_path, export):
    images, files = EXPORTS[export]
    write(tmp_path, images, files)
    parts = [load_split(data_flags(tmp_path), split) for split in ("train", "val")]
    found = sorted(image.path.relative_to(tmp_path).as_posix() for part in parts for image in part.images)
    assert found == [images.format(name) for name in "ab"]
    (part,) = (part for part in parts if len(part.labels))
    assert part.boxes.round(6).tolist() == [[40, 15, 20, 20]] and "a" in part.images[0].path.stem.replace("abcd", "")
    assert part.class_names[part.labels[0]] == "red" and "things" not in part.class_names


def test_parts_of_a_project_are_found_in_any_case(tmp_path):
    for part in ("Train", "VALIDATION"):
        write(tmp_path, f"images/{part}/{part}{{}}.png", {f"annotations/instances_{part}.json": coco(part + "{}.png")})
    parts = [load_split(data_flags(tmp_path, strict=True), split) for split in ("train", "val")]
    names = [[image.path.stem for image in part.images] for part in parts]
    assert names == [["Traina", "Trainb"], ["VALIDATIONa", "VALIDATIONb"]]


LIST, ONE_FILE = EXPORTS["labelImg's YOLO"][1], EXPORTS["CVAT's COCO"][1]
REFUSED = {
    r"Label Studio's own JSON: export YOLO, COCO": {"project-1.json": '[{"id": 1, "data": {}}]'},
    r"CreateML's JSON: export YOLO, COCO": {"a.json": '[{"image": "a", "annotations": [{"coordinates": {}}]}]'},
    r"labelme's files: export COCO or": {"day/a.json": '{"version": "5", "flags": {}, "shapes": []}'},
    r"CVAT's own XML: export COCO": {"annotations.xml": "<annotations/>"},
    r"Datumaro's JSON: export COCO": {"annotations/default.json": '{"info": {}, "categories": {"label": {}}}'},
    r"a table of boxes: export COCO": {"_annotations.csv": "filename"},
    r"VIA's JSON: export COCO": {"via.json": '{"a.png123": {"filename": "a.png", "regions": []}}'},
    r"without classes: name those in classes\.txt": {"labels/a.txt": LINE},
    r"an archive: unpack it": {"export.zip": ""},
    r"its folder my export is Pascal VOC: give that": {"my export/Annotations/a.xml": VOC},
    r"no train split: it has day1, day2: name one train$": {f"annotations/instances_day{i}.json": PNG for i in "12"},
    r"1 parts are not used, .* \(default\) \(refused by --strict": ONE_FILE | {"annotations/instances_train.json": PNG},
    r"has classes\.txt and obj\.names: rename or": LIST | {"obj.names": "blue"},
    r"is COCO and YOLO with a list of classes: ": LIST | {"result.json": PNG},
    r"is YOLO and YOLO with a list of classes: ": LIST | {"data.yaml": ROBOFLOW},
    r"no train split: it has default, result: name one train$": ONE_FILE | {"result.json": PNG},
    r"may be predictions": LIST | {"a.txt": f"{LINE} 0.9"},
    r"lacks 'name'": LIST | {"notes.json": '{"categories": [{"id": 1}]}'},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_files_of_the_tools_and_two_candidates_are_refused_in_a_line(tmp_path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_split(data_flags(write(tmp_path, "{}.png", REFUSED[message]), strict=True), "train")
    assert "\n" not in str(caught.value)
