"""Detections and the ground truth -> matches by COCO's rules and COCO's numbers, to the last digit pycocotools'.

`match_detections` does once what all numbers of a model have in common.
"""

from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.overlaps import MATCH_IOU, Overlaps, assign, find_overlaps
from common.evaluate.results import ClassNumbers, OperatingPoint

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
RECALLS = np.linspace(0, 1, 101)  # AP is the mean of the precision at these
MAX_DETECTIONS = 100  # of an image and class, COCO's limit
SIZES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # areas, square px
COCO_NUMBERS = (  # pycocotools' twelve, in its order
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
CURVES = {"0.5": 0, "0.75": 5}  # IoU and its index among COCO's thresholds


@dataclass(frozen=True)
class Matches:
    """M detections, the objects that they match at T IoU thresholds, and all objects: what AP is made of.

    Shapes: image, label (M,) int64 and score (M,) float64 of the detections; box (T, M) int32, the matched object, or
    -1; ignored (T, M) bool, a detection of a crowd, or of a size that is not asked for, is neither right nor wrong;
    object_image, object_label (N,) int64 of the objects that count.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    box: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """(T, M) bool: right detections."""
        return self.box >= 0


@dataclass(frozen=True)
class MatchedDetections:
    """The detections of one model that COCO counts, by image and falling score, and what they overlap and match.

    Shapes: rank (M,) int64 among those of its image and class. `by_class` are COCO's matches at IOU_THRESHOLDS.
    """

    table: DetectionTable
    rank: np.ndarray
    overlaps: Overlaps
    by_class: Matches


def match_detections(table: DetectionTable, data: DetectionData) -> MatchedDetections:
    """The detections in the order in which COCO takes them, matched with boxes of their class."""
    by_id = np.empty(len(data), np.int64)  # rank of each image by its id, by which COCO orders equal scores
    by_id[np.argsort(np.array([image.id for image in data.images], np.int64))] = np.arange(len(data))
    order = np.lexsort((-table.score, by_id[table.image]))  # stable
    rank = rank_within(table.image[order] * len(data.class_names) + table.label[order])
    counted = rank < MAX_DETECTIONS
    table, rank = table.select(order[counted]), rank[counted]
    overlaps = find_overlaps(table.image, table.boxes, data)
    return MatchedDetections(table, rank, overlaps, match_by_class(table, overlaps, data))


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, in the order given."""
    order = np.argsort(groups, kind="stable")
    starts = np.nonzero(np.diff(groups[order], prepend=-1))[0]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def match_by_class(table: DetectionTable, overlaps: Overlaps, data: DetectionData, size: str = "all") -> Matches:
    """COCO's matches of detections, ordered as `match_detections` orders them, with objects of one of SIZES.

    Other objects are taken only by detections that match none of that size, which are ignored then, as are detections
    of another size without a match.
    """
    low, high = SIZES[size]
    objects = ~data.crowd & (data.areas >= low) & (data.areas <= high)
    areas = table.boxes[:, 2] * table.boxes[:, 3]
    other_size = (areas < low) | (areas > high)
    same_class = table.label[overlaps.detection] == data.labels[overlaps.box]
    pairs = overlaps.select(same_class & (overlaps.iou >= IOU_THRESHOLDS[0])).by_preference(~objects)
    box = np.full((len(IOU_THRESHOLDS), len(table)), -1, np.int32)
    ignored = np.zeros(box.shape, bool)
    for t, threshold in enumerate(np.minimum(IOU_THRESHOLDS, 1 - 1e-10)):
        taken = assign(pairs.select(pairs.iou >= threshold), data.crowd, len(table))
        matched = taken >= 0
        hit = np.nonzero(matched)[0]
        hit = hit[objects[taken[hit]]]
        box[t, hit] = taken[hit]
        ignored[t] = np.where(matched, box[t] < 0, other_size)
    truth = data.image_of_box()[objects], data.labels[objects]
    return Matches(table.image, table.label, table.score, box, ignored, *truth)


def match_any_class(matched: MatchedDetections, data: DetectionData, chosen: np.ndarray) -> tuple[np.ndarray, Matches]:
    """Matches at MATCH_IOU of the first MAX_DETECTIONS of each image among the `chosen` (M,), whatever their class.

    Returns:
        rows: (m,) int64 of these detections.
        matches: of these, with one IoU threshold and 0 for every class.
    """
    rows = np.nonzero(chosen)[0]
    rows = rows[rank_within(matched.table.image[rows]) < MAX_DETECTIONS]
    place = np.full(len(chosen), -1)
    place[rows] = np.arange(len(rows))
    overlaps = matched.overlaps
    pairs = overlaps.select((place[overlaps.detection] >= 0) & (overlaps.iou >= MATCH_IOU)).by_preference(data.crowd)
    taken = assign(pairs, data.crowd, len(chosen))[rows]
    in_crowd = (taken >= 0) & np.append(data.crowd, False)[taken]
    box = np.where(in_crowd, -1, taken).astype(np.int32)
    objects = data.image_of_box()[~data.crowd]
    label, object_label = np.zeros_like(rows), np.zeros_like(objects)
    score = matched.table.score[rows]
    return rows, Matches(matched.table.image[rows], label, score, box[None], in_crowd[None], objects, object_label)


def match_boxes_alone(matched: MatchedDetections, data: DetectionData) -> Matches:
    """How well objects are localised, whatever their class: of each box its highest-scoring class is taken."""
    return match_any_class(matched, data, has_own_box(matched))[1]


def has_own_box(matched: MatchedDetections) -> np.ndarray:
    """(M,) bool: no detection of the image with a higher score has the same box; some detectors give one more class."""
    order = np.lexsort((*matched.table.boxes.T, matched.table.image))  # stable
    table = matched.table.select(order)
    same = (table.image[1:] == table.image[:-1]) & (table.boxes[1:] == table.boxes[:-1]).all(1)
    own = np.ones(len(table), bool)
    own[order[1:][same]] = False
    return own


def precision_at_recalls(matches: Matches, classes: int) -> np.ndarray:
    """(T, 101, K) float64: the best precision of each class from each of RECALLS on, 0 where no detection reaches it.

    Equal scores rank in the order given. NaN for classes without objects.
    """
    order = np.lexsort((-matches.score, matches.label))
    bounds = np.searchsorted(matches.label[order], np.arange(classes + 1))
    objects = np.bincount(matches.object_label, minlength=classes)
    result = np.full((len(matches.box), len(RECALLS), classes), np.nan)
    for k in np.nonzero(objects)[0]:
        rows = order[bounds[k] : bounds[k + 1]]
        for t, (box, ignored) in enumerate(zip(matches.box, matches.ignored, strict=True)):
            result[t, :, k] = _precision_curve(box[rows] >= 0, ignored[rows], objects[k])
    return result


def _precision_curve(hit: np.ndarray, ignored: np.ndarray, objects: int) -> np.ndarray:
    """(101,) of one class; hit and ignored (n,) by falling score. Precision has its maxima at hits."""
    at = np.nonzero(hit)[0]
    right = np.arange(1, len(at) + 1)
    precision = right / (at + 1 - ignored.cumsum()[at])
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return best[np.searchsorted(right / objects, RECALLS)]


def coco_numbers(matched: MatchedDetections, data: DetectionData) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and precision at the recalls 0, 0.01, …, 1.

    They are fractions, None where a number does not exist (no objects of that size, say).
    """
    names, precision, recall = data.class_names, {}, {}
    for size in SIZES:
        matches = matched.by_class
        if size != "all":
            matches = match_by_class(matched.table, matched.overlaps, data, size)
        precision[size] = precision_at_recalls(matches, len(names))
        for limit in (1, 10, 100) if size == "all" else (100,):
            recall[size, limit] = _recall(matches, matched.rank < limit, len(names))
    every = precision.pop("all")
    parts = [every, every[0], every[5], *precision.values(), *recall.values()]
    exists = ~np.isnan(every[0, 0])
    return dict(zip(COCO_NUMBERS, map(mean, parts), strict=True)) | {
        "per_class": {name: ClassNumbers(mean(every[..., k]), mean(every[0, :, k])) for k, name in enumerate(names)},
        "precision_at_recall": {
            iou: every[t][:, exists].mean(1).tolist() if exists.any() else None for iou, t in CURVES.items()
        },
    }


def _recall(matches: Matches, kept: np.ndarray, classes: int) -> np.ndarray:
    """(T, K) share of the objects of each class that the detections `kept` hit, NaN without any."""
    objects = np.bincount(matches.object_label, minlength=classes)
    found = np.stack([np.bincount(matches.label[hit & kept], minlength=classes) for hit in matches.hit])
    return np.where(objects > 0, found / np.maximum(objects, 1), np.nan)


def mean(values: np.ndarray) -> float | None:
    """The mean of the numbers that exist, None where none does."""
    exists = ~np.isnan(values)
    return float(values[exists].mean()) if exists.any() else None


def operating_point(matches: Matches) -> OperatingPoint:
    """The score threshold with the best F1 over all objects at IoU 0.5, and precision, recall and F1 at it.

    The threshold is chosen on the images that it is reported for. None without objects or detections.
    """
    counted, objects = ~matches.ignored[0], len(matches.object_label)
    score, hit = matches.score[counted], matches.hit[0][counted]
    if not objects or not len(score):
        return OperatingPoint(None, None, None, None)
    order = np.argsort(-score, kind="stable")
    score, right, kept = score[order], hit[order].cumsum(), np.arange(1, len(order) + 1)
    last = np.append(score[1:] < score[:-1], True)  # equal scores stay together
    f1 = np.where(last, 2 * right / (kept + objects), -1)
    best = int(np.argmax(f1))
    return OperatingPoint(*map(float, (score[best], right[best] / kept[best], right[best] / objects, f1[best])))
