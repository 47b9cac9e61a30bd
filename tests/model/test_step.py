"""One training step: no wait for the device but one, and as many operations for a large batch as for a small one."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import SIMPLE_LOSS, random_targets
from torch.utils._python_dispatch import TorchDispatchMode

from common.model.backbone import BackboneFlags
from common.model.detector import Detector, new_detector
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

    @property
    def waits(self):
        return sum(self.names[name] for name in WAITS)


@pytest.fixture(params=DETECTORS)
def training(request, tiny_backbone):
    """A detector in training, and its loss."""
    torch.manual_seed(0)
    options, config = DETECTORS[request.param]
    detector = new_detector(tiny_backbone, blocks=(2, 4), image_size=SIZE, num_classes=10, **options).train()
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


def operations(detector: Detector, criterion, batch):
    """Operations of a step outside backbone and heads, and the waits of the whole step but the finite check."""
    targets = random_targets(batch, seed=1, size=SIZE)
    pixels = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    with Operations() as forward:
        out = detector(pixels, targets)
    leaves = {name: leaf(getattr(out, name)) for name in ("object_logits", "class_logits", "boxes")}
    if out.second is not None:
        second = {name: leaf(getattr(out.second, name)) for name in ("object_logits", "class_logits", "boxes")}
        leaves["second"] = replace(out.second, **second)
    outside = Operations()
    with outside:
        if out.second is not None:
            detector.head.second_look.jitter(targets)
        loss = sum(criterion(replace(out, **leaves), targets).values())
        loss.backward()
    with Operations() as backward:
        sum(criterion(out, targets).values()).backward()
    with outside:
        norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        torch.isfinite(norm)
    return sum(outside.names.values()), outside.waits + forward.waits + backward.waits


def leaf(tensor):
    return tensor.detach().requires_grad_()


def test_a_step_has_as_many_operations_at_every_batch_and_no_wait(training):
    counts = {batch: operations(*training, batch) for batch in (2, 8, 32)}
    print(counts)
    assert len(set(counts.values())) == 1
    assert counts[2][0] <= 500 and counts[2][1] == 0
