"""The second look: pooling, proposals, examples, its loss, and what both looks say together."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import pixels_of, target_of
from torch.nn import functional as F
from torchvision.ops import box_iou

from common.model.boxes import MAX_LOG_SCALE, apply_deltas
from common.model.losses import DetectionLoss, LossConfig
from common.model.postprocess import Fusion, fuse_predictions
from common.model.roi_head import NUM_JITTERED, jittered_boxes, roi_pool, select_proposals
from common.types import Targets


@pytest.fixture
def looking(build):
    """A detector with a second look, its boxes and names not those of the first."""
    detector = build("pyramid", dropout=0.1, second_look=20)
    for layer in (detector.head.second_look.classify, detector.head.second_look.predict):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return detector


def loss_of(out, targets, shares=None):
    return DetectionLoss(LossConfig(), shares)(out, targets)


def test_pooling_is_the_mean_of_the_interpolated_map():
    """The reference averages many samples of a bilinear interpolation."""
    torch.manual_seed(0)
    features, steps = torch.randn(1, 6, 8, 3), 64
    boxes = torch.tensor([[[14.0, 21, 90, 60], [30, 30, 37, 33], [7, 7, 105, 77]]])
    pooled = roi_pool(features, boxes, 2, 14)
    assert pooled.shape == (1, 3, 4, 3)
    centers = (torch.arange(2 * steps) + 0.5) / (2 * steps)
    for (x1, y1, x2, y2), means in zip(boxes[0].tolist(), pooled[0], strict=True):
        x, y = x1 + (x2 - x1) * centers, y1 + (y2 - y1) * centers
        grid = torch.stack(torch.meshgrid(x / (8 * 14), y / (6 * 14), indexing="xy"), dim=-1) * 2 - 1
        samples = F.grid_sample(features.permute(0, 3, 1, 2), grid[None], align_corners=False)
        expected = F.avg_pool2d(samples, steps).flatten(2)[0].T
        assert torch.allclose(means, expected, atol=2e-3)
    beyond = torch.tensor([[[-40.0, -40, 28, 28], [0, 0, 1e-3, 1e-3], [40, 40, 200, 200], [300, 300, 400, 400]]])
    pooled = roi_pool(torch.full((1, 4, 4, 1), 5.0), beyond, 1, 14).flatten()  # what is outside the map does not count
    assert torch.allclose(pooled, torch.tensor([5.0, 5, 5, 0]))


def test_proposals_are_the_best_boxes_after_nms_and_always_as_many(looking):
    with torch.no_grad():
        out = looking.head.dense(looking.backbone(pixels_of(2, 3, 112, 112)))
    locations = select_proposals(out, 30)
    assert locations.shape == (2, 30)
    for image in range(2):
        order = out.objectness_logits[image].argsort(descending=True)
        iou = box_iou(out.boxes[image][order], out.boxes[image][order])
        kept = [int(order[i]) for i in range(len(order)) if not (iou[i, :i] > 0.7).any()]
        assert locations[image].tolist()[: len(kept)] == kept[:30] and len(kept) > 10
        assert len(locations[image].unique()) == 30
    assert select_proposals(out, 10_000).shape == out.objectness_logits.shape


def test_jittered_boxes_lie_near_the_objects_in_turn():
    many = target_of([[10, 10, 60, 50], [20, 30, 40, 90], [0, 0, 9, 9]], crowd=[False, False, True])
    torch.manual_seed(0)
    boxes = jittered_boxes(Targets.pad([many, target_of([])]))
    assert boxes.shape == (2, NUM_JITTERED, 4)
    iou = box_iou(boxes[0], many.boxes[:2])
    assert torch.equal(iou.argmax(1), torch.arange(NUM_JITTERED) % 2)
    best = iou.amax(1)
    assert best.min() > 0.3 and (best > 0.5).float().mean() > 0.6 and len(boxes[0].unique(dim=0)) == NUM_JITTERED
    assert (boxes[1, :, 2:] > boxes[1, :, :2]).all()


def test_moved_boxes_are_never_inverted_or_infinite():
    boxes = apply_deltas(torch.tensor([[10.0, 10, 30, 50]]).repeat(100, 1), torch.randn(100, 4) * 1000)
    assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert apply_deltas(torch.tensor([10.0, 10, 30, 50]), torch.zeros(4)).tolist() == [10, 10, 30, 50]
    assert apply_deltas(torch.zeros(4), torch.full((4,), MAX_LOG_SCALE)).isfinite().all()


@torch.no_grad()
def test_predictions_depend_neither_on_the_batch_nor_on_the_boxes_around_the_objects(looking):
    images, targets = pixels_of(3, 3, 112, 112), Targets.pad([target_of([[9, 9, 70, 80]])] * 3)
    scores, boxes = fuse_predictions(looking(images))
    assert scores.shape == (3, 20, 10) and boxes.shape == (3, 20, 4)
    more = looking.head(looking.backbone(images), targets)
    assert more.second.proposals.shape[1] == 20 + NUM_JITTERED
    singles = [fuse_predictions(looking(images[i : i + 1])) for i in range(3)]
    for others in (fuse_predictions(more), map(torch.cat, zip(*singles, strict=True))):
        for ours, theirs, close in zip(others, (scores, boxes), (1e-5, 1e-3), strict=True):
            assert torch.allclose(ours, theirs, atol=close)


@torch.no_grad()
@pytest.mark.parametrize(("training", "shift"), [(False, 0.15), (True, 0.1)])
def test_boxes_are_the_mean_of_one_and_of_two_refinements_and_in_training_of_one(looking, training, shift):
    predict = looking.train(training).head.second_look.predict
    predict.weight.zero_()
    predict.bias.copy_(torch.tensor([0, 0.1, 0, 0, 0]))  # a tenth of the box to the right
    second = looking(pixels_of(1, 3, 112, 112)).second
    widths = (second.proposals[..., 2] - second.proposals[..., 0]).clamp(min=1)
    assert torch.allclose((second.boxes - second.proposals)[..., 0], shift * widths, atol=1e-3)


def test_both_looks_share_the_scores(looking):
    with torch.no_grad():
        out = looking(pixels_of(1, 3, 112, 112))
    fusion = Fusion(0.8, 1.5)
    scores, boxes = fuse_predictions(out, fusion)
    assert torch.equal(boxes, out.second.boxes)
    best = out.second.locations[0]
    first, second = out.objectness_logits[0, best].sigmoid(), out.second.objectness_logits[0].sigmoid()
    mean = first**0.6 * second**0.4
    assert torch.allclose(scores[0].sum(1), mean, atol=1e-5)  # over all classes
    silent = replace(out, second=replace(out.second, class_logits=torch.zeros_like(out.second.class_logits)))
    expected = (out.class_logits[0, out.class_rows[best]] * 0.2 / 1.5).softmax(-1)
    assert torch.allclose(fuse_predictions(silent, fusion)[0][0] / mean[:, None], expected, atol=1e-5)


def test_with_logit_adjustment_frequency_alone_teaches_no_preference(looking, monkeypatch):
    """Where the features tell nothing, the gradient pulls towards frequent classes unless their shares are given."""
    shares = torch.full((10,), 0.1 / 9).index_fill(0, torch.tensor(3), 0.9)
    targets = Targets.pad([target_of([[10, 10, 60, 60]], labels=[3])])
    out = looking(pixels_of(1, 3, 112, 112), targets)
    out.second.class_logits.data.zero_()
    monkeypatch.setattr("common.model.losses.LOGIT_ADJUSTMENT", 1.0)
    plain, adjusted = (loss_of(out, targets, given)["second class"].item() for given in (None, shares))
    assert plain / adjusted == pytest.approx(math.log(10) / -math.log(0.9), rel=1e-3)


def test_boxes_in_a_crowd_are_not_background(looking):
    out = looking(pixels_of(1, 3, 112, 112), Targets.pad([target_of([[10, 10, 40, 40]])]))
    in_crowd = target_of([[-300, -300, 400, 400]], crowd=[True])
    assert loss_of(out, Targets.pad([in_crowd]))["second object"] == 0
    assert loss_of(out, Targets.pad([target_of([])]))["second object"] > 0
