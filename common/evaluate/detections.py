"""Detections of a whole data set as one table, in the labels of the data set; COCO's results format."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.console import InputError, first_few
from common.data.memory import DetectionData
from common.evaluate.results import LARGEST, Cost, from_json, read_json
from common.types import Detections, convert_boxes

ROUNDING = 1e-6  # by which a score may exceed 1, and a width fall below 0
OTHER_NAMES = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}  # Pascal VOC's
Places = tuple[np.ndarray, list[str]]  # (M,) int64 place of each row in the data, -1 where it has none; and warnings
CUT_SCORE = 0.1  # tools cut at 0.05 at most for an evaluation, at 0.25 or more for people to look at


@dataclass(frozen=True)
class DetectionTable:
    """M detections on the images of a data set, one a row."""

    image: np.ndarray  # (M,) int64, index into the data's images
    boxes: np.ndarray  # (M, 4) float64 xywh original pixels
    score: np.ndarray  # (M,) float64
    label: np.ndarray  # (M,) int64

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

    One that differs in case, spaces, _ or -, or is one of OTHER_NAMES, is accepted where no other could be meant.
    """
    exact = {name: label for label, name in enumerate(data.class_names)}
    similar = {_class_key(name): label for name, label in exact.items()}
    in_model, in_data = (Counter(map(_class_key, names)) for names in (class_names, data.class_names))
    unique = {key for key, count in in_model.items() if count == in_data[key] == 1}
    keys = [(name, _class_key(name)) for name in class_names]
    return np.array([exact.get(name, similar[key] if key in unique else -1) for name, key in keys], np.int64)


def _class_key(name: str) -> str:
    key = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()
    return OTHER_NAMES.get(key, key)


def detection_table(detections: Sequence[Detections], data: DetectionData) -> DetectionTable:
    """The detections, of one image at least, on images of `data` as one table, in the order of these images."""
    index_of = {image.id: index for index, image in enumerate(data.images)}
    found = sorted(detections, key=lambda d: index_of[d.image_id])
    image = np.repeat([index_of[d.image_id] for d in found], [len(d.scores) for d in found])
    corners, score = (np.concatenate([getattr(d, name).double() for d in found]) for name in ("boxes", "scores"))
    label = np.concatenate([d.labels for d in found])
    return DetectionTable(image, convert_boxes(corners, "xyxy", "xywh"), score, label)


def coco_detections(table: DetectionTable, data: DetectionData, files: Sequence[str]) -> list[dict]:
    """The rows in COCO's results format, with `file_name`, of `files` (P,), and `category_name` beside the ids."""
    ids, names, rows = data.category_ids, data.class_names, []
    for image, box, score, label in zip(*(column.tolist() for column in vars(table).values()), strict=True):
        row = {"image_id": data.images[image].id, "category_id": ids[label], "bbox": box, "score": score}
        rows.append(row | {"file_name": files[image], "category_name": names[label]})
    return rows


def relative_files(data: DetectionData) -> list[str]:
    """The path of each image, relative to the folder that all of them are in."""
    paths = [image.path.absolute() for image in data.images]
    try:
        folder = os.path.commonpath([path.parent for path in paths])
    except ValueError:  # on several drives of Windows
        return [path.as_posix() for path in paths]
    return [path.relative_to(folder).as_posix() for path in paths]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # neither inf nor NaN nor true


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value)) and min(value[2:]) >= -ROUNDING


def _is_id(value: Any) -> bool:
    return value is None or type(value) is int or (_is_number(value) and value == int(value))


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of a row; the names are those that `coco_detections` adds
    "bbox": (_is_box, "x, y, width, height in pixels (for corners: x1, y1, x2 - x1, y2 - y1)"),
    "score": (
        lambda value: _is_number(value) and -ROUNDING <= value <= 1 + ROUNDING,
        "a probability in 0..1 (divide per cent by 100, take the sigmoid or softmax of logits)",
    ),
    **dict.fromkeys(("image_id", "category_id"), (_is_id, "a whole number")),
    **dict.fromkeys(("file_name", "category_name"), (lambda value: value is None or type(value) is str, "text")),
}


def read_detections(path: str, data: DetectionData) -> ModelRun:
    """The detections in a COCO results file, a list of rows with FIELDS.

    Images are those of `file_name` where every row has one, else of `image_id`; classes likewise of `category_name` or
    `category_id`. Rows on other images and of other categories are left out, with a warning. InputError says what is
    wrong with the file, or that it is not about the images or categories of `data`.
    """
    rows = from_json(list[dict], read_json(path), path)
    columns = {name: [row.get(name) for row in rows] for name in FIELDS}
    for name, (is_right, meaning) in FIELDS.items():
        for number, value in enumerate(columns[name]):
            if not is_right(value):
                raise InputError(f"{path}: {number}: {name} must be {meaning}, not {str(value)[:40]}")
    images, warnings = _find_images(path, columns, data)
    labels, label_warnings = _find_labels(path, columns, data)
    warnings += label_warnings
    boxes, scores = np.array(columns["bbox"], np.float64).reshape(-1, 4), np.array(columns["score"], np.float64)
    boxes[:, 2:] = boxes[:, 2:].clip(0)
    if len(scores) and scores.min() >= CUT_SCORE:
        warnings.append(f"its lowest score is {scores.min():.2f}: AP and AR are those of a list that was cut there")
    kept = np.nonzero((labels >= 0) & (images >= 0))[0]
    by_score = kept[np.argsort(-scores[kept], kind="stable")]
    table = DetectionTable(images, boxes, scores.clip(0, 1), labels).select(by_score)
    return ModelRun(table, data.class_names, warnings=tuple(warnings))


def _find_images(path: str, columns: dict[str, list], data: DetectionData) -> Places:
    """By a file name relative to the images' folder, or any path whose last part one image alone has; or by the id."""
    last = [image.path.name for image in data.images]
    count, place_of = Counter(last), {file: n for n, file in enumerate(relative_files(data))}
    place_of |= {name: n for n, name in enumerate(last) if count[name] == 1}
    paths = {name: name.replace("\\", "/") for name in set(columns["file_name"]) - {None}}
    by_name = {name: place_of.get(p, place_of.get(p.rpartition("/")[2], -1)) for name, p in paths.items()}
    by_id = {image.id: n for n, image in enumerate(data.images) if data.own_ids}  # others are positions
    of = f"images that {data.source} does not have here"
    advice = f"give each detection the {'image_id or ' * data.own_ids}file_name of the data, or set --val-images 0"
    images, warnings = _find(path, columns, {"file_name": by_name, "image_id": by_id}, of, advice)
    ids: dict[int, int | None] = {}
    for image, number, name in zip(images.tolist(), columns["image_id"], columns["file_name"], strict=True):
        if image >= 0 and ids.setdefault(image, number) != number:
            raise InputError(f"{path}: image_ids {ids[image]} and {number} share the file_name {name}")
    with_objects = data.with_objects()
    if (empty := len(np.setdiff1d(with_objects, images))) > len(with_objects) / 2:
        warnings.append(f"{empty} of the {len(with_objects)} images with objects have no detections")
    return images, warnings


def _find_labels(path: str, columns: dict[str, list], data: DetectionData) -> Places:
    """By the category's name or id."""
    names = list(set(columns["category_name"]) - {None})
    by_name = dict(zip(names, label_map(names, data).tolist(), strict=True))
    by_id = {number: label for label, number in enumerate(data.category_ids)}
    for number, name in zip(columns["category_id"], columns["category_name"], strict=True):
        if None not in (number, name) and by_id.get(number, -1) != by_name[name]:
            about = f"category_id {number} and category_name {name[:40]}, which differ in {data.source}"
            raise InputError(f"{path}: a detection has {about}: leave out the one that is wrong")
    known = [f"{number} {name}" for number, name in zip(data.category_ids, data.class_names, strict=True)]
    of = f"categories that {data.source} does not have (it has {first_few(known)})"
    advice = "give the data's category_id, or category_name alone"
    return _find(path, columns, {"category_name": by_name, "category_id": by_id}, of, advice)


def _find(path: str, columns: dict[str, list], place_of: dict[str, dict], of: str, advice: str) -> Places:
    """The places by the first field of `place_of` that all rows have; a warning of rows `of` something without a place.

    InputError with `advice` where no row has a place.
    """
    name, number = place_of
    field = number if None in columns[name] else name
    keys = columns[field]
    if None in keys:
        raise InputError(f"{path}: {keys.index(None)}: {field} is missing; or give every row a {name}")
    places = np.array([place_of[field].get(key, -1) for key in keys], np.int64)
    unknown = sorted({key for key, place in zip(keys, places.tolist(), strict=True) if place < 0})
    about = f"{(places < 0).sum()} detections of {len(unknown)} ({first_few(unknown)}) {of}"
    if unknown and (places < 0).all():
        raise InputError(f"{path}: it has only {about}: {advice}")
    return places, [f"{about}: they are left out"] if unknown else []
