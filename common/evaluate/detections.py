"""Detections as one table, in the data set's own labels, and COCO's results format."""

import numpy as np

from common.data.coco import CocoData
from common.types import Detections


def label_map(class_names: tuple[str, ...], data: CocoData) -> np.ndarray:
    """(K,) the data set's label of each of a model's classes, by name; -1 where the data set has no such class."""
    labels = {name: label for label, name in enumerate(data.class_names)}
    return np.array([labels.get(name, -1) for name in class_names], np.int64)


def detection_table(detections: list[Detections], labels: np.ndarray) -> np.ndarray:
    """(M, 7) float64 rows: image id, x, y, width, height in original pixels, score, label in the data set's terms.

    Detections of classes that the data set does not have are left out.
    """
    rows = []
    for found in detections:
        boxes = found.boxes.numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        ids, names = np.full(len(boxes), found.image_id), labels[found.labels.numpy()]
        rows.append(np.column_stack([ids, boxes, found.scores.numpy(), names])[names >= 0])
    return np.concatenate(rows) if rows else np.zeros((0, 7))


def coco_detections(table: np.ndarray, category_ids: tuple[int, ...]) -> list[dict]:
    """The rows of `detection_table` in COCO's results format."""
    columns = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64), table[:, 1:5], table[:, 5]
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]
