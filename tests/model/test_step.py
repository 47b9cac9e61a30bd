"""One training step: no wait for the device but one, and as many operations for a large batch as for a small one."""

from collections import Counter

import pytest
import torch
from helpers import SIMPLE_LOSS, pixels_of, random_targets
from torch.utils._python_dispatch import TorchDispatchMode

from common.model.backbone import BackboneFlags
from common.model.losses import DetectionLoss, LossConfig
from common.model.postprocess import fuse_predictions, select_detections
from common.train.optim import Ema, parameter_groups
from common.types import Targets

SIZE = 112
WAITS = {"nonzero", "_unique2", "unique_dim", "masked_select", "_local_scalar_dense", "is_nonzero", "bincount", "equal"}
DETECTORS = {
    "improved": ({"head": "pyramid", "second_look": 20, "dropout": 0.1}, LossConfig()),
    "simple": ({"head": "linear"}, SIMPLE_LOSS),
}


class Operations(TorchDispatchMode):
    """Counts the operations inside, and those whose result has to be known before the next one can begin."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and isinstance(args[1], list | tuple)
        if masked and any(part is not None and part.dtype == torch.bool for part in args[1]):
            name = "is_nonzero"  # an index by a mask is one by its nonzero places
        self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=DETECTORS)
def training(request, build):
    """A detector in training, and its loss."""
    options, config = DETECTORS[request.param]
    detector = build(**options).train()
    detector.backbone.set_trainable(BackboneFlags())
    return detector, DetectionLoss(config, torch.full((10,), 0.1))


def test_the_whole_step_passes_where_tensors_have_no_values(training):
    """On the device "meta" a wait raises, and so does a tensor of another device."""
    detector, criterion = (part.to("meta") for part in training)
    optimizer = torch.optim.AdamW(parameter_groups(detector, 1e-3, 1e-4, 0.05, 0.8), fused=False, foreach=True)
    average = Ema(detector, 0.99)
    targets = Targets(*(tensor.to("meta") for tensor in random_targets(3, seed=0, size=SIZE)))
    out = detector(torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8, device="meta"), targets)
    sum(criterion(out, targets, targets.counts()).values()).backward()
    torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
    optimizer.step()
    average.update()
    boxes, scores, labels = select_detections(*fuse_predictions(out))
    assert boxes.shape == (3, 100, 4) and scores.shape == labels.shape == (3, 100)


def test_a_step_has_as_many_operations_at_every_batch_and_no_wait(training):
    detector, criterion = training
    counts = []
    for batch in (2, 8, 32):
        targets = random_targets(batch, seed=1, size=SIZE)
        detector.zero_grad()
        with Operations() as step:
            sum(criterion(detector(pixels_of(batch, 3, SIZE, SIZE), targets), targets).values()).backward()
            torch.isfinite(torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0))
        counts.append((sum(step.names.values()), sum(step.names[name] for name in WAITS)))
    assert len(set(counts)) == 1 and counts[0][0] <= 1900 and counts[0][1] == 0
