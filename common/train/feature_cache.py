"""Features of a frozen backbone on disk: each image passes it once, later epochs read memory maps.

Each `SHARD` images have a file, with features (views, h, w, channels) of image after image, in 16 bits, bfloat16 where
the run computes in it. View 0 is the scaled image, view 1 its mirror image. A file appears when it is complete, and its
name is a digest of all that its features depend on: an interrupted build continues, several processes share the work,
and a run on more images reuses the files of an earlier one.
"""

import hashlib
import itertools
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers
from accelerate import Accelerator
from torch import Tensor

from common.console import InputError, progress_bar
from common.data.dataset import SampleDataset, make_eval_loader
from common.data.memory import DetectionData
from common.data.transforms import mirror_drawn, mirror_target, scaled_target
from common.files import atomic_write, cache_folder, remove_leftovers
from common.model.detector import Detector
from common.runtime import precision_name
from common.types import InputSize, Target

log = logging.getLogger(__name__)
FORMAT_VERSION = 5
SHARD = 64  # images: what an interruption can cost
ITEM_BYTES = 2  # of float16 and bfloat16
SPARE_BYTES = 1 << 30  # of the disk, that a build leaves free
ABANDONED_S = 3600.0  # after which an incomplete file is one of a killed process
CPU_BATCH = 4  # images at once while building on a CPU: a tenth faster than 16


def feature_shapes(detector: Detector, data: DetectionData, views: int) -> list[tuple[int, ...]]:
    """(views, rows, columns, channels of all blocks) of each image."""
    size, channels = detector.input_size, len(detector.config.blocks) * detector.backbone.channels
    sides = (size.fit(image.meta.size)[0] for image in data.images)
    return [(views, height // size.patch, width // size.patch, channels) for height, width in sides]


def feature_gigabytes(detector: Detector, data: DetectionData, views: int) -> float:
    """The size of the cache of these images."""
    return sum(map(math.prod, feature_shapes(detector, data, views))) * ITEM_BYTES / 1e9


def shard_paths(detector: Detector, data: DetectionData, views: int, precision: str) -> list[Path]:
    """The files for `views` of the images of `data`; they need not exist yet."""
    config = detector.config
    versions = torch.__version__, torchvision.__version__, transformers.__version__
    settings = sorted(config.backbone.items()), config.blocks, config.image_size, views, precision
    common = hashlib.sha256(repr((FORMAT_VERSION, versions, *settings)).encode())
    for name, weight in detector.backbone.state_dict().items():
        common.update(name.encode())
        common.update(weight.detach().cpu().contiguous().numpy().tobytes())
    states = [image.state() for image in data.images]
    keys = [(common.hexdigest(), states[first : first + SHARD]) for first in range(0, len(data), SHARD)]
    return [cache_folder("features", f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.features") for key in keys]


@torch.no_grad()
def cached_features(
    detector: Detector, data: DetectionData, *, views: int, batch_size: int, workers: int, accelerator: Accelerator
) -> list[Tensor]:
    """The features (views, h, w, C) of each image of `data`, memory maps; all processes together build missing shards.

    The detector is on the accelerator's device; of 2 `views` the second is the mirror image. Raises InputError where
    the disk has no room, or a file is damaged.
    """
    precision, backbone = precision_name(accelerator), detector.backbone.eval()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    shards = [
        (path, data.select(np.arange(number * SHARD, min((number + 1) * SHARD, len(data)))))
        for number, path in enumerate(shard_paths(detector, data, views, precision))
    ]
    missing = [(path, images) for path, images in shards if not path.is_file()]
    accelerator.wait_for_everyone()  # all have listed the missing shards before the first process writes one
    total = sum(len(images) for _, images in missing)
    if missing and accelerator.is_main_process:
        needed = sum(feature_gigabytes(detector, images, views) for _, images in missing)
        _prepare_folder(missing[0][0].parent, needed)
    batch_size = min(batch_size, CPU_BATCH) if accelerator.device.type == "cpu" else batch_size
    with progress_bar(total, "caching", shown=bool(missing) and accelerator.is_main_process) as bar:
        for path, images in missing[accelerator.process_index :: accelerator.num_processes]:
            sizes = [math.prod(shape) * ITEM_BYTES for shape in feature_shapes(detector, images, views)]
            starts = {image.id: sum(sizes[:place]) for place, image in enumerate(images.images)}
            with atomic_write(path) as file, accelerator.autocast():
                for batch in itertools.chain(*make_eval_loader(images, detector.input_size, batch_size, workers)):
                    pixels = batch.inputs.to(accelerator.device)
                    maps = torch.stack([backbone(view) for view in (pixels, pixels.flip(-1))[:views]], dim=1)
                    for meta, features in zip(batch.meta, maps.to(dtype).cpu().view(torch.int16), strict=True):
                        file.seek(starts[meta.image_id])
                        file.write(features.numpy())
                    bar.update(len(maps) * accelerator.num_processes)
    accelerator.wait_for_everyone()
    return [f for path, images in shards for f in _open(path, feature_shapes(detector, images, views), dtype)]


def _prepare_folder(folder: Path, gigabytes: float) -> None:
    """Remove abandoned files, and check the free space."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, ABANDONED_S)
    free = (shutil.disk_usage(folder).free - SPARE_BYTES) / 1e9
    if gigabytes > free:
        needs = f"the feature cache needs {gigabytes:.1f} GB in {folder}, where {max(0.0, free):.1f} GB are free"
        raise InputError(f"{needs}: make room, move it with DETECTION_CACHE, or train with --feature-cache 0")
    log.info(f"caching features: {gigabytes:.2g} GB in {folder}")


def _open(path: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """A memory map of a shard; what is written to it never reaches the file."""
    counts = [math.prod(shape) for shape in shapes]
    if not path.is_file() or path.stat().st_size != sum(counts) * ITEM_BYTES:
        raise InputError(f"the feature cache {path} is missing or damaged; delete it and start again")
    parts = torch.from_file(str(path), False, sum(counts), dtype=dtype).split(counts)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class CachedDataset(SampleDataset):
    """`DetectionDataset` with `cached_features` in place of pixels; for training it draws which images to mirror."""

    def __init__(
        self, data: DetectionData, features: list[Tensor], size: InputSize, *, mirror: bool = False, seed: int = 0
    ):
        super().__init__(data, seed)
        self.features, self.size, self.mirror = features, size, mirror

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Features (h, w, C) and the image's `Target`."""
        target = scaled_target(self.data.target(index), self.size)
        with self.sample_rng(index):
            mirrored = self.mirror and mirror_drawn()
        view = self.features[index][int(mirrored)]
        return view, mirror_target(target, view.shape[1] * self.size.patch) if mirrored else target
