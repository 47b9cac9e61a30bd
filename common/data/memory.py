"""A detection data set in memory: what every reader ends in, and all else reads. Decoded images are not kept."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.images import DECODING, open_image
from common.types import ImageMeta, Target, convert_boxes


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: its id, its file, and its size in the frame that its boxes are in.

    `upright`: whether the boxes are on the image turned upright by its EXIF orientation, where the size does not tell.
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
        """The decoded image, RGB, in the frame of its boxes. Raises InputError as `open_image` does."""
        return open_image(self.path, (self.width, self.height), self.upright)

    def state(self) -> str:
        """What changes where the pixels that `open` returns do: a cache of them is valid while it is the same."""
        try:
            status = self.path.stat()
        except OSError:  # which opening it tells
            return str(self.path)
        content = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        return repr((str(self.path.resolve()), *content, self.width, self.height, self.upright, DECODING))


@dataclass(frozen=True)
class DetectionData:
    """P images and the A boxes on them, in flat arrays ordered by image."""

    images: tuple[ImageFile, ...]
    category_ids: tuple[int, ...]  # K, rising, with gaps in COCO
    class_names: tuple[str, ...]
    boxes: np.ndarray  # (A, 4) float64 xywh original pixels, as in the file
    labels: np.ndarray  # (A,) int64 in 0..K-1
    crowd: np.ndarray  # (A,) bool
    areas: np.ndarray  # (A,) float64 square pixels, in COCO of the mask: they define small, medium and large objects
    starts: np.ndarray  # (P + 1,) int64: the boxes of image i are starts[i] up to starts[i + 1]
    source: str
    notes: tuple[str, ...] = ()  # what was left out or is doubtful, a line each
    own_ids: bool = True  # False: the ids of the images are positions, which change where images are added

    def __len__(self) -> int:
        return len(self.images)

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

    def class_counts(self) -> np.ndarray:
        """(K,) int64 non-crowd boxes of each class."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.class_names))

    def class_shares(self) -> Tensor:
        """(K,) float32 shares of the classes in the non-crowd boxes of an image, in the mean over images."""
        image = self.image_of_box()[~self.crowd]
        weights = 1 / np.bincount(image)[image] if len(image) else None
        shares = np.bincount(self.labels[~self.crowd], weights, len(self.class_names))
        return torch.from_numpy(shares / max(1, shares.sum())).float()

    def fingerprint(self) -> str:
        """Hex digest of file names, ids, boxes, labels and classes: equal where the ground truth is equal."""
        images = [(image.id, image.path.name) for image in self.images]
        digest = hashlib.sha256(repr((self.category_ids, self.class_names, images)).encode())
        for array in (self.boxes, self.labels, self.crowd, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def target(self, index: int) -> Target:
        """The ground truth of image `index`, boxes in *original* pixels."""
        part = slice(self.starts[index], self.starts[index + 1])
        boxes = torch.from_numpy(convert_boxes(self.boxes[part], "xywh", "xyxy")).float()
        labels, crowd = torch.from_numpy(self.labels[part]), torch.from_numpy(self.crowd[part])
        return Target(boxes, labels, crowd, self.images[index].meta)
