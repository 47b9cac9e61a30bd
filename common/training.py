"""What the training scripts share below their visible loop: loaders, learning rates, progress, epoch validation."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

from common import metrics
from common.coco import CocoData, DetectionDataset, collate
from common.detector import Detector
from common.errors import InputError, NotFiniteError
from common.feature_cache import CachedDataset
from common.inference import detect, stop_if_asked
from common.losses import LossConfig, detection_loss
from common.signals import leave_to_parent
from common.types import Batch

WARM_UP_SHARE = 0.05  # of all steps
FP16_MISSES = 20  # steps in a row that fp16 may skip while it looks for a scale that holds its gradients
UNTOLD = ("resume", "save_steps")  # how often a run was stopped or saved leaves no trace in its checkpoint
EPOCH_VAL_PICTURES = 100  # the validation after each epoch looks at the first so many


def check_objects(train: CocoData, val: CocoData) -> None:
    """Say which classes one of the two parts lacks.

    Raises:
        InputError: no object to learn from, or no class in common: nothing learned could be right.
    """
    if not (~train.crowd).any():
        raise InputError(f"{train.source}: no box on the {len(train)} training pictures; there is nothing to learn")
    for one, other in ((train, val), (val, train)):
        missing = [name for name in one.class_names if name not in other.class_names]
        if len(missing) == len(one.class_names):
            raise InputError(
                f"{train.source} and {val.source} have no class in common: {train.class_names[0]}, … and "
                f"{val.class_names[0]}, …"
            )
        if missing:
            print(f"{other.source} lacks {len(missing)} classes of {one.source}: {', '.join(missing[:3])}", flush=True)


class EpochOrder(Sampler[int]):
    """Every index once, in an order drawn from (seed, epoch) alone, without the first `done` of it."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.epoch = self.done = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        yield from torch.randperm(self.count, generator=generator)[self.done :].tolist()


def train_loader(
    dataset: DetectionDataset | CachedDataset, batch_size: int, workers: int, seed: int
) -> tuple[DataLoader, EpochOrder]:
    """Batches of `dataset` in an order drawn from the epoch, and that order; an incomplete last batch is left out."""
    order = EpochOrder(len(dataset), seed)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=order,
        drop_last=len(dataset) >= batch_size,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_to_parent,
    )
    return loader, order


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


class Progress:
    """One stage of training under way: what its steps change, and where it stands.

    Args:
        stage: its name.
        detector: the weights, not wrapped for several processes.
        optimizer: of the stage, likewise `schedule`.
        accelerator: of the run.
        order: of the training pictures; its seed is also that of the random numbers that a step draws (dropout).
        ema_decay: see `Ema`.
        epoch: epochs finished before the stage.
    """

    def __init__(
        self,
        stage: str,
        detector: Detector,
        optimizer: Optimizer,
        schedule: LambdaLR,
        order: EpochOrder,
        accelerator: Accelerator,
        *,
        ema_decay: float = 0.0,
        epoch: int = 0,
    ):
        self.stage, self.detector, self.optimizer, self.schedule = stage, detector, optimizer, schedule
        self.order, self.accelerator, self.ema = order, accelerator, Ema(detector, ema_decay)
        self.epoch, self.step = epoch, 0  # epochs finished; steps done of the one under way
        self.batch: Batch | None = None  # of the last of them
        self.sums: dict[str, Tensor] = {}  # of its loss terms so far
        self.seconds = 0.0  # spent on it so far, validation left out
        self.skipped = 0  # last steps in a row that fp16 could not take

    def steps(self, loader: DataLoader) -> Iterator[Batch]:
        """The batches of the epoch under way that are still to be done, each with random numbers of its own.

        Raises:
            Interrupted: between two steps, where a signal came in the meantime.
        """
        began = time.perf_counter() - self.seconds
        loader.set_epoch(self.epoch + 1)  # which passes it on to the data set when the iteration begins
        self.order.epoch, self.order.done = self.epoch + 1, self.step * loader.total_batch_size
        for batch in loader if self.step < len(loader) else ():
            torch.manual_seed(hash((self.order.seed, self.epoch, self.step, self.accelerator.process_index)))
            self.batch = batch
            yield batch
            self.seconds = time.perf_counter() - began
            stop_if_asked(self.accelerator)

    def mean_of_processes(self, number: Tensor) -> Tensor:
        """The mean of a scalar over the processes that share the step."""
        return self.accelerator.reduce(number, "mean")

    def finish_step(self, losses: dict[str, Tensor]) -> None:
        """The step is done; take in its loss terms, averaged over the processes."""
        self.step += 1
        means = self.accelerator.reduce(torch.stack([value.detach() for value in losses.values()]), "mean")
        for name, value in zip(losses, means, strict=True):
            self.sums[name] = self.sums.get(name, 0) + value

    def mean_losses(self) -> dict[str, float]:
        """Each loss term, averaged over the steps of the epoch under way."""
        return {name: float(total) / self.step for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}

    def check_finite(self, losses: dict[str, Tensor], norm: Tensor, batch: Batch) -> None:
        """Stop before a step that would ruin the weights; fp16, whose scale has to be found, may miss a few.

        Args:
            norm: () of all gradients.

        Raises:
            NotFiniteError: an infinite loss or gradient, or one that is no number.
        """
        bad = self.accelerator.reduce((~torch.isfinite(norm + sum(losses.values()).detach())).float()) > 0
        self.skipped = self.skipped + 1 if bad else 0
        if self.skipped > (FP16_MISSES if self.accelerator.scaler else 0):
            report = {
                "stage": self.stage,
                "epoch": self.epoch + 1,
                "step": self.step + 1,
                "loss": {name: str(value.item()) for name, value in losses.items()},
                "gradient_norm": str(norm.item()),
                "image_ids": [target.image_id for target in batch.targets],
            }
            ids = ", ".join(map(str, report["image_ids"]))
            raise NotFiniteError(
                f"the gradients became {norm.item()} in epoch {self.epoch + 1}, step {self.step + 1}, "
                f"on the pictures {ids}; lower the learning rate, or use --precision fp32",
                report,
            )

    def state_dict(self) -> dict:
        """Tensors and plain types, the same on all processes."""
        scaler = self.accelerator.scaler
        return {
            **{name: getattr(self, name) for name in ("stage", "epoch", "step", "sums", "seconds", "skipped")},
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": {"average": self.ema.average, "steps": self.ema.steps},
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave. Learning rates stay those that this run was told."""
        for name in ("epoch", "step", "seconds", "skipped"):
            setattr(self, name, state[name])
        device = self.accelerator.device
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.detector.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        rates = self.schedule.base_lrs
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = rates
        self.ema.average = [weight.to(device) for weight in state["ema"]["average"]]
        self.ema.steps = state["ema"]["steps"]
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


@contextmanager
def memory_explained(progress: Progress, config: LossConfig) -> Iterator[None]:
    """Around training steps: where memory runs out, find how many pictures of the batch fit.

    Raises:
        InputError: memory ran out; with the batch size to take.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        _let_go(error.__traceback__)
    if progress.batch is None:
        raise InputError("out of memory before the first step; take a smaller --image-size or backbone")
    count = len(progress.batch.targets)
    advice = "not even one fits: take a smaller --image-size or backbone"
    for fewer in (count >> halvings for halvings in range(1, count.bit_length())):
        if _fits(Batch(progress.batch.images[:fewer], progress.batch.targets[:fewer]), progress.detector, config):
            advice = f"{fewer} fit: take --batch-size {fewer}; with --resume the run goes on from its last state"
            break
    raise InputError(f"out of memory at a step of {count} pictures; {advice}")


def _let_go(traceback: TracebackType) -> None:
    """Cut a traceback into pieces: the frames along it would keep what the failed step had computed."""
    while traceback:
        traceback.tb_next, traceback = None, traceback.tb_next


def _fits(batch: Batch, detector: Detector, config: LossConfig) -> bool:
    """Is there memory for a step of `batch`?"""
    detector.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        sum(detection_loss(detector(batch.images), batch.targets, config).values()).backward()
    except (RuntimeError, MemoryError):
        return False
    return True


def describe_training(settings: dict, data: CocoData, accelerator: Accelerator) -> dict:
    """The conditions of a run, for its checkpoints: every setting, and what was made of them."""
    return {name: value for name, value in settings.items() if name not in UNTOLD} | {
        "train_pictures": len(data),
        "train_fingerprint": data.fingerprint(),
        "processes": accelerator.num_processes,
    }


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
