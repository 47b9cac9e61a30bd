"""Features of a frozen backbone on disk: each picture goes through it once, later epochs read a memory map.

One file holds (pictures, views, rows, columns, blocks, channels) features of 16 bits, bfloat16 where the run computes
in it, so that nothing is lost, else float16: view 0 is the letterboxed picture, view 1 the same mirrored. It is written
picture after picture under another name and renamed when whole, so that an interrupted build goes on where it stopped.
Its name is a digest of all that the features depend on.
"""

import hashlib
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common.coco import CocoData, DetectionDataset, collate, sample_randomness
from common.detector import Detector
from common.errors import InputError
from common.files import cache_folder
from common.inference import precision_name
from common.progress import progress_bar
from common.transforms import LetterboxTransform, letterbox_target, mirror_drawn, mirror_target
from common.types import Target

FORMAT_VERSION = 2
SPARE_DISK = 1 << 30  # bytes that a build leaves free
CPU_BATCH = 4  # pictures at once while building on a CPU: a tenth faster than 16, as less waits for less


@dataclass(frozen=True)
class FeatureFile:
    """Where the features of some pictures belong, and their shape; the file itself need not be there yet."""

    path: Path
    shape: tuple[int, int, int, int, int, int]  # pictures, views, rows, columns, blocks, channels
    dtype: torch.dtype

    @property
    def bytes_a_picture(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def size_in_words(self) -> str:
        return f"{self.shape[0] * self.bytes_a_picture / 1e9:.1f} GB"

    def open(self) -> Tensor:
        """The features as a memory map; what is written to it never reaches the file."""
        size = math.prod(self.shape)
        return torch.from_file(str(self.path), shared=False, size=size, dtype=self.dtype).view(self.shape)


def feature_file(detector: Detector, data: CocoData, views: int, precision: str) -> FeatureFile:
    """Name and shape of the features that the backbone of `detector` gives for the pictures of `data`.

    The name is a digest of the backbone's weights, the blocks, the input size, the precision, the number of views,
    and each picture's path, length and time of change.

    Args:
        detector: its backbone and configuration; the head does not matter.
        data: the pictures; their boxes do not matter.
        views: 1 the picture, 2 also its mirror image.
        precision: the arithmetic that the features are computed in, as `precision_name` gives it.
    """
    config = detector.config
    digest = hashlib.sha256(repr((FORMAT_VERSION, config.blocks, config.image_size, views, precision)).encode())
    for name, weight in detector.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    for picture in data.pictures:
        digest.update(repr(picture.file_state()).encode())
    side = config.image_size // detector.backbone.patch_size
    shape = (len(data), views, side, side, len(config.blocks), detector.backbone.channels)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return FeatureFile(cache_folder("features", f"{digest.hexdigest()[:24]}.features"), shape, dtype)


def cached_features(
    detector: Detector, data: CocoData, *, mirrored: bool, batch_size: int, workers: int, accelerator: Accelerator
) -> Tensor:
    """The features of `data`'s pictures as a memory map (pictures, views, h, w, blocks, C), built if need be.

    Args:
        detector: on the accelerator's device; its backbone is run in the accelerator's precision.
        mirrored: also keep those of the mirrored pictures (twice the size).
        batch_size: pictures at once while building, at most; on a CPU fewer.
        workers: processes that decode pictures while building.

    Raises:
        InputError: the disk has no room for them, or can't be written.
    """
    file = feature_file(detector, data, 2 if mirrored else 1, precision_name(accelerator))
    if accelerator.is_main_process and not file.path.is_file():
        with torch.random.fork_rng():  # what training draws must not depend on whether the cache was there
            _build(file, detector, data, batch_size, workers, accelerator)
    accelerator.wait_for_everyone()
    return file.open()


@torch.inference_mode()
def _build(
    file: FeatureFile, detector: Detector, data: CocoData, batch_size: int, workers: int, accelerator: Accelerator
) -> None:
    partial = file.path.with_suffix(".partial")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        done = min(partial.stat().st_size // file.bytes_a_picture if partial.is_file() else 0, len(data))
        _check_room(file, done)
        begun = f", {done} of them there already" if done else ""
        print(f"features of {len(data)} pictures: {file.size_in_words()} in {file.path.parent}{begun}", flush=True)
        dataset = Subset(DetectionDataset(data, LetterboxTransform(detector.config.image_size)), range(done, len(data)))
        at_once = min(batch_size, CPU_BATCH) if accelerator.device.type == "cpu" else batch_size
        loader = DataLoader(dataset, at_once, collate_fn=collate, num_workers=workers)
        detector.backbone.eval()
        with partial.open("ab") as out, progress_bar(len(data), "caching features") as bar:
            out.truncate(done * file.bytes_a_picture)
            bar.update(done)
            for batch in loader:
                images = batch.images.to(accelerator.device)
                views = [images, images.flip(-1)][: file.shape[1]]
                with accelerator.autocast():
                    features = torch.stack([detector.patch_features(view) for view in views], dim=1)
                out.write(features.to(file.dtype).cpu().view(torch.int16).numpy())
                bar.update(len(images))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file.path)
    except OSError as error:
        raise InputError(f"cannot write the feature cache {partial}: {error.strerror or error}") from error


def _check_room(file: FeatureFile, done: int) -> None:
    free = shutil.disk_usage(file.path.parent).free
    needed = (file.shape[0] - done) * file.bytes_a_picture + SPARE_DISK
    if needed > free:
        raise InputError(
            f"the feature cache needs {needed / 1e9:.1f} GB in {file.path.parent}, where {free / 1e9:.1f} GB are free: "
            "make room, move it with DETECTION_CACHE, or train with --no-feature-cache"
        )


class CachedDataset(Dataset):
    """What `DetectionDataset` gives, with a picture's features in its place.

    Whether a view is mirrored is drawn as `MirrorTransform` draws it, so that training on the cache sees the same
    views in the same order as training on the pictures.

    Args:
        data: the pictures and boxes.
        features: (pictures, views, h, w, blocks, C), as `cached_features` returns them.
        image_size: side of the square input, pixels.
        mirror: draw mirrored views, for training; else the letterboxed pictures alone.
        seed: of the draw.
    """

    def __init__(self, data: CocoData, features: Tensor, image_size: int, *, mirror: bool = False, seed: int = 0):
        self.data, self.features, self.image_size, self.mirror = data, features, image_size, mirror
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Features (h, w, blocks, C) and the picture's `Target`."""
        target = letterbox_target(self.data.target(index), self.data.size(index), self.image_size)
        with sample_randomness(self.seed, self.epoch, index):
            mirrored = self.mirror and mirror_drawn()
        view = self.features[index, int(mirrored)]
        return view, mirror_target(target, self.image_size) if mirrored else target
