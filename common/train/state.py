"""The state of one stage of training: everything that a step changes, and the position in the stage."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.console import Interrupted, NotFiniteError, pending_signal
from common.data.dataset import EpochOrder
from common.model.detector import Detector
from common.runtime import derived_seed
from common.train.optim import Ema
from common.types import Batch

FP16_SKIPS = 20  # consecutive steps that fp16 may skip while its loss scale is adjusted


class TrainState:
    """Weights, optimizer, schedule, moving average and position of a stage; all are saved, so that it can be resumed.

    Args:
        stage: its name.
        detector: the weights, not wrapped for several processes.
        optimizer: of the stage.
        schedule: of its learning rates.
        order: of the training images; its seed also determines the random numbers of each step (dropout).
        accelerator: of the run.
        ema: the moving average of the weights, if any.
        epoch: epochs finished before the stage.
        accumulate: batches a step.
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
        ema: Ema | None = None,
        epoch: int = 0,
        accumulate: int = 1,
    ):
        self.stage, self.detector, self.optimizer, self.schedule = stage, detector, optimizer, schedule
        self.order, self.accelerator, self.ema = order, accelerator, ema
        self.accumulate = accumulate
        self.epoch, self.step = epoch, 0  # epochs finished; steps finished of the current one
        self.sums: dict[str, Tensor] = {}  # of the current epoch's loss terms, on this process
        self.step_losses: dict[str, Tensor] = {}  # the loss terms of the current step, on this process
        self.epoch_steps = 0  # steps in an epoch
        self.seconds = 0.0  # spent on the current epoch, without validation
        self.skipped = 0  # consecutive steps that fp16 has skipped
        self.stop = False  # one of several processes received a signal
        self.step_counts: Tensor | None = None  # the mean of `mean_counts` over the batches of the current step
        self.counted: list[Tensor] | None = None  # those of each batch, while it is computed

    def steps(self, loader: DataLoaderShard) -> Iterator[list[Batch]]:
        """The batches of each remaining step of the current epoch.

        Raises:
            Interrupted: between two steps, after a signal.
        """
        began = time.perf_counter() - self.seconds
        loader.set_epoch(self.epoch + 1)  # passed on to the data set when the iteration begins
        batches_a_step = min(self.accumulate, len(loader))
        self.order.epoch, self.order.done = self.epoch + 1, self.step * batches_a_step * loader.total_batch_size
        self.epoch_steps = steps_an_epoch(loader, self.accumulate)
        remaining = self.epoch_steps - self.step
        batches = iter(loader if remaining else ())
        for _ in range(remaining):
            yield list(itertools.islice(batches, batches_a_step))
            self.seconds = time.perf_counter() - began
            if self.stop or (self.accelerator.num_processes == 1 and pending_signal()):
                raise Interrupted(pending_signal() or signal.SIGTERM)

    def losses(
        self, batches: list[Batch], model: nn.Module, losses_of: Callable[[Batch], dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """The losses of each batch of a step, each with its own random numbers; the caller computes their gradients.

        With several batches the detector first runs on all of them without gradients, for the counts by which the
        losses of each are divided. The mean of their gradients is then that of one batch with all images.

        Args:
            batches: of the step.
            model: as `accelerator.prepare` returned it.
            losses_of: computes the losses of a batch, divided by what `mean_counts` returns.
        """
        self.step_counts, self.step_losses = None, {}
        if len(batches) > 1:
            self.counted = []
            with torch.no_grad():
                for number, batch in enumerate(batches):
                    self._seed(number, len(batches))
                    losses_of(batch)
            self.step_counts, self.counted = self._mean_of_processes(torch.stack(self.counted).mean(0)), None
        for number, batch in enumerate(batches):
            self._seed(number, len(batches))
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):  # processes exchange gradients once
                losses = losses_of(batch)
                yield {name: value / len(batches) for name, value in losses.items()}
            for name, value in losses.items():
                self.step_losses[name] = self.step_losses.get(name, 0) + value.detach() / len(batches)

    def _seed(self, number: int, count: int) -> None:
        """Random numbers of one of the `count` batches of the current step."""
        position = self.step * count + number
        torch.manual_seed(derived_seed(self.order.seed, self.epoch, position, self.accelerator.process_index))

    def mean_counts(self, counts: Tensor) -> Tensor:
        """The mean of a vector over all batches that share the step, those of other processes included."""
        if self.counted is not None:
            self.counted.append(counts)
            return counts
        return self._mean_of_processes(counts) if self.step_counts is None else self.step_counts

    def _mean_of_processes(self, counts: Tensor) -> Tensor:
        """Once a step; the same exchange shares that one of the processes received a signal."""
        if self.accelerator.num_processes == 1:
            return counts
        *totals, signals = self.accelerator.reduce(F.pad(counts, (0, 1), value=pending_signal() or 0))
        self.stop = bool(signals)
        return torch.stack(totals) / self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        """Steps finished in all epochs."""
        return self.epoch * self.epoch_steps + self.step

    def check_finite(self, losses: dict[str, Tensor], norm: Tensor, batches: list[Batch]) -> None:
        """Stop before a step that would make the weights inf or NaN.

        The gradients have been averaged over the processes, so that all of them raise. In fp16 a few consecutive steps
        may be skipped while the loss scale is adjusted.

        Args:
            losses: of the step's last batch on this process, for the report.
            norm: () of all gradients.
            batches: of this process, for the report.

        Raises:
            NotFiniteError: the norm is inf or NaN.
        """
        self.skipped = 0 if torch.isfinite(norm) else self.skipped + 1
        if self.skipped > (FP16_SKIPS if self.accelerator.scaler else 0):
            image_ids = [meta.image_id for batch in batches for meta in batch.meta]
            report = {
                "stage": self.stage,
                "epoch": self.epoch + 1,
                "step": self.step + 1,
                "loss": {name: str(value.item()) for name, value in losses.items()},
                "gradient_norm": str(norm.item()),
                "image_ids": image_ids,
            }
            raise NotFiniteError(
                f"the gradients became {norm.item()} in epoch {self.epoch + 1}, step {self.step + 1}, "
                f"on the images {', '.join(map(str, image_ids))}; lower the learning rate, or use --precision fp32",
                report,
            )

    def finish_step(self) -> None:
        """Count the step, and add its loss terms to those of the epoch."""
        self.step += 1
        for name, value in self.step_losses.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def mean_losses(self) -> dict[str, float]:
        """Each loss term, averaged over the steps of the current epoch and over the processes."""
        return {name: float(total) / self.step for name, total in self._shared_sums().items()}

    def finish_epoch(self) -> None:
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}

    def _shared_sums(self) -> dict[str, Tensor]:
        return self.accelerator.reduce(self.sums, "mean") if self.sums else {}

    def state_dict(self) -> dict:
        """Tensors and plain types, the same on all processes."""
        scaler = self.accelerator.scaler
        return {
            **{name: getattr(self, name) for name in ("stage", "epoch", "step", "seconds", "skipped")},
            "sums": self._shared_sums(),
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned. The learning rates remain those of this run."""
        for name in ("epoch", "step", "seconds", "skipped"):
            setattr(self, name, state[name])
        self.sums = {name: total.to(self.accelerator.device) for name, total in state["sums"].items()}
        self.detector.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        rates = self.schedule.base_lrs
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = rates
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def steps_an_epoch(loader: DataLoaderShard, accumulate: int) -> int:
    """How many steps of `accumulate` batches an epoch has; batches that make no whole step are left out."""
    return max(1, len(loader) // accumulate)
