"""All overlaps of detections and boxes as one sparse table, of which every number is made, and COCO's assignment."""

from dataclasses import dataclass

import numpy as np

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable

MATCH_IOU = 0.5  # from which a detection matches a box, where one threshold is meant
BACKGROUND_IOU = 0.1  # a detection that overlaps every object less is on the background (TIDE, arXiv 2008.08115)
CHUNK = 1 << 18  # pairs that are compared at once, about 40 MB


@dataclass(frozen=True)
class Overlaps:
    """P pairs of a detection and a box of its image, by rising detection."""

    detection: np.ndarray  # (P,) int64, row of the detections
    box: np.ndarray  # (P,) int64, row of the data's boxes
    iou: np.ndarray  # (P,) float64; with a crowd the share of the detection that is inside it, as in COCO

    def select(self, pairs: np.ndarray) -> "Overlaps":
        """The pairs at `pairs`, int64 indices or a bool mask, in that order."""
        return Overlaps(self.detection[pairs], self.box[pairs], self.iou[pairs])

    def by_preference(self, last: np.ndarray) -> "Overlaps":
        """Each detection's boxes as it prefers them: those of the mask `last` (N,) after all others, then by falling
        IoU, of equals the later box, as pycocotools takes them."""
        return self.select(np.lexsort((-self.box, -self.iou, last[self.box], self.detection)))

    def best(self, detections: int) -> tuple[np.ndarray, np.ndarray]:
        """The highest IoU of each detection (M,), 0 without a pair, and its box (M,), else -1; of equals the first."""
        order = np.lexsort((self.box, -self.iou, self.detection))
        best = self.select(order[np.nonzero(np.diff(self.detection[order], prepend=-1))[0]])
        iou, box = np.zeros(detections), np.full(detections, -1)
        iou[best.detection], box[best.detection] = best.iou, best.box
        return iou, box


def find_overlaps(table: DetectionTable, data: DetectionData, at_least: float = BACKGROUND_IOU) -> Overlaps:
    """The pairs of an image with a common area and that IoU or more, by pycocotools' arithmetic, to the last digit."""
    image, boxes = table.image, table.boxes
    counts = np.diff(data.starts)[image]  # pairs of each detection
    ends, true_ends = (xywh[:, :2] + xywh[:, 2:] for xywh in (boxes, data.boxes))
    areas, true_areas = (xywh[:, 2:].prod(1) for xywh in (boxes, data.boxes))
    parts = []
    for rows in np.array_split(np.arange(len(image)), counts.sum() // CHUNK + 1):
        n = counts[rows]
        detection = np.repeat(rows, n)
        box = np.arange(n.sum()) + np.repeat(data.starts[image[rows]] - (n.cumsum() - n), n)
        sides = np.minimum(ends[detection], true_ends[box]) - np.maximum(boxes[detection, :2], data.boxes[box, :2])
        near = np.nonzero((sides > 0).all(1))[0]
        detection, box, common = detection[near], box[near], sides[near].prod(1)
        union = np.where(data.crowd[box], areas[detection], areas[detection] + true_areas[box] - common)
        pairs = Overlaps(detection, box, common / union)
        parts.append(pairs.select(pairs.iou >= at_least))
    return Overlaps(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("detection", "box", "iou")))


def assign(overlaps: Overlaps, shared: np.ndarray, detections: int) -> np.ndarray:
    """(M,) int64 box of each detection, -1 where it gets none, as COCO's loop over detections and boxes gives them.

    There, detections take the first free box of their list one by one, by falling score. Here all ask at once, a box
    keeps the earliest, and the others ask for their next (Gale and Shapley, 1962). As all boxes prefer the detections
    in one order, both end in the same pairs. The pairs are `by_preference`, the detections of an image by falling
    score; any number of detections may get a box of the mask `shared` (N,), a crowd.
    """
    boxes = np.full(detections, -1)
    choice = np.nonzero(np.diff(overlaps.detection, prepend=-1))[0]  # the pair that each detection asks for
    asking, end = overlaps.detection[choice], np.append(choice[1:], len(overlaps.detection))
    while len(choice):
        wanted, holder = overlaps.box[choice], np.full(len(shared), detections)
        np.minimum.at(holder, wanted, asking)
        refused = (holder[wanted] != asking) & ~shared[wanted]
        if not refused.any():
            boxes[asking] = wanted
            break
        choice = choice + refused
        left = choice < end
        choice, end, asking = choice[left], end[left], asking[left]
    return boxes
