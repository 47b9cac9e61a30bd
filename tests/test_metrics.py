"""The evaluator against its references: pycocotools, scikit-learn, and the ground truth itself."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from common.boxes import xywh_to_xyxy
from common.metrics import (
    COCO_NUMBERS,
    coco_detections,
    coco_dict,
    coco_numbers,
    detection_table,
    evaluate,
    label_map,
    primary_object,
    weighted_scores,
)
from common.sources import DataSource, load_split
from common.types import Detections


def truth_as_detections(data):
    """Every non-crowd box as a detection of score 1."""
    found = []
    for index, picture in enumerate(data.pictures):
        boxes, labels, crowd = data.picture_boxes(index)
        keep = ~crowd
        found.append(Detections(picture.id, boxes[keep], torch.ones(int(keep.sum())), labels[keep]))
    return found


def random_detections(data, seed, count=30):
    """True boxes, shaken, with some wrong labels, among random boxes; scores with ties."""
    rng, found = np.random.default_rng(seed), []
    for index, picture in enumerate(data.pictures):
        boxes, labels, _ = data.picture_boxes(index)
        shaken = boxes.numpy() + rng.normal(0, 6, boxes.shape)
        corner = rng.uniform(0, 200, (count, 2))
        boxes = np.concatenate([shaken, np.hstack([corner, corner + rng.uniform(5, 150, (count, 2))])])
        labels = np.concatenate([labels.numpy(), rng.integers(0, len(data.class_names), count)])
        wrong = rng.random(len(labels)) < 0.2
        labels[wrong] = rng.integers(0, len(data.class_names), wrong.sum())
        scores = rng.integers(1, 60, len(labels)) / 60
        tensors = torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), torch.from_numpy(labels)
        found.append(Detections(picture.id, *tensors))
    return found


def crowded(data):
    """The same data with every fifth box a crowd."""
    return replace(data, crowd=np.arange(len(data.crowd)) % 5 == 0)


def pycocotools_numbers(table, data):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_dict(data)
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(coco_detections(table, data.category_ids)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


@pytest.mark.parametrize("seed", range(3))
def test_the_twelve_coco_numbers_equal_pycocotools(demo_val, seed):
    data = crowded(demo_val) if seed else demo_val
    table = detection_table(random_detections(data, seed, count=150), np.arange(10))
    numbers, expected = coco_numbers(table, data), pycocotools_numbers(table, data)
    for name, value in zip(COCO_NUMBERS, expected, strict=True):
        assert (-1 if numbers[name] is None else numbers[name]) == pytest.approx(value, abs=1e-6), name
    assert 0 < numbers["AP"] < 1


def test_ground_truth_as_detections_scores_one(demo_val):
    for data in (demo_val, crowded(demo_val)):
        numbers = evaluate(truth_as_detections(data), data, np.arange(10))["detection"]
        assert numbers["AP"] == numbers["AP50"] == numbers["AP75"] == numbers["AR100"] == pytest.approx(1)
        assert numbers["class_agnostic_AP50"] == pytest.approx(1)


def test_mean_of_the_classes_is_the_whole(demo_val):
    numbers = coco_numbers(detection_table(random_detections(demo_val, 5), np.arange(10)), demo_val)
    existing = [c["AP50"] for c in numbers["per_class"].values() if c["AP50"] is not None]
    assert np.mean(existing) == pytest.approx(numbers["AP50"])


def test_no_detections_score_zero_and_no_objects_have_no_score(demo_val):
    nothing = [Detections(p.id, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for p in demo_val.pictures]
    numbers = evaluate(nothing, demo_val, np.arange(10))
    assert numbers["detection"]["AP"] == numbers["detection"]["class_agnostic_AP50"] == 0
    assert numbers["primary"] == dict.fromkeys(("accuracy", "precision", "recall", "f1", "mean_iou"), 0)
    bare = replace(
        demo_val,
        **{k: getattr(demo_val, k)[:0] for k in ("boxes", "labels", "crowd", "areas")},
        starts=np.zeros_like(demo_val.starts),
    )
    numbers = evaluate(random_detections(bare, 0), bare, np.arange(10))
    assert numbers["detection"]["AP"] is None and numbers["primary"]["accuracy"] is None


def test_labels_are_matched_by_name(demo_val):
    names = ("cat", *reversed(demo_val.class_names))
    labels = label_map(names, demo_val)
    assert labels[0] == -1
    found = [replace(d, labels=10 - d.labels) for d in truth_as_detections(demo_val)]
    assert evaluate(found, demo_val, labels)["detection"]["AP"] == pytest.approx(1)


def test_wrong_boxes_and_wrong_classes_are_punished(demo_val):
    right = truth_as_detections(demo_val)
    shifted = [replace(d, labels=(d.labels + 1) % 10) for d in right]
    misread = [replace(d, boxes=xywh_to_xyxy(d.boxes)) for d in right]
    assert evaluate(shifted, demo_val, np.arange(10))["detection"]["AP50"] < 0.1
    assert evaluate(misread, demo_val, np.arange(10))["detection"]["AP50"] < 0.5


def test_weighted_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, answer = rng.integers(0, 6, 40), rng.integers(-1, 8, 40)
        ours = weighted_scores(truth, answer)
        theirs = precision_recall_fscore_support(truth, answer, average="weighted", zero_division=0)
        assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx(theirs[:3])
        assert [ours["accuracy"], ours["recall"]] == pytest.approx([accuracy_score(truth, answer)] * 2)


def test_primary_object_compares_the_largest_box_with_the_best_detection(demo_val):
    data, right = demo_val.first(2), []
    for index in range(2):
        boxes, labels, _ = data.picture_boxes(index)
        largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
        boxes = torch.stack([boxes[largest] + 1000, boxes[largest]])
        tensors = boxes, torch.tensor([0.2, 0.9]), labels[largest].repeat(2)
        right.append(Detections(data.pictures[index].id, *tensors))
    scores = primary_object(detection_table(right, np.arange(10)), data)
    assert scores["accuracy"] == 1 and scores["mean_iou"] == pytest.approx(1)
    scores = primary_object(detection_table(right[:1], np.arange(10)), data)
    assert scores["accuracy"] == 0.5 and scores["mean_iou"] == pytest.approx(0.5)


@pytest.mark.real
def test_real_ground_truth_scores_one_and_random_detections_equal_pycocotools(assets):
    data = load_split(DataSource(str(assets / "coco-subset")), "val")
    assert evaluate(truth_as_detections(data), data, np.arange(80))["detection"]["AP"] == pytest.approx(1)
    table = detection_table(random_detections(data, 0), np.arange(80))
    numbers, expected = coco_numbers(table, data), pycocotools_numbers(table, data)
    assert [numbers[name] for name in COCO_NUMBERS] == pytest.approx(expected.tolist(), abs=1e-6)
