"""Running a detector: batches of images in, `Detections` out.

The validation during training, the validation scripts and users' own images all use `detect`.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.console import finish_step_first, progress_bar
from common.data.coco import CocoData
from common.evaluate.coco_metrics import headline
from common.evaluate.detections import detection_table, label_map
from common.model.postprocess import postprocess, predictions
from common.runtime import raise_if_interrupted
from common.types import Detections, mirror_boxes


def predict(model: nn.Module, images: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """Scores (B, M, K) and boxes (B, M, 4) of `model` for `images`; with `flip`, also those for their mirror images.

    NMS then keeps the higher-scoring of two predictions of one object.
    """
    scores, boxes = predictions(model(images))
    if not flip:
        return scores, boxes
    mirrored_scores, mirrored_boxes = predictions(model(images.flip(-1)))
    mirrored_boxes = mirror_boxes(mirrored_boxes, images.shape[-1])
    return torch.cat([scores, mirrored_scores], dim=1), torch.cat([boxes, mirrored_boxes], dim=1)


@torch.inference_mode()
def detect(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, title: str = "detecting", flip: bool = False
) -> list[Detections]:
    """Detections of every image of `loader`, each exactly once, also where several processes share the work.

    Args:
        model: a `Detector`, prepared by `accelerator`; left in evaluation mode.
        loader: batches of letterboxed images, or of cached features, prepared by `accelerator`.
        title: of the progress bar.
        flip: run on the mirrored images too; not for cached features.

    Raises:
        Interrupted: between two batches, after a signal.
    """
    model.eval()
    detections: list[Detections] = []
    images = len(loader.dataset)  # type: ignore[arg-type]  # torch declares no __len__ for Dataset
    with finish_step_first(), progress_bar(images, title, shown=accelerator.is_main_process) as bar:
        for batch in loader:
            found = postprocess(*predict(model, batch.images, flip), batch.targets)
            detections += accelerator.gather_for_metrics(found, use_gather_object=True)
            bar.update(len(detections) - bar.n)
            raise_if_interrupted(accelerator)
    return detections


def validate(
    model: nn.Module, loader: DataLoader, data: CocoData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a model with these classes on the images of `data`, which `loader` yields."""
    detections = detect(model, loader, accelerator, title="validating")
    return headline(detection_table(detections, label_map(class_names, data)), data)
