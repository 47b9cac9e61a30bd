"""A trained detector in a Python program: images in any form in, `Detections` out.

from common.model import load_detector

detector = load_detector("improved_dino2_detector.pth")
detections = detector.predict("street.jpg")
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from PIL import Image
from torch import Tensor

from common.console import InputError
from common.files import PROGRAM
from common.hub import FILES
from common.images import read_pixels, scaled
from common.model.checkpoint import Checkpoint, load_checkpoint, save_folder
from common.model.postprocess import detections_of, fuse_predictions, select_detections
from common.runtime import choose_precision, default_device
from common.types import Detections, ImageMeta, InputSize, group_by_shape

CARD = Path(__file__).with_name("card.md").read_text()  # a template for jinja2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

AnyImage = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class TrainedDetector(ABC):
    """What a checkpoint and an exported detector have in common."""

    class_names: tuple[str, ...]  # of the labels 0..K-1
    category_ids: tuple[int, ...]  # of the data set that it was trained on
    input_size: InputSize  # of images as it sees them
    min_score: float  # the operating point, see `Checkpoint.min_score`
    device: torch.device
    precision: str  # fp32, bf16, fp16 or int8

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """Their number, None where it is not known."""

    @abstractmethod
    def conditions(self) -> dict:
        """How the detector was trained and what runs it, for records of evaluations."""

    @abstractmethod
    def run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) uint8 RGB of its `input_size` -> boxes (B, D, 4) in input pixels, scores and labels (B, D).

        As `select_detections` returns them.
        """

    def predict(
        self, images: AnyImage | Sequence[AnyImage], min_score: float | None = None, batch_size: int = 8
    ) -> Detections | list[Detections]:
        """Detect the objects in one image, or in each of a list of images, `batch_size` at once.

        Args:
            images: a path, an http(s) URL, a file or its content, a PIL image, an array (H, W, 3) uint8 RGB, a tensor
                (3, H, W) RGB, uint8 or in 0..1; or a list of them, of any sizes.
            min_score: detections with a lower score are left out; None = `self.min_score`.

        Returns:
            `Detections`, boxes in the pixels of the upright image; for a list of images a list, in its order.

        Raises:
            InputError: an image that cannot be read, with its number in the list.
        """
        if batch_size < 1 or not (min_score is None or 0 <= min_score <= 1):
            raise InputError("batch_size must be at least 1, min_score from 0 to 1")
        if isinstance(images, str | bytes | bytearray) or not isinstance(images, Sequence):
            return self._detect([read_pixels(images)], 0, min_score)[0]
        detections: list[Detections] = []
        for first in range(0, len(images), batch_size):
            batch = []
            for number, image in enumerate(images[first : first + batch_size], first):
                try:
                    batch.append(read_pixels(image))  # type: ignore[arg-type]  # bytes are one image
                except InputError as error:
                    raise InputError(f"image {number} of the list: {error}") from error
            detections += self._detect(batch, first, min_score)
        return detections

    def _detect(self, images: list[Tensor], first: int, min_score: float | None) -> list[Detections]:
        """The detections in a batch of images (3, H, W) uint8, numbered from `first`."""
        inputs, scales = zip(*(scaled(image, self.input_size) for image in images), strict=True)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        meta = [ImageMeta(first + i, None, *known) for i, known in enumerate(zip(sizes, scales, strict=True))]
        least, found = self.min_score if min_score is None else min_score, dict[int, Detections]()
        for group in group_by_shape(inputs):
            outputs = self.run(torch.stack([inputs[index] for index in group]))
            found |= zip(group, detections_of(*outputs, [meta[index] for index in group]), strict=True)
        kept = (found[index].at_least(least) for index in range(len(images)))
        return [replace(d, class_names=self.class_names, category_ids=self.category_ids) for d in kept]


@dataclass(frozen=True)
class CheckpointDetector(
    TrainedDetector, ModelHubMixin, library_name=PROGRAM, pipeline_tag="object-detection", model_card_template=CARD
):
    """A checkpoint on a device. `save_pretrained`, `push_to_hub` and `from_pretrained` are huggingface_hub's."""

    checkpoint: Checkpoint
    path: str  # of its file, by which it is pickled

    _hub_mixin_config = {"library_name": PROGRAM}  # noqa: RUF012  (of the mixin; `save_folder` writes the settings)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.checkpoint.detector.parameters())

    def __reduce__(self) -> tuple:
        return load_on_device, (self.path, self.device, self.precision)

    def conditions(self) -> dict:
        return self.checkpoint.conditions()

    @torch.inference_mode()
    def run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = DTYPES.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            out = self.checkpoint.detector(images.to(self.device))
        return select_detections(*fuse_predictions(out, self.checkpoint.detector.config.fusion))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_folder(save_directory, self.checkpoint)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, class_names=None, category_ids=None, **options: Any):
        """`options` are those of `load_detector` and of `snapshot_download`."""
        chosen = {name: options.pop(name) for name in ("device", "precision") if name in options}
        if not Path(model_id).is_dir():
            model_id = snapshot_download(model_id, allow_patterns=FILES, **options)
        return load_on_device(model_id, **chosen)

    def generate_model_card(self) -> ModelCard:
        """The card, with the numbers of the validation in training."""
        conditions, metrics = self.conditions(), self.checkpoint.metrics
        numbers = {key: f"{value:.3f}" for key, value in metrics.items() if isinstance(value, float)}
        card = super().generate_model_card(detector=self, conditions=conditions, numbers=numbers)
        if (backbone := str(conditions.get("backbone"))).startswith("facebook/"):  # others may be local folders
            card.data["base_model"] = backbone
        return card


def load_on_device(
    path: str | Path, device: str | torch.device | None = None, precision: str = "auto"
) -> CheckpointDetector:
    """Read a checkpoint and put it on a device, see `load_detector`."""
    checkpoint = load_checkpoint(path)
    try:
        chosen = default_device() if device is None else torch.device(device)
        checkpoint.detector.to(chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise InputError(f"no device {device} on this machine: {str(error).splitlines()[0]}") from error
    classes = checkpoint.class_names, checkpoint.category_ids
    settings = checkpoint.detector.input_size, checkpoint.min_score
    return CheckpointDetector(*classes, *settings, chosen, choose_precision(precision), checkpoint, str(path))
