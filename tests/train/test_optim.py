"""Learning rates and averaged weights over several cycles."""

import pytest
import torch
from torch import nn

from common.train.optim import Ema, cosine_schedule, cycle_ends


@pytest.mark.parametrize(("steps", "cycles"), [(100, 1), (100, 2), (101, 3), (8, 2)])
def test_the_learning_rate_falls_in_each_cycle_and_rises_between_them(steps, cycles):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    schedule, rates = cosine_schedule(optimizer, steps, cycles), []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm_up = round(0.05 * steps)
    rises = [step for step in range(warm_up + 1, steps) if rates[step] > rates[step - 1]]
    assert rises == cycle_ends(steps, cycles) and len(rises) == cycles - 1
    assert all(rates[step] > 0.9 for step in rises)


def test_the_average_is_that_of_the_ends_of_the_cycles():
    layer = nn.Linear(1, 1, bias=False)
    ema = Ema(layer, decay=0.0, cycle_ends=[2])
    applied = []
    for value in (1.0, 2.0, 6.0, 8.0):
        nn.init.constant_(layer.weight, value)
        ema.update()
        with ema.applied():
            applied.append(layer.weight.item())
        assert layer.weight.item() == value
        resumed = Ema(layer, decay=0.0, cycle_ends=[2])
        resumed.load_state_dict(ema.state_dict())
        ema = resumed
    assert applied == [1.0, 2.0, 4.0, 5.0]
