"""The types that travel between the rooms, and the conventions, stated once.

- Boxes in data sets and tables of detections are xywh in *original* pixels, as in COCO's files. Targets and predictions
  are xyxy in *input* pixels, those of the scaled image that the model sees; only `model/postprocess.py` maps back to
  original pixels, by the scale of each `ImageMeta`.
- Labels are contiguous, 0..K-1, K being the number of categories of the data set. The map to category ids is stored in
  the checkpoint and applied once, in `evaluate/detections.py`.
- Images are RGB, uint8 until the backbone scales and normalises them.

Letters in shapes: B images of H rows and W columns, h and w of patches, N objects of one image at most, L locations of
the head, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


class ImageMeta(NamedTuple):
    """One image on its way from the file to its detections."""

    image_id: int
    path: Path | None  # None: not read from a file
    size: tuple[int, int]  # (height, width) of the upright original, pixels
    scale: tuple[float, float] | None = None  # (x, y) input pixels per original pixel; None: not scaled, or augmented


LEAST_PATCHES = 4  # of a side: a pyramid halves the map twice, and OpenVINO halves no single row


class InputSize(NamedTuple):
    """To what size a detector scales images: the longer side in pixels, and the patch, of which both are multiples."""

    side: int
    patch: int

    def fit(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[float, float]]:
        """The input's (height, width) for an image of `size` (height, width), and the (x, y) scales between them.

        The scales differ, as without padding each side becomes the nearest number of patches, at least `LEAST_PATCHES`.
        """
        most = self.side // self.patch
        least = min(LEAST_PATCHES, most)
        height, width = (max(least, round(length * most / max(size))) * self.patch for length in size)
        return (height, width), (width / size[1], height / size[0])


def group_by_shape(inputs: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the inputs of each shape, which can be stacked; shapes in the order in which they occur."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(inputs):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())


def convert_boxes(boxes: np.ndarray, layout: str, to: str) -> np.ndarray:
    """(N, 4) boxes in one of torchvision's layouts, xywh, xyxy or cxcywh -> the same boxes in another."""
    return box_convert(torch.from_numpy(boxes), layout, to).numpy()


@dataclass(frozen=True)
class Target:
    """The ground truth of one image.

    Shapes: boxes (N, 4) float32 xyxy; labels (N,) int64; crowd (N,) bool. A crowd box covers many objects at once and
    counts neither as an object nor as background.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    meta: ImageMeta


class Targets(NamedTuple):
    """The ground truth of a batch, padded to its largest number of objects N and of crowds C.

    Shapes: boxes (B, N, 4) float32 xyxy input pixels, zeros where padded; labels (B, N) int64, -1 where padded;
    crowds (B, C, 4) the crowd boxes, zeros where padded. N is at least 1, C mostly 0.
    """

    boxes: Tensor
    labels: Tensor
    crowds: Tensor

    @classmethod
    def pad(cls, targets: Sequence[Target]) -> "Targets":
        boxes = pad_sequence([target.boxes[~target.crowd] for target in targets], batch_first=True)
        labels = pad_sequence([target.labels[~target.crowd] for target in targets], batch_first=True, padding_value=-1)
        if labels.shape[1] == 0:
            boxes, labels = pad(boxes, (0, 0, 0, 1)), pad(labels, (0, 1), value=-1)
        return cls(boxes, labels, pad_sequence([target.boxes[target.crowd] for target in targets], batch_first=True))

    @property
    def objects(self) -> Tensor:
        """(B, N) bool: objects, not padding."""
        return self.labels >= 0

    def counts(self) -> Tensor:
        """(2,) float32: the objects, and the images that have some."""
        return torch.stack([self.objects.sum(), self.objects.any(1).sum()]).float()


class Batch(NamedTuple):
    """Inputs, their targets, and what maps detections back to the B images; torch and accelerate move its tensors."""

    inputs: Tensor  # images (B, 3, H, W) uint8, or the cached features of their patches (B, h, w, C)
    targets: Targets
    meta: list[ImageMeta]


@dataclass(frozen=True)
class RoIOutput:
    """What the second look predicts for P boxes of each image: E examples (in training), then N proposals.

    Shapes: locations (B, N) int64, those of the dense head whose boxes are the proposals; proposals (B, P, 4) float32
    xyxy input pixels, the boxes that were looked at; boxes (B, P, 4) the better ones; objectness_logits (B, P), of the
    IoU that a box reaches with an object; class_logits (B, P, K).
    """

    locations: Tensor
    proposals: Tensor
    boxes: Tensor
    objectness_logits: Tensor
    class_logits: Tensor


@dataclass(frozen=True)
class RawOutput:
    """What a head predicts at each of its L locations, of which several may share a row of class logits.

    Shapes: objectness_logits (B, L); class_logits (B, R, K), those of location l in row class_rows[l]; class_rows
    (L,) int64; boxes (B, L, 4) float32 xyxy input pixels of positive width and height; points (L, 2) the locations
    (x, y) in input pixels; strides (L,) their spacing in input pixels; levels (V,) the strides that occur, rising.
    """

    objectness_logits: Tensor
    class_logits: Tensor
    class_rows: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    levels: Tensor
    second: RoIOutput | None = None

    def scores(self) -> Tensor:
        """(B, L, K) in 0..1: sigmoid(object) x softmax(class)."""
        return self.objectness_logits.sigmoid()[..., None] * self.class_logits.softmax(-1)[:, self.class_rows]


@dataclass(frozen=True)
class Detections:
    """The objects detected in one image, best score first, on the CPU.

    Shapes: boxes (N, 4) float32 xyxy *original* pixels, clipped to the image; scores (N,) float32 in 0..1;
    labels (N,) int64, indices into `class_names` and `category_ids`, which only `load_detector`'s detections have.
    """

    image_id: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def at_least(self, score: float) -> "Detections":
        """The objects with that score or a higher one."""
        keep = self.scores >= score
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def to_coco(self, image_id: int) -> list[dict]:
        """The objects in COCO's results format: a dictionary each, with the category's id and the box as xywh."""
        columns = box_convert(self.boxes, "xyxy", "xywh"), self.scores, self.labels
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            {"image_id": int(image_id), "category_id": self.category_ids[label], "bbox": box, "score": score}
            for box, score, label in rows
        ]
