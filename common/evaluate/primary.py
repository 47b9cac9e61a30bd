"""The study's columns, which compare the largest object of an image with its highest-scoring detection, and `found`,
which asks whether any detection that a user would be shown is that object."""

from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import Matched, average_precision, match_detections, mean, operating_point
from common.evaluate.overlaps import MATCH_IOU, find_overlaps


@dataclass(frozen=True)
class PrimaryPairs:
    """The largest object of each of V images beside what the model detects there."""

    image: np.ndarray  # (V,) int64, index into the data's images
    truth: np.ndarray  # (V,) int64, label of the object
    best: np.ndarray  # (V,) int64, label of the highest-scoring detection, -1 where nothing was detected
    iou: np.ndarray  # (V,) float64, of its box and the object's, 0 where nothing was detected
    found: np.ndarray  # (V,) bool, some detection from the operating point on has the object's label and an IoU >= 0.5


def primary_pairs(matched: Matched, score: float | None) -> PrimaryPairs:
    """The pairs of all images with at least one non-crowd box; of equally large boxes the first is taken.

    `score` is that of the operating point; None finds nothing.
    """
    data, owner = matched.data, matched.data.image_of_box()
    by_size = np.lexsort((-data.boxes[:, 2:].prod(1), data.crowd, owner))  # stable
    first = by_size[np.nonzero(np.diff(owner, prepend=-1))[0]]  # of each image that has boxes
    largest = first[~data.crowd[first]]
    is_largest = np.isin(np.arange(len(owner)), largest)

    label, iou, found = np.full(len(data), -1), np.zeros(len(data)), np.zeros(len(data), bool)
    best = matched.table.select(np.unique(matched.table.image, return_index=True)[1])  # of falling scores
    label[best.image] = best.label
    pairs = find_overlaps(best, data, at_least=0)
    pairs = pairs.select(is_largest[pairs.box])
    iou[best.image[pairs.detection]] = pairs.iou
    pairs = matched.overlaps.select(is_largest[matched.overlaps.box] & (matched.overlaps.iou >= MATCH_IOU))
    shown = matched.table.score[pairs.detection] >= (np.inf if score is None else score)
    right = matched.table.label[pairs.detection] == data.labels[pairs.box]
    found[owner[pairs.box[right & shown]]] = True
    images = owner[largest]
    return PrimaryPairs(images, data.labels[largest], label[images], iou[images], found[images])


def primary_numbers(pairs: PrimaryPairs) -> dict[str, float | None]:
    """The study's columns and `found`, None without any pair."""
    scores = weighted_scores(pairs, np.ones((len(pairs.image), 1)))
    return {name: None if np.isnan(value) else float(value) for name, (value,) in scores.items()}


def weighted_scores(pairs: PrimaryPairs, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The study's columns and `found` under any weightings of the pairs: (V, W) -> (W,) each, NaN without any pair.

    Precision, recall and F1 of a class are 0 where they are undefined, and their means are weighted by the images of
    each class, so that recall equals accuracy.
    """
    classes, truth = np.unique(pairs.truth, return_inverse=True)
    right, known = pairs.truth == pairs.best, np.isin(pairs.best, classes)
    best = np.searchsorted(classes, pairs.best[known])
    support, hits, answers = np.zeros((3, len(classes), weights.shape[1]))
    np.add.at(support, truth, weights)
    np.add.at(hits, truth[right], weights[right])
    np.add.at(answers, best, weights[known])
    total = weights.sum(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, precision, f1 = support / total, hits / answers, 2 * hits / (answers + support)
        return {
            "accuracy": hits.sum(0) / total,
            "precision": np.where(total, (np.nan_to_num(precision) * share).sum(0), np.nan),
            "recall": hits.sum(0) / total,
            "f1": np.where(total, (np.nan_to_num(f1) * share).sum(0), np.nan),
            "mean_iou": pairs.iou @ weights / total,
            "found": pairs.found.astype(np.float64) @ weights / total,
        }


def headline(table: DetectionTable, data: DetectionData) -> dict[str, float | None]:
    """What an epoch of training reports: the study's columns and `found`, AP50, AP, and the operating point."""
    matched = match_detections(table, data)
    score, ap = operating_point(matched).score, average_precision(matched)
    numbers = {"AP50": mean(ap[0]), "AP": mean(ap), "operating_point": score}
    return primary_numbers(primary_pairs(matched, score)) | numbers


def format_headline(numbers: dict[str, float | None]) -> str:
    """mAP@0.5, AP, accuracy and mean IoU as text, for the terminal."""
    chosen = {"mAP@0.5": "AP50", "AP": "AP", "accuracy": "accuracy", "mean IoU": "mean_iou"}
    return ", ".join(f"{name} {'-' if numbers[key] is None else f'{numbers[key]:.3f}'}" for name, key in chosen.items())
