"""Confidence intervals: Bayesian bootstrap over images (Rubin, 1981), paired for two models.

Each of a thousand resamples gives the images random weights and computes every number from the matches under these
weights; nothing is detected or matched again. All models get the same weights, so that two models are compared resample
by resample and the difficulty of an image, which both share, cancels out. The ordinary bootstrap, which draws images
with replacement, would lose the classes of few images in many resamples, and raise mAP by twice as much.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.coco_metrics import Matched
from common.evaluate.matching import IOU_THRESHOLDS, average_precision, ranking
from common.evaluate.primary import weighted_scores

RESAMPLES = 1000
LEVEL = 95  # per cent
WEIGHT_STEPS = 1024  # weights are multiples of its inverse, so that their sums are exact
BATCH = 250  # resamples at once; more need more memory
# Images with objects for a verdict. The 95% interval of the mean of random numbers (normal, exponential, 0 or 1)
# contained it in 75-94% of 3,000 trials with 5 images, 85-90% with 10, and 90-95% with 20.
MIN_IMAGES = 20
TOO_FEW = "too few images"
COMPARED = ("accuracy", "precision", "recall", "f1", "mean_iou", "found", "AP50", "AP", "class_agnostic_AP50")


def draws(images: int, seed: int) -> np.ndarray:
    """(P, R) float32: the weight of each image in each resample, 1 on average."""
    weights = np.random.default_rng(seed).standard_exponential((images, RESAMPLES))
    return (np.round(weights * WEIGHT_STEPS) / WEIGHT_STEPS).astype(np.float32)


def resampled(matched: Matched, data: DetectionData, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each number of COMPARED in each resample, (R,) float64; NaN where it does not exist.

    Args:
        matched: the detections of one model, as `match_all` returns them.
        data: the ground truth.
        weights: (P, R) as `draws` returns them.
    """
    parts = [_numbers(matched, data, part) for part in _batches(weights)]
    return {name: np.concatenate([part[name] for part in parts]) for name in COMPARED}


def _batches(weights: np.ndarray) -> list[np.ndarray]:
    return np.array_split(weights, max(1, weights.shape[1] // BATCH), axis=1)


def _numbers(matched: Matched, data: DetectionData, weights: np.ndarray) -> dict[str, np.ndarray]:
    numbers = weighted_scores(matched.primary, weights[matched.primary.image].astype(np.float64))
    by_threshold = [
        _mean_of_classes(average_precision(ranking(matched.by_class, t), len(data.class_names), weights))
        for t in range(len(IOU_THRESHOLDS))
    ]
    agnostic_ap = average_precision(ranking(matched.agnostic), 1, weights)[0]
    return numbers | {
        "AP50": by_threshold[0],
        "AP": np.mean(by_threshold, axis=0),
        "class_agnostic_AP50": agnostic_ap,
    }


def _mean_of_classes(precision: np.ndarray) -> np.ndarray:
    """(K, R) -> (R,), over the classes that exist in a resample."""
    exists = ~np.isnan(precision)
    count = exists.sum(0)
    return np.where(count > 0, np.where(exists, precision, 0).sum(0) / np.maximum(count, 1), np.nan)


def interval(values: np.ndarray) -> list[float] | None:
    """The central 95% of the resamples, [low, high]; None where the number does not exist."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [50 - LEVEL / 2, 50 + LEVEL / 2]).tolist() if len(values) else None


def comparisons(models: Mapping[str, Mapping[str, np.ndarray]], images: int) -> list[dict]:
    """The interval of the difference and the verdict, for every pair of models and every number.

    Args:
        models: what `resampled` returned, by the name of the model.
        images: the number of images with objects.

    Returns:
        For each pair `a`, `b` and, under `numbers`, for each number the `interval` of a - b and the `verdict`: better
        (a's is higher), worse, not distinguishable, where the interval contains 0, or too few images, where there are
        less than MIN_IMAGES.
    """
    pairs = []
    for (a, samples_a), (b, samples_b) in itertools.combinations(models.items(), 2):
        numbers = {}
        for name in COMPARED:
            difference = interval(samples_a[name] - samples_b[name])
            if difference is not None:
                verdict = TOO_FEW if images < MIN_IMAGES else _verdict(*difference)
                numbers[name] = {"interval": difference, "verdict": verdict}
        pairs.append({"a": a, "b": b, "numbers": numbers})
    return pairs


def _verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
