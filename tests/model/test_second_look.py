"""The second look: pooling, proposals, examples, its loss, and what both looks say together."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import target_of
from torch.nn import functional as F
from torchvision.ops import box_iou

from common.model.boxes import MAX_LOG_SCALE, apply_deltas
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import new_detector
from common.model.losses import DetectionLoss, LossConfig
from common.model.postprocess import CLASS_TEMPERATURE, SECOND_CLASS_SHARE, SECOND_OBJECT_SHARE, fuse_predictions
from common.model.second_look import NUM_JITTERED, JitteredBoxes, roi_pool, select_proposals
from common.types import Targets

NAMES, IDS = tuple("abcdefghij"), tuple(range(10))


@pytest.fixture
def looking(tiny_backbone):
    """A detector with a second look, its boxes and names not those of the first."""
    torch.manual_seed(0)
    options = {"blocks": (2, 4), "image_size": 112, "num_classes": 10, "dropout": 0.1}
    detector = new_detector(tiny_backbone, head="pyramid", **options, second_look=20).eval()
    for layer in (detector.head.second_look.classify, detector.head.second_look.predict):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return detector


def pixels_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def loss_of(out, targets, config=LossConfig(), shares=None):  # noqa: B008  (frozen)
    return DetectionLoss(config, shares)(out, targets)


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


def test_pooling_ignores_what_is_outside_the_map():
    features = torch.full((1, 4, 4, 1), 5.0)
    boxes = torch.tensor([[[-40.0, -40, 28, 28], [0, 0, 1e-3, 1e-3], [40, 40, 200, 200], [300, 300, 400, 400]]])
    pooled = roi_pool(features, boxes, 1, 14).flatten()
    assert torch.allclose(pooled, torch.tensor([5.0, 5, 5, 0]))


def test_proposals_are_the_best_boxes_after_nms_and_always_as_many(looking):
    with torch.no_grad():
        out = looking.head.dense(looking.backbone(pixels_of(2, 3, 112, 112)))
    locations = select_proposals(out, 30)
    assert locations.shape == (2, 30)
    for image in range(2):
        order = out.object_logits[image].argsort(descending=True)
        iou = box_iou(out.boxes[image][order], out.boxes[image][order])
        kept = [int(order[i]) for i in range(len(order)) if not (iou[i, :i] > 0.7).any()]
        assert locations[image].tolist()[: len(kept)] == kept[:30] and len(kept) > 10
        assert len(locations[image].unique()) == 30
    assert select_proposals(out, 10_000).shape == out.object_logits.shape


def test_jittered_boxes_are_the_objects_and_boxes_near_them():
    many = target_of([[10, 10, 60, 50], [20, 30, 40, 90], [0, 0, 9, 9]], crowd=[False, False, True])
    boxes = JitteredBoxes()(Targets.pad([many, target_of([])]))
    assert boxes.shape == (2, NUM_JITTERED, 4)
    assert torch.equal(boxes[0, :2], many.boxes[:2])
    iou = box_iou(boxes[0], many.boxes[:2])
    assert torch.equal(iou.argmax(1), torch.arange(NUM_JITTERED) % 2)
    best = iou.amax(1)
    assert best.min() > 0.3 and (best > 0.5).float().mean() > 0.8 and len(boxes[0].unique(dim=0)) == NUM_JITTERED
    assert (boxes[1, :, 2:] > boxes[1, :, :2]).all()
    assert torch.equal(boxes, JitteredBoxes()(Targets.pad([many, target_of([])])))


def test_moved_boxes_are_never_inverted_or_infinite():
    boxes = apply_deltas(torch.tensor([[10.0, 10, 30, 50]]).repeat(100, 1), torch.randn(100, 4) * 1000)
    assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert apply_deltas(torch.tensor([10.0, 10, 30, 50]), torch.zeros(4)).tolist() == [10, 10, 30, 50]
    assert apply_deltas(torch.zeros(4), torch.full((4,), MAX_LOG_SCALE)).isfinite().all()


def test_batched_equals_single_and_cached_equals_uncached(looking):
    images = pixels_of(3, 3, 112, 112)
    with torch.no_grad():
        scores, boxes = fuse_predictions(looking(images))
        assert scores.shape == (3, 20, 10) and boxes.shape == (3, 20, 4)
        for i in range(3):
            single_scores, single_boxes = fuse_predictions(looking(images[i : i + 1]))
            assert torch.allclose(single_scores[0], scores[i], atol=1e-5)
            assert torch.allclose(single_boxes[0], boxes[i], atol=1e-3)
        cached_scores, cached_boxes = fuse_predictions(looking.head(looking.backbone(images)))
    assert torch.equal(cached_scores, scores) and torch.equal(cached_boxes, boxes)


def test_boxes_around_the_objects_leave_the_predictions_as_they_are(looking):
    images, targets = pixels_of(2, 3, 112, 112), Targets.pad([target_of([[9, 9, 70, 80]])] * 2)
    with torch.no_grad():
        plain, more = looking(images), looking(images, targets)
    assert torch.equal(more.second.proposals[:, :NUM_JITTERED], JitteredBoxes()(targets))
    for ours, theirs in zip(fuse_predictions(more), fuse_predictions(plain), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_both_looks_share_the_scores(looking):
    with torch.no_grad():
        out = looking(pixels_of(1, 3, 112, 112))
    scores, boxes = fuse_predictions(out)
    assert torch.equal(boxes, out.second.boxes)
    assert (scores >= 0).all() and (scores.sum(2) <= 1).all()
    best = out.second.locations[0]
    first, second = out.object_logits[0, best].sigmoid(), out.second.object_logits[0].sigmoid()
    mean = first ** (1 - SECOND_OBJECT_SHARE) * second**SECOND_OBJECT_SHARE
    assert torch.allclose(scores[0].sum(1), mean, atol=1e-5)  # over all classes
    silent = replace(out, second=replace(out.second, class_logits=torch.zeros_like(out.second.class_logits)))
    logits = out.class_logits[0, out.class_rows[best]]
    assert torch.equal(fuse_predictions(silent)[0].argmax(2)[0], logits.argmax(1))
    expected = (logits * (1 - SECOND_CLASS_SHARE) / CLASS_TEMPERATURE).softmax(-1)
    assert torch.allclose(fuse_predictions(silent)[0][0] / mean[:, None], expected, atol=1e-5)


def test_the_loss_teaches_names_boxes_and_scores(looking):
    """A few steps on one image: the second look comes to name, place and score its objects."""
    torch.manual_seed(0)
    target = target_of([[10, 10, 60, 60], [50, 40, 108, 100]], labels=[3, 7])
    features, targets = torch.randn(1, 8, 8, 2 * 48), Targets.pad([target])
    torch.nn.init.zeros_(looking.head.second_look.predict.weight)
    optimizer = torch.optim.Adam(looking.head.second_look.parameters(), 1e-3)
    terms = []
    for _ in range(150):
        losses = loss_of(looking.head(features, targets), targets)
        terms.append({name: value.item() for name, value in losses.items() if name.startswith("second")})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert terms[0].keys() == {"second object", "second class", "second box"}
    assert all(terms[-1][name] < 0.5 * terms[0][name] for name in ("second class", "second box"))
    second = looking.head(features, targets).second
    near = box_iou(second.proposals[0], target.boxes).max(1)
    shifted = near.values[:NUM_JITTERED] < 0.7
    reached = box_iou(second.boxes[0, :NUM_JITTERED], target.boxes).amax(1)
    assert reached[shifted].mean() > near.values[:NUM_JITTERED][shifted].mean() + 0.1
    assert (
        second.class_logits[0, :NUM_JITTERED].argmax(1) == target.labels[near.indices[:NUM_JITTERED]]
    ).float().mean() > 0.9


def test_with_logit_adjustment_frequency_alone_teaches_no_preference(looking, monkeypatch):
    """Where the features tell nothing, the gradient pulls towards frequent classes unless their shares are given."""
    target = target_of([[10, 10, 60, 60]], labels=[3])
    shares = torch.full((10,), 0.1 / 9).index_fill(0, torch.tensor(3), 0.9)
    targets = Targets.pad([target])
    out = looking(pixels_of(1, 3, 112, 112), targets)
    out.second.class_logits.data.zero_()
    monkeypatch.setattr("common.model.losses.LOGIT_ADJUSTMENT", 1.0)
    plain, adjusted = (loss_of(out, targets, shares=given)["second class"].item() for given in (None, shares))
    assert plain / adjusted == pytest.approx(math.log(10) / -math.log(0.9), rel=1e-3)


def test_images_without_objects_and_crowds_have_finite_losses_and_gradients(looking):
    crowd = target_of([[0, 0, 112, 112]], crowd=[True])
    for first in (target_of([]), target_of([[5, 5, 6, 6]])):
        looking.zero_grad()
        targets = Targets.pad([first, crowd])
        losses = loss_of(looking(pixels_of(2, 3, 112, 112), targets), targets)
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()), losses
        assert all(p.grad.isfinite().all() for p in looking.parameters() if p.grad is not None)


def test_boxes_in_a_crowd_are_not_background(looking):
    images = pixels_of(1, 3, 112, 112)
    out = looking(images, Targets.pad([target_of([[10, 10, 40, 40]])]))
    in_crowd = target_of([[-300, -300, 400, 400]], crowd=[True])
    assert loss_of(out, Targets.pad([in_crowd]))["second object"] == 0
    assert loss_of(out, Targets.pad([target_of([])]))["second object"] > 0


def test_a_checkpoint_keeps_the_second_look_and_older_ones_have_none(looking, tiny_backbone, tmp_path):
    images = pixels_of(1, 3, 112, 112)
    save_detector(tmp_path / "a.pth", Checkpoint(looking, NAMES, IDS))
    with torch.no_grad():
        for ours, theirs in zip(
            fuse_predictions(looking(images)),
            fuse_predictions(load_checkpoint(tmp_path / "a.pth").detector(images)),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    plain = new_detector(tiny_backbone, head="pyramid", blocks=(2, 4), image_size=112, num_classes=10)
    save_detector(tmp_path / "b.pth", Checkpoint(plain, NAMES, IDS))
    content = torch.load(tmp_path / "b.pth", weights_only=True)
    del content["model_config"]["second_look"]  # as written before it existed
    torch.save(content, tmp_path / "b.pth")
    assert load_checkpoint(tmp_path / "b.pth").detector.head.second_look is None
