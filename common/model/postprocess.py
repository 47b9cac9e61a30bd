"""`RawOutput` -> predicted scores and boxes -> `Detections` in original pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from common.types import Detections, RawOutput, Target

MIN_SCORE = 0.001  # detections below it are dropped: ultralytics' evaluation setting
CANDIDATES = 1000  # best (location, class) pairs that enter NMS
NMS_IOU = 0.5
MAX_DETECTIONS = 100  # an image: COCO's limit
SECOND_OBJECT_SHARE, SECOND_CLASS_SHARE = 0.4, 0.6  # of the second look, in the means of both looks


def predictions(out: RawOutput) -> tuple[Tensor, Tensor]:
    """What a detector predicts for a batch: scores (B, M, K) in 0..1, and boxes (B, M, 4) in input pixels.

    Without a second look these are the scores and boxes of all locations. With one they are those of its N proposals:
    its boxes, and the weighted geometric means of the object scores and of the class scores of both looks.
    """
    if out.second is None:
        return out.scores(), out.boxes
    second, (images, count) = out.second, out.second.locations.shape
    index = torch.arange(images, device=out.boxes.device)[:, None].expand(images, count)
    objects = F.logsigmoid(out.object_logits.gather(1, second.locations))
    classes = out.class_logits_at(index, second.locations).log_softmax(-1)
    objects = objects.lerp(F.logsigmoid(second.object_logits[:, -count:]), SECOND_OBJECT_SHARE)
    classes = classes.lerp(second.class_logits[:, -count:].log_softmax(-1), SECOND_CLASS_SHARE)
    return objects.exp()[..., None] * classes.softmax(-1), second.boxes[:, -count:]


def postprocess(scores: Tensor, boxes: Tensor, targets: list[Target]) -> list[Detections]:
    """The best detections of each image of a batch, after class-wise NMS; a box may have several classes.

    Args:
        scores: (B, M, K) as `predictions` returns them.
        boxes: (B, M, 4) input pixels.
        targets: B, whose letterboxes map boxes back to original pixels; their boxes are not used.

    Raises:
        ValueError: a target without a letterbox, that of an augmented image.
    """
    return [_detections(*columns) for columns in zip(scores.float(), boxes.float(), targets, strict=True)]


def _detections(scores: Tensor, boxes: Tensor, target: Target) -> Detections:
    if target.letterbox is None:
        raise ValueError("predictions on an augmented image have no position in the original image")
    num_classes = scores.shape[-1]
    best, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    best, index = best[best > MIN_SCORE], index[best > MIN_SCORE]
    labels = index % num_classes
    # Clipping comes first: batched_nms keeps classes apart by shifting boxes, which negative coordinates defeat.
    original = target.letterbox.to_original(boxes[index // num_classes])
    candidates = clip_boxes_to_image(original, target.letterbox.original)
    solid = ((candidates[:, 2:] - candidates[:, :2]) > 0).all(1)
    candidates, best, labels = candidates[solid], best[solid], labels[solid]
    keep = batched_nms(candidates, best, labels, NMS_IOU)[:MAX_DETECTIONS]
    return Detections(target.image_id, candidates[keep].cpu(), best[keep].cpu(), labels[keep].cpu())
