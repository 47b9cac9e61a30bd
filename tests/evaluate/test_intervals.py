"""What the intervals and verdicts promise, on generated detectors whose true performance is known from many images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.data.memory import DetectionData, ImageFile
from common.evaluate.bootstrap import Sampled, comparisons, resample
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import average_precision, match_boxes_alone, match_detections, mean
from common.evaluate.primary import primary_pairs

CLASSES, RESAMPLES = 60, 300


def generated_truth(images, seed=0):
    """About seven objects an image, of classes whose frequencies fall as those of COCO do; without files."""
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.14, images)
    total, shares = counts.sum(), 1 / np.arange(1, CLASSES + 1)
    own_class = np.repeat(rng.choice(CLASSES, images, p=shares / shares.sum()), counts)  # that most of an image have
    labels = np.where(rng.random(total) < 0.5, own_class, rng.choice(CLASSES, total, p=shares / shares.sum()))
    sides = np.exp(rng.normal(4, 0.9, (total, 2)))
    boxes = np.hstack([rng.uniform(0, 500, (total, 2)), sides])
    files = tuple(ImageFile(n, Path(f"{n}.jpg"), 640, 640) for n in range(images))
    names = tuple(f"class {k}" for k in range(CLASSES))
    arrays = boxes, labels, np.zeros(total, bool), sides.prod(1), np.append(0, counts.cumsum())
    return DetectionData(files, tuple(range(CLASSES)), names, *arrays, source="generated")


def generated_detections(data, noise, seed):
    """Boxes moved by `noise` of their sides, a quarter of the classes wrong, three false ones for each object."""
    rng = np.random.default_rng(seed)
    image, count = data.image_of_box(), len(data.labels)
    boxes = data.boxes + rng.normal(0, noise, (count, 4)) * np.tile(data.boxes[:, 2:], 2)
    label = np.where(rng.random(count) < 0.25, rng.permutation(data.labels), data.labels)
    false = np.hstack([rng.uniform(0, 500, (3 * count, 2)), np.exp(rng.normal(4, 0.9, (3 * count, 2)))])
    scores = np.append(rng.beta(3, 2, count), rng.beta(2, 4, 3 * count))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    return DetectionTable(
        np.append(image, np.repeat(image, 3)),
        np.concatenate([boxes, false]),
        scores,
        np.append(label, np.repeat(rng.permutation(label), 3)),
    )


def sampled_ap50(table, data, weights):
    matched = match_detections(table, data)
    samples = resample(matched, match_boxes_alone(matched), primary_pairs(matched, 0.5), weights)
    return Sampled(mean(average_precision(matched)[0]), samples["AP50"])


def drawn(table, data, images):
    place = np.full(len(data), -1)
    place[images] = np.arange(len(images))
    table = table.select(place[table.image] >= 0)
    return replace(table, image=place[table.image]), data.select(images)


def exponential(images, seed):
    return np.random.default_rng(seed).standard_exponential((images, RESAMPLES)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_intervals_contain_the_number_that_is_expected_on_as_many_images(noise):
    """60 samples of 250 of 5,000 images; their mean is what is expected. Plain percentiles contain it in about 60%."""
    data, rng = generated_truth(5000), np.random.default_rng(1)
    table = generated_detections(data, noise, seed=2)
    samples = [
        sampled_ap50(*drawn(table, data, np.sort(rng.choice(5000, 250, replace=False))), exponential(250, n))
        for n in range(60)
    ]
    expected = np.mean([sample.value for sample in samples])
    inside = [low <= expected <= high for low, high in (sample.interval() for sample in samples)]
    assert np.mean(inside) >= 0.85


@pytest.mark.slow
def test_equal_models_hardly_ever_get_a_verdict():
    """14 detectors of equal skill on 60 and on 250 images, 91 pairs each."""
    verdicts = []
    for images, noise in ((60, 0.15), (250, 0.25)):
        data = generated_truth(images, seed=images)
        weights = exponential(images, images)
        tables = {str(n): generated_detections(data, noise, n) for n in range(14)}
        models = {name: {"AP50": sampled_ap50(table, data, weights)} for name, table in tables.items()}
        verdicts += [pair.numbers["AP50"].verdict for pair in comparisons(models, images)]
    assert np.mean([verdict != "not distinguishable" for verdict in verdicts]) <= 0.03
