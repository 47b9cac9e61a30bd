"""Which images of a data set can be used, found by decoding each once; and which objects are large enough."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from common.console import InputError, progress_bar
from common.data.memory import DetectionData, ImageFile
from common.data.table import OPEN_ORIENTATION, Faults
from common.data.transforms import SMALLEST_SIDE
from common.files import cache_folder
from common.images import ImageFault, read_header
from common.types import convert_boxes

log = logging.getLogger(__name__)
CHUNK = 1000  # images, after which the outcomes are kept; fewer need no progress bar
PAGES = "used the first page or frame of {} images that have several"


class Outcome(NamedTuple):
    """What decoding an image has shown, in sentences for the notes, with {} for the number of such images."""

    fault: str  # why it cannot be used, "" if it can
    notes: list[str]


def usable_images(data: DetectionData, indices: np.ndarray, faults: Faults) -> list[int]:
    """Those of the images at `indices` (N,) that can be used; what is wrong or doubtful is added to the faults."""
    outcomes = dict(zip(indices.tolist(), check_images(data.select(indices)), strict=True))
    for index, outcome in outcomes.items():
        for sentence in filter(None, (outcome.fault, *outcome.notes)):
            faults.add(sentence, data.images[index].path.name)
    return [index for index, outcome in outcomes.items() if not outcome.fault]


def check_images(data: DetectionData) -> list[Outcome]:
    """Decode every image of a data set, but those whose outcome the cache has and whose file is the same."""
    place = os.path.realpath(data.source) if os.path.exists(data.source) else data.source  # noqa: PTH110 (of any length)
    path = cache_folder("checked", f"{sha256(repr((place, PIL.__version__)).encode()).hexdigest()[:24]}.jsonl")
    known, states = _read(path), [image.state() for image in data.images]
    missing = [index for index, state in enumerate(states) if state not in known]
    bar = progress_bar(len(missing), "checking images", shown=len(missing) > CHUNK)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            found = dict(zip((states[i] for i in part), pool.map(_decode, (data.images[i] for i in part)), strict=True))
            _append(path, {state: outcome for state, (outcome, may_pass) in found.items() if not may_pass})
            known |= {state: outcome for state, (outcome, _) in found.items()}
            bar.update(len(part))
    return [known[state] for state in states]


def _decode(image: ImageFile) -> tuple[Outcome, bool]:
    """The outcome, and whether it may pass: no permission, an error of the disk."""
    try:
        image.open()
        header = read_header(image.path)
    except ImageFault as fault:
        return Outcome(fault.sentence, []), getattr(fault.__cause__, "errno", None) is not None
    is_open = header.orientation != 1 and header.stored == header.upright == (image.width, image.height)
    return Outcome("", [OPEN_ORIENTATION] * (is_open and not image.upright) + [PAGES] * header.has_pages), False


def _read(path: Path) -> dict[str, Outcome]:
    known = {}
    with suppress(OSError):
        for line in path.read_text("utf-8").splitlines():
            with suppress(ValueError, TypeError):  # half a line of a killed run
                state, *outcome = json.loads(line)
                known[state] = Outcome(*outcome)
    return known


def _append(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Keep the outcomes, where the cache can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps((state, *outcome))}\n" for state, outcome in outcomes.items())
    except OSError as error:
        log.warning(f"cannot keep the check of the images in {path} ({error.strerror}): they will be checked again")


def check_object_sizes(data: DetectionData, image_size: int, patch: int) -> None:
    """Say how many objects of the training images are too small to be learned at this size of the input.

    Args:
        data: the training images.
        image_size: side of the square input, pixels.
        patch: of the backbone, whose multiple a larger size must be.

    Raises:
        InputError: all of them are.
    """
    objects = ~data.crowd
    sizes = np.array([(image.width, image.height) for image in data.images])[data.image_of_box()[objects]]
    low, high = np.hsplit(convert_boxes(data.boxes[objects], "xywh", "xyxy"), 2)
    sides = (np.minimum(high, sizes) - np.maximum(low, 0)).min(1, initial=np.inf)
    needed = SMALLEST_SIDE * sizes.max(1, initial=0) / sides  # size of the input, pixels
    if lost := int((needed > image_size).sum()):
        what = f"{lost} of {len(sides)} training objects are smaller than {SMALLEST_SIDE:.0f} pixels"
        mend = f"--image-size {int(np.ceil(needed.max() / patch)) * patch} would keep them"
        message = f"{data.source}: {what} at --image-size {image_size} and cannot be learned: {mend}"
        if lost == len(sides):
            raise InputError(message)
        log.warning(message)
