"""Samples of a data set, their order, and loaders of batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from common.data.memory import DetectionData
from common.data.transforms import ScaleTransform
from common.runtime import Purpose, prepare_worker, seed_of
from common.types import Batch, InputSize, Target, Targets, group_by_shape

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]


class SampleDataset(Dataset):
    """A sample for each image of a `DetectionData`.

    Its randomness depends on (seed, epoch, index) alone, not on the number of workers or processes, or on where a run
    was resumed. Call `set_epoch` before each epoch.
    """

    def __init__(self, data: DetectionData, seed: int):
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    @contextmanager
    def sample_rng(self, index: int) -> Iterator[None]:
        """Inside the block, torch's random numbers are those of this sample; outside they are unaffected."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(Purpose.SAMPLE, self.seed, self.epoch, index))
            yield


class DetectionDataset(SampleDataset):
    """Images (3, H, W) uint8 and targets, decoded and transformed item by item."""

    def __init__(self, data: DetectionData, transform: Transform, seed: int = 0):
        super().__init__(data, seed)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = F.pil_to_tensor(self.data.images[index].open())
        with self.sample_rng(index):
            return self.transform(image, self.data.target(index))


def collate(samples: Sequence[tuple[Tensor, Target]]) -> list[Batch]:
    """Stack images (3, H, W) uint8, or cached features (h, w, C), those of each shape by themselves."""
    batches = []
    for group in group_by_shape([inputs for inputs, _ in samples]):
        inputs, targets = zip(*(samples[index] for index in group), strict=True)
        batches.append(Batch(torch.stack(inputs), Targets.pad(targets), [target.meta for target in targets]))
    return batches


def make_eval_loader(data: DetectionData, size: InputSize, batch_size: int, workers: int) -> DataLoader:
    """The images of `data`, scaled, those of one shape behind each other, `batch_size` at once."""
    order = sorted(range(len(data)), key=lambda index: size.fit(data.images[index].meta.size)[0])
    return make_loader(DetectionDataset(data.select(np.array(order)), ScaleTransform(size)), batch_size, workers)


class EpochSampler(Sampler[int]):
    """Every index of a data set once, in an order drawn from its (seed, epoch) alone."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(Purpose.ORDER, self.dataset.seed, self.dataset.epoch))
        yield from torch.randperm(len(self), generator=generator).tolist()


def make_train_loader(dataset: SampleDataset, batch_size: int, workers: int, processes: int = 1) -> DataLoader:
    """Batches in an order drawn from the epoch; those that do not fill a step of all processes are left out.

    Where there are too few images for one such step, accelerate fills it up with images from the beginning.
    """
    is_enough = len(dataset) >= batch_size * processes
    return make_loader(dataset, batch_size, workers, sampler=EpochSampler(dataset), drop_last=is_enough)


def make_loader(dataset: SampleDataset, batch_size: int, workers: int, **order: Any) -> DataLoader:
    """Batches of samples, by default in the order of the data set, pinned, so that a GPU computes while it copies."""
    order |= {"worker_init_fn": prepare_worker, "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, **order)
