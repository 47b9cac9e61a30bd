"""How the two looks of a detector are combined, fitted to images that it was not trained on.

On its training images a detector is far too sure of the names of objects: the temperature of its class scores, and the
shares of both looks, are those with the lowest loss elsewhere (temperature scaling, arXiv 1706.04599).
"""

import itertools
import logging
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.data.sources import ranking
from common.model.boxes import pairwise_iou
from common.model.detector import Detector
from common.model.losses import POSITIVE_IOU
from common.model.postprocess import Fusion, both_looks, fuse_predictions

log = logging.getLogger(__name__)
LARGEST = 250  # images to fit on
LEAST_OBJECTS = 50  # in them; with fewer the default is better than what they say
SHARES, TEMPERATURES = np.linspace(0, 1, 11), np.geomspace(0.5, 5, 24)


def split_calibration(data: DetectionData, share: float) -> tuple[DetectionData, DetectionData | None]:
    """The images to train on, and that share of them, by a hash of their names, to fit on; None: too few objects."""
    order = ranking(data, "calibration", 0)
    count = min(LARGEST, round(share * len(data)))
    fitted = data.select(np.sort(order[:count]))
    if (~fitted.crowd).sum() < LEAST_OBJECTS:
        return data, None
    return data.select(np.sort(order[count:])), fitted


@torch.inference_mode()
def calibrate(detector: Detector, data: DetectionData, workers: int, accelerator: Accelerator) -> None:
    """Fit how the detector combines both looks, if it has two, to these images, if it detects enough of their objects.

    The object's score is to be the IoU that the box reaches, the class that of the object whose best box it is.
    """
    objects, reached, classes, labels = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    if not detector.config.second_look:
        return
    for batch in itertools.chain(*make_eval_loader(data, detector.input_size, 1, workers)):
        with accelerator.autocast():
            out = detector.eval()(batch.inputs.to(accelerator.device))
        object_logs, class_logs = (part[:, 0].cpu() for part in both_looks(out))
        iou = pairwise_iou(batch.targets.boxes, fuse_predictions(out)[1].cpu())[0] * batch.targets.objects[0][:, None]
        best, place = iou.max(1)
        objects.append(object_logs)
        reached.append(iou.amax(0))
        classes.append(class_logs[:, place[best >= POSITIVE_IOU]])
        labels.append(batch.targets.labels[0][best >= POSITIVE_IOU])
    if (count := sum(map(len, labels))) < LEAST_OBJECTS:
        return
    fusion = fit_fusion(torch.cat(objects, 1), torch.cat(reached), torch.cat(classes, 1), torch.cat(labels))
    detector.config = replace(detector.config, fusion=fusion)
    values = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in fusion._asdict().items())
    log.info(f"calibrated on {count} objects of {len(data)} images held out: {values}")


def fit_fusion(objects: Tensor, reached: Tensor, classes: Tensor, labels: Tensor) -> Fusion:
    """The `Fusion` with the lowest cross-entropy.

    Args:
        objects: (2, M) logarithms of both looks' object scores of boxes, and `reached` (M,) their IoU with an object.
        classes: (2, N, K) logarithms of both looks' class scores of boxes, and `labels` (N,) their objects' classes.
    """

    def object_loss(share: float) -> float:
        return F.binary_cross_entropy(objects[0].lerp(objects[1], share).exp(), reached).item()

    def class_loss(pair: tuple[float, float]) -> float:
        return F.cross_entropy(Fusion(0.0, *pair).class_logits(classes), labels).item()

    pairs = itertools.product(SHARES.tolist(), TEMPERATURES.tolist())
    return Fusion(min(SHARES.tolist(), key=object_loss), *min(pairs, key=class_loss))
