"""Samples of a data set, their order, and loaders of batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from common.console import ignore_in_worker
from common.data.memory import DetectionData
from common.data.transforms import LetterboxTransform
from common.runtime import derived_seed
from common.types import Batch, Target, Targets


class SampleDataset(Dataset):
    """A sample for each image of a `DetectionData`.

    Every sample draws its randomness from (seed, epoch, index) alone, so the augmentation of an image does not depend
    on the number of workers or processes, or on where a run was resumed. Call `set_epoch` before each epoch.
    """

    def __init__(self, data: DetectionData, seed: int):
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    @contextmanager
    def randomness(self, index: int) -> Iterator[None]:
        """Inside the block, torch's random numbers are those of this sample; outside they are unaffected."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, self.epoch, index))
            yield


class DetectionDataset(SampleDataset):
    """Images and targets, decoded and transformed item by item."""

    def __init__(
        self, data: DetectionData, transform: Callable[[Tensor, Target], tuple[Tensor, Target]], seed: int = 0
    ):
        super().__init__(data, seed)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Image (3, S, S) uint8 and its `Target`."""
        image = F.pil_to_tensor(self.data.images[index].open())
        with self.randomness(index):
            return self.transform(image, self.data.target(index))


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Stack images (3, S, S) uint8, or cached features (h, w, C), and pad their targets."""
    inputs, targets = zip(*samples, strict=True)
    return Batch(torch.stack(inputs), Targets.pad(targets), [target.meta for target in targets])


# Batches in pinned memory are copied to a GPU while it computes.
BATCHES: dict[str, Any] = {
    "collate_fn": collate,
    "worker_init_fn": ignore_in_worker,
    "pin_memory": torch.cuda.is_available(),
}


def make_eval_loader(data: DetectionData, image_size: int, batch_size: int, workers: int) -> DataLoader:
    """Letterboxed images of `data`, in its order."""
    dataset = DetectionDataset(data, LetterboxTransform(image_size))
    return DataLoader(dataset, batch_size, num_workers=workers, **BATCHES)


class EpochOrder(Sampler[int]):
    """Every index once, in an order drawn from (seed, epoch) alone; the first `done` of them are skipped."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.epoch = self.done = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        yield from torch.randperm(self.count, generator=generator)[self.done :].tolist()


def make_train_loader(dataset: SampleDataset, batch_size: int, workers: int) -> tuple[DataLoader, EpochOrder]:
    """Batches of `dataset` in an order drawn from the epoch, and that order; an incomplete last batch is left out."""
    order = EpochOrder(len(dataset), dataset.seed)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=order,
        drop_last=len(dataset) >= batch_size,
        num_workers=workers,
        **BATCHES,
    )
    return loader, order
