"""What readers find in files, in columns, and its check: `Table` -> `DetectionData`.

What makes training meaningless raises InputError. What else is wrong is left out or kept, and counted in the notes of
the data set; `--strict` refuses it too.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from common.console import InputError, first_few, to_one_line
from common.data.memory import DetectionData, ImageFile

LAYOUTS = ("xywh", "xyxy", "cxcywh")  # left, top, width, height; left, top, right, bottom; centre, width, height
# Of right boxes nearly all lie inside their images, and of 20 some reach far into one; of boxes in another layout or
# unit not. No 20 boxes of COCO have less than .999 inside or reach less than .759.
INSIDE, REACH, ENOUGH = 0.9, 0.7, 20
HALF, MISFITS = 0.5, 3  # of fewer boxes half must lie inside, and three outside are needed to say so
NOTHING_PX = 2.0  # where all boxes end in it, they are no pixels
ROUNDING_PX = 1.0  # by which a box may reach beyond its image
NEAR = 1e-3  # of the image's longer side: a box that differs by less from another of its class repeats it
TEST_NOTE = "used the test split for validation, as there is no other"
OPEN_ORIENTATION = "used {} images as stored, since their size does not tell whether EXIF's rotation was applied"
NAME_LENGTH = 200  # characters of a file's name in a note


class Faults(dict[str, list[str]]):
    """Sentences with {} for the number of cases, and the place of each case, mostly an image's name."""

    def add(self, sentence: str, place: object = "") -> None:
        self.setdefault(sentence, []).append(str(place))

    def notes(self) -> tuple[str, ...]:
        """A line for each sentence, with the number and the first places."""
        return tuple(_note(sentence, places) for sentence, places in self.items())

    def refuse(self, source: str) -> NoReturn:
        """Raise InputError where these faults have left no image."""
        raise InputError(f"{source}: no image can be used: {'; '.join(self.notes()) or 'none is listed'}")


@dataclass
class Table:
    """Images and objects as a reader found them.

    `images` holds (id, file name relative to `folder`, width, height), sizes in the frame of the boxes; `objects` eight
    numbers a row: place of the image, category id, the four of the box, 1 for a crowd, area (0: width x height).
    """

    source: str
    folder: Path
    classes: dict[int, str]  # by category id
    layout: str  # of the boxes in this form, one of LAYOUTS
    given: str = ""  # layout by --box-format, which is trusted
    split: str = ""  # as the data set calls it
    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    objects: array = field(default_factory=lambda: array("d"))
    places: dict[int, int] = field(default_factory=dict)  # of the image of each id
    normalised: bool = False  # boxes are fractions of their image's sides
    upright: bool = False  # see `ImageFile`
    own_ids: bool = True  # see `DetectionData`
    faults: Faults = field(default_factory=Faults)

    def add_image(self, number: int, name: str, size: tuple[int, int]) -> None:
        self.places[number] = len(self.images)
        self.images.append((number, name, *size))

    def add(self, image: int, *numbers: float) -> None:
        """Add an object on the image of this id, which is added before."""
        self.objects.append(self.places.get(image, -1))
        self.objects.extend(numbers)

    def check(self) -> DetectionData:
        """The data set without what cannot be used.

        Raises:
            InputError: no image or class, ids or names that are not unique, or boxes in another form.
        """
        if self.split.casefold() == "test":
            self.faults.add(TEST_NOTE)
        classes = self._checked_classes()
        images, sizes = self._checked_images()
        rows = np.array(self.objects).reshape(-1, 8)
        image, label = rows[:, 0].astype(np.int64), positions(np.array(list(classes)), rows[:, 1])
        known = (image >= 0) & (label >= 0)
        with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are inf or NaN, which are left out
            boxes = self._as_xywh(rows[:, 2:6], sizes[image].astype(np.float64), known)
            kept = self._usable(image, label, boxes, sizes[image])
        kept = kept[np.argsort(image[kept], kind="stable")]
        crowd, areas = rows[kept, 6] != 0, rows[kept, 7]
        self._count_repeated(image[kept][~crowd], label[kept][~crowd], boxes[kept][~crowd], sizes)
        return DetectionData(
            images,
            tuple(classes),
            tuple(classes.values()),
            boxes[kept],
            label[kept],
            crowd,
            np.where((areas > 0) & (not self.normalised), areas, boxes[kept, 2:].prod(1)),
            np.searchsorted(image[kept], np.arange(len(images) + 1)),
            self.source,
            self.faults.notes(),
            self.own_ids,
        )

    def _checked_classes(self) -> dict[int, str]:
        classes = {key: unicodedata.normalize("NFC", name.strip()) for key, name in sorted(self.classes.items())}
        self._refuse_repeated("two classes are called", classes.values())
        if not classes:
            raise InputError(f"{self.source}: it lists no classes")
        alike: dict[str, list[str]] = {}
        for name in classes.values():
            alike.setdefault(re.sub(r"[\s_-]+", "", name).casefold() if len(name) > 1 else name, []).append(name)
        for names in alike.values():
            if len(names) > 1:
                self.faults.add(
                    "{} groups of classes differ in case or spaces alone, as if misspelled", " and ".join(names)
                )
        return classes

    def _checked_images(self) -> tuple[tuple[ImageFile, ...], np.ndarray]:
        """The images, and their sizes (P, 2) int64."""
        self._refuse_repeated("two images have the id", (image[0] for image in self.images))
        self._refuse_repeated("an image is listed twice:", (image[1] for image in self.images))
        if not self.images:
            self.faults.refuse(self.source)
        images = (ImageFile(i, self.folder / name, w, h, self.upright) for i, name, w, h in self.images)
        return tuple(images), np.array([image[2:] for image in self.images], np.int64)

    def _refuse_repeated(self, what: str, values: Iterable[int | str]) -> None:
        for value, count in Counter(values).most_common(1):
            if count > 1:
                raise InputError(f"{self.source}: {what} {to_one_line(value, NAME_LENGTH)}: list each once")

    def _as_xywh(self, boxes: np.ndarray, sizes: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(A, 4) boxes as xywh in pixels.

        Raises:
            InputError: too many lie outside their images, or all near a corner, and --box-format is not given.
        """
        layout, count = self.given or self.layout, int(known.sum())
        boxes = boxes * np.tile(sizes, 2) if self.normalised else boxes
        xywh = to_xywh(boxes, layout)
        fit = {name: int((inside(to_xywh(boxes, name), sizes) & known).sum()) for name in LAYOUTS}
        ends = (xywh[:, :2] + xywh[:, 2:])[known]
        reach, end = (float(np.nanmax(values, initial=0)) for values in (ends / sizes[known], ends))
        misfits = count - fit[layout]
        if not self.given and misfits >= MISFITS and misfits > count * (1 - (INSIDE if count >= ENOUGH else HALF)):
            best = max(fit, key=fit.__getitem__)
            advice = (
                f"--box-format {best} reads {fit[best]}" if fit[best] >= INSIDE * count else "nor as another layout"
            )
            raise InputError(
                f"{self.source}: {fit[layout]} of {count} boxes lie inside their images, read as {layout}; {advice} "
                f"(--box-format {layout}: right as they are)"
            )
        if count and (end <= NOTHING_PX or (not self.given and reach < REACH and count >= ENOUGH)):
            mend = "write them in pixels" + f" (--box-format {layout}: right as they are)" * (end > NOTHING_PX)
            raise InputError(
                f"{self.source}: all {count} boxes end within {reach:.2g} of their images' sides, like fractions, per "
                f"cent or pixels of smaller images; {mend}"
            )
        return xywh

    def _usable(self, image: np.ndarray, label: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Rows of the boxes that are used; the others, and those that reach beyond their image, are counted."""
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        used = np.ones(len(boxes), bool)
        for sentence, bad in {
            "left out {} boxes of images that are not used": image < 0,
            "left out {} boxes of a class that is not listed": label < 0,
            "left out {} boxes that are not four finite numbers": ~np.isfinite(boxes).all(1),
            "left out {} boxes without area": (high <= low).any(1),
            "left out {} boxes that lie outside their image": (low >= sizes).any(1) | (high <= 0).any(1),
        }.items():
            self._count(sentence, image[used & bad])
            used &= ~bad
        beyond = np.maximum(-low, high - sizes).max(1, initial=0) > ROUNDING_PX
        self._count("clipped {} boxes at the edge of their image, for training", image[used & beyond])
        return np.nonzero(used)[0]

    def _count_repeated(self, image: np.ndarray, label: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> None:
        order = np.lexsort((boxes[:, 0], label, image))
        image, columns = image[order], np.column_stack([image, label, boxes])[order]
        slack = np.column_stack([np.zeros((len(image), 2)), np.tile(NEAR * sizes[image].max(1, keepdims=True), 4)])
        repeated = np.zeros(len(image), bool)
        for step in (1, 2, 3):  # further boxes are hardly between two equal ones
            repeated[step:] |= (np.abs(columns[step:] - columns[:-step]) <= slack[step:]).all(1)
        sentence = "kept {} boxes that repeat one of their class on their image, each counts as an object: remove them"
        self._count(sentence, image[repeated])

    def _count(self, sentence: str, images: np.ndarray) -> None:
        for index in images.tolist():
            self.faults.add(sentence, self.images[index][1] if index >= 0 else "")


def _note(sentence: str, places: list[str]) -> str:
    names = first_few([to_one_line(place, NAME_LENGTH) for place in dict.fromkeys(places) if place], NAME_LENGTH)
    return sentence.replace("{}", str(len(places)), 1) + f" ({names})" * bool(names)


def positions(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(M,) index in `keys` (N,) of each value (M,), -1 where there is none."""
    order = np.argsort(keys)
    place = order[np.searchsorted(keys, values, sorter=order).clip(0, len(keys) - 1)]
    return np.where(keys[place] == values, place, -1)


def to_xywh(boxes: np.ndarray, layout: str) -> np.ndarray:
    """(A, 4) boxes of one of LAYOUTS -> xywh."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if layout == "xyxy":
        return np.hstack([first, second - first])
    return np.hstack([first - second / 2, second]) if layout == "cxcywh" else boxes


def inside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) bool: boxes xywh that have an area and lie inside images of these sizes (A, 2)."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return ((low < high) & (low >= -ROUNDING_PX) & (high <= sizes + ROUNDING_PX)).all(1)
