"""The loss of a batch, term by term.

Each term is a scalar, already weighted; their sum is what training minimises.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from common.cli import flag
from common.model.assignment import ASSIGNMENTS, assign
from common.model.boxes import area, gather_boxes, giou_loss, pairwise_intersection, pairwise_iou
from common.types import RawOutput, RoIOutput, Targets

SCORE_LOSSES = ("cross-entropy", "focal", "quality")
BOX_LOSSES = ("giou", "smooth-l1")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv 1708.02002
POSITIVE_IOU = 0.5  # of a box that the second look names and places, with its object
# Usual divisors, in the mean over an epoch of 600 images of COCO: positive locations of an object, weighted by their
# quality where scores learn it, and positive boxes of the second look in an image with objects.
QUALITY_AN_OBJECT = 2.4
POSITIVE_AN_OBJECT = {"task-aligned": 25.0, "center": 15.0}
POSITIVE_AN_IMAGE = 65.0
LOGIT_ADJUSTMENT = 0.5  # power of the frequency of a class that the second look need not learn (arXiv 2007.07314)
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


class Matched(NamedTuple):
    """What P predicted boxes of B images are trained to be; (B, P) each."""

    object: Tensor  # int64, index into `Targets.boxes`
    weight: Tensor  # of the losses of class and box; 0: no object
    score: Tensor  # that the box is trained to have
    counted: Tensor  # bool: its score is trained


class DetectionLoss(nn.Module):
    """The loss of a batch, term by term, each divided by a number that is known before the forward pass.

    With `quality` scores the losses of class and box are weighted by the quality of the location. The terms of the
    dense head are divided by the positive locations that so many objects usually have, weighted likewise, those of a
    second look by the positive boxes that so many images with objects usually have, and none by less than
    `MIN_POSITIVE` for each image. `class_shares` (K,) of the training objects adjust the logits of a second look.
    """

    class_prior: Tensor | None

    def __init__(self, config: LossConfig, class_shares: Tensor | None = None):
        super().__init__()
        self.config = config
        prior = None if class_shares is None else LOGIT_ADJUSTMENT * class_shares.clamp(min=1e-6).log()
        self.register_buffer("class_prior", prior, persistent=False)

    def forward(self, out: RawOutput, targets: Targets, counts: Tensor | None = None) -> dict[str, Tensor]:
        """The terms of a batch: object, over the locations that are not ignored, class and box, over the positive ones.

        `counts` (2,) is the mean of `Targets.counts` over all batches that share the step, by default this one alone.
        The mean of the gradients of these batches is then that of one batch with all of their images.
        """
        second, count = out.second, out.boxes.shape[1]
        boxes = out.boxes if second is None else torch.cat([out.boxes, second.boxes], dim=1)
        judged = boxes.detach() if second is None else torch.cat([boxes.detach(), second.proposals], dim=1)
        iou = pairwise_iou(targets.boxes, judged)  # (B, N, L + 2 P), once for all
        dense = self._match_locations(out, iou[..., :count], targets)
        looks = [dense] if second is None else [dense, match_proposals(second, iou[..., count:], targets)]
        index = torch.cat([look.object for look in looks], dim=1)  # (B, L + P)
        labels = targets.labels.gather(1, index).clamp(min=0)
        box_losses = self._box_losses(boxes, gather_boxes(targets.boxes, index))

        objects, images = targets.counts() if counts is None else counts
        least = MIN_POSITIVE * len(labels)
        usual = QUALITY_AN_OBJECT if self.config.scores == "quality" else POSITIVE_AN_OBJECT[self.config.assignment]
        divisor = (usual * objects).clamp(min=least)
        losses = self._dense_losses(out, dense, labels[:, :count])
        terms = self._terms(dense, *losses, box_losses[:, :count], divisor)
        if second is not None:
            losses = self._second_losses(second, looks[1], labels[:, count:])
            divisor = (POSITIVE_AN_IMAGE * images).clamp(min=least)
            found = self._terms(looks[1], *losses, box_losses[:, count:], divisor)
            terms |= {f"second {name}": value for name, value in found.items()}
        return terms

    def _terms(
        self, look: Matched, scores: Tensor, classes: Tensor, boxes: Tensor, divisor: Tensor
    ) -> dict[str, Tensor]:
        """The losses (B, P) of scores, classes and boxes, summed over what they are trained on."""
        return {
            "object": (scores * look.counted).sum() / divisor,
            "class": (classes * look.weight).sum() / divisor,
            "box": self.config.box_weight * (boxes * look.weight).sum() / divisor,
        }

    def _match_locations(self, out: RawOutput, iou: Tensor, targets: Targets) -> Matched:
        """What the L locations of the dense head are trained to predict, given the IoU (B, N, L) of their boxes."""
        assigned = assign(out, iou, targets, self.config.assignment)
        scores = assigned.quality if self.config.scores == "quality" else (assigned.object >= 0).float()
        return Matched(assigned.object.clamp(min=0), scores, scores, ~assigned.ignored)

    def _dense_losses(self, out: RawOutput, look: Matched, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (B, L) of the scores and of the classes, if each location had the class in `labels` (B, L)."""
        log_shares = out.class_logits.log_softmax(-1)  # (B, R, K); the (B, L, K) of all locations is never made
        class_loss = -log_shares.flatten(1).gather(1, out.class_rows * log_shares.shape[2] + labels)
        if self.config.scores == "focal":
            object_loss = sigmoid_focal_loss(out.objectness_logits, look.score, FOCAL_ALPHA, FOCAL_GAMMA)
            return object_loss, class_loss * (1 - (-class_loss).exp()) ** FOCAL_GAMMA
        return F.binary_cross_entropy_with_logits(out.objectness_logits, look.score, reduction="none"), class_loss

    def _second_losses(self, out: RoIOutput, look: Matched, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same (B, P) of the second look."""
        logits = out.class_logits if self.class_prior is None else out.class_logits + self.class_prior
        class_loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return F.binary_cross_entropy_with_logits(out.objectness_logits, look.score, reduction="none"), class_loss

    def _box_losses(self, boxes: Tensor, truth: Tensor) -> Tensor:
        """(B, P, 4) and (B, P, 4) input pixels -> (B, P)."""
        if self.config.boxes == "giou":
            return giou_loss(boxes, truth)
        unit = (truth[..., 2:] - truth[..., :2]).clamp(min=MIN_BOX_UNIT)
        unit = torch.cat([unit, unit], dim=-1)
        return F.smooth_l1_loss(boxes / unit, truth / unit, reduction="none", beta=SMOOTH_L1_BETA).sum(-1)


def match_proposals(out: RoIOutput, iou: Tensor, targets: Targets) -> Matched:
    """What the P boxes of the second look are trained to be, given the IoU (B, N, 2 P) of better boxes, then proposals.

    Class and box are trained on the proposals that overlap an object enough. The score of each is trained to be the IoU
    that its better box reaches with an object, except of those in a crowd.
    """
    best, index = iou.max(1)
    reached, overlap = best.chunk(2, dim=1)
    positive = overlap >= POSITIVE_IOU
    in_crowd = pairwise_intersection(targets.crowds, out.proposals) > area(out.proposals)[:, None] / 2
    return Matched(index.chunk(2, dim=1)[1], positive.float(), reached, positive | ~in_crowd.any(1))
