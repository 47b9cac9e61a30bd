"""Intervals, verdicts, kinds of errors, calibration, the self-check, and detections of other models."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import ROOT, crowded, data_flags, random_detections, truth_as_detections
from PIL import Image

from common.console import InputError
from common.evaluate.bootstrap import COMPARED, MIN_IMAGES, comparisons, draws, interval, resampled
from common.evaluate.coco_metrics import evaluate_table, match_all
from common.evaluate.detections import DetectionTable, coco_detections, detection_table, read_detections
from common.evaluate.diagnosis import calibration, confusion, diagnose, error_breakdown, self_check
from common.evaluate.evaluation import evaluate
from common.evaluate.matching import Ranking, average_precision, match, operating_point, ranking
from common.evaluate.primary import primary_object, primary_pairs
from common.types import Predictions

LABELS = np.arange(10)


def table_of(data, seed=0, count=30):
    return detection_table(random_detections(data, seed, count), LABELS)


def samples_of(table, data, weights):
    return resampled(match_all(table, data), data, weights)


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
    """The weighted numbers equal those of `evaluate_table` on a data set that contains images twice.

    The operating point is that of the original data set: it belongs to the model, not to the resample.
    """
    torch.manual_seed(seed)
    data, found = crowded(demo_val), random_detections(demo_val, 1)
    found = [replace(f, scores=f.scores + torch.rand(len(f.scores)) / 1000) for f in found]  # no ties
    counts = np.array([0, 2, 1, 3, 0, 1])
    matched = match_all(detection_table(found, LABELS), data)
    ours = resampled(matched, data, counts[:, None].astype(np.float32))
    large, index = repeated(data, counts)
    copies = [replace(found[i], image_id=p.id) for i, p in zip(index, large.images, strict=True)]
    table = detection_table(copies, LABELS)
    expected = evaluate_table(table, large)
    pairs = primary_pairs(table, large, matched.operating_point["score"])
    expected["primary"]["found"] = primary_object(pairs)["found"]
    for name in COMPARED:
        value = (expected["primary"] | expected["detection"])[name]
        assert ours[name][0] == pytest.approx(value, abs=1e-6), name


def test_intervals_contain_the_number_and_shrink_with_more_images(demo_val):
    table = table_of(demo_val)
    numbers = evaluate_table(table, demo_val)["detection"]
    samples = samples_of(table, demo_val, draws(len(demo_val), seed=0))
    low, high = interval(samples["AP50"])
    assert low < numbers["AP50"] < high and high - low > 0.02
    large, index = repeated(demo_val, np.full(6, 8))
    found = random_detections(demo_val, 0)
    copies = [replace(found[i], image_id=p.id) for i, p in zip(index, large.images, strict=True)]
    low2, high2 = interval(samples_of(detection_table(copies, LABELS), large, draws(48, seed=0))["AP50"])
    assert high2 - low2 < (high - low) / 2


def test_draws_depend_on_the_seed_only():
    assert np.array_equal(draws(9, 1), draws(9, 1)) and not np.array_equal(draws(9, 1), draws(9, 2))
    assert draws(9, 1).mean() == pytest.approx(1, abs=0.05) and draws(9, 1).min() >= 0


def test_verdicts(demo_val):
    """Perfect detections are better than noisy ones, which are not distinguishable from themselves."""
    weights = draws(len(demo_val), seed=0)
    perfect = samples_of(detection_table(truth_as_detections(demo_val), LABELS), demo_val, weights)
    noisy = samples_of(table_of(demo_val), demo_val, weights)
    models = {"noisy": noisy, "perfect": perfect, "again": noisy}
    pairs = comparisons(models, MIN_IMAGES)
    assert [(pair["a"], pair["b"]) for pair in pairs] == [
        ("noisy", "perfect"),
        ("noisy", "again"),
        ("perfect", "again"),
    ]
    verdicts = [pair["numbers"]["AP50"]["verdict"] for pair in pairs]
    assert verdicts == ["worse", "not distinguishable", "better"]
    few = comparisons(models, MIN_IMAGES - 1)
    assert {number["verdict"] for pair in few for number in pair["numbers"].values()} == {"too few images"}


def test_images_with_objects_have_a_box_that_is_no_crowd(demo_val):
    crowd = demo_val.crowd.copy()
    crowd[: demo_val.starts[1]] = True
    assert len(demo_val.with_objects()) == 6 and len(replace(demo_val, crowd=crowd).with_objects()) == 5


def test_operating_point_is_the_best_of_all_thresholds(demo_val):
    ranked = ranking(match(table_of(demo_val), demo_val))
    point = operating_point(ranked)
    objects, best = len(ranked.object_label), 0.0
    for score in np.unique(ranked.score):
        kept = ranked.score >= score
        right = ranked.hit[kept].sum()
        best = max(best, 2 * right / (kept.sum() + objects))
    assert point["f1"] == pytest.approx(best)
    kept = ranked.score >= point["score"]
    assert point["precision"] == pytest.approx(ranked.hit[kept].mean())
    assert point["recall"] == pytest.approx(ranked.hit[kept].sum() / objects)


def ap50(found, data):
    return evaluate_table(detection_table(found, LABELS), data)["detection"]["AP50"]


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
        table = detection_table(found, LABELS)
        errors = error_breakdown(table, match(table, demo_val), demo_val, 0.0)
        assert errors[kind]["gain"] == pytest.approx(1 - ap50(found, demo_val), abs=1e-6), kind
        assert errors[kind]["count"] == sum((len(f.scores) + 2) // 4 for f in right), kind
        assert all(e["count"] == 0 and e["gain"] == 0 for name, e in errors.items() if name != kind), kind


def shrunk(boxes):
    """A third of the area in the upper left corner."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * 0.58], dim=1)


def test_additional_detections_are_duplicates_or_background(demo_val):
    right = truth_as_detections(demo_val)
    twice = [
        replace(f, boxes=f.boxes.repeat(2, 1), scores=torch.cat([f.scores, f.scores / 2]), labels=f.labels.repeat(2))
        for f in right
    ]
    table = detection_table(twice, LABELS)
    errors = error_breakdown(table, match(table, demo_val), demo_val, 0.0)
    assert errors["duplicate"]["count"] == len(table) // 2 and errors["background"]["count"] == 0
    outside = [replace(f, boxes=f.boxes + 5000, scores=f.scores + 1) for f in right]
    table = detection_table([*right, *outside], LABELS)
    errors = error_breakdown(table, match(table, demo_val), demo_val, 0.0)
    assert errors["background"]["count"] == len(table) // 2
    assert errors["background"]["gain"] == pytest.approx(1 - ap50([*right, *outside], demo_val), abs=1e-6)


def test_confusion_counts_every_object_once(demo_val):
    right = truth_as_detections(demo_val)
    counts = confusion(detection_table(right, LABELS), demo_val, 0.5)
    assert np.array_equal(np.diag(counts)[:10], np.bincount(demo_val.labels, minlength=10))
    assert counts.sum() == len(demo_val.labels)
    wrong = [replace(f, labels=(f.labels + 1) % 10) for f in right]
    counts = confusion(detection_table(wrong[:3], LABELS), demo_val, 0.5)
    assert counts[2, 3] == (demo_val.labels[: demo_val.starts[3]] == 2).sum()
    assert counts[:, 10].sum() == len(demo_val.labels) - demo_val.starts[3]
    assert counts[:10].sum() == len(demo_val.labels) and np.diag(counts).sum() == 0


def test_calibration_of_calibrated_and_overconfident_scores():
    rng = np.random.default_rng(0)
    score = rng.random(20000)
    nothing = np.zeros(20000, np.int64)
    calibrated = Ranking(nothing, nothing, score, rng.random(20000) < score, nothing, nothing)
    overconfident = replace(calibrated, hit=rng.random(20000) < score / 2)
    assert calibration(calibrated)["expected_error"] < 0.02
    assert calibration(overconfident)["expected_error"] == pytest.approx(0.26, abs=0.03)
    assert sum(b["count"] for b in calibration(calibrated)["bins"]) == (score >= 0.05).sum()


def test_no_detections_and_no_objects(demo_val):
    empty = DetectionTable.empty()
    diagnosis = diagnose(empty, match(empty, demo_val), demo_val)
    assert diagnosis["operating_point"]["f1"] is None and diagnosis["calibration"]["expected_error"] is None
    assert diagnosis["errors"]["missed"] == {"gain": 0.0, "count": len(demo_val.labels)}
    bare = replace(demo_val, **{k: getattr(demo_val, k)[:0] for k in ("boxes", "labels", "crowd", "areas")})
    bare = replace(bare, starts=np.zeros_like(demo_val.starts))
    diagnosis = diagnose(table_of(demo_val), match(table_of(demo_val), bare), bare)
    assert diagnosis["operating_point"]["f1"] is None and diagnosis["errors"]["missed"]["gain"] is None
    weights = draws(len(bare), 0)
    assert all(interval(values) is None for values in samples_of(table_of(demo_val), bare, weights).values())
    assert self_check(empty, demo_val) == [] and self_check(table_of(demo_val), bare) == []


def test_self_check_warns_about_shifted_classes_and_misread_boxes(demo_val):
    right = truth_as_detections(demo_val)
    table = detection_table(right, LABELS)
    assert self_check(table, demo_val) == [] and self_check(table_of(demo_val), demo_val) == []
    for step in (1, -1):
        (warning,) = self_check(replace(table, label=(table.label + step) % 10), demo_val)
        assert f"moved by {-step:+d}" in warning
    size_of = {image.id: (image.width, image.height) for image in demo_val.images}
    sizes = np.array([size_of[number] for number in table.image_id.tolist()])
    corners, sides = table.boxes[:, :2], table.boxes[:, 2:]
    misread = {
        "normalised coordinates": table.boxes / np.tile(sizes, 2),
        "(x, y, width, height) was taken for corners": np.hstack([corners, sides - corners]),
        "corners (x, y, x, y) were taken": np.hstack([corners, corners + sides]),
        "centres": np.hstack([corners + sides / 2, sides]),
    }
    for words, boxes in misread.items():
        (warning,) = self_check(replace(table, boxes=boxes), demo_val)
        assert words in warning


def test_detections_from_a_file_give_the_same_record(demo_val, tmp_path):
    found = random_detections(demo_val, 2)
    table = detection_table(found, LABELS)
    entries = coco_detections(table, demo_val.category_ids)
    (tmp_path / "d.json").write_text(json.dumps([*entries, entries[0] | {"category_id": 77}]))
    read = read_detections(str(tmp_path / "d.json"), demo_val)
    weights = draws(len(demo_val), 0)
    ours = evaluate("a", "a.pth", Predictions(found, demo_val.class_names), demo_val, weights).record
    theirs = evaluate("b", "d.json", read, demo_val, weights).record
    assert theirs.primary == pytest.approx(ours.primary) and theirs.conditions["detections_of_unknown_categories"] == 1
    for name in ("AP", "AP50", "AP_small", "AR100", "class_agnostic_AP50"):
        assert theirs.detection[name] == pytest.approx(ours.detection[name], abs=1e-6)
    assert theirs.intervals["AP"] == pytest.approx(ours.intervals["AP"], abs=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        '{"a": 1}',
        "[1, 2]",
        '[{"image_id": 1}]',
        '[{"image_id": 99, "bbox": [1, 1, 1, 1], "score": 1, "category_id": 1}]',
        '[{"image_id": 1, "bbox": [1, 1, 1], "score": 1, "category_id": 1}]',
        '[{"image_id": 1, "bbox": [1, 1, 1, NaN], "score": 1, "category_id": 1}]',
    ],
)
def test_files_without_detections_are_refused_in_one_line(demo_val, tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_detections(str(tmp_path / "d.json"), demo_val)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        read_detections(str(tmp_path / "none.json"), demo_val)


def test_average_precision_by_hand():
    """Three objects; true, false, true positive: precision 1 up to recall 1/3, 2/3 up to recall 2/3, then 0."""
    zeros = np.zeros(3, np.int64)
    ranked = Ranking(zeros, zeros, np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), zeros, zeros)
    (value,) = average_precision(ranked, 2, np.ones((1, 1), np.float32))[0]
    assert value == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert np.isnan(average_precision(ranked, 2, np.ones((1, 1), np.float32))[1])


@pytest.mark.real
@pytest.mark.slow
def test_yolo_reproduces_its_known_figure(assets):
    """YOLOv8n int8 with one label a box on 250 images: AP 0.398, AP50 0.561, measured elsewhere by pycocotools."""
    if not (find_spec("openvino") and find_spec("ultralytics")):  # importing the latter would replace parts of Pillow
        pytest.skip("needs openvino and ultralytics")
    from common.data.sources import load_split
    from common.evaluate.yolo import yolo_predictions

    data = load_split(data_flags(str(assets / "coco-subset")), "val")
    found = yolo_predictions(str(assets / "yolov8n_int8_openvino_model"), data, 8, torch.device("cpu"))
    record = evaluate("yolo", "", found, data).record
    assert record.detection["AP"] == pytest.approx(0.398, abs=0.003)
    assert record.detection["AP50"] == pytest.approx(0.561, abs=0.003)
    assert record.conditions["classes_compared"] == 80
    assert Image.open.__module__ == "PIL.Image" and torch.save.__module__ == "torch.serialization"


@pytest.mark.slow
def test_ultralytics_is_imported_only_for_its_models():
    program = "import sys, comprehensive_validation\nassert 'ultralytics' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
