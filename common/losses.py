"""Assignment of objects to locations, and the loss terms.

Each loss term is a scalar, already weighted; their sum is what training minimises.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from common.types import RawOutput, Target

BACKGROUND, IGNORE = -1, -2
CENTER_RADIUS = 0.5  # share of a box around its centre whose locations answer for it


def assign_to_centers(points: Tensor, target: Target) -> Tensor:
    """Which object each location answers for.

    A location belongs to the smallest box whose central part (`CENTER_RADIUS` of its width and height) holds it, as
    the locations at an object's rim see little of it (FCOS, arXiv 1904.01355). An object without any gets the
    location nearest to its centre, so that none goes unlearned. Locations in a crowd box are left out of the loss.

    Args:
        points: (L, 2) input pixels.
        target: boxes in input pixels.

    Returns:
        (L,) int64: index into `target.boxes`, or BACKGROUND, or IGNORE.
    """
    assigned = torch.full((len(points),), BACKGROUND, device=points.device)
    assigned[_holds(target.boxes[target.crowd], points).any(1)] = IGNORE
    objects = torch.nonzero(~target.crowd)[:, 0]
    if len(objects) == 0:
        return assigned
    boxes = target.boxes[objects]
    centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    central = torch.cat([centers - sizes * CENTER_RADIUS / 2, centers + sizes * CENTER_RADIUS / 2], dim=1)
    areas = sizes.prod(1).expand(len(points), -1).masked_fill(~_holds(central, points), torch.inf)  # (L, N)
    smallest, index = areas.min(1)
    assigned = torch.where(smallest.isfinite(), objects[index], assigned)
    nearest = torch.cdist(points, centers).argmin(0)  # (N,)
    unseen = ~(assigned[:, None] == objects).any(0)
    assigned[nearest[unseen]] = objects[unseen]
    return assigned


def _holds(boxes: Tensor, points: Tensor) -> Tensor:
    """(N, 4) boxes, (L, 2) points -> (L, N) bool: is the point in the box?"""
    above = points[:, None] >= boxes[:, :2]
    below = points[:, None] < boxes[:, 2:]
    return (above & below).all(2)


def detection_loss(out: RawOutput, targets: list[Target]) -> dict[str, Tensor]:
    """Loss of a batch, each term divided by the number of locations that answer for an object.

    Returns:
        object: binary cross-entropy of "an object is here"; class: cross-entropy at the locations with an object;
        box: generalised IoU loss (arXiv 1902.09630) at the same locations.
    """
    assigned = torch.stack([assign_to_centers(out.points, target) for target in targets])  # (B, L)
    positive = assigned >= 0
    count = positive.sum().clamp(min=1)
    picture, location = torch.nonzero(positive, as_tuple=True)
    labels = torch.cat([t.labels[a[a >= 0]] for t, a in zip(targets, assigned, strict=True)])
    boxes = torch.cat([t.boxes[a[a >= 0]] for t, a in zip(targets, assigned, strict=True)])
    known = assigned != IGNORE
    object_loss = F.binary_cross_entropy_with_logits(out.object_logits, positive.float(), reduction="none")
    return {
        "object": (object_loss * known).sum() / count,
        "class": F.cross_entropy(out.class_logits[picture, location], labels, reduction="sum") / count,
        "box": generalized_box_iou_loss(out.boxes[picture, location], boxes, reduction="sum") / count,
    }
