"""Confidence intervals: Bayesian bootstrap over images (Rubin, 1981), paired for two models.

Each of a thousand resamples gives the images random weights and computes every number from the matches under these
weights; nothing is detected or matched again. All models get the same weights, so that two models are compared resample
by resample and the difficulty of an image, which both share, cancels out. The ordinary bootstrap, which draws images
with replacement, would lose the classes of few images in many resamples, and raise mAP by twice as much.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from common.data.coco import CocoData
from common.evaluate.metrics import RECALLS, Matches
from common.evaluate.primary import PrimaryPairs, weighted_scores

RESAMPLES = 1000
LEVEL = 95  # per cent
WEIGHT_STEPS = 1024  # weights are multiples of its inverse, so that their sums are exact
BLOCK = 1 << 22  # numbers of a block of weights, detections x resamples, 16 MB
# Images with objects for a verdict. The 95% interval of the mean of random numbers (normal, exponential, 0 or 1)
# contained it in 75-94% of 3,000 trials with 5 images, 85-90% with 10, and 90-95% with 20.
MIN_IMAGES = 20
TOO_FEW = "too few images"
WITH_INTERVALS = ("accuracy", "precision", "recall", "f1", "mean_iou", "found", "AP50", "AP", "class_agnostic_AP50")


def image_weights(images: int, seed: int) -> np.ndarray:
    """(P, R) float32: the weight of each image in each resample, 1 on average."""
    generator, weights = np.random.default_rng(seed), np.empty((images, RESAMPLES), np.float32)
    for row in weights:
        row[:] = np.round(generator.standard_exponential(RESAMPLES) * WEIGHT_STEPS) / WEIGHT_STEPS
    return weights


def resample(
    by_class: Matches, boxes_alone: Matches, primary: PrimaryPairs, data: CocoData, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each number of WITH_INTERVALS in each resample, (R,) float64; NaN where it does not exist.

    Args:
        by_class: the matches of one model by class at COCO's thresholds.
        boxes_alone: those without regard to class, as `metrics.match_boxes_alone` returns them.
        primary: its largest objects.
        data: the ground truth.
        weights: (P, R) as `image_weights` returns them.
    """
    precision = weighted_map(by_class, len(data.class_names), weights)
    return weighted_scores(primary, weights[primary.image]) | {
        "AP50": precision[0],
        "AP": precision.mean(0),
        "class_agnostic_AP50": weighted_map(boxes_alone, 1, weights)[0],
    }


def weighted_map(matches: Matches, classes: int, weights: np.ndarray) -> np.ndarray:
    """(T, R) float64: COCO's average precision under R weightings of the images, (P, R) float32, mean over the classes.

    NaN where the weighted images hold no object. Equal scores rank in the order given.
    """
    order = np.lexsort((-matches.score, matches.label))
    bounds = np.searchsorted(matches.label[order], np.arange(classes + 1))
    sums, counts = np.zeros((len(matches.box), weights.shape[1])), np.zeros(weights.shape[1], int)
    for k in np.unique(matches.object_label):
        rows, objects = order[bounds[k] : bounds[k + 1]], matches.object_image[matches.object_label == k]
        image, hit, ignored = matches.image[rows], matches.box[:, rows] >= 0, matches.ignored[:, rows]
        for part in np.array_split(np.arange(weights.shape[1]), len(rows) * weights.shape[1] // BLOCK + 1):
            block = np.ascontiguousarray(weights[:, part])
            ap = _ap_of_class(image, hit, ignored, objects, block)
            sums[:, part] += np.nan_to_num(ap)
            counts[part] += ~np.isnan(ap[0])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _ap_of_class(
    image: np.ndarray, hit: np.ndarray, ignored: np.ndarray, objects: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(T, W) AP of one class.

    Args:
        image: (n,) of the detections by falling score; hit and ignored (T, n) bool.
        objects: (N,) the image of each object.
        weights: (P, W) float32.
    """
    total = weights[objects].sum(0, dtype=np.float64)
    ap = np.zeros((len(hit), weights.shape[1]))
    marks = np.nonzero(hit.any(0))[0]  # precision has its maxima at hits, so sums are only needed up to these
    if len(marks):
        starts = np.append(0, marks[:-1] + 1)
        kept = np.add.reduceat(weights[image[: marks[-1] + 1]], starts, axis=0).cumsum(0, dtype=np.float64)
        for t, (at, crowd) in enumerate(zip(map(np.flatnonzero, hit), map(np.flatnonzero, ignored), strict=True)):
            right = weights[image[at]].cumsum(0, dtype=np.float64)
            counted = kept[np.searchsorted(marks, at)]
            if len(crowd):
                in_crowds = np.insert(weights[image[crowd]].cumsum(0, dtype=np.float64), 0, 0, axis=0)
                counted -= in_crowds[np.searchsorted(crowd, at)]
            ap[t] = _mean_precision(right, counted, total)
    return np.where(total > 0, ap, np.nan)


def _mean_precision(right: np.ndarray, counted: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(h, W) true positives and all detections up to each hit, (W,) objects -> (W,) precision, mean over RECALLS."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(right / counted)
        steps = np.nan_to_num(right / total)
    precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
    steps = (
        np.floor(steps * (len(RECALLS) - 1) + 1e-9) + 1
    )  # recalls reached by then; searchsorted takes ten times as long
    steps[1:] -= steps[:-1].copy()
    return np.einsum("hw,hw->w", precision, steps) / len(RECALLS)


def interval(values: np.ndarray) -> list[float] | None:
    """The central 95% of the resamples, [low, high]; None where the number does not exist."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [50 - LEVEL / 2, 50 + LEVEL / 2]).tolist() if len(values) else None


def comparisons(models: Mapping[str, Mapping[str, np.ndarray]], images: int) -> list[dict]:
    """The interval of the difference and the verdict, for every pair of models and every number.

    Args:
        models: what `resample` returned, by the name of the model.
        images: the number of images with objects.

    Returns:
        For each pair `a`, `b` and, under `numbers`, for each number the `interval` of a - b and the `verdict`: better
        (a's is higher), worse, not distinguishable, where the interval contains 0, or too few images, where there are
        less than MIN_IMAGES.
    """
    pairs = []
    for (a, samples_a), (b, samples_b) in itertools.combinations(models.items(), 2):
        numbers = {}
        for name in WITH_INTERVALS:
            difference = interval(samples_a[name] - samples_b[name])
            if difference is not None:
                verdict = TOO_FEW if images < MIN_IMAGES else _verdict(*difference)
                numbers[name] = {"interval": difference, "verdict": verdict}
        pairs.append({"a": a, "b": b, "numbers": numbers})
    return pairs


def _verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
