"""COCO-format annotations -> `DetectionData`: every fault of the data is repaired, left out or refused.

Faults that make training meaningless raise InputError. The others are counted, repaired or left out, and listed in
`DetectionData.notes` with the names of the first images concerned; `--strict` refuses them too.
"""

import hashlib
import json
import os
import re
import reprlib
import stat
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from common.console import NAMED, InputError, WrongSizeError, first_few, progress_bar
from common.data.box_format import are_normalised, detect_layout, layout_fits, to_xywh
from common.data.memory import DetectionData, ImageFile
from common.data.transforms import SMALLEST_SIDE
from common.files import atomic_write, cache_folder
from common.images import TooLargeError, has_open_orientation, read_sizes

REQUIRED = {"images": {"id", "file_name"}, "annotations": {"image_id"}, "categories": {"id", "name"}}
NUMBERS = {int, float}
NO_BOX = [None] * 4
# Polygons fill most of COCO's files and are not used: they are removed before they fill the memory. Within a string the
# quotes would be escaped, so no file name can match.
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\[\]\s0-9eE+.,-]*\]')
MAX_DECODED = 20_000  # images that are decoded before training, which takes a few minutes
ROUNDING = 1.0  # pixels that a box may reach beyond its image without a note
PROGRESS_FROM = 1000  # images; checking fewer needs no progress bar
MAX_NAME_LENGTH = 200  # characters of an image name in a note
MAX_SIDE = 2**31  # pixels of an annotated width or height
MIN_MISFITS = 3  # boxes; fewer that do not fit their images do not call the format of the boxes into question
UNREADABLE = "left out {} images that cannot be read"
TOO_LARGE = "left out {} images that are too large to decode, scale them down"
OPEN_ORIENTATION = "used {} images as stored, since their size does not tell whether EXIF's rotation was applied"
TEXT_IDS = "read {} ids that are written as text"


class Problems:
    """Kinds of faults in a data set, and the first images that have them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, dict[str, None]] = {}

    def add(self, kind: str, place: object, count: int = 1) -> None:
        """Count faults of `kind`, a sentence with {} for the count, at `place`, usually an image's file name."""
        self.counts[kind] += count
        names = self.names.setdefault(kind, {})
        if len(names) <= NAMED:
            names["".join(letter if letter.isprintable() else "?" for letter in str(place)[:MAX_NAME_LENGTH])] = None

    def notes(self) -> tuple[str, ...]:
        """A line for each kind, with its count and the first images."""
        lines = []
        for kind, count in self.counts.items():
            names = first_few(list(self.names[kind]), MAX_NAME_LENGTH)
            lines.append(f"{kind.replace('{}', str(count), 1)} ({names})")
        return tuple(lines)


def load_coco(
    json_path: Path, images_folder: Path, limit: int = 0, box_format: str = "auto", other_split: Path | None = None
) -> DetectionData:
    """Read and check one annotation file.

    Args:
        json_path: COCO instances JSON (`images`, `annotations`, `categories`).
        images_folder: the folder that the `file_name`s are relative to.
        limit: keep the first `limit` images; 0 keeps all.
        box_format: one of `box_format.LAYOUTS`, or "auto": xywh, as COCO defines it, unless the boxes of the file are
            certainly in another layout; `notes` then says so.
        other_split: annotation file of the same data set, read where the boxes of this file do not decide the layout.

    Raises:
        InputError: no such file, not JSON, and where `coco_data` raises it.
    """
    return coco_data(read_json(json_path), images_folder, str(json_path), limit, box_format, other_split)


def coco_data(
    content: dict,
    folder: Path,
    source: str,
    limit: int = 0,
    box_format: str = "xywh",
    other_split: Path | None = None,
    upright: bool = False,
) -> DetectionData:
    """The data set that a COCO instances dictionary describes; `notes` says what was repaired or left out.

    An image file that is listed under several ids becomes one image with the boxes of all of them. Otherwise the
    objects of one id would be background under the others, in training as well as in evaluation.

    Args:
        content: `images`, `annotations`, `categories`, as in a COCO JSON.
        folder: the folder that the `file_name`s are relative to.
        source: name of the data set in messages.
        limit: keep the first `limit` images; 0 keeps all.
        box_format, other_split: as in `load_coco`.
        upright: whether boxes are on the upright images wherever an image's size does not tell.

    Raises:
        InputError: not COCO, no usable image, or ambiguous ids.
    """
    _check_form(content, source)
    if not folder.is_dir():
        raise InputError(f"{source} needs the images' folder {folder}, which does not exist")
    problems = Problems()
    label_of, names = _categories(content, source, problems)
    listing = _list_images(content["images"], limit, folder, source, problems)
    columns = _read_columns(content["annotations"], listing.size_of, source, problems)
    with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are inf or NaN, which are left out
        columns = _as_xywh(columns, box_format, other_split, problems)
        arrays = _checked_arrays(columns, listing, label_of, problems)
    images = [replace(image, upright=True) for image in listing.images] if upright else listing.images
    return DetectionData(tuple(images), tuple(label_of), names, **arrays, source=source, notes=problems.notes())


def check_object_sizes(data: DetectionData, image_size: int, patch: int) -> None:
    """Print how many objects of the training images are too small to be learned at this size of the input.

    Args:
        data: the training images.
        image_size: side of the square input, pixels.
        patch: of the backbone, whose multiple a larger size must be.

    Raises:
        InputError: all of them are.
    """
    image_sizes = np.array([(image.width, image.height) for image in data.images])
    image_sizes = image_sizes[data.image_of_box()[~data.crowd]]
    boxes = data.boxes[~data.crowd]
    sides = np.minimum(boxes[:, :2] + boxes[:, 2:], image_sizes) - np.maximum(boxes[:, :2], 0)
    needed = SMALLEST_SIDE * image_sizes.max(1, initial=0) / sides.min(1, initial=np.inf)  # size of the input, pixels
    lost = int((needed > image_size).sum())
    if not lost:
        return
    sizes = np.median(needed[needed > image_size]), needed.max()
    half, whole = (int(np.ceil(size / patch)) * patch for size in sizes)
    message = (
        f"{lost} of {len(boxes)} training objects are smaller than {SMALLEST_SIDE:.0f} pixels at --image-size "
        f"{image_size} and cannot be learned: --image-size {whole} would keep them"
    ) + f", {half} half of them" * (half < whole)
    if lost == len(boxes):
        raise InputError(f"{data.source}: {message}")
    print(f"{data.source}: {message}", flush=True)


def without_unreadable(data: DetectionData) -> DetectionData:
    """The data set without the images that cannot be decoded, or are of another size than annotated.

    Every image is decoded once; the result is cached by path, length and time of change. More than MAX_DECODED images
    are not decoded, because that takes too long: a damaged one then stops the run when it is read.

    Raises:
        InputError: no usable image.
    """
    if len(data) > MAX_DECODED:
        note = f"did not decode {len(data)} images beforehand; a damaged one will stop the run"
        return replace(data, notes=(*data.notes, note))
    faults = _faults(data)
    problems = Problems()
    for kind, place in faults:
        if kind:
            problems.add(kind, place)
    good = np.nonzero([kind in ("", OPEN_ORIENTATION) for kind, _ in faults])[0]
    if not len(good):
        raise InputError(f"{data.source}: none of its {len(data)} images can be used: {'; '.join(problems.notes())}")
    return replace(data if len(good) == len(data) else data.select(good), notes=(*data.notes, *problems.notes()))


def _faults(data: DetectionData) -> list[tuple[str, str]]:
    """The kind of fault of each image, "" where it has none, and a name of the image for the note."""
    digest = hashlib.sha256()
    for p in data.images:
        digest.update(repr((*p.file_state(), p.width, p.height)).encode())
    cached = cache_folder("checked", f"{digest.hexdigest()[:24]}.json")
    try:
        return json.loads(cached.read_text())
    except (OSError, ValueError):
        pass
    faults = []
    bar = progress_bar(len(data), "checking images", shown=len(data) > PROGRESS_FROM)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault in pool.map(_fault, data.images):
            faults.append(fault)
            bar.update()
    with atomic_write(cached, "w") as file:
        json.dump(faults, file)
    return faults


def _fault(image: ImageFile) -> tuple[str, str]:
    name = image.path.name
    try:
        is_open = has_open_orientation(image.path, (image.width, image.height))
    except WrongSizeError:
        return "left out {} images of another size than annotated", name
    except TooLargeError as error:
        return TOO_LARGE, f"{name}: {str(error).rpartition(': ')[2]}"
    except InputError:
        return UNREADABLE, name
    return OPEN_ORIENTATION if is_open and not image.upright else "", name


def read_json(path: Path) -> dict:
    """The content of an annotation file, without polygons. Raises InputError: no such file, or not JSON."""
    try:
        text = path.read_bytes()
        text = POLYGONS.sub(b'"segmentation":0', text)
        return json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: it is not text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _check_form(content: object, source: str) -> None:
    parts = content if isinstance(content, dict) else {}
    for part, keys in REQUIRED.items():
        entries = parts.get(part)
        if not isinstance(entries, list):
            raise InputError(
                f"{source} is not COCO: it has no list {part!r} (give the instances_*.json of a detection set)"
            )
        for bad in (e for e in entries if not isinstance(e, dict) or not keys <= e.keys()):
            raise InputError(
                f"{source} is not COCO: an entry of {part!r} lacks {' or '.join(sorted(keys))}: {reprlib.repr(bad)}"
            )
    for part in ("images", "categories"):
        if not parts[part]:
            raise InputError(f"{source}: the list {part!r} is empty; there is nothing to train on or evaluate")


def _number(value: object, source: str, repaired: Callable[[], None] = lambda: None) -> int:
    """An id as an integer; `repaired` is called where it is written as text."""
    number = _whole(value)
    if number is None or abs(number) >= 2**63:
        raise InputError(f"{source}: the id {reprlib.repr(value)} is not a whole number of 64 bits; COCO's ids are")
    if isinstance(value, str):
        repaired()
    return number


def _whole(value: object) -> int | None:
    """The integer that a value is, also one written as text or as 1.0; None for all other values."""
    if type(value) is int:  # first, because nearly all of millions of values are
        return value
    if not isinstance(value, float | str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value else None


def _categories(content: dict, source: str, problems: Problems) -> tuple[dict[int, int], tuple[str, ...]]:
    """Label of each category id, in the order of the ids, and the names in the order of the labels."""
    names: dict[int, str] = {}
    for category in content["categories"]:
        number = _number(category["id"], source, partial(problems.add, TEXT_IDS, "categories"))
        if number in names:
            raise InputError(f"{source}: two categories share an id, {number}; give each its own")
        names[number] = str(category["name"]).strip()
    unused = _unused_categories(content, names, problems)
    names = {number: names[number] for number in sorted(names) if number not in unused}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: two categories are called {repeated[0]!r}; give each a name of its own")
    return {number: label for label, number in enumerate(names)}, tuple(names.values())


def _unused_categories(content: dict, names: dict[int, str], problems: Problems) -> set[int]:
    """Ids of the categories without boxes that are not classes: groups of others, or named like another one.

    Roboflow lists its project as the first category: its supercategory is "none", and it is that of all others.
    """
    parents = {str(category.get("supercategory")).strip() for category in content["categories"]}
    roots = {_whole(category["id"]) for category in content["categories"] if category.get("supercategory") == "none"}
    frequency = Counter(names.values())
    groups = {number for number in names if number in roots and names[number] in parents}
    suspects = groups | {number for number in names if frequency[names[number]] > 1}
    used = {_whole(annotation.get("category_id")) for annotation in content["annotations"]} if suspects else set()
    unused = set()
    for number in sorted(suspects - used):
        if frequency[names[number]] > 1:
            problems.add("left out {} categories without boxes that are called like another one", names[number])
        elif number in groups:
            problems.add("left out {} categories without boxes that are groups of others", names[number])
        else:
            continue
        frequency[names[number]] -= 1
        unused.add(number)
    return unused


@dataclass
class _Listing:
    """The list `images` of a file: the usable images, the index in them of each used id, (width, height) of all ids."""

    images: list[ImageFile] = field(default_factory=list)
    index_of: dict[int, int] = field(default_factory=dict)
    size_of: dict[int, tuple[int, int]] = field(default_factory=dict)


def _list_images(images: list, limit: int, folder: Path, source: str, problems: Problems) -> _Listing:
    """The first `limit` images; later ids are used where they repeat the file name of one of these."""
    listing = _Listing()
    path_of: dict[int, Path] = {}
    index_of_file: dict[tuple[int, ...], int] = {}
    names = {str(image["file_name"]) for image in images[:limit]}
    for place, image in enumerate(images):
        name = str(image["file_name"])
        number, path = _number(image["id"], source, partial(problems.add, TEXT_IDS, name)), folder / name
        if number in path_of:
            if path_of[number] != path:
                raise InputError(f"{source}: two images share the id {number}: {path_of[number].name} and {path.name}")
            problems.add("left out {} images that are listed twice", name)
            continue
        size = listing.size_of[number] = _annotated_size(image)
        if 0 < limit <= place and name not in names:
            continue
        status = _usable_status(name, folder, problems)
        if status is not None and not all(size):
            size = _size_of(path, problems)
        if status is None or not all(size):
            continue
        path_of[number], listing.size_of[number] = path, size
        identity = *size, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        index = listing.index_of[number] = index_of_file.setdefault(identity, len(listing.images))
        if index < len(listing.images):
            problems.add("merged {} images with an earlier one of the same file", name)
        else:
            listing.images.append(ImageFile(number, path, *size))
    if not listing.images:
        reasons = "; ".join(problems.notes())
        raise InputError(f"{source}: none of its {len(images[: limit or None])} images can be used: {reasons}")
    return listing


def _annotated_size(image: dict) -> tuple[int, int]:
    """(width, height) of an entry of `images`, (0, 0) without valid ones."""
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int) and isinstance(height, int) and 0 < min(width, height) <= max(width, height) < MAX_SIDE:
        return width, height
    return 0, 0


def _usable_status(name: str, folder: Path, problems: Problems) -> os.stat_result | None:
    """The status of an image file; None where it is outside the folder or does not exist."""
    if _leads_out(name):
        problems.add("left out {} images whose file names lead out of their folder", name)
        return None
    with suppress(OSError, ValueError):  # ValueError: names that no file system can hold
        status = os.stat(f"{folder}/{name}")  # noqa: PTH116 (a Path for each of 118,287 images takes seconds)
        if stat.S_ISREG(status.st_mode):
            return status
    problems.add(f"left out {{}} images that are not in {folder}", name)
    return None


def _size_of(path: Path, problems: Problems) -> tuple[int, int]:
    """(width, height) of an image file as stored, (0, 0) where it cannot be read."""
    sizes = read_sizes(path)
    if sizes is None:
        problems.add(*_fault(ImageFile(0, path, 0, 0)))
        return 0, 0
    stored, upright = sizes
    problems.add("read the sizes of {} images from their files", path.name)
    if stored != upright:
        problems.add(OPEN_ORIENTATION, path.name)
    return stored


def _leads_out(name: str) -> bool:
    """Whether a file name, as a POSIX or a Windows path, leads out of the images' folder."""
    if not name.startswith("/") and not any(part in name for part in ("..", ":", "\\")):  # nearly all of them
        return False
    return any(kind(name).is_absolute() or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))


@dataclass(frozen=True)
class _Columns:
    """The annotations of a file before the checks.

    sizes (A, 2) float64: width and height of the image, NaN where unknown. boxes (A, 4) float64, NaN where there is no
    number. is_box (A,) bool: a list of four numbers. ids (A,) int64, 0 where there is no integer; has_id (A,) bool.
    category_ids: None where there is no integer. crowd and areas (A,) float64, NaN where there is no number.
    """

    image_ids: list[int]
    sizes: np.ndarray
    boxes: np.ndarray
    is_box: np.ndarray
    ids: np.ndarray
    has_id: np.ndarray
    category_ids: list[int | None]
    crowd: np.ndarray
    areas: np.ndarray


def _read_columns(annotations: list, size_of: dict[int, tuple[int, int]], source: str, problems: Problems) -> _Columns:
    """Raises InputError: an `image_id` that is not an integer."""
    image_ids = [a["image_id"] for a in annotations]
    if not set(map(type, image_ids)) <= {int}:
        repaired = partial(problems.add, TEXT_IDS, "annotations")
        image_ids = [_number(value, source, repaired) for value in image_ids]
    sizes = np.array([size_of.get(number, (0, 0)) for number in image_ids], np.float64).reshape(-1, 2)
    boxes = [a.get("bbox") for a in annotations]
    numbers = list(chain.from_iterable(box if isinstance(box, list) and len(box) == 4 else NO_BOX for box in boxes))
    is_number = np.fromiter(map(NUMBERS.__contains__, map(type, numbers)), bool, len(numbers))
    ids = [a.get("id") for a in annotations]
    return _Columns(
        image_ids=image_ids,
        sizes=np.where(sizes > 0, sizes, np.nan),
        boxes=_floats(numbers).reshape(-1, 4),
        is_box=np.all(is_number.reshape(-1, 4), axis=1),
        ids=np.array([n if n and abs(n) < 2**63 else 0 for n in _integers(ids)], np.int64),
        has_id=np.array([value is not None for value in ids], bool),
        category_ids=_integers([a.get("category_id") for a in annotations]),
        crowd=_floats(_integers([a.get("iscrowd") for a in annotations])),
        areas=_floats([a.get("area") for a in annotations]),
    )


def _integers(values: list) -> list[int | None]:
    """`_whole` of each value; a bool is 0 or 1."""
    if set(map(type, values)) <= {int}:
        return values
    return [int(value) if isinstance(value, bool) else _whole(value) for value in values]


def _floats(values: list) -> np.ndarray:
    """(N,) float64, NaN for what is not a finite number."""
    if set(map(type, values)) <= NUMBERS:
        with suppress(OverflowError):
            return np.array(values, np.float64)
    return np.array([value if _is_number(value) else np.nan for value in values], np.float64)


def _is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _as_xywh(columns: _Columns, box_format: str, other_split: Path | None, problems: Problems) -> _Columns:
    """The columns with boxes as xywh in pixels; their layout is detected where `box_format` is "auto"."""
    boxes, normalised = _in_pixels(columns)
    fit, known = layout_fits(boxes, columns.sizes)
    layout = box_format
    if box_format == "auto":
        layout = detect_layout(fit, known) or _layout_of_file(other_split) or "xywh"
    fitting = {name: int(fit[name].sum()) for name in fit}
    counts = ", ".join(f"{count} fit as {name}" for name, count in fitting.items())
    misfits = known - fitting[layout]
    if normalised or layout not in ("xywh", box_format):
        unit = "normalised coordinates" if normalised else "pixels"
        problems.add(f"read {{}} boxes as {layout} in {unit}", f"{counts}; --box-format decides", len(boxes))
    elif misfits > max(MIN_MISFITS - 1, fitting[layout]):
        kind = f"read {len(boxes)} boxes as {layout}, although {{}} of them do not fit their images"
        problems.add(kind, "--box-format sets another format", misfits)
    if layout == "xywh" and not normalised:
        return columns
    boxes = to_xywh(boxes, layout)
    return replace(columns, boxes=boxes, areas=np.prod(boxes[:, 2:], axis=1))


def _in_pixels(columns: _Columns) -> tuple[np.ndarray, bool]:
    """The boxes in pixels, and whether they were normalised."""
    normalised = are_normalised(columns.boxes, columns.sizes)
    return columns.boxes * np.tile(columns.sizes, 2) if normalised else columns.boxes, normalised


def _layout_of_file(path: Path | None) -> str:
    """The layout of the boxes of another annotation file, "" where it is undecided or the file cannot be read."""
    if path is None:
        return ""
    try:
        content, source = read_json(path), str(path)
        _check_form(content, source)
        size_of = {_number(image["id"], source): _annotated_size(image) for image in content["images"]}
        columns = _read_columns(content["annotations"], size_of, source, Problems())
    except InputError:
        return ""
    return detect_layout(*layout_fits(_in_pixels(columns)[0], columns.sizes))


def _checked_arrays(
    columns: _Columns, listing: _Listing, label_of: dict[int, int], problems: Problems
) -> dict[str, np.ndarray]:
    """The arrays of `DetectionData`, without the boxes that are not valid."""
    index = np.array([listing.index_of.get(number, -1) for number in columns.image_ids], np.int64)
    labels = np.array([-1 if n is None else label_of.get(n, -1) for n in columns.category_ids], np.int64)
    for number in (number for number in columns.image_ids if number not in listing.size_of):
        problems.add("left out {} boxes of images that are not listed", f"image {number}")

    def count(kind: str, faulty: np.ndarray) -> None:
        """Count the faulty annotations by their images."""
        for place, number in zip(*np.unique(index[faulty], return_counts=True), strict=True):
            problems.add(kind, listing.images[place].path.name, int(number))

    used = index >= 0
    count("gave new ids to {} boxes whose id is 0, repeated or not an integer", used & _has_bad_id(columns, used))
    for kind, faulty in _invalid(columns, labels).items():
        count(kind, used & faulty)
        used &= ~faulty
    crowd = np.nan_to_num(columns.crowd) != 0
    repeated, relisted = _repetitions(columns, index, labels, used & ~crowd)
    count(
        "kept {} boxes that repeat one of their class on the same image, each counts as an object: remove them",
        repeated,
    )
    used &= ~relisted
    low, high = columns.boxes[:, :2], columns.boxes[:, :2] + columns.boxes[:, 2:]
    beyond = np.maximum(-low, high - columns.sizes).max(1, initial=0)
    count("clipped {} boxes at the edge of their image, for training", used & (beyond > ROUNDING))
    count("read {} boxes without iscrowd as single objects", used & np.isnan(columns.crowd))
    has_area = np.isfinite(columns.areas) & (columns.areas > 0)
    count("used the area of the box for {} objects without area", used & ~has_area)
    rows = np.nonzero(used)[0]
    rows = rows[np.argsort(index[rows], kind="stable")]
    boxes = columns.boxes[rows]
    return {
        "boxes": boxes,
        "labels": labels[rows],
        "crowd": crowd[rows],
        "areas": np.where(has_area[rows], columns.areas[rows], np.prod(boxes[:, 2:], axis=1)),
        "starts": np.searchsorted(index[rows], np.arange(len(listing.images) + 1)),
    }


def _has_bad_id(columns: _Columns, used: np.ndarray) -> np.ndarray:
    """(A,) bool: an id that is 0, not an integer, or that of an earlier used annotation."""
    rows = np.nonzero(used & columns.has_id)[0]
    first = np.unique(columns.ids[rows], return_index=True)[1]
    bad = columns.has_id.copy()
    bad[rows[first]] = columns.ids[rows[first]] == 0
    return bad


def _invalid(columns: _Columns, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Kinds of faults for which an annotation is left out, and (A,) bool where it has them."""
    low, sides = columns.boxes[:, :2], columns.boxes[:, 2:]
    return {
        "left out {} boxes of a category that is not listed": labels < 0,
        "left out {} objects without a box": ~columns.is_box,
        "left out {} boxes with inf or NaN": ~np.isfinite(columns.boxes).all(1),
        "left out {} boxes of negative width or height": (sides < 0).any(1),
        "left out {} boxes without area": (low + sides == low).any(1),
        "left out {} boxes that lie outside their image": (low >= columns.sizes).any(1) | (low + sides <= 0).any(1),
    }


def _repetitions(
    columns: _Columns, index: np.ndarray, labels: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(A,) bool twice: used boxes that repeat an earlier one of the same class under their image's id; under another.

    Equal rows have equal sums of their weighted values, so that a sort of the sums finds the few that may repeat.
    """
    repeated, relisted = np.zeros_like(used), np.zeros_like(used)
    rows = np.nonzero(used)[0]
    table = np.column_stack([index, labels, columns.boxes])[rows]
    sums = (table * np.random.default_rng(0).random(table.shape[1])).sum(1)
    ordered = np.sort(sums)
    candidates = np.isin(sums, ordered[1:][ordered[1:] == ordered[:-1]])
    rows = rows[candidates]
    _, first, group = np.unique(table[candidates], axis=0, return_index=True, return_inverse=True)
    for row, earlier in zip(rows.tolist(), rows[first[group.ravel()]].tolist(), strict=True):
        if row != earlier:
            same_id = columns.image_ids[row] == columns.image_ids[earlier]
            (repeated if same_id else relisted)[row] = True
    return repeated, relisted
