"""`RawOutput` -> `Detections` in original pixels."""

from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from common.types import Detections, RawOutput, Target

MIN_SCORE = 0.001  # detections below it are dropped: ultralytics' evaluation setting
CANDIDATES = 1000  # best (location, class) pairs that enter NMS
NMS_IOU = 0.5
MAX_DETECTIONS = 100  # an image: COCO's limit


def postprocess(out: RawOutput, targets: list[Target]) -> list[Detections]:
    """The best detections of each image of a batch, after class-wise NMS; a location may predict several classes.

    Args:
        out: the output of the detector.
        targets: B, whose letterboxes map boxes back to original pixels; their boxes are not used.

    Raises:
        ValueError: a target without a letterbox, that of an augmented image.
    """
    columns = zip(out.scores(), out.boxes, targets, strict=True)
    return [_detections(scores.float(), boxes.float(), target) for scores, boxes, target in columns]


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
    return Detections(target.image_id, *(t[keep].cpu() for t in (candidates, best, labels)))
