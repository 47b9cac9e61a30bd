"""The evaluation compared with pycocotools, scikit-learn and the ground truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import crowded, data_flags, numbers_of, pycocotools_numbers, random_detections, truth_as_detections
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from common.data.sources import load_split
from common.evaluate.detections import DetectionTable, detection_table
from common.evaluate.metrics import (
    COCO_NUMBERS,
    average_precision,
    coco_numbers,
    match_detections,
    operating_point,
    precision_at_recalls,
)
from common.evaluate.primary import PrimaryPairs, primary_numbers, primary_pairs, weighted_scores
from common.types import Detections


def with_boxes(data, count):
    """The same data with the first `count` boxes alone."""
    kept = {k: getattr(data, k)[:count] for k in ("boxes", "labels", "crowd", "areas")}
    return replace(data, starts=np.minimum(data.starts, count), **kept)


def check_against_pycocotools(table, data):
    numbers, expected = coco_numbers(match_detections(table, data)), pycocotools_numbers(table, data)
    ours = [-1 if numbers[name] is None else numbers[name] for name in COCO_NUMBERS]
    assert ours == pytest.approx(expected.tolist(), abs=1e-12)
    return numbers


def test_the_numbers_equal_pycocotools(demo_val):
    """Scores are multiples of 1/60, so that many are tied; the second half of the images has no objects."""
    data = with_boxes(crowded(demo_val), demo_val.starts[3])
    numbers = check_against_pycocotools(detection_table(random_detections(demo_val, 3, 200), data), data)
    of_classes = [c.AP50 for c in numbers["per_class"].values() if c.AP50 is not None]
    assert 0 < numbers["AP50"] == pytest.approx(np.mean(of_classes)) and len(of_classes) < 10
    assert np.mean(numbers["precision_at_recall"]["0.75"]) == pytest.approx(numbers["AP75"])


def test_the_ground_truth_as_detections_has_an_ap_of_one(demo_val):
    for data in (demo_val, crowded(demo_val)):
        found = truth_as_detections(data)
        check_against_pycocotools(detection_table(found, data), data)
        numbers = numbers_of(found, data)
        assert numbers["AP"] == numbers["AR100"] == numbers["class_agnostic_AP50"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.real
def test_the_numbers_equal_pycocotools_on_real_annotations(assets):
    data = load_split(data_flags(str(assets / "coco-subset")), "val")
    assert numbers_of(truth_as_detections(data), data)["AP"] == pytest.approx(1)
    check_against_pycocotools(detection_table(random_detections(data, 0), data), data)


def test_precision_by_hand(demo_val):
    """Three objects of one class; right, wrong, right: precision 1 up to recall 1/3, 2/3 up to recall 2/3, then 0."""
    data = replace(with_boxes(demo_val.first(1), 3), labels=np.zeros(3, np.int64))
    boxes = data.boxes[[0, 0, 1]] + [[0, 0, 0, 0], [900, 0, 0, 0], [0, 0, 0, 0]]
    zeros, scores = np.zeros(3, np.int64), np.array([0.9, 0.8, 0.7])
    matched = match_detections(DetectionTable(zeros, boxes, scores, zeros), data)
    assert precision_at_recalls(matched)[0].tolist() == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34)
    assert average_precision(matched)[0, 0] == pytest.approx((34 + 22) / 101)
    assert np.isnan(average_precision(matched)[:, 1:]).all()


def test_no_detections_have_an_ap_of_zero_and_no_objects_have_no_ap(demo_val):
    nothing = [Detections(p.id, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for p in demo_val.images]
    numbers = numbers_of(nothing, demo_val)
    assert numbers["AP"] == numbers["class_agnostic_AP50"] == 0
    assert [numbers[name] for name in ("accuracy", "precision", "recall", "f1", "mean_iou", "found")] == [0] * 6
    numbers = numbers_of(random_detections(demo_val, 0), with_boxes(demo_val, 0))
    assert numbers["AP"] is None and numbers["accuracy"] is None


def test_operating_point_is_the_best_of_all_thresholds(demo_val):
    matched = match_detections(detection_table(random_detections(demo_val, 0), demo_val), demo_val)
    point, score, hit = operating_point(matched), matched.table.score, matched.hit[0]
    right = {s: hit[score >= s].sum() for s in np.unique(score)}
    best = max(2 * count / ((score >= s).sum() + len(demo_val.labels)) for s, count in right.items())
    assert point.f1 == pytest.approx(best)
    assert point.precision == pytest.approx(hit[score >= point.score].mean())
    assert point.recall == pytest.approx(right[point.score] / len(demo_val.labels))


def test_weighted_scores_equal_scikit_learn_under_any_weighting_of_the_images():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, answer, iou, found = (
            rng.integers(0, 6, 40),
            rng.integers(-1, 8, 40),
            rng.random(40),
            rng.random(40) < 0.5,
        )
        weights = np.column_stack([np.ones(40), rng.integers(0, 4, 40)])
        ours = weighted_scores(PrimaryPairs(np.arange(40), truth, answer, iou, found), weights)
        for column, own in enumerate(weights.T):
            options = {"average": "weighted", "zero_division": 0, "sample_weight": own}
            precision, recall, f1, _ = precision_recall_fscore_support(truth, answer, **options)
            expected = {"precision": precision, "recall": recall, "f1": f1}
            expected |= {"accuracy": accuracy_score(truth, answer, sample_weight=own)}
            expected |= {"mean_iou": np.average(iou, weights=own), "found": np.average(found, weights=own)}
            assert {key: values[column] for key, values in ours.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shift", "other_label", "score", "expected"),
    [
        (0.0, 0, 0.5, 1.0),
        (0.3, 0, 0.5, 1.0),  # an IoU of 0.54
        (0.4, 0, 0.5, 0.0),  # 0.43
        (0.0, 1, 0.5, 0.0),
        (0.0, 0, 0.49, 0.0),  # below the operating point
    ],
)
def test_the_largest_object_against_the_best_detection_and_any_other(demo_val, shift, other_label, score, expected):
    """The detection of the highest score is something else, which the study's columns count as wrong."""
    data, detections = demo_val.first(4), []
    for index in reversed(range(4)):
        boxes, labels = data.target(index).boxes, data.target(index).labels
        largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
        moved = boxes[largest] + shift * (boxes[largest, 2] - boxes[largest, 0]) * torch.tensor([1, 0, 1, 0])
        boxes = torch.stack([torch.tensor([0.0, 0, 3, 3]), moved])
        labels = torch.stack([labels[largest], (labels[largest] + other_label) % 10])
        detections.append(Detections(data.images[index].id, boxes, torch.tensor([0.9, score]), labels))

    def numbers(found):
        return primary_numbers(primary_pairs(match_detections(detection_table(found, data), data), 0.5))

    assert numbers(detections)["found"] == expected and numbers(detections)["mean_iou"] < 0.1
    alone = [replace(d, boxes=d.boxes[1:], scores=d.scores[1:], labels=d.labels[1:]) for d in detections]
    assert numbers(alone)["accuracy"] == 1 - other_label
    assert numbers(alone[:2])["mean_iou"] == pytest.approx((1 - shift) / (1 + shift) / 2)
