"""COCO-format annotations -> `CocoData`: everything wrong with them is found, and repaired, left out or refused.

What makes training meaningless is refused in one line. The rest is counted, said with the names of the first images
concerned, and repaired or left out; with `strict` it is refused as well.
"""

import hashlib
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from common.console import InputError, WrongSizeError, progress_bar
from common.data.coco import CocoData, ImageFile, xywh_to_xyxy
from common.data.images import TooLargeError, has_open_orientation, read_sizes
from common.files import atomic_write, cache_folder, is_file

NEEDED = {
    "images": ("id", "file_name"),
    "annotations": ("image_id",),
    "categories": ("id", "name"),
}
# Outlines fill most of COCO's files and nobody here reads them: they go before they fill the memory. Within a string
# the quotes would be escaped, so no file name can look like one.
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[\[\]\s0-9eE+.,-]*\]')
DECODED = 20_000  # images that are decoded beforehand, a few minutes' worth
EDGE = 1.0  # pixels that a box may reach beyond its image before that is worth a word: rounding
UNREADABLE = "left out {} images that cannot be read"
TOO_LARGE = "left out {} images that are too large to decode, scale them down"
OPEN_ORIENTATION = "used {} images as stored, since their size does not tell whether EXIF's rotation was applied"
TEXT_IDS = "read {} ids that are written as text"
SHOWN = 1000  # images from which on checking them takes long enough for a progress bar
NAMED = 3  # images that a note names
LONGEST_NAME = 200  # characters that it gives of each


class Problems:
    """What is wrong with a data set: kinds of problems, and where each was met."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def add(self, kind: str, place: object) -> None:
        """Note one more case of `kind`, a sentence with {} for their number, at `place`, an image's file name."""
        shown = "".join(letter if letter.isprintable() else "?" for letter in str(place)[:LONGEST_NAME])
        self.places.setdefault(kind, []).append(shown)

    def notes(self) -> tuple[str, ...]:
        """A line for each kind: how many, and the first images."""
        lines = []
        for kind, places in self.places.items():
            names = list(dict.fromkeys(places))
            more = ", …" if len(names) > NAMED else ""
            lines.append(f"{kind.format(len(places))} ({', '.join(names[:NAMED])}{more})")
        return tuple(lines)


def load_coco(json_path: Path, images_folder: Path, limit: int = 0) -> CocoData:
    """Read and check one annotation file.

    Args:
        json_path: COCO instances JSON (`images`, `annotations`, `categories`).
        images_folder: the folder that the `file_name`s are relative to.
        limit: keep the first `limit` images; 0 keeps all.

    Raises:
        InputError: no such file, not JSON, and what `coco_data` raises.
    """
    return coco_data(read_json(json_path), images_folder, str(json_path), limit)


def coco_data(content: dict, folder: Path, source: str, limit: int = 0, upright: bool = False) -> CocoData:
    """The data set that a COCO instances dictionary describes; `notes` says what was repaired or left out.

    Args:
        content: `images`, `annotations`, `categories`, as in a COCO JSON.
        folder: the folder that the `file_name`s are relative to.
        source: what to call it in messages.
        limit: keep the first `limit` images; 0 keeps all.
        upright: whether boxes are on the upright images wherever an image's size does not tell.

    Raises:
        InputError: not COCO, no images, or ids that leave open which is which.
    """
    _check_form(content, source)
    if not folder.is_dir():
        raise InputError(f"{source} needs the images' folder {folder}, which is not there")
    problems = Problems()
    label_of, names = _categories(content["categories"], source, problems)
    listed = content["images"][: limit or None]
    image_files = _image_files(listed, folder, source, problems, upright)
    known = {_number(image["id"], source) for image in content["images"]}
    arrays = _boxes(content["annotations"], image_files, known, label_of, source, problems)
    return CocoData(image_files, tuple(label_of), names, **arrays, source=source, notes=problems.notes())


def without_unreadable(data: CocoData) -> CocoData:
    """The data set without the images that cannot be decoded, or are of another size than annotated.

    Every image is decoded once; the outcome is kept in the cache, by path, length and time of change. Beyond
    DECODED images that would take too long: they are then only found out as they are read.

    Raises:
        InputError: no image is left.
    """
    if len(data) > DECODED:
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


def _faults(data: CocoData) -> list[tuple[str, str]]:
    """What is wrong with each image, "" where nothing is, and what to call the image."""
    digest = hashlib.sha256()
    for p in data.images:
        digest.update(repr((*p.file_state(), p.width, p.height)).encode())
    known = cache_folder("checked", f"{digest.hexdigest()[:24]}.json")
    try:
        return json.loads(known.read_text())
    except (OSError, ValueError):
        pass
    faults = []
    bar = progress_bar(len(data), "checking images", shown=len(data) > SHOWN)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault in pool.map(_fault, data.images):
            faults.append(fault)
            bar.update()
    with atomic_write(known, "w") as file:
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
    """The content of an annotation file, without outlines. Raises InputError: no such file, or not JSON."""
    try:
        text = path.read_bytes()
        text = OUTLINE.sub(b'"segmentation":0', text)
        return json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: it is not text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _check_form(content: object, source: str) -> None:
    for part, keys in NEEDED.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"{source} is not COCO: it has no list {part!r} (give the instances_*.json of a detection set)"
            )
        for bad in (e for e in entries if not isinstance(e, dict) or any(k not in e for k in keys)):
            raise InputError(
                f"{source} is not COCO: an entry of {part!r} lacks one of {', '.join(keys)}: {reprlib.repr(bad)}"
            )
    for part in ("images", "categories"):
        if not content[part]:
            raise InputError(f"{source}: the list {part!r} is empty; there is nothing to work on")


def _number(value: object, source: str, repaired: Callable[[], None] = lambda: None) -> int:
    """An id as a number; `repaired` is called where it was written as text."""
    number = _whole(value)
    if number is None or abs(number) >= 2**63:
        raise InputError(f"{source}: the id {reprlib.repr(value)} is not a whole number of 64 bits; COCO's ids are")
    if isinstance(value, str):
        repaired()
    return number


def _whole(value: object) -> int | None:
    """A whole number, also one written as text or as 1.0; None for everything else."""
    if type(value) is int:  # nearly all of millions
        return value
    if type(value) not in (float, str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value else None


def _categories(categories: list, source: str, problems: Problems) -> tuple[dict[int, int], tuple[str, ...]]:
    """Label of each category id, in the order of the ids, and the names in the order of the labels."""
    rows = sorted(
        (_number(c["id"], source, lambda: problems.add(TEXT_IDS, "categories")), str(c["name"]).strip())
        for c in categories
    )
    ids, names = [number for number, _ in rows], tuple(name for _, name in rows)
    if len(set(ids)) < len(ids):
        raise InputError(f"{source}: two categories share an id; give each its own")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source}: two categories are called {twice!r}; give each a name of its own")
    return {number: label for label, number in enumerate(ids)}, names


def _image_files(images: list, folder: Path, source: str, problems: Problems, upright: bool) -> tuple[ImageFile, ...]:
    kept: dict[int, ImageFile] = {}
    for image in images:
        name = str(image["file_name"])
        number = _number(image["id"], source, lambda n=name: problems.add(TEXT_IDS, n))
        if _leads_out(name):
            problems.add("left out {} images whose file names lead out of their folder", name)
            continue
        path = folder / name
        if number in kept:
            if kept[number].path != path:
                raise InputError(
                    f"{source}: two images share the id {number}: {kept[number].path.name} and {path.name}"
                )
            problems.add("left out {} images that are listed twice", name)
            continue
        if not is_file(path):
            problems.add(f"left out {{}} images that are not in {folder}", name)
            continue
        size = image.get("width"), image.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = _size_of(path, problems, upright)
        if size is not None:
            kept[number] = ImageFile(number, path, *size, upright)
    if not kept:
        reasons = "; ".join(problems.notes())
        raise InputError(f"{source}: none of its {len(images)} images can be used: {reasons}")
    return tuple(kept.values())


def _size_of(path: Path, problems: Problems, upright: bool) -> tuple[int, int] | None:
    """(width, height) of the file itself."""
    sizes = read_sizes(path)
    if sizes is None:
        problems.add(*_fault(ImageFile(0, path, 0, 0)))
        return None
    stored, turned = sizes
    problems.add("took the sizes of {} images from their files", path.name)
    if stored != turned and not upright:
        problems.add(OPEN_ORIENTATION, path.name)
    return turned if upright else stored


def _leads_out(name: str) -> bool:
    """Would this file name, in this or another system's manner, lead out of the folder it is said to be in?"""
    return any(kind(name).is_absolute() or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))


def _boxes(
    annotations: list,
    images: Sequence[ImageFile],
    known: set[int],
    label_of: dict[int, int],
    source: str,
    problems: Problems,
) -> dict[str, np.ndarray]:
    """The arrays of `CocoData`."""
    index_of = {image.id: index for index, image in enumerate(images)}
    ids: set[int | None] = set()
    rows = []
    for annotation in annotations:
        image_id = _number(annotation["image_id"], source, lambda: problems.add(TEXT_IDS, "annotations"))
        index = index_of.get(image_id)
        if index is None:
            if image_id not in known:
                problems.add("left out {} boxes of images that are not listed", f"image {image_id}")
            continue
        image = images[index]
        if "id" in annotation:
            own = _whole(annotation["id"])
            if not own or own in ids:
                problems.add("gave new ids to {} boxes whose id is 0, another's or no number", image.path.name)
            ids.add(own)
        label = label_of.get(_whole(annotation.get("category_id")))
        if label is None:
            problems.add("left out {} boxes of a category that is not listed", image.path.name)
            continue
        box = _box(annotation.get("bbox"), image, problems)
        if box is None:
            continue
        area, crowd = annotation.get("area"), annotation.get("iscrowd")
        crowd = crowd if isinstance(crowd, bool) else _whole(crowd)
        if crowd is None:
            problems.add("took {} boxes without iscrowd for single objects", image.path.name)
        if not _is_number(area) or area <= 0:
            problems.add("took the box's area for {} objects without one", image.path.name)
            area = box[2] * box[3]
        rows.append((index, label, bool(crowd), area, *box))
    table = np.array(rows, np.float64).reshape(-1, 8)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return {
        "boxes": xywh_to_xyxy(table[:, 4:]),
        "file_sides": np.ascontiguousarray(table[:, 6:]),
        "labels": table[:, 1].astype(np.int64),
        "crowd": table[:, 2].astype(bool),
        "areas": np.ascontiguousarray(table[:, 3]),
        "starts": np.searchsorted(table[:, 0], np.arange(len(images) + 1)),
    }


def _box(box: object, image: ImageFile, problems: Problems) -> list[float] | None:
    """The box as it is, or None where nothing can be learned from it."""
    name = image.path.name
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        problems.add("left out {} objects without a box", name)
    elif not all(map(_is_number, box)):
        problems.add("left out {} boxes that are not numbers", name)
    elif box[2] < 0 or box[3] < 0:
        problems.add("left out {} boxes of negative width or height", name)
    elif box[2] == 0 or box[3] == 0:
        problems.add("left out {} boxes without area", name)
    elif box[0] >= image.width or box[1] >= image.height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        problems.add("left out {} boxes that lie outside their image", name)
    else:
        beyond = max(-box[0], -box[1], box[0] + box[2] - image.width, box[1] + box[3] - image.height)
        if beyond > EDGE:
            problems.add("cut {} boxes at the edge of their image, for training", name)
        return box
    return None


def _is_number(value: object) -> bool:
    """A number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
