"""Which reader `--data` names, and which images are taken."""

import shutil
from dataclasses import replace

import pytest
from helpers import ROOT, annotation, data_flags, random_image

from common.console import InputError
from common.data.sources import READERS, check_classes, load_split, load_train_and_val, read_chosen


def names(data):
    return [image.path.name for image in data.images]


def yolo(root, count=8, broken=()):
    """A YOLO set of `count` images in each part, half of class a and half of b; some are no images."""
    for part in ("train", "val"):
        for name in ("images", "labels"):
            (root / name / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            random_image(20, 20, number).save(root / "images" / part / f"{number:03d}.png")
            label = root / "labels" / part / f"{number:03d}.txt"
            label.write_text(f"{int(number >= count / 2)} .5 .5 .{number % 7 + 3} .9")
        for number in broken:
            (root / "images" / part / f"{number:03d}.png").write_bytes(b"no image")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b]\n")
    return root


def test_explicit_files(demo):
    annotations = str(demo / "annotations" / "instances_val2017.json")
    explicit = data_flags("nowhere", val_json=annotations, val_images_dir=str(demo / "val2017"))
    assert load_split(explicit, "val").fingerprint() == load_split(data_flags(demo), "val").fingerprint()
    with pytest.raises(InputError, match="go together"):
        load_split(replace(explicit, val_images_dir=""), "val")
    with pytest.raises(InputError, match="--train-json and --val-json go together"):
        load_train_and_val(explicit)


def test_the_docs_name_every_reader():
    rows = [line.split(" | ")[0] for line in (ROOT / "docs" / "data.md").read_text().splitlines()]
    assert [row[2:] for row in rows if row[2:] in {reader.form for reader in READERS}] == [r.form for r in READERS]


def test_what_no_reader_or_two_recognise_is_refused(demo, tmp_path):
    root = yolo(tmp_path / "set")
    with pytest.raises(InputError, match=r"\(its folder set is YOLO: give that\) is in none of the forms demo, coco-"):
        load_split(data_flags(tmp_path), "val")
    with pytest.raises(InputError, match="no such folder"):
        load_split(data_flags(tmp_path / "gone"), "val")
    shutil.copytree(demo / "annotations", root / "annotations")
    with pytest.raises(InputError, match=r"is COCO and YOLO: name a data\.yaml there"):
        load_split(data_flags(root), "val")
    assert load_split(data_flags(root / "data.yaml"), "val").class_names == ("a", "b")


def test_files_of_an_editor_and_other_systems_do_not_hide_coco_and_years_are_not_mixed(demo, tmp_path):
    """PyCharm's settings are XML; where case makes no difference, annotations/ is also Annotations/."""
    root = tmp_path / "set"
    shutil.copytree(demo, root)
    (root / ".idea").mkdir()
    (root / ".idea" / "workspace.xml").write_text("<project/>")
    (root / "Annotations").symlink_to("annotations")
    assert len(load_split(data_flags(root), "val")) == 6
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "instances_val2014.json")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="of different years, which share images"):
            load_split(data_flags(root), split)


def test_training_images_in_the_validation_part_are_refused_and_copies_warned_of(tmp_path, caplog):
    root = yolo(tmp_path)
    with pytest.raises(InputError, match=r"8 images are copies of training images \(000\.png, .* by --strict"):
        load_train_and_val(data_flags(root, strict=True))
    load_train_and_val(data_flags(root))
    assert "8 images are copies" in caplog.text
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [a, b]\n")
    with pytest.raises(InputError, match="8 of the 8 validation images are training images"):
        load_train_and_val(data_flags(root))


def test_a_sample_is_nested_in_larger_ones_and_added_images_move_none(tmp_path, caplog):
    root = yolo(tmp_path, 40)
    caplog.set_level("INFO")
    small, large = (names(load_split(data_flags(root, limit), "train")) for limit in (6, 20))
    assert set(small) < set(large) and small == sorted(small) and large == sorted(large)
    assert "20 of 40 images (--train-images 0 takes all)" in caplog.text
    others = [names(load_split(data_flags(root, 6, sample_seed=seed), "train")) for seed in (1, 2)]
    assert small not in others and others[0] != others[1]
    assert names(load_split(data_flags(root, 6), "val")) != small  # drawn apart
    assert names(load_split(data_flags(root, 6, sample_seed=-1), "train")) == [f"{i:03d}.png" for i in range(6)]
    added = set(names(load_split(data_flags(yolo(tmp_path, 44), 20), "train")))
    assert len(added & set(large)) >= 16 and added - set(large) <= {f"{i:03d}.png" for i in range(40, 44)}


def test_n_images_are_n_that_can_be_used(tmp_path):
    root = yolo(tmp_path, 20, broken=range(0, 20, 2))
    data = load_split(data_flags(root, 8), "train")
    assert len(data) == 8 and all(int(name[:3]) % 2 for name in names(data))
    assert data.notes[0].startswith("left out 10 images that cannot be read")
    with pytest.raises(InputError, match="refused by --strict"):
        load_split(data_flags(root, 8, strict=True), "train")


def test_classes_of_validation_alone_and_those_without_a_training_object_are_named(demo, caplog):
    train, val = load_train_and_val(data_flags(demo, 2))
    other = replace(val, class_names=("Disc", *val.class_names[1:]))
    check_classes(train, other)
    with pytest.raises(InputError, match=r"1 classes are not among those of .*train2017\.json \(Disc\) \(refused by"):
        check_classes(train, other, strict=True)
    shown = {train.class_names[label] for label in train.labels}
    assert f"no training image shows {10 - len(shown)} classes" in caplog.text and len(val) == 2


def test_images_are_chosen_by_id_or_name_each_once(demo, demo_val, tmp_path):
    listed, root = tmp_path / "ids.txt", yolo(tmp_path / "set")
    chosen = [demo_val.images[i] for i in (4, 1)]
    listed.write_text(f"# two\nval {chosen[0].id} # by id\n\nval  {chosen[1].path.name}\ntrain 1\n")
    data = load_split(data_flags(demo, image_ids=str(listed)), "val")
    assert [image.id for image in data.images] == [image.id for image in chosen]
    with pytest.raises(InputError, match="names 2 val images: give --val-images 0 with it"):
        load_split(data_flags(demo, 1, image_ids=str(listed)), "val")
    listed.write_text("val 5\nval 001.png")
    with pytest.raises(InputError, match=r"lacks 1 of the 2 requested images \(5\): they have no ids, give names"):
        load_split(data_flags(root, image_ids=str(listed)), "val")  # ids of YOLO are positions
    for content, message in {
        "val 1\nval 2\nval  1": "names an image twice: list each once",
        "9": "the line '9' is no train or val",
        "tset 9": "the line 'tset 9' is no train or val",
        "train 9": "names no val images",
    }.items():
        listed.write_text(content)
        with pytest.raises(InputError, match=message):
            read_chosen(listed, "val")
    with pytest.raises(InputError, match="cannot read"):
        read_chosen(tmp_path / "none.txt", "val")


def test_data_without_objects_are_refused_in_training_and_warned_of_in_validation(tmp_path, caplog):
    root, lacks = yolo(tmp_path), r"of its 0 boxes none is an object \(crowds, in VOC difficult, are not\)"
    for part in ("val", "train"):
        for label in (root / "labels" / part).iterdir():
            label.write_text("")
        for load in (load_train_and_val, lambda flags: load_split(flags, "val")) if part == "val" else ():
            caplog.clear()
            load(data_flags(root))
            assert "so that mAP cannot be computed" in caplog.text
            with pytest.raises(InputError, match=rf"{lacks}, so that mAP cannot be computed.*refused by --strict"):
                load(data_flags(root, strict=True))
    with pytest.raises(InputError, match=rf"{lacks}; there is nothing to learn"):
        load_train_and_val(data_flags(root))


def test_notes_are_logged_and_refused_by_strict(coco_file, caplog):
    path, images = coco_file([annotation(), annotation(bbox=[1, 1, 0, 0])])
    flags = data_flags("", val_json=str(path), val_images_dir=str(images))
    assert load_split(flags, "val").boxes.tolist() == [[10, 20, 30, 5]]
    assert "left out 1 boxes without area (a.png)" in caplog.text
    with pytest.raises(InputError, match=r"without area \(a\.png\) \(refused by --strict\)"):
        load_split(replace(flags, strict=True), "val")
