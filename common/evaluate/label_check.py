"""Labels that detections doubt, where these come from detectors that have not seen the images: the worst first.

The kinds are those of ObjectLab (arXiv 2309.00832): objects that were overlooked, badly placed boxes, swapped classes;
and labels where nothing is detected.
"""

import numpy as np
import torch
from torchvision.ops import batched_nms

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import match_detections, operating_point
from common.evaluate.overlaps import MATCH_IOU, Overlaps
from common.types import convert_boxes

AGREES, CLASS, BOX, MISSING, UNSEEN = "agrees", "another class", "another box", "no label", "not found"
UNSEEN_DOUBT = 0.5  # of a label where nothing is detected


def doubtful_labels(table: DetectionTable, data: DetectionData) -> list[dict]:
    """The labels to look at, as plain types: image, kind of doubt, its size 0..1, the label and what is detected.

    A detection counts with the precision of all detections with its score or a higher one. A label is doubted by one
    of another class, or of its own class at a worse place, as far as that exceeds the best one that agrees; where no
    label is, by every detection from the operating point on; and where nothing is detected.
    """
    matched = match_detections(table, data)
    table, sure = matched.table, operating_point(matched).score
    order = np.argsort(-table.score, kind="stable")
    precision = np.zeros(len(table) + 1)  # the last is that of no detection
    precision[order] = (matched.hit[0][order].cumsum() + 1) / np.arange(2, len(table) + 2)
    pairs = matched.overlaps
    in_crowd = pairs.detection[data.crowd[pairs.box] & (pairs.iou >= MATCH_IOU)]
    pairs = pairs.select(~data.crowd[pairs.box])
    close, same = pairs.iou >= MATCH_IOU, table.label[pairs.detection] == data.labels[pairs.box]
    agrees = np.isin(pairs.detection, pairs.detection[close & same])
    best = {
        kind: _best(pairs, mask, table, data)
        for kind, mask in {AGREES: close & same, CLASS: close & ~same & ~agrees, BOX: ~close & same & ~agrees}.items()
    }
    against = {kind: precision[best[kind]] - precision[best[AGREES]] for kind in (CLASS, BOX)}
    doubts = list[dict]()
    for box in np.nonzero(~data.crowd)[0].tolist():
        kind = max(against, key=lambda kind: against[kind][box])
        if against[kind][box] > 0:
            doubts.append(_doubt(kind, against[kind][box], table, data, box, best[kind][box]))
        elif best[AGREES][box] < 0:
            doubts.append(_doubt(UNSEEN, UNSEEN_DOUBT, table, data, box))
    placed, explained = np.unique(best[BOX][against[BOX] > 0]), np.append(in_crowd, pairs.detection[close])
    alone = np.setdiff1d(np.nonzero(table.score >= (np.inf if sure is None else sure))[0], [*explained, *placed])
    rows = np.append(placed, alone)  # what is detected at the place of one of the first is no further object
    priority, corners = table.score[rows] + np.isin(rows, placed), convert_boxes(table.boxes[rows], "xywh", "xyxy")
    kept = batched_nms(*map(torch.from_numpy, (corners, priority, table.image[rows])), MATCH_IOU)
    rows = np.setdiff1d(rows[kept.numpy()], placed)
    doubts += [_doubt(MISSING, precision[row], table, data, detection=row) for row in rows.tolist()]
    return sorted(doubts, key=lambda doubt: -doubt["doubt"])


def _best(pairs: Overlaps, mask: np.ndarray, table: DetectionTable, data: DetectionData) -> np.ndarray:
    """(A,) int64: the highest-scoring detection of the chosen pairs of each box, -1 where there is none."""
    chosen, best = pairs.select(mask), np.full(len(data.labels), -1)
    order = np.argsort(table.score[chosen.detection], kind="stable")
    best[chosen.box[order]] = chosen.detection[order]
    return best


def _doubt(
    kind: str, size: float, table: DetectionTable, data: DetectionData, box: int = -1, detection: int = -1
) -> dict:
    owner = data.image_of_box()[box] if box >= 0 else table.image[detection]
    image, names = data.images[owner], data.class_names
    doubt = {"image_id": image.id, "file": image.path.name, "kind": kind, "doubt": round(float(size), 4)}
    if box >= 0:
        doubt |= {"label": names[data.labels[box]], "box": data.boxes[box].tolist()}
    if detection >= 0:
        detected = {"detected": names[table.label[detection]], "detected_box": table.boxes[detection].tolist()}
        doubt |= detected | {"score": round(float(table.score[detection]), 4)}
    return doubt
