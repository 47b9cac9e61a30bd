"""Detections of a whole data set as one table, in the labels of the data set; COCO's results format."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np

from common.console import InputError, first_few
from common.data.memory import DetectionData
from common.evaluate.results import Cost, from_json, read_json
from common.types import Detections, convert_boxes

ROUNDING = 1e-6  # by which a score may exceed 1, and a width fall below 0
CUT_SCORE = 0.2  # tools cut at 0.25 or more for people to look at, at most at 0.05 for an evaluation


@dataclass(frozen=True)
class DetectionTable:
    """M detections on the images of a data set, one a row.

    Shapes: image (M,) int64, index into the data's images; boxes (M, 4) float64 xywh original pixels; score (M,)
    float64; label (M,) int64.
    """

    image: np.ndarray
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
        return DetectionTable(self.image[rows], self.boxes[rows], self.score[rows], self.label[rows])

    def relabelled(self, labels: np.ndarray) -> "DetectionTable":
        """The rows with `labels` (K,) in place of the labels 0..K-1, without those that become -1."""
        table = replace(self, label=labels[self.label])
        return table.select(table.label >= 0)


@dataclass(frozen=True)
class ModelRun:
    """What a model detects on every image of a data set, in labels of its own, and how."""

    table: DetectionTable
    class_names: tuple[str, ...]
    cost: Cost | None = None
    conditions: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # what of a file was left out or is doubtful


def label_map(class_names: Sequence[str], data: DetectionData) -> np.ndarray:
    """(K,) int64 the data set's label of each of a model's classes, by name; -1 where the data set has no such class.

    A name that differs in case, spaces, underscores or hyphens is accepted where no other name could be meant.
    """
    exact = {name: label for label, name in enumerate(data.class_names)}
    similar = {_class_key(name): label for name, label in exact.items()}
    in_model, in_data = (Counter(map(_class_key, names)) for names in (class_names, data.class_names))
    unique = {key for key, count in in_model.items() if count == in_data[key] == 1}
    keys = [(name, _class_key(name)) for name in class_names]
    return np.array([exact.get(name, similar[key] if key in unique else -1) for name, key in keys], np.int64)


def _class_key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()


def detection_table(detections: Sequence[Detections], data: DetectionData) -> DetectionTable:
    """The detections on images of `data` as one table."""
    if not detections:
        return DetectionTable.empty()
    index_of = {image.id: index for index, image in enumerate(data.images)}
    image = np.repeat([index_of[d.image_id] for d in detections], [len(d.scores) for d in detections])
    corners, score, label = (
        np.concatenate([getattr(d, name).numpy() for d in detections]) for name in ("boxes", "scores", "labels")
    )
    corners = corners.astype(np.float64)
    boxes = convert_boxes(corners, "xyxy", "xywh")
    return DetectionTable(image, boxes, score.astype(np.float64), label)


def coco_detections(table: DetectionTable, data: DetectionData, files: Sequence[str]) -> list[dict]:
    """The rows in COCO's results format, with `file_name`, of `files` (P,), and `category_name` beside the ids."""
    columns = (column.tolist() for column in (table.image, table.label, table.boxes, table.score))
    return [
        {
            "image_id": data.images[image].id,
            "category_id": data.category_ids[label],
            "bbox": box,
            "score": score,
            "file_name": files[image],
            "category_name": data.class_names[label],
        }
        for image, label, box, score in zip(*columns, strict=True)
    ]


def relative_files(data: DetectionData) -> list[str]:
    """The path of each image, relative to the folder that all of them are in."""
    paths = [image.path.absolute() for image in data.images]
    try:
        folder = os.path.commonpath([path.parent for path in paths])
    except ValueError:  # on several drives of Windows
        return [path.as_posix() for path in paths]
    return [path.relative_to(folder).as_posix() for path in paths]


@dataclass(frozen=True)
class CocoResult:
    """A row of COCO's results format; the names are those that `coco_detections` adds."""

    bbox: list[float]  # xywh, original pixels
    score: float
    image_id: int | None = None
    category_id: int | None = None
    file_name: str | None = None
    category_name: str | None = None


def read_detections(path: str, data: DetectionData) -> ModelRun:
    """The detections in a COCO results file, a list of `CocoResult`s.

    Images are those of `file_name` where every row has one, else of `image_id`; classes those of `category_id`, or of
    `category_name` where no row has an id. Rows on other images and of other categories are left out, with a warning.
    InputError says what is wrong with the file, or that it is not about the images or categories of `data`.
    """
    rows = from_json(list[CocoResult], read_json(path), path)
    boxes, scores = _check_numbers(path, rows)
    images, image_warnings = _find_images(path, rows, data)
    labels, label_warnings = _find_labels(path, rows, data)
    warnings = image_warnings + label_warnings
    if len(scores) and scores.min() >= CUT_SCORE:
        warnings.append(f"its lowest score is {scores.min():.2f}: AP and AR are those of a list that was cut there")
    kept = np.nonzero((labels >= 0) & (images >= 0))[0]
    table = DetectionTable(images, boxes, scores, labels).select(kept[np.argsort(-scores[kept], kind="stable")])
    return ModelRun(table, data.class_names, warnings=tuple(warnings))


def _check_numbers(path: str, rows: list[CocoResult]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) xywh original pixels and scores (M,), float64."""
    for number, row in enumerate(rows):
        if len(row.bbox) != 4:
            raise InputError(f"{path}: {number}: bbox must be x, y, width, height, and has {len(row.bbox)} numbers")
    numbers = np.array([[*row.bbox, row.score] for row in rows]).reshape(-1, 5)
    sides, scores = numbers[:, 2:4], numbers[:, 4]
    if not np.isfinite(numbers).all():
        raise InputError(f"{path}: some numbers are inf or NaN")
    if negative := int((sides < -ROUNDING).any(1).sum()):
        raise InputError(
            f"{path}: {negative} of the {len(rows)} boxes have a negative width or height; bbox must be x, y, width, "
            "height in pixels (for corners: x1, y1, x2 - x1, y2 - y1)"
        )
    if len(scores) and not -ROUNDING <= scores.min() <= scores.max() <= 1 + ROUNDING:
        raise InputError(
            f"{path}: the scores range from {scores.min():.6g} to {scores.max():.6g}, and must be probabilities in "
            "0..1 (divide per cent by 100, take the sigmoid or softmax of logits)"
        )
    return np.hstack([numbers[:, :2], np.maximum(sides, 0)]), scores.clip(0, 1)


def _find_images(path: str, rows: list[CocoResult], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 index into `data.images` of each row, -1 where there is none, and warnings.

    A file name is relative to the images' folder, or any path whose last part one image alone has.
    """
    names = [image.path.name for image in data.images]
    count, place_of = Counter(names), {name: n for n, name in enumerate(relative_files(data))}
    place_of |= {name: n for n, name in enumerate(names) if count[name] == 1}
    keys: list = [(row.file_name or "").replace("\\", "/") for row in rows]
    images = np.array([place_of.get(key, place_of.get(PurePosixPath(key).name, -1)) for key in keys], np.int64)
    if "" in keys or (images < 0).all():
        by_id = {image.id: n for n, image in enumerate(data.images)}
        keys, images = _places(path, rows, "image_id", "file_name", by_id)
    ids = dict(zip(images, (row.image_id for row in rows), strict=True))
    for image, row in zip(images, rows, strict=True):
        if image >= 0 and ids[image] != row.image_id:
            raise InputError(f"{path}: image_ids {row.image_id} and {ids[image]} share the file_name {row.file_name}")
    advice = "give each detection the image_id or file_name of the data, or take all images (--val-images 0)"
    warnings = _left_out(path, keys, images, f"images that {data.source} does not have here", advice)
    with_objects = data.with_objects()
    if (empty := len(np.setdiff1d(with_objects, images))) > len(with_objects) / 2:
        warnings.append(f"{empty} of the {len(with_objects)} images with objects have no detections")
    return images, warnings


def _find_labels(path: str, rows: list[CocoResult], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 label of each row, -1 where `data` has no such category, and warnings."""
    names = sorted({row.category_name for row in rows if row.category_name is not None})
    by_name = dict(zip(names, label_map(names, data).tolist(), strict=True))
    by_id = {number: label for label, number in enumerate(data.category_ids)}
    if any(row.category_id is not None or row.category_name is None for row in rows):
        keys, labels = _places(path, rows, "category_id", "category_name", by_id)
    else:
        keys, labels = _places(path, rows, "category_name", "category_id", by_name)
    for label, row in zip(labels, rows, strict=True):
        if row.category_name is not None and by_name[row.category_name] != label:
            raise InputError(
                f"{path}: a detection has category_id {row.category_id} and category_name {row.category_name[:40]}, "
                f"which differ in {data.source}: leave out the one that is wrong"
            )
    known = [f"{number} {name}" for number, name in zip(data.category_ids, data.class_names, strict=True)]
    counted = "; COCO's ids run to 90, are these counted to 80?" if len(known) == 80 else ""
    of = f"categories that {data.source} does not have; it has {first_few(known)}{counted}"
    return labels, _left_out(path, keys, labels, of, "give the data's category_id, or category_name alone")


def _places(path: str, rows: list[CocoResult], key: str, other: str, place_of: dict) -> tuple[list, np.ndarray]:
    """What each row has under `key`, and its place (M,) int64, -1 where there is none."""
    keys = [getattr(row, key) for row in rows]
    if None in keys:
        raise InputError(f"{path}: {keys.index(None)}: {key} is missing; or give every row a {other}")
    return keys, np.array([place_of.get(key, -1) for key in keys], np.int64)


def _left_out(path: str, keys: list, places: np.ndarray, of: str, advice: str) -> list[str]:
    """The warning of rows without a place. Raises InputError, with advice, where no row has one."""
    unknown = sorted({key for key, place in zip(keys, places, strict=True) if place < 0})
    about = f"{(places < 0).sum()} detections of {len(unknown)} ({first_few(unknown)}) {of}"
    if unknown and (places < 0).all():
        raise InputError(f"{path}: it has only {about}: {advice}")
    return [f"{about}: they are left out"] if unknown else []
