"""`RawOutput` -> predicted scores and boxes -> `Detections` in original pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.model.boxes import gather_boxes, pairwise_iou
from common.types import Detections, ImageMeta, RawOutput

MIN_SCORE = 0.001  # detections below it are dropped: ultralytics' evaluation setting
CANDIDATES = 500  # best (box, class) pairs that enter NMS; 1000 give the same AP
NMS_IOU = 0.5
MAX_DETECTIONS = 100  # an image: COCO's limit
NMS_ROUNDS = 10
# Of the second look in the mean of the object scores. Fitted, it was 1 on the demo, with which scores are better
# calibrated, but rank worse: mAP@0.5 .68 in place of .79.
SECOND_OBJECT_SHARE = 0.4


class Fusion(NamedTuple):
    """How both looks name objects: the second one's share in the mean, and the temperature of the class scores.

    With few images class scores are too sure; calibrated ones rank detections better. The values are those of 600
    images of COCO; `train/calibration.py` fits them to each detector.
    """

    share: float = 0.6
    temperature: float = 2.0

    def class_logits(self, classes: Tensor) -> Tensor:
        """(2, ..., K) logarithms of the class scores of both looks -> (..., K)."""
        return classes[0].lerp(classes[1], self.share) / self.temperature


DEFAULT_FUSION = Fusion()


def both_looks(out: RawOutput) -> tuple[Tensor, Tensor]:
    """Logarithms of the object scores (2, B, N) and the class scores (2, B, N, K) of the dense head and the second look
    for each of the N proposals."""
    assert out.second is not None  # noqa: S101  (for mypy)
    second, rows, count = out.second, out.class_rows[out.second.locations], out.second.locations.shape[1]
    classes = out.class_logits.gather(1, rows[..., None].expand(-1, -1, out.class_logits.shape[2]))
    objects = out.objectness_logits.gather(1, second.locations), second.objectness_logits[:, -count:]
    return F.logsigmoid(torch.stack(objects)), torch.stack([classes, second.class_logits[:, -count:]]).log_softmax(-1)


def fuse_predictions(out: RawOutput, fusion: Fusion = DEFAULT_FUSION) -> tuple[Tensor, Tensor]:
    """What a detector predicts for a batch: scores (B, M, K) in 0..1, and boxes (B, M, 4) in input pixels.

    Without a second look these are the scores and boxes of all locations. With one they are those of its N proposals:
    its boxes, and the weighted geometric means of the object scores and of the class scores of both looks, the latter
    at a temperature (temperature scaling, arXiv 1706.04599).
    """
    if out.second is None:
        return out.scores(), out.boxes
    objects, classes = both_looks(out)
    found, named = objects[0].lerp(objects[1], SECOND_OBJECT_SHARE).exp(), fusion.class_logits(classes).softmax(-1)
    return found[..., None] * named, out.second.boxes[:, -out.second.locations.shape[1] :]


def select_detections(scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The `MAX_DETECTIONS` best pairs of a box and a class in each image, after class-wise NMS, by falling score.

    Tensor operations of fixed shapes alone, so that it is part of exported detectors.

    Returns:
        Boxes (B, D, 4), scores (B, D), 0 where an image has fewer than D, and labels (B, D) int64.
    """
    scores, boxes = scores.float(), boxes.float()
    classes, pairs = scores.shape[2], scores.flatten(1)
    best, index = pairs.topk(min(CANDIDATES, pairs.shape[1]))
    labels, candidates = index % classes, gather_boxes(boxes, index // classes)
    same = labels[:, :, None] == labels[:, None]
    best = best * nms_mask(same & (pairwise_iou(candidates, candidates) > NMS_IOU))
    best, order = best.topk(min(MAX_DETECTIONS, best.shape[1]))
    return gather_boxes(candidates, order), best, labels.gather(1, order)


def postprocess(scores: Tensor, boxes: Tensor, meta: Sequence[ImageMeta]) -> list[Detections]:
    """`fuse_predictions` of a batch -> the best detections of each image; a box may have several classes."""
    return detections_of(*select_detections(scores, boxes), meta)


def detections_of(boxes: Tensor, scores: Tensor, labels: Tensor, meta: Sequence[ImageMeta]) -> list[Detections]:
    """What `select_detections` returns -> `Detections` in original pixels, none too unsure or outside the image."""
    columns = zip(boxes.cpu(), scores.cpu(), labels.cpu(), meta, strict=True)
    return [_detections(*column) for column in columns]


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, meta: ImageMeta) -> Detections:
    if meta.scale is None:
        raise ValueError("predictions on an augmented image have no position in the original image")
    original = clip_boxes_to_image(boxes / boxes.new_tensor(meta.scale).repeat(2), meta.size)
    keep = (scores > MIN_SCORE) & ((original[:, 2:] - original[:, :2]) > 0).all(1)
    return Detections(meta.image_id, original[keep], scores[keep], labels[keep])


def nms_mask(conflict: Tensor) -> Tensor:
    """Greedy NMS, (B, N) from conflicts (B, N, N) of boxes by falling score: kept are those without a kept one before.

    Each round decides the boxes that depend on boxes which the round before decided. After `NMS_ROUNDS` all are decided
    as a loop would, unless a chain of more boxes decide about each other, one by one.
    """
    before = conflict.triu(diagonal=1).float()
    kept = torch.ones_like(before[:, :1])  # (B, 1, N)
    for _ in range(NMS_ROUNDS):
        kept = ((kept @ before) == 0).float()
    return kept[:, 0] > 0
