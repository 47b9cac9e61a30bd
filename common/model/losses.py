"""Assignment of objects to locations, and the loss terms.

Each loss term is a scalar, already weighted; their sum is what training minimises.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from common.model.assignment import _sizes, assign
from common.types import RawOutput, Target

SCORE_LOSSES = ("cross-entropy", "focal", "quality")
BOX_LOSSES = ("giou", "smooth-l1", "both")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv 1708.02002
SMOOTH_L1_BETA = 0.1  # units
SMOOTH_L1_UNIT = 8.0  # least unit, input pixels: a speck's box is not worth hundreds of others


@dataclass(frozen=True)
class LossConfig:
    """Which objects a location answers for, and how it is taught.

    assignment: center, the smallest box whose central part holds the location, at the level of its size (FCOS, arXiv
    1904.01355); atss, the locations that fit a box better than its neighbourhood does (arXiv 1912.02424);
    task-aligned, those whose own prediction fits it best (arXiv 2108.07755).
    scores: cross-entropy; focal (arXiv 1708.02002); quality, cross-entropy towards the IoU that the location reaches,
    so that scores rank boxes by how well they fit (arXiv 2006.04388).
    boxes: giou (arXiv 1902.09630), smooth-l1 on the sides in units of the box, or both, times `box_weight`.
    """

    assignment: str = "center"
    scores: str = "cross-entropy"
    boxes: str = "giou"
    box_weight: float = 1.0


def detection_loss(
    out: RawOutput,
    targets: list[Target],
    config: LossConfig,
    mean_of_processes: Callable[[Tensor], Tensor] = lambda count: count,
) -> dict[str, Tensor]:
    """Loss of a batch, each term divided by the number of locations that answer for an object.

    With `quality` scores the locations count by their quality, in the loss terms and in the divisor.

    Args:
        mean_of_processes: the mean of a scalar over all processes that share the step. The divisor is such a mean, so
            that the mean of their gradients is that of one process with all of their images.

    Returns:
        object: is an object here? At every location but the ignored; class: which, at the locations with an object;
        box: at the same locations.
    """
    logits, boxes = out.object_logits.detach(), out.boxes.detach()
    assigned = [
        assign(*own, out.points, out.strides, t, config.assignment)
        for *own, t in zip(logits, boxes, targets, strict=True)
    ]
    positive = torch.stack([a.box >= 0 for a in assigned])  # (B, L)
    ignore = torch.stack([a.ignore for a in assigned])
    image, location = torch.nonzero(positive, as_tuple=True)
    chosen = [a.box[a.box >= 0] for a in assigned]
    labels = torch.cat([t.labels[index] for t, index in zip(targets, chosen, strict=True)])
    truth = torch.cat([t.boxes[index] for t, index in zip(targets, chosen, strict=True)])

    wanted, weights = positive.float(), torch.ones_like(truth[:, 0])
    if config.scores == "quality":
        wanted = torch.stack([a.quality for a in assigned])
        weights = wanted[positive]
    object_loss = F.binary_cross_entropy_with_logits(out.object_logits, wanted, reduction="none")
    class_loss = F.cross_entropy(out.class_logits[image, out.class_rows[location]], labels, reduction="none")
    if config.scores == "focal":
        surprise = (out.object_logits.sigmoid() - wanted).abs()
        object_loss = object_loss * surprise**FOCAL_GAMMA * torch.where(positive, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
        class_loss = class_loss * (1 - (-class_loss).exp()) ** FOCAL_GAMMA
    box_loss = _box_loss(out.boxes[image, location], truth, config.boxes)
    count = mean_of_processes(weights.sum()).clamp(min=1)
    return {
        "object": (object_loss * ~ignore).sum() / count,
        "class": (class_loss * weights).sum() / count,
        "box": config.box_weight * (box_loss * weights).sum() / count,
    }


def _box_loss(boxes: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(N, 4) and (N, 4) input pixels -> (N,)."""
    loss = torch.zeros_like(truth[:, 0])
    if kind != "smooth-l1":
        loss = loss + generalized_box_iou_loss(boxes, truth)
    if kind != "giou":
        unit = _sizes(truth).repeat(1, 2).clamp(min=SMOOTH_L1_UNIT)
        loss = loss + F.smooth_l1_loss(boxes / unit, truth / unit, reduction="none", beta=SMOOTH_L1_BETA).sum(1)
    return loss
