"""YOLO and Pascal VOC as their documents describe them; other forms are refused with the file and the line.

That the same scenes are read from every layout is in test_layouts.py.
"""

import pytest
from helpers import data_flags
from PIL import Image

from common.console import InputError
from common.data.sources import load_split

BOX, OTHER_BOX = "1 0.5 0.5 0.2 0.4", "0 0.25 0.25 0.5 0.5"  # 40, 15, 20, 20 and 0, 0, 50, 25 of 100 x 50 pixels


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 50)).save(path)


def yolo(root, content=BOX, extra="", names="[red, blue]"):
    """A YOLO data set of one image in both splits; `content` is its label file."""
    for split in ("train", "val"):
        image(root / "images" / split / "a.png")
        label = root / "labels" / split / "a.txt"
        label.parent.mkdir(parents=True)
        label.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n{extra}")
    return root


def read(root, split="val", **flags):
    return load_split(data_flags(root, **flags), split)


def names_of(data):
    return [image.path.name for image in data.images]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + BOX.encode(),
        f"\r\n{BOX}\r\n\r\n",
        BOX.replace(" ", "\t"),
        "1.0 5e-1 .5 0.20 0.4",
        "1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7",
        "1 0.4 0.5 0.5 0.3 0.6 0.5 0.5 0.7 0.4 0.5",
    ],
)
def test_boxes_and_polygons(tmp_path, content):
    data = read(yolo(tmp_path, content), strict=True)
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20]] and data.labels.tolist() == [1]


REFUSED = {
    "1 0.5 0.5 0.2 wide": "could not convert",
    "1 0.5 0.5 0.2": "not the columns of a box",
    "1 0.5 0.5 0.2 0.4 0.1 0.2 0.3": "not the columns of a box",
    "1,0.5,0.5,0.2,0.4": "could not convert",
    "1.5 0.5 0.5 0.2 0.4": "class is not a whole number",
    "nan 0.5 0.5 0.2 0.4": "class is not a whole number",
    "1 0.5 0.5 0.2 0.4 0.9": "may be predictions",
    "1 0.5 0.5 0.2 0.4 0.9 1": "7 columns, perhaps predictions",
    "1 50 25 20 20": "not fractions of the image's sides",
    "1 nan 0.5 0.2 0.4": "not fractions of the image's sides",
    "2 0.5 0.5 0.2 0.4": "the classes 1 to 2, the list 0 to 1: number both",
}


@pytest.mark.parametrize("line", REFUSED)
def test_other_lines_are_refused_with_the_file(tmp_path, line):
    with pytest.raises(InputError, match=REFUSED[line]) as caught:
        read(yolo(tmp_path, f"{BOX}\n{line}\n"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_triangles_are_read_where_other_polygons_are_and_unknown_classes_left_out(tmp_path):
    lines = "1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7\n0 0.1 0.1 0.3 0.1 0.2 0.5\n7 0.5 0.5 0.2 0.4"
    data = read(yolo(tmp_path, lines))
    assert data.boxes.round(6).tolist() == [[40, 15, 20, 20], [10, 5, 20, 20]]
    assert data.notes == ("left out 1 boxes of a class that is not listed (a.png)",)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (17, 3), (1, 2)])
def test_pose_labels_are_boxes_with_keypoints(tmp_path, shape):
    keypoints = " ".join(["0.1 0.9 1.0"[: 4 * shape[1] - 1]] * shape[0])
    root = yolo(tmp_path, f"{BOX} {keypoints}\n{OTHER_BOX}\n", f"kpt_shape: {list(shape)}\n")
    assert read(root, strict=True).boxes.round(6).tolist() == [[40, 15, 20, 20], [0, 0, 50, 25]]
    (root / "labels" / "val" / "a.txt").write_text(f"{BOX} {keypoints} 0.5 0.5\n")
    with pytest.raises(InputError, match="not the columns of a box"):
        read(root)


def test_corners_in_labels_are_refused_and_read_with_the_flag(tmp_path):
    lines = [f"{i % 2} 0.{i} 0.5 0.9 0.8" for i in range(1, 9)]
    root = yolo(tmp_path, "\n".join(lines))
    with pytest.raises(InputError, match=r"1 of 8 boxes lie inside .* --box-format xyxy reads 8"):
        read(root)
    assert read(root, box_format="xyxy").boxes[0].round(6).tolist() == [10, 25, 80, 15]


NAMES = {
    "[yes, no]": ("yes", "no"),
    "{0: on, 1: off}": ("on", "off"),
    "\n  1: True\n  0: ~": ("~", "True"),
    "[1.50, 2024-01-31]": ("1.50", "2024-01-31"),
}


@pytest.mark.parametrize("written", NAMES)
def test_class_names_are_as_written_in_yaml(tmp_path, written):
    assert read(yolo(tmp_path, names=written)).class_names == NAMES[written]


@pytest.mark.parametrize(
    "content",
    [
        *("", "- a", "a: [", "names: [a]", "val: images/val", "val: nowhere\nnames: [a]", "val: labels\nnames: [a]"),
        *("names: 3\nval: x", "[" * 5000, "names: " + "9" * 5000, "val: images/val\nnames: [a]\npath: /nowhere"),
        "val: images/val\nnames: [a, b]\nnc: 3",
        *(
            "names: [caf\xe9]\nval: images/val",
            "val: images/val\nVal: images/val\nnames: [a, b]",
            "val: images/val\nnames: [a]\npath: [b]",
        ),
    ],
)
def test_other_yaml_files_are_refused_in_a_line(tmp_path, content):
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_images_are_folders_lists_or_files_and_lists_repeat_none(tmp_path):
    yolo(tmp_path)
    image(tmp_path / "images" / "val" / "below" / "b.png")
    for written in ("images/val", "images\\val", "../images/val", "[images/val, images/train/a.png]", "val.txt"):
        (tmp_path / "val.txt").write_text("./images/val/a.png\n\nimages\\val\\below\\b.png\n")
        (tmp_path / "data.yaml").write_text(f"val: {written}\nnames: [red, blue]\n")
        assert names_of(read(tmp_path)) == ["a.png"] * written.startswith("[") + ["a.png", "b.png"]
    (tmp_path / "val.txt").write_text("images/val/a.png\nimages/train/a.png\n./images/val/a.png")
    with pytest.raises(InputError, match=r"listed twice: .*a\.png"):
        read(tmp_path)


def test_a_place_that_may_be_two_folders_is_refused(tmp_path):
    """Roboflow writes ../train/images; beside this data set lies another one."""
    yolo(tmp_path / "mine", names="[red, blue]\nval: ../images/val")
    assert read(tmp_path / "mine").images[0].path.parent == tmp_path / "mine" / "images" / "val"
    yolo(tmp_path)
    with pytest.raises(InputError, match=r"which is .*mine/images/val or .*images/val: write that path in full"):
        read(tmp_path / "mine")
    (tmp_path / "mine" / "data.yaml").write_text("train: ../images/train\nval: ../other\nnames: [red, blue]\n")
    (tmp_path / "images").rename(tmp_path / "other")
    with pytest.raises(InputError, match=r"the images \.\./other, which is .*/other: write that path in full"):
        read(tmp_path / "mine")  # whose training images are its own


def test_the_home_folder_and_splits_in_other_letters(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    yolo(tmp_path / "set")
    path = tmp_path / "elsewhere.yaml"
    path.write_text("path: ~/set\nVal: images/val\ntest: images/train\nnames: [red, blue]\n")
    assert read(path, strict=True).images[0].path.parent == tmp_path / "set" / "images" / "val"


def test_labels_beside_the_images_and_images_without_labels(tmp_path):
    root = tmp_path / "images" / "set"
    for name in ("a.png", "b.png", "b.jpg"):
        image(root / "val" / name)
    (root / "val" / "b.txt").write_text(BOX)
    (root / "val" / "c.HEIC").write_bytes(b"")
    (root / "data.yaml").write_text("val: val\nnames: [red, blue]\n")
    data = read(root)
    assert len(data.labels) == 2 and data.notes == (
        "left out 1 files of an image format that Pillow does not read (c.HEIC)",
        "took 1 images without a label file for images without objects (a.png)",
        "2 images share a label file with another of their name (b.jpg, b.png)",
    )
    (root / "val" / "b.txt").unlink()
    with pytest.raises(InputError, match=r"no image of val has a label file, such as .*labels/set/val/a\.txt"):
        read(root)


def test_label_files_without_an_image_are_told(tmp_path):
    labels = yolo(tmp_path) / "labels" / "val"
    for name in ("gone.txt", "classes.txt", "cafe\u0301.txt"):
        (labels / name).write_text(BOX)
    image(tmp_path / "images" / "val" / "caf\u00e9.png")
    assert read(tmp_path).notes == ("left out 1 label files without an image (gone.txt)",)


def test_symbolic_links_are_followed_once(tmp_path):
    yolo(tmp_path / "real")
    linked = yolo(tmp_path / "linked")
    for part in ("images", "labels"):  # a link to a folder, which has a link back
        (linked / part / "val" / "deep").symlink_to(tmp_path / "real" / part / "val")
        (tmp_path / "real" / part / "val" / "back").symlink_to(linked / part / "val")
    assert len(read(linked).boxes) == 2


def voc(folder, boxes=((10, 5, 30, 25),), stem="a", difficult="0", database="Unknown"):
    """An image of 100 x 50 pixels and its XML file in a folder."""
    image(folder / f"{stem}.png")
    sides = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    corners = "".join(sides.format(*box) for box in boxes)
    name = "caf\u00e9" if stem == "a" else "cafe\u0301"
    thing = f"<object><name>{name}</name><difficult>{difficult}</difficult>{corners}</object>"
    source = f"<source><database>{database}</database></source>"
    (folder / f"{stem}.xml").write_text(f"<annotation><filename>another.jpg</filename>{source}{thing}</annotation>")
    return folder.parent


@pytest.mark.parametrize("difficult", ["1", "true", " True\n", "yes", "1.0"])
def test_the_stem_finds_the_image_of_voc_and_difficult_objects_are_crowds(tmp_path, difficult):
    voc(tmp_path / "val", stem="b c", difficult=difficult)
    data = read(voc(tmp_path / "val", [(10, 5, 30, 25), (0, 0, 100, 50)], difficult="False"), strict=True)
    assert data.boxes.tolist() == [[10, 5, 20, 20], [0, 0, 100, 50], [10, 5, 20, 20]]
    assert names_of(data) == ["a.png", "b c.png"] and data.crowd.tolist() == [False, False, True]
    assert data.category_ids == (1,) and data.class_names == ("caf\u00e9",)  # composed in one, not in the other


@pytest.mark.parametrize("database", ["The VOC2007 Database", "PASCAL VOC 2012", "MyDatabase", ""])
@pytest.mark.parametrize("left", [11, 11.5, 0])  # the last two prove counting from 0
def test_voc_corners_count_from_one_in_the_original_alone(tmp_path, left, database):
    data, shift = read(voc(tmp_path / "val", [(left, 6, 30, 25)], database=database)), left == 11 and "VOC" in database
    assert data.boxes.tolist() == [[left - shift, 6 - shift, 30 - left + shift, 19 + shift]]


def test_what_is_wrong_with_voc_is_counted_or_refused(tmp_path):
    folder = tmp_path / "val"
    image(folder / "without.png")
    voc(folder, [("nan", 5, 30, 25)], stem="broken")
    voc(folder, stem="gone")
    (folder / "gone.png").unlink()
    data = read(voc(folder))
    assert names_of(data) == ["a.png", "broken.png", "without.png"] and data.boxes.tolist() == [[10, 5, 20, 20]]
    assert data.notes == (
        "left out 1 entries without an image (gone)",
        "took 1 images without a label file for images without objects (without.png)",
        "left out 1 boxes that are not four finite numbers (broken.png)",
    )
    latin = "<annotation>caf\xe9</annotation>".encode("latin-1")
    unclear = [f"<a><object><{tag}>wide</{tag}></object></a>".encode() for tag in ("xmin", "difficult")]
    for content in (b"<annotation>", latin, *unclear):
        (folder / "a.xml").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*a\.xml as XML in UTF-8"):
            read(tmp_path)
    with pytest.raises(InputError, match="has no train split: it has val"):
        read(tmp_path, "train")
    voc(folder, [(0.4, 0.4, 0.6, 0.6), (0.1, 0.1, 0.5, 0.9)])
    (folder / "broken.xml").unlink()
    with pytest.raises(InputError, match="write them in pixels"):
        read(tmp_path)


def test_vocs_own_layout_with_lists_and_subfolders(tmp_path):
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for stem in ("sub/a b", "c"):
        image(tmp_path / "JPEGImages" / f"{stem}.png")
        (tmp_path / "Annotations" / stem).parent.mkdir(parents=True, exist_ok=True)
        voc(tmp_path / "other", stem="x")
        (tmp_path / "other" / "x.xml").rename(tmp_path / "Annotations" / f"{stem}.xml")
    (sets / "val.txt").write_bytes(b"\xef\xbb\xbfsub\\a b\r\nc  \r\ngone\r\n")
    data = read(tmp_path)
    assert names_of(data) == ["a b.png", "c.png"] and len(data.boxes) == 2
    assert data.notes == ("left out 1 entries without an image (gone)",)
    (sets / "val.txt").write_text("\n")
    with pytest.raises(InputError, match="no image can be used: none is listed"):
        read(tmp_path)
