"""What intervals, verdicts and the warnings of misread detections promise, on generated detectors of known truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.data.memory import DetectionData, ImageFile
from common.evaluate.bootstrap import Sampled, comparisons, resample
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import average_precision, match_boxes_alone, match_detections, mean
from common.evaluate.primary import primary_pairs
from common.evaluate.trust import check_agreement

CLASSES, RESAMPLES = 60, 300
SHAPES = ((500, 375), (640, 427), (427, 640), (333, 500))  # width and height, of COCO


def generated_truth(images, seed=0):
    """About seven objects an image, of classes whose frequencies fall as those of COCO do; without files."""
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.14, images)
    total, shares = counts.sum(), 1 / np.arange(1, CLASSES + 1)
    own_class = np.repeat(rng.choice(CLASSES, images, p=shares / shares.sum()), counts)  # that most of an image have
    labels = np.where(rng.random(total) < 0.5, own_class, rng.choice(CLASSES, total, p=shares / shares.sum()))
    sides = np.exp(rng.normal(4, 0.9, (total, 2)))
    boxes = np.hstack([rng.uniform(0, 500, (total, 2)), sides])
    files = tuple(ImageFile(n, Path(f"{n}.jpg"), *SHAPES[n % len(SHAPES)]) for n in range(images))
    names = tuple(f"class {k}" for k in range(CLASSES))
    arrays = boxes, labels, np.zeros(total, bool), sides.prod(1), np.append(0, counts.cumsum())
    return DetectionData(files, tuple(range(CLASSES)), names, *arrays, source="generated")


def generated_detections(data, noise, seed, wrong=0.25):
    """Boxes moved by `noise` of their sides, some classes wrong, three false ones for each object."""
    rng = np.random.default_rng(seed)
    image, count = data.image_of_box(), len(data.labels)
    boxes = data.boxes + rng.normal(0, noise, (count, 4)) * np.tile(data.boxes[:, 2:], 2)
    label = np.where(rng.random(count) < wrong, rng.permutation(data.labels), data.labels)
    false = np.hstack([rng.uniform(0, 500, (3 * count, 2)), np.exp(rng.normal(4, 0.9, (3 * count, 2)))])
    scores = np.append(rng.beta(3, 2, count), rng.beta(2, 4, 3 * count))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    images, labels = np.append(image, np.repeat(image, 3)), np.append(label, np.repeat(rng.permutation(label), 3))
    return DetectionTable(images, np.concatenate([boxes, false]), scores, labels)


def sampled_ap50(table, data, seed):
    weights = np.random.default_rng(seed).standard_exponential((len(data), RESAMPLES)).astype(np.float32)
    matched = match_detections(table, data)
    samples = resample(matched, match_boxes_alone(matched), primary_pairs(matched, 0.5), weights)
    return Sampled(mean(average_precision(matched)[0]), samples["AP50"])


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_intervals_contain_the_number_that_is_expected_on_as_many_images(noise):
    """60 times 250 images; their mean is what is expected. Plain percentiles contain it in about 60%."""
    truth = [generated_truth(250, seed) for seed in range(60)]
    tables = [generated_detections(data, noise, seed) for seed, data in enumerate(truth)]
    samples = [sampled_ap50(table, truth[n], n) for n, table in enumerate(tables)]
    expected = np.mean([sample.value for sample in samples])
    inside = [low <= expected <= high for low, high in (sample.interval() for sample in samples)]
    assert np.mean(inside) >= 0.85


@pytest.mark.slow
def test_equal_models_hardly_ever_get_a_verdict():
    """14 detectors of equal skill on 60 and on 250 images, 91 pairs each."""
    verdicts = []
    for images, noise in ((60, 0.15), (250, 0.25)):
        data = generated_truth(images, seed=images)
        tables = {str(n): generated_detections(data, noise, n) for n in range(14)}
        models = {name: {"AP50": sampled_ap50(table, data, images)} for name, table in tables.items()}
        verdicts += [pair.numbers["AP50"].verdict for pair in comparisons(models, images)]
    assert np.mean([verdict != "not distinguishable" for verdict in verdicts]) <= 0.03


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
def test_misread_detections_are_warned_of(detector):
    data = generated_truth(60)
    table = DetectionTable(data.image_of_box(), data.boxes, np.ones(len(data.boxes)), data.labels)
    if detector == "weak":
        table = generated_detections(data, 0.2, 1, wrong=0.7)
    assert check_agreement(match_detections(table, data)) == []
    for name, words, changed in misread(table, data):
        warnings = check_agreement(match_detections(changed, data))
        assert len(warnings) == 1 and words in warnings[0], name


def test_weak_and_one_sided_detectors_are_not_warned_of():
    data, rng = generated_truth(60), np.random.default_rng(0)
    weak = generated_detections(data, 0.2, 1, wrong=0.7)
    one_class = replace(data, labels=0 * data.labels, class_names=("a",), category_ids=(1,))
    owner, copies = data.image_of_box(), np.tile([1, 1, 1, 0, 0, 0], len(data))
    first = np.unique(owner, return_index=True)[1].repeat(6)  # half of the six times with its class
    right = np.where(copies, data.labels[first], rng.integers(0, CLASSES, len(first)))
    six_times = DetectionTable(owner[first], data.boxes[first] + copies[:, None], rng.random(len(first)), right)
    unsure = np.where(weak.label == 3, weak.score, weak.score / 100)  # and elsewhere
    boxes = weak.boxes + 5000 * (weak.label != 3)[:, None]
    for name, quiet, truth in (
        ("one class", replace(weak, label=np.full_like(weak.label, 3), score=unsure, boxes=boxes), data),
        ("nine detections of nothing", replace(weak, boxes=weak.boxes + 5000).select(np.arange(9)), data),
        ("nearly all of one class", replace(weak, label=np.where(rng.random(len(weak)) < 0.9, 0, weak.label)), data),
        ("few detections", weak.select(rng.random(len(weak)) < 0.05), data),
        ("data of one class", replace(weak, label=0 * weak.label), one_class),
        ("one object of each image, six times", six_times, data),
    ):
        assert check_agreement(match_detections(quiet, truth)) == [], name
