"""The columns of the original study: the largest object against the highest-scoring detection."""

from dataclasses import dataclass

import numpy as np

from common.data.coco import CocoData


@dataclass(frozen=True)
class PrimaryPairs:
    """The largest object of each of V images beside the model's surest detection there.

    Shapes: image (V,) int64, index into `CocoData.images`; truth, answer (V,) int64 labels, the answer -1 where
    nothing was detected; iou (V,) float64 of the two boxes, 0 likewise.
    """

    image: np.ndarray
    truth: np.ndarray
    answer: np.ndarray
    iou: np.ndarray


def primary_pairs(table: np.ndarray, data: CocoData) -> PrimaryPairs:
    """The pairs of all images with at least one non-crowd box."""
    best, rows = _best_rows(table), []
    for index, image in enumerate(data.images):
        part = np.arange(data.starts[index], data.starts[index + 1])
        part = part[~data.crowd[part]]
        if len(part) == 0:
            continue
        largest = part[np.argmax(data.boxes[part, 2] * data.boxes[part, 3])]
        found = best.get(image.id)
        answer, iou = (-1, 0.0) if found is None else (int(found[6]), _iou(data.boxes[largest], found[1:5]))
        rows.append((index, data.labels[largest], answer, iou))
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return PrimaryPairs(*columns[:3].astype(np.int64), columns[3])


def primary_object(table: np.ndarray, data: CocoData) -> dict:
    """The study's columns: the image's largest object against the model's highest-scoring detection.

    Only images with at least one non-crowd box count. Precision, recall and F1 are averaged over the classes,
    weighted by how many images have that class (so recall equals accuracy). IoU is 0 where nothing was detected.
    """
    pairs = primary_pairs(table, data)
    scores = weighted_scores(pairs, np.ones((len(pairs.image), 1)))
    return {name: None if np.isnan(value) else float(value) for name, (value,) in scores.items()}


def weighted_scores(pairs: PrimaryPairs, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The study's columns under any number of weightings of the pairs: (V, W) -> (W,) each, NaN without any pair.

    Precision, recall and F1 of a class count by its support, 0 where they are undefined.
    """
    classes = np.unique(pairs.truth)
    right = pairs.truth == pairs.answer
    truth, answer = ((labels == classes[:, None]).astype(np.float64) for labels in (pairs.truth, pairs.answer))
    support, hits, answered = truth @ weights, (truth * right) @ weights, answer @ weights  # (C, W)
    total = weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = support / total
        return {
            "accuracy": right @ weights / total,
            "precision": np.where(total, (_ratio(hits, answered) * share).sum(0), np.nan),
            "recall": hits.sum(0) / total,
            "f1": np.where(total, (_ratio(2 * hits, answered + support) * share).sum(0), np.nan),
            "mean_iou": pairs.iou @ weights / total,
        }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _best_rows(table: np.ndarray) -> dict[int, np.ndarray]:
    """Image id -> the row with the highest score, the first of equals."""
    order = np.argsort(-table[:, 5], kind="stable")
    image_ids, first = np.unique(table[order, 0], return_index=True)
    return dict(zip(image_ids.astype(np.int64).tolist(), table[order[first]], strict=True))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two xywh boxes."""
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    overlap = np.prod(np.maximum(sides, 0))
    return float(overlap / (a[2] * a[3] + b[2] * b[3] - overlap))
