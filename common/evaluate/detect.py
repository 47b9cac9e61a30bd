"""Running detectors of this project: batches of images in, `Detections` out, in training and in evaluation."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from common.console import progress_bar
from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.evaluate.cost import measure_cost, seconds
from common.evaluate.detections import ModelRun, detection_table, label_map
from common.evaluate.primary import headline
from common.evaluate.results import Cost
from common.model import TrainedDetector, load_detector
from common.model.postprocess import detections_of, fuse_predictions, postprocess
from common.types import Detections

VAL_SUBSET = 100  # images of the validation after each epoch


@torch.inference_mode()
def detect(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, title: str = "detecting"
) -> list[Detections]:
    """Detections of every image of `loader`, each exactly once, also where several processes share the work.

    Args:
        model: a `Detector`, prepared by `accelerator`; left in evaluation mode.
        loader: batches of letterboxed images, or of cached features, prepared by `accelerator`.
        title: of the progress bar.
    """
    model.eval()
    detections: list[Detections] = []
    images = len(loader.dataset)  # type: ignore[arg-type]  # torch declares no __len__ for Dataset
    with progress_bar(images, title, shown=accelerator.is_main_process) as bar:
        for batch in loader:
            found = postprocess(*fuse_predictions(model(batch.inputs)), batch.meta)
            detections += accelerator.gather_for_metrics(found, use_gather_object=True)
            bar.update(len(detections) - bar.n)
    return detections


def validate(
    model: nn.Module, loader: DataLoader, data: DetectionData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a model with these classes on the images of `data`, which `loader` yields."""
    detections = detect(model, loader, accelerator, title="validating")
    return headline(detection_table(detections, data, label_map(class_names, data)), data)


def val_subset(val_data: DetectionData) -> DetectionData:
    """The images of the validation after each epoch: the first `VAL_SUBSET`.

    Prints a warning where they have no object, by which the best epoch could be chosen, although later images have.
    """
    subset = val_data.first(VAL_SUBSET)
    if subset.crowd.all() and not val_data.crowd.all():
        print(
            f"warning: {val_data.source}: no object on the first {len(subset)} validation images, on which the best "
            "epoch is chosen: the last epoch will be kept; --image-ids can put other images first",
            flush=True,
        )
    return subset


def run_detector(
    detector: TrainedDetector, data: DetectionData, batch_size: int, workers: int, title: str
) -> list[Detections]:
    """What a checkpoint or an exported detector detects on every image of `data`, in its order, in its own labels.

    Args:
        detector: as `load_detector` returns it.
        data: the images.
        batch_size: images at once.
        workers: processes that decode them.
        title: of the progress bar.
    """
    detections: list[Detections] = []
    with progress_bar(len(data), title) as bar:
        for batch in make_eval_loader(data, detector.image_size, batch_size, workers):
            detections += detections_of(*detector.run(batch.inputs), batch.meta)
            bar.update(len(batch.meta))
    return detections


def detector_cost(detector: TrainedDetector, data: DetectionData, batch_size: int) -> Cost:
    """What the detector costs on the first `batch_size` images."""
    batch = next(iter(make_eval_loader(data.first(batch_size), detector.image_size, batch_size, workers=0)))
    count = len(batch.meta)

    def run(part: slice) -> list[Detections]:
        return detections_of(*detector.run(batch.inputs[part]), batch.meta[part])

    return measure_cost(
        lambda number: seconds(run, slice(number % count, number % count + 1)),
        lambda: seconds(run, slice(None)),
        count,
        detector.device,
        detector.precision,
        detector.parameters,
    )


def run_own(path: str, data: DetectionData, batch_size: int, workers: int, precision: str) -> ModelRun:
    """What the checkpoint or the exported detector in `path` detects on the images of `data`, and what it costs.

    Raises:
        InputError: what `load_detector` raises.
    """
    detector = load_detector(path, precision=precision)
    detections = run_detector(detector, data, batch_size, workers, Path(path).stem)
    cost = detector_cost(detector, data, batch_size)
    return ModelRun(detection_table(detections, data), detector.class_names, cost, detector.conditions())
