"""Learning rates and weight decay of all weights, and averaged weights over several cycles."""

import pytest
import torch
from torch import nn

from common.model.backbone import BackboneFlags
from common.train.optim import Ema, Schedule, parameter_groups


@pytest.mark.parametrize(("steps", "cycles"), [(100, 1), (101, 3), (8, 2)])
def test_the_learning_rate_falls_in_each_cycle_and_rises_between_them(steps, cycles):
    schedule = Schedule(torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0), steps, 1, cycles)
    positions = [(schedule.set_rates(0, step), schedule.optimizer.param_groups[0]["lr"]) for step in range(steps)]
    numbers, rates = zip(*positions, strict=True)
    warm_up = round(0.05 * steps)
    rises = [step for step in range(warm_up + 1, steps) if rates[step] > rates[step - 1]]
    assert rises == [step for step in range(1, steps) if numbers[step] > numbers[step - 1]] and len(rises) == cycles - 1
    assert all(rates[step] > 0.9 for step in rises) and max(rates) <= 1 and min(rates) > 0
    assert sorted(rates[:warm_up]) == list(rates[:warm_up])


AVERAGES = {  # the horizon and the start's share; the weight after each step, its cycle, and the average then
    "ends of the cycles": (1e-9, 0.0, [(1.0, 0, 1.0), (2.0, 0, 2.0), (6.0, 1, 4.0), (8.0, 1, 5.0)]),
    "resumed with fewer cycles": (1e-9, 0.0, [(1.0, 0, 1.0), (2.0, 1, 1.5), (5.0, 0, 5.0), (7.0, 1, 6.0)]),
    "no average": (0.0, 0.0, [(1.0, 0, 1.0), (0.1, 1, 0.1)]),
    "young averages follow closely": (9.0, 0.0, [(11.0, 0, 10.0)]),
    "the start": (1e-9, 0.25, [(8.0, 0, 6.0), (16.0, 1, 9.0)]),
}


@pytest.mark.parametrize(("horizon", "share", "steps"), AVERAGES.values(), ids=AVERAGES)
def test_the_average_is_that_of_the_ends_of_the_cycles_also_after_a_resume(horizon, share, steps):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = Ema(layer, horizon, share)
    for value, cycle, expected in steps:
        nn.init.constant_(layer.weight, value)
        average.update(cycle)
        with average.applied():
            assert layer.weight.item() == pytest.approx(expected)
        assert layer.weight.item() == pytest.approx(value)
        state, average = average.state_dict(), Ema(layer, horizon, share)
        average.load_state_dict(state)


def test_rates_decay_by_depth_and_matrices_alone_have_weight_decay(detector):
    backbone = detector.backbone
    backbone.set_trainable(BackboneFlags(), 2)
    assert {backbone.block_of(name) for name, w in backbone.named_parameters() if w.requires_grad} == {3, 4}
    backbone.set_trainable(BackboneFlags())
    groups = parameter_groups(detector, 1e-2, 1e-3, 0.1, layer_decay=0.5)
    of = {id(weight): group for group in groups for weight in group["params"]}
    for name, weight in backbone.named_parameters():
        if not name.endswith("mask_token"):
            assert of[id(weight)]["lr"] == pytest.approx(1e-3 * 0.5 ** (4 - backbone.block_of(name)))
    assert {of[id(weight)]["lr"] for weight in detector.head.parameters()} == {1e-2}
    trained = {name: weight for name, weight in detector.named_parameters() if id(weight) in of}
    undecayed = {name for name, weight in trained.items() if of[id(weight)]["weight_decay"] == 0}
    embeddings = ("cls_token", "position_embeddings")
    assert undecayed == {name for name, weight in trained.items() if weight.ndim == 1 or name.endswith(embeddings)}
