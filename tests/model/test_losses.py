"""Assignment of objects to locations, and the losses of a batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import pixels_of, target_of
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from common.model.assignment import ASSIGNMENTS, Assignment, assign
from common.model.boxes import pairwise_iou
from common.model.heads import decode_boxes, locations
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, DetectionLoss, LossConfig
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


@by_assignment
def test_the_assignment_of_an_image_does_not_depend_on_its_batch(kind):
    """Nor on how far its objects are padded."""
    crowd = [False, False, False, True]
    many = target_of([[0, 0, 90, 90], [30, 30, 60, 70], [60, 0, 112, 40], [5, 5, 12, 9]], crowd=crowd)
    targets = many, target_of([[20, 20, 80, 80]]), target_of([])
    points, strides = grid(8)
    boxes = decode_boxes(torch.randn(3, 64, 4), points, strides)
    out = replace(output_of(boxes, points, strides), object_logits=torch.randn(3, 64))
    together = assigned_to(out, Targets.pad(targets), kind)
    for i, target in enumerate(targets):
        single = replace(out, object_logits=out.object_logits[i : i + 1], boxes=boxes[i : i + 1])
        alone = assigned_to(single, Targets.pad([target]), kind)
        assert all(torch.equal(one[i], other[0]) for one, other in zip(together, alone, strict=True))
    assert (together.object[2] == -1).all() and not together.ignored[1].any()


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
        objects = sigmoid_focal_loss(out.object_logits[kept], truth[kept], 0.25, 2, "sum")
    else:
        objects = F.binary_cross_entropy_with_logits(out.object_logits[kept], truth[kept], reduction="sum")
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


@pytest.mark.parametrize("boxes", [[], [[10, 10, 60, 60]]], ids=["no object", "one object"])
@pytest.mark.parametrize("second_look", [0, 20])
@torch.no_grad()
def test_parts_of_a_batch_have_its_loss_in_the_mean(boxes, second_look, build):
    """So that two processes, or two accumulated batches, train as one batch of twice the size."""
    detector, criterion = build("pyramid", second_look=second_look), DetectionLoss(LossConfig())
    images = pixels_of(4, 3, 112, 112)
    targets = [target_of(boxes), *[target_of([])] * 3]
    parts = [Targets.pad(targets[:2]), Targets.pad(targets[2:])]
    whole = criterion(detector(images, Targets.pad(targets)), Targets.pad(targets))
    counts = torch.stack([part.counts() for part in parts]).mean(0)  # as of accumulated batches and of processes
    halves = [criterion(detector(images[2 * i : 2 * i + 2], part), part, counts) for i, part in enumerate(parts)]
    means = {name: sum(half[name].item() for half in halves) / 2 for name in whole}
    assert means == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-5)
