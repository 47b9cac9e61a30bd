"""The net warns of detections that were not read as they are meant, and is quiet on weak and one-sided detectors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import truth_as_detections

from common.data.memory import DetectionData, ImageFile
from common.evaluate.detections import DetectionTable, detection_table
from common.evaluate.metrics import match_detections
from common.evaluate.trust import check_agreement


@pytest.fixture(scope="module")
def data():
    """Forty images with five objects of ten classes each, without files."""
    rng = np.random.default_rng(0)
    sides = rng.integers(200, 640, (40, 2))
    boxes = rng.uniform(0, (0.7, 0.7, 0.3, 0.3), (40, 5, 4)) * np.tile(sides, 2)[:, None] + (0, 0, 20, 20)
    images = tuple(ImageFile(3 * n + 5, Path(f"{n}.jpg"), *size) for n, size in enumerate(sides.tolist()))
    labels, crowd = rng.integers(0, 10, 200), np.zeros(200, bool)
    arrays = boxes.reshape(-1, 4), labels, crowd, boxes.reshape(-1, 4)[:, 2:].prod(1), np.arange(41) * 5
    return DetectionData(images, tuple(range(1, 11)), tuple("abcdefghij"), *arrays, source="scattered")


def joined(*tables):
    names = ("image", "boxes", "score", "label")
    return DetectionTable(*(np.concatenate([getattr(table, name) for table in tables]) for name in names))


def weak_detections(data):
    """Of half of the objects, with loose boxes and 40% of the classes right, among many others with as high scores."""
    rng, table = np.random.default_rng(1), detection_table(truth_as_detections(data), data)
    table = table.select(rng.random(len(table)) < 0.5)
    boxes = table.boxes + rng.normal(0, 0.12, table.boxes.shape) * np.tile(table.boxes[:, 2:], 2)
    label = np.where(rng.random(len(table)) < 0.4, table.label, rng.integers(0, 10, len(table)))
    others = replace(table, boxes=rng.uniform(0, 200, table.boxes.shape), label=rng.permutation(label))
    tables = joined(replace(table, boxes=boxes, label=label), others, others)
    return replace(tables, score=rng.random(len(tables)))


def large_boxes(data):
    """As of a hardly trained linear head: on some images the largest object with six classes, else boxes of nothing."""
    rng, truth = np.random.default_rng(2), detection_table(truth_as_detections(data), data)
    order = np.lexsort((-truth.boxes[:, 2:].prod(1), truth.image))
    largest = truth.select(order[:75:5])
    copies = [replace(largest, score=0 * largest.score + 0.9, boxes=largest.boxes + shift) for shift in range(3)]
    copies += [replace(copy, label=rng.integers(0, 10, len(largest))) for copy in copies]
    return joined(*copies, replace(truth, score=0 * truth.score + 0.5, boxes=rng.uniform(0, 100, truth.boxes.shape)))


def misread(table, data):
    """The table as it would be if its file had been written in other ways, and words of the warning."""
    size = np.tile(np.array([(image.width, image.height) for image in data.images])[table.image], 2)
    low, sides, side = table.boxes[:, :2], table.boxes[:, 2:], size.max(1, keepdims=True)
    padding = (640 - size[:, :2] * 640 / side) / 2
    boxes = {
        "normalised": table.boxes / size,
        "per cent": 100 * table.boxes / size,
        "thousandths": 1000 * table.boxes / size,
        "of the input": table.boxes * 112 / side,
        "letterboxed": np.hstack([low * 640 / side + padding, sides * 640 / side]),
        "corners": np.hstack([low, low + sides]),
        "centres": np.hstack([low + sides / 2, sides]),
        "y first": table.boxes[:, [1, 0, 3, 2]],
    }
    tables = {name: replace(table, boxes=changed) for name, changed in boxes.items()}
    tables["ids reversed"] = replace(table, image=len(data) - 1 - table.image)
    tables["the next image"] = replace(table, image=(table.image + 1) % len(data))
    yield from ((name, "on an object", changed) for name, changed in tables.items())
    yield "next class", "have their class", replace(table, label=(table.label + 1) % len(data.class_names))
    yield "previous class", "have their class", replace(table, label=(table.label - 1) % len(data.class_names))


@pytest.mark.parametrize("detector", ["perfect", "weak"])
def test_the_net_warns_of_detections_that_were_misread(data, detector):
    table = weak_detections(data) if detector == "weak" else detection_table(truth_as_detections(data), data)
    assert check_agreement(match_detections(table, data)) == []
    for name, words, changed in misread(table, data):
        warnings = check_agreement(match_detections(changed, data))
        assert len(warnings) == 1 and words in warnings[0], name


def test_the_net_is_quiet_on_weak_and_one_sided_detectors(data):
    rng, weak = np.random.default_rng(0), weak_detections(data)
    one_class = replace(data, labels=np.zeros_like(data.labels), class_names=("a",), category_ids=(1,))
    for name, quiet, truth in (
        ("one class", weak.select(weak.label == 3), data),
        ("nearly all of one class", replace(weak, label=np.where(rng.random(len(weak)) < 0.9, 3, weak.label)), data),
        ("few detections", weak.select(rng.random(len(weak)) < 0.1), data),
        ("data of one class", replace(weak, label=np.zeros_like(weak.label)), one_class),
        ("the largest object alone, six times", large_boxes(data), data),
    ):
        assert check_agreement(match_detections(quiet, truth)) == [], name
