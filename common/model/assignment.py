"""Assignment: which object each location of the head is trained to predict."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from common.types import Target

ASSIGNMENTS = ("center", "atss", "task-aligned")

CENTER_RADIUS = 0.5  # share of a box around its centre whose locations answer for it
OCTAVE_SIZE = 3.0  # a box belongs to the level at which its side is nearest to so many strides, in octaves
ATSS_CANDIDATES = 9  # a level
ATSS_ANCHOR = 5.0  # side of the square that stands for a location, strides
ALIGNED_CANDIDATES = 40  # an object; with 10, most of the equally good locations in a large one learn to be silent
ALIGNED_POWER = 6.0  # of the IoU, beside the first power of the score (TOOD, arXiv 2108.07755)


@dataclass(frozen=True)
class Assignment:
    """What each of the L locations answers for in one image.

    Shapes: box (L,) int64, index into `Target.boxes`, -1 where it is none; quality (L,) float32 in 0..1, the score
    that the location should give, 0 where there is no box; ignore (L,) bool, neither object nor background.
    """

    box: Tensor
    quality: Tensor
    ignore: Tensor


def assign(
    object_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor, target: Target, kind: str
) -> Assignment:
    """Which object each location of one image answers for.

    Every object gets at least the location nearest to its centre, at the level of its size, so that none goes
    unlearned. Where several objects claim a location, center gives it to the smallest, the others to the best fit.
    Locations in a crowd box that no object claims are left out of the loss.

    Args:
        object_logits: (L,) what the detector says, likewise `boxes`; no gradient is taken.
        boxes: (L, 4) input pixels.
        points: (L, 2) input pixels.
        strides: (L,) input pixels.
        target: boxes in input pixels.
    """
    objects = torch.nonzero(~target.crowd)[:, 0]
    crowd = _holds(target.boxes[target.crowd], points).any(1)
    if len(objects) == 0:
        nothing = torch.full((len(points),), -1, device=points.device)
        return Assignment(nothing, torch.zeros_like(strides), crowd)
    truth = target.boxes[objects]
    iou = box_iou(boxes, truth)  # (L, N)
    if kind == "center":
        claims = _center_claims(points, strides, truth)
        preference = 1 / _sizes(truth).prod(1).clamp(min=1e-6).expand_as(iou)
    elif kind == "atss":
        claims, preference = _atss_claims(points, strides, truth)
    else:
        alignment = object_logits.sigmoid()[:, None] * iou**ALIGNED_POWER
        claims, preference = _aligned_claims(alignment, points, strides, truth), iou + 1e-6
    unclaimed = torch.nonzero(~claims.any(0))[:, 0]
    if len(unclaimed):
        claims[_nearest(points, strides, truth[unclaimed]), unclaimed] = True

    best, index = (preference * claims).max(1)
    positive = best > 0
    box = torch.where(positive, objects[index], -1)
    location, index = torch.nonzero(positive)[:, 0], index[positive]
    reached = iou[location, index]
    if kind == "task-aligned":  # TOOD: the best aligned location of an object should score its best IoU
        aligned = alignment[location, index]
        reached = aligned * (_most(reached, index, iou) / _most(aligned, index, iou).clamp(min=1e-12))[index]
    quality = torch.zeros_like(strides).index_put((location,), reached)
    return Assignment(box, quality, crowd & ~positive)


def _most(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The largest of the `values` (M,) with each `index` (M,) into the columns of `like` (L, N) -> (N,)."""
    return torch.zeros_like(like[0]).scatter_reduce(0, index, values, "amax")


def _center_claims(points: Tensor, strides: Tensor, truth: Tensor) -> Tensor:
    centers, sizes = _centers(truth), _sizes(truth)
    central = torch.cat([centers - sizes * CENTER_RADIUS / 2, centers + sizes * CENTER_RADIUS / 2], dim=1)
    return _holds(central, points) & (strides[:, None] == _level(strides, truth))


def _atss_claims(points: Tensor, strides: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(points, _centers(truth))  # (L, N)
    half = strides[:, None] * ATSS_ANCHOR / 2
    fit = box_iou(torch.cat([points - half, points + half], dim=1), truth)
    chosen = []
    for stride in strides.unique():
        level = torch.nonzero(strides == stride)[:, 0]
        count = min(ATSS_CANDIDATES, len(level))
        chosen.append(level[distances[level].topk(count, dim=0, largest=False).indices])
    candidates = torch.cat(chosen)  # (candidates, N)
    fits = fit.gather(0, candidates)
    good = (fits >= fits.mean(0) + fits.std(0)) & _holds(truth, points).gather(0, candidates)
    return torch.zeros_like(fit, dtype=torch.bool).scatter(0, candidates, good), fit + 1e-6


def _aligned_claims(alignment: Tensor, points: Tensor, strides: Tensor, truth: Tensor) -> Tensor:
    sizes = _sizes(truth)
    away = (points[:, None] - _centers(truth)).abs()  # (L, N, 2)
    small = sizes.amax(1) < 2 * strides[:, None]  # few locations lie in a small box, if any
    candidates = (away <= torch.where(small[..., None], strides[:, None, None], 0).maximum(sizes / 2)).all(2)
    # Before the boxes have learned anything all alignments are nil; distance then decides.
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
    side = _sizes(truth).prod(1).clamp(min=1e-6).sqrt()
    return levels[(side[:, None] / (levels * OCTAVE_SIZE)).log2().abs().argmin(1)]


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _sizes(boxes: Tensor) -> Tensor:
    return boxes[:, 2:] - boxes[:, :2]


def _holds(boxes: Tensor, points: Tensor) -> Tensor:
    """(N, 4) boxes, (L, 2) points -> (L, N) bool: is the point in the box?"""
    above = points[:, None] >= boxes[:, :2]
    below = points[:, None] < boxes[:, 2:]
    return (above & below).all(2)
