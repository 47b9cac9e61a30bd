"""`RawOutput` -> predicted scores and boxes -> `Detections` in original pixels."""

from collections.abc import Sequence

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
SECOND_OBJECT_SHARE, SECOND_CLASS_SHARE = 0.4, 0.6  # of the second look, in the means of both looks
CLASS_TEMPERATURE = 2.0  # with few images class scores are too sure; calibrated ones rank detections better


def fuse_predictions(out: RawOutput) -> tuple[Tensor, Tensor]:
    """What a detector predicts for a batch: scores (B, M, K) in 0..1, and boxes (B, M, 4) in input pixels.

    Without a second look these are the scores and boxes of all locations. With one they are those of its N proposals:
    its boxes, and the weighted geometric means of the object scores and of the class scores of both looks, the latter
    at `CLASS_TEMPERATURE` (temperature scaling, arXiv 1706.04599).
    """
    if out.second is None:
        return out.scores(), out.boxes
    second, rows, count = out.second, out.class_rows[out.second.locations], out.second.locations.shape[1]
    objects = F.logsigmoid(out.objectness_logits.gather(1, second.locations))
    classes = out.class_logits.gather(1, rows[..., None].expand(-1, -1, out.class_logits.shape[2])).log_softmax(-1)
    objects = objects.lerp(F.logsigmoid(second.objectness_logits[:, -count:]), SECOND_OBJECT_SHARE)
    classes = classes.lerp(second.class_logits[:, -count:].log_softmax(-1), SECOND_CLASS_SHARE)
    return objects.exp()[..., None] * (classes / CLASS_TEMPERATURE).softmax(-1), second.boxes[:, -count:]


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
