"""Non-maximum suppression by tensor operations of fixed shapes, for a batch at once and for exported detectors."""

import torch
from torch import Tensor

ROUNDS = 10


def pairwise_iou(boxes: Tensor) -> Tensor:
    """IoU (B, N, N) of boxes (B, N, 4) with each other."""
    low, high = boxes.split(2, dim=-1)
    area = (high - low).prod(-1)
    sides = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    overlap = sides.clamp(min=0).prod(-1)
    return overlap / (area[:, :, None] + area[:, None] - overlap)


def kept_by_nms(conflict: Tensor) -> Tensor:
    """Greedy NMS: a box is kept unless it conflicts with a kept box before it.

    Each round corrects the boxes whose fate depends on one more box before them. After `ROUNDS` all are correct unless
    more than so many boxes decide about each other in a chain, which random boxes hardly do.

    Args:
        conflict: (B, N, N) bool, between the boxes of an image, by falling score.

    Returns:
        (B, N) bool.
    """
    before = conflict.triu(diagonal=1).float()
    kept = torch.ones_like(before[:, :1])  # (B, 1, N)
    for _ in range(ROUNDS):
        kept = ((kept @ before) == 0).float()
    return kept[:, 0] > 0


def rows_of(boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes (B, N, 4) at the indices (B, N) of boxes (B, M, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
