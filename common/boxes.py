"""Box formats and the letterbox map. IoU, NMS and GIoU come from `torchvision.ops`.

Boxes are xyxy float32 pixels everywhere inside the project: x to the right, y down, (x1, y1) the upper-left corner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Letterbox:
    """How one picture was fitted into the square model input: scaled, put in the upper-left corner, padded.

    The two axes carry their own scale, because the scaled size is rounded to whole pixels.
    """

    original: tuple[int, int]  # (height, width) of the picture, pixels
    resized: tuple[int, int]  # (height, width) of the part of the input that it covers, pixels

    @classmethod
    def fit(cls, original: tuple[int, int], size: int) -> "Letterbox":
        """The largest scaling of an `original` (height, width) picture that fits a square of `size` pixels."""
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


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) COCO boxes (left, top, width, height) -> (..., 4) xyxy."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def clip_to(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip (..., 4) xyxy boxes to a picture of `size` = (height, width) pixels."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """(..., 4) xyxy boxes in a picture of that width, pixels -> the same in its mirror image."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([width - right, top, width - left, bottom], dim=-1)
