"""Geometry of boxes (..., 4) xyxy: overlaps, the loss of a box, and boxes moved by predicted deltas.

Coordinates are separate tensors with the longest dimension last: a last dimension of 2 or 4 takes three times the time.
"""

import torch
from torch import Tensor

MAX_LOG_SCALE = 1.0  # of a side, in one refinement


def pairwise_intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas (B, M, N) that boxes (B, M, 4) share with others (B, N, 4)."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes[:, :, None].unbind(-1), others[:, None].unbind(-1)
    width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
    return width.mul_(torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0))


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (B, M, N) of boxes (B, M, 4) with others (B, N, 4); 0 for two boxes without area."""
    shared = pairwise_intersection(boxes, others)
    union = (area(boxes)[:, :, None] + area(others)[:, None]).sub_(shared).clamp_(min=1e-9)
    return shared.div_(union)


def area(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def giou_loss(boxes: Tensor, truth: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - generalised IoU (arXiv 1902.09630) of each of the boxes (..., 4) with its truth (..., 4).

    torchvision's, but for an indexing by a mask, for which a GPU would have to be waited for.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes.unbind(-1), truth.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    shared = width * (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
    hull = (torch.maximum(x2, u2) - torch.minimum(x1, u1)) * (torch.maximum(y2, v2) - torch.minimum(y1, v1))
    return 1 - shared / (union + eps) + (hull - union) / (hull + eps)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., 4) moved by deltas (..., 4): (x, y) in sides of the box, then logarithms of (width, height).

    Sides below 1 count as 1, logarithms are limited to `MAX_LOG_SCALE`.
    """
    sizes = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * sizes
    halves = sizes * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes (B, N, 4) at the indices (B, N) of boxes (B, M, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
