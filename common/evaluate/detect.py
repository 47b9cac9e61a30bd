"""Running detectors: batches of images in, `Detections` out, and what that costs, in training and in evaluation."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from common.console import progress_bar
from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.evaluate.detections import ModelRun, detection_table
from common.evaluate.results import Cost
from common.model import TrainedDetector
from common.model.detector import Detector
from common.model.postprocess import detections_of, fuse_predictions, postprocess
from common.runtime import device_name
from common.types import Batch, Detections

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
def detect_images(model: Detector, loader: DataLoader, images: int, accelerator: Accelerator) -> list[Detections]:
    """What a detector detects in the images of the accelerator's `loader`, each once in any number of processes.

    It is left in evaluation mode.
    """
    model.eval()

    def run(batches: list[Batch]) -> list[Detections]:
        found: list[Detections] = []
        for batch in batches:
            with accelerator.autocast():
                out = model(batch.inputs)
            found += postprocess(*fuse_predictions(out, model.config.fusion), batch.meta)
        return gather_object(found)

    detections = detect(loader, run, images, "validating", accelerator.is_main_process)
    return list({found.image_id: found for found in detections}.values())  # accelerate fills up the last batches


def run_detector(
    detector: TrainedDetector, data: DetectionData, batch_size: int, workers: int, title: str, timed: bool = True
) -> ModelRun:
    """What a checkpoint or an export, as `load_detector` returns it, detects on every image, and what that costs."""

    def run(batches: list[Batch]) -> list[Detections]:
        return [found for batch in batches for found in detections_of(*detector.run(batch.inputs), batch.meta)]

    def inputs_of(part: np.ndarray) -> list[Batch]:
        return next(iter(make_eval_loader(data.select(part), detector.input_size, len(part), workers=0)))

    loader = make_eval_loader(data, detector.input_size, batch_size, workers)
    table, cost = detection_table(detect(loader, run, len(data), title), data), None
    if timed:
        count, about = min(batch_size, len(data)), (detector.device, detector.precision, detector.parameters)
        cost = measure_cost(lambda batch: seconds(run, batch), inputs_of, count, *about)
    return ModelRun(table, detector.class_names, cost, detector.conditions())


def seconds(run: Callable[[INPUT], object], inputs: INPUT) -> float:
    """How long `run` takes, which leaves its result on the CPU."""
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


@torch.inference_mode()
def measure_cost(
    times: Callable[[INPUT], float],
    inputs_of: Callable[[np.ndarray], INPUT],
    count: int,
    device: torch.device,
    precision: str,
    parameters: int | None,
) -> Cost:
    """The cost of a detector with its post-processing on the first `count` images, alone and together.

    `inputs_of` the images at some indices are what `times` runs the detector on, and returns the seconds.
    """
    singles, together = [inputs_of(np.array([index])) for index in range(count)], inputs_of(np.arange(count))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = [times(singles[number % count]) for number in range(WARM_UP + TIMED)][WARM_UP:]
    rate = count / min(times(together) for _ in range(2))
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return Cost(parameters, 1000 * statistics.median(alone), rate, count, memory, device_name(device), precision)
