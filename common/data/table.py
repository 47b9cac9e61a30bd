"""What readers find in files, and its check: `Table` -> `DetectionData`.

What makes training meaningless raises InputError. What else is wrong is left out or kept, and counted in the notes of
the data set; `--strict` refuses it too.
"""

import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.console import InputError, first_few, to_one_line
from common.data.memory import DetectionData, ImageFile
from common.images import ImageFault, read_header
from common.types import convert_boxes

LAYOUTS = ("xywh", "xyxy", "cxcywh")  # left, top, width, height; left, top, right, bottom; centre, width, height
# Of right boxes nearly all lie inside their images, and of 20 some reach far into one: 20 boxes of COCO never less than
# .759 of it. Boxes in another layout or unit do not.
INSIDE, REACH, ENOUGH = 0.9, 0.7, 20
MISFITS = 3  # boxes that must lie outside to say so
NOTHING_PX = 2.0  # where all boxes end in it, they are no pixels
ROUNDING_PX = 1.0  # by which a box may reach beyond its image
NEAR_PX, NEAR = 0.5, 1e-3  # or of the image's longer side: a box as near to another of its class repeats it
SPACING = re.compile(r"[\s_\u00ad\u200b-\u200f\u2060\ufeff-]+")  # and marks of no width
NOTHING = float("nan")  # in place of a class that is not listed, or of a number that is none
OPEN_ORIENTATION = "used {} images as stored, since their size does not tell whether EXIF's rotation was applied"
NAME_LENGTH = 200  # characters of a file's name in a note


class Faults(dict[str, list[str]]):
    """Sentences with {} for the number of cases, and the place of each case, mostly an image's name."""

    def add(self, sentence: str, place: object = "") -> None:
        self.setdefault(sentence, []).append(str(place))

    def notes(self) -> tuple[str, ...]:
        """A line for each sentence, with the number and the first places."""
        lines = []
        for sentence, places in self.items():
            named = [to_one_line(place, NAME_LENGTH) for place in dict.fromkeys(places) if place]
            some = f" ({first_few(named, NAME_LENGTH)})" if named else ""
            lines.append(sentence.replace("{}", str(len(places)), 1) + some)
        return tuple(lines)


@dataclass
class Table:
    """Images and objects as a reader found them.

    `images` holds (id, file name relative to `folder`, width, height), sizes in the frame of the boxes; `objects` eight
    numbers a row: place of the image, category id, the four of the box, 1 for a crowd, area (0: width x height).
    """

    source: str
    folder: Path
    classes: dict[int, str]  # by category id
    layout: str  # of the boxes in this form, one of LAYOUTS; "" where the form does not say. cxcywh: fractions of sides
    split: str = ""  # as the data set calls it
    whole: bool = False  # there is no validation part: a share of these images is held out
    upright: bool = False  # see `ImageFile`
    own_ids: bool = True  # see `DetectionData`
    given: str = ""  # layout by --box-format, which is trusted
    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    objects: array = field(default_factory=lambda: array("d"))
    places: dict[int, int] = field(default_factory=dict)  # of the image of each id
    faults: Faults = field(default_factory=Faults)

    def add_image(self, number: int, name: str, size: tuple[int, int] = (0, 0)) -> None:
        """Add an image, of the (width, height) that its header gives where none is given, unless it is unreadable."""
        if min(size) <= 0:
            try:
                header = read_header(self.folder / name)
            except ImageFault as fault:
                return self.faults.add(fault.sentence, name)
            size = header.upright if self.upright else header.stored
            if header.stored != header.upright and not self.upright:
                self.faults.add(OPEN_ORIENTATION, name)
        self.places[number] = len(self.images)
        return self.images.append((number, name, *size))

    def add(self, image: int, category: float, box: object, crowd: bool = False, area: object = 0) -> None:
        """Add an object on the image of this id, which is added before. What is no list of four numbers is no box."""
        numbers = map(as_float, box) if isinstance(box, list) and len(box) == 4 else [NOTHING] * 4
        self.objects.extend((self.places.get(image, -1), category, *numbers, crowd, as_float(area)))

    def check(self) -> DetectionData:
        """The data set without what cannot be used.

        Raises InputError: no image or class, ids or names that are not unique, or boxes in another form.
        """
        classes = {key: unicodedata.normalize("NFC", name.strip()) for key, name in sorted(self.classes.items())}
        forms = [SPACING.sub("", unicodedata.normalize("NFKC", name)) for name in classes.values()]
        letters = [name.casefold() if len(name) > 1 else name for name in forms]
        for name, same in zip(classes.values(), letters, strict=True):
            if letters.count(same) > 1:
                self.faults.add("{} classes differ from another in case or spacing alone, as if misspelled", name)
        self._refuse_repeated("two classes are called", classes.values())
        self._refuse_repeated("two images have the id", (image[0] for image in self.images))
        self._refuse_repeated("an image is listed twice:", (os.path.normpath(image[1]) for image in self.images))
        if not classes:
            raise InputError(f"{self.source}: it lists no classes")
        if not self.images:
            reasons = "; ".join(self.faults.notes()) or "none is listed or found: export with images"
            raise InputError(f"{self.source}: no image can be used: {reasons}")
        images = tuple(ImageFile(i, self.folder / name, w, h, self.upright) for i, name, w, h in self.images)
        rows, keys = np.array(self.objects).reshape(-1, 8), np.array(list(classes))
        image, label = rows[:, 0].astype(np.int64), np.searchsorted(keys, rows[:, 1]).clip(max=len(keys) - 1)
        label[keys[label] != rows[:, 1]] = -1
        shown = np.unique(rows[~np.isnan(rows[:, 1]), 1])
        low, high = shown.min(initial=keys[0]), shown.max(initial=keys[-1])
        if (high > keys[-1] and keys[0] not in shown) or (low < keys[0] and keys[-1] not in shown):
            found = f"the boxes have the classes {shown[0]:.0f} to {shown[-1]:.0f}, the list {keys[0]} to {keys[-1]}"
            raise InputError(f"{self.source}: {found}: number both alike")
        sizes = np.array([(file.width, file.height) for file in images], np.float64)[image]
        with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are inf or NaN, which are left out
            boxes = rows[:, 2:6] * np.tile(sizes, 2) if self.layout == "cxcywh" else rows[:, 2:6]
            boxes = self._as_xywh(boxes, sizes, (image >= 0) & (label >= 0))
            used = self._usable(image, label, boxes, sizes)
        order = np.nonzero(used)[0][np.argsort(image[used], kind="stable")]
        image, label, boxes = image[order], label[order], boxes[order]
        crowd, areas = rows[order, 6] != 0, rows[order, 7]
        areas = np.where(areas > 0, areas, boxes[:, 2:].prod(1))
        starts = np.searchsorted(image, np.arange(len(images) + 1))
        self._count_repeated(image[~crowd], label[~crowd], boxes[~crowd], sizes[order][~crowd])
        ids, names, notes = tuple(classes), tuple(classes.values()), self.faults.notes()
        return DetectionData(images, ids, names, boxes, label, crowd, areas, starts, self.source, notes, self.own_ids)

    def _refuse_repeated(self, what: str, values: Iterable[int | str]) -> None:
        for value, count in Counter(values).most_common(1):
            if count > 1:
                raise InputError(f"{self.source}: {what} {to_one_line(value, NAME_LENGTH)}: list each once")

    def _as_xywh(self, boxes: np.ndarray, sizes: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(A, 4) boxes as xywh. Raises InputError where they do not fit their images as documented or given."""
        layout, count = self.given or self.layout, int(known.sum())
        corners = {name: convert_boxes(boxes, name, "xyxy") for name in LAYOUTS}
        fit = {name: int((_inside(corners[name], sizes) & known).sum()) for name in LAYOUTS}
        if not layout:
            counts = ", ".join(f"--box-format {name} ({fit[name]} fit their images)" for name in LAYOUTS)
            raise InputError(f"{self.source}: say how its {count} boxes are written, after a look at some: {counts}")
        ends = corners[layout][known, 2:]
        reach, end = (float(np.nanmax(values, initial=0)) for values in (ends / sizes[known], ends))
        problem, advice = "", f" (--box-format {layout}: right as they are)"
        if not self.given and count - fit[layout] >= max(MISFITS, count * (1 - INSIDE)):
            best = max(fit, key=fit.__getitem__)
            mend = f"--box-format {best} reads {fit[best]}" if fit[best] >= INSIDE * count else "nor as another layout"
            problem = f"{fit[layout]} of {count} boxes lie inside their images, read as {layout}; {mend}"
        elif count and (end <= NOTHING_PX or (not self.given and reach < REACH and count >= ENOUGH)):
            what = f"all {count} boxes end within {reach:.2g} of their images' sides"
            problem = f"{what}, like fractions, per cent or pixels of smaller images; write them in pixels"
            advice *= end > NOTHING_PX
        if problem:
            raise InputError(f"{self.source}: {problem}{advice}")
        return convert_boxes(boxes, layout, "xywh")

    def _usable(self, image: np.ndarray, label: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(A,) bool: boxes that are used; the others, and those that reach beyond their image, are counted."""
        low, high = np.hsplit(convert_boxes(boxes, "xywh", "xyxy"), 2)
        used = np.ones(len(boxes), bool)
        for sentence, bad in {
            "left out {} boxes of images that are not used": image < 0,
            "left out {} boxes of a class that is not listed": label < 0,
            "left out {} boxes that are not four finite numbers": ~np.isfinite(boxes).all(1),
            "left out {} boxes without area": (high <= low).any(1),
            "left out {} boxes that lie outside their image": (low >= sizes).any(1) | (high <= 0).any(1),
            "left out {} boxes that end within 2 pixels of a corner, like fractions": (high <= NOTHING_PX).all(1),
        }.items():
            self._count(sentence, image[used & bad])
            used &= ~bad
        beyond = np.maximum(-low, high - sizes).max(1, initial=0) > ROUNDING_PX
        self._count("clipped {} boxes at the edge of their image, for training", image[used & beyond])
        return used

    def _count_repeated(self, image: np.ndarray, label: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> None:
        order = np.lexsort((boxes[:, 0], label, image))
        rows = np.column_stack([image, label, boxes])[order]
        slack = np.maximum(NEAR_PX, sizes[order].max(1, initial=0) * NEAR)[:, None] * ([0, 0] + [1] * 4)
        repeated = np.zeros(len(rows), bool)
        for step in (1, 2, 3):  # further boxes are hardly between two equal ones
            repeated[step:] |= (np.abs(rows[step:] - rows[:-step]) <= slack[step:]).all(1)
        sentence = "kept {} boxes that repeat one of their class on their image, each counts as an object: remove them"
        self._count(sentence, image[order][repeated])

    def _count(self, sentence: str, images: np.ndarray) -> None:
        for index in images.tolist():
            self.faults.add(sentence, Path(self.images[index][1]).name if index >= 0 else "")


def as_float(value: object) -> float:
    """A number, NaN for all that is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else NOTHING


def _inside(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) bool: boxes (A, 4) xyxy that have an area and lie inside images of these sizes (A, 2)."""
    low, high = np.hsplit(corners, 2)
    return np.all((low < high) & (low >= -ROUNDING_PX) & (high <= sizes + ROUNDING_PX), axis=1)
