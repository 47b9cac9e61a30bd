"""A data set in memory: labels, boxes by image, selections, fingerprints."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import annotation, load_coco


def test_labels_are_contiguous_and_boxes_stay_with_their_image_in_any_order_of_the_file(coco_file):
    entries = [annotation(image_id=5, bbox=[1, 2, 3, 4]), annotation(category_id=7), annotation(iscrowd=1)]
    data = load_coco(*coco_file(entries, categories=((7, "dog"), (3, "cat"))))
    assert data.category_ids == (3, 7) and data.class_names == ("cat", "dog") and data.labels.tolist() == [1, 0, 0]
    assert data.boxes.tolist() == [[10, 20, 30, 5], [10, 20, 30, 5], [1, 2, 3, 4]]  # as in the file
    target = data.target(0)
    assert target.boxes.tolist() == [[10, 20, 40, 25]] * 2 and target.crowd.tolist() == [False, True]
    assert data.target(1).boxes.tolist() == [[1, 2, 4, 6]] and data.target(1).meta.size == (80, 40)


def test_images_without_boxes_stay_and_a_selection_keeps_its_order_and_its_boxes(coco_file):
    data = load_coco(*coco_file([annotation(image_id=5)]))
    assert len(data) == 2 and data.target(0).boxes.shape == (0, 4) and data.with_objects().tolist() == [1]
    assert load_coco(*coco_file([])).target(1).boxes.shape == (0, 4)
    whole = load_coco(*coco_file([annotation(), annotation(image_id=5, bbox=[1, 2, 3, 4])]))
    turned = whole.select(np.array([1, 0]))
    assert [image.id for image in turned.images] == [5, 11] and turned.boxes.tolist() == whole.boxes[::-1].tolist()
    assert whole.select(np.arange(1)).boxes.tolist() == [[10, 20, 30, 5]]


def test_the_fingerprint_tells_what_differs(coco_file):
    data = load_coco(*coco_file([annotation()]))
    assert data.fingerprint() == load_coco(*coco_file([annotation()])).fingerprint()
    renamed = tuple(replace(image, path=image.path.with_suffix(".jpg")) for image in data.images)
    changes = {"images": renamed, "boxes": data.boxes + 1e-9, "class_names": ("a", "b"), "crowd": ~data.crowd}
    prints = [replace(data, **{name: value}).fingerprint() for name, value in changes.items()]
    assert len({data.fingerprint(), data.select(np.arange(1)).fingerprint(), *prints}) == 6


def test_class_shares_count_objects_but_no_crowds_and_each_image_alike(coco_file):
    boxes = [annotation(), annotation(category_id=7), annotation(image_id=5, category_id=7), annotation(iscrowd=1)]
    data = load_coco(*coco_file(boxes, categories=((3, "cat"), (7, "dog"))))
    assert data.class_shares().tolist() == pytest.approx([1 / 4, 3 / 4])
    assert load_coco(*coco_file([])).class_shares().tolist() == [0, 0]
