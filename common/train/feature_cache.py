"""Features of a frozen backbone on disk: each image goes through it once, later epochs read memory maps.

The images are taken in shards of `SHARD`. A shard's file holds (images, views, rows, columns, blocks, channels)
features of 16 bits, bfloat16 where the run computes in it, so that nothing is lost, else float16: view 0 is the
letterboxed image, view 1 the same mirrored. Its name is a digest of all that the features depend on, given to it when
it is whole: an interrupted build goes on where it stopped, several processes share the shards among them, and a run on
more images finds those of an earlier one.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common.console import InputError, Interrupted, ignore_in_worker, progress_bar
from common.data.coco import CocoData
from common.data.dataset import DetectionDataset, collate, sample_randomness
from common.data.transforms import LetterboxTransform, letterbox_target, mirror_drawn, mirror_target
from common.files import atomic_write, cache_folder, remove_leftovers
from common.model.detector import Detector
from common.runtime import precision_name
from common.types import Target

FORMAT_VERSION = 3
SHARD = 64  # images: what an interruption can cost
SPARE_DISK = 1 << 30  # bytes that a build leaves free
ABANDONED = 3600.0  # seconds after which a half-written file belongs to nobody
CPU_BATCH = 4  # images at once while building on a CPU: a tenth faster than 16, as less waits for less


@dataclass(frozen=True)
class FeatureFiles:
    """Where the features of some images belong, and their form; the files themselves need not be there yet."""

    paths: tuple[Path, ...]  # of the shards, in the images' order
    images: int
    shape: tuple[int, int, int, int, int]  # of an image: views, rows, columns, blocks, channels
    dtype: torch.dtype

    def part(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * SHARD, min(self.images, (shard + 1) * SHARD))

    def missing(self) -> list[int]:
        """The shards whose files are not there."""
        return [shard for shard, path in enumerate(self.paths) if not path.is_file()]

    def gigabytes(self, shards: Sequence[int] | None = None) -> float:
        """Size of all files, or of those of some shards."""
        count = self.images if shards is None else sum(len(self.part(shard)) for shard in shards)
        return count * math.prod(self.shape) * self.dtype.itemsize / 1e9

    def open(self) -> "Features":
        """Raises InputError where a file is missing or not as long as it should be."""
        maps = []
        for shard, path in enumerate(self.paths):
            shape = (len(self.part(shard)), *self.shape)
            if not path.is_file() or path.stat().st_size != math.prod(shape) * self.dtype.itemsize:
                raise InputError(f"the feature cache {path} is missing or damaged; delete it and start again")
            # What is written to such a map never reaches the file.
            numbers = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=self.dtype)
            maps.append(numbers.view(shape))
        return Features(tuple(maps))


@dataclass(frozen=True)
class Features:
    """The features of a data set's images in memory maps, each (images, views, rows, columns, blocks, channels)."""

    shards: tuple[Tensor, ...]

    def of(self, image: int, view: int) -> Tensor:
        """(rows, columns, blocks, channels) of one view of an image."""
        return self.shards[image // SHARD][image % SHARD, view]


def feature_files(detector: Detector, data: CocoData, views: int, precision: str) -> FeatureFiles:
    """Names and form of the features that the backbone of `detector` gives for the images of `data`.

    A name is a digest of the backbone's weights, the blocks, the input size, the precision, the number of views, and
    the path, length and time of change of each image in the shard.

    Args:
        detector: its backbone and configuration; the head does not matter.
        data: the images; their boxes do not matter.
        views: 1 the image, 2 also its mirror image.
        precision: the arithmetic that the features are computed in, as `precision_name` gives it.
    """
    config = detector.config
    common = hashlib.sha256(repr((FORMAT_VERSION, config.blocks, config.image_size, views, precision)).encode())
    for name, weight in detector.backbone.state_dict().items():
        common.update(name.encode())
        common.update(weight.detach().cpu().contiguous().numpy().tobytes())
    paths = []
    for begin in range(0, len(data), SHARD):
        digest = common.copy()
        for image in data.images[begin : begin + SHARD]:
            digest.update(repr(image.file_state()).encode())
        paths.append(cache_folder("features", f"{digest.hexdigest()[:24]}.features"))
    side = config.image_size // detector.backbone.patch_size
    shape = (views, side, side, len(config.blocks), detector.backbone.channels)
    return FeatureFiles(tuple(paths), len(data), shape, torch.bfloat16 if precision == "bf16" else torch.float16)


def feature_gigabytes(detector: Detector, images: int, views: int) -> float:
    """What the cache of so many images takes, without looking at them."""
    side = detector.config.image_size // detector.backbone.patch_size
    return images * views * side**2 * len(detector.config.blocks) * detector.backbone.channels * 2 / 1e9


def cached_features(
    detector: Detector, data: CocoData, *, mirrored: bool, batch_size: int, workers: int, accelerator: Accelerator
) -> Features:
    """The features of `data`'s images, built where they are not there yet, by all processes together.

    Args:
        detector: on the accelerator's device; its backbone is run in the accelerator's precision.
        mirrored: also keep those of the mirrored images (twice the size).
        batch_size: images at once while building, at most; on a CPU fewer.
        workers: processes that decode images while building.

    Raises:
        InputError: the disk has no room for them, or can't be written.
    """
    files = feature_files(detector, data, 2 if mirrored else 1, precision_name(accelerator))
    missing = files.missing()
    accelerator.wait_for_everyone()  # all have looked before the first begins to write
    if missing:
        if accelerator.is_main_process:
            for shard in missing:
                remove_leftovers(files.paths[shard], ABANDONED)
            _check_room(files, missing)
            begun = len(data) - sum(len(files.part(shard)) for shard in missing)
            there = f", those of {begun} are there already" if begun else ""
            size, folder = f"{files.gigabytes():.1f} GB", files.paths[0].parent
            print(f"features of {len(data)} images: {size} in {folder}{there}", flush=True)
        with torch.random.fork_rng():  # what training draws must not depend on whether the cache was there
            _build(files, missing, detector, data, min(batch_size, len(data)), workers, accelerator)
        accelerator.wait_for_everyone()
    return files.open()


@torch.inference_mode()
def _build(
    files: FeatureFiles,
    missing: Sequence[int],
    detector: Detector,
    data: CocoData,
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
) -> None:
    """This process's share of the missing shards. Each is cut into batches alike, however many are built at a time."""
    dataset = DetectionDataset(data, LetterboxTransform(detector.config.image_size))
    at_once = min(batch_size, CPU_BATCH) if accelerator.device.type == "cpu" else batch_size
    share = missing[accelerator.process_index :: accelerator.num_processes]
    detector.backbone.eval()
    total = sum(len(files.part(shard)) for shard in share)
    try:
        with progress_bar(total, "caching features", shown=accelerator.is_main_process) as bar:
            for shard in share:
                loader = DataLoader(
                    Subset(dataset, files.part(shard)),
                    at_once,
                    collate_fn=collate,
                    num_workers=workers,
                    worker_init_fn=ignore_in_worker,
                )
                with atomic_write(files.paths[shard]) as out:
                    for batch in loader:
                        images = batch.images.to(accelerator.device)
                        views = [images, images.flip(-1)][: files.shape[0]]
                        with accelerator.autocast():
                            features = torch.stack([detector.patch_features(view) for view in views], dim=1)
                        out.write(features.to(files.dtype).cpu().view(torch.int16).numpy())
                        bar.update(len(images))
    except Interrupted as interrupted:
        interrupted.advice = "what was cached so far is kept; the same command goes on from there"
        raise


def _check_room(files: FeatureFiles, missing: Sequence[int]) -> None:
    folder = files.paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the feature cache {folder}: {error.strerror}") from error
    free = shutil.disk_usage(folder).free / 1e9
    needed = files.gigabytes(missing) + SPARE_DISK / 1e9
    if needed > free:
        raise InputError(
            f"the feature cache needs {needed:.1f} GB in {folder}, where {free:.1f} GB are free: "
            "make room, move it with DETECTION_CACHE, or train with --no-feature-cache"
        )


class CachedDataset(Dataset):
    """What `DetectionDataset` gives, with an image's features in its place.

    Whether a view is mirrored is drawn as `MirrorTransform` draws it, so that training on the cache sees the same
    views in the same order as training on the images.

    Args:
        data: the images and boxes.
        features: of them, as `cached_features` returns them.
        image_size: side of the square input, pixels.
        mirror: draw mirrored views, for training; else the letterboxed images alone.
        seed: of the draw.
    """

    def __init__(self, data: CocoData, features: Features, image_size: int, *, mirror: bool = False, seed: int = 0):
        self.data, self.features, self.image_size, self.mirror = data, features, image_size, mirror
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Features (h, w, blocks, C) and the image's `Target`."""
        target = letterbox_target(self.data.target(index), self.data.size(index), self.image_size)
        with sample_randomness(self.seed, self.epoch, index):
            mirrored = self.mirror and mirror_drawn()
        view = self.features.of(index, int(mirrored))
        return view, mirror_target(target, self.image_size) if mirrored else target
