"""Diagnosis of a detector at IoU 0.5: kinds of errors, calibration, confusion matrix."""

from dataclasses import replace

import numpy as np

from common.evaluate.metrics import MAX_DETECTIONS, Matched, average_precision, match_any_class, mean, rank_within
from common.evaluate.overlaps import BACKGROUND_IOU, MATCH_IOU
from common.evaluate.results import Bin, Calibration, Diagnosis, ErrorKind, OperatingPoint

CALIBRATION_BINS = 10  # of equal width
CALIBRATION_FLOOR = 0.05  # lower scores are left out: they are so many that the mean would show little else
CONFUSION_CLASSES = 500  # data sets of more have no matrix, whose size is their square


def diagnose(matched: Matched, point: OperatingPoint) -> Diagnosis:
    """Errors, calibration and confusion matrix of one model, whose `operating_point` is `point`."""
    chosen = matched.table.score >= (np.inf if point.score is None else point.score)
    counts = confusion(matched, chosen).tolist() if len(matched.data.class_names) <= CONFUSION_CLASSES else []
    return Diagnosis(point, error_breakdown(matched, chosen), calibration(matched), counts)


def error_breakdown(matched: Matched, chosen: np.ndarray) -> dict[str, ErrorKind]:
    """The gain in AP50 if one kind of error alone were corrected (TIDE, arXiv 2008.08115), for each kind, and its cases
    among the `chosen` detections, (M,) bool.

    A false positive is of the first kind that applies in `_kinds_of_errors`. An object is missed if no detection
    matches it and no class or localisation error is on it. Of these two kinds, the highest-scoring error of an object
    becomes right and its others are removed; errors of other kinds are removed, missed objects from the ground truth.
    """
    matched = replace(matched, box=matched.box[:1], ignored=matched.ignored[:1])
    kind, meant = _kinds_of_errors(matched)
    before, errors = mean(average_precision(matched)), {}

    def error(corrected: Matched, count: int) -> ErrorKind:
        after = mean(average_precision(corrected))
        return ErrorKind(None if before is None else 0.0 if after is None else after - before, count)

    for name in ("class", "localisation", "both", "duplicate", "background"):
        errors[name] = error(_correct(matched, kind == name, meant), int((chosen & (kind == name)).sum()))
    touched, found = (
        matched.objects & np.isin(np.arange(len(matched.objects)), np.append(meant[shown], matched.box[0, shown]))
        for shown in (slice(None), chosen)
    )
    missed = int((matched.objects & ~found).sum())
    return errors | {"missed": error(replace(matched, objects=touched), missed)}


def _kinds_of_errors(matched: Matched) -> tuple[np.ndarray, np.ndarray]:
    """(M,) the kind of error of each detection, "" where it is none, and (M,) int64 the object that one of class or
    localisation is meant for, -1 for the others. What overlaps no object is an error of background."""
    pairs, count = matched.overlaps.select(matched.objects[matched.overlaps.box]), len(matched.table)
    same_class = matched.table.label[pairs.detection] == matched.data.labels[pairs.box]
    same, same_box = pairs.select(same_class).best(count)
    other, other_box = pairs.select(~same_class).best(count)
    applies = {
        "": matched.hit[0] | matched.ignored[0],
        "duplicate": same >= MATCH_IOU,  # of an object that a higher-scoring detection matched
        "localisation": same >= BACKGROUND_IOU,
        "class": other >= MATCH_IOU,
        "both": other >= BACKGROUND_IOU,
    }
    kind = np.select(list(applies.values()), list(applies), "background")
    return kind, np.select([kind == "localisation", kind == "class"], [same_box, other_box], -1)


def _correct(matched: Matched, wrong: np.ndarray, meant: np.ndarray) -> Matched:
    """Without the `wrong` detections (M,), but for the first of each object that they are `meant` for, (M,) index or
    -1, and that nothing matches: it becomes right."""
    label, box, ignored = matched.table.label.copy(), matched.box.copy(), matched.ignored | wrong
    candidates = np.nonzero(wrong & (meant >= 0) & ~np.isin(meant, box))[0]
    candidates = candidates[np.argsort(-matched.table.score[candidates], kind="stable")]
    best = candidates[np.unique(meant[candidates], return_index=True)[1]]
    label[best], box[0, best], ignored[0, best] = matched.data.labels[meant[best]], meant[best], False
    return replace(matched, table=replace(matched.table, label=label), box=box, ignored=ignored)


def calibration(matched: Matched) -> Calibration:
    """Precision by score, in bins of equal width, for detections with a score of at least CALIBRATION_FLOOR, and the
    expected error, weighted by detections (Guo et al., arXiv 1706.04599)."""
    kept = ~matched.ignored[0] & (matched.table.score >= CALIBRATION_FLOOR)
    score, hit = matched.table.score[kept], matched.hit[0][kept]
    bin_of = np.minimum((score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    parts = [bin_of == number for number in np.unique(bin_of)]
    bins = [Bin(float(score[part].mean()), float(hit[part].mean()), int(part.sum())) for part in parts]
    error = sum(b.count * abs(b.score - b.precision) for b in bins) / len(score) if bins else None
    return Calibration(error, bins)


def confusion(matched: Matched, chosen: np.ndarray) -> np.ndarray:
    """(K + 1, K + 1) int64 counts, true class by detected class, of the `chosen` detections, matched by IoU alone.

    The last row counts detections of background, the last column objects without any; those of crowds do not count.
    """
    true, background = matched.data.labels, len(matched.data.class_names)
    table = matched.table.select(chosen)
    detected = table.label[rank_within(table.image) < MAX_DETECTIONS]
    matched = match_any_class(table, matched.data)
    hit, missed = matched.hit[0], matched.objects.copy()
    missed[matched.box[0, hit]] = False
    counts = np.zeros((background + 1, background + 1), np.int64)
    np.add.at(counts, (true[matched.box[0, hit]], detected[hit]), 1)
    np.add.at(counts[background], detected[~hit & ~matched.ignored[0]], 1)
    np.add.at(counts[:, background], true[missed], 1)
    return counts
