"""The types that travel between the rooms, and the conventions, stated once.

- Boxes are xyxy pixels: x to the right, y down, (x1, y1) the upper-left corner. COCO's xywh exists only where COCO
  files are read and written. Targets and raw predictions live in *input* pixels, those of the letterboxed square that
  the model sees; only `model/postprocess.py` maps back to *original* pixels, by the letterbox of each `Target`.
- Labels are contiguous, 0..K-1, K being the number of categories of the data set. The map to category ids is stored in
  the checkpoint and applied once, in `evaluate/detections.py`.
- Images are RGB in 0..1; the backbone normalises them.

Letters in shapes: B images, N boxes of one image, L locations of the head, K classes, S input size in pixels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchvision.ops import box_convert


@dataclass(frozen=True)
class Letterbox:
    """How an image was fitted into the square model input: scaled, placed in the upper-left corner, padded.

    The two axes have their own scale, because the scaled size is rounded to whole pixels.
    """

    original: tuple[int, int]  # (height, width) of the image, pixels
    resized: tuple[int, int]  # (height, width) of the part of the input that it covers, pixels

    @classmethod
    def fit(cls, original: tuple[int, int], size: int) -> "Letterbox":
        """The largest scaling of an `original` (height, width) image that fits a square of `size` pixels."""
        scale = size / max(original)
        height, width = (max(1, round(side * scale)) for side in original)
        return cls(original, (height, width))

    def _scale(self, boxes: Tensor) -> Tensor:
        (height, width), (new_height, new_width) = self.original, self.resized
        return boxes.new_tensor([new_width / width, new_height / height]).repeat(2)

    def to_input(self, boxes: Tensor) -> Tensor:
        """(..., 4) xyxy original pixels -> (..., 4) xyxy input pixels."""
        return boxes * self._scale(boxes)

    def to_original(self, boxes: Tensor) -> Tensor:
        """(..., 4) xyxy input pixels -> (..., 4) xyxy original pixels."""
        return boxes / self._scale(boxes)


@dataclass(frozen=True)
class Target:
    """The ground truth of one image, and its letterbox.

    Shapes: boxes (N, 4) float32 xyxy input pixels; labels (N,) int64; crowd (N,) bool. A crowd box covers many
    objects at once and counts neither as an object nor as background. `letterbox` is None on augmented images, whose
    predictions are not mapped back to original pixels.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    image_id: int
    letterbox: Letterbox | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Target":
        moved = {k: getattr(self, k).to(device, non_blocking=non_blocking) for k in ("boxes", "labels", "crowd")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S) float32 RGB in 0..1, or their cached features (B, h, w, blocks, C), and their B targets."""

    images: Tensor
    targets: list[Target]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        targets = [target.to(device, non_blocking) for target in self.targets]
        return Batch(self.images.to(device, non_blocking=non_blocking), targets)


@dataclass(frozen=True)
class SecondOutput:
    """What the second look predicts for P boxes of each image: E examples (in training), then N proposals.

    Shapes: locations (B, N) int64, those of the dense head whose boxes are the proposals; proposals (B, P, 4) float32
    xyxy input pixels, the boxes that were looked at; boxes (B, P, 4) the better ones; object_logits (B, P), of the IoU
    that a box reaches with an object; class_logits (B, P, K).
    """

    locations: Tensor
    proposals: Tensor
    boxes: Tensor
    object_logits: Tensor
    class_logits: Tensor


@dataclass(frozen=True)
class RawOutput:
    """What a head predicts at each of its L locations, the same in training and in evaluation.

    Several locations may share a row of class logits, which shortens a training step of the head by a fifth; read them
    by `scores` and `class_logits_at`.

    `second` is what a second look predicts, where the detector has one.

    Shapes: object_logits (B, L); class_logits (B, R, K), those of location l in row class_rows[l]; class_rows (L,)
    int64; boxes (B, L, 4) float32 xyxy input pixels with positive width and height; points (L, 2) the locations (x, y)
    in input pixels; strides (L,) their spacing in input pixels.
    """

    object_logits: Tensor
    class_logits: Tensor
    class_rows: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    second: SecondOutput | None = None

    def scores(self) -> Tensor:
        """(B, L, K) in 0..1: sigmoid(object) x softmax(class)."""
        return self.object_logits.sigmoid()[..., None] * self.class_logits.softmax(-1)[:, self.class_rows]

    def class_logits_at(self, images: Tensor, locations: Tensor) -> Tensor:
        """(M, K) class logits of M locations, given the indices (M,) of their images and of themselves (M,)."""
        return self.class_logits[images, self.class_rows[locations]]


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
        rows = zip(
            box_convert(self.boxes, "xyxy", "xywh").tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
        )
        return [
            {"image_id": image_id, "category_id": self.category_ids[label], "bbox": box, "score": score}
            for box, score, label in rows
        ]


@dataclass(frozen=True)
class Predictions:
    """The detections of a model on every image of a data set, in the model's own labels, and its description."""

    detections: list[Detections]
    class_names: tuple[str, ...]
    cost: dict | None = None  # the fields of `evaluate.detect.Cost`
    conditions: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # how detections were read, and what was left out


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """(..., 4) xyxy boxes in an image of `width` pixels -> the same boxes in its mirror image."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([width - right, top, width - left, bottom], dim=-1)
