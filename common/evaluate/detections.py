"""Detections of a whole data set as one table, in the labels of the data set; COCO's results format."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.console import InputError
from common.data.coco import CocoData, xywh_to_xyxy, xyxy_to_xywh
from common.types import Detections, Predictions


@dataclass(frozen=True)
class DetectionTable:
    """M detections on the images of a data set, one a row.

    Shapes: image_id (M,) int64; boxes (M, 4) float64 xyxy original pixels; score (M,) float64; label (M,) int64 of
    the data set.
    """

    image_id: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    label: np.ndarray

    @classmethod
    def empty(cls) -> "DetectionTable":
        return cls(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.score)

    def select(self, rows: np.ndarray) -> "DetectionTable":
        """The rows at `rows`, int64 indices or a bool mask, in that order."""
        return DetectionTable(*(getattr(self, column.name)[rows] for column in fields(self)))

    def at_least(self, score: float | None) -> "DetectionTable":
        """The rows with that score or a higher one; none where `score` is None."""
        return self.select(self.score >= (np.inf if score is None else score))

    def best_per_image(self) -> "DetectionTable":
        """The row with the highest score of each image, the first of equals, by rising image id."""
        order = np.argsort(-self.score, kind="stable")
        _, first = np.unique(self.image_id[order], return_index=True)
        return self.select(order[first])


def label_map(class_names: tuple[str, ...], data: CocoData) -> np.ndarray:
    """(K,) the data set's label of each of a model's classes, by name; -1 where the data set has no such class."""
    labels = {name: label for label, name in enumerate(data.class_names)}
    return np.array([labels.get(name, -1) for name in class_names], np.int64)


def detection_table(detections: list[Detections], labels: np.ndarray) -> DetectionTable:
    """The detections of all images as one table, without those of classes that the data set does not have.

    Args:
        detections: an entry for each image, in the model's labels.
        labels: (K,) as `label_map` returns it.
    """
    if not detections:
        return DetectionTable.empty()
    counts = [len(d.scores) for d in detections]
    table = DetectionTable(
        np.repeat(np.array([d.image_id for d in detections], np.int64), counts),
        np.concatenate([d.boxes.numpy() for d in detections]).astype(np.float64),
        np.concatenate([d.scores.numpy() for d in detections]).astype(np.float64),
        labels[np.concatenate([d.labels.numpy() for d in detections])],
    )
    return table.select(table.label >= 0)


def coco_detections(table: DetectionTable, category_ids: tuple[int, ...]) -> list[dict]:
    """The rows in COCO's results format, boxes as xywh."""
    columns = table.image_id, table.label, xyxy_to_xywh(table.boxes), table.score
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]


def read_detections(path: str, data: CocoData) -> Predictions:
    """The detections in a COCO results file: a list of image_id, category_id, bbox (xywh, original pixels) and score.

    Raises:
        InputError: no such file, another format, numbers that are inf or NaN, or images that are not in `data`.
    """
    image_ids, categories, boxes, scores = _read_columns(path)
    unknown_ids = np.setdiff1d(image_ids, [image.id for image in data.images])
    if len(unknown_ids):
        raise InputError(f"{path}: {len(unknown_ids)} images are not in {data.source}, {unknown_ids[0]} among them")
    label_of = {category: label for label, category in enumerate(data.category_ids)}
    labels = np.array([label_of.get(category, -1) for category in categories.tolist()], np.int64)
    order = np.lexsort((-scores, image_ids))
    order = order[labels[order] >= 0]
    bounds = np.searchsorted(image_ids[order], [image.id for image in data.images])
    ends = np.searchsorted(image_ids[order], [image.id for image in data.images], side="right")
    detections = []
    for image, begin, end in zip(data.images, bounds, ends, strict=True):
        columns = (torch.from_numpy(column[order[begin:end]]) for column in (boxes, scores, labels))
        detections.append(Detections(image.id, *columns))
    return Predictions(
        detections, data.class_names, conditions={"detections_of_unknown_categories": int((labels < 0).sum())}
    )


def _read_columns(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image ids (M,) and category ids (M,) int64, boxes (M, 4) xyxy and scores (M,) float64."""
    try:
        rows = json.loads(Path(path).read_text())
        ids = np.array([(_whole(row["image_id"]), _whole(row["category_id"])) for row in rows], np.int64).reshape(-1, 2)
        numbers = np.array([(*row["bbox"], row["score"]) for row in rows], np.float64).reshape(-1, 5)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} does not hold detections: a list of image_id, category_id, bbox and score is wanted ({error!r})"
        ) from error
    if not np.isfinite(numbers).all():
        raise InputError(f"{path}: some numbers are inf or NaN")
    return ids[:, 0], ids[:, 1], xywh_to_xyxy(numbers[:, :4]), numbers[:, 4]


def _whole(value: Any) -> int:
    number = int(value)
    if number != value:
        raise ValueError(f"the id {value!r} is not a whole number")
    return number
