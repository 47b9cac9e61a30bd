"""The types that travel between the parts, and the conventions, stated once.

- Boxes are xyxy float32 pixels. Targets and raw predictions live in *input* pixels (the letterboxed square that the
  model sees); only `postprocess.py` maps back to *original* pixels, by the letterbox that travels on each `Target`.
- Labels are contiguous, 0..K-1, K being the data set's own number of categories. The way back to category ids is
  stored in the checkpoint and taken once, in `metrics.py`.
- Images are plain RGB in 0..1; normalisation is the backbone's own business.

Letters in shapes: B images, N boxes of one image, L locations of the head, K classes, S input size in pixels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Letterbox:
    """How one image was fitted into the square model input: scaled, put in the upper-left corner, padded.

    The two axes carry their own scale, because the scaled size is rounded to whole pixels.
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
    """What is known of one image.

    Shapes: boxes (N, 4) float32 xyxy input pixels; labels (N,) int64; crowd (N,) bool. A crowd box covers many
    objects at once: it is neither an object to find nor background. `letterbox` is None on augmented images,
    whose predictions have no way back to the original.
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
class RawOutput:
    """What a head says at each of its L locations, the same in training and in evaluation.

    Shapes: object_logits (B, L), is there an object here?; class_logits (B, R, K), which one, if so, read by location l
    in row class_rows[l], as locations may share a row; class_rows (L,) int64; boxes (B, L, 4) float32 xyxy input pixels
    with positive width and height; points (L, 2) the locations (x, y) in input pixels; strides (L,) their spacing in
    input pixels.
    """

    object_logits: Tensor
    class_logits: Tensor
    class_rows: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best score first, on the CPU.

    Shapes: boxes (N, 4) float32 xyxy *original* pixels, clipped to the image; scores (N,) float32 in 0..1;
    labels (N,) int64.
    """

    image_id: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Found:
    """What a model found on every image of a data set, in its own labels, and what is known of the model."""

    detections: list[Detections]
    class_names: tuple[str, ...]
    cost: dict | None = None  # as `cost.Cost` names its parts
    conditions: dict = field(default_factory=dict)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) COCO boxes (left, top, width, height) -> (..., 4) xyxy."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def clip_to(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip (..., 4) xyxy boxes to an image of `size` = (height, width) pixels."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """(..., 4) xyxy boxes in an image of that width, pixels -> the same in its mirror image."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([width - right, top, width - left, bottom], dim=-1)
