"""Detections and the ground truth -> matches by COCO's rules and COCO's numbers, to the last digit pycocotools'.

`match_detections` does once what all numbers of a model have in common.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.overlaps import Overlaps, assign, find_overlaps
from common.evaluate.results import ClassNumbers, DetectionNumbers, OperatingPoint

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
RECALLS = np.linspace(0, 1, 101)  # AP is the mean of the precision at these
MAX_DETECTIONS = 100  # of an image and class, COCO's limit
SIZES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # areas, square px
COCO_NUMBERS = tuple(field.name for field in fields(DetectionNumbers))[:12]  # pycocotools', in its order
TINY = np.finfo(np.float64).tiny  # in place of the divisor 0
BLOCK = 1 << 22  # numbers of a block of weights, detections x weightings, 16 MB


@dataclass(frozen=True)
class Matched:
    """The M detections of one model that COCO counts, by image and falling score, and what they match at T thresholds.

    Shapes: objects (N,) bool, the boxes of `data` that count; box (T, M) int32, the object that a detection matches, or
    -1; ignored (T, M) bool, a detection of a box that does not count is neither right nor wrong.
    """

    data: DetectionData
    table: DetectionTable
    overlaps: Overlaps
    objects: np.ndarray
    box: np.ndarray
    ignored: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """(T, M) bool: right detections."""
        return self.box >= 0


def match_detections(table: DetectionTable, data: DetectionData) -> Matched:
    """The detections in the order in which COCO takes them, matched with objects of their class."""
    by_id = np.argsort(np.argsort([image.id for image in data.images]))  # COCO orders equal scores by the image's id
    table = table.select(np.lexsort((-table.score, by_id[table.image])))  # stable
    table = table.select(rank_within(table.image * len(data.class_names) + table.label) < MAX_DETECTIONS)
    return match_by_class(table, find_overlaps(table.image, table.boxes, data), data)


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, in the order given."""
    order = np.argsort(groups, kind="stable")
    starts = np.nonzero(np.diff(groups[order], prepend=-1))[0]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def match_by_class(table: DetectionTable, overlaps: Overlaps, data: DetectionData, size: str = "all") -> Matched:
    """COCO's matches of detections, ordered as `match_detections` orders them, with objects of one of SIZES.

    Other objects are taken only by detections that match none of that size, which are ignored then, as are detections
    of another size without a match.
    """
    low, high = SIZES[size]
    objects = ~data.crowd & (data.areas >= low) & (data.areas <= high)
    areas = table.boxes[:, 2] * table.boxes[:, 3]
    pairs = overlaps.select(table.label[overlaps.detection] == data.labels[overlaps.box])
    matched = Matched(data, table, overlaps, objects, *np.zeros((2, len(IOU_THRESHOLDS), 0), np.int32))
    return _match(matched, pairs, IOU_THRESHOLDS, (areas < low) | (areas > high))


def match_any_class(matched: Matched, chosen: np.ndarray) -> Matched:
    """Matches at MATCH_IOU of the first MAX_DETECTIONS of each image among the `chosen` (M,), whatever their class; the
    others are ignored."""
    rank = rank_within(np.where(chosen, matched.table.image, matched.table.image + len(matched.data)))
    chosen = chosen & (rank < MAX_DETECTIONS)
    return _match(matched, matched.overlaps.select(chosen[matched.overlaps.detection]), IOU_THRESHOLDS[:1], ~chosen)


def _match(matched: Matched, pairs: Overlaps, thresholds: np.ndarray, ignored_alone: np.ndarray) -> Matched:
    """The matches among `pairs`; detections without one are ignored where `ignored_alone` (M,) says so."""
    pairs = pairs.select(pairs.iou >= thresholds[0]).by_preference(~matched.objects)
    box = np.full((len(thresholds), len(ignored_alone)), -1, np.int32)
    ignored = np.zeros(box.shape, bool)
    for t, threshold in enumerate(np.minimum(thresholds, 1 - 1e-10)):  # as pycocotools
        taken = assign(pairs.select(pairs.iou >= threshold), matched.data.crowd, len(ignored_alone))
        is_hit = np.append(matched.objects, False)[taken]
        box[t] = np.where(is_hit, taken, -1)
        ignored[t] = np.where(taken >= 0, ~is_hit, ignored_alone)
    return replace(matched, box=box, ignored=ignored)


def match_boxes_alone(matched: Matched) -> Matched:
    """How well objects are localised, with one class for all: of each box its highest-scoring class is taken."""
    table, data = matched.table, matched.data
    places = np.column_stack([table.image, table.boxes])  # some detectors give one box several classes
    own = np.isin(np.arange(len(table)), np.unique(places, axis=0, return_index=True)[1])
    one_class = replace(data, labels=0 * data.labels)
    return replace(match_any_class(matched, own), data=one_class, table=replace(table, label=0 * table.label))


def average_precision(matched: Matched) -> np.ndarray:
    """(T, K) float64: COCO's AP of each class, NaN for a class without objects."""
    ap = np.full((len(matched.box), len(matched.data.class_names)), np.nan)
    for k, values in weighted_ap(matched, np.ones((len(matched.data), 1), np.float32)):
        ap[:, k] = values[:, 0]
    return ap


def weighted_ap(matched: Matched, weights: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The AP (T, W) float64 of each class that has objects, under W weightings of the images, `weights` (P, W) float32.

    Equal scores rank in the order given. NaN where the weights leave no object.
    """
    for k, rows, objects in _of_each_class(matched):
        ap = np.empty((len(matched.box), weights.shape[1]))
        for part in np.array_split(np.arange(weights.shape[1]), len(rows) * weights.shape[1] // BLOCK + 1):
            block = np.ascontiguousarray(weights[:, part])
            for t, (precision, steps) in enumerate(_precision_steps(matched, rows, objects, block)):
                ap[t, part] = np.einsum("hw,hw->w", precision, steps) / len(RECALLS)
        yield k, np.where(weights[objects].any(0), ap, np.nan)


def precision_at_recalls(matched: Matched) -> np.ndarray:
    """(T, 101) float64: the best precision from each of RECALLS on, mean over the classes that have objects."""
    curves, classes = np.zeros((len(matched.box), len(RECALLS))), list(_of_each_class(matched))
    weights = np.ones((len(matched.data), 1), np.float32)
    for _, rows, objects in classes:
        for t, (precision, steps) in enumerate(_precision_steps(matched, rows, objects, weights)):
            curves[t, : steps.sum()] += np.repeat(precision[:, 0], steps[:, 0])
    return curves / max(1, len(classes))


def _of_each_class(matched: Matched) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each class with objects, its detections (n,) by falling score, and the images (N,) of its objects."""
    labels, images = matched.data.labels[matched.objects], matched.data.image_of_box()[matched.objects]
    order = np.lexsort((-matched.table.score, matched.table.label))
    for k in np.unique(labels).tolist():
        first, end = np.searchsorted(matched.table.label, [k, k + 1], sorter=order)
        yield k, order[first:end], images[labels == k]


def _precision_steps(
    matched: Matched, rows: np.ndarray, objects: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each IoU threshold, at each of a class's h hits: the best precision from there on, and how many of RECALLS
    are reached there first, both (h, W)."""
    image, hit, ignored = matched.table.image[rows], matched.box[:, rows] >= 0, matched.ignored[:, rows]
    total, kept = weights[objects].sum(0, dtype=np.float64), np.zeros((0, weights.shape[1]))
    marks = np.nonzero(hit.any(0))[0]  # precision has its maxima at hits, so sums are only needed up to these
    if len(marks):
        starts = np.append(0, marks[:-1] + 1)
        kept = np.add.reduceat(weights[image[: marks[-1] + 1]], starts, axis=0).cumsum(0, dtype=np.float64)
    for at, aside in zip(map(np.flatnonzero, hit), map(np.flatnonzero, ignored), strict=True):
        right = weights[image[at]].cumsum(0, dtype=np.float64)
        counted = kept[np.searchsorted(marks, at)]
        if len(aside):
            sums = np.insert(weights[image[aside]].cumsum(0, dtype=np.float64), 0, 0, axis=0)
            counted -= sums[np.searchsorted(aside, at)]
        precision, recall = right / np.maximum(counted, TINY), right / np.maximum(total, TINY)
        reached = np.floor(recall * (len(RECALLS) - 1) + 1e-9).astype(np.int64)  # or one less, as floats compare
        reached += RECALLS[reached] <= recall
        yield np.maximum.accumulate(precision[::-1], 0)[::-1], np.diff(reached, prepend=0, axis=0)


def coco_numbers(matched: Matched) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and precision at the recalls 0, 0.01, …, 1.

    They are fractions, None where a number does not exist (no objects of that size, say).
    """
    data, table, precision, recall = matched.data, matched.table, [], []
    rank = rank_within(table.image * len(data.class_names) + table.label)
    for size in SIZES:
        sized = matched if size == "all" else match_by_class(table, matched.overlaps, data, size)
        precision.append(average_precision(sized))
        recall += [_recall(sized, rank < limit) for limit in ((1, 10, 100) if size == "all" else (100,))]
    every, curves = precision[0], zip(("0.5", "0.75"), precision_at_recalls(matched)[[0, 5]].tolist(), strict=True)
    parts = [every, every[0], every[5], *precision[1:], *recall]
    return dict(zip(COCO_NUMBERS, map(mean, parts), strict=True)) | {
        "per_class": {n: ClassNumbers(mean(every[:, k]), mean(every[0, k])) for k, n in enumerate(data.class_names)},
        "precision_at_recall": {iou: None if data.crowd.all() else curve for iou, curve in curves},
    }


def _recall(matched: Matched, kept: np.ndarray) -> np.ndarray:
    """(T, K) share of the objects of each class that the detections `kept` hit, NaN without any."""
    objects = np.bincount(matched.data.labels[matched.objects], minlength=len(matched.data.class_names))
    found = [np.bincount(matched.table.label[hit & kept], minlength=len(objects)) for hit in matched.hit]
    return np.where(objects > 0, found / np.maximum(objects, 1), np.nan)


def mean(values: np.ndarray) -> float | None:
    """The mean of the numbers that exist, None where none does."""
    exists = ~np.isnan(values)
    return float(values[exists].mean()) if exists.any() else None


def operating_point(matched: Matched) -> OperatingPoint:
    """The score threshold with the best F1 over all objects at IoU 0.5, and precision, recall and F1 at it.

    The threshold is chosen on the images that it is reported for. None without objects or detections.
    """
    counted, objects = ~matched.ignored[0], int(matched.objects.sum())
    score, hit = matched.table.score[counted], matched.hit[0][counted]
    if not objects or not len(score):
        return OperatingPoint(None, None, None, None)
    order = np.argsort(-score, kind="stable")
    score, right, kept = score[order], hit[order].cumsum(), np.arange(1, len(order) + 1)
    last = np.append(score[1:] < score[:-1], True)  # equal scores stay together
    f1 = np.where(last, 2 * right / (kept + objects), -1)
    best = int(np.argmax(f1))
    return OperatingPoint(*map(float, (score[best], right[best] / kept[best], right[best] / objects, f1[best])))
