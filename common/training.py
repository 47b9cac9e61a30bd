"""What the training scripts share below their visible loop: loaders, schedule, run folder, epoch validation."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import metrics
from common.checkpoint import Checkpoint, load_detector, save_detector
from common.coco import CocoData, DetectionDataset, collate
from common.detector import Detector
from common.errors import InputError
from common.feature_cache import CachedDataset
from common.files import atomic_write
from common.inference import detect
from common.types import Batch

WARM_UP_SHARE = 0.05  # of all steps
EPOCH_VAL_PICTURES = 100  # the validation after each epoch looks at the first so many


def check_objects(data: CocoData) -> None:
    """Raises InputError where no training picture holds an object to learn from."""
    if not (~data.crowd).any():
        raise InputError(f"{data.source}: no box on the {len(data)} training pictures; there is nothing to learn")


def train_loader(dataset: DetectionDataset | CachedDataset, batch_size: int, workers: int) -> DataLoader:
    """Batches of `dataset` in an order drawn from the epoch; the incomplete last batch is left out."""
    whole_batches = len(dataset) >= batch_size
    return DataLoader(
        dataset, batch_size, shuffle=True, drop_last=whole_batches, collate_fn=collate, num_workers=workers
    )


def parameter_groups(
    detector: Detector, lr: float, backbone_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """The learning rate of every weight; weight decay on matrices only, frozen weights left out.

    Args:
        lr: of the head.
        backbone_lr: of the backbone's last block and final norm.
        layer_decay: each block before it learns so many times as fast as the one after it (BEiT, arXiv 2106.08254).
    """
    rates = {f"head.{name}": lr for name, _ in detector.head.named_parameters()}
    depth = detector.backbone.depth
    for name, _ in detector.backbone.named_parameters():
        rates[f"backbone.{name}"] = backbone_lr * layer_decay ** (depth - detector.backbone.block_of(name))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in detector.named_parameters():
        if weight.requires_grad:
            groups.setdefault((rates[name], weight_decay if weight.ndim > 1 else 0.0), []).append(weight)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()]


class Ema:
    """A running average of a detector's trained weights, which is steadier than the weights of any one step.

    Args:
        decay: weight of the past; it starts lower, so that the first steps are soon forgotten. 0 follows the weights.
    """

    def __init__(self, detector: nn.Module, decay: float):
        self.trained = [p for p in detector.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.trained]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.trained, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the detector has the averaged weights; afterwards its own again."""
        own = [p.detach().clone() for p in self.trained]
        self._load(self.average)
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: list[Tensor]) -> None:
        for weight, value in zip(self.trained, weights, strict=True):
            weight.copy_(value)


def cosine_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over the first `WARM_UP_SHARE` of `steps`, then half a cosine to zero."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))

    def factor(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        return min((step + 1) / warm_up, decay)

    return LambdaLR(optimizer, factor)


def check_finite(loss: Tensor, batch: Batch) -> None:
    """Raises InputError, naming the pictures of the batch, where the loss is infinite or not a number."""
    if not torch.isfinite(loss):
        ids = ", ".join(str(target.image_id) for target in batch.targets)
        raise InputError(f"the loss became {loss.item()} on the pictures {ids}; lower the learning rate, or use fp32")


class Means:
    """Running means of named scalars."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def get(self) -> dict[str, float]:
        return {name: float(total) / self.count for name, total in self.sums.items()}


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Make order and augmentation of the coming pass those of `epoch`."""
    loader.set_epoch(epoch)  # accelerate passes it on to the sampler, and then not to the data set
    loader.dataset.set_epoch(epoch)


def validate(
    model: nn.Module, loader: DataLoader, data: CocoData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a model with these classes on the pictures of `loader`, which are those of `data`."""
    found = detect(model, loader, accelerator, what="validating")
    return headline(metrics.evaluate(found, data, metrics.label_map(class_names, data)))


def headline(numbers: dict) -> dict[str, float | None]:
    """The few numbers of `metrics.evaluate` that fit a line: the study's six columns, and AP."""
    return {**numbers["primary"], "AP50": numbers["detection"]["AP50"], "AP": numbers["detection"]["AP"]}


def in_words(numbers: dict[str, float | None]) -> str:
    """The headline numbers that matter most, for a line on the terminal."""
    chosen = {"mAP@0.5": "AP50", "AP": "AP", "accuracy": "accuracy", "mean IoU": "mean_iou"}
    words = {name: "-" if numbers[key] is None else f"{numbers[key]:.3f}" for name, key in chosen.items()}
    return ", ".join(f"{name} {word}" for name, word in words.items())


class RunFolder:
    """A run's files: `settings.json`, `log.jsonl` with one line an epoch, `last.pth` and `best.pth`.

    A new run replaces the files of an earlier one in the same folder. Of several processes only one `writes`.
    """

    def __init__(self, path: str | Path, settings: dict, writes: bool = True):
        self.path, self.writes, self.best_score = Path(path), writes, -1.0
        self.best = self.path / "best.pth"
        if writes:
            with atomic_write(self.path / "settings.json", "w") as file:
                json.dump(settings, file, indent=2)
            with atomic_write(self.path / "log.jsonl", "w"):
                pass

    def finish_epoch(self, checkpoint: Checkpoint, losses: dict[str, float], seconds: float, stage: str) -> None:
        """Log the epoch, write `last.pth`, and `best.pth` where mAP@0.5 is the highest so far (the first of equals)."""
        if not self.writes:
            return
        rounded = {name: round(value, 4) for name, value in losses.items()}
        line = {"stage": stage, "epoch": checkpoint.epoch, "loss": rounded, "val": checkpoint.metrics}
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(line | {"seconds": round(seconds, 1)}) + "\n")
        terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        tqdm.write(f"epoch {checkpoint.epoch}: loss {terms}; {in_words(checkpoint.metrics)}; {seconds:.0f} s")
        save_detector(self.path / "last.pth", checkpoint)
        score = checkpoint.metrics["AP50"] or 0.0
        if score > self.best_score:
            self.best_score = score
            save_detector(self.best, checkpoint)


def publish_best(
    run: RunFolder, val_loader: DataLoader, val_data: CocoData, output: str | Path, accelerator: Accelerator
) -> dict[str, float | None]:
    """Validate the best epoch's checkpoint on all of `val_data`, write it to `output` and return its numbers."""
    accelerator.wait_for_everyone()
    best = load_detector(run.best)
    model, val_loader = accelerator.prepare(best.detector, val_loader)
    numbers = validate(model, val_loader, val_data, best.class_names, accelerator)
    if run.writes:
        save_detector(output, replace(best, metrics=numbers))
        print(f"epoch {best.epoch} on {len(val_data)} validation pictures: {in_words(numbers)}; written to {output}")
    return numbers
