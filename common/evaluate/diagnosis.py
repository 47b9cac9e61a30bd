"""Diagnosis of a detector at IoU 0.5: kinds of errors, confusion matrix, calibration; self-check."""

from dataclasses import dataclass, replace

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.matching import (
    FOUND,
    Matches,
    Ranking,
    average_precision,
    box_iou,
    match,
    operating_point,
    paired_groups,
    rank_in_group,
    ranking,
)

TOUCHED = 0.1  # IoU from which a detection is a poorly localised match of a box (TIDE, arXiv 2008.08115)
CALIBRATION_BINS = 10  # of equal width
CALIBRATION_FLOOR = 0.05  # lower scores are left out: they are so many that the mean would show little else
CHECKED = 500  # images of the self-check
ENOUGH = 10  # detections on objects that the self-check of classes needs
INT64_DIGITS = 19  # a number with fewer digits fits
ERROR_KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")


def diagnose(table: DetectionTable, matches: Matches, data: DetectionData) -> dict:
    """Operating point, errors, calibration and confusion matrix of one model, in plain types.

    Args:
        table: the detections of one model.
        matches: the matches of that table, by class, at IoU 0.5 and perhaps further thresholds.
        data: the ground truth.
    """
    ranked = ranking(matches)
    point = operating_point(ranked)
    return {
        "operating_point": point,
        "errors": error_breakdown(table, matches, data, point["score"]),
        "calibration": calibration(ranked),
        "confusion": confusion(table, data, point["score"]).tolist(),
    }


@dataclass(frozen=True)
class Overlaps:
    """The best overlap of each of M detections with an object of its class, and of another class: (M,) IoU and box."""

    same: np.ndarray
    same_box: np.ndarray
    other: np.ndarray
    other_box: np.ndarray


def best_overlaps(table: DetectionTable, matches: Matches, data: DetectionData) -> Overlaps:
    """`Overlaps` of the detections of `matches`, in its order, without crowds. The box of IoU 0 has no meaning."""
    count = len(matches.row)
    overlaps = Overlaps(np.zeros(count), np.full(count, -1), np.zeros(count), np.full(count, -1))
    for detections, boxes in paired_groups(matches.image, matches.images):
        iou = box_iou(table.boxes[matches.row[detections]][:, :, None], data.boxes[boxes][:, None])
        iou = np.where((boxes >= 0) & matches.objects[boxes], 1, 0)[:, None] * iou  # (G, D, B)
        equal = matches.label[detections][:, :, None] == matches.labels[boxes][:, None]
        real = detections >= 0
        pairs = ((overlaps.same, overlaps.same_box, equal), (overlaps.other, overlaps.other_box, ~equal))
        for best, box, chosen in pairs:
            own = np.where(chosen, iou, 0)
            top = own.argmax(2)
            best[detections[real]] = own.max(2)[real]
            box[detections[real]] = np.take_along_axis(boxes, top, 1)[real]
    return overlaps


def error_breakdown(
    table: DetectionTable, matches: Matches, data: DetectionData, score: float | None
) -> dict[str, dict]:
    """The gain in AP50 if one kind of error alone were corrected (TIDE, arXiv 2008.08115), for each kind.

    A false positive is of the first kind that applies: duplicate (of an object of its class that a higher-scoring
    detection matched), localisation (IoU 0.1 to 0.5 with an object of its class), class (IoU from 0.5 with an object of
    another class), both (IoU 0.1 to 0.5 with an object of another class), background. An object is missed if no
    detection matches it and no class or localisation error is on it. To correct a class or localisation error, the
    highest-scoring one of an object becomes a true positive and its others are removed. Errors of the other kinds are
    removed, missed objects are removed from the ground truth.

    Returns:
        For each of ERROR_KINDS the gain in AP50, and the number of cases among detections from `score` on.
    """
    overlaps = best_overlaps(table, matches, data)
    wrong = ~matches.hit[0] & ~matches.ignored[0]
    counted = matches.score >= (np.inf if score is None else score)
    kinds = {
        "duplicate": overlaps.same >= FOUND,
        "localisation": overlaps.same >= TOUCHED,
        "class": overlaps.other >= FOUND,
        "both": overlaps.other >= TOUCHED,
        "background": np.ones_like(wrong),
    }
    for name, applies in kinds.items():
        kinds[name] = applies & wrong
        wrong = wrong & ~applies
    before = np.nanmean(_ap50(ranking(matches), data)) if matches.objects.any() else None
    errors = {}
    for name in ERROR_KINDS[:-1]:
        box = {"class": overlaps.other_box, "localisation": overlaps.same_box}.get(name)
        corrected = _correct(matches, kinds[name], box)
        errors[name] = {"gain": _gain(corrected, data, before), "count": int((kinds[name] & counted).sum())}
    errors["missed"] = {
        "gain": _gain(_without(matches, _missed(matches, kinds, overlaps, np.ones_like(counted))), data, before),
        "count": int(_missed(matches, kinds, overlaps, counted).sum()),
    }
    return {name: errors[name] for name in ERROR_KINDS}


def _missed(matches: Matches, kinds: dict[str, np.ndarray], overlaps: Overlaps, counted: np.ndarray) -> np.ndarray:
    """(N,) bool: objects without a match, a class error and a localisation error among the `counted` detections."""
    missed = matches.objects.copy()
    missed[matches.truth[0, matches.hit[0] & counted]] = False
    missed[overlaps.other_box[kinds["class"] & counted]] = False
    missed[overlaps.same_box[kinds["localisation"] & counted]] = False
    return missed


def _correct(matches: Matches, chosen: np.ndarray, box: np.ndarray | None) -> Ranking:
    """The ranking with the `chosen` detections removed, or, given the `box` index of each, corrected."""
    label, truth, removed = matches.label.copy(), matches.truth[0].copy(), chosen | matches.ignored[0]
    if box is not None:
        matched = np.isin(box, truth[matches.hit[0]])
        candidates = np.nonzero(chosen & ~matched)[0]
        candidates = candidates[np.argsort(-matches.score[candidates], kind="stable")]
        _, first = np.unique(box[candidates], return_index=True)
        best = candidates[first]
        truth[best], label[best], removed[best] = box[best], matches.labels[box[best]], False
    return ranking(replace(matches, label=label, truth=truth[None], ignored=removed[None]))


def _without(matches: Matches, missed: np.ndarray) -> Ranking:
    return ranking(replace(matches, objects=matches.objects & ~missed))


def _gain(corrected: Ranking, data: DetectionData, before: float | None) -> float | None:
    if before is None:
        return None
    after = _ap50(corrected, data)
    return float(np.nanmean(after) - before) if not np.isnan(after).all() else 0.0


def _ap50(ranked: Ranking, data: DetectionData) -> np.ndarray:
    return average_precision(ranked, len(data.class_names), np.ones((len(data), 1), np.float32))[:, 0]


def calibration(ranked: Ranking) -> dict:
    """Precision by score, in bins of equal width, for detections with a score of at least CALIBRATION_FLOOR.

    Returns:
        expected_error (mean distance of score and precision, weighted by detections; Guo et al., arXiv 1706.04599) and,
        for each bin with detections, its mean score, precision and number of detections.
    """
    kept = ranked.score >= CALIBRATION_FLOOR
    score, hit = ranked.score[kept], ranked.hit[kept]
    bin_of = np.minimum((score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {"score": float(score[in_bin].mean()), "precision": float(hit[in_bin].mean()), "count": int(in_bin.sum())}
        for in_bin in (bin_of == number for number in np.unique(bin_of))
    ]
    error = sum(b["count"] * abs(b["score"] - b["precision"]) for b in bins) / len(score) if len(score) else None
    return {"expected_error": error, "bins": bins}


def confusion(table: DetectionTable, data: DetectionData, score: float | None) -> np.ndarray:
    """(K + 1, K + 1) int64 counts, true class by detected class, of detections from `score` on, matched by IoU alone.

    The last row counts detections of background, the last column objects without a detection. Detections of crowds are
    not counted.
    """
    classes = len(data.class_names)
    table = table.at_least(score)
    m = match(table, data, np.array([FOUND]), by_class=False)
    predicted, hit = table.label[m.row], m.hit[0]
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (data.labels[m.truth[0, hit]], predicted[hit]), 1)
    np.add.at(counts[classes], predicted[~hit & ~m.ignored[0]], 1)
    missed = m.objects.copy()
    missed[m.truth[0, hit]] = False
    np.add.at(counts[:, classes], data.labels[missed], 1)
    return counts


def self_check(table: DetectionTable, data: DetectionData) -> list[str]:
    """Warnings about detections that match few objects as read, and many when read in another way."""
    data = data.first(CHECKED)
    readings = _readings_of_images(table, data)
    table = table.select(np.isin(table.image_id, [image.id for image in data.images]))
    readings |= _readings_of_boxes(table, data)
    shares = {reading: _share_found(changed, data) for reading, changed in readings.items()}
    share, best = _share_found(table, data), max(shares, key=lambda reading: shares[reading])
    warnings = []
    if shares[best] > max(0.2, 1.5 * share):
        warnings.append(
            f"the highest-scoring detections match {share:.0%} of the objects, and would match {shares[best]:.0%} if "
            f"{best}"
        )
    return warnings + _check_names(table, data)


def _readings_of_images(table: DetectionTable, data: DetectionData) -> dict[str, DetectionTable]:
    """The detections with other image ids, by the assumption behind them."""
    ids = np.array([image.id for image in data.images], np.int64)
    numbered = np.array([image.path.stem.isdecimal() and len(image.path.stem) < INT64_DIGITS for image in data.images])
    numbers = np.array([int(data.images[i].path.stem) for i in np.nonzero(numbered)[0]], np.int64)
    positions = np.arange(len(data))
    assumptions = {
        "image ids were the numbers in the file names: add a file_name to each detection": (numbers, ids[numbered]),
        "image ids counted the images from 0: check how the images are numbered": (positions, ids),
        "image ids counted the images from 1: check how the images are numbered": (positions + 1, ids),
    }
    readings = {}
    for assumption, (given, meant) in assumptions.items():
        known = table.select(np.isin(table.image_id, given))
        order = np.argsort(given)
        place = order[np.searchsorted(given, known.image_id, sorter=order)]
        readings[assumption] = replace(known, image_id=meant[place])
    return readings


def _readings_of_boxes(table: DetectionTable, data: DetectionData) -> dict[str, DetectionTable]:
    """The detections with other boxes, by the assumption behind them."""
    size_of = {image.id: (image.width, image.height) for image in data.images}
    sizes = np.array([size_of[number] for number in table.image_id.tolist()]).reshape(-1, 2)
    first, second = table.boxes[:, :2], table.boxes[:, 2:]
    assumptions = {
        "corners (x, y, x, y) were taken for (x, y, width, height)": np.hstack([first, second - first]),
        "(x, y, width, height) was taken for corners": np.hstack([first, first + second]),
        "the boxes' centres were taken for their upper left corners": np.hstack([first - second / 2, second]),
        "normalised coordinates were taken for pixels": table.boxes * np.tile(sizes, 2),
    }
    advice = "check how the boxes are written"
    return {f"{assumption}: {advice}": replace(table, boxes=boxes) for assumption, boxes in assumptions.items()}


def _share_found(table: DetectionTable, data: DetectionData) -> float:
    """The share of the objects that the highest-scoring detections match, as many an image as it has objects."""
    table = table.select(np.all(table.boxes[:, 2:] > 0, axis=1))
    table = table.select(np.lexsort((-table.score, table.image_id)))
    count_of = {image.id: int(count) for image, count in zip(data.images, np.diff(data.starts), strict=True)}
    counts = np.array([count_of[number] for number in table.image_id.tolist()], np.int64)
    table = table.select(rank_in_group(table.image_id) < counts)
    hit = match(table, data, np.array([FOUND]), by_class=False).hit
    return float(hit.sum() / len(data.labels)) if len(data.labels) else 0.0


def _check_names(table: DetectionTable, data: DetectionData) -> list[str]:
    """A warning where most detections on objects have another class, that of the neighbour in the list, say."""
    m = match(table, data, np.array([FOUND]), by_class=False)
    hit = m.hit[0]
    truth, predicted = data.labels[m.truth[0, hit]], table.label[m.row[hit]]
    if len(truth) < ENOUGH:
        return []
    right = float(np.mean(truth == predicted))
    ids, classes = np.array(data.category_ids), len(data.class_names)
    own = " (they look like COCO's 80 classes in order, whose own ids run to 90)" if classes == 80 else ""
    readings = {f"with every class id moved by {step:+d}": predicted + step for step in (1, -1)} | {
        f"if ids {start}..{start + classes - 1} were the {classes} classes in order{own}": ids[predicted] - start
        for start in (1, 0)
    }
    shares = {reading: float(np.mean(truth == changed)) for reading, changed in readings.items()}
    best = max(shares, key=lambda reading: shares[reading])
    if shares[best] > max(0.2, 1.5 * right):
        return [
            f"{right:.0%} of the detections on objects have their class, and {shares[best]:.0%} would {best}: check "
            "how the ids are mapped"
        ]
    if right < 0.02:
        return [f"only {right:.1%} of the detections on objects have their class: check how the ids are mapped"]
    return []
