"""Which reader `--data` names, and which images are taken."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, data_flags, write_voc, write_yolo
from PIL import Image

from common.console import InputError
from common.data.sources import READERS, load_split, load_train_and_val, read_chosen


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def yolo(demo_val, tmp_path):
    """The scenes of the demo as a YOLO data set."""
    write_yolo(demo_val, tmp_path / "yolo")
    return tmp_path / "yolo"


def names(data):
    return [image.path.name for image in data.images]


def test_layouts_of_coco_and_roboflow_and_explicit_files(demo, tmp_path):
    expected = load_split(data_flags(demo), "val").fingerprint()
    roboflow = tmp_path / "roboflow" / "Valid"
    shutil.copytree(demo / "val2017", roboflow)
    annotations = demo / "annotations" / "instances_val2017.json"
    shutil.copy(annotations, roboflow / "_annotations.coco.json")
    assert load_split(data_flags(roboflow.parent), "val").fingerprint() == expected
    explicit = data_flags("nowhere", val_json=str(annotations), val_images_dir=str(demo / "val2017"))
    assert load_split(explicit, "val").fingerprint() == expected
    with pytest.raises(InputError, match="has no train split: it has valid"):
        load_split(data_flags(roboflow.parent), "train")
    with pytest.raises(InputError, match="go together"):
        load_split(replace(explicit, val_images_dir=""), "val")
    with pytest.raises(InputError, match="--train-json and --val-json go together"):
        load_train_and_val(explicit)


def test_the_docs_name_every_reader():
    rows = [line.split(" | ")[0] for line in (ROOT / "docs" / "data.md").read_text().splitlines()]
    assert [row[2:] for row in rows if row[2:] in {reader.form for reader in READERS}] == [r.form for r in READERS]


def test_what_no_reader_or_two_recognise_is_refused(demo, yolo, tmp_path):
    (tmp_path / "obj.names").write_text("cat")
    with pytest.raises(InputError, match=r"\(obj\.names, yolo\) is in none of the forms demo, coco-official, COCO"):
        load_split(data_flags(tmp_path), "val")
    with pytest.raises(InputError, match="no such folder"):
        load_split(data_flags(tmp_path / "gone"), "val")
    shutil.copytree(demo / "annotations", yolo / "annotations")
    with pytest.raises(InputError, match=r"is COCO and YOLO: name a data\.yaml there"):
        load_split(data_flags(yolo), "val")
    assert load_split(data_flags(yolo / "data.yaml"), "val").class_names[0] == "disc"


def test_files_of_an_editor_and_other_systems_do_not_hide_coco(demo, tmp_path):
    """PyCharm's settings are XML; where case makes no difference, annotations/ is also Annotations/."""
    root = tmp_path / "set"
    shutil.copytree(demo, root)
    (root / ".idea").mkdir()
    (root / ".idea" / "workspace.xml").write_text("<project/>")
    (root / "Annotations").symlink_to("annotations")
    assert len(load_split(data_flags(root), "val")) == 6


def test_parts_of_different_years_and_equal_images_in_both_parts_are_refused(demo, yolo, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(demo, root)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "instances_val2014.json")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="of different years, which share images"):
            load_split(data_flags(root), split)
    settings = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(settings.replace("images/val", "images/train"))
    with pytest.raises(InputError, match="6 of the 6 validation images are training images"):
        load_train_and_val(data_flags(yolo))


def many(tmp_path, count, broken=()):
    """A YOLO set of `count` images, the first half of class a, the others of class b; some are no images."""
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "set" / "images" / f"{number:03d}.png")
        label = tmp_path / "set" / "labels" / f"{number:03d}.txt"
        label.write_text(f"{int(number >= count / 2)} .5 .5 .{number % 7 + 3} .9")
    for number in broken:
        (tmp_path / "set" / "images" / f"{number:03d}.png").write_bytes(b"no image")
    (tmp_path / "set" / "data.yaml").write_text("train: images\nval: images\nnames: [a, b]\n")
    return tmp_path / "set"


def test_a_sample_is_nested_in_larger_ones_and_added_images_move_none(tmp_path, caplog):
    root = many(tmp_path, 40)
    caplog.set_level("INFO")
    small, large = (names(load_split(data_flags(root, limit), "train")) for limit in (6, 20))
    assert set(small) < set(large) and small == sorted(small) and large == sorted(large)
    assert "20 of 40 images (--train-images 0 takes all)" in caplog.text
    others = [names(load_split(data_flags(root, 6, sample_seed=seed), "train")) for seed in (1, 2)]
    assert small not in others and others[0] != others[1]
    assert names(load_split(data_flags(root, 6), "val")) != small  # drawn apart
    assert names(load_split(data_flags(root, 6, sample_seed=-1), "train")) == [f"{i:03d}.png" for i in range(6)]
    added = set(names(load_split(data_flags(many(tmp_path, 44), 20), "train")))
    assert len(added & set(large)) >= 16 and added - set(large) <= {f"{i:03d}.png" for i in range(40, 44)}


def test_the_same_images_are_taken_from_every_layout(demo_val, yolo, demo, tmp_path):
    write_voc(demo_val, tmp_path / "voc" / "val", tmp_path / "voc" / "val")
    taken = [names(load_split(data_flags(root, 3), "val")) for root in (demo, yolo, tmp_path / "voc")]
    assert len(taken[0]) == 3 and taken[0] == taken[1] == taken[2]


def test_n_images_are_n_that_can_be_used(tmp_path):
    root = many(tmp_path, 20, broken=range(0, 20, 2))
    data = load_split(data_flags(root, 8), "train")
    assert len(data) == 8 and all(int(name[:3]) % 2 for name in names(data))
    assert data.notes[0].startswith("left out 10 images that cannot be read")
    with pytest.raises(InputError, match="refused by --strict"):
        load_split(data_flags(root, 8, strict=True), "train")


def test_classes_without_a_training_object_are_named(demo, tmp_path, caplog):
    train, val = load_train_and_val(data_flags(demo, 2))
    shown = {train.class_names[label] for label in train.labels}
    assert f"no training image shows {10 - len(shown)} classes" in caplog.text
    assert len(val) == 2
    root = many(tmp_path, 8)
    (root / "data.yaml").write_text("train: images\nval: other\nnames: [a, b]\n")
    shutil.copytree(root / "images", root / "other")
    with pytest.raises(InputError, match="no image of val has a label file"):
        load_train_and_val(data_flags(root))


def test_images_are_chosen_by_id_or_name_each_once(demo, yolo, demo_val, tmp_path):
    listed = tmp_path / "ids.txt"
    chosen = [demo_val.images[i] for i in (4, 1)]
    listed.write_text(f"# two\nval {chosen[0].id} # by id\n\nval  {chosen[1].path.name}\ntrain 1\n")
    data = load_split(data_flags(demo, image_ids=str(listed)), "val")
    assert [image.id for image in data.images] == [image.id for image in chosen]
    with pytest.raises(
        InputError,
        match=r"lacks 1 of the 2 requested images \(5\): they have no ids, give names",
    ):
        load_split(data_flags(yolo, image_ids=str(listed)), "val")  # ids of YOLO are positions
    with pytest.raises(InputError, match="names 2 val images: give --val-images 0 with it"):
        load_split(data_flags(demo, 1, image_ids=str(listed)), "val")
    for content, message in {
        "val 1\nval 2\nval 1": "the line 'val 1' is no train or val",
        "9": "the line '9' is no train or val",
        "test 9": "the line 'test 9' is no train or val",
        "train 9": "names no val images",
    }.items():
        listed.write_text(content)
        with pytest.raises(InputError, match=message):
            read_chosen(listed, "val")
    with pytest.raises(InputError, match="cannot read"):
        read_chosen(tmp_path / "none.txt", "val")


def test_data_of_crowds_alone_are_refused_in_training_and_warned_of_in_validation(demo, yolo, caplog):
    def empty(split):
        for label in (yolo / "labels" / split).iterdir():
            label.write_text("")

    empty("val")
    load_train_and_val(data_flags(yolo))
    assert (
        "of its 0 boxes none is an object (crowds, in VOC difficult, are not), so that mAP cannot be computed"
        in caplog.text
    )
    with pytest.raises(InputError, match=r"cannot be computed.*refused by --strict"):
        load_train_and_val(data_flags(yolo, strict=True))
    empty("train")
    with pytest.raises(InputError, match=r"of its 0 boxes none is an object .*; there is nothing to learn"):
        load_train_and_val(data_flags(yolo))


def test_notes_are_logged_and_refused_by_strict(coco_file, caplog):
    entry = {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5]}
    path, images = coco_file([entry, entry | {"id": 2, "bbox": [1, 1, 0, 0]}])
    flags = data_flags("", val_json=str(path), val_images_dir=str(images))
    assert np.array_equal(load_split(flags, "val").boxes, [[10, 20, 30, 5]])
    assert "left out 1 boxes without area (a.png)" in caplog.text
    with pytest.raises(InputError, match=r"without area \(a\.png\) \(refused by --strict\)"):
        load_split(replace(flags, strict=True), "val")
