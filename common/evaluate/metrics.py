"""Detections and the ground truth -> matches by COCO's rules and COCO's numbers, to the last digit pycocotools'."""

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
    """The M detections of a model that COCO counts, by image and falling score, and what they match at T thresholds."""

    data: DetectionData
    table: DetectionTable
    overlaps: Overlaps
    objects: np.ndarray  # (N,) bool, the boxes of `data` that count
    box: np.ndarray  # (T, M) int32, the object that a detection matches, or -1
    ignored: np.ndarray  # (T, M) bool, a detection of a box that does not count is neither right nor wrong

    @property
    def hit(self) -> np.ndarray:
        """(T, M) bool: right detections."""
        return self.box >= 0


def match_detections(table: DetectionTable, data: DetectionData, thresholds: np.ndarray = IOU_THRESHOLDS) -> Matched:
    """The detections in the order in which COCO takes them, matched with objects of their class."""
    by_id = np.argsort(np.argsort([image.id for image in data.images]))  # COCO orders equal scores by the image's id
    table = table.select(np.lexsort((-table.score, by_id[table.image])))  # stable
    table = table.select(rank_within(table.image * len(data.class_names) + table.label) < MAX_DETECTIONS)
    return _match(table, data, find_overlaps(table, data), thresholds, "all")


def match_any_class(table: DetectionTable, data: DetectionData) -> Matched:
    """As `match_detections` does at MATCH_IOU, with one class for all."""
    table, data = replace(table, label=0 * table.label), replace(data, labels=0 * data.labels)
    return match_detections(table, data, IOU_THRESHOLDS[:1])


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, in the order given."""
    order = np.argsort(groups, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return rank


def _match(
    table: DetectionTable, data: DetectionData, overlaps: Overlaps, thresholds: np.ndarray, size: str
) -> Matched:
    """The matches with objects of one of SIZES, of detections in the order of `match_detections`.

    Objects of another size are taken only by detections that match none of this one, which are ignored then, as are
    detections of another size without a match.
    """
    (low, high), areas = SIZES[size], table.boxes[:, 2:].prod(1)
    objects = ~data.crowd & (data.areas >= low) & (data.areas <= high)
    own = (overlaps.iou >= thresholds[0]) & (table.label[overlaps.detection] == data.labels[overlaps.box])
    pairs = overlaps.select(own).by_preference(~objects)
    box, ignored = [], []
    for threshold in np.minimum(thresholds, 1 - 1e-10):  # as pycocotools
        taken = assign(pairs.select(pairs.iou >= threshold), data.crowd, len(table))
        hit = np.append(objects, False)[taken]
        box.append(np.where(hit, taken, -1))
        ignored.append(np.where(taken >= 0, ~hit, (areas < low) | (areas > high)))
    return Matched(data, table, overlaps, objects, np.array(box, np.int32), np.array(ignored))


def match_boxes_alone(matched: Matched) -> Matched:
    """How well objects are localised: `match_any_class` of the highest-scoring detection of each box."""
    places = np.column_stack([matched.table.image, matched.table.boxes])  # some detectors give one box several classes
    first = np.sort(np.unique(places, axis=0, return_index=True)[1])
    return match_any_class(matched.table.select(first), matched.data)


def average_precision(matched: Matched) -> np.ndarray:
    """(T, K) float64: COCO's AP of each class, NaN for a class without objects."""
    return weighted_ap(matched, np.ones((len(matched.data), 1), np.float32))[..., 0]


def weighted_ap(matched: Matched, weights: np.ndarray) -> np.ndarray:
    """(T, K, W) float64: the AP under W weightings of the images, `weights` (P, W) float32.

    Equal scores rank in the order given. NaN where the weights leave no object.
    """
    ap = np.full((len(matched.box), len(matched.data.class_names), weights.shape[1]), np.nan)
    for k, t, part, total, precision, steps in _precision_steps(matched, weights):
        ap[t, k, part] = np.where(total > 0, np.einsum("hw,hw->w", precision, steps) / len(RECALLS), np.nan)
    return ap


def _precision_steps(matched: Matched, weights: np.ndarray) -> Iterator[tuple]:
    """For each class with objects, each IoU threshold, and each block of `weights` (P, W): their places, the total
    weight of the objects (W,), and at each of h hits the best precision from there on, and how many of RECALLS are
    reached there first, both (h, W)."""
    table, owners = matched.table, matched.data.image_of_box()
    order, labels = np.lexsort((-table.score, table.label)), np.where(matched.objects, matched.data.labels, -1)
    for k in np.unique(labels[matched.objects]).tolist():
        rows = order[slice(*np.searchsorted(table.label, [k, k + 1], sorter=order))]
        image, size = table.image[rows], weights.shape[1]
        for part in np.array_split(np.arange(size), len(rows) * size // BLOCK + 1):
            block = np.ascontiguousarray(weights[:, part])
            total, every = block[owners[labels == k]].sum(0, dtype=np.float64), block[image].cumsum(0, dtype=np.float64)
            for t, (hit, ignored) in enumerate(zip(matched.hit[:, rows], matched.ignored[:, rows], strict=True)):
                at, aside = np.flatnonzero(hit), np.flatnonzero(ignored)
                right, counted = block[image[at]].cumsum(0, dtype=np.float64), every[at]
                if len(aside):
                    sums = np.insert(block[image[aside]].cumsum(0, dtype=np.float64), 0, 0, axis=0)
                    counted -= sums[np.searchsorted(aside, at)]
                precision, recall = right / np.maximum(counted, TINY), right / np.maximum(total, TINY)
                reached = (recall * (len(RECALLS) - 1) + 1e-9).astype(np.int64)  # or one less, as floats compare
                reached += RECALLS[reached] <= recall
                best = np.maximum.accumulate(precision[::-1], 0)[::-1]
                yield k, t, part, total, best, np.diff(reached, prepend=0, axis=0)


def coco_numbers(matched: Matched) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and the best precision from each of RECALLS on,
    mean over the classes. They are fractions, None where a number does not exist (no objects of that size, say)."""
    data, table = matched.data, matched.table
    rank = rank_within(table.image * len(data.class_names) + table.label)
    sizes = [matched, *(_match(table, data, matched.overlaps, IOU_THRESHOLDS, size) for size in SIZES if size != "all")]
    every, *sized = map(average_precision, sizes)
    recall = [_recall(matched, rank < 1), _recall(matched, rank < 10), *(_recall(m, rank >= 0) for m in sizes)]
    curves, classes = np.zeros((len(matched.box), len(RECALLS))), len(np.unique(data.labels[matched.objects]))
    for _, t, _, _, precision, steps in _precision_steps(matched, np.ones((len(data), 1), np.float32)):
        curves[t, : steps.sum()] += np.repeat(precision[:, 0], steps[:, 0]) / classes
    return dict(zip(COCO_NUMBERS, map(mean, [every, every[0], every[5], *sized, *recall]), strict=True)) | {
        "per_class": {n: ClassNumbers(mean(every[:, k]), mean(every[0, k])) for k, n in enumerate(data.class_names)},
        "precision_at_recall": {iou: curves[t].tolist() if classes else None for iou, t in (("0.5", 0), ("0.75", 5))},
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
