"""NMS by matrices equals the greedy loop; detections are sorted, clipped and in original pixels."""

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from common.model.boxes import pairwise_iou
from common.model.heads import decode_boxes, locations
from common.model.postprocess import (
    CANDIDATES,
    MAX_DETECTIONS,
    NMS_IOU,
    fuse_predictions,
    nms_mask,
    postprocess,
    select_detections,
)
from common.types import ImageMeta, RawOutput


def random_boxes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(*shape, 2, generator=generator) * 200, torch.rand(*shape, 2, generator=generator) * 90
    return torch.cat([corner, corner + size + 1], dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_nms_equals_torchvisions_class_by_class(seed):
    boxes, scores = random_boxes(2, 40, seed=seed), torch.rand(2, 40, 5, generator=torch.Generator().manual_seed(seed))
    found, best, labels = select_detections(scores, boxes)
    assert found.shape == (2, MAX_DETECTIONS, 4) and best.shape == labels.shape == (2, MAX_DETECTIONS)
    for image in range(2):
        assert torch.allclose(pairwise_iou(boxes, boxes)[image], box_iou(boxes[image], boxes[image]), atol=1e-6)
        pairs = boxes[image].repeat_interleave(5, dim=0), scores[image].flatten(), torch.arange(5).repeat(40)
        order = batched_nms(*pairs, NMS_IOU)[:MAX_DETECTIONS]
        for ours, theirs in zip((found, best, labels), pairs, strict=True):
            assert torch.equal(ours[image, : len(order)], theirs[order])
        assert (best[image, len(order) :] == 0).all()


def test_chains_are_resolved_from_the_best_box_on():
    """Each box conflicts with the next one alone: every second one is kept."""
    chain = torch.eye(8, dtype=torch.bool).roll(1, dims=1)
    assert nms_mask((chain | chain.T)[None]).tolist() == [[True, False] * 4]


def test_few_boxes_give_few_detections():
    found, best, labels = select_detections(torch.rand(1, 3, 2), random_boxes(1, 3, seed=1))
    assert found.shape == (1, 6, 4) and best.shape == labels.shape == (1, 6) and CANDIDATES > 6


def test_detections_are_sorted_clipped_limited_and_in_original_pixels():
    torch.manual_seed(0)
    points, strides = locations((40, 40), 14, torch.device("cpu"))
    boxes = decode_boxes(torch.randn(1, 1600, 4), points, strides)
    logits = torch.randn(1, 1600), torch.randn(1, 1600, 5)
    out = RawOutput(*logits, torch.arange(1600), boxes, points, strides, strides.unique())
    meta = ImageMeta(9, None, (1100, 1120), (0.5, 0.5))
    (detections,) = postprocess(*fuse_predictions(out), [meta])
    assert 0.9 * MAX_DETECTIONS < len(detections.scores) <= MAX_DETECTIONS and detections.image_id == 9
    assert (detections.scores.diff() <= 0).all() and detections.scores.max() <= 1
    boxes = detections.boxes
    assert boxes.min() >= 0 and 560 < boxes[:, 3].max() <= 1100 and 560 < boxes[:, 2].max() <= 1120
    with pytest.raises(ValueError, match="augmented"):
        postprocess(*fuse_predictions(out), [meta._replace(scale=None)])
    out.boxes.fill_(torch.nan)  # of weights that are damaged
    assert len(postprocess(*fuse_predictions(out), [meta])[0].boxes) == 0
