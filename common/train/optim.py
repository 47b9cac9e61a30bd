"""Learning rates of all weights as functions of the step, and the moving average of the weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.model.detector import Detector

WARM_UP_SHARE = 0.05  # of all steps


def parameter_groups(
    detector: Detector, lr: float, backbone_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """The weights that require a gradient, grouped by block and weight decay, whatever their rates.

    Only matrices have weight decay: no biases, norms, scales, and no class token, register tokens or position
    embeddings, as in timm and DINOv2. The head learns at `lr`, the backbone's last block and final norm at
    `backbone_lr`, and each block at the rate of the following one times `layer_decay` (BEiT, arXiv 2106.08254).
    """
    backbone = detector.backbone
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in detector.named_parameters():
        if weight.requires_grad:
            block = backbone.block_of(name) if name.startswith("backbone.") else math.inf
            is_embedding = ".embeddings." in name and ".patch_embeddings." not in name
            groups.setdefault((block, weight.ndim > 1 and not is_embedding), []).append(weight)
    return [
        {
            "params": weights,
            "lr": lr if block == math.inf else backbone_lr * layer_decay ** (backbone.depth - block),
            "weight_decay": weight_decay * is_matrix,
        }
        for (block, is_matrix), weights in groups.items()
    ]


class Schedule:
    """Linear warm-up over the first `WARM_UP_SHARE` of the steps, then half a cosine to 0, `cycles` times.

    The highest rates are those of the optimizer's groups. A function of the position alone: nothing of it is saved, so
    a resumed run may have other rates, another number of epochs, or other batches.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, epoch_steps: int, cycles: int = 1):
        self.optimizer, self.cycles = optimizer, cycles
        self.epoch_steps, self.steps = epoch_steps, epochs * epoch_steps
        self.highest = [group["lr"] for group in optimizer.param_groups]

    def set_rates(self, epoch: int, step: int) -> int:
        """Set the learning rates of a step of an epoch, both counted from 0, and return the number of its cycle."""
        position, warm_up = epoch * self.epoch_steps + step, round(WARM_UP_SHARE * self.steps)
        cycle, share = 0, (position + 1) / (warm_up + 1)
        if position >= warm_up:
            cycle, position = divmod(self.cycles * (position - warm_up), self.steps - warm_up)
            share = 0.5 * (1 + math.cos(math.pi * position / (self.steps - warm_up)))
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * share
        return cycle


class Ema:
    """An exponential moving average of the weights of a module that require a gradient.

    Where the learning rate has several cycles, the averages at their ends are averaged with equal weight: the weights
    found by different cycles generalise better together (stochastic weight averaging, arXiv 1803.05407). It reaches
    back `horizon` steps, in the first steps fewer, which reduces the share of the initial weights; with 0 none.
    `start_share` of the result are the initial weights all the same, which have not overfitted (arXiv 2109.01903).
    """

    def __init__(self, module: nn.Module, horizon: float, start_share: float = 0.0):
        self.trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.start, now = ([p.detach().clone() for p in self.trained] for _ in range(2))
        self.averages = {0: now}  # of each cycle, at its end or now
        self.decay, self.steps, self.start_share = horizon / (1 + horizon), 0, start_share

    @torch.no_grad()
    def update(self, cycle: int = 0) -> None:
        """Average in the weights after a step of a cycle, which begins with the average of the former."""
        latest = self.averages[max(self.averages)]
        if self.decay == 0 or cycle < max(self.averages):  # fewer cycles than before the run was resumed
            self.averages = {cycle: latest}
        elif cycle not in self.averages:
            self.averages[cycle] = [value.clone() for value in latest]
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.averages[cycle], self.trained, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged weights; afterwards its own are restored."""
        own = [p.detach().clone() for p in self.trained]
        means = [torch.stack(values).mean(0) for values in zip(*self.averages.values(), strict=True)]
        self._load(torch._foreach_lerp(means, self.start, self.start_share))
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: Iterable[Tensor]) -> None:
        for weight, value in zip(self.trained, weights, strict=True):
            weight.copy_(value)

    def state_dict(self) -> dict:
        return {"start": self.start, "averages": self.averages, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.start, self.steps = self._placed(state["start"]), state["steps"]
        self.averages = {cycle: self._placed(weights) for cycle, weights in state["averages"].items()}

    def _placed(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights on the devices of the module's."""
        return [weight.to(own.device) for weight, own in zip(weights, self.trained, strict=True)]
