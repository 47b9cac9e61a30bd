"""Detections of a whole data set as one table, in the labels of the data set; COCO's results format."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from common.console import InputError, first_few
from common.data.memory import DetectionData
from common.images import image_suffixes
from common.types import Detections, Predictions

ROUNDING = 1e-6  # by which a score may exceed 1, and a width fall below 0
EXACT_FLOATS = 2**53  # below it, a float that is a whole number is exact
MIN_COVERAGE = 0.1  # share of the images that a file with detections on other images must cover
REASON_LENGTH = 120  # characters of a parser's message
VALUE_LENGTH = 40  # characters of a value in a message


@dataclass(frozen=True)
class DetectionTable:
    """M detections on the images of a data set, one a row.

    Shapes: image_id (M,) int64; boxes (M, 4) float64 xywh original pixels; score (M,) float64; label (M,) int64 of
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
        return DetectionTable(self.image_id[rows], self.boxes[rows], self.score[rows], self.label[rows])

    def at_least(self, score: float | None) -> "DetectionTable":
        """The rows with that score or a higher one; none where `score` is None."""
        return self.select(self.score >= (np.inf if score is None else score))

    def best_per_image(self) -> "DetectionTable":
        """The row with the highest score of each image, the first of equals, by rising image id."""
        order = np.argsort(-self.score, kind="stable")
        _, first = np.unique(self.image_id[order], return_index=True)
        return self.select(order[first])


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
    return re.sub(r"[\s_-]+", "", name).casefold()


def detection_table(detections: list[Detections], labels: np.ndarray) -> DetectionTable:
    """The detections of all images as one table, without those of classes that the data set does not have.

    Args:
        detections: an entry for each image, in the model's labels.
        labels: (K,) as `label_map` returns it.
    """
    if not detections:
        return DetectionTable.empty()
    counts = [len(d.scores) for d in detections]
    corners = np.concatenate([d.boxes.numpy() for d in detections]).astype(np.float64)
    table = DetectionTable(
        np.repeat(np.array([d.image_id for d in detections], np.int64), counts),
        np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]),
        np.concatenate([d.scores.numpy() for d in detections]).astype(np.float64),
        labels[np.concatenate([d.labels.numpy() for d in detections])],
    )
    return table.select(table.label >= 0)


def coco_detections(table: DetectionTable, category_ids: tuple[int, ...]) -> list[dict]:
    """The rows in COCO's results format."""
    columns = table.image_id, table.label, table.boxes, table.score
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]


@dataclass(frozen=True)
class TablePredictions(Predictions):
    """Detections that are a table already, in the labels of the data set; the list is empty."""

    table: DetectionTable = field(default_factory=DetectionTable.empty)


def read_detections(path: str, data: DetectionData) -> TablePredictions:
    """The detections in a COCO results file: a list of image_id, category_id, bbox (xywh, original pixels) and score.

    Images are found by `file_name` where each detection has one that names an image of `data`, else by `image_id`, else
    by an `image_id` that is a file name or its number; categories by `category_name`, else by `category_id`. `warnings`
    says so where that differs from the ids, and how many detections on other images and of other categories are left
    out.

    Raises:
        InputError: no such file, another format, scores outside 0..1, negative widths or heights, or a file that is
            not about the images or categories of `data`.
    """
    rows = _read_rows(path)
    boxes, scores = _read_numbers(path, rows)
    images, warnings = _find_images(path, rows, data)
    labels, label_warnings = _find_labels(path, rows, data)
    unknown = int((labels < 0).sum())
    order = np.lexsort((-scores, images))
    order = order[(labels >= 0)[order] & (images >= 0)[order]]
    conditions = {"detections_of_unknown_categories": unknown, "detections_on_other_images": int((images < 0).sum())}
    ids = np.array([image.id for image in data.images], np.int64)
    table = DetectionTable(ids[images], boxes, scores, labels).select(order)
    return TablePredictions([], data.class_names, None, conditions, (*warnings, *label_warnings), table)


def _read_rows(path: str) -> list[dict]:
    """The entries of the file, each an object with an image_id or file_name and a category_id or category_name."""
    try:
        rows = json.loads(Path(path).read_bytes())
        if not isinstance(rows, list):
            raise ValueError(f"it holds {type(rows).__name__} in place of a list")
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"it lists {type(row).__name__} in place of objects")
        return rows
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _not_detections(path, error) from error


def _not_detections(path: str, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
    form = "expected a list of objects with image_id, category_id, bbox and score"
    return InputError(f"{path} does not hold detections: {form} ({reason})")


def _read_numbers(path: str, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) xywh original pixels and scores (M,), float64."""
    try:
        numbers = np.array([(*_checked_list(row["bbox"]), row["score"]) for row in rows], np.float64).reshape(-1, 5)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _not_detections(path, error) from error
    if not np.isfinite(numbers).all():
        raise InputError(f"{path}: some numbers are inf or NaN")
    sides, scores = numbers[:, 2:4], numbers[:, 4]
    negative = int((sides < -ROUNDING).any(1).sum())
    if negative:
        raise InputError(
            f"{path}: {negative} of the {len(rows)} boxes have a negative width or height; bbox must be x, y, width, "
            "height in pixels (for corners: x1, y1, x2 - x1, y2 - y1)"
        )
    if len(scores) and not -ROUNDING <= scores.min() <= scores.max() <= 1 + ROUNDING:
        per_cent = "; divide scores in per cent by 100" if scores.min() >= 0 and 1 < scores.max() <= 100 else ""
        raise InputError(
            f"{path}: the scores range from {scores.min():.6g} to {scores.max():.6g}, and must be in 0..1{per_cent}"
        )
    numbers[:, 2:4] = np.maximum(sides, 0)
    return numbers[:, :4], scores.clip(0, 1)


def _checked_list(value: object) -> list:
    if type(value) is not list:
        raise TypeError(f"a bbox is {type(value).__name__} in place of a list")
    return value


def _coded(keys: Iterable[tuple]) -> tuple[list[tuple], np.ndarray]:
    """The distinct keys (U), and the index of each key among them (M,)."""
    places: dict[tuple, int] = {}
    codes = np.array([places.setdefault(key, len(places)) for key in keys], np.int64)
    return list(places), codes


def _keys(path: str, rows: list[dict], id_name: str, text_name: str) -> tuple[list[tuple], np.ndarray]:
    """`_coded` pairs of an id, a whole number or text, and a text, None where a row has none."""
    try:
        return _coded(
            (_number_or_text(row.get(id_name)), text if isinstance(text := row.get(text_name), str) else None)
            for row in rows
        )
    except ValueError as error:
        raise InputError(f"{path} does not hold detections: an {id_name} is {error}") from error


def _number_or_text(value: object) -> int | str | None:
    """A whole number, also one that is written as text or as 1.0; other text as it is."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else value
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOATS:
        return int(value)
    if value is not None and type(value) is not int:
        raise ValueError(f"{str(value)[:VALUE_LENGTH]}, not a whole number")
    return value


def _coverage(indices: np.ndarray) -> int:
    return len(np.unique(indices[indices >= 0]))


def _choose(readings: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The first reading of the keys that is complete (no -1), else the first with the most different indices."""
    complete = [name for name, indices in readings.items() if (indices >= 0).all()]
    best = complete[0] if complete else max(readings, key=lambda name: _coverage(readings[name]))
    return best, readings[best]


def _find_images(path: str, rows: list[dict], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 index into `data.images` of each row, -1 where there is none, and warnings.

    Raises:
        InputError: the file is not about the images of `data`.
    """
    keys, codes = _keys(path, rows, "image_id", "file_name")
    counts = np.bincount(codes, minlength=len(keys))
    ids = {image.id: index for index, image in enumerate(data.images)}
    find = _file_finder(data)
    by_id = np.array([ids.get(key, -1) for key, _ in keys], np.int64)
    by_file = np.array([find(name) if name is not None else ids.get(key, -1) for key, name in keys], np.int64)
    by_stem = np.array([find(key) for key, _ in keys], np.int64)
    how, found = _choose({"file_name": by_file, "image_id": by_id, "the file with that name": by_stem})
    warnings = []
    if differ := int(counts[(found >= 0) & (found != by_id)].sum()):
        warnings.append(f"{differ} detections were assigned by {how}: their image_id is not that of {data.source}")
    unnamed = np.array([name is None for _, name in keys], bool)
    if contradicted := int(counts[~unnamed & (found >= 0) & (found != by_file)].sum()):
        warnings.append(f"{contradicted} detections have a file_name that is not that of the image with their image_id")
    doubtful = unnamed & (found >= 0) & (found != by_stem)
    if doubtful.any() and _coverage(by_stem) >= _coverage(found):
        warnings.append(
            f"the image_id of {counts[doubtful].sum()} detections is also the number in the name of another image "
            f"file; they were assigned by the ids of {data.source}: add a file_name to each detection to be certain"
        )
    shown = [key if name is None else name for key, name in keys]
    _check_coverage(path, shown, found, data)
    beyond = [key for key, index in zip(shown, found, strict=True) if index < 0]
    if beyond:
        warnings.append(
            f"{counts[found < 0].sum()} detections on {len(beyond)} images beyond the {len(data)} evaluated "
            f"({first_few(beyond)}) were left out; --val-images 0 evaluates all images"
        )
    with_objects = data.with_objects()
    empty = len(np.setdiff1d(with_objects, found))
    if empty > len(with_objects) / 2:
        warnings.append(f"{empty} of the {len(with_objects)} images with objects have no detections")
    return found[codes], warnings


def _check_coverage(path: str, keys: list[int | str | None], found: np.ndarray, data: DetectionData) -> None:
    """Raise InputError where the images of the file do not look like a superset of those of `data`."""
    unknown = [key for key, index in zip(keys, found, strict=True) if index < 0]
    if not unknown:
        return
    covered = _coverage(found)
    advice = f"give each detection the image_id or the file_name of {data.source}"
    if 0 in unknown and all(isinstance(key, int) and 0 <= key < len(data) for key in keys):
        raise InputError(f"{path}: its image ids look like positions in a list of images; {advice}")
    if covered < MIN_COVERAGE * len(data):
        raise InputError(
            f"{path}: it has detections on {covered} of the {len(data)} images and on {len(unknown)} others "
            f"({first_few(unknown)}); {advice}, or evaluate the images of the file (--val-images, --image-ids)"
        )


def _file_finder(data: DetectionData) -> Callable[[int | str | None], int]:
    """A function from a path, file name, stem or number in a file name to the index of the only such image, else -1."""
    names: dict[int | str, list[int]] = defaultdict(list)
    stems: dict[int | str, list[int]] = defaultdict(list)
    for index, image in enumerate(data.images):
        names[image.path.name].append(index)
        stems[image.path.stem].append(index)
        if image.path.stem.isdecimal():
            stems[int(image.path.stem)].append(index)

    def find(key: int | str | None) -> int:
        parts = PurePosixPath(key.replace("\\", "/")).parts if isinstance(key, str) else ()
        last = parts[-1] if parts else key
        stem = Path(last).stem if isinstance(last, str) and Path(last).suffix.lower() in image_suffixes() else last
        candidates = (names.get(last) or stems.get(stem) or []) if last is not None and stem is not None else []
        if len(candidates) > 1:
            shared = [_shared_parts(parts[:-1], data.images[index].path.parts[:-1]) for index in candidates]
            candidates = [i for i, count in zip(candidates, shared, strict=True) if 0 < count == max(shared)]
        return candidates[0] if len(candidates) == 1 else -1

    return find


def _shared_parts(a: Sequence[str], b: Sequence[str]) -> int:
    """The number of equal folders at the end of two paths."""
    return next(
        (n for n, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b))
    )


def _find_labels(path: str, rows: list[dict], data: DetectionData) -> tuple[np.ndarray, list[str]]:
    """(M,) int64 label of each row, -1 where `data` has no such category, and warnings.

    Raises:
        InputError: no detection has a category of `data`.
    """
    keys, codes = _keys(path, rows, "category_id", "category_name")
    counts = np.bincount(codes, minlength=len(keys))
    ids = {category: label for label, category in enumerate(data.category_ids)}
    texts = list(dict.fromkeys(text for key in keys for text in key if isinstance(text, str)))
    names = dict(zip(texts, label_map(texts, data).tolist(), strict=True))
    by_id = np.array([ids.get(key, names.get(key, -1)) for key, _ in keys], np.int64)
    by_name = np.array([label if n is None else names[n] for (_, n), label in zip(keys, by_id, strict=True)], np.int64)
    how, labels = _choose({"category_name": by_name, "category_id": by_id})
    warnings = []
    if differ := int(counts[(labels >= 0) & (labels != by_id)].sum()):
        warnings.append(f"{differ} detections got their class by {how}: their category_id is not that of {data.source}")
    unknown = [key if name is None else name for (key, name), label in zip(keys, labels, strict=True) if label < 0]
    if unknown and len(unknown) == len(keys):
        own = [f"{number} {name}" for number, name in zip(data.category_ids, data.class_names, strict=True)]
        raise InputError(
            f"{path}: no detection has a category of {data.source}: the file has {first_few(unknown)}, the data set "
            f"{first_few(own)}; change the category_id or add a category_name"
        )
    if unknown:
        warnings.append(
            f"{counts[labels < 0].sum()} detections of {len(unknown)} categories that {data.source} does not have "
            f"({first_few(unknown)}) were left out"
        )
    return labels[codes], warnings
