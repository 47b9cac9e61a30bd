"""NMS by matrices equals the greedy loop."""

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from common.model.boxes import pairwise_iou
from common.model.postprocess import CANDIDATES, MAX_DETECTIONS, NMS_IOU, nms_mask, select_detections


def random_boxes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(*shape, 2, generator=generator) * 200, torch.rand(*shape, 2, generator=generator) * 90
    return torch.cat([corner, corner + size + 1], dim=-1)


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_torchvision_class_by_class(seed):
    boxes, scores = random_boxes(2, 40, seed=seed), torch.rand(2, 40, 5, generator=torch.Generator().manual_seed(seed))
    found, best, labels = select_detections(scores, boxes)
    assert found.shape == (2, MAX_DETECTIONS, 4) and best.shape == labels.shape == (2, MAX_DETECTIONS)
    for image in range(2):
        pairs = boxes[image].repeat_interleave(5, dim=0), scores[image].flatten(), torch.arange(5).repeat(40)
        order = batched_nms(*pairs, NMS_IOU)[:MAX_DETECTIONS]
        for ours, theirs in zip((found, best, labels), pairs, strict=True):
            assert torch.equal(ours[image, : len(order)], theirs[order])
        assert (best[image, len(order) :] == 0).all()


def test_pairwise_iou_is_torchvisions():
    boxes = random_boxes(3, 20, seed=0)
    for image in range(3):
        assert torch.allclose(pairwise_iou(boxes, boxes)[image], box_iou(boxes[image], boxes[image]), atol=1e-6)


def test_chains_are_resolved_from_the_best_box_on():
    """Each box conflicts with the next one alone: every second one is kept."""
    chain = torch.eye(8, dtype=torch.bool).roll(1, dims=1)
    assert nms_mask((chain | chain.T)[None]).tolist() == [[True, False] * 4]


def test_few_boxes_give_few_detections():
    found, best, labels = select_detections(torch.rand(1, 3, 2), random_boxes(1, 3, seed=1))
    assert found.shape == (1, 6, 4) and best.shape == labels.shape == (1, 6) and CANDIDATES > 6
