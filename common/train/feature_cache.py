"""Features of a frozen backbone on disk: each image passes it once, later epochs read memory maps.

The images are split into shards of `SHARD`. The file of a shard holds (images, views, rows, columns, channels) features
of 16 bits, bfloat16 where the run computes in it, so that nothing is lost, else float16: view 0 is the letterboxed
image, view 1 the same mirrored. Its name is a digest of all that the features depend on, and it appears when it is
complete: an interrupted build continues, several processes divide the shards among them, and a run on more images
reuses those of an earlier one.
"""

import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from common.console import InputError, progress_bar
from common.data.dataset import SampleDataset, make_eval_loader
from common.data.memory import DetectionData
from common.data.transforms import letterbox_target, mirror_drawn, mirror_target
from common.files import atomic_write, cache_folder, remove_leftovers
from common.model.detector import Detector
from common.runtime import precision_name
from common.types import Target

FORMAT_VERSION = 4
SHARD = 64  # images: what an interruption can cost
ITEM_BYTES = 2  # of float16 and bfloat16
SPARE_BYTES = 1 << 30  # of the disk, that a build leaves free
ABANDONED_S = 3600.0  # after which an incomplete file is one of a killed process
CPU_BATCH = 4  # images at once while building on a CPU: a tenth faster than 16


@dataclass(frozen=True)
class Shard:
    """The file for the features of some consecutive images; it need not exist yet."""

    path: Path
    images: range  # their indices
    shape: tuple[int, ...]  # images, views, rows, columns, channels
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the complete file."""
        return math.prod(self.shape) * ITEM_BYTES

    def open(self) -> Tensor:
        """A memory map of `shape`; what is written to it never reaches the file.

        Raises:
            InputError: the file is missing or has another size.
        """
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            raise InputError(f"the feature cache {self.path} is missing or damaged; delete it and start again")
        return torch.from_file(str(self.path), False, math.prod(self.shape), dtype=self.dtype).view(self.shape)


def feature_shape(detector: Detector, views: int) -> tuple[int, ...]:
    """(views, rows, columns, channels) of the features of one image, those of all blocks together."""
    side = detector.config.image_size // detector.backbone.patch_size
    return views, side, side, len(detector.config.blocks) * detector.backbone.channels


def feature_gigabytes(detector: Detector, images: int, views: int) -> float:
    """The size of the cache of so many images."""
    return images * math.prod(feature_shape(detector, views)) * ITEM_BYTES / 1e9


def feature_shards(detector: Detector, data: DetectionData, views: int, precision: str) -> list[Shard]:
    """The files for `views` of the images of `data`, 1 the image, 2 also its mirror image.

    A name is a digest of the backbone's architecture and weights, the blocks, the input size, the `precision` of the
    forward pass, the views, and the path, length and time of change of each image in the shard.
    """
    config, dtype = detector.config, torch.bfloat16 if precision == "bf16" else torch.float16
    settings = FORMAT_VERSION, sorted(config.backbone.items()), config.blocks, config.image_size, views, precision
    common = hashlib.sha256(repr(settings).encode())
    for name, weight in detector.backbone.state_dict().items():
        common.update(name.encode())
        common.update(weight.detach().cpu().contiguous().numpy().tobytes())
    shards = []
    for first in range(0, len(data), SHARD):
        images, digest = range(first, min(first + SHARD, len(data))), common.copy()
        digest.update(repr([data.images[index].state() for index in images]).encode())
        path = cache_folder("features", f"{digest.hexdigest()[:24]}.features")
        shards.append(Shard(path, images, (len(images), *feature_shape(detector, views)), dtype))
    return shards


def cached_features(
    detector: Detector, data: DetectionData, *, views: int, batch_size: int, workers: int, accelerator: Accelerator
) -> list[Tensor]:
    """The features of the images of `data`, a memory map a shard; all processes together build missing shards.

    Args:
        detector: on the accelerator's device; its backbone runs in the accelerator's precision.
        data: the images.
        views: 1 the image, 2 also its mirror image.
        batch_size: images at once while building, on a CPU fewer.
        workers: processes that decode images while building.

    Raises:
        InputError: the disk has no room for them, or can't be written to.
    """
    shards = feature_shards(detector, data, views, precision_name(accelerator))
    missing = [shard for shard in shards if not shard.path.is_file()]
    accelerator.wait_for_everyone()  # all have listed the missing shards before the first process writes one
    if missing and accelerator.is_main_process:
        _prepare_folder(shards, missing)
    batch_size = min(batch_size, CPU_BATCH) if accelerator.device.type == "cpu" else batch_size
    share = missing[accelerator.process_index :: accelerator.num_processes]
    with (
        torch.random.fork_rng(),  # training draws the same random numbers whether the cache existed or not
        progress_bar(
            sum(len(s.images) for s in share), "caching", shown=bool(share) and accelerator.is_main_process
        ) as bar,
    ):
        for shard in share:
            part = data.select(np.array(shard.images))
            loader = make_eval_loader(part, detector.config.image_size, batch_size, workers)
            with atomic_write(shard.path) as file:
                for batch in loader:
                    features = _features(detector, batch.inputs.to(accelerator.device), views, accelerator)
                    file.write(features.to(shard.dtype).cpu().view(torch.int16).numpy())
                    bar.update(len(features))
    accelerator.wait_for_everyone()
    return [shard.open() for shard in shards]


@torch.inference_mode()
def _features(detector: Detector, pixels: Tensor, views: int, accelerator: Accelerator) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, views, rows, columns, channels)."""
    backbone = detector.backbone.eval()
    with accelerator.autocast():
        return torch.stack([backbone(view) for view in (pixels, pixels.flip(-1))[:views]], dim=1)


def _prepare_folder(shards: list[Shard], missing: list[Shard]) -> None:
    """Remove abandoned files, check the free space, and print the size of the cache."""
    folder = missing[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the feature cache {folder}: {error.strerror}") from error
    remove_leftovers(folder, ABANDONED_S)
    free, needed = shutil.disk_usage(folder).free, sum(shard.size for shard in missing) + SPARE_BYTES
    if needed > free:
        raise InputError(
            f"the feature cache needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
            "make room, move it with DETECTION_CACHE, or train with --feature-cache 0"
        )
    images, size = sum(len(shard.images) for shard in shards), sum(shard.size for shard in shards)
    existing = images - sum(len(shard.images) for shard in missing)
    reused = f", those of {existing} exist already" if existing else ""
    print(f"features of {images} images: {size / 1e9:.1f} GB in {folder}{reused}", flush=True)


class CachedDataset(SampleDataset):
    """`DetectionDataset` with the features of an image in place of its pixels.

    Args:
        data: the images and boxes.
        features: of the images, as `cached_features` returns them.
        image_size: side of the square input, pixels.
        mirror: draw mirrored views, for training; else the letterboxed images alone.
        seed: of the draw.
    """

    def __init__(
        self, data: DetectionData, features: list[Tensor], image_size: int, *, mirror: bool = False, seed: int = 0
    ):
        super().__init__(data, seed)
        self.features, self.image_size, self.mirror = features, image_size, mirror

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Features (h, w, C) and the image's `Target`."""
        target = letterbox_target(self.data.target(index), self.image_size)
        with self.randomness(index):
            mirrored = self.mirror and mirror_drawn()
        view = self.features[index // SHARD][index % SHARD, int(mirrored)]
        return view, mirror_target(target, self.image_size) if mirrored else target
