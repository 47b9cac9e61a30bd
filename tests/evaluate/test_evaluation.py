"""Intervals, verdicts, kinds of errors, calibration, the self-check, and detections of other models."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, crowded, data_flags, numbers_of_table, random_detections, truth_as_detections

from common.data.memory import DetectionData, ImageFile
from common.evaluate.bootstrap import (
    MIN_IMAGES_FOR_VERDICT,
    WITH_INTERVALS,
    Sampled,
    comparisons,
    image_weights,
    resample,
)
from common.evaluate.detections import (
    DetectionTable,
    ModelRun,
    coco_detections,
    detection_table,
    read_detections,
    relative_files,
)
from common.evaluate.diagnosis import calibration, confusion, diagnose, error_breakdown
from common.evaluate.evaluation import evaluate
from common.evaluate.metrics import Matches, match_boxes_alone, match_detections, operating_point
from common.evaluate.primary import primary_numbers, primary_pairs
from common.evaluate.results import ErrorKind
from common.evaluate.trust import check_agreement


def table_of(data, seed=0, count=30):
    return detection_table(random_detections(data, seed, count), data)


def resampled(table, data, weights):
    matched = match_detections(table, data)
    primary = primary_pairs(matched, data, operating_point(matched.by_class).score)
    return resample(matched, match_boxes_alone(matched, data), primary, data, weights)


def samples_of(table, data, weights):
    numbers = numbers_of_table(table, data)
    return {name: Sampled(numbers[name], values) for name, values in resampled(table, data, weights).items()}


def repeated(data, counts):
    """The data set with `counts[i]` copies of image i, each with its own id; and the index of each copy."""
    index = np.repeat(np.arange(len(data)), counts)
    parts = [np.arange(data.starts[i], data.starts[i + 1]) for i in index]
    rows = np.concatenate(parts)
    arrays = {k: getattr(data, k)[rows] for k in ("boxes", "labels", "crowd", "areas")}
    images = tuple(replace(data.images[i], id=1000 + n) for n, i in enumerate(index))
    return replace(data, images=images, starts=np.cumsum([0, *map(len, parts)]), **arrays), index


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_equals_a_data_set_with_repeated_images(seed, demo_val):
    """The operating point is that of the original data set: it belongs to the model, not to the resample."""
    torch.manual_seed(seed)
    data, found = crowded(demo_val), random_detections(demo_val, 1)
    found = [replace(f, scores=f.scores + torch.rand(len(f.scores)) / 1000) for f in found]  # no ties
    counts = np.array([0, 2, 1, 3, 0, 1])
    table = detection_table(found, data)
    ours = resampled(table, data, counts[:, None].astype(np.float32))
    score = operating_point(match_detections(table, data).by_class).score
    large, index = repeated(data, counts)
    copies = [replace(found[i], image_id=p.id) for i, p in zip(index, large.images, strict=True)]
    table = detection_table(copies, large)
    pairs = primary_pairs(match_detections(table, large), large, score)
    expected = numbers_of_table(table, large) | {"found": primary_numbers(pairs)["found"]}
    for name in WITH_INTERVALS:
        assert ours[name][0] == pytest.approx(expected[name], abs=1e-6), name


def test_intervals_contain_the_number_and_shrink_with_more_images(demo_val):
    number = samples_of(table_of(demo_val), demo_val, image_weights(len(demo_val), seed=0))["AP50"]
    low, high = number.interval()
    assert low < number.value < high and high - low > 0.02
    assert number.interval(99)[0] < low and high < number.interval(99)[1]
    large, index = repeated(demo_val, np.full(6, 8))
    found = random_detections(demo_val, 0)
    copies = [replace(found[i], image_id=p.id) for i, p in zip(index, large.images, strict=True)]
    low2, high2 = samples_of(detection_table(copies, large), large, image_weights(48, seed=0))["AP50"].interval()
    assert high2 - low2 < (high - low) / 2


def test_weights_depend_on_the_seed_only():
    assert np.array_equal(image_weights(9, 1), image_weights(9, 1)) and not np.array_equal(
        image_weights(9, 1), image_weights(9, 2)
    )
    assert image_weights(9, 1).mean() == pytest.approx(1, abs=0.05) and image_weights(9, 1).min() >= 0


def test_verdicts(demo_val):
    """Perfect detections are better than noisy ones, which are not distinguishable from themselves."""
    weights = image_weights(len(demo_val), seed=0)
    perfect = samples_of(detection_table(truth_as_detections(demo_val), demo_val), demo_val, weights)
    noisy = samples_of(table_of(demo_val), demo_val, weights)
    models = {"noisy": noisy, "perfect": perfect, "again": noisy}
    pairs = comparisons(models, MIN_IMAGES_FOR_VERDICT)
    assert [(pair.a, pair.b) for pair in pairs] == [
        ("noisy", "perfect"),
        ("noisy", "again"),
        ("perfect", "again"),
    ]
    verdicts = [pair.numbers["AP50"].verdict for pair in pairs]
    assert verdicts == ["worse", "not distinguishable", "better"]
    few = comparisons(models, MIN_IMAGES_FOR_VERDICT - 1)
    assert {number.verdict for pair in few for number in pair.numbers.values()} == {"too few images"}


def test_images_with_objects_have_a_box_that_is_no_crowd(demo_val):
    crowd = demo_val.crowd.copy()
    crowd[: demo_val.starts[1]] = True
    assert len(demo_val.with_objects()) == 6 and len(replace(demo_val, crowd=crowd).with_objects()) == 5


def test_operating_point_is_the_best_of_all_thresholds(demo_val):
    matches = match_detections(table_of(demo_val), demo_val).by_class
    point = operating_point(matches)
    hit, objects, best = matches.hit[0], len(demo_val.labels), 0.0
    for score in np.unique(matches.score):
        kept = matches.score >= score
        best = max(best, 2 * hit[kept].sum() / (kept.sum() + objects))
    assert point.f1 == pytest.approx(best)
    kept = matches.score >= point.score
    assert point.precision == pytest.approx(hit[kept].mean())
    assert point.recall == pytest.approx(hit[kept].sum() / objects)


def errors_of(table, data):
    return error_breakdown(match_detections(table, data), data, np.ones(len(table), bool))


def ap50(found, data):
    return numbers_of_table(detection_table(found, data), data)["AP50"]


def test_each_kind_of_error_is_recognised(demo_val):
    """With one kind of error in every fourth detection, only that kind has a gain, which is what AP50 lacks."""
    right = truth_as_detections(demo_val)
    changes = {
        "class": lambda f, i: replace(f, labels=torch.where(i, (f.labels + 1) % 10, f.labels)),
        "localisation": lambda f, i: replace(f, boxes=torch.where(i[:, None], shrunk(f.boxes), f.boxes)),
        "missed": lambda f, i: replace(f, boxes=f.boxes[~i], scores=f.scores[~i], labels=f.labels[~i]),
    }
    for kind, change in changes.items():
        found = [change(f, torch.arange(len(f.scores)) % 4 == 1) for f in right]
        table = detection_table(found, demo_val)
        errors = errors_of(table, demo_val)
        assert errors[kind].gain == pytest.approx(1 - ap50(found, demo_val), abs=1e-6), kind
        assert errors[kind].count == sum((len(f.scores) + 2) // 4 for f in right), kind
        assert all(e.count == 0 and e.gain == 0 for name, e in errors.items() if name != kind), kind


def shrunk(boxes):
    """A third of the area in the upper left corner."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * 0.58], dim=1)


def test_additional_detections_are_duplicates_or_background(demo_val):
    right = truth_as_detections(demo_val)
    twice = [
        replace(f, boxes=f.boxes.repeat(2, 1), scores=torch.cat([f.scores, f.scores / 2]), labels=f.labels.repeat(2))
        for f in right
    ]
    table = detection_table(twice, demo_val)
    errors = errors_of(table, demo_val)
    assert errors["duplicate"].count == len(table) // 2 and errors["background"].count == 0
    outside = [replace(f, boxes=f.boxes + 5000, scores=f.scores + 1) for f in right]
    table = detection_table([*right, *outside], demo_val)
    errors = errors_of(table, demo_val)
    assert errors["background"].count == len(table) // 2
    assert errors["background"].gain == pytest.approx(1 - ap50([*right, *outside], demo_val), abs=1e-6)


def confusion_of(found, data):
    matched = match_detections(detection_table(found, data), data)
    return confusion(matched, data, matched.table.score >= 0.5)


def test_confusion_counts_every_object_once(demo_val):
    right = truth_as_detections(demo_val)
    counts = confusion_of(right, demo_val)
    assert np.array_equal(np.diag(counts)[:10], np.bincount(demo_val.labels, minlength=10))
    assert counts.sum() == len(demo_val.labels)
    wrong = [replace(f, labels=(f.labels + 1) % 10) for f in right]
    counts = confusion_of(wrong[:3], demo_val)
    assert counts[2, 3] == (demo_val.labels[: demo_val.starts[3]] == 2).sum()
    assert counts[:, 10].sum() == len(demo_val.labels) - demo_val.starts[3]
    assert counts[:10].sum() == len(demo_val.labels) and np.diag(counts).sum() == 0


def test_calibration_of_calibrated_and_overconfident_scores():
    rng = np.random.default_rng(0)
    score = rng.random(20000)
    nothing = np.zeros(20000, np.int64)
    hit, crowd = (rng.random(20000) < score)[None], np.zeros((1, 20000), bool)
    calibrated = Matches(nothing, nothing, score, np.where(hit, 0, -1), crowd, nothing, nothing)
    overconfident = replace(calibrated, box=np.where(rng.random(20000) < score / 2, 0, -1)[None])
    assert calibration(calibrated).expected_error < 0.02
    assert calibration(overconfident).expected_error == pytest.approx(0.26, abs=0.03)
    assert sum(b.count for b in calibration(calibrated).bins) == (score >= 0.05).sum()


def test_no_detections_and_no_objects(demo_val):
    diagnosis = diagnosis_of(DetectionTable.empty(), demo_val)
    assert diagnosis.operating_point.f1 is None and diagnosis.calibration.expected_error is None
    assert diagnosis.errors["missed"] == ErrorKind(0.0, len(demo_val.labels))
    bare = replace(demo_val, **{k: getattr(demo_val, k)[:0] for k in ("boxes", "labels", "crowd", "areas")})
    bare = replace(bare, starts=np.zeros_like(demo_val.starts))
    diagnosis = diagnosis_of(table_of(demo_val), bare)
    assert diagnosis.operating_point.f1 is None and diagnosis.errors["missed"].gain is None
    predictions = ModelRun(table_of(bare), bare.class_names)
    evaluation = evaluate("a", "a.pth", predictions, bare, image_weights(len(bare), 0))
    assert evaluation.samples == {} and set(evaluation.record.intervals.values()) == {None}
    for table, data in ((DetectionTable.empty(), demo_val), (table_of(demo_val), bare)):
        assert check_agreement(match_detections(table, data), data) == []


def diagnosis_of(table, data):
    matched = match_detections(table, data)
    return diagnose(matched, data, operating_point(matched.by_class))


def misread(table, data):
    """The table as it would be if its file had been written in other ways."""
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
    for name, changed in boxes.items():
        yield name, "on an object", replace(table, boxes=changed)
    yield "ids reversed", "on an object", replace(table, image=len(data) - 1 - table.image)
    yield "the next image", "on an object", replace(table, image=(table.image + 1) % len(data))
    yield "next class", "have their class", replace(table, label=(table.label + 1) % len(data.class_names))
    yield "previous class", "have their class", replace(table, label=(table.label - 1) % len(data.class_names))


@pytest.fixture(scope="module")
def scattered():
    """Forty images with five objects of ten classes each, without files."""
    rng = np.random.default_rng(0)
    sides = rng.integers(200, 640, (40, 2))
    boxes = rng.uniform(0, (0.7, 0.7, 0.3, 0.3), (40, 5, 4)) * np.tile(sides, 2)[:, None] + (0, 0, 20, 20)
    images = tuple(ImageFile(3 * n + 5, Path(f"{n}.jpg"), *size) for n, size in enumerate(sides.tolist()))
    labels, crowd = rng.integers(0, 10, 200), np.zeros(200, bool)
    arrays = boxes.reshape(-1, 4), labels, crowd, boxes.reshape(-1, 4)[:, 2:].prod(1), np.arange(41) * 5
    return DetectionData(images, tuple(range(1, 11)), tuple("abcdefghij"), *arrays, source="scattered")


def test_the_net_warns_of_detections_that_were_misread(scattered):
    for table in (detection_table(truth_as_detections(scattered), scattered), weak_detections(scattered)):
        assert check_agreement(match_detections(table, scattered), scattered) == []
        for name, words, changed in misread(table, scattered):
            (warning,) = check_agreement(match_detections(changed, scattered), scattered)
            assert words in warning, name


def weak_detections(data):
    """Of half of the objects, with loose boxes and 40% of the classes right, among many others with as high scores."""
    rng, table = np.random.default_rng(1), detection_table(truth_as_detections(data), data)
    table = table.select(rng.random(len(table)) < 0.5)
    boxes = table.boxes + rng.normal(0, 0.12, table.boxes.shape) * np.tile(table.boxes[:, 2:], 2)
    label = np.where(rng.random(len(table)) < 0.4, table.label, rng.integers(0, 10, len(table)))
    others = replace(table, boxes=rng.uniform(0, 200, table.boxes.shape), label=rng.permutation(label))
    tables = replace(table, boxes=boxes, label=label), others, others
    image, boxes, label = (np.concatenate([getattr(t, name) for t in tables]) for name in ("image", "boxes", "label"))
    return DetectionTable(image, boxes, rng.random(len(label)), label)


def test_the_net_is_quiet_on_one_sided_detectors(scattered):
    """Of one class; nearly all of one class; few detections; and where the data have one class."""
    rng, table = np.random.default_rng(0), weak_detections(scattered)
    one_sided = replace(table, label=np.where(rng.random(len(table)) < 0.9, 3, table.label))
    one_class = replace(scattered, labels=np.zeros_like(scattered.labels), class_names=("a",), category_ids=(1,))
    for quiet, data in (
        (table.select(table.label == 3), scattered),
        (one_sided, scattered),
        (table.select(rng.random(len(table)) < 0.1), scattered),
        (replace(table, label=np.zeros_like(table.label)), one_class),
    ):
        assert check_agreement(match_detections(quiet, data), data) == []


def test_detections_from_a_file_give_the_same_record(demo_val, tmp_path):
    found = random_detections(demo_val, 2)
    table = detection_table(found, demo_val)
    entries = coco_detections(table, demo_val, relative_files(demo_val))
    (tmp_path / "d.json").write_text(json.dumps([*entries, entries[0] | {"category_id": 77, "category_name": "x"}]))
    read = read_detections(str(tmp_path / "d.json"), demo_val)
    weights = image_weights(len(demo_val), 0)
    ours = evaluate("a", "a.pth", ModelRun(table, demo_val.class_names), demo_val, weights).record
    theirs = evaluate("b", "d.json", read, demo_val, weights).record
    assert vars(theirs.primary) == pytest.approx(vars(ours.primary)) and len(theirs.warnings) == 1
    for name in ("AP", "AP50", "AP_small", "AR100", "class_agnostic_AP50"):
        assert theirs.number("detection", name) == pytest.approx(ours.number("detection", name), abs=1e-6)
    assert theirs.intervals["AP"] == pytest.approx(ours.intervals["AP"], abs=1e-6)


@pytest.mark.real
@pytest.mark.slow
def test_yolo_reproduces_its_known_figure(assets):
    """YOLOv8n int8 with one label a box on 250 images: AP 0.398, AP50 0.561, measured elsewhere by pycocotools."""
    if not (find_spec("openvino") and find_spec("ultralytics")):  # importing the latter would replace parts of Pillow
        pytest.skip("needs openvino and ultralytics")
    from common.data.sources import load_split
    from common.evaluate.yolo import run_yolo

    data = load_split(data_flags(str(assets / "coco-subset")), "val")
    found = run_yolo(str(assets / "yolov8n_int8_openvino_model"), data, 8, torch.device("cpu"))
    record = evaluate("yolo", "", found, data).record
    assert pytest.approx(0.398, abs=0.003) == record.detection.AP
    assert pytest.approx(0.561, abs=0.003) == record.detection.AP50
    assert record.conditions["classes_compared"] == 80


@pytest.mark.slow
def test_ultralytics_is_imported_only_for_its_models():
    program = "import sys, comprehensive_validation\nassert 'ultralytics' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
