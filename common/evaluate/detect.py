"""Running detectors: batches of images in, `Detections` out, and what that costs, in training and in evaluation."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from common.console import progress_bar
from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.evaluate.detections import ModelRun, detection_table, label_map
from common.evaluate.primary import headline
from common.evaluate.results import Cost
from common.model import TrainedDetector, load_detector
from common.model.postprocess import detections_of, fuse_predictions, postprocess
from common.runtime import device_name
from common.types import Batch, Detections

log = logging.getLogger(__name__)

VAL_SUBSET = 100  # images of the validation after each epoch
TIMED, WARM_UP = 15, 3  # images timed one at a time, and images before them that are not counted
INPUT = TypeVar("INPUT")


def detect(
    batches: Iterable[INPUT], run: Callable[[INPUT], Sequence[Detections]], images: int, title: str, shown: bool = True
) -> list[Detections]:
    """What `run` detects in all batches, with a progress bar over the images that `shown` can hide."""
    detections: list[Detections] = []
    with progress_bar(images, title, shown=shown) as bar:
        for batch in batches:
            detections += run(batch)
            bar.update(len(detections) - bar.n)
    return detections


@torch.inference_mode()
def validate(
    model: nn.Module, loader: DataLoader, data: DetectionData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a `Detector` with these classes on the images of `data`, each once in any number of
    processes. It is left in evaluation mode; it and `loader`, of images or cached features, are the accelerator's."""
    model.eval()

    def run(batch: Batch) -> list[Detections]:
        found = postprocess(*fuse_predictions(model(batch.inputs)), batch.meta)
        return accelerator.gather_for_metrics(found, use_gather_object=True)

    detections = detect(loader, run, len(data), "validating", accelerator.is_main_process)
    return headline(detection_table(detections, data).relabelled(label_map(class_names, data)), data)


def val_subset(val_data: DetectionData) -> DetectionData:
    """The images of the validation after each epoch; a line tells where no epoch can be chosen by them."""
    subset = val_data.first(VAL_SUBSET)
    if subset.crowd.all() and not val_data.crowd.all():
        log.warning(
            f"{val_data.source}: no object on the first {len(subset)} validation images, on which the best epoch is "
            "chosen: the last epoch will be kept; --image-ids can put other images first"
        )
    return subset


def run_detector(
    detector: TrainedDetector, data: DetectionData, batch_size: int, workers: int, title: str
) -> list[Detections]:
    """What a checkpoint or an export, as `load_detector` returns it, detects on every image, in labels of its own."""
    loader = make_eval_loader(data, detector.image_size, batch_size, workers)
    return detect(loader, lambda batch: detections_of(*detector.run(batch.inputs), batch.meta), len(data), title)


def detector_cost(detector: TrainedDetector, data: DetectionData, batch_size: int) -> Cost:
    """What the detector costs on the first `batch_size` images."""
    batch = next(iter(make_eval_loader(data.first(batch_size), detector.image_size, batch_size, workers=0)))

    def run(part: slice) -> list[Detections]:
        return detections_of(*detector.run(batch.inputs[part]), batch.meta[part])

    singles, every = [slice(n, n + 1) for n in range(len(batch.meta))], slice(None)
    about = detector.device, detector.precision, detector.parameters
    return measure_cost(lambda part: seconds(run, part), singles, every, *about)


def run_own(path: str, data: DetectionData, batch_size: int, workers: int, precision: str) -> ModelRun:
    """What the checkpoint or the exported detector in `path` detects on the images of `data`, and what it costs."""
    detector = load_detector(path, precision=precision)
    detections = run_detector(detector, data, batch_size, workers, Path(path).stem)
    cost = detector_cost(detector, data, batch_size)
    return ModelRun(detection_table(detections, data), detector.class_names, cost, detector.conditions())


def seconds(run: Callable[[INPUT], object], inputs: INPUT) -> float:
    """How long `run` takes, which leaves its result on the CPU."""
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


@torch.inference_mode()
def measure_cost(
    times: Callable[[INPUT], float],
    singles: Sequence[INPUT],
    batch: INPUT,
    device: torch.device,
    precision: str,
    parameters: int | None,
) -> Cost:
    """Time a detector with its post-processing; `times` runs it on an input and returns the seconds.

    `singles` are inputs of one image each, `batch` all of these images at once.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = [times(singles[number % len(singles)]) for number in range(WARM_UP + TIMED)][WARM_UP:]
    together = min(times(batch) for _ in range(2))
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    name, size = device_name(device), len(singles)
    return Cost(parameters, 1000 * statistics.median(alone), size / together, size, memory, name, precision)
