"""Which images of a data set can be used, found by decoding each once; and which objects are large enough."""

import json
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256, shake_128
from typing import NamedTuple

import numpy as np

from common.console import InputError, progress_bar
from common.data.copies import SKETCH_BYTES, make_sketch
from common.data.memory import DetectionData, ImageFile
from common.data.readers import read_json_lines
from common.data.table import OPEN_ORIENTATION
from common.data.transforms import SMALLEST_SIDE
from common.files import cache_folder
from common.images import ImageFault, read_header
from common.types import InputSize, convert_boxes

log = logging.getLogger(__name__)
CHUNK = 1000  # images, after which the outcomes are kept; fewer need no progress bar
PAGES = "used the first page or frame of {} images that have several"


class Check(NamedTuple):
    """What decoding an image says: why it cannot be used, "" if it can; what is doubtful; its `make_sketch`, base64."""

    fault: str
    doubts: list[str] = []  # noqa: RUF012
    sketch: str = ""


def check_images(images: Sequence[ImageFile], source: str) -> list[Check]:
    """What decoding each image says, once for all runs where it can be used and its file stays the same.

    The others are decoded again: their fault may pass, such as one of a permission or a disk.
    """
    place = os.path.realpath(source) if os.path.exists(source) else source  # noqa: PTH110 (of any length)
    path = cache_folder("checked", f"{sha256(repr(place).encode()).hexdigest()[:24]}.jsonl")
    known = {state: Check(*check) for state, *check in read_json_lines(path)}
    states = [image.state() for image in images]
    missing = [index for index, state in enumerate(states) if state not in known]
    bar = progress_bar(len(missing), "checking images", shown=len(missing) > CHUNK)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            checks = pool.map(_decode, (images[index] for index in part))
            found = {states[index]: check for index, check in zip(part, checks, strict=True)}
            known |= found
            bar.update(len(part))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"\n{json.dumps((state, *c))}" for state, c in found.items() if not c.fault)
            except OSError as error:
                log.warning(f"cannot keep the images' check in {path} ({error.strerror}): they will be checked again")
    return [known[state] for state in states]


def sketches_of(data: DetectionData) -> np.ndarray:
    """(P, 1096) uint8: the `make_sketch` of each image, noise in place of one that cannot be used."""
    pairs = zip(data.images, check_images(data.images, data.source), strict=True)
    found = [b64decode(c.sketch) or shake_128(os.fsencode(image.path)).digest(SKETCH_BYTES) for image, c in pairs]
    return np.frombuffer(b"".join(found), np.uint8).reshape(len(found), SKETCH_BYTES)


def _decode(image: ImageFile) -> Check:
    try:
        sketch = make_sketch(image.open())
        header = read_header(image.path)
    except ImageFault as fault:
        return Check(fault.sentence)
    is_open = header.orientation != 1 and header.stored == header.upright == (image.width, image.height)
    doubts = [OPEN_ORIENTATION] * (is_open and not image.upright) + [PAGES] * header.has_pages
    return Check("", doubts, b64encode(sketch).decode())


def check_object_sizes(data: DetectionData, size: InputSize) -> None:
    """Say how many objects of the training images are too small to be learned at this size of the input.

    Raises InputError where all of them are.
    """
    objects = ~data.crowd
    sizes = np.array([(image.width, image.height) for image in data.images])[data.image_of_box()[objects]]
    low, high = np.hsplit(convert_boxes(data.boxes[objects], "xywh", "xyxy"), 2)
    sides = (np.minimum(high, sizes) - np.maximum(low, 0)).min(1, initial=np.inf)
    needed = SMALLEST_SIDE * sizes.max(1, initial=0) / sides  # size of the input, pixels
    if lost := int((needed > size.side).sum()):
        what = f"{lost} of {len(sides)} training objects are smaller than {SMALLEST_SIDE:.0f} pixels"
        mend = f"--image-size {int(np.ceil(needed.max() / size.patch)) * size.patch} would keep them"
        message = f"{data.source}: {what} at --image-size {size.side} and cannot be learned: {mend}"
        if lost == len(sides):
            raise InputError(message)
        log.warning(message)
