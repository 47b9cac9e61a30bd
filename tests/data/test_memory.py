"""A data set in memory: labels, boxes by image, selections, fingerprints."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import load_coco


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


def test_categories_with_gaps_become_contiguous_labels(coco_file):
    data = load_coco(*coco_file([annotation(category_id=7), annotation()], categories=((7, "dog"), (3, "cat"))))
    assert data.category_ids == (3, 7) and data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0]


def test_boxes_stay_with_their_image_in_any_order_of_the_file(coco_file):
    data = load_coco(*coco_file([annotation(image_id=5, bbox=[1, 2, 3, 4]), annotation(), annotation(iscrowd=1)]))
    assert data.boxes.tolist() == [[10, 20, 30, 5], [10, 20, 30, 5], [1, 2, 3, 4]]  # as in the file
    target = data.target(0)
    assert target.boxes.tolist() == [[10, 20, 40, 25]] * 2 and target.crowd.tolist() == [False, True]
    assert data.target(1).boxes.tolist() == [[1, 2, 4, 6]] and data.target(1).meta.size == (80, 40)


def test_images_without_boxes_stay(coco_file):
    data = load_coco(*coco_file([annotation(image_id=5)]))
    assert len(data) == 2 and data.target(0).boxes.shape == (0, 4) and data.with_objects().tolist() == [1]
    assert load_coco(*coco_file([])).target(1).boxes.shape == (0, 4)


def test_a_selection_keeps_its_order_and_its_boxes(coco_file):
    whole = load_coco(*coco_file([annotation(), annotation(id=2, image_id=5, bbox=[1, 2, 3, 4])]))
    turned = whole.select(np.array([1, 0]))
    assert [image.id for image in turned.images] == [5, 11] and turned.boxes.tolist() == whole.boxes[::-1].tolist()
    assert whole.first(1).boxes.tolist() == [[10, 20, 30, 5]] and len(whole.first(9)) == 2


def test_the_fingerprint_tells_what_differs(coco_file):
    data = load_coco(*coco_file([annotation()]))
    assert data.fingerprint() == load_coco(*coco_file([annotation()])).fingerprint()
    renamed = tuple(replace(image, path=image.path.with_suffix(".jpg")) for image in data.images)
    changes = {"images": renamed, "boxes": data.boxes + 1e-9, "class_names": ("a", "b"), "crowd": ~data.crowd}
    prints = [replace(data, **{name: value}).fingerprint() for name, value in changes.items()]
    assert len({data.fingerprint(), data.first(1).fingerprint(), *prints}) == 6


def test_class_shares_count_objects_but_no_crowds(coco_file):
    boxes = [annotation(), annotation(id=2, category_id=7), annotation(id=3, image_id=5, category_id=7)]
    path, images = coco_file([*boxes, annotation(id=4, image_id=5, iscrowd=1)], categories=((3, "cat"), (7, "dog")))
    assert load_coco(path, images).class_shares().tolist() == pytest.approx([1 / 3, 2 / 3])
    assert load_coco(*coco_file([])).class_shares().tolist() == [0, 0]
