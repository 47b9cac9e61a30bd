"""Image and target in, image and target out: the scaling of evaluation and the augmentation of training.

`torchvision.transforms.v2` moves the boxes along with the pixels. Images are (3, H, W) uint8 RGB, on the way out with
sides that are multiples of the backbone's patch size.
"""

from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2

from common.cli import flag
from common.console import InputError
from common.images import scaled
from common.types import InputSize, Target

FILL = (124, 116, 104)  # around images smaller than a crop: ImageNet's mean, zero after the backbone's normalisation
COLOR_JITTER = 0.3  # change of brightness, contrast and saturation; that of the hue would take twice their time
SMALLEST_SIDE = 2.0  # input pixels; a crop drops boxes of which less than that remains


@dataclass(frozen=True)
class AugmentationFlags:
    """Augmentation of the training images."""

    no_mirror: bool = flag(False, "no mirror images: for text, traffic signs and other things with a left and a right")
    scales: tuple[float, ...] = flag(
        (0.75, 1.33), "range of the random scale of crops; 1 1 = all at the scale of the input", at_least=0.01
    )

    def check_augmentation(self) -> None:
        """Raises InputError unless the scales are two numbers in rising order."""
        if len(self.scales) != 2 or self.scales[0] > self.scales[1]:
            raise InputError(f"--scales {' '.join(map(str, self.scales))}: give the lowest and the highest")


class ScaleTransform(nn.Module):
    """Scale to the size of a detector's input."""

    def __init__(self, size: InputSize):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        return scaled(image, self.size)[0], scaled_target(target, self.size)


def scaled_target(target: Target, size: InputSize) -> Target:
    """A target in original pixels -> the same in input pixels, clipped to the image."""
    scale = size.fit(target.meta.size)[1]
    boxes = clip_boxes_to_image(target.boxes, target.meta.size)
    boxes = boxes * boxes.new_tensor(scale).repeat(2)
    return replace(target, boxes=boxes, meta=target.meta._replace(scale=scale))


def mirror_target(target: Target, width: int) -> Target:
    """The target of an input of that width, mirrored left to right."""
    x1, y1, x2, y2 = target.boxes.unbind(-1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    return replace(target, boxes=boxes, meta=target.meta._replace(scale=None))


def mirror_drawn() -> bool:
    """True or False with equal chance, from torch's random numbers."""
    return bool(torch.rand(()) < 0.5)


DEFAULT_AUGMENTATION = AugmentationFlags()


class TrainTransform(nn.Module):
    """Flip, scale jitter with a fixed-size crop, colour jitter (the large-scale jitter of ViTDet, arXiv 2203.16527).

    The image's longer side becomes `size` pixels, as in evaluation, times a factor from the flags' `scales`. The output
    is a square of `crop_size` pixels, by default `size`; a smaller one shows a part at the same scale, in less time.
    """

    def __init__(self, size: int, crop_size: int | None = None, flags: AugmentationFlags = DEFAULT_AUGMENTATION):
        super().__init__()
        crop_size, strength = crop_size or size, COLOR_JITTER
        self.move = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.0 if flags.no_mirror else 0.5),
                _ScaleJitter((size, size), scale_range=flags.scales, antialias=True),
                v2.RandomCrop((crop_size, crop_size), pad_if_needed=True, fill=FILL),
                v2.ColorJitter(strength, strength, strength),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=SMALLEST_SIDE, labels_getter=itemgetter("labels", "crowd")),
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
        image, boxes = (sample[name].as_subclass(Tensor) for name in ("image", "boxes"))
        return image, replace(target, boxes=boxes, labels=sample["labels"], crowd=sample["crowd"])


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, but an elongated image keeps a side of at least one pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(1, height), max(1, width))}
