"""COCO annotations in memory: labels, boxes by image, limits."""

import pytest

from common.data.table import load_coco


def annotation(**parts):
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


def test_categories_with_gaps_become_contiguous_labels(coco_file):
    data = load_coco(*coco_file([annotation(category_id=7), annotation()], categories=((7, "dog"), (3, "cat"))))
    assert data.category_ids == (3, 7) and data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0]


def test_boxes_stay_with_their_image_in_any_order_of_the_file(coco_file):
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


def test_class_shares_count_objects_but_no_crowds(coco_file):
    boxes = [annotation(), annotation(id=2, category_id=7), annotation(id=3, image_id=5, category_id=7)]
    path, images = coco_file([*boxes, annotation(id=4, image_id=5, iscrowd=1)], categories=((3, "cat"), (7, "dog")))
    assert load_coco(path, images).class_shares().tolist() == pytest.approx([1 / 3, 2 / 3])
    assert load_coco(*coco_file([])).class_shares().tolist() == [0, 0]
