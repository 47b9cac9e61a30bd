"""Diagnosis of a detector at IoU 0.5: kinds of errors, calibration, confusion matrix."""

from dataclasses import replace

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.metrics import MatchedDetections, Matches, match_any_class, mean, precision_at_recalls
from common.evaluate.overlaps import BACKGROUND_IOU, MATCH_IOU, Overlaps
from common.evaluate.results import Bin, Calibration, Diagnosis, ErrorKind, OperatingPoint

CALIBRATION_BINS = 10  # of equal width
CALIBRATION_FLOOR = 0.05  # lower scores are left out: they are so many that the mean would show little else
CONFUSION_CLASSES = 500  # data sets of more have no matrix, whose size is their square
ERROR_KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")


def diagnose(matched: MatchedDetections, data: DetectionData, point: OperatingPoint) -> Diagnosis:
    """Errors, calibration and confusion matrix of one model.

    Args:
        matched: the detections of one model.
        data: the ground truth.
        point: what `operating_point` returns for them.
    """
    chosen = matched.table.score >= (np.inf if point.score is None else point.score)
    errors = error_breakdown(matched, data, chosen)
    counts = confusion(matched, data, chosen).tolist() if len(data.class_names) <= CONFUSION_CLASSES else []
    return Diagnosis(point, errors, calibration(matched.by_class), counts)


def error_breakdown(matched: MatchedDetections, data: DetectionData, chosen: np.ndarray) -> dict[str, ErrorKind]:
    """The gain in AP50 if one kind of error alone were corrected (TIDE, arXiv 2008.08115), for each kind.

    A false positive is of the first kind that applies: duplicate (of an object of its class that a higher-scoring
    detection matched), localisation (IoU 0.1 to 0.5 with an object of its class), class (IoU from 0.5 with an object of
    another class), both (IoU 0.1 to 0.5 with an object of another class), background. An object is missed if no
    detection matches it and no class or localisation error is on it. To correct a class or localisation error, the
    highest-scoring one of an object becomes a true positive and its others are removed. Errors of the other kinds are
    removed, missed objects are removed from the ground truth.

    Returns:
        For each of ERROR_KINDS the gain in AP50, and the number of cases among the `chosen` detections, (M,) bool.
    """
    matches = replace(matched.by_class, box=matched.by_class.box[:1], ignored=matched.by_class.ignored[:1])
    kinds, boxes = _kinds_of_errors(matched, matches, data)
    before = _ap50(matches, data)
    counts = {name: int((kind & chosen).sum()) for name, kind in kinds.items()}
    counts["missed"] = int(_missed(matches, kinds, boxes, data, chosen).sum())
    corrected = {name: _correct(matches, kind, boxes.get(name), data) for name, kind in kinds.items()}
    left = ~data.crowd & ~_missed(matches, kinds, boxes, data, np.ones_like(chosen))
    corrected["missed"] = replace(matches, object_image=data.image_of_box()[left], object_label=data.labels[left])
    gains = {name: None if before is None else _gain(before, _ap50(m, data)) for name, m in corrected.items()}
    return {name: ErrorKind(gains[name], counts[name]) for name in ERROR_KINDS}


def _gain(before: float, after: float | None) -> float:
    return 0.0 if after is None else after - before


def _kinds_of_errors(
    matched: MatchedDetections, matches: Matches, data: DetectionData
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The detections with each kind of error, (M,) bool, and for two kinds the boxes (M,) that they are meant for."""
    overlaps = matched.overlaps.select(~data.crowd[matched.overlaps.box])
    same_class = matched.table.label[overlaps.detection] == data.labels[overlaps.box]
    same, same_box = best_pair(overlaps.select(same_class), len(matched.table))
    other, other_box = best_pair(overlaps.select(~same_class), len(matched.table))
    wrong, kinds = ~matches.hit[0] & ~matches.ignored[0], {}
    for name, applies in (
        ("duplicate", same >= MATCH_IOU),
        ("localisation", same >= BACKGROUND_IOU),
        ("class", other >= MATCH_IOU),
        ("both", other >= BACKGROUND_IOU),
        ("background", np.ones_like(wrong)),
    ):
        kinds[name] = wrong & applies
        wrong = wrong & ~applies
    return kinds, {"localisation": same_box, "class": other_box}


def best_pair(overlaps: Overlaps, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest IoU of each detection (M,), 0 where it has no pair, and its box (M,) or -1; of equals the first."""
    order = np.lexsort((overlaps.box, -overlaps.iou, overlaps.detection))
    best = overlaps.select(order[np.nonzero(np.diff(overlaps.detection[order], prepend=-1))[0]])
    iou, box = np.zeros(detections), np.full(detections, -1)
    iou[best.detection], box[best.detection] = best.iou, best.box
    return iou, box


def _missed(matches: Matches, kinds: dict, boxes: dict, data: DetectionData, chosen: np.ndarray) -> np.ndarray:
    """(N,) bool: objects without a match, a class error and a localisation error among the `chosen` detections."""
    missed = ~data.crowd
    missed[matches.box[0, matches.hit[0] & chosen]] = False
    for name, box in boxes.items():
        missed[box[kinds[name] & chosen]] = False
    return missed


def _correct(matches: Matches, chosen: np.ndarray, box: np.ndarray | None, data: DetectionData) -> Matches:
    """The matches with the `chosen` detections removed, or, given the `box` index of each, corrected."""
    label, taken, ignored = matches.label.copy(), matches.box[0].copy(), matches.ignored[0] | chosen
    if box is not None:
        candidates = np.nonzero(chosen & ~np.isin(box, taken[taken >= 0]))[0]
        candidates = candidates[np.argsort(-matches.score[candidates], kind="stable")]
        _, first = np.unique(box[candidates], return_index=True)
        best = candidates[first]
        taken[best], label[best], ignored[best] = box[best], data.labels[box[best]], False
    return replace(matches, label=label, box=taken[None], ignored=ignored[None])


def _ap50(matches: Matches, data: DetectionData) -> float | None:
    return mean(precision_at_recalls(matches, len(data.class_names))[0])


def calibration(matches: Matches) -> Calibration:
    """Precision by score, in bins of equal width, for detections with a score of at least CALIBRATION_FLOOR.

    Returns:
        expected_error (mean distance of score and precision, weighted by detections; Guo et al., arXiv 1706.04599) and,
        for each bin with detections, its mean score, precision and number of detections.
    """
    kept = ~matches.ignored[0] & (matches.score >= CALIBRATION_FLOOR)
    score, hit = matches.score[kept], matches.hit[0][kept]
    bin_of = np.minimum((score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        Bin(float(score[in_bin].mean()), float(hit[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (bin_of == number for number in np.unique(bin_of))
    ]
    error = sum(b.count * abs(b.score - b.precision) for b in bins) / len(score) if len(score) else None
    return Calibration(error, bins)


def confusion(matched: MatchedDetections, data: DetectionData, chosen: np.ndarray) -> np.ndarray:
    """(K + 1, K + 1) int64 counts, true class by detected class, of the `chosen` detections, matched by IoU alone.

    The last row counts detections of background, the last column objects without a detection. Detections of crowds are
    not counted.
    """
    rows, matches = match_any_class(matched, data, chosen)
    predicted, box, hit = matched.table.label[rows], matches.box[0], matches.hit[0]
    background = len(data.class_names)
    counts = np.zeros((background + 1, background + 1), np.int64)
    np.add.at(counts, (data.labels[box[hit]], predicted[hit]), 1)
    np.add.at(counts[background], predicted[~hit & ~matches.ignored[0]], 1)
    missed = ~data.crowd
    missed[box[hit]] = False
    np.add.at(counts[:, background], data.labels[missed], 1)
    return counts
