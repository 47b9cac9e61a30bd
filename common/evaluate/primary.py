"""The columns of the original study, which compare the largest object of an image with its highest-scoring detection,
and `found`, which asks whether any detection that a user would be shown is that object."""

from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import MatchedDetections, match_detections, mean, operating_point, precision_at_recalls
from common.evaluate.overlaps import MATCH_IOU, find_overlaps


@dataclass(frozen=True)
class PrimaryPairs:
    """The largest object of each of V images beside what the model detects there.

    Shapes: image (V,) int64, index into the data's images; truth (V,) int64 label of the object; best (V,) int64 label
    of the highest-scoring detection, -1 where nothing was detected, and iou (V,) float64 of its box and the object's, 0
    where nothing was detected; found (V,) bool, some detection with at least the score of the operating point has the
    object's label and an IoU of at least 0.5 with it.
    """

    image: np.ndarray
    truth: np.ndarray
    best: np.ndarray
    iou: np.ndarray
    found: np.ndarray


def primary_pairs(matched: MatchedDetections, data: DetectionData, score: float | None) -> PrimaryPairs:
    """The pairs of all images with at least one non-crowd box; of equally large boxes the first is taken.

    Args:
        matched: the detections of one model.
        data: the ground truth.
        score: of the operating point; None finds nothing.
    """
    owner, areas = data.image_of_box(), data.boxes[:, 2] * data.boxes[:, 3]
    by_size = np.lexsort((-areas, data.crowd, owner))  # stable
    first = by_size[np.nonzero(np.diff(owner, prepend=-1))[0]]  # of each image that has boxes
    largest = first[~data.crowd[first]]
    is_largest = np.zeros(len(owner), bool)
    is_largest[largest] = True

    label, iou, found = np.full(len(data), -1), np.zeros(len(data)), np.zeros(len(data), bool)
    detected, row = np.unique(matched.table.image, return_index=True)  # they are ordered by falling score
    label[detected] = matched.table.label[row]
    pairs = find_overlaps(detected, matched.table.boxes[row], data, at_least=0)
    pairs = pairs.select(is_largest[pairs.box])
    iou[detected[pairs.detection]] = pairs.iou
    if score is not None:
        pairs = matched.overlaps.select(is_largest[matched.overlaps.box] & (matched.overlaps.iou >= MATCH_IOU))
        right = matched.table.label[pairs.detection] == data.labels[pairs.box]
        found[owner[pairs.box[right & (matched.table.score[pairs.detection] >= score)]]] = True
    image = owner[largest]
    return PrimaryPairs(image, data.labels[largest], label[image], iou[image], found[image])


def primary_numbers(pairs: PrimaryPairs) -> dict[str, float | None]:
    """The study's columns: the image's largest object against the model's highest-scoring detection; and `found`.

    Only images with at least one non-crowd box count. Precision, recall and F1 are averaged over the classes,
    weighted by the number of images of each class (so recall equals accuracy). IoU is 0 where nothing was detected.
    The columns see one detection an image, so a model that finds every object may still be wrong; `found` is the share
    of images whose largest object is detected, with its class and at least the score of the operating point.
    """
    scores = weighted_scores(pairs, np.ones((len(pairs.image), 1)))
    return {name: None if np.isnan(value) else float(value) for name, (value,) in scores.items()}


def weighted_scores(pairs: PrimaryPairs, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The study's columns and `found` under any weightings of the pairs: (V, W) -> (W,) each, NaN without any pair.

    Precision, recall and F1 of a class are weighted by its support, and 0 where they are undefined.
    """
    classes, truth = np.unique(pairs.truth, return_inverse=True)
    right = pairs.truth == pairs.best
    known = np.isin(pairs.best, classes)
    best = np.searchsorted(classes, pairs.best[known])
    support = _sum_by(truth, weights, len(classes))
    hits, answers = _sum_by(truth[right], weights[right], len(classes)), _sum_by(best, weights[known], len(classes))
    total = weights.sum(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = support / total
        return {
            "accuracy": hits.sum(0) / total,
            "precision": np.where(total, (_ratio(hits, answers) * share).sum(0), np.nan),
            "recall": hits.sum(0) / total,
            "f1": np.where(total, (_ratio(2 * hits, answers + support) * share).sum(0), np.nan),
            "mean_iou": pairs.iou @ weights / total,
            "found": pairs.found.astype(np.float64) @ weights / total,
        }


def _sum_by(labels: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """(V,) labels and (V, W) weights -> (C, W) float64 sums."""
    sums = np.zeros((classes, weights.shape[1]))
    np.add.at(sums, labels, weights)
    return sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def headline(table: DetectionTable, data: DetectionData) -> dict[str, float | None]:
    """What an epoch of training reports: the study's columns and `found`, AP50, AP, and the operating point."""
    matched = match_detections(table, data)
    score = operating_point(matched.by_class).score
    precision = precision_at_recalls(matched.by_class, len(data.class_names))
    numbers = {"AP50": mean(precision[0]), "AP": mean(precision), "operating_point": score}
    return primary_numbers(primary_pairs(matched, data, score)) | numbers


def format_headline(numbers: dict[str, float | None]) -> str:
    """mAP@0.5, AP, accuracy and mean IoU as text, for the terminal."""
    chosen = {"mAP@0.5": "AP50", "AP": "AP", "accuracy": "accuracy", "mean IoU": "mean_iou"}
    return ", ".join(f"{name} {'-' if numbers[key] is None else f'{numbers[key]:.3f}'}" for name, key in chosen.items())
