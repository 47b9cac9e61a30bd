"""Image and target in, image and target out: the letterbox of evaluation and the augmentation of training.

`torchvision.transforms.v2` moves the boxes along with the pixels. Images are (3, H, W) uint8 RGB on the way in and
(3, S, S) uint8 on the way out, S being a multiple of the backbone's patch size.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2

from common.images import FILL, letterboxed
from common.types import Letterbox, Target, mirror_boxes

SMALLEST_SIDE = 2.0  # input pixels; a crop drops boxes of which less than that remains


class LetterboxTransform(nn.Module):
    """Scale to fit a square of `size` pixels, in its upper-left corner, and pad; the target gets the `Letterbox`."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        canvas, letterbox = letterboxed(image, self.size)
        return canvas, letterbox_target(target, letterbox)


class MirrorTransform(LetterboxTransform):
    """The letterbox, and every second image mirrored, as in training on cached features."""

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        image, target = super().forward(image, target)
        return (image.flip(-1), mirror_target(target, self.size)) if mirror_drawn() else (image, target)


def letterbox_target(target: Target, letterbox: Letterbox) -> Target:
    """A target in original pixels -> the same in input pixels, its boxes clipped to the image."""
    boxes = clip_boxes_to_image(target.boxes, letterbox.original)
    return replace(target, boxes=letterbox.to_input(boxes), letterbox=letterbox)


def mirror_target(target: Target, size: int) -> Target:
    """The target of the input mirrored left to right, with its padding."""
    return replace(target, boxes=mirror_boxes(target.boxes, size), letterbox=None)


def mirror_drawn() -> bool:
    """True or False with equal chance, from torch's random numbers."""
    return bool(torch.rand(()) < 0.5)


class TrainTransform(nn.Module):
    """Flip, scale jitter with a fixed-size crop, colour jitter (the large-scale jitter of ViTDet, arXiv 2203.16527).

    A crop smaller than the input of evaluation shows a smaller part of the image at the same scale, in less time.

    Args:
        size: side of the square input of evaluation, pixels.
        crop_size: side of the square output, pixels; by default `size`.
        scale: the image's longer side becomes `size` times a factor from this range.
    """

    def __init__(self, size: int, crop_size: int | None = None, scale: tuple[float, float] = (0.75, 1.33)):
        super().__init__()
        crop_size = crop_size or size
        self.move = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                _ScaleJitter((size, size), scale_range=scale, antialias=True),
                v2.RandomCrop((crop_size, crop_size), pad_if_needed=True, fill=FILL),
                v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=SMALLEST_SIDE, labels_getter=_labels_and_crowd),
            ]
        )

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        size = (image.shape[-2], image.shape[-1])
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(clip_boxes_to_image(target.boxes, size), format="XYXY", canvas_size=size),
            "labels": target.labels,
            "crowd": target.crowd,
        }
        sample = self.move(sample)
        boxes = sample["boxes"].as_subclass(Tensor)
        moved = replace(target, boxes=boxes, labels=sample["labels"], crowd=sample["crowd"], letterbox=None)
        return sample["image"].as_subclass(Tensor), moved


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, but an elongated image keeps a side of at least one pixel, as in `Letterbox.fit`."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(1, height), max(1, width))}


def _labels_and_crowd(sample: dict) -> tuple[Tensor, Tensor]:
    return sample["labels"], sample["crowd"]
