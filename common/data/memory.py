"""A detection data set in memory; table.py reads it, dataset.py makes samples of it.

COCO numbers its categories with gaps (80 ids between 1 and 90); labels are 0..K-1. Decoded images are not kept, so the
memory in use is that of the annotations alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.console import InputError
from common.images import find_images, open_image
from common.types import ImageMeta, Target

MAX_REASONS = 3  # images that a message about unreadable ones names


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file: its COCO id, its path, and its size in pixels as annotated.

    `upright`: whether to apply an EXIF rotation that leaves the size unchanged, so that the size does not tell.
    """

    id: int
    path: Path
    width: int
    height: int
    upright: bool = False

    @property
    def meta(self) -> ImageMeta:
        return ImageMeta(self.id, self.path, (self.height, self.width))

    def open(self) -> Image.Image:
        """The decoded image, RGB. Raises InputError as `open_image` does."""
        return open_image(self.path, (self.width, self.height), self.upright)

    def file_state(self) -> tuple[str, int, int, bool]:
        """Path, length, time of change and `upright`: a cache of pixels is valid while they are the same."""
        status = self.path.stat()
        return str(self.path.resolve()), status.st_size, status.st_mtime_ns, self.upright


@dataclass(frozen=True)
class DetectionData:
    """Images and the boxes on them, boxes in flat arrays ordered by image.

    Shapes: boxes (A, 4) float64 xywh original pixels, as in the file; labels (A,) int64 in 0..K-1; crowd (A,) bool;
    areas (A,) float64 square pixels (COCO: of the mask; it defines small, medium and large objects); starts (P + 1,)
    int64: the boxes of image i are starts[i] up to starts[i + 1].
    """

    images: tuple[ImageFile, ...]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    starts: np.ndarray
    source: str
    notes: tuple[str, ...] = ()  # what was left out or repaired, a line each

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "DetectionData":
        """The first `count` images in file order; all of them where `count` is 0 or there are no more."""
        return self if count == 0 or count >= len(self) else self.select(np.arange(count))

    def select(self, indices: np.ndarray) -> "DetectionData":
        """The images at `indices` (N,) int64, in that order, with their boxes."""
        counts = np.diff(self.starts)[indices]
        starts = np.concatenate([[0], counts.cumsum()])
        rows = np.repeat(self.starts[indices] - starts[:-1], counts) + np.arange(starts[-1])
        kept = {k: getattr(self, k)[rows] for k in ("boxes", "labels", "crowd", "areas")}
        return replace(self, images=tuple(self.images[i] for i in indices), starts=starts, **kept)

    def image_of_box(self) -> np.ndarray:
        """(A,) int64 index of the image of each box."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def with_objects(self) -> np.ndarray:
        """(N,) int64 indices of the images that have at least one non-crowd box."""
        return np.unique(self.image_of_box()[~self.crowd])

    def class_shares(self) -> Tensor:
        """(K,) float32 shares of the classes in all non-crowd boxes."""
        counts = np.bincount(self.labels[~self.crowd], minlength=len(self.class_names))
        return torch.from_numpy(counts / max(1, counts.sum())).float()

    def fingerprint(self) -> str:
        """Hex digest of image ids, boxes, labels and classes: equal where the ground truth is equal."""
        digest = hashlib.sha256(repr((self.category_ids, self.class_names)).encode())
        for array in (np.array([p.id for p in self.images], np.int64), self.boxes, self.labels, self.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`, pixels."""
        return self.images[index].height, self.images[index].width

    def target(self, index: int) -> Target:
        """The ground truth of image `index`, boxes in *original* pixels."""
        return Target(*self.image_boxes(index), self.images[index].meta)

    def image_boxes(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4) float32 xyxy original pixels, labels (N,) and crowd (N,) of image `index`."""
        part = slice(self.starts[index], self.starts[index + 1])
        boxes = np.hstack([self.boxes[part, :2], self.boxes[part, :2] + self.boxes[part, 2:]])
        return torch.from_numpy(boxes).float(), torch.from_numpy(self.labels[part]), torch.from_numpy(self.crowd[part])


def unlabelled_images(paths: Sequence[Path], class_names: Sequence[str], category_ids: Sequence[int]) -> DetectionData:
    """A data set of image files without any ground truth, numbered 1, 2, … in the order given.

    Images that cannot be read are left out; how many, and why, is printed.

    Args:
        paths: image files, and folders whose images (not those of their subfolders) are taken in name order.

    Raises:
        InputError: no such path, a folder without images, or none of the images can be read.
    """
    files: list[Path] = []
    skipped: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"no such image: {path}")
        inside, others = find_images(path) if path.is_dir() else ([path], [])
        if not inside and not others:
            raise InputError(f"no images in the folder {path}")
        files += inside
        skipped += [f"{file} ({reason})" for file, reason in others]
    images: list[ImageFile] = []
    for path in files:
        try:
            width, height = open_image(path).size
        except InputError as error:
            skipped.append(str(error))
        else:
            images.append(ImageFile(len(images) + 1, path, width, height, upright=True))
    if skipped:
        message = f"left out {len(skipped)} of {len(images) + len(skipped)} images: {'; '.join(skipped[:MAX_REASONS])}"
        message += "; …" if len(skipped) > MAX_REASONS else ""
        if not images:
            raise InputError(message)
        print(message, flush=True)
    return DetectionData(
        tuple(images),
        tuple(category_ids),
        tuple(class_names),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        areas=np.zeros(0),
        starts=np.zeros(len(images) + 1, np.int64),
        source=", ".join(map(str, paths)),
    )
