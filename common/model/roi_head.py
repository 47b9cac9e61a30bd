"""The second look: the features in each of the dense head's best boxes -> its class, a better box, a better score.

A dense head describes an object by the features of one location. The second look describes it by all features in its
box, as the second stage of Faster R-CNN does (arXiv 1506.01497). `postprocess.fuse_predictions` combines both.
"""

import torch
from torch import Tensor, nn

from common.model.boxes import apply_deltas, gather_boxes, pairwise_iou
from common.model.postprocess import nms_mask
from common.types import RawOutput, RoIOutput, Targets

CANDIDATES, TRAINED_CANDIDATES = 1000, 300  # best locations of an image that enter NMS
PROPOSAL_IOU = 0.7  # of NMS: overlapping boxes of one object are looked at several times
CLASS_BINS = 2  # the class is predicted from a grid of 2 x 2 means of the features in a box
BOX_BINS = 7  # the better box and its score from a grid of 7 x 7
WIDTH, HIDDEN = 128, 256  # channels from which the box and its score are predicted, and units of their hidden layer
FEW_BINS = 2  # up to so many, one large matrix product is faster than two steps with less arithmetic
TRAINED_PROPOSALS = 64  # of an image, a step
NUM_JITTERED = 64  # boxes around the objects of an image that are looked at in training, beside the proposals
MAX_SHIFT, MAX_LOG_JITTER = 0.25, 0.4  # of their centres, in sides of the box, and of their sides' logarithms
NO_OBJECT_PX = 112.0  # side of the box that is looked at where an image has no object


class RoIHead(nn.Module):
    """Pools the features of boxes and predicts their class, a better box, and the IoU that it reaches.

    `proposals` boxes of the dense head are looked at in each image; `dropout` is the share of inputs and hidden units
    that are dropped in training. The others are those of the dense head.
    """

    def __init__(self, *, channels: int, num_classes: int, stride: int, proposals: int, dropout: float = 0.0):
        super().__init__()
        self.stride, self.proposals = stride, proposals
        norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.normalise = nn.Sequential(norm, nn.Flatten(2), nn.Dropout(dropout))
        self.classify = nn.Linear(channels * CLASS_BINS**2, num_classes)
        self.reduce = nn.Linear(channels, WIDTH)
        hidden = nn.Linear(WIDTH * BOX_BINS**2, HIDDEN)
        layers = (nn.LayerNorm(WIDTH), nn.Flatten(2), hidden, nn.LayerNorm(HIDDEN), nn.SiLU(), nn.Dropout(dropout))
        self.embed = nn.Sequential(*layers)
        self.predict = nn.Linear(HIDDEN, 5)  # object, then the deltas of the box
        for layer in (self.classify, self.predict):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, out: RawOutput, targets: Targets | None = None) -> RoIOutput:
        """(B, h, w, C) features and the dense head's output on them -> predictions for the best of its boxes.

        With `targets`, in training, boxes around the objects come first. In evaluation boxes are the mean of one and of
        two refinements (as in a cascade, arXiv 1712.00726).
        """
        limits = (TRAINED_PROPOSALS, TRAINED_CANDIDATES) if self.training else (self.proposals, CANDIDATES)
        locations = select_proposals(out, *limits)
        boxes = gather_boxes(out.boxes.detach(), locations)
        if targets is not None:
            boxes = torch.cat([jittered_boxes(targets), boxes], dim=1)
        classes = self.classify(self.normalise(roi_pool(features, boxes, CLASS_BINS, self.stride))).float()
        reduced = self.reduce(features)
        better, object_logits = self._refine(reduced, boxes)
        if not self.training:
            better = better.lerp(self._refine(reduced, better)[0], 0.5)
        return RoIOutput(locations, boxes, better, object_logits, classes)

    def _refine(self, reduced: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Better boxes (B, P, 4), and the logits (B, P) of the IoU that they reach, from the reduced features."""
        outputs = self.predict(self.embed(roi_pool(reduced, boxes, BOX_BINS, self.stride))).float()
        return apply_deltas(boxes, outputs[..., 1:]), outputs[..., 0]


def select_proposals(out: RawOutput, count: int, candidates: int = CANDIDATES) -> Tensor:
    """The (B, N) locations with the highest object scores after NMS, N = `count` or all; then those that it removed.

    Of all locations the `candidates` best enter NMS. N is the same for each image, so that a batch is one tensor.
    """
    logits, boxes = out.objectness_logits.detach(), out.boxes.detach()
    best, index = logits.topk(min(candidates, logits.shape[1]))  # by falling score
    boxes = gather_boxes(boxes, index)
    kept = nms_mask(pairwise_iou(boxes, boxes) > PROPOSAL_IOU)
    rank = torch.arange(best.shape[1], device=best.device) + ~kept * candidates
    return index.gather(1, rank.topk(min(count, best.shape[1]), largest=False).indices)


def roi_pool(features: Tensor, boxes: Tensor, bins: int, stride: int) -> Tensor:
    """The mean (B, P, bins^2, C) of the features (B, h, w, C) in each of bins x bins equal cells of boxes (B, P, 4).

    The map, `stride` input pixels apart, is interpolated linearly. The means are exact (PrRoI pooling, arXiv
    1807.11590) and computed as matrix products. What is outside the map does not count.
    """
    batch, height, width, channels = features.shape
    columns = _weights(boxes[..., 0::2] / stride, bins, width).to(features.dtype)  # (B, P, bins, w)
    rows = _weights(boxes[..., 1::2] / stride, bins, height).to(features.dtype)
    if bins <= FEW_BINS:
        weights = (rows[:, :, :, None, :, None] * columns[:, :, None, :, None, :]).flatten(4).flatten(1, 3)
        return (weights @ features.flatten(1, 2)).view(batch, -1, bins**2, channels)
    strips = (rows.flatten(1, 2) @ features.flatten(2)).view(batch, -1, bins, width, channels)
    return (columns[:, :, None] @ strips).flatten(2, 3)


def _weights(sides: Tensor, bins: int, cells: int) -> Tensor:
    """(B, P, 2) intervals in units of a cell -> (B, P, bins, cells) weights, which sum to 1 for each bin."""
    start, end = sides.unsqueeze(-2).unbind(-1)  # (B, P, 1)
    cuts = start + (end - start) * torch.linspace(0, 1, bins + 1, device=sides.device)
    distance = (cuts[..., None] - torch.arange(cells, device=sides.device) - 0.5).clamp(-1, 1)
    integral = 0.5 + distance - distance * distance.abs() / 2  # of the triangle of linear interpolation
    weights = integral[..., 1:, :] - integral[..., :-1, :]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def jittered_boxes(targets: Targets) -> Tensor:
    """(B, NUM_JITTERED, 4) boxes at random places near the objects of each image, all about equally often."""
    count = targets.objects.sum(1, keepdim=True)  # (B, 1)
    turn = torch.arange(NUM_JITTERED, device=count.device) % count.clamp(min=1)
    no_object = torch.arange(4, device=count.device) // 2 * NO_OBJECT_PX
    boxes = gather_boxes(targets.boxes, turn).where(count[..., None] > 0, no_object)
    shifts = torch.rand_like(boxes) * 2 - 1
    return apply_deltas(boxes, torch.cat([shifts[..., :2] * MAX_SHIFT, shifts[..., 2:] * MAX_LOG_JITTER], dim=-1))
