"""Assignment: which object each location of the head is trained to predict, for all images of a batch at once.

Tables are (B, N, L), objects by locations: short last dimensions take several times the time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.types import RawOutput, Targets

ASSIGNMENTS = ("center", "task-aligned")

CENTER_SHARE = 0.5  # of each side of a box; the locations in this central part are assigned to it
STRIDES_A_SIDE = 3.0  # a box belongs to the level with the stride nearest to its side / 3, on a logarithmic scale
# Locations an object. On 150 held-out images of COCO, 40 gave an mAP@0.5 of .097 and .088 (two seeds), 10 gave .083
# and .086: most of the equally good locations in a large object are then trained as background.
ALIGNED_CANDIDATES = 40


class Assignment(NamedTuple):
    """What each of the L locations of B images is trained to predict.

    Shapes (B, L): object int64, index into `Targets.boxes`, -1 for none; quality float32 in 0..1, the score to predict,
    0 where there is no object; ignored bool, neither object nor background.
    """

    object: Tensor
    quality: Tensor
    ignored: Tensor


@torch.no_grad()
def assign(out: RawOutput, iou: Tensor, targets: Targets, kind: str) -> Assignment:
    """Assign the objects to the locations of the dense head, given the IoU (B, N, L) with their predicted boxes.

    Every object gets at least the location nearest to its centre, at the level of its size, so that every object is
    trained. Where several objects claim a location, `center` gives it to the smallest, `task-aligned` to the one with
    the highest IoU with its prediction. Locations in a crowd box that no object claims are ignored by the loss.
    """
    x1, y1, x2, y2 = targets.boxes[..., None, :].unbind(-1)  # (B, N, 1) each
    width, height = x2 - x1, y2 - y1
    size = (width * height).clamp(min=1e-6)
    level = (size.sqrt() / (out.levels * STRIDES_A_SIDE)).log2().abs().argmin(-1, keepdim=True)
    own_level = out.strides == out.levels[level]
    x, y = out.points.unbind(-1)  # (L,)
    away_x, away_y = (x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs()  # (B, N, L)
    cube = iou * iou * iou
    alignment = cube.mul_(cube).mul_(out.objectness_logits.sigmoid()[:, None])  # with the sixth power, as in TOOD
    if kind == "center":
        central = (away_x < width * CENTER_SHARE / 2) & (away_y < height * CENTER_SHARE / 2)
        candidates, priority = own_level & central, 1 / size
    else:
        candidates, priority = _aligned(alignment, away_x, away_y, width, height, out.strides), iou + 1e-6
    objects = targets.objects[..., None]
    candidates &= objects
    squared = away_x.square_().add_(away_y.square_())
    nearest = squared.masked_fill_(~own_level, torch.inf).argmin(2, keepdim=True)
    unclaimed = objects & ~candidates.any(2, keepdim=True)
    candidates = candidates.scatter(2, nearest, candidates.gather(2, nearest) | unclaimed)

    best, index = (priority * candidates).max(1)  # (B, L)
    positive = best > 0
    quality = iou.gather(1, index[:, None])[:, 0] * positive
    if kind == "task-aligned":
        aligned = alignment.gather(1, index[:, None])[:, 0] * positive
        quality = _aligned_quality(quality, aligned, index, targets.labels.shape[1])
    x1, y1, x2, y2 = targets.crowds[..., None, :].unbind(-1)
    in_crowd = ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).any(1)
    return Assignment(torch.where(positive, index, -1), quality, in_crowd & ~positive)


def _aligned(
    alignment: Tensor, away_x: Tensor, away_y: Tensor, width: Tensor, height: Tensor, strides: Tensor
) -> Tensor:
    """(B, N, L) bool: the locations in each box (B, N, 1) that are aligned best with it."""
    reach = (torch.maximum(width, height) < 2 * strides) * strides  # a small box contains few locations or none
    near = (away_x <= torch.maximum(reach, width / 2)) & (away_y <= torch.maximum(reach, height / 2))
    # Before training all alignments are about 0; the distance to the centre then decides.
    distance = torch.maximum(away_x * (1 / width.clamp(min=1)), away_y * (1 / height.clamp(min=1)))
    ranked = (1e-9 / distance.add_(1)).add_(alignment).mul_(near)
    top, index = ranked.topk(min(ALIGNED_CANDIDATES, len(strides)), sorted=False)
    return torch.zeros_like(near).scatter(2, index, top > 0)


def _aligned_quality(iou: Tensor, alignment: Tensor, index: Tensor, count: int) -> Tensor:
    """As in TOOD, the target of an object's best aligned location is its best IoU, and that of the others is in ratio.

    `iou` and `alignment` (B, L) are those of the predicted box with its object, 0 where it has none, `index` (B, L) is
    the object among `count`.
    """
    most = iou.new_zeros(2, len(iou), count)
    most = most.scatter_reduce(2, index.expand(2, -1, -1), torch.stack([iou, alignment]), "amax")
    return alignment * (most[0] / most[1].clamp(min=1e-12)).gather(1, index)
