"""One net for detections that were not read as they are meant: in other pixels, on other images, with other classes."""

import numpy as np

from common.evaluate.metrics import Matched, rank_within
from common.evaluate.overlaps import MATCH_IOU

# Measured on COCO's images: of a good detector's misread boxes at most 0.06 are on an object (in pixels of an image
# that was padded to a square), of one with an mAP@0.5 of 0.01 to 0.02 0.08 to 0.34.
LEAST_SHARE = 0.07
ENOUGH = 10  # detections; fewer prove nothing
LEAST_AGREEMENT = 0.25  # 0 = that of chance, 1 = the highest that the frequencies of the classes allow
BOXES = "boxes may be in other pixels or not x, y, width, height, or on other images"
CLASSES = "their ids may be numbered in another order"


def check_agreement(matched: Matched) -> list[str]:
    """Warnings where hardly any detection is on an object, or classes agree with the objects' no better than by chance.

    Asked are the highest-scoring detections of an image, as many as it has objects of classes that the model detects.
    """
    table, data = matched.table, matched.data
    objects = matched.objects & np.isin(data.labels, table.label)
    counts = np.bincount(data.image_of_box()[objects], minlength=len(data))
    asked = rank_within(table.image) < counts[table.image]
    pairs, count = matched.overlaps, int(asked.sum())
    iou, box = pairs.select(asked[pairs.detection] & objects[pairs.box]).best(len(table))
    on_object = iou >= MATCH_IOU
    if count >= ENOUGH and on_object.sum() < LEAST_SHARE * count:
        return [f"only {on_object.sum()} of its {count} best detections are on an object: {BOXES}"]
    if not on_object.any():
        return []
    detected, true = table.label[on_object], data.labels[box[on_object]]
    shares = np.array([np.bincount(k, minlength=len(data.class_names)) for k in (detected, true)]) / len(true)
    chance, highest = shares.prod(0).sum(), shares.min(0).sum()  # by Cohen's kappa and its maximum
    right = (detected == true).mean()
    likely = max(right, chance)
    error = 2 * np.sqrt(likely * (1 - likely) / len(true))
    if right + error < chance + LEAST_AGREEMENT * (highest - chance):
        return [f"{right:.0%} of its detections on objects have their class, by chance it were {chance:.0%}: {CLASSES}"]
    return []
