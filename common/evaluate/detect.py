"""Running a detector: batches of images in, `Detections` out.

The validation during training, the validation scripts and users' own images all use `detect`.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from common.console import finish_step_first, progress_bar
from common.data.coco import CocoData
from common.evaluate.coco_metrics import evaluate_table, headline
from common.evaluate.detections import detection_table, label_map
from common.model.postprocess import postprocess
from common.runtime import raise_if_interrupted
from common.types import Detections, RawOutput, mirror_boxes


def predict(model: nn.Module, images: torch.Tensor, flip: bool) -> RawOutput:
    """The output of `model` for `images`; with `flip`, followed by that for their mirror images as further locations.

    NMS then keeps the higher-scoring of two predictions of one object.
    """
    out = model(images)
    if not flip:
        return out
    mirrored, width = model(images.flip(-1)), images.shape[-1]
    x, y = mirrored.points.unbind(1)
    return RawOutput(
        torch.cat([out.object_logits, mirrored.object_logits], dim=1),
        torch.cat([out.class_logits, mirrored.class_logits], dim=1),
        torch.cat([out.class_rows, mirrored.class_rows + out.class_logits.shape[1]]),
        torch.cat([out.boxes, mirror_boxes(mirrored.boxes, width)], dim=1),
        torch.cat([out.points, torch.stack([width - x, y], dim=1)]),
        torch.cat([out.strides, mirrored.strides]),
    )


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
            found = postprocess(predict(model, batch.images, flip), batch.targets)
            detections += accelerator.gather_for_metrics(found, use_gather_object=True)
            bar.update(len(detections) - bar.n)
            raise_if_interrupted(accelerator)
    return detections


def validate(
    model: nn.Module, loader: DataLoader, data: CocoData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a model with these classes on the images of `data`, which `loader` yields."""
    detections = detect(model, loader, accelerator, title="validating")
    return headline(evaluate_table(detection_table(detections, label_map(class_names, data)), data))
