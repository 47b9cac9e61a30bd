"""Why a detector scores what it scores: operating point, kinds of errors, confusions, calibration. All at IoU 0.5."""

from dataclasses import dataclass, replace

import numpy as np

from common.data.coco import CocoData
from common.evaluate.detections import DetectionTable
from common.evaluate.matching import (
    Matches,
    Ranking,
    average_precision,
    box_iou,
    match,
    paired_groups,
    rank_in_group,
    ranking,
)

FOUND = 0.5  # IoU from which on a box counts as found
TOUCHED = 0.1  # IoU below which a detection has nothing to do with a box (TIDE, arXiv 2008.08115)
CALIBRATION_BINS = 10  # of equal width
CALIBRATION_FLOOR = 0.05  # scores below it are not looked at: the many that say "hardly" would drown the rest
CHECKED = 500  # images that tell whether detections are misread
ENOUGH = 10  # detections on objects, to say anything of their names
ERROR_KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")


def diagnose(table: DetectionTable, matches: Matches, data: CocoData) -> dict:
    """What there is to say of one model beside its average precision; plain types only.

    Args:
        table: the detections of one model.
        matches: of that table, by class, the first threshold being 0.5.
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


def operating_point(ranked: Ranking) -> dict[str, float | None]:
    """The score from which on detections are kept for the best F1 over all objects, and precision, recall and F1 there.

    The threshold is chosen on the images that it is reported on. None where there are no objects or no detections.
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


@dataclass(frozen=True)
class Overlaps:
    """How well each of M detections covers the best object of its own class, and of another: (M,) IoU and box index."""

    same: np.ndarray
    same_box: np.ndarray
    other: np.ndarray
    other_box: np.ndarray


def best_overlaps(table: DetectionTable, matches: Matches, data: CocoData) -> Overlaps:
    """`Overlaps` of the detections of `matches`, in its order; crowds do not count. The box of IoU 0 is any."""
    count = len(matches.row)
    found = Overlaps(np.zeros(count), np.full(count, -1), np.zeros(count), np.full(count, -1))
    for detections, boxes in paired_groups(matches.image, matches.images):
        iou = box_iou(table.boxes[matches.row[detections]][:, :, None], data.boxes[boxes][:, None])
        iou = np.where((boxes >= 0) & matches.objects[boxes], 1, 0)[:, None] * iou  # (G, D, B)
        alike = matches.label[detections][:, :, None] == matches.labels[boxes][:, None]
        real = detections >= 0
        for best, box, chosen in ((found.same, found.same_box, alike), (found.other, found.other_box, ~alike)):
            own = np.where(chosen, iou, 0)
            top = own.argmax(2)
            best[detections[real]] = own.max(2)[real]
            box[detections[real]] = np.take_along_axis(boxes, top, 1)[real]
    return found


def error_breakdown(table: DetectionTable, matches: Matches, data: CocoData, score: float | None) -> dict[str, dict]:
    """What each kind of error costs: by how much AP50 would rise if it alone were mended (TIDE, arXiv 2008.08115).

    A wrong detection is, the first that fits: a duplicate (on an object of its class that a better one found), of wrong
    localisation (IoU 0.1 to 0.5 with one of its class), of wrong class (IoU from 0.5 with another class), of both
    (IoU 0.1 to 0.5 with another class), background. An object is missed if no detection found it or was a matter of
    class or localisation on it. Mending makes the best-scoring such detection of an object right and removes the
    others; the other kinds are removed; missed objects are not asked for.

    Returns:
        For each of ERROR_KINDS the gain in AP50, and the number of cases among detections from `score` on.
    """
    overlaps = best_overlaps(table, matches, data)
    wrong = ~matches.hit[0] & ~matches.ignored[0]
    sure = matches.score >= (np.inf if score is None else score)
    kinds = {
        "duplicate": overlaps.same >= FOUND,
        "localisation": overlaps.same >= TOUCHED,
        "class": overlaps.other >= FOUND,
        "both": overlaps.other >= TOUCHED,
        "background": np.ones_like(wrong),
    }
    for name, fits in kinds.items():
        kinds[name] = fits & wrong
        wrong = wrong & ~fits
    plain = np.nanmean(_ap50(ranking(matches), data)) if matches.objects.any() else None
    errors = {}
    for name in ERROR_KINDS[:-1]:
        box = {"class": overlaps.other_box, "localisation": overlaps.same_box}.get(name)
        mended = _mend(matches, kinds[name], box)
        errors[name] = {"gain": _gain(mended, data, plain), "count": int((kinds[name] & sure).sum())}
    errors["missed"] = {
        "gain": _gain(_without(matches, _missed(matches, kinds, overlaps, np.ones_like(sure))), data, plain),
        "count": int(_missed(matches, kinds, overlaps, sure).sum()),
    }
    return {name: errors[name] for name in ERROR_KINDS}


def _missed(matches: Matches, kinds: dict[str, np.ndarray], overlaps: Overlaps, counted: np.ndarray) -> np.ndarray:
    """(N,) bool: objects that none of the `counted` detections found, misnamed or misplaced."""
    missed = matches.objects.copy()
    missed[matches.truth[0, matches.hit[0] & counted]] = False
    missed[overlaps.other_box[kinds["class"] & counted]] = False
    missed[overlaps.same_box[kinds["localisation"] & counted]] = False
    return missed


def _mend(matches: Matches, chosen: np.ndarray, box: np.ndarray | None) -> Ranking:
    """The ranking with the `chosen` detections mended: right where `box` tells the object of each, else removed."""
    label, truth, gone = matches.label.copy(), matches.truth[0].copy(), chosen | matches.ignored[0]
    if box is not None:
        found = np.isin(box, truth[matches.hit[0]])
        candidates = np.nonzero(chosen & ~found)[0]
        candidates = candidates[np.argsort(-matches.score[candidates], kind="stable")]
        _, first = np.unique(box[candidates], return_index=True)
        best = candidates[first]
        truth[best], label[best], gone[best] = box[best], matches.labels[box[best]], False
    mended = replace(matches, label=label, truth=truth[None], ignored=gone[None])
    return ranking(mended)


def _without(matches: Matches, missed: np.ndarray) -> Ranking:
    return ranking(replace(matches, objects=matches.objects & ~missed))


def _gain(mended: Ranking, data: CocoData, plain: float | None) -> float | None:
    if plain is None:
        return None
    after = _ap50(mended, data)
    return float(np.nanmean(after) - plain) if not np.isnan(after).all() else 0.0


def _ap50(ranked: Ranking, data: CocoData) -> np.ndarray:
    return average_precision(ranked, len(data.class_names), np.ones((len(data), 1), np.float32))[:, 0]


def calibration(ranked: Ranking) -> dict:
    """Do scores say how often a detection is right? Bins of equal width over the scores from 0.05 on.

    Returns:
        expected_error (mean distance of score and precision, weighted by detections; Guo et al., arXiv 1706.04599) and,
        for each bin with detections, its mean score, precision and number of detections.
    """
    kept = ranked.score >= CALIBRATION_FLOOR
    score, hit = ranked.score[kept], ranked.hit[kept]
    place = np.minimum((score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {"score": float(score[in_bin].mean()), "precision": float(hit[in_bin].mean()), "count": int(in_bin.sum())}
        for in_bin in (place == number for number in np.unique(place))
    ]
    error = sum(b["count"] * abs(b["score"] - b["precision"]) for b in bins) / len(score) if len(score) else None
    return {"expected_error": error, "bins": bins}


def confusion(table: DetectionTable, data: CocoData, score: float | None) -> np.ndarray:
    """(K + 1, K + 1) int64 counts, truth by detection from `score` on, matched whatever their class.

    The last row counts detections where no object is, the last column objects without a detection. Detections of
    crowds are not counted.
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


def self_check(table: DetectionTable, data: CocoData) -> list[str]:
    """Warnings of detections that look misread: they fit the objects badly as read, and well when read otherwise."""
    data = data.first(CHECKED)
    size_of = {image.id: (image.width, image.height) for image in data.images}
    table = table.select(np.isin(table.image_id, list(size_of)))
    sizes = np.array([size_of[number] for number in table.image_id.tolist()]).reshape(-1, 2)
    corners, sides = table.boxes[:, :2], table.boxes[:, 2:] - table.boxes[:, :2]
    readings = {
        "": table.boxes,
        "corners (x, y, x, y) were taken for (x, y, width, height)": np.hstack([corners, sides]),
        "(x, y, width, height) was taken for corners": np.hstack([corners, corners + table.boxes[:, 2:]]),
        "the boxes' centres were taken for their upper left corners": np.hstack(
            [corners - sides / 2, corners + sides / 2]
        ),
        "normalised coordinates were taken for pixels": table.boxes * np.tile(sizes, 2),
    }
    fits = {reading: _share_found(replace(table, boxes=boxes), data) for reading, boxes in readings.items()}
    warnings = []
    best = max(fits, key=lambda reading: fits[reading])
    if fits[best] > max(0.2, 1.5 * fits[""]):
        warnings.append(
            f"the highest-scoring detections find {fits['']:.0%} of the objects, but would find {fits[best]:.0%} if "
            f"{best}: look at how the boxes are written"
        )
    return warnings + _check_names(table, data)


def _share_found(table: DetectionTable, data: CocoData) -> float:
    """The share of the objects that the highest-scoring detections, as many an image as it has objects, cover."""
    table = table.select((table.boxes[:, 2:] > table.boxes[:, :2]).all(1))
    table = table.select(np.lexsort((-table.score, table.image_id)))
    count_of = {image.id: int(count) for image, count in zip(data.images, np.diff(data.starts), strict=True)}
    counts = np.array([count_of[number] for number in table.image_id.tolist()], np.int64)
    table = table.select(rank_in_group(table.image_id) < counts)
    hit = match(table, data, np.array([FOUND]), by_class=False).hit
    return float(hit.sum() / len(data.labels)) if len(data.labels) else 0.0


def _check_names(table: DetectionTable, data: CocoData) -> list[str]:
    """Do detections on objects carry the names of their neighbours in the list of classes?"""
    m = match(table, data, np.array([FOUND]), by_class=False)
    hit = m.hit[0]
    truth, predicted = data.labels[m.truth[0, hit]], table.label[m.row[hit]]
    if len(truth) < ENOUGH:
        return []
    right = float(np.mean(truth == predicted))
    for step in (1, -1):
        shifted = float(np.mean(truth == predicted + step))
        if shifted > max(0.2, 1.5 * right):
            return [
                f"{right:.0%} of the detections on objects name them rightly, but {shifted:.0%} would with every class "
                f"id moved by {step:+d}: look at how the ids are mapped"
            ]
    if right < 0.02:
        return [f"only {right:.1%} of the detections on objects name them rightly: look at how the ids are mapped"]
    return []
