"""Detections and the ground truth -> matches by COCO's rules and COCO's numbers, to the last digit pycocotools'.

`match_detections` does once what all numbers of a model have in common.
"""

from dataclasses import dataclass

import numpy as np

from common.data.coco import CocoData, xyxy_to_xywh
from common.evaluate.detections import DetectionTable
from common.evaluate.overlaps import Overlaps, assign, find_overlaps

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
    """The boxes that M detections match by class at COCO's T IoU thresholds.

    Shapes: box (T, M) int32, an object, or -1; ignored (T, M) bool, a detection of a crowd, or of a size that is not
    asked for, is neither right nor wrong; objects (N,) bool, the boxes that count.
    """

    box: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """(T, M) bool: right detections."""
        return self.box >= 0


@dataclass(frozen=True)
class MatchedDetections:
    """The detections of one model that COCO counts, by image and falling score, and what they overlap and match.

    Shapes: image (M,) int64 index into the images; rank (M,) int64 among the detections of its image and class.
    """

    table: DetectionTable
    image: np.ndarray
    rank: np.ndarray
    overlaps: Overlaps
    matches: Matches


def match_detections(table: DetectionTable, data: CocoData) -> MatchedDetections:
    """The detections in the order in which COCO takes them, matched with boxes of their class."""
    ids = np.array([image.id for image in data.images], np.int64)
    by_id = np.argsort(ids)
    order = np.lexsort((-table.score, table.image_id))  # stable; COCO orders images by their ids
    image = by_id[np.searchsorted(ids, table.image_id[order], sorter=by_id)]
    rank = rank_within(image * len(data.class_names) + table.label[order])
    counted = rank < MAX_DETECTIONS
    table, image, rank = table.select(order[counted]), image[counted], rank[counted]
    true_boxes = xyxy_to_xywh(data.boxes, data.file_sides)
    overlaps = find_overlaps(image, xyxy_to_xywh(table.boxes, table.file_sides), data.starts, true_boxes, data.crowd)
    return MatchedDetections(table, image, rank, overlaps, match_by_class(table, overlaps, data))


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, in the order given."""
    order = np.argsort(groups, kind="stable")
    starts = np.nonzero(np.diff(groups[order], prepend=-1))[0]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def match_by_class(table: DetectionTable, overlaps: Overlaps, data: CocoData, size: str = "all") -> Matches:
    """COCO's matches of detections, ordered as `match_detections` orders them, for the objects of one of SIZES.

    Other objects are taken only by detections that match none of that size, which are ignored then, as are detections
    of another size without a match.
    """
    low, high = SIZES[size]
    objects = ~data.crowd & (data.areas >= low) & (data.areas <= high)
    areas = table.sides().prod(1)
    other_size = (areas < low) | (areas > high)
    same_class = table.label[overlaps.detection] == data.labels[overlaps.box]
    pairs = overlaps.select(same_class & (overlaps.iou >= IOU_THRESHOLDS[0])).by_preference(~objects)
    box = np.full((len(IOU_THRESHOLDS), len(table)), -1, np.int32)
    ignored = np.zeros(box.shape, bool)
    for t, threshold in enumerate(np.minimum(IOU_THRESHOLDS, 1 - 1e-10)):
        taken = assign(pairs.select(pairs.iou >= threshold), data.crowd, len(table))
        hit = (taken >= 0) & objects[taken]
        box[t, hit] = taken[hit]
        ignored[t] = np.where(taken >= 0, ~hit, other_size)
    return Matches(box, ignored, objects)


def precision_at_recalls(
    label: np.ndarray, score: np.ndarray, hit: np.ndarray, ignored: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """(T, 101, K) float64: the best precision of each class from each of RECALLS on, 0 where no detection reaches it.

    Args:
        label: (M,) int64 of the detections; equal scores rank in the order given, likewise score (M,).
        hit: (T, M) bool, no object hit twice, likewise ignored.
        objects: (K,) number of the objects of each class; without any the precision is NaN.
    """
    order = np.lexsort((-score, label))
    bounds = np.searchsorted(label[order], np.arange(len(objects) + 1))
    result = np.full((len(hit), len(RECALLS), len(objects)), np.nan)
    for k in np.nonzero(objects)[0]:
        rows = order[bounds[k] : bounds[k + 1]]
        for t in range(len(hit)):
            result[t, :, k] = _precision_curve(hit[t, rows], ignored[t, rows], objects[k])
    return result


def _precision_curve(hit: np.ndarray, ignored: np.ndarray, objects: int) -> np.ndarray:
    """(101,) of one class; hit and ignored (n,) by falling score. Precision has its maxima at hits."""
    at = np.nonzero(hit)[0]
    right = np.arange(1, len(at) + 1)
    precision = right / (at + 1 - ignored.cumsum()[at])
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return best[np.searchsorted(right / objects, RECALLS)]


def coco_numbers(matched: MatchedDetections, data: CocoData) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and precision at the recalls 0, 0.01, …, 1.

    They are fractions, None where a number does not exist (no objects of that size, say).
    """
    table, precision, recall = matched.table, {}, {}
    for size in SIZES:
        matches = matched.matches if size == "all" else match_by_class(table, matched.overlaps, data, size)
        objects = np.bincount(data.labels[matches.objects], minlength=len(data.class_names))
        precision[size] = precision_at_recalls(table.label, table.score, matches.hit, matches.ignored, objects)
        for limit in (1, 10, 100) if size == "all" else (100,):
            recall[size, limit] = _recall(matches.hit & (matched.rank < limit), table.label, objects)
    every = precision.pop("all")
    parts = [every, every[0], every[5], *precision.values(), *recall.values()]
    names, exists = data.class_names, ~np.isnan(every[0, 0])
    return dict(zip(COCO_NUMBERS, map(mean, parts), strict=True)) | {
        "per_class": {name: {"AP": mean(every[..., k]), "AP50": mean(every[0, :, k])} for k, name in enumerate(names)},
        "precision_at_recall": {
            iou: every[t][:, exists].mean(1).tolist() if exists.any() else None for iou, t in CURVES.items()
        },
    }


def _recall(hit: np.ndarray, label: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(T, K) share of the objects of each class that are hit, NaN without any."""
    found = np.stack([np.bincount(label[row], minlength=len(objects)) for row in hit])
    return np.where(objects > 0, found / np.maximum(objects, 1), np.nan)


def mean(values: np.ndarray) -> float | None:
    """The mean of the numbers that exist, None where none does."""
    exists = ~np.isnan(values)
    return float(values[exists].mean()) if exists.any() else None
