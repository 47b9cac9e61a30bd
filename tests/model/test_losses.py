"""Assignment of objects to locations, the losses of a batch, and a whole step of training."""

import itertools

import pytest
import torch
from helpers import SIMPLE_LOSS, pixels_of, random_targets, target_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from common.model.assignment import ASSIGNMENTS, Assignment, assign
from common.model.backbone import BackboneFlags
from common.model.boxes import pairwise_iou
from common.model.heads import decode_boxes, locations
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, DetectionLoss, LossConfig
from common.model.postprocess import fuse_predictions, select_detections
from common.train.optim import Ema, parameter_groups
from common.types import RawOutput, Targets

by_assignment = pytest.mark.parametrize("kind", ASSIGNMENTS)


def grid(side, stride=14):
    return locations((side, side), stride, torch.device("cpu"))


def output_of(boxes, points, strides):
    """A `RawOutput` that predicts these boxes (B, L, 4), no object and no class."""
    shape, rows = boxes.shape[:2], torch.arange(len(points))
    return RawOutput(torch.zeros(shape), torch.zeros(*shape, 10), rows, boxes, points, strides, strides.unique())


def assigned_to(out, targets, kind):
    return assign(out, pairwise_iou(targets.boxes, out.boxes), targets, kind)


def assign_patches(target, kind="center", boxes=None):
    """The assignment of one image on 8 x 8 patches, where every location predicts a box of one patch by default."""
    points, strides = grid(8)
    boxes = decode_boxes(torch.zeros(64, 4), points, strides) if boxes is None else boxes
    return Assignment(*(part[0] for part in assigned_to(output_of(boxes[None], *grid(8)), Targets.pad([target]), kind)))


def test_assignment_prefers_the_smallest_box_and_omits_none():
    assigned = assign_patches(target_of([[0, 0, 112, 112], [28, 28, 84, 84], [100, 1, 103, 4]])).object.reshape(8, 8)
    assert assigned[3, 3] == 1 and assigned[2, 2] == 0  # within the inner box's central half, and outside it
    assert assigned[0, 7] == 2  # smaller than the grid: the nearest location
    assert assigned[7, 0] == -1


@by_assignment
def test_crowds_are_neither_object_nor_background(kind):
    assigned = assign_patches(target_of([[0, 0, 56, 56], [70, 70, 112, 112]], crowd=[True, False]), kind)
    assert assigned.ignored.reshape(8, 8)[:4, :4].all() and assigned.ignored.sum() == 16
    assert set(assigned.object.tolist()) == {-1, 0}  # the one object


@by_assignment
def test_every_object_gets_a_location_and_larger_ones_a_coarser_level(kind):
    """Boxes of 1, 21, 60 and 224 pixels on four levels."""
    target = target_of([[50, 50, 51, 51], [100, 100, 121, 121], [150, 20, 210, 80], [0, 0, 224, 224]], size=224)
    levels = [grid(32 >> i, 7 * 2**i) for i in range(4)]
    points, strides = (torch.cat(parts) for parts in zip(*levels, strict=True))
    boxes = decode_boxes(torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(points), 1), points, strides)
    assigned = assigned_to(output_of(boxes[None], points, strides), Targets.pad([target]), kind)
    assert set(assigned.object[0].tolist()) == {-1, 0, 1, 2, 3}
    assert ((assigned.quality > 0) <= (assigned.object >= 0)).all() and assigned.quality.max() <= 1
    side = [strides[assigned.object[0] == i].median() for i in range(4)]
    assert side[1:] == sorted(side[1:])
    assert side[3] == (28 if kind == "task-aligned" else 56)  # which takes more locations than the coarsest level has


def test_aligned_assignment_follows_the_predictions():
    """The location in a box with the best prediction of it has the highest quality, its IoU."""
    boxes = decode_boxes(torch.zeros(64, 4), *grid(8))
    boxes[17] = torch.tensor([0.0, 0.0, 112.0, 84.0])
    assigned = assign_patches(target_of([[0, 0, 112, 112]]), "task-aligned", boxes)
    assert assigned.quality.argmax() == 17 and assigned.quality[17] == pytest.approx(0.75)
    assert (assigned.object == 0).sum() == 40


@pytest.mark.parametrize("boxes", BOX_LOSSES)
@pytest.mark.parametrize("scores", SCORE_LOSSES)
@torch.no_grad()
def test_losses_are_those_of_torch_and_torchvision(scores, boxes, detector):
    """Over the positive locations, divided by what so many objects usually have; crowds are left out."""
    crowd = target_of([[0, 0, 56, 56], [70, 70, 112, 112]], [2, 5], crowd=[True, False])
    targets = Targets.pad([target_of([[9, 9, 60, 60], [50, 40, 108, 100]], labels=[3, 7]), crowd])
    out = detector(pixels_of(2, 3, 112, 112))
    assigned = assigned_to(out, targets, "center")
    where = assigned.object >= 0
    images, index = where.nonzero()[:, 0], assigned.object[where]
    truth, kept = assigned.quality if scores == "quality" else where.float(), ~assigned.ignored
    entropy = F.cross_entropy(out.class_logits[where], targets.labels[images, index], reduction="none")
    found, true = out.boxes[where], targets.boxes[images, index]
    if scores == "focal":
        entropy = entropy * (1 - (-entropy).exp()) ** 2
        objects = sigmoid_focal_loss(out.objectness_logits[kept], truth[kept], 0.25, 2, "sum")
    else:
        objects = F.binary_cross_entropy_with_logits(out.objectness_logits[kept], truth[kept], reduction="sum")
    unit = (true[:, 2:] - true[:, :2]).repeat(1, 2)
    smooth = F.smooth_l1_loss(found / unit, true / unit, reduction="none", beta=0.1).sum(1)
    places = generalized_box_iou_loss(found, true) if boxes == "giou" else smooth
    sums = {"object": objects, "class": (entropy * truth[where]).sum(), "box": 3.0 * (places * truth[where]).sum()}
    usual = 2.4 if scores == "quality" else 15.0  # of an object
    losses = DetectionLoss(LossConfig("center", scores, boxes, 3.0))(out, targets)
    assert losses == {name: pytest.approx(value.item() / (3 * usual), rel=1e-5) for name, value in sums.items()}
    assert len(images) > 3 and assigned.ignored.any()


DEGENERATE = [[0, 0, 112, 112], [5, 5, 5, 5], [20, 20, 20, 60], [80, 80, 60, 60], [-1e4, -1e4, 1e5, 1e5], [300] * 4]
BATCHES = {
    "degenerate": [target_of(DEGENERATE), target_of([])],
    "no objects": [target_of([]), target_of([])],
    "a crowd": [target_of([]), target_of([[0, 0, 112, 112]], crowd=[True])],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("head", "second_look"), [("linear", 0), ("pyramid", 20)])
def test_losses_and_gradients_of_degenerate_boxes_and_of_none_are_finite(head, second_look, batch, build):
    detector, targets = build(head, second_look=second_look).train(), Targets.pad(BATCHES[batch])
    for kinds in itertools.product(ASSIGNMENTS, SCORE_LOSSES, BOX_LOSSES):
        detector.zero_grad()
        losses = DetectionLoss(LossConfig(*kinds))(detector(pixels_of(2, 3, 112, 112), targets), targets)
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()), (kinds, losses)
        assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None), kinds
        if batch != "degenerate":
            assert losses["class"] == losses["box"] == 0 and losses["object"] > 0


MANY = target_of([[0, 0, 90, 90], [30, 30, 60, 70], [60, 0, 112, 40], [5, 5, 12, 9]], crowd=[False] * 3 + [True])
PARTS = [[target_of([])] * 4, [MANY, target_of([[20, 20, 80, 80]]), target_of([]), target_of([[10, 10, 60, 60]])]]


@by_assignment
@pytest.mark.parametrize("targets", PARTS, ids=["no object", "objects"])
@pytest.mark.parametrize("second_look", [0, 20])
@torch.no_grad()
def test_parts_of_a_batch_have_its_loss_in_the_mean(targets, second_look, kind, build, monkeypatch):
    """So that processes, or accumulated batches, train as one; nothing depends on how far objects are padded."""
    monkeypatch.setattr(torch, "rand_like", lambda boxes: torch.full_like(boxes, 0.4))  # the same shifts in both
    detector, criterion = build("pyramid", second_look=second_look), DetectionLoss(LossConfig(kind))
    images, whole, parts = pixels_of(4, 3, 112, 112), Targets.pad(targets), [Targets.pad([one]) for one in targets]
    expected = criterion(detector(images, whole), whole)
    counts = torch.stack([part.counts() for part in parts]).mean(0)  # as of accumulated batches and of processes
    losses = [criterion(detector(images[i : i + 1], part), part, counts) for i, part in enumerate(parts)]
    means = {name: sum(loss[name].item() for loss in losses) / 4 for name in expected}
    assert means == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


DETECTORS = {
    "improved": ({"head": "pyramid", "second_look": 20, "dropout": 0.1}, LossConfig()),
    "simple": ({"head": "linear"}, SIMPLE_LOSS),
}


class Operations(TorchDispatchMode):
    """Counts the operations inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
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
    average = Ema(detector, 100)
    targets = Targets(*(tensor.to("meta") for tensor in random_targets(3, seed=0, size=112)))
    out = detector(torch.zeros(3, 3, 112, 112, dtype=torch.uint8, device="meta"), targets)
    sum(criterion(out, targets, targets.counts()).values()).backward()
    torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
    optimizer.step()
    average.update()
    boxes, scores, labels = select_detections(*fuse_predictions(out))
    assert boxes.shape == (3, 100, 4) and scores.shape == labels.shape == (3, 100)


def test_a_step_has_as_many_operations_at_every_batch(training):
    detector, criterion = training
    counts = []
    for batch in (2, 8, 32):
        targets = random_targets(batch, seed=1, size=112)
        detector.zero_grad()
        with Operations() as step:
            sum(criterion(detector(pixels_of(batch, 3, 112, 112), targets), targets).values()).backward()
            torch.isfinite(torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0))
        counts.append(step.count)
    assert counts[0] == counts[1] == counts[2] <= 1900
