"""The columns of the original study, which compare the largest object of an image with its surest detection, and
`found`, which asks whether any detection that a user would be shown is that object."""

from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.matching import FOUND, box_iou


@dataclass(frozen=True)
class PrimaryPairs:
    """The largest object of each of V images beside what the model detects there.

    Shapes: image (V,) int64, index into the data's images; truth (V,) int64 label of the object; predicted (V,) int64
    label of the highest-scoring detection, -1 where nothing was detected, and iou (V,) float64 of its box and the
    object's, 0 where nothing was detected; found (V,) bool, some detection at or above the operating point has the
    object's label and an IoU of at least 0.5 with it.
    """

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray
    found: np.ndarray


def primary_pairs(table: DetectionTable, data: DetectionData, score: float | None) -> PrimaryPairs:
    """The pairs of all images with at least one non-crowd box; of equally large boxes the first is taken.

    Args:
        table: the detections of one model.
        data: the ground truth.
        score: of the operating point; None finds nothing.
    """
    owners = data.image_of_box()
    boxes = np.nonzero(~data.crowd)[0]
    by_size = boxes[np.lexsort((-data.boxes[boxes, 2:].prod(1), owners[boxes]))]  # stable
    images, first = np.unique(owners[by_size], return_index=True)
    largest = by_size[first]
    best = table.best_per_image()
    ids = np.array([data.images[index].id for index in images], np.int64)
    place = np.searchsorted(best.image_id, ids)
    detected = np.isin(ids, best.image_id)
    predicted, iou = np.full(len(images), -1), np.zeros(len(images))
    predicted[detected] = best.label[place[detected]]
    iou[detected] = box_iou(best.boxes[place[detected]], data.boxes[largest[detected]])
    return PrimaryPairs(images, data.labels[largest], predicted, iou, _found(table.at_least(score), data, ids, largest))


def _found(table: DetectionTable, data: DetectionData, ids: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(V,) bool: does the table contain the box of that index (V,) in the image of that id (V,), by IoU and label?"""
    table = table.select(np.isin(table.image_id, ids))  # some images have crowds alone
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, table.image_id, sorter=order)]
    largest = boxes[place]
    same = (table.label == data.labels[largest]) & (box_iou(table.boxes, data.boxes[largest]) >= FOUND)
    return np.isin(np.arange(len(ids)), place[same])


def primary_object(pairs: PrimaryPairs) -> dict:
    """The study's columns: the image's largest object against the model's highest-scoring detection; and `found`.

    Only images with at least one non-crowd box count. Precision, recall and F1 are averaged over the classes,
    weighted by the number of images of each class (so recall equals accuracy). IoU is 0 where nothing was detected.
    The columns see one detection an image, so a model that finds every object may still be wrong; `found` is the share
    of images whose largest object is detected, with its class, at or above the operating point.
    """
    scores = weighted_scores(pairs, np.ones((len(pairs.image), 1)))
    return {name: None if np.isnan(value) else float(value) for name, (value,) in scores.items()}


def weighted_scores(pairs: PrimaryPairs, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The study's columns and `found` under any weightings of the pairs: (V, W) -> (W,) each, NaN without any pair.

    Precision, recall and F1 of a class are weighted by its support, and 0 where they are undefined.
    """
    classes = np.unique(pairs.truth)
    right = pairs.truth == pairs.predicted
    truth, predicted = ((labels == classes[:, None]).astype(np.float64) for labels in (pairs.truth, pairs.predicted))
    support, hits, answers = truth @ weights, (truth * right) @ weights, predicted @ weights  # (C, W)
    total = weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = support / total
        return {
            "accuracy": right @ weights / total,
            "precision": np.where(total, (_ratio(hits, answers) * share).sum(0), np.nan),
            "recall": hits.sum(0) / total,
            "f1": np.where(total, (_ratio(2 * hits, answers + support) * share).sum(0), np.nan),
            "mean_iou": pairs.iou @ weights / total,
            "found": pairs.found @ weights / total,
        }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
