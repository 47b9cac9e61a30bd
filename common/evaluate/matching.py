"""Matches of detections and objects by COCO's rules, for all images at once, and average precision from them.

COCO's twelve numbers come from a library (coco_metrics.py), which does not return the matches. Intervals, kinds of
errors, confusion matrix and calibration need them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
FOUND = 0.5  # IoU from which a detection matches a box, where one threshold is meant
MAX_DETECTIONS = 100  # an image and class, COCO's limit
RECALL_STEPS = 100  # AP is the mean of the precision at recalls 0, 1/100, …, 1


@dataclass(frozen=True)
class Matches:
    """Matches of M detections with N boxes at T IoU thresholds.

    Detections are in the order of image id, class and falling score, without those beyond COCO's limit. Shapes: row
    (M,) int64, index into the table; image (M,) int64, index into the data's images; label (M,) int64; score (M,)
    float64; truth (T, M) int64, the matched box, an index into the data's boxes, or -1; ignored (T, M) bool, matched a
    crowd only, so neither a true nor a false positive; objects (N,) bool, all boxes but crowds; labels and images (N,)
    int64 of the boxes.
    """

    row: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    truth: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """(T, M) bool: true positives."""
        return self.truth >= 0


def match(
    table: DetectionTable, data: DetectionData, thresholds: np.ndarray = IOU_THRESHOLDS, *, by_class: bool = True
) -> Matches:
    """Match detections with boxes as COCO does: by falling score, each with the unmatched box of the highest IoU.

    A crowd box can be matched any number of times, and only by detections that match no object.

    Args:
        table: detections on images of `data`.
        data: the ground truth.
        thresholds: (T,) least IoU of a match.
        by_class: match boxes of the detection's class only; else all classes are one, with label 0.
    """
    classes = len(data.class_names) if by_class else 1
    ids = np.array([image.id for image in data.images], np.int64)
    by_id = np.argsort(ids)
    position = np.argsort(by_id)  # rank of each image by id, by which COCO orders equal scores
    image = by_id[np.searchsorted(ids, table.image_id, sorter=by_id)]
    label = table.label if by_class else np.zeros_like(table.label)
    group = position[image] * classes + label
    row = np.lexsort((-table.score, group))
    row = row[rank_in_group(group[row]) < MAX_DETECTIONS]

    truth_image = data.image_of_box()
    truth_label = data.labels if by_class else np.zeros_like(data.labels)
    truth_group = position[truth_image] * classes + truth_label
    detected, true = BoxesWithArea.of(table.boxes[row]), BoxesWithArea.of(data.boxes)
    truth = np.full((len(thresholds), len(row)), -1)
    ignored = np.zeros(truth.shape, bool)
    for detections, boxes in paired_groups(group[row], truth_group):
        steps = _match_groups(detections, boxes, detected, true, data.crowd, thresholds)
        for current, matched, in_crowd in steps:
            truth[:, current], ignored[:, current] = matched.T, in_crowd.T
    return Matches(row, image[row], label[row], table.score[row], truth, ignored, ~data.crowd, truth_label, truth_image)


def rank_in_group(groups: np.ndarray) -> np.ndarray:
    """Position of each element in its group; `groups` is sorted."""
    _, first, counts = np.unique(groups, return_index=True, return_counts=True)
    return np.arange(len(groups)) - np.repeat(first, counts)


def paired_groups(groups: np.ndarray, truth_groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of index arrays (G, D) and (G, B) into detections and boxes, for the groups with both, padded with -1.

    Groups with similar numbers of boxes share a pair, for little padding; groups with more detections come first.
    """
    order = np.argsort(truth_groups, kind="stable")
    names, first, counts = np.unique(groups, return_index=True, return_counts=True)
    truth_names, truth_first, truth_counts = np.unique(truth_groups[order], return_index=True, return_counts=True)
    _, left, right = np.intersect1d(names, truth_names, assume_unique=True, return_indices=True)
    width = np.ceil(np.log2(truth_counts[right])).astype(int)
    for size in np.unique(width):
        a, b = left[width == size], right[width == size]
        by_count = np.argsort(-counts[a], kind="stable")
        a, b = a[by_count], b[by_count]
        boxes = _ranges(truth_first[b], truth_counts[b])
        yield _ranges(first[a], counts[a]), np.where(boxes < 0, -1, order[boxes])


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(G, largest count) int64: rows first, first + 1, …, padded with -1."""
    steps = np.arange(counts.max())
    return np.where(steps < counts[:, None], first[:, None] + steps, -1)


def _match_groups(
    detections: np.ndarray,
    boxes: np.ndarray,
    detected: "BoxesWithArea",
    true: "BoxesWithArea",
    crowd: np.ndarray,
    thresholds: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Match one pair of `paired_groups`: the first detection of all groups at once, then the second, and so on.

    Yields, for each rank, the detections (n,), the box that each matched at each threshold (n, T) or -1, and whether
    it matched a crowd only (n, T).
    """
    real = boxes >= 0
    is_crowd = crowd[boxes] & real
    free = np.repeat((real & ~is_crowd)[:, None], len(thresholds), axis=1)  # (G, T, B)
    floor = np.minimum(thresholds, 1 - 1e-10)[None, :, None]
    for column in detections.T:
        count = np.count_nonzero(column >= 0)
        current, rows = column[:count], np.arange(count)[:, None]
        iou = detected.at(current[:, None]).iou(true.at(boxes[:count]), is_crowd[:count])[:, None]
        good = iou >= floor
        allowed = np.where(free[:count] & good, iou, -1.0)
        best = allowed.shape[2] - 1 - allowed[..., ::-1].argmax(2)  # the last of equals, as pycocotools
        hit = np.take_along_axis(allowed, best[..., None], 2)[..., 0] >= 0
        columns = np.arange(len(thresholds))[None]
        free[rows, columns, best] &= ~hit
        in_crowd = (good & is_crowd[:count, None]).any(2) & ~hit
        yield current, np.where(hit, boxes[rows, best], -1), in_crowd


@dataclass(frozen=True)
class BoxesWithArea:
    """xyxy (..., 4) boxes and area (...) float64, the product of the width and height in the file."""

    xyxy: np.ndarray
    area: np.ndarray

    @classmethod
    def of(cls, boxes: np.ndarray) -> "BoxesWithArea":
        """Of boxes (..., 4) float64 xywh."""
        low, sides = boxes[..., :2], boxes[..., 2:]
        return cls(np.concatenate([low, low + sides], axis=-1), sides.prod(-1))

    def at(self, index: np.ndarray) -> "BoxesWithArea":
        return BoxesWithArea(self.xyxy[index], self.area[index])

    def iou(self, others: "BoxesWithArea", crowd: np.ndarray | bool = False) -> np.ndarray:
        """IoU with the others, broadcast; where they are a `crowd`, the share of these boxes inside them."""
        a, b = self.xyxy, others.xyxy
        sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
        overlap = sides[..., 0] * sides[..., 1]
        return overlap / np.maximum(np.where(crowd, self.area, self.area + others.area - overlap), 1e-12)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of xywh boxes (..., 4) and (..., 4), broadcast."""
    return BoxesWithArea.of(a).iou(BoxesWithArea.of(b))


@dataclass(frozen=True)
class Ranking:
    """True and false positives and objects: all that average precision depends on.

    Shapes: label, image (M,) int64, score (M,) float64 and hit (M,) bool of the detections, no object hit twice;
    object_label, object_image (N,) int64.
    """

    label: np.ndarray
    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    object_label: np.ndarray
    object_image: np.ndarray


def ranking(matches: Matches, threshold: int = 0) -> Ranking:
    """The detections and objects at the threshold of that index, without detections of crowds."""
    counted, objects = ~matches.ignored[threshold], matches.objects
    return Ranking(
        matches.label[counted],
        matches.image[counted],
        matches.score[counted],
        matches.hit[threshold][counted],
        matches.labels[objects],
        matches.images[objects],
    )


def operating_point(ranked: Ranking) -> dict[str, float | None]:
    """The score threshold with the best F1 over all objects, and precision, recall and F1 at it.

    The threshold is chosen on the images that it is reported for. None without objects or detections.
    """
    objects, order = len(ranked.object_label), np.argsort(-ranked.score, kind="stable")
    if not objects or not len(order):
        return dict.fromkeys(("score", "precision", "recall", "f1"))
    score, right = ranked.score[order], ranked.hit[order].cumsum()
    kept = np.arange(1, len(order) + 1)
    f1 = np.where(
        np.append(score[1:] < score[:-1], True), 2 * right / (kept + objects), -1
    )  # equal scores stay together
    best = int(np.argmax(f1))
    numbers = score[best], right[best] / kept[best], right[best] / objects, f1[best]
    return dict(zip(("score", "precision", "recall", "f1"), map(float, numbers), strict=True))


def average_precision(ranked: Ranking, classes: int, weights: np.ndarray) -> np.ndarray:
    """COCO's average precision of each class, under any number of weightings of the images.

    Precision has its maxima at true positives, so it is computed at these only.

    Args:
        ranked: detections and objects; equal scores rank in the order given.
        classes: K.
        weights: (P, W) float32 weight of each image, a multiple of a negative power of two so that sums are exact;
            ones for COCO's number.

    Returns:
        (K, W) float64, NaN where the weighted images hold no object of the class.
    """
    order = np.lexsort((-ranked.score, ranked.label))
    label, image, hit = ranked.label[order], ranked.image[order], ranked.hit[order]
    bounds = np.searchsorted(label, np.arange(classes + 1))
    result = np.full((classes, weights.shape[1]), np.nan)
    for k in np.unique(ranked.object_label):
        part = slice(bounds[k], bounds[k + 1])
        images_of_objects = ranked.object_image[ranked.object_label == k]
        objects = weights[images_of_objects].sum(0, dtype=np.float64)
        precision = _mean_precision(image[part], hit[part], objects, weights)
        result[k] = np.where(objects > 0, precision, np.nan)
    return result


def _mean_precision(image: np.ndarray, hit: np.ndarray, objects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) detections of one class by falling score, (W,) numbers of objects -> (W,) mean precision over recalls."""
    hits = np.nonzero(hit)[0]
    if len(hits) == 0:
        return np.zeros_like(objects)
    starts = np.concatenate([[0], hits[:-1] + 1])  # of the runs of detections that end with a true positive
    detections = np.add.reduceat(weights[image[: hits[-1] + 1]], starts, axis=0, dtype=np.float64).cumsum(0)
    right = weights[image[hits]].cumsum(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(detections > 0, right / detections, 0)
        recall = np.where(objects > 0, right / objects, 0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(np.linspace(0, 1, RECALL_STEPS + 1), recall, side="right")
    steps = np.diff(reached, axis=0, prepend=0)
    return (envelope * steps).sum(0) / (RECALL_STEPS + 1)
