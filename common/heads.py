"""Detection heads: feature maps of the backbone -> `RawOutput`.

Every head scores an object at a location as sigmoid(object) x softmax(class). One object logit shared by all classes
learns "something is here" from every box, which a handful of pictures of each class could not teach K separate
detectors; the softmax then only has to tell classes apart, and is trained where there is an object.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.types import RawOutput

OBJECT_PRIOR = 0.01  # share of locations that hold an object, before training (RetinaNet, arXiv 1708.02002)
SIZE_PRIOR = 6.0  # side of a box in strides, before training
MAX_LOG_SIZE = 6.0  # e^6 strides: beyond any input, and far from overflow


class LinearHead(nn.Module):
    """One linear class layer and one linear box layer on every patch token.

    Args:
        channels: channels of all the feature maps together; the tokens of several blocks are concatenated.
        num_classes: K.
        stride: spacing of the patch tokens, input pixels.
    """

    def __init__(self, *, channels: int, num_classes: int, stride: int):
        super().__init__()
        self.stride = stride
        self.classify = nn.Linear(channels, 1 + num_classes)  # object, then classes
        self.locate = nn.Linear(channels, 4)
        for layer in (self.classify, self.locate):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classify.bias[0], -math.log(1 / OBJECT_PRIOR - 1))
        nn.init.constant_(self.locate.bias[2:], math.log(SIZE_PRIOR))

    def forward(self, features: Sequence[Tensor]) -> RawOutput:
        """Maps of the same shape (B, C, h, w) -> `RawOutput` with L = h * w."""
        grid = (features[0].shape[-2], features[0].shape[-1])
        tokens = torch.cat(list(features), dim=1).flatten(2).transpose(1, 2)  # (B, L, C)
        scores = self.classify(tokens).float()
        points, strides = locations(grid, self.stride, tokens.device)
        boxes = decode_boxes(self.locate(tokens).float(), points, strides)
        return RawOutput(scores[..., 0], scores[..., 1:], boxes, points, strides)


def locations(grid: tuple[int, int], stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres (L, 2) as (x, y) in input pixels and strides (L,) of a `grid` of (rows, columns), row by row."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    points = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride
    return points, torch.full((rows * columns,), float(stride), device=device)


def decode_boxes(offsets: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Box layer's (..., L, 4) output -> (..., L, 4) xyxy input pixels, width and height always positive.

    The output holds the centre's distance from the location in strides, then the logarithm of width and height in
    strides (YOLOX, arXiv 2107.08430), so an object smaller than the grid can lie beside its location.
    """
    centers = points + offsets[..., :2] * strides[:, None]
    halves = offsets[..., 2:].clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() * strides[:, None] / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)
