"""Which annotation file and images `--data` names."""

import pytest
from helpers import data_flags

from common.console import InputError
from common.data.sources import load_split

ANNOTATION = {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0}


def test_layouts_of_coco_and_roboflow_and_explicit_files(demo, tmp_path):
    expected = load_split(data_flags(str(demo)), "val").fingerprint()
    roboflow = tmp_path / "roboflow" / "valid"
    roboflow.mkdir(parents=True)
    for image in (demo / "val2017").iterdir():
        (roboflow / image.name).write_bytes(image.read_bytes())
    annotations = demo / "annotations" / "instances_val2017.json"
    (roboflow / "_annotations.coco.json").write_bytes(annotations.read_bytes())
    assert load_split(data_flags(str(roboflow.parent)), "val").fingerprint() == expected
    explicit = data_flags("nowhere", val_json=str(annotations), val_images_dir=str(demo / "val2017"))
    assert load_split(explicit, "val").fingerprint() == expected
    with pytest.raises(InputError, match="no train split"):
        load_split(data_flags(str(roboflow.parent)), "train")
    with pytest.raises(InputError, match="go together"):
        load_split(data_flags("nowhere", val_json=str(annotations)), "val")


def test_boxes_left_out_are_printed(coco_file, capsys):
    path, images = coco_file([ANNOTATION, ANNOTATION | {"id": 2, "bbox": [1, 1, 0, 0]}])
    load_split(data_flags("", val_json=str(path), val_images_dir=str(images)), "val")
    assert "left out 1 boxes without area (a.png)" in capsys.readouterr().out
