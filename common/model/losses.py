"""The loss of a batch, term by term.

Each term is a scalar, already weighted; their sum is what training minimises.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from common.cli import flag
from common.model.assignment import ASSIGNMENTS, Assignment, assign, box_sizes
from common.types import RawOutput, SecondOutput, Target

SCORE_LOSSES = ("cross-entropy", "focal", "quality")
BOX_LOSSES = ("giou", "smooth-l1")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv 1708.02002
POSITIVE_IOU = 0.5  # of a box that the second look names and places, with its object
MIN_POSITIVE = 1 / 8  # positive locations of an image in a divisor: fewer would let images without objects dominate
SMOOTH_L1_BETA = 0.1  # in units of the box
MIN_BOX_UNIT = 8.0  # input pixels: without it the loss of one tiny box would exceed that of hundreds of others


@dataclass(frozen=True)
class LossConfig:
    """Loss.

    assignment: center, the smallest box whose central part contains the location, at the level of its size (FCOS, arXiv
    1904.01355); task-aligned, the locations with the highest score and IoU for the object (TOOD, arXiv 2108.07755).
    scores: cross-entropy; focal (arXiv 1708.02002); quality, cross-entropy with the IoU of the predicted box as its
    target, so that scores rank boxes by their IoU (arXiv 2006.04388).
    boxes: giou (arXiv 1902.09630), or smooth-l1 on the corners in units of the box, times `box_weight`.
    """

    assignment: str = flag("task-aligned", "which locations predict an object", choices=ASSIGNMENTS)
    scores: str = flag(
        "quality", "loss of the scores; quality = the target is the IoU of the box", choices=SCORE_LOSSES
    )
    boxes: str = flag("giou", "loss of the boxes", choices=BOX_LOSSES)
    box_weight: float = flag(2.0, "weight of the loss of the boxes", at_least=0)
    logit_adjustment: float = flag(
        0.5, "power of the frequency of a class that the second look need not learn (arXiv 2007.07314)", at_least=0
    )


def detection_loss(
    out: RawOutput,
    targets: list[Target],
    config: LossConfig,
    mean_counts: Callable[[Tensor], Tensor] = lambda counts: counts,
    class_shares: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss of a batch, each term divided by the number of positive locations, which are assigned an object.

    With `quality` scores the positive locations are weighted by their quality, in the terms and in the divisor.
    The terms of a second look are divided by its number of positive boxes. No divisor is less than `MIN_POSITIVE` for
    each image.

    Args:
        out: of the batch.
        targets: B, boxes in input pixels.
        config: the kinds of losses.
        mean_counts: the mean of a vector over all batches that share the step. The divisors are such means, so that the
            mean of the gradients of all these batches is that of one batch with all of their images.
        class_shares: (K,) of the training objects, for the logit adjustment of a second look.

    Returns:
        Scalars: object, over the locations that are not ignored; class and box, over the positive locations; the same
        of the second look.
    """
    logits, boxes = out.object_logits.detach(), out.boxes.detach()
    assigned = [
        assign(logits[i], boxes[i], out.points, out.strides, target, config.assignment)
        for i, target in enumerate(targets)
    ]
    positive = torch.stack([a.box >= 0 for a in assigned])  # (B, L)
    ignored = torch.stack([a.ignore for a in assigned])  # (B, L)
    image, location = torch.nonzero(positive, as_tuple=True)  # (M,)
    labels, truth = _assigned_objects(assigned, targets)

    scores, weights = positive.float(), torch.ones_like(truth[:, 0])
    if config.scores == "quality":
        scores = torch.stack([a.quality for a in assigned])
        weights = scores[positive]
    object_loss, class_loss = _score_losses(
        out.object_logits, scores, out.class_logits_at(image, location), labels, focal=config.scores == "focal"
    )
    box_loss = _box_loss(out.boxes[image, location], truth, config.boxes)
    sums = {
        "object": (object_loss * ~ignored).sum(),
        "class": (class_loss * weights).sum(),
        "box": config.box_weight * (box_loss * weights).sum(),
    }
    groups = [(sums, weights.sum())]
    if out.second is not None:
        groups.append(_second_losses(out.second, targets, config, class_shares))
    counts = mean_counts(torch.stack([*(count for _, count in groups), weights.new_tensor(len(targets))]))
    divisors = counts[:-1].maximum(MIN_POSITIVE * counts[-1])
    return {
        name: total / divisor
        for (terms, _), divisor in zip(groups, divisors, strict=True)
        for name, total in terms.items()
    }


def _second_losses(
    second: SecondOutput, targets: list[Target], config: LossConfig, class_shares: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The summed losses of the second look, and the number of its positive proposals, which overlap an object enough.

    Class and box are trained on the positive proposals. The score of every proposal is trained to be the IoU that its
    better box reaches with an object, except of those in a crowd.
    """
    pairs = list(zip(second.proposals, second.boxes.detach(), targets, strict=True))
    iou, truth, labels = (torch.stack(parts) for parts in zip(*(_best_object(p, t) for p, _, t in pairs), strict=True))
    reached = torch.stack([_best_object(boxes, target)[0] for _, boxes, target in pairs])
    positive = iou >= POSITIVE_IOU
    counted = positive | ~torch.stack([_in_crowd(proposals, target) for proposals, _, target in pairs])

    object_loss = F.binary_cross_entropy_with_logits(second.object_logits, reached, reduction="none")
    class_logits = second.class_logits[positive]
    if class_shares is not None:
        class_logits = class_logits + config.logit_adjustment * class_shares.clamp(min=1e-6).log()
    sums = {
        "second object": (object_loss * counted).sum(),
        "second class": F.cross_entropy(class_logits, labels[positive], reduction="sum"),
        "second box": config.box_weight * _box_loss(second.boxes[positive], truth[positive], config.boxes).sum(),
    }
    return sums, positive.sum().float()


def _best_object(boxes: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """The highest IoU (P,) of boxes (P, 4) with an object, and that object's box (P, 4) and label (P,)."""
    objects = torch.nonzero(~target.crowd)[:, 0]
    if len(objects) == 0:
        none = torch.zeros_like(boxes)
        return none[:, 0], none, none[:, 0].long()
    iou, index = box_iou(boxes, target.boxes[objects]).max(1)
    return iou, target.boxes[objects[index]], target.labels[objects[index]]


def _in_crowd(boxes: Tensor, target: Target) -> Tensor:
    """(P,) bool: is more than half of a box (P, 4) inside a crowd box?"""
    crowd = target.boxes[target.crowd]
    low, high = boxes[:, None, :2].maximum(crowd[:, :2]), boxes[:, None, 2:].minimum(crowd[:, 2:])
    return ((high - low).clamp(min=0).prod(2) > box_sizes(boxes).prod(1)[:, None] / 2).any(1)


def _assigned_objects(assigned: list[Assignment], targets: list[Target]) -> tuple[Tensor, Tensor]:
    """Labels (M,) and boxes (M, 4) of the objects of the positive locations, image by image."""
    chosen = [a.box[a.box >= 0] for a in assigned]
    labels = torch.cat([target.labels[index] for target, index in zip(targets, chosen, strict=True)])
    boxes = torch.cat([target.boxes[index] for target, index in zip(targets, chosen, strict=True)])
    return labels, boxes


def _score_losses(
    object_logits: Tensor, scores: Tensor, class_logits: Tensor, labels: Tensor, *, focal: bool
) -> tuple[Tensor, Tensor]:
    """Object loss (B, L) with target `scores` (B, L), and class loss (M,)."""
    class_loss = F.cross_entropy(class_logits, labels, reduction="none")
    if focal:
        object_loss = sigmoid_focal_loss(object_logits, scores, FOCAL_ALPHA, FOCAL_GAMMA)
        return object_loss, class_loss * (1 - (-class_loss).exp()) ** FOCAL_GAMMA
    return F.binary_cross_entropy_with_logits(object_logits, scores, reduction="none"), class_loss


def _box_loss(boxes: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(M, 4) and (M, 4) input pixels -> (M,)."""
    if kind == "giou":
        return generalized_box_iou_loss(boxes, truth)
    unit = box_sizes(truth).repeat(1, 2).clamp(min=MIN_BOX_UNIT)
    return F.smooth_l1_loss(boxes / unit, truth / unit, reduction="none", beta=SMOOTH_L1_BETA).sum(1)
