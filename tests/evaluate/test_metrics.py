"""The evaluation compared with pycocotools, scikit-learn and the ground truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import crowded, data_flags, numbers_of, pycocotools_numbers, random_detections, truth_as_detections
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torchvision.ops import box_convert

from common.data.sources import load_split
from common.evaluate.detections import detection_table, label_map
from common.evaluate.metrics import COCO_NUMBERS, Matches, coco_numbers, match_detections, precision_at_recalls
from common.evaluate.primary import PrimaryPairs, primary_numbers, primary_pairs, weighted_scores
from common.types import Detections


def numbered_from_zero(data):
    """The same data with image and category ids from 0."""
    images = tuple(replace(image, id=index) for index, image in enumerate(data.images))
    return replace(data, images=images, category_ids=tuple(range(len(data.class_names))))


def half_empty(data):
    """The same data, its second half without objects."""
    end = data.starts[len(data) // 2]
    kept = {k: getattr(data, k)[:end] for k in ("boxes", "labels", "crowd", "areas")}
    return replace(data, starts=np.minimum(data.starts, end), **kept)


SITUATIONS = {  # a change of the data, and the number of random boxes among the detections of an image
    "random": (lambda data: data, 30),
    "crowds": (crowded, 30),
    "ids from 0": (numbered_from_zero, 30),
    "images without objects": (half_empty, 30),
    "more than 100 detections": (crowded, 1500),
    "perfect": (lambda data: data, None),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_numbers_equal_pycocotools(demo_val, situation):
    """Scores are multiples of 1/60, so that many are tied."""
    change, count = SITUATIONS[situation]
    data = change(demo_val)
    found = truth_as_detections(data) if count is None else random_detections(data, 3, count)
    table = detection_table(found, data)
    numbers, expected = coco_numbers(match_detections(table, data), data), pycocotools_numbers(table, data)
    for name, value in zip(COCO_NUMBERS, expected, strict=True):
        assert (-1 if numbers[name] is None else numbers[name]) == pytest.approx(value, abs=1e-12), name
    assert 0 < numbers["AP"] < 1 or count is None


def test_the_ground_truth_as_detections_has_an_ap_of_one(demo_val):
    for data in (demo_val, crowded(demo_val)):
        numbers = numbers_of(truth_as_detections(data), data)
        assert numbers["AP"] == numbers["AP50"] == numbers["AP75"] == numbers["AR100"] == pytest.approx(1)
        assert numbers["class_agnostic_AP50"] == pytest.approx(1)


def test_ap50_is_the_mean_over_the_classes(demo_val):
    matched = match_detections(detection_table(random_detections(demo_val, 5), demo_val), demo_val)
    numbers = coco_numbers(matched, demo_val)
    existing = [c.AP50 for c in numbers["per_class"].values() if c.AP50 is not None]
    assert np.mean(existing) == pytest.approx(numbers["AP50"])


def test_precision_at_recalls_by_hand():
    """Three objects; true, false, true positive: precision 1 up to recall 1/3, 2/3 up to recall 2/3, then 0."""
    box, ignored, zeros = np.array([[0, -1, -1, 1]]), np.array([[False, False, True, False]]), np.zeros(4, np.int64)
    matches = Matches(zeros, zeros, np.array([9, 8, 7.5, 7]), box, ignored, zeros[:3], zeros[:3])
    precision = precision_at_recalls(matches, 2)
    assert precision[0, :, 0].tolist() == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34)
    assert np.isnan(precision[0, :, 1]).all()


def test_no_detections_have_an_ap_of_zero_and_no_objects_have_no_ap(demo_val):
    nothing = [Detections(p.id, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for p in demo_val.images]
    numbers = numbers_of(nothing, demo_val)
    assert numbers["AP"] == numbers["class_agnostic_AP50"] == 0
    assert [numbers[name] for name in ("accuracy", "precision", "recall", "f1", "mean_iou", "found")] == [0] * 6
    bare = replace(
        demo_val,
        **{k: getattr(demo_val, k)[:0] for k in ("boxes", "labels", "crowd", "areas")},
        starts=np.zeros_like(demo_val.starts),
    )
    numbers = numbers_of(random_detections(bare, 0), bare)
    assert numbers["AP"] is None and numbers["accuracy"] is None


def test_labels_are_matched_by_name(demo_val):
    names = ("cat", *reversed(demo_val.class_names))
    labels = label_map(names, demo_val)
    assert labels[0] == -1
    found = [replace(d, labels=10 - d.labels) for d in truth_as_detections(demo_val)]
    assert numbers_of(found, demo_val, labels)["AP"] == pytest.approx(1)


def test_wrong_boxes_and_wrong_classes_have_low_scores(demo_val):
    right = truth_as_detections(demo_val)
    shifted = [replace(d, labels=(d.labels + 1) % 10) for d in right]
    misread = [replace(d, boxes=box_convert(d.boxes, "xywh", "xyxy")) for d in right]
    assert numbers_of(shifted, demo_val)["AP50"] < 0.1
    assert numbers_of(misread, demo_val)["AP50"] < 0.5


def test_weighted_scores_equal_scikit_learn_under_any_weighting_of_the_images():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, answer, iou = rng.integers(0, 6, 40), rng.integers(-1, 8, 40), rng.random(40)
        weights = np.column_stack([np.ones(40), rng.integers(0, 4, 40)])
        found = rng.random(40) < 0.5
        ours = weighted_scores(PrimaryPairs(np.arange(40), truth, answer, iou, found), weights)
        for column, own in enumerate(weights.T):
            options = {"average": "weighted", "zero_division": 0, "sample_weight": own}
            theirs = precision_recall_fscore_support(truth, answer, **options)[:3]
            assert [ours[key][column] for key in ("precision", "recall", "f1")] == pytest.approx(theirs)
            accuracy = accuracy_score(truth, answer, sample_weight=own)
            assert [ours["accuracy"][column], ours["recall"][column]] == pytest.approx([accuracy] * 2)
            assert ours["mean_iou"][column] == pytest.approx(np.average(iou, weights=own))
            assert ours["found"][column] == pytest.approx(np.average(found, weights=own))


def primary_numbers_of(detections, data, score):
    matched = match_detections(detection_table(detections, data), data)
    return primary_numbers(primary_pairs(matched, data, score))


def test_primary_object_compares_the_largest_box_with_the_best_detection(demo_val):
    data, right = demo_val.first(2), []
    for index in range(2):
        boxes, labels = data.target(index).boxes, data.target(index).labels
        largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
        boxes = torch.stack([boxes[largest] + 1000, boxes[largest]])
        tensors = boxes, torch.tensor([0.2, 0.9]), labels[largest].repeat(2)
        right.append(Detections(data.images[index].id, *tensors))
    scores = primary_numbers_of(right, data, 0.9)
    assert scores["accuracy"] == 1 and scores["mean_iou"] == pytest.approx(1)
    scores = primary_numbers_of(right[:1], data, 0.9)
    assert scores["accuracy"] == 0.5 and scores["mean_iou"] == pytest.approx(0.5)


def test_the_largest_object_is_found_by_any_detection_from_the_operating_point_on(demo_val):
    """The answer is a surer detection of something else, which the study's columns count as wrong."""
    data = demo_val.first(4)

    def found(box_shift=0.0, label_shift=0, score=0.5):
        detections = []
        for index in reversed(range(4)):
            boxes, labels = data.target(index).boxes, data.target(index).labels
            largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
            side = boxes[largest, 2] - boxes[largest, 0]
            shift = box_shift * side * torch.tensor([1, 0, 1, 0])
            boxes = torch.stack([torch.tensor([0.0, 0, 3, 3]), boxes[largest] + shift])
            labels = torch.stack([labels[0], (labels[largest] + label_shift) % 10])
            detections.append(Detections(data.images[index].id, boxes, torch.tensor([0.9, score]), labels))
        return primary_numbers_of(detections, data, 0.5)

    assert found()["found"] == 1 and found()["mean_iou"] < 0.1
    assert found(box_shift=0.3)["found"] == 1  # an IoU of 0.54
    assert found(box_shift=0.4)["found"] == 0  # 0.43
    assert found(label_shift=1)["found"] == 0
    assert found(score=0.49)["found"] == 0


@pytest.mark.slow
@pytest.mark.real
def test_the_numbers_equal_pycocotools_on_real_annotations(assets):
    data = load_split(data_flags(str(assets / "coco-subset")), "val")
    assert numbers_of(truth_as_detections(data), data)["AP"] == pytest.approx(1)
    table = detection_table(random_detections(data, 0), data)
    numbers, expected = coco_numbers(match_detections(table, data), data), pycocotools_numbers(table, data)
    assert [numbers[name] for name in COCO_NUMBERS] == pytest.approx(expected.tolist(), abs=1e-12)
