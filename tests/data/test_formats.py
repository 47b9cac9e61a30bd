"""The same scenes as YOLO text files and as Pascal VOC XML give the same boxes as the COCO file."""

import shutil
from xml.etree import ElementTree

import pytest
import torch
import yaml
from helpers import data_flags, write_voc, write_yolo
from PIL import Image

from common.console import InputError
from common.data.sources import load_split


def same_boxes(found, expected):
    assert [p.path.name for p in found.images] == [p.path.name for p in expected.images] and found.notes == ()
    for index in range(len(expected)):
        boxes, labels, crowd = found.image_boxes(index)
        true_boxes, true_labels, _ = expected.image_boxes(index)
        assert torch.allclose(boxes, true_boxes, atol=0.01) and not crowd.any()
        names = [found.class_names[label] for label in labels.tolist()]
        assert names == [expected.class_names[label] for label in true_labels.tolist()]


@pytest.mark.parametrize("polygons", [False, True])
def test_yolo_text_files(demo_val, tmp_path, polygons):
    path = write_yolo(demo_val, tmp_path, polygons=polygons)
    for data in (str(path), str(tmp_path)):
        for split in ("train", "val"):
            same_boxes(load_split(data_flags(data), split), demo_val)
    assert len(load_split(data_flags(data, 2), "val")) == 2
    (tmp_path / "labels" / "val" / f"{demo_val.images[0].path.stem}.txt").unlink()
    found = load_split(data_flags(data), "val")
    assert len(found) == len(demo_val) and len(found.image_boxes(0)[0]) == 0


def test_yolo_parts_may_be_lists_of_files_and_written_from_a_folder_further_down(demo_val, tmp_path):
    write_yolo(demo_val, tmp_path, train="../images/train")
    same_boxes(load_split(data_flags(str(tmp_path)), "train"), demo_val)
    (tmp_path / "train.txt").write_text("".join(f"./images/train/{p.path.name}\n" for p in demo_val.images[:3]))
    settings = yaml.safe_load((tmp_path / "data.yaml").read_text()) | {"train": "train.txt"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    same_boxes(load_split(data_flags(str(tmp_path)), "train"), demo_val.first(3))


@pytest.mark.parametrize(
    "line",
    ["0 a b c d", "0 0.5 0.5 0.1", "99 0.5 0.5 0.1 0.1", "x 0.5 0.5 0.1 0.1", "0 nan 0 1 1", "inf 0.5 0.5 0.1 0.1"],
)
def test_lines_that_cannot_be_read_are_counted(demo_val, tmp_path, line):
    write_yolo(demo_val, tmp_path)
    labels = tmp_path / "labels" / "val" / f"{demo_val.images[0].path.stem}.txt"
    labels.write_text(f"{labels.read_text()}{line}\n")
    found = load_split(data_flags(str(tmp_path)), "val")
    assert len(found.labels) == len(demo_val.labels)
    assert len(found.notes) == 1 and found.notes[0].startswith("left out 1 ")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- a",
        "a: [",
        "names: [a]",
        "val: images/val",
        "val: nowhere\nnames: [a]",
        "val: labels\nnames: [a]",
        "names: 3\nval: x",
        "[" * 5000,
        "names: " + "9" * 5000,
    ],
)
def test_yaml_files_of_no_yolo_data_set(demo_val, tmp_path, content):
    write_yolo(demo_val, tmp_path).write_text(content)
    with pytest.raises(InputError) as caught:
        load_split(data_flags(str(tmp_path)), "val")
    assert "\n" not in str(caught.value)


def test_pascal_voc_in_its_own_layout_and_in_a_folder_for_each_part(demo_val, tmp_path):
    own, parts = tmp_path / "own", tmp_path / "parts"
    write_voc(demo_val, own / "Annotations", own / "JPEGImages")
    (own / "ImageSets" / "Main").mkdir(parents=True)
    for part in ("train", "val"):
        (own / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{p.path.stem}\n" for p in demo_val.images))
    write_voc(demo_val, parts / "valid", parts / "valid")
    write_voc(demo_val, parts / "train", parts / "train")
    for folder in (own, parts):
        for part in ("train", "val"):
            found = load_split(data_flags(str(folder)), part)
            same_boxes(found, demo_val)
            assert found.category_ids == tuple(range(1, len(found.class_names) + 1))
    with pytest.raises(InputError, match="no val split"):
        shutil.rmtree(parts / "valid")
        load_split(data_flags(str(parts)), "val")


def test_difficult_objects_are_left_aside_and_broken_ones_counted(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "val", tmp_path / "val")
    files = sorted((tmp_path / "val").glob("*.xml"))
    tree = ElementTree.parse(files[0])
    for thing in tree.getroot().iter("object"):
        ElementTree.SubElement(thing, "difficult").text = "1"
    tree.write(files[0])
    tree = ElementTree.parse(files[1])
    next(tree.getroot().iter("object")).find("bndbox/xmax").text = "wide"
    tree.write(files[1])
    found = load_split(data_flags(str(tmp_path)), "val")
    assert found.image_boxes(0)[2].all() and len(found.labels) == len(demo_val.labels) - 1
    assert found.notes[0].startswith("left out 1 objects without a box")
    files[2].write_text("<annotation>")
    with pytest.raises(InputError, match=r"cannot read .*xml"):
        load_split(data_flags(str(tmp_path)), "val")


def test_turned_images_keep_their_upright_size(tmp_path):
    from common.data.images import read_size

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(tmp_path / "turned.jpg") == (40, 80)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    assert read_size(tmp_path / "bad.jpg") is None and read_size(tmp_path / "none.jpg") is None
