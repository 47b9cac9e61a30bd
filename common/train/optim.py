"""Learning rates of all weights, and the moving average of the weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from common.model.detector import Detector

WARM_UP_SHARE = 0.05  # of all steps


def parameter_groups(
    detector: Detector, lr: float, backbone_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """The trained weights, grouped by learning rate and weight decay; only matrices have weight decay.

    Args:
        detector: its weights that require a gradient are trained.
        lr: learning rate of the head and the second look.
        backbone_lr: learning rate of the backbone's last block and final norm.
        weight_decay: of the matrices.
        layer_decay: the rate of each block is that of the following one times this (BEiT, arXiv 2106.08254).
    """
    rates, depth = dict.fromkeys(detector.state_dict(), lr), detector.backbone.depth
    for name, _ in detector.backbone.named_parameters():
        rates[f"backbone.{name}"] = backbone_lr * layer_decay ** (depth - detector.backbone.block_of(name))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in detector.named_parameters():
        if weight.requires_grad:
            groups.setdefault((rates[name], weight_decay if weight.ndim > 1 else 0.0), []).append(weight)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()]


class Ema:
    """An exponential moving average of a detector's trained weights, which varies less than the weights themselves.

    Where the learning rate has several cycles, the averages at their ends are averaged with equal weight: the weights
    found by different cycles generalise better together (stochastic weight averaging, arXiv 1803.05407).

    Args:
        detector: its weights that require a gradient are averaged.
        decay: of the average at each step; lower in the first steps, which reduces the share of the initial weights.
        cycle_ends: steps after which a cycle of the learning rate ends, apart from the last.
    """

    def __init__(self, detector: nn.Module, decay: float, cycle_ends: Sequence[int] = ()):
        self.trained: list[Tensor] = [p for p in detector.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.trained]
        self.ends: list[list[Tensor]] = []  # the averages at the ends of the cycles so far
        self.decay, self.cycle_ends, self.steps = decay, cycle_ends, 0

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.trained, 1 - decay)
        if self.steps in self.cycle_ends:
            self.ends.append([value.clone() for value in self.average])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the detector has the averaged weights; afterwards its own are restored."""
        own = [p.detach().clone() for p in self.trained]
        self._load([torch.stack(values).mean(0) for values in zip(*self.ends, self.average, strict=True)])
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: list[Tensor]) -> None:
        for weight, value in zip(self.trained, weights, strict=True):
            weight.copy_(value)

    def state_dict(self) -> dict:
        return {"average": self.average, "ends": self.ends, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.average, *self.ends = [
            [value.to(own) for value, own in zip(values, self.trained, strict=True)]
            for values in (state["average"], *state["ends"])
        ]
        self.steps = state["steps"]


def cosine_schedule(optimizer: Optimizer, steps: int, cycles: int = 1) -> LambdaLR:
    """Linear warm-up from 0 over the first `WARM_UP_SHARE` of `steps`, then half a cosine to 0, `cycles` times."""
    return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, _warm_up(steps), steps, cycles)


def cycle_ends(steps: int, cycles: int) -> list[int]:
    """The number of steps after which each cycle of `cosine_schedule` but the last ends."""
    annealed = steps - _warm_up(steps)
    return [_warm_up(steps) + math.ceil(annealed * number / cycles) for number in range(1, cycles)]


def _warm_up(steps: int) -> int:
    return round(WARM_UP_SHARE * steps)
