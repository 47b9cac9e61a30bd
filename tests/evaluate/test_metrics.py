"""The numbers compared with pycocotools, scikit-learn and the ground truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import crowded, evaluated, load_coco, pycocotools_numbers, pycocotools_stats, random_detections
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from common.evaluate.detections import DetectionTable, detection_table, read_detections
from common.evaluate.metrics import COCO_NUMBERS, average_precision, coco_numbers, match_detections, operating_point
from common.evaluate.primary import PrimaryPairs, primary_numbers, primary_pairs, weighted_scores

IMAGES, CLASSES = 8, (1, 2, 90)
STEPS = (1.0, 0.25, 0.1, 0.01, None)  # multiples of which the coordinates are; None: all digits of a float


def on_grid(values, step):
    return values.tolist() if step is None else [round(round(value / step) * step, 6) for value in values.tolist()]


def adversarial(seed, image_ids):
    """COCO ground truth and results: IoU on thresholds, tied scores, duplicates, crowds, tiny and empty boxes.

    A detection that is its object shortened to t of its width or height has IoU t; one shifted so that a share s
    overlaps has s / (2 - s).
    """
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for index, image_id in enumerate(image_ids):
        for _ in range(rng.integers(0, 9) if index else 150):  # the first image has more than 100 detections of a class
            step = STEPS[rng.integers(len(STEPS))]
            category = CLASSES[rng.integers(len(CLASSES))] if index else 1
            x, y, w, h = on_grid(rng.uniform((0, 0, 2, 2), (300, 200, 200, 200)), step)
            truth = {"image_id": image_id, "category_id": category, "bbox": [x, y, w, h]}
            truth |= {"iscrowd": int(rng.random() < 0.15), "area": w * h * rng.choice([1.0, 0.5])}
            annotations.append(truth | {"id": len(annotations) + 1})
            share = rng.choice([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1 / 3, 2 / 3, 0.0])
            shift = w * (1 - 2 * share / (1 + share))
            boxes = [[x, y, w * share, h], [x, y, w, h * share], [x + shift, y, w, h], [x, y, w, h]]
            for box in rng.permutation(np.array(boxes))[: rng.integers(1, 4)].tolist() + boxes[-1:]:
                score = int(rng.integers(1, 6)) / 5
                label = category if rng.random() < 0.8 else CLASSES[rng.integers(len(CLASSES))]
                results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return annotations, [results[i] for i in rng.permutation(len(results))]


IDS = {
    "small": list(range(1, IMAGES + 1)),
    "unsorted": [7, 3, 9, 1, 100, 2, 50, 4],
    "beyond 2^53": [2**53 + 1 + n for n in range(IMAGES)],
    "up to 2^63": [2**63 - 1 - n for n in range(IMAGES)],
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("seed", range(5))
def test_adversarial_lists_give_the_numbers_of_pycocotools(tmp_path, seed, ids):
    annotations, results = adversarial(seed, IDS[ids])
    images = [{"id": i, "file_name": f"image{n}.jpg", "width": 640, "height": 480} for n, i in enumerate(IDS[ids])]
    categories = [{"id": number, "name": f"class {number}"} for number in CLASSES]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    for image in images:
        (tmp_path / image["file_name"]).touch()
    data = load_coco(tmp_path / "truth.json", tmp_path)
    numbers = evaluated(read_detections(str(tmp_path / "results.json"), data).table, data).record.detection
    expected = pycocotools_stats(truth, results)
    assert [getattr(numbers, name) for name in COCO_NUMBERS] == pytest.approx(expected.tolist(), abs=1e-12)
    assert 0.1 < expected[0] < 0.9


def with_boxes(data, count):
    """The same data with the first `count` boxes alone."""
    kept = {k: getattr(data, k)[:count] for k in ("boxes", "labels", "crowd", "areas")}
    return replace(data, starts=np.minimum(data.starts, count), **kept)


def test_numbers_of_classes_and_curves_agree_with_the_whole(demo_val):
    """Scores are multiples of 1/60, so that many are tied; the second half of the images has no objects."""
    data = with_boxes(crowded(demo_val), demo_val.starts[3])
    table = detection_table(random_detections(demo_val, 3, 200), data)
    numbers, expected = coco_numbers(match_detections(table, data)), pycocotools_numbers(table, data)
    ours = [-1 if numbers[name] is None else numbers[name] for name in COCO_NUMBERS]
    assert ours == pytest.approx(expected.tolist(), abs=1e-12)
    of_classes = [c.AP50 for c in numbers["per_class"].values() if c.AP50 is not None]
    assert 0 < numbers["AP50"] == pytest.approx(np.mean(of_classes)) and len(of_classes) < 10
    assert np.mean(numbers["precision_at_recall"]["0.75"]) == pytest.approx(numbers["AP75"])


def test_precision_by_hand(demo_val):
    """Three objects of one class; right, wrong, right: precision 1 up to recall 1/3, 2/3 up to recall 2/3, then 0."""
    data = replace(with_boxes(demo_val.select(np.arange(1)), 3), labels=np.zeros(3, np.int64))
    boxes = data.boxes[[0, 0, 1]] + [[0, 0, 0, 0], [900, 0, 0, 0], [0, 0, 0, 0]]
    zeros, scores = np.zeros(3, np.int64), np.array([0.9, 0.8, 0.7])
    matched = match_detections(DetectionTable(zeros, boxes, scores, zeros), data)
    curve = coco_numbers(matched)["precision_at_recall"]["0.5"]
    assert curve == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34)
    assert average_precision(matched)[0, 0] == pytest.approx((34 + 22) / 101)
    assert np.isnan(average_precision(matched)[:, 1:]).all()


def test_operating_point_is_the_best_of_all_thresholds(demo_val):
    matched = match_detections(detection_table(random_detections(demo_val, 0), demo_val), demo_val)
    point, score, hit = operating_point(matched), matched.table.score, matched.hit[0]
    right = {s: hit[score >= s].sum() for s in np.unique(score)}
    best = max(2 * count / ((score >= s).sum() + len(demo_val.labels)) for s, count in right.items())
    assert point.f1 == pytest.approx(best)
    assert point.precision == pytest.approx(hit[score >= point.score].mean())
    assert point.recall == pytest.approx(right[point.score] / len(demo_val.labels))


@pytest.mark.parametrize("seed", range(5))
def test_weighted_scores_equal_scikit_learn_under_any_weighting_of_the_images(seed):
    rng = np.random.default_rng(seed)
    truth, answer = rng.integers(0, 6, 40), rng.integers(-1, 8, 40)
    iou, found = rng.random(40), rng.random(40) < 0.5
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
    data = demo_val.select(np.arange(4))
    order = np.lexsort((data.boxes[:, 2:].prod(1), data.image_of_box()))
    largest = order[data.starts[4:0:-1] - 1]  # of the last image first
    boxes = data.boxes[largest] + shift * data.boxes[largest, 2:3] * [1, 0, 0, 0]
    boxes, images = np.concatenate([boxes, np.tile([0, 0, 3, 3], (4, 1))]), np.tile([3, 2, 1, 0], 2)
    labels = np.append((data.labels[largest] + other_label) % 10, data.labels[largest])
    both = DetectionTable(images, boxes, np.repeat([score, 0.9], 4), labels)
    alone = both.select(np.arange(4))

    def numbers(found):
        return primary_numbers(primary_pairs(match_detections(found, data), 0.5))

    assert numbers(both)["found"] == expected and numbers(both)["mean_iou"] < 0.1
    assert numbers(alone)["accuracy"] == 1 - other_label
    assert numbers(alone.select(np.arange(2)))["mean_iou"] == pytest.approx((1 - shift) / (1 + shift) / 2)
