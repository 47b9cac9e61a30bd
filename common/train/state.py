"""What the training scripts share below their visible loop: loaders, learning rates, progress, epoch validation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from common.console import InputError, NotFiniteError
from common.data.coco import CocoData
from common.data.dataset import EpochOrder
from common.model.detector import Detector
from common.model.losses import LossConfig, detection_loss
from common.runtime import stop_if_asked
from common.train.optim import Ema
from common.types import Batch

FP16_MISSES = 20  # steps in a row that fp16 may skip while it looks for a scale that holds its gradients
UNTOLD = ("resume", "save_steps")  # how often a run was stopped or saved leaves no trace in its checkpoint
EPOCH_VAL_IMAGES = 100  # the validation after each epoch looks at the first so many


class Progress:
    """One stage of training under way: what its steps change, and where it stands.

    Args:
        stage: its name.
        detector: the weights, not wrapped for several processes.
        optimizer: of the stage, likewise `schedule`.
        accelerator: of the run.
        order: of the training images; its seed is also that of the random numbers that a step draws (dropout).
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
                f"on the images {ids}; lower the learning rate, or use --precision fp32",
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
    """Around training steps: where memory runs out, find how many images of the batch fit.

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
    raise InputError(f"out of memory at a step of {count} images; {advice}")


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
        "train_images_used": len(data),
        "train_fingerprint": data.fingerprint(),
        "processes": accelerator.num_processes,
    }
