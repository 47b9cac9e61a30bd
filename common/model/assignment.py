"""Assignment: which object each location of the head is trained to predict."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from common.types import Target

ASSIGNMENTS = ("center", "task-aligned")

CENTER_PART = 0.5  # of each side of a box; the locations in this central part are assigned to it
STRIDES_A_SIDE = 3.0  # a box belongs to the level with the stride nearest to its side / 3, on a logarithmic scale
# Locations an object. On 150 held-out images of COCO, 40 gave an mAP@0.5 of .097 and .088 (two seeds), 10 gave .083
# and .086: most of the equally good locations in a large object are then trained as background.
ALIGNED_CANDIDATES = 40
ALIGNED_POWER = 6.0  # of the IoU, beside the first power of the score (TOOD, arXiv 2108.07755)


@dataclass(frozen=True)
class Assignment:
    """The object that each of the L locations of one image is trained to predict.

    Shapes: box (L,) int64, index into `Target.boxes`, -1 for none; quality (L,) float32 in 0..1, the score that the
    location is trained to predict, 0 where it has no box; ignore (L,) bool, neither object nor background.
    """

    box: Tensor
    quality: Tensor
    ignore: Tensor


def assign(
    object_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor, target: Target, kind: str
) -> Assignment:
    """Assign the objects of one image to locations.

    Every object gets at least the location nearest to its centre, at the level of its size, so that every object is
    trained. Where several objects claim a location, `center` gives it to the smallest, `task-aligned` to the one
    with the highest IoU with its prediction. Locations in a crowd box that no object claims are ignored by the loss.

    Args:
        object_logits: (L,) predicted, without gradient.
        boxes: (L, 4) predicted, input pixels, without gradient.
        points: (L, 2) input pixels.
        strides: (L,) input pixels.
        target: boxes in input pixels.
        kind: one of ASSIGNMENTS.
    """
    objects = torch.nonzero(~target.crowd)[:, 0]
    crowd = _contains(target.boxes[target.crowd], points).any(1)
    if len(objects) == 0:
        none = torch.full((len(points),), -1, device=points.device)
        return Assignment(none, torch.zeros_like(strides), crowd)
    truth = target.boxes[objects]
    iou = box_iou(boxes, truth)  # (L, N)
    alignment = object_logits.sigmoid()[:, None] * iou**ALIGNED_POWER
    if kind == "center":
        claims = _center_claims(points, strides, truth)
        preference = 1 / box_sizes(truth).prod(1).clamp(min=1e-6).expand_as(iou)
    else:
        claims, preference = _aligned_claims(alignment, points, strides, truth), iou + 1e-6
    unclaimed = torch.nonzero(~claims.any(0))[:, 0]
    if len(unclaimed):
        claims[_nearest(points, strides, truth[unclaimed]), unclaimed] = True

    best, index = (preference * claims).max(1)
    positive = best > 0
    box = torch.where(positive, objects[index], -1)
    location, index = torch.nonzero(positive)[:, 0], index[positive]
    quality = iou[location, index]
    if kind == "task-aligned":  # as in TOOD, the target of an object's best aligned location is its best IoU
        aligned, count = alignment[location, index], len(objects)
        scale = _max_per_object(quality, index, count) / _max_per_object(aligned, index, count).clamp(min=1e-12)
        quality = aligned * scale[index]
    return Assignment(box, torch.zeros_like(strides).index_put((location,), quality), crowd & ~positive)


def _max_per_object(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The largest of the `values` (M,) of each object, given their objects' indices (M,) in 0..count-1 -> (count,)."""
    return values.new_zeros(count).scatter_reduce(0, index, values, "amax")


def _center_claims(points: Tensor, strides: Tensor, truth: Tensor) -> Tensor:
    """(L, N) bool: the locations in the central part of each box, at the level of its size."""
    centers, sizes = _centers(truth), box_sizes(truth)
    central = torch.cat([centers - sizes * CENTER_PART / 2, centers + sizes * CENTER_PART / 2], dim=1)
    return _contains(central, points) & (strides[:, None] == _level(strides, truth))


def _aligned_claims(alignment: Tensor, points: Tensor, strides: Tensor, truth: Tensor) -> Tensor:
    """(L, N) bool: the locations in each box that are aligned best with it."""
    sizes = box_sizes(truth)
    away = (points[:, None] - _centers(truth)).abs()  # (L, N, 2)
    small = sizes.amax(1) < 2 * strides[:, None]  # a small box contains few locations or none
    candidates = (away <= torch.where(small[..., None], strides[:, None, None], 0).maximum(sizes / 2)).all(2)
    # Before training all alignments are about 0; the distance to the centre then decides.
    distance = (away / sizes.clamp(min=1)).amax(2)
    ranked = (alignment + 1e-9 / (1 + distance)) * candidates
    top, index = ranked.topk(min(ALIGNED_CANDIDATES, len(points)), dim=0)
    return torch.zeros_like(candidates).scatter(0, index, top > 0)


def _nearest(points: Tensor, strides: Tensor, truth: Tensor) -> Tensor:
    """The location (N,) nearest to each box's centre among those of the level of its size."""
    distances = torch.cdist(points, _centers(truth))
    return distances.masked_fill(strides[:, None] != _level(strides, truth), torch.inf).argmin(0)


def _level(strides: Tensor, truth: Tensor) -> Tensor:
    """The stride (N,) of the level that a box belongs to by its size."""
    levels = strides.unique()
    side = box_sizes(truth).prod(1).clamp(min=1e-6).sqrt()
    return levels[(side[:, None] / (levels * STRIDES_A_SIDE)).log2().abs().argmin(1)]


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def box_sizes(boxes: Tensor) -> Tensor:
    return boxes[:, 2:] - boxes[:, :2]


def _contains(boxes: Tensor, points: Tensor) -> Tensor:
    """(N, 4) boxes, (L, 2) points -> (L, N) bool: is the point in the box?"""
    above = points[:, None] >= boxes[:, :2]
    below = points[:, None] < boxes[:, 2:]
    return (above & below).all(2)
