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


def write_labels(root, content, extra="", image=None, names="[red, blue]"):
    """A YOLO data set of one image of 100 x 50 pixels, of which both splits are; `content` is its label file."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    Image.new("RGB", (100, 50)).save(root / "images" / "a.png")
    (root / "labels" / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "data.yaml").write_text(f"train: images\nval: images\nnames: {names}\n{extra}")
    return root


BOX, OTHER_BOX = "1 0.5 0.5 0.2 0.4", "0 0.25 0.25 0.5 0.5"  # 40, 15, 60, 35 and 0, 0, 50, 25


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + BOX.encode(),
        BOX.encode("utf-16"),
        f"\r{BOX}\r",
        f"\r\n{BOX}\r\n\r\n",
        BOX.replace(" ", "\t"),
        BOX.replace(" ", ","),
        BOX.replace(" ", ", "),
        BOX.replace(" ", ";"),
        f"  {BOX}, ",
        BOX.replace(".", ","),
        "1.0 5e-1 .5 0.20 0.4",
        "1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7",
        "1 0.4 0.5 0.5 0.3 0.6 0.5 0.5 0.7 0.4 0.5",
    ],
)
def test_label_lines_in_other_spellings(tmp_path, content):
    data = load_split(data_flags(write_labels(tmp_path, content), strict=True), "val")
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20]] and data.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 0.5 0.5 0.2 wide", "not numbers"),
        ("1 0.5 0.5 0.2", "neither a box nor a polygon"),
        ("1 0.5 0.5 0.2 0.4 0.1 0.2 0.3", "neither a box nor a polygon"),
        ("1.5 0.5 0.5 0.2 0.4", "class is not a whole number"),
        ("nan 0.5 0.5 0.2 0.4", "class is not a whole number"),
        ("red 0.5 0.5 0.2 0.4", "not numbers"),
        ("1 0.5 0.5 0.2 0.4 1.3", "sixth column that is not a confidence"),
        ("1 50 25 20 20", "not normalised"),
        ("1 40 15 60 15 60 35 40 35", "not normalised"),
        ("1 0.5 0.5 0.2 0.4 0.5 0.5 2 0.4 0.5 2", "not normalised to 0..1 (keypoints need kpt_shape"),
        ("1 0.5 0.5 -0.2 0.4", "negative width"),
        ("7 0.5 0.5 0.2 0.4", "category that is not listed"),
    ],
)
def test_label_lines_left_out_are_counted_with_the_reason(tmp_path, line, reason):
    data = load_split(data_flags(write_labels(tmp_path, f"{line}\n{BOX}\n{line}\n")), "val")
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20]]
    assert len(data.notes) == 1 and data.notes[0].startswith("left out 2 ") and reason in data.notes[0]


def test_a_confidence_is_ignored_and_noted(tmp_path):
    data = load_split(data_flags(write_labels(tmp_path, f"{BOX} 0.9\n{OTHER_BOX} 0.07\n")), "val")
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20], [0, 0, 50, 25]]
    assert data.notes == ("ignored the sixth column of 2 label lines, a confidence (a.txt)",)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (17, 3), (1, 2)])
def test_pose_labels_are_boxes_with_keypoints(tmp_path, shape):
    keypoints = " ".join(["0.1 0.9 2.0"[: 4 * shape[1] - 1]] * shape[0])
    root = write_labels(tmp_path, f"{BOX} {keypoints}\n{OTHER_BOX}\n", f"kpt_shape: {list(shape)}\n")
    data = load_split(data_flags(root, strict=True), "val")
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20], [0, 0, 50, 25]]
    (root / "labels" / "a.txt").write_text(f"{BOX} {keypoints} 0.5 0.5\n{BOX}\n")
    note = "left out 1 label lines that do not have the columns of kpt_shape (a.txt)"
    assert load_split(data_flags(root), "val").notes == (note,)
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + "kpt_shape: [many, 2]\n")
    with pytest.raises(InputError, match="kpt_shape is not"):
        load_split(data_flags(root), "val")


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[yes, no]", ("yes", "no")),
        ("{0: on, 1: off}", ("on", "off")),
        ("\n  1: True\n  0: ~", ("~", "True")),
        ("[1.50, 2024-01-31]", ("1.50", "2024-01-31")),
        ("[0x10, 12:30:00]", ("0x10", "12:30:00")),
    ],
)
def test_class_names_are_as_written_in_yaml(tmp_path, written, names):
    assert load_split(data_flags(write_labels(tmp_path, BOX, names=written)), "val").class_names == names


@pytest.mark.parametrize(("images", "labels", "suffix"), [("Images", "labels", ".txt"), ("IMAGES", "LABELS", ".TXT")])
def test_folders_and_suffixes_in_capital_letters(tmp_path, images, labels, suffix):
    for folder in (images, labels):
        (tmp_path / folder / "Val").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(tmp_path / images / "Val" / "A b.JPG", "JPEG")
    (tmp_path / labels / "Val" / f"A b{suffix}").write_text(BOX)
    (tmp_path / "data.yaml").write_text(f"train: {images}\nval: {images}\\Val\nnames: [red, blue]\n")
    data = load_split(data_flags(tmp_path, strict=True), "val")
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20]] and data.images[0].path.name == "A b.JPG"


def test_symbolic_links_are_followed_once(demo_val, tmp_path):
    write_yolo(demo_val, tmp_path / "real")
    (tmp_path / "linked").mkdir()
    shutil.copy(tmp_path / "real" / "data.yaml", tmp_path / "linked")
    for part in ("images", "labels"):
        (tmp_path / "linked" / part).mkdir()
        for split in ("train", "val"):  # the folder holds a link to a folder, which has a link back to it
            (tmp_path / "linked" / part / split).mkdir()
            (tmp_path / "linked" / part / split / "deep").symlink_to(tmp_path / "real" / part / split)
        (tmp_path / "real" / part / "val" / "back").symlink_to(tmp_path / "linked" / part / "val")
    same_boxes(load_split(data_flags(tmp_path / "linked"), "val"), demo_val)


def test_labels_beside_the_images_in_a_folder_below_one_called_images(demo_val, tmp_path):
    write_yolo(demo_val, tmp_path / "set")
    root = tmp_path / "images" / "mine"
    (root / "val").mkdir(parents=True)
    for part in ("images", "labels"):
        for file in (tmp_path / "set" / part / "val").iterdir():
            shutil.copy(file, root / "val")
    settings = yaml.safe_load((tmp_path / "set" / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(settings | {"val": "val"}))
    same_boxes(load_split(data_flags(root), "val"), demo_val)


def test_missing_label_files_and_images_are_counted(demo_val, tmp_path):
    write_yolo(demo_val, tmp_path)
    stems = [image.path.stem for image in demo_val.images]
    for stem in stems[:3]:
        (tmp_path / "labels" / "val" / f"{stem}.txt").unlink()
    (tmp_path / "images" / "val" / f"{stems[3]}.jpg").unlink()
    (tmp_path / "labels" / "val" / "classes.txt").write_text("disc\n")
    data = load_split(data_flags(tmp_path), "val")
    names = ", ".join(f"{stem}.jpg" for stem in stems[:3])
    assert data.notes == (
        f"found no image for 1 label files ({stems[3]}.txt)",
        f"took 3 images without a label file for images without objects ({names})",
    )
    assert len(data) == len(stems) - 1
    (tmp_path / "labels").rename(tmp_path / "label")
    with pytest.raises(InputError, match=r"none of the 5 images has a label file: there is no .*labels/val"):
        load_split(data_flags(tmp_path), "val")


def test_all_formats_that_pillow_reads_are_found_and_others_counted(demo_val, tmp_path):
    write_yolo(demo_val, tmp_path)
    folder = tmp_path / "images" / "val"
    suffixes = [".tif", ".TIFF", ".gif", ".bmp", ".jp2", ".ppm"]
    for image, suffix in zip(demo_val.images, suffixes, strict=True):
        Image.open(image.path).save((folder / image.path.name).with_suffix(suffix))
        (folder / image.path.name).unlink()
    for name in ("new.heic", "._000001.tif", "notes.md"):
        (folder / name).write_bytes(b"")
    data = load_split(data_flags(tmp_path), "val")
    assert [image.path.suffix for image in data.images] == suffixes and len(data.boxes) == len(demo_val.boxes)
    assert data.notes == (
        "left out 1 files of macOS metadata, which are no images (._000001.tif)",
        "left out 1 files of an image format that Pillow does not read (new.heic)",
    )


def test_voc_images_are_found_by_the_name_of_the_xml_file(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "val", tmp_path / "val")
    files = sorted((tmp_path / "val").glob("*.xml"))
    for file in files:
        tree = ElementTree.parse(file)
        tree.find("filename").text = f"C:\\old\\{demo_val.images[0].path.name}"
        tree.write(file)
    for image in (tmp_path / "val").glob("*.jpg"):
        image.rename(image.with_suffix(".JPG"))
    data = load_split(data_flags(tmp_path), "val")
    assert [image.path.name for image in data.images] == [f"{file.stem}.JPG" for file in files] and not data.notes
    assert (data.boxes == demo_val.boxes).all()


def test_renamed_xml_files_find_their_image_by_filename_unless_another_file_has_it(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "val", tmp_path / "val")
    files = sorted((tmp_path / "val").glob("*.xml"))
    files[0].rename(files[0].with_name("renamed.XML"))
    data = load_split(data_flags(tmp_path), "val")
    assert not data.notes and (data.boxes == demo_val.boxes).all()
    shutil.copy(files[1], tmp_path / "val" / "copy.xml")
    data = load_split(data_flags(tmp_path), "val")
    assert (data.boxes == demo_val.boxes).all()
    assert data.notes == (f"left out 1 entries without an image in {tmp_path / 'val'} (copy)",)


def test_voc_images_without_xml_and_names_with_spaces(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "Annotations", tmp_path / "JPEGImages")
    lines = []
    for number, image in enumerate(demo_val.images):
        (tmp_path / "JPEGImages" / image.path.name).rename(tmp_path / "JPEGImages" / f"my image {number}.jpg")
        (tmp_path / "Annotations" / f"{image.path.stem}.xml").rename(
            tmp_path / "Annotations" / f"my image {number}.xml"
        )
        lines.append(f"my image {number}" + ("", " 1", ".jpg", "  -1", ".xml", "")[number])
    (tmp_path / "Annotations" / "my image 5.xml").unlink()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "gone"]).encode())
    data = load_split(data_flags(tmp_path), "val")
    assert [image.path.name for image in data.images] == [f"my image {number}.jpg" for number in range(6)]
    count = demo_val.starts[5]
    assert len(data.boxes) == count and (data.boxes == demo_val.boxes[:count]).all()
    assert data.notes == (
        f"left out 1 entries without an image in {tmp_path / 'JPEGImages'} (gone)",
        "took 1 images without an XML file for images without objects (my image 5.jpg)",
    )


def test_empty_voc_split_is_refused(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "Annotations", tmp_path / "JPEGImages")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(InputError, match="the split is empty"):
        load_split(data_flags(tmp_path), "val")


def test_voc_folder_whose_files_have_other_names_than_the_images(demo_val, tmp_path):
    write_voc(demo_val, tmp_path / "val", tmp_path / "val")
    for image in (tmp_path / "val").glob("*.jpg"):
        image.rename(image.with_name(f"new{image.name}"))
    with pytest.raises(InputError, match="no XML file has an image"):
        load_split(data_flags(tmp_path), "val")
