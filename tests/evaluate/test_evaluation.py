"""Intervals, verdicts, kinds of errors, calibration, confusion, and the record of a model."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import ROOT, crowded, data_flags, evaluated, random_detections, truth_as_detections

from common.evaluate.bootstrap import MIN_IMAGES_FOR_VERDICT, comparisons, image_weights
from common.evaluate.detections import DetectionTable, detection_table
from common.evaluate.diagnosis import calibration, confusion, error_breakdown
from common.evaluate.evaluation import describe_data, evaluate
from common.evaluate.metrics import match_detections, operating_point
from common.evaluate.primary import primary_numbers, primary_pairs
from common.evaluate.results import ErrorKind


def matched_of(found, data):
    return match_detections(detection_table(found, data), data)


def repeated(data, found, counts):
    """The data set with `counts[i]` copies of image i, each with its own id, and the detections on them."""
    index = np.repeat(np.arange(len(data)), counts)
    large = data.select(index)
    images = tuple(replace(image, id=1000 + n) for n, image in enumerate(large.images))
    copies = [replace(found[i], image_id=image.id) for i, image in zip(index, images, strict=True)]
    return replace(large, images=images), copies


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_equals_a_data_set_with_repeated_images(seed, demo_val):
    """The operating point is that of the original data set: it belongs to the model, not to the resample."""
    torch.manual_seed(seed)
    data, found = crowded(demo_val), random_detections(demo_val, 1)
    found = [replace(f, scores=f.scores + torch.rand(len(f.scores)) / 1000) for f in found]  # no ties
    counts = np.array([0, 2, 1, 3, 0, 1])
    samples = evaluated(found, data, counts[:, None].astype(np.float32)).samples
    large, copies = repeated(data, found, counts)
    pairs = primary_pairs(matched_of(copies, large), operating_point(matched_of(found, data)).score)
    record = evaluated(copies, large).record
    expected = vars(record.detection) | vars(record.primary) | {"found": primary_numbers(pairs)["found"]}
    assert len(samples) == 9
    for name, sample in samples.items():
        assert sample.resamples[0] == pytest.approx(expected[name], abs=1e-9), name


def test_intervals_contain_the_number_and_shrink_with_more_images(demo_val):
    found = random_detections(demo_val, 0)
    weights = image_weights(len(demo_val), seed=0)
    assert weights.min() > 0 and weights.mean() == pytest.approx(1, abs=0.05)
    number = evaluated(found, demo_val, weights).samples["AP50"]
    low, high = number.interval()
    assert low < number.value < high and high - low > 0.02
    assert number.interval(99)[0] < low and high < number.interval(99)[1]
    large, copies = repeated(demo_val, found, np.full(6, 8))
    low2, high2 = evaluated(copies, large, image_weights(48, seed=0)).record.intervals["AP50"]
    assert high2 - low2 < (high - low) / 2


def test_verdicts(demo_val):
    """Perfect detections are better than noisy ones, which are not distinguishable from themselves."""
    weights = image_weights(len(demo_val), seed=0)
    perfect = evaluated(truth_as_detections(demo_val), demo_val, weights).samples
    noisy = evaluated(random_detections(demo_val, 0), demo_val, weights).samples
    models = {"noisy": noisy, "perfect": perfect, "again": noisy}
    verdicts = [(p.a, p.b, p.numbers["AP50"].verdict) for p in comparisons(models, MIN_IMAGES_FOR_VERDICT)]
    told_apart = [("noisy", "perfect", "worse"), ("perfect", "again", "better")]
    assert sorted(verdicts) == sorted([*told_apart, ("noisy", "again", "not distinguishable")])
    few = comparisons(models, MIN_IMAGES_FOR_VERDICT - 1)
    assert {number.verdict for pair in few for number in pair.numbers.values()} == {"too few images"}


def shrunk(boxes):
    """A third of the area in the upper left corner."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * 0.58], dim=1)


def test_each_kind_of_error_is_recognised(demo_val):
    """With one kind of error in every fourth detection, only that kind has a gain, which is what AP50 lacks."""
    right = truth_as_detections(demo_val)
    changes = {
        "class": lambda f, i: replace(f, labels=torch.where(i, (f.labels + 1) % 10, f.labels)),
        "localisation": lambda f, i: replace(f, boxes=torch.where(i[:, None], shrunk(f.boxes), f.boxes)),
        "missed": lambda f, i: replace(f, boxes=f.boxes[~i], scores=f.scores[~i], labels=f.labels[~i]),
    }
    fourth = [[change(f, torch.arange(len(f.scores)) % 4 == 1) for f in right] for change in changes.values()]
    wrong = dict(zip(changes, fourth, strict=True))
    wrong["duplicate"] = [*right, *(replace(f, scores=f.scores / 2) for f in right)]
    wrong["background"] = [*right, *(replace(f, boxes=f.boxes + 5000, scores=f.scores + 1) for f in right)]
    for kind, found in wrong.items():
        matched = matched_of(found, demo_val)
        errors = error_breakdown(matched, np.ones(len(matched.table), bool))
        lacking = 1 - evaluated(found, demo_val).record.detection.AP50
        count = sum((len(f.scores) + 2) // 4 for f in right) if kind in changes else len(demo_val.labels)
        assert errors.pop(kind) == ErrorKind(pytest.approx(lacking), count)
        assert set(errors.values()) == {ErrorKind(0.0, 0)} and len(errors) == 5


def test_confusion_counts_every_object_once(demo_val):
    def counts(found):
        matched = matched_of(found, demo_val)
        return confusion(matched, matched.table.score >= 0.5)

    right, objects = truth_as_detections(demo_val), len(demo_val.labels)
    assert np.array_equal(counts(right), np.diag([*demo_val.class_counts(), 0]))
    wrong = counts([replace(f, labels=(f.labels + 1) % 10) for f in right[:3]])
    assert wrong[2, 3] == (demo_val.labels[: demo_val.starts[3]] == 2).sum() and np.diag(wrong).sum() == 0
    assert wrong[:, 10].sum() == objects - demo_val.starts[3] and wrong.sum() == objects


def test_calibration_of_calibrated_and_overconfident_scores(demo_val):
    rng, nothing = np.random.default_rng(0), np.zeros(20000, np.int64)
    table = DetectionTable(nothing, np.zeros((20000, 4)), rng.random(20000), nothing)
    matched = replace(
        matched_of(truth_as_detections(demo_val), demo_val), table=table, ignored=np.zeros((1, 20000), bool)
    )
    for right, expected in ((table.score, 0), (table.score / 2, 0.26)):
        result = calibration(replace(matched, box=np.where(rng.random((1, 20000)) < right, 0, -1)))
        assert result.expected_error == pytest.approx(expected, abs=0.02)
        assert sum(b.count for b in result.bins) == (table.score >= 0.05).sum()


def test_no_detections_have_an_ap_of_zero_and_no_objects_have_no_numbers(demo_val):
    bare = replace(demo_val, **{k: getattr(demo_val, k)[:0] for k in ("boxes", "labels", "crowd", "areas")})
    bare = replace(bare, starts=np.zeros_like(demo_val.starts))
    every = detection_table(random_detections(demo_val, 0), demo_val)
    for table, data, value in ((every.select(every.score > 1), demo_val, 0.0), (every, bare, None)):
        evaluation = evaluated(table, data, image_weights(len(data), 0))
        record = evaluation.record
        assert record.detection.AP == record.detection.class_agnostic_AP50 == value and record.warnings == []
        assert set(vars(record.primary).values()) == {value} and record.diagnosis.operating_point.f1 is None
        assert record.diagnosis.errors["missed"] == ErrorKind(value, len(data.labels))
    assert evaluation.samples == {} and set(record.intervals.values()) == {None}


def test_images_of_more_objects_than_are_counted_are_told(demo_val):
    one = replace(demo_val.select(np.arange(1)), labels=0 * demo_val.select(np.arange(1)).labels)
    columns = {name: np.concatenate([getattr(one, name)] * 40) for name in ("boxes", "labels", "crowd", "areas")}
    data = replace(one, **columns, starts=np.array([0, 40 * len(one.boxes)]))
    data.boxes[:, 0] += 1000 * np.arange(len(data.boxes))
    record = evaluated(truth_as_detections(data), data).record
    assert pytest.approx(100 / len(data.boxes)) == record.detection.AR100 and len(data.boxes) > 100
    assert record.warnings[0].startswith("1 images have more than 100 objects, the most that COCO counts of a class")
    assert evaluated(truth_as_detections(demo_val), demo_val).record.warnings == []


def test_the_description_counts_objects_without_crowds(demo_val):
    about, objects = describe_data(crowded(demo_val), "demo"), np.arange(len(demo_val.labels)) % 5 > 0
    assert about.boxes == sum(about.class_boxes) == objects.sum()
    assert about.class_boxes == np.bincount(demo_val.labels[objects], minlength=10).tolist()


@pytest.mark.real
@pytest.mark.slow
def test_yolo_reproduces_its_known_figure(assets):
    """YOLOv8n int8 with one label a box on 250 images: AP 0.398, AP50 0.561, measured elsewhere by pycocotools."""
    if not (find_spec("openvino") and find_spec("ultralytics")):
        pytest.skip("needs openvino and ultralytics")
    from common.data.sources import load_split
    from common.evaluate.others import run_yolo

    data, threads = load_split(data_flags(str(assets / "coco-subset")), "val"), torch.get_num_threads()
    found = run_yolo(str(assets / "yolov8n_int8_openvino_model"), data, 8, torch.device("cpu"))
    record = evaluate("yolo", "", found, data, np.ones((len(data), 1), np.float32)).record
    assert pytest.approx(0.398, abs=0.003) == record.detection.AP
    assert pytest.approx(0.561, abs=0.003) == record.detection.AP50
    assert record.conditions["classes_compared"] == 80 and record.warnings == []
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_ultralytics_is_imported_only_for_its_models():
    program = "import sys, comprehensive_validation\nassert 'ultralytics' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
