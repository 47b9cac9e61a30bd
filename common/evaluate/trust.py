"""One net for detections that were not read as they are meant: in other pixels, on other images, with other classes."""

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.diagnosis import best_pair
from common.evaluate.metrics import MatchedDetections, rank_within
from common.evaluate.overlaps import MATCH_IOU

# On COCO's images misread detections are on objects in at most 0.08 of the cases (a good detector's, in pixels of an
# image padded to a square), those of a detector with mAP@0.5 0.01 in 0.12, with 0.56 in 0.59.
LEAST_SHARE = 0.1
ENOUGH = 10  # detections; fewer prove nothing
LEAST_AGREEMENT = 0.25  # 0 = that of chance, 1 = the highest that the frequencies of the classes allow
BOXES = "boxes may be in other pixels or not x, y, width, height, or on other images"
CLASSES = "their ids may be numbered in another order"


def check_agreement(matched: MatchedDetections, data: DetectionData) -> list[str]:
    """Warnings where hardly any detection is on an object, or classes agree with the objects' no better than by chance.

    As many detections of an image are asked as it has objects, those with the highest scores. Objects of classes that
    are never detected are left out, so that a detector of one class is judged by its own.
    """
    table, objects = matched.table, ~data.crowd & np.isin(data.labels, matched.table.label)
    counts = np.bincount(data.image_of_box()[objects], minlength=len(data))
    asked = rank_within(matched.table.image) < counts[matched.table.image]
    pairs = matched.overlaps
    pairs = pairs.select(asked[pairs.detection] & objects[pairs.box] & (pairs.iou >= MATCH_IOU))
    count, found = int(asked.sum()), len(np.unique(pairs.box))
    if count >= ENOUGH and found < LEAST_SHARE * count:
        return [f"only {found} of its {count} best detections are on an object: {BOXES}"]
    box = best_pair(pairs, len(table))[1]
    detected, true = table.label[box >= 0], data.labels[box[box >= 0]]
    if not len(true):
        return []
    right, (chance, highest) = float((detected == true).mean()), expected_agreement(detected, true)
    likely = max(right, chance)
    error = 2 * np.sqrt(likely * (1 - likely) / len(true))
    if right + error < chance + LEAST_AGREEMENT * (highest - chance):
        return [f"{right:.0%} of its detections on objects have their class, by chance it were {chance:.0%}: {CLASSES}"]
    return []


def expected_agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The share of equal labels of two lists (n,) that is expected by chance, and the highest that is possible.

    Both follow from the frequencies of the labels (Cohen's kappa and its maximum). Where one list has hardly more than
    one label, they are close together, and an agreement tells nothing.
    """
    shares = [np.bincount(labels, minlength=1 + max(a.max(), b.max())) / len(labels) for labels in (a, b)]
    return float(np.prod(shares, axis=0).sum()), float(np.min(shares, axis=0).sum())
