"""Detection heads: patch features of the backbone, those of several blocks side by side -> `RawOutput`.

Every head scores a class at a location as sigmoid(object) x softmax(class). The object logit is shared by all classes
and trained on every box, which needs fewer images of each class than K separate logits. The softmax is trained only
where there is an object.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.types import RawOutput

OBJECT_PRIOR = 0.01  # score of an object at each location before training (RetinaNet, arXiv 1708.02002)
SIZE_PRIOR = 6.0  # side of a box in strides, before training
PYRAMID_SIZE_PRIOR = 4.0  # the same in the pyramid head, whose coarser levels predict the larger boxes
PYRAMID = (0.5, 1.0, 2.0, 4.0)  # strides of the pyramid's levels, in patches
TOWER_WIDTH, TOWER_DEPTH = 128, 2  # channels and 3 x 3 convolutions of the pyramid head
MAX_LOG_SIZE = 6.0  # e^6 strides: larger than any input, and finite


class LinearHead(nn.Module):
    """One linear class layer and one linear box layer on every patch token.

    Args:
        channels: of a patch's features, all blocks together.
        num_classes: K.
        stride: spacing of the patch tokens, input pixels.
    """

    levels: Tensor

    def __init__(self, *, channels: int, num_classes: int, stride: int):
        super().__init__()
        self.stride = stride
        self.register_buffer("levels", torch.tensor([float(stride)], device="cpu"), persistent=False)
        self.embed: nn.Module = nn.Identity()
        self.classify = nn.Linear(channels, 1 + num_classes)  # object, then classes
        self.locate = nn.Linear(channels, 4)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.locate.weight)  # random boxes of raw tokens reach 50 strides, and may never shrink again
        for layer in (self.classify, self.locate):
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classify.bias[0], -math.log(1 / OBJECT_PRIOR - 1))
        nn.init.constant_(self.locate.bias[2:], math.log(SIZE_PRIOR))

    def forward(self, features: Tensor) -> RawOutput:
        """(B, h, w, C) -> `RawOutput` with L = h * w."""
        tokens = self.embed(features.flatten(1, 2))  # (B, L, C)
        scores = self.classify(tokens).float()
        points, strides = locations((features.shape[1], features.shape[2]), self.stride, tokens.device)
        boxes = decode_boxes(self.locate(tokens).float(), points, strides)
        rows = torch.arange(len(points), device=tokens.device)
        return RawOutput(scores[..., 0], scores[..., 1:], rows, boxes, points, strides, self.levels)


class MultiLayerHead(LinearHead):
    """The linear head behind two hidden layers of `width` units with dropout, each token by itself."""

    def __init__(self, *, channels: int, num_classes: int, stride: int, width: int = 256, dropout: float = 0.1):
        super().__init__(channels=width, num_classes=num_classes, stride=stride)
        sizes = ((channels, width), (width, width))
        layers = [(nn.Linear(*size), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)) for size in sizes]
        self.embed = nn.Sequential(*(module for layer in layers for module in layer))


class PyramidHead(nn.Module):
    """A dense head on a simple feature pyramid of half, once, twice and four times the patch size.

    Pooling the map of patch tokens gives the coarser levels (ViTDet, arXiv 2203.16527). One tower, shared by the
    levels, predicts objects and boxes (FCOS, arXiv 1904.01355); on the patch grid it also predicts them for the four
    quarters of each patch, which form the finest level without a feature map of their own. Classes are predicted by one
    linear layer on the patch tokens, since few images of each class overfit a deeper one; the quarters of a patch share
    its class. In training `dropout` is the share of the tower's channels that are dropped.
    """

    levels: Tensor

    def __init__(self, *, channels: int, num_classes: int, stride: int, dropout: float = 0.1):
        super().__init__()
        self.stride = stride
        self.register_buffer("levels", torch.tensor([s * stride for s in PYRAMID], device="cpu"), persistent=False)
        self.reduce = nn.Linear(channels, TOWER_WIDTH, bias=False)
        self.enter = nn.Sequential(*_norm_and_activation())
        convolutions = [nn.Conv2d(TOWER_WIDTH, TOWER_WIDTH, 3, padding=1, bias=False) for _ in range(TOWER_DEPTH)]
        layers = [nn.Sequential(c, *_norm_and_activation(), nn.Dropout2d(dropout)) for c in convolutions]
        self.tower = nn.Sequential(*layers)
        self.predict = nn.Conv2d(TOWER_WIDTH, 5, 3, padding=1)  # object, then the box
        self.predict_quarters = nn.Conv2d(TOWER_WIDTH, 5 * 4, 1)  # the same for each quarter of a patch
        self.classify = nn.Linear(channels, num_classes)
        for layer in (self.predict, self.predict_quarters, self.classify):
            nn.init.normal_(layer.weight, std=0.01)
        size = math.log(PYRAMID_SIZE_PRIOR)
        prior = torch.tensor([-math.log(1 / OBJECT_PRIOR - 1), 0, 0, size, size])
        self.predict.bias = nn.Parameter(prior)
        self.predict_quarters.bias = nn.Parameter(prior.repeat_interleave(4))
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor) -> RawOutput:
        """(B, h, w, C) -> `RawOutput`, its locations from the finest level to the coarsest."""
        patches = self.enter(self.reduce(features).permute(0, 3, 1, 2))
        double = F.max_pool2d(patches, 2, ceil_mode=True)
        levels = [self.tower(level) for level in (patches, double, F.max_pool2d(double, 2, ceil_mode=True))]
        quarters = F.pixel_shuffle(self.predict_quarters(levels[0]), 2)
        predictions = [quarters, *(self.predict(level) for level in levels)]

        classes = [self.classify(features).permute(0, 3, 1, 2)]
        for _ in range(2):
            classes.append(F.avg_pool2d(classes[-1], 2, ceil_mode=True, count_include_pad=False))
        class_logits = torch.cat([c.permute(0, 2, 3, 1).flatten(1, 2) for c in classes], dim=1).float()
        rows = torch.arange(class_logits.shape[1], device=features.device)
        patch_rows = rows[: features.shape[1] * features.shape[2]].view(features.shape[1:3])
        quarter_rows = patch_rows.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()

        outputs = torch.cat([p.flatten(2) for p in predictions], dim=2).transpose(1, 2).float()  # (B, L, 5)
        grids = [
            locations((p.shape[-2], p.shape[-1]), self.stride * scale, features.device)
            for p, scale in zip(predictions, PYRAMID, strict=True)
        ]
        points, strides = (torch.cat(parts) for parts in zip(*grids, strict=True))
        boxes = decode_boxes(outputs[..., 1:], points, strides)
        class_rows = torch.cat([quarter_rows, rows])
        return RawOutput(outputs[..., 0], class_logits, class_rows, boxes, points, strides, self.levels)


def _norm_and_activation() -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(TOWER_WIDTH // 16, TOWER_WIDTH), nn.SiLU()


def locations(grid: tuple[int, int], stride: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres (L, 2) as (x, y) in input pixels and strides (L,) of a `grid` of (rows, columns), row by row."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    points = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride
    return points, torch.full((rows * columns,), float(stride), device=device)


def decode_boxes(offsets: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Box layer's (..., L, 4) output -> (..., L, 4) xyxy input pixels, width and height always positive.

    The output is the centre's distance from the location in strides, then the logarithm of width and height in strides
    (YOLOX, arXiv 2107.08430). The location need not lie in the box, as it may not where a box is smaller than a stride.
    """
    centers = points + offsets[..., :2] * strides[:, None]
    halves = offsets[..., 2:].clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() * strides[:, None] / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)
