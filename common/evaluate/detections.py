"""Detections of a whole data set as one table, in the labels of the data set; COCO's results format."""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from common.console import InputError, first_few
from common.data.memory import DetectionData
from common.evaluate.results import Cost
from common.types import Detections, convert_boxes

ROUNDING = 1e-6  # by which a score may exceed 1, and a width fall below 0
EXACT_FLOATS = 2**53  # below it, a float that is a whole number is exact
MIN_COVERAGE = 0.1  # share of the images that a file with detections on other images must cover
REASON_LENGTH = 120  # characters of a parser's message
CUT_SCORE = 0.2  # tools cut at 0.25 or more for people to look at, at most at 0.05 for an evaluation
VALUE_LENGTH = 40  # characters of a value in a message


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
        return table if (labels >= 0).all() else table.select(table.label >= 0)


@dataclass(frozen=True)
class ModelRun:
    """What a model detects on every image of a data set, in labels of its own, and how."""

    table: DetectionTable
    class_names: tuple[str, ...]
    cost: Cost | None = None
    conditions: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # how detections were read, and what was left out


def label_map(class_names: Sequence[str], data: DetectionData) -> np.ndarray:
    """(K,) the data set's label of each of a model's classes, by name; -1 where the data set has no such class.

    A name that differs in case, spaces, underscores or hyphens is accepted where no other name could be meant.
    """
    labels = {name: label for label, name in enumerate(data.class_names)}
    missing = [name for name in class_names if name not in labels]
    unused = {_class_key(name): label for name, label in labels.items() if name not in class_names}
    in_model, in_data = Counter(map(_class_key, missing)), Counter(map(_class_key, data.class_names))
    for name in missing:
        key = _class_key(name)
        if in_model[key] == in_data[key] == 1 and key in unused:
            labels[name] = unused[key]
    return np.array([labels.get(name, -1) for name in class_names], np.int64)


def _class_key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()


def detection_table(
    detections: Sequence[Detections], data: DetectionData, labels: np.ndarray | None = None
) -> DetectionTable:
    """The detections on images of `data` as one table, `relabelled` with `labels` where they are given."""
    if not detections:
        return DetectionTable.empty()
    index_of = {image.id: index for index, image in enumerate(data.images)}
    image = np.array([index_of[d.image_id] for d in detections], np.int64)
    corners = np.concatenate([d.boxes.numpy() for d in detections]).astype(np.float64)
    table = DetectionTable(
        np.repeat(image, [len(d.scores) for d in detections]),
        convert_boxes(corners, "xyxy", "xywh"),
        np.concatenate([d.scores.numpy() for d in detections]).astype(np.float64),
        np.concatenate([d.labels.numpy() for d in detections]),
    )
    return table if labels is None else table.relabelled(labels)


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


def read_detections(path: str, data: DetectionData) -> ModelRun:
    """The detections in a COCO results file: a list of image_id, category_id, bbox (xywh, original pixels) and score.

    Images are those of `file_name` where every row has one, else of `image_id`; classes those of `category_id`, or of
    `category_name` where no row has an id. Rows on other images and of other categories are left out, with a warning.

    Raises:
        InputError: no such file, another form, numbers that cannot be meant, ids and names that contradict each other,
            or a file that is not about the images or categories of `data`.
    """
    rows = _read_rows(path)
    boxes, scores = _read_numbers(path, rows)
    images, warnings = _find_images(path, rows, data)
    labels, label_warnings = _find_labels(path, rows, data)
    kept = np.nonzero((labels >= 0) & (images >= 0))[0]
    unknown = {"detections_of_unknown_categories": int((labels < 0).sum())}
    conditions = unknown | {"detections_on_other_images": int((images < 0).sum())}
    warnings = [*warnings, *label_warnings]
    if len(scores) and scores.min() >= CUT_SCORE:
        warnings.append(f"its lowest score is {scores.min():.2f}: AP and AR are those of a list that was cut there")
    table = DetectionTable(images, boxes, scores, labels).select(kept[np.argsort(-scores[kept], kind="stable")])
    return ModelRun(table, data.class_names, None, conditions, tuple(warnings))


def _read_rows(path: str) -> list[dict]:
    try:
        rows = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _not_detections(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(rows, list):
        raise _not_detections(path, f"it holds {type(rows).__name__} in place of a list")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _not_detections(path, f"row {number} is {type(row).__name__} in place of an object")
    return rows


def _not_detections(path: str, reason: str) -> InputError:
    form = "expected a list of objects with image_id, category_id, bbox and score"
    return InputError(f"{path} does not hold detections: {form} ({' '.join(reason.split())[:REASON_LENGTH]})")


def _read_numbers(path: str, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) xywh original pixels and scores (M,), float64."""
    numbers = np.empty((len(rows), 5))
    for number, row in enumerate(rows):
        box, score = row.get("bbox"), row.get("score")
        values = [*box, score] if isinstance(box, list) else []
        if len(values) != 5 or not all(type(value) in (int, float, str) for value in values):
            reason = f"row {number} has bbox {str(box)[:VALUE_LENGTH]} and score {str(score)[:VALUE_LENGTH]}"
            raise _not_detections(path, f"{reason}, not four numbers and one")
        try:
            numbers[number] = values
        except (ValueError, OverflowError) as error:
            raise _not_detections(path, f"row {number}: {error}") from error
    if not np.isfinite(numbers).all():
        raise InputError(f"{path}: some numbers are inf or NaN")
    sides, scores = numbers[:, 2:4], numbers[:, 4]
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


def _whole_numbers(path: str, rows: list[dict], name: str) -> list[int]:
    """The ids of that name, also written as text or as 1.0."""
    ids = []
    for number, row in enumerate(rows):
        value = row.get(name)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOATS:
            value = int(value)
        if type(value) is not int:
            shown = f"{str(value)[:VALUE_LENGTH]}, not a whole number" if name in row else "missing"
            text = "file_name" if name == "image_id" else "category_name"
            raise _not_detections(path, f"row {number}: {name} is {shown}; or give every row a {text}")
        ids.append(value)
    return ids


def _find_images(path: str, rows: list[dict], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 index into `data.images` of each row, -1 where there is none, and warnings.

    A file name is relative to the images' folder, or any path whose last part one image alone has.

    Raises:
        InputError: the file is not about the images of `data`, or two of its ids are one image.
    """
    files = [row["file_name"] for row in rows if isinstance(row.get("file_name"), str)]
    alone = [image.path.name for image in data.images]
    keys: list = []
    places: dict = {}
    if rows and len(files) == len(rows):
        index_of = {name: index for index, name in enumerate(alone) if alone.count(name) == 1}
        index_of |= {name: index for index, name in enumerate(relative_files(data))}
        keys, paths = files, {file: PurePosixPath(file.replace("\\", "/")) for file in files}
        places = {file: index_of.get(str(parts), index_of.get(parts.name, -1)) for file, parts in paths.items()}
        ids_of: dict[str, object] = {}
        for file, number in ((file, row.get("image_id")) for file, row in zip(files, rows, strict=True)):
            if places[file] >= 0 and ids_of.setdefault(file, number) != number:
                raise InputError(f"{path}: image_ids {ids_of[file]} and {number} share the file_name {file}")
    if not any(place >= 0 for place in places.values()):
        keys, by_id = _whole_numbers(path, rows, "image_id"), {image.id: i for i, image in enumerate(data.images)}
        places = {key: by_id.get(key, -1) for key in keys}
    images = np.array([places[key] for key in keys], np.int64)
    beyond = sorted(key for key, place in places.items() if place < 0)
    return images, _check_images(path, images, beyond, data)


def _check_images(path: str, images: np.ndarray, beyond: list, data: DetectionData) -> list[str]:
    """Warnings of images beyond the data's, and of those without detections."""
    covered, with_objects = len(np.unique(images[images >= 0])), data.with_objects()
    if beyond and covered < MIN_COVERAGE * len(data):
        raise InputError(
            f"{path}: it has detections on {covered} of the {len(data)} images and on {len(beyond)} others "
            f"({first_few(beyond)}); give each detection the image_id or the file_name of {data.source}, or evaluate "
            "the images of the file (--val-images, --image-ids)"
        )
    warnings = [
        f"{(images < 0).sum()} detections on {len(beyond)} images beyond the {len(data)} evaluated "
        f"({first_few(beyond)}) were left out; --val-images 0 evaluates all images"
    ] * bool(beyond)
    empty = len(np.setdiff1d(with_objects, images))
    if empty > len(with_objects) / 2:
        warnings.append(f"{empty} of the {len(with_objects)} images with objects have no detections")
    return warnings


def _find_labels(path: str, rows: list[dict], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 label of each row, -1 where `data` has no such category, and warnings.

    Raises:
        InputError: no detection has a category of `data`, or an id and a name contradict each other.
    """
    names = [str(row["category_name"]) if "category_name" in row else None for row in rows]
    distinct = sorted({name for name in names if name is not None})
    by_name: dict = dict(zip(distinct, label_map(distinct, data).tolist(), strict=True))
    keys: list = names
    if None in names or any("category_id" in row for row in rows):
        keys = _whole_numbers(path, rows, "category_id")
        by_id = {number: label for label, number in enumerate(data.category_ids)}
        for number, name in {(number, name) for number, name in zip(keys, names, strict=True) if name is not None}:
            if by_id.get(number, -1) != by_name[name]:
                raise InputError(
                    f"{path}: a detection has category_id {number} and category_name {name[:VALUE_LENGTH]}, which "
                    f"differ in {data.source}: leave out the one that is wrong"
                )
        by_name = by_id
    labels = np.array([by_name.get(key, -1) for key in keys], np.int64)
    unknown = sorted({key for key in keys if by_name.get(key, -1) < 0})
    if not unknown:
        return labels, []
    about = f"the file has {first_few(unknown)}, {data.source} " + first_few(
        [f"{number} {name}" for number, name in zip(data.category_ids, data.class_names, strict=True)]
    )
    if (labels < 0).all():
        raise InputError(f"{path}: no detection has a category of the data: {about}; change the ids or give names")
    about += "; COCO's ids run to 90, are these counted to 80?" if len(data.class_names) == 80 else ""
    return labels, [f"{(labels < 0).sum()} detections of {len(unknown)} unknown categories were left out: {about}"]
