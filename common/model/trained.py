"""A trained detector in a Python program: images in any form in, `Detections` out.

from common.model import load_detector

detector = load_detector("improved_dino2_detector.pth")
detections = detector.predict("street.jpg")
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.console import InputError
from common.images import letterboxed, read_pixels
from common.model.checkpoint import Checkpoint, load_checkpoint
from common.model.postprocess import postprocess, predictions
from common.runtime import default_device, fastest_precision
from common.types import Detections, Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

AnyImage = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class TrainedDetector:
    """A checkpoint on a device, in the precision that the device computes in fastest."""

    checkpoint: Checkpoint
    device: torch.device
    precision: str  # fp32, bf16 or fp16

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels 0..K-1."""
        return self.checkpoint.class_names

    @property
    def min_score(self) -> float:
        """The lowest score of the detections that `predict` returns by default, see `Checkpoint.min_score`."""
        return self.checkpoint.min_score

    def predict(
        self, images: AnyImage | Sequence[AnyImage], min_score: float | None = None, batch_size: int = 8
    ) -> Detections | list[Detections]:
        """Detect the objects in one image, or in each of a list of images.

        Args:
            images: a path, an http(s) URL, a PIL image, an array (H, W, 3) uint8 RGB, a tensor (3, H, W) RGB, uint8 or
                in 0..1; or a list of them, of any sizes.
            min_score: detections with a lower score are left out; None = `self.min_score`.
            batch_size: images at once.

        Returns:
            `Detections`, boxes in the pixels of the upright image; for a list of images a list, in its order.

        Raises:
            InputError: an image that cannot be read, with its number in the list.
        """
        if isinstance(images, str) or not isinstance(images, Sequence):
            return self._detect([read_pixels(images)], 0, min_score)[0]
        detections: list[Detections] = []
        for first in range(0, len(images), batch_size):
            batch = [_read(image, first + i) for i, image in enumerate(images[first : first + batch_size])]
            detections += self._detect(batch, first, min_score)
        return detections

    @torch.inference_mode()
    def _detect(self, images: list[Tensor], first: int, min_score: float | None) -> list[Detections]:
        """The detections in a batch of images (3, H, W) uint8, numbered from `first`."""
        detector, checkpoint = self.checkpoint.detector, self.checkpoint
        inputs, letterboxes = zip(*(letterboxed(image, detector.config.image_size) for image in images), strict=True)
        nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
        targets = [Target(*nothing, first + i, letterbox) for i, letterbox in enumerate(letterboxes)]
        batch = (torch.stack(inputs).float() / 255).to(self.device)
        with torch.autocast(self.device.type, DTYPES.get(self.precision), enabled=self.precision in DTYPES):
            out = detector(batch)
        least = self.min_score if min_score is None else min_score
        names, ids = checkpoint.class_names, checkpoint.category_ids
        found = postprocess(*predictions(out), targets)
        return [replace(d.at_least(least), class_names=names, category_ids=ids) for d in found]


def _read(image: AnyImage, number: int) -> Tensor:
    try:
        return read_pixels(image)
    except InputError as error:
        raise InputError(f"image {number} of the list: {error}") from error


def load_detector(path: str | Path, device: str | torch.device | None = None) -> TrainedDetector:
    """Read a trained detector, without any network.

    Args:
        path: a `.pth` that a training script wrote.
        device: "cpu", "cuda", "cuda:1", "mps", …; None = the GPU if there is one.

    Raises:
        InputError: the file is missing, damaged or no checkpoint of this project, or there is no such device.
    """
    checkpoint = load_checkpoint(path)
    try:
        chosen = default_device() if device is None else torch.device(device)
        checkpoint.detector.to(chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise InputError(f"no device {device} on this machine: {str(error).splitlines()[0]}") from error
    return TrainedDetector(checkpoint, chosen, fastest_precision(chosen))
