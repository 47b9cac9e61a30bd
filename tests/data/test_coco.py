"""COCO reading, sources, the generated scenes, letterbox and augmentation."""

import filecmp
import json

import numpy as np
import pytest
import torch
from helpers import data_flags
from PIL import Image

from common.console import InputError
from common.data.annotations import load_coco
from common.data.coco import unlabelled_images
from common.data.dataset import DetectionDataset, collate
from common.data.demo import CATEGORY_IDS, draw_scene, make_demo, visible_boxes
from common.data.images import open_image
from common.data.sources import load_split
from common.data.transforms import LetterboxTransform, TrainTransform
from common.types import Letterbox, Target


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


def test_categories_with_gaps_become_contiguous_labels(coco_file):
    data = load_coco(*coco_file([annotation(category_id=7), annotation()], categories=((7, "dog"), (3, "cat"))))
    assert data.category_ids == (3, 7) and data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0]


def test_boxes_stay_with_their_image_whatever_the_order_of_the_file(coco_file):
    data = load_coco(*coco_file([annotation(image_id=5, bbox=[1, 2, 3, 4]), annotation(), annotation(iscrowd=1)]))
    boxes, _, crowd = data.image_boxes(0)
    assert boxes.tolist() == [[10, 20, 40, 25]] * 2 and crowd.tolist() == [False, True]
    assert data.image_boxes(1)[0].tolist() == [[1, 2, 4, 6]]


def test_images_without_boxes_stay(coco_file):
    data = load_coco(*coco_file([annotation(image_id=5)]))
    assert len(data) == 2 and data.image_boxes(0)[0].shape == (0, 4)
    assert load_coco(*coco_file([])).image_boxes(1)[0].shape == (0, 4)


def test_missing_area_and_crowd_flag_have_defaults(coco_file):
    entry = annotation()
    del entry["area"], entry["iscrowd"]
    data = load_coco(*coco_file([entry]))
    assert data.areas.tolist() == [150] and not data.crowd.any()


def test_limit_keeps_the_first_images_and_their_boxes(coco_file):
    path, images = coco_file([annotation(), annotation(id=2, image_id=5)])
    limited, whole = load_coco(path, images, limit=1), load_coco(path, images)
    assert len(limited) == 1 and len(limited.labels) == 1 and not limited.notes
    assert whole.first(1).fingerprint() == limited.fingerprint() != whole.fingerprint()


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
    with pytest.raises(InputError, match="no train part"):
        load_split(data_flags(str(roboflow.parent)), "train")
    with pytest.raises(InputError, match="go together"):
        load_split(data_flags("nowhere", val_json=str(annotations)), "val")


def test_what_was_left_out_is_said(coco_file, capsys):
    path, images = coco_file([annotation(), annotation(id=2, bbox=[1, 1, 0, 0])])
    load_split(data_flags("", val_json=str(path), val_images_dir=str(images)), "val")
    assert "left out 1 boxes without area (a.png)" in capsys.readouterr().out


def test_demo_is_the_same_from_the_same_seed(demo, tmp_path):
    make_demo(tmp_path / "again", train=12, val=6, seed=1)
    make_demo(tmp_path / "other", train=12, val=6, seed=2)
    name = "annotations/instances_train2017.json"
    assert filecmp.cmp(demo / name, tmp_path / "again" / name, shallow=False)
    assert not filecmp.cmp(demo / name, tmp_path / "other" / name, shallow=False)
    assert filecmp.cmp(demo / "train2017/000007.jpg", tmp_path / "again/train2017/000007.jpg", shallow=False)


def test_demo_boxes_enclose_what_shows(demo):
    content = json.loads((demo / "annotations" / "instances_train2017.json").read_text())
    assert {a["category_id"] for a in content["annotations"]} <= set(CATEGORY_IDS)
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed))
        assert 1 <= len(scene.labels) <= 6
        for index, ((x, y, width, height), area, _) in enumerate(visible_boxes(scene)):
            inside = scene.owner[y : y + height, x : x + width] == index
            assert area == inside.sum() == (scene.owner == index).sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert area >= 0.5 * scene.full_areas[index]


@pytest.mark.parametrize("size", [(480, 640), (333, 500), (30, 1000), (640, 640)])
def test_letterbox_round_trip(size):
    letterbox = Letterbox.fit(size, 224)
    boxes = torch.rand(50, 4) * min(size)
    assert max(letterbox.resized) == 224
    assert torch.allclose(letterbox.to_original(letterbox.to_input(boxes)), boxes, atol=1e-3)
    height, width = size
    corner = letterbox.to_input(torch.tensor([0.0, 0.0, width, height]))
    assert corner.tolist() == pytest.approx([0, 0, letterbox.resized[1], letterbox.resized[0]], abs=1e-3)


def painted(width=300, height=200, box=(60, 40, 180, 120)):
    """A black image with a red rectangle, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, box[1] : box[3], box[0] : box[2]] = 255
    target = Target(torch.tensor([box]).float(), torch.tensor([4]), torch.tensor([False]), 1, None)
    return image, target


def red_box(image):
    red, green, blue = image.float()
    rows, columns = torch.nonzero(red - torch.maximum(green, blue) > 60, as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_letterbox_transform_carries_the_box_along():
    image, target = LetterboxTransform(140)(*painted())
    assert image.shape == (3, 140, 140) and image.dtype == torch.uint8
    assert red_box(image) == pytest.approx(target.boxes[0].tolist(), abs=1)


@pytest.mark.parametrize("crop_size", [140, 112])
def test_augmentation_carries_the_box_along(crop_size):
    transform, seen = TrainTransform(140, crop_size), set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = transform(*painted())
        assert image.shape == (3, crop_size, crop_size) and image.dtype == torch.uint8
        assert len(target.boxes) == len(target.labels) == len(target.crowd)
        if len(target.boxes):
            assert red_box(image) == pytest.approx(target.boxes[0].tolist(), abs=2)
            seen.add(tuple(target.boxes[0].round().tolist()))
    assert len(seen) > 30


def test_a_smaller_crop_shows_objects_at_the_same_scale():
    widths = []
    for crop_size in (140, 56):
        torch.manual_seed(0)
        transform = TrainTransform(140, crop_size, scale=(1.0, 1.0))
        found = [transform(*painted(box=(60, 40, 120, 80)))[1].boxes for _ in range(20)]
        widths.append(max((boxes[:, 2] - boxes[:, 0]).max() for boxes in found if len(boxes)))
    assert widths[0] == pytest.approx(widths[1], abs=0.5)


def test_augmentation_depends_on_seed_epoch_and_image_alone(demo):
    data = load_split(data_flags(str(demo)), "train")
    first, second = (DetectionDataset(data, TrainTransform(56), seed=3) for _ in range(2))
    _ = torch.rand(7), first[0]
    assert torch.equal(first[5][0], second[5][0])
    second.set_epoch(1)
    assert not torch.equal(first[5][0], second[5][0])


def test_collate_gives_floats_and_keeps_empty_targets(coco_file):
    data = load_coco(*coco_file([annotation()]))
    batch = collate([DetectionDataset(data, LetterboxTransform(28))[i] for i in range(2)])
    assert batch.images.shape == (2, 3, 28, 28) and batch.images.dtype == torch.float32 and batch.images.max() <= 1
    assert [len(t.boxes) for t in batch.targets] == [1, 0]


def test_user_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("L", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    data = unlabelled_images([tmp_path], ("cat",), (1,))
    assert (data.images[0].width, data.images[0].height) == (40, 80)
    assert open_image(tmp_path / "turned.jpg", (40, 80)).size == (40, 80)
    assert open_image(tmp_path / "turned.jpg", (80, 40)).size == (80, 40)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_damaged_images_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    if content is None:
        Image.new("RGB", (64, 64), "red").save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jpg"):
        open_image(path)


def test_image_of_another_size_than_annotated(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="64x48 pixels, but its annotation says 50x48"):
        open_image(tmp_path / "a.png", (50, 48))
