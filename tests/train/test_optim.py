"""Learning rates as functions of the step, and averaged weights over several cycles."""

import pytest
import torch
from torch import nn

from common.train.optim import Ema, Schedule


def schedule_of(epochs, epoch_steps, cycles=1, lr=1.0):
    return Schedule(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr), epochs, epoch_steps, cycles)


@pytest.mark.parametrize(("steps", "cycles"), [(100, 1), (100, 2), (101, 3), (8, 2)])
def test_the_learning_rate_falls_in_each_cycle_and_rises_between_them(steps, cycles):
    schedule = schedule_of(steps, 1, cycles)
    numbers, rates = zip(*map(schedule.at, range(steps)), strict=True)
    warm_up = round(0.05 * steps)
    rises = [step for step in range(warm_up + 1, steps) if rates[step] > rates[step - 1]]
    assert rises == [step for step in range(1, steps) if numbers[step] > numbers[step - 1]] and len(rises) == cycles - 1
    assert all(rates[step] > 0.9 for step in rises) and max(rates) <= 1
    assert sorted(rates[:warm_up]) == list(rates[:warm_up])


def test_rates_depend_on_the_position_alone():
    """A resumed run with twice the batch has half the steps, and ends where it would have ended."""
    few, many = schedule_of(4, 10, lr=0.5), schedule_of(4, 20, lr=0.5)
    for epoch in (2, 3):
        for step in range(10):
            few.set_rates(epoch, step)
            many.set_rates(epoch, 2 * step)
            ours, theirs = (s.optimizer.param_groups[0]["lr"] for s in (few, many))
            assert ours == pytest.approx(theirs, abs=0.02)
    assert 0 < ours < 0.01


def test_the_average_is_that_of_the_ends_of_the_cycles():
    layer = nn.Linear(1, 1, bias=False)
    average, applied = Ema(layer, decay=1e-9), []
    for value, cycle in ((1.0, 0), (2.0, 0), (6.0, 1), (8.0, 1)):
        nn.init.constant_(layer.weight, value)
        average.update(cycle)
        with average.applied():
            applied.append(layer.weight.item())
        assert layer.weight.item() == value
        resumed = Ema(layer, decay=1e-9)
        resumed.load_state_dict(average.state_dict())
        average = resumed
    assert applied == pytest.approx([1.0, 2.0, 4.0, 5.0])


def test_without_decay_the_average_is_the_weights():
    layer = nn.Linear(1, 1, bias=False)
    average = Ema(layer, decay=0.0)
    for value, cycle in ((1.0, 0), (0.1, 1)):
        nn.init.constant_(layer.weight, value)
        average.update(cycle)
        with average.applied():
            assert torch.equal(layer.weight, torch.full((1, 1), value))


def test_a_resumed_run_with_fewer_cycles_averages_no_ends_of_the_former_ones():
    layer = nn.Linear(1, 1, bias=False)
    average = Ema(layer, decay=1e-9)
    for value, cycle, expected in ((1.0, 0, 1.0), (2.0, 1, 1.5), (5.0, 0, 5.0), (7.0, 1, 6.0)):
        nn.init.constant_(layer.weight, value)
        average.update(cycle)
        with average.applied():
            assert layer.weight.item() == pytest.approx(expected)
