"""How the two looks of a detector name objects, fitted to images that it was not trained on.

On its training images a detector is far too sure of the names of objects: the temperature of its class scores, and the
shares of both looks in them, are those with the lowest loss elsewhere (temperature scaling, arXiv 1706.04599).
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
    """Fit how the detector's looks, if it has two, name objects to these images, if it detects enough of their objects.

    The class of the best box of each object is to be the object's.
    """
    classes, labels = list[Tensor](), list[Tensor]()
    if not detector.config.second_look:
        return
    for batch in itertools.chain(*make_eval_loader(data, detector.input_size, 1, workers)):
        with accelerator.autocast():
            out = detector.eval()(batch.inputs.to(accelerator.device))
        iou = pairwise_iou(batch.targets.boxes, fuse_predictions(out)[1].cpu())[0] * batch.targets.objects[0][:, None]
        best, place = iou.max(1)
        classes.append(both_looks(out)[1][:, 0].cpu()[:, place[best >= POSITIVE_IOU]])
        labels.append(batch.targets.labels[0][best >= POSITIVE_IOU])
    if (count := sum(map(len, labels))) < LEAST_OBJECTS:
        return
    fusion = fit_fusion(torch.cat(classes, 1), torch.cat(labels))
    detector.config = replace(detector.config, fusion=fusion)
    values = f"share of the second look {fusion.share:.2g}, temperature {fusion.temperature:.2g}"
    log.info(f"class scores calibrated on {count} objects of {len(data)} images held out: {values}")


def fit_fusion(classes: Tensor, labels: Tensor) -> Fusion:
    """The `Fusion` with the lowest cross-entropy on N boxes of objects with these labels (N,).

    `classes` (2, N, K) are the logarithms of both looks' class scores.
    """

    def loss(pair: tuple[float, float]) -> float:
        return F.cross_entropy(Fusion(*pair).class_logits(classes), labels).item()

    return Fusion(*min(itertools.product(SHARES.tolist(), TEMPERATURES.tolist()), key=loss))
