"""Running a detector: batches of images in, `Detections` out; and what it costs: parameters, time, memory.

The validation during training, the validation scripts and users' own images all use `detect`.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.console import progress_bar
from common.data.memory import DetectionData
from common.evaluate.coco_metrics import headline
from common.evaluate.detections import detection_table, label_map
from common.model.postprocess import fuse_predictions, postprocess
from common.runtime import device_name
from common.types import Detections, mirror_boxes

VAL_SUBSET = 100  # images of the validation after each epoch
TIMED, WARM_UP = 15, 3  # images timed one at a time, and images before them that are not counted
MEMORY_STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


def predict(model: nn.Module, images: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """Scores (B, M, K) and boxes (B, M, 4) of `model` for `images`; with `flip`, also those for their mirror images.

    NMS then keeps the higher-scoring of two predictions of one object.
    """
    scores, boxes = fuse_predictions(model(images))
    if not flip:
        return scores, boxes
    mirrored_scores, mirrored_boxes = fuse_predictions(model(images.flip(-1)))
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
    """
    model.eval()
    detections: list[Detections] = []
    images = len(loader.dataset)  # type: ignore[arg-type]  # torch declares no __len__ for Dataset
    with progress_bar(images, title, shown=accelerator.is_main_process) as bar:
        for batch in loader:
            found = postprocess(*predict(model, batch.inputs, flip), batch.meta)
            detections += accelerator.gather_for_metrics(found, use_gather_object=True)
            bar.update(len(detections) - bar.n)
    return detections


def validate(
    model: nn.Module, loader: DataLoader, data: DetectionData, class_names: tuple[str, ...], accelerator: Accelerator
) -> dict[str, float | None]:
    """The headline numbers of a model with these classes on the images of `data`, which `loader` yields."""
    detections = detect(model, loader, accelerator, title="validating")
    return headline(detection_table(detections, label_map(class_names, data)), data)


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


@dataclass(frozen=True)
class Cost:
    """Cost of detection on this machine. It contains post-processing, but not decoding and resizing of image files."""

    parameters: int | None  # None for an exported model
    ms_per_image: float  # batch of one, median
    images_per_s: float  # at `batch_size`
    batch_size: int
    peak_memory_mb: float | None  # see `PeakMemory`
    device: str
    precision: str


class PeakMemory:
    """Context manager that measures the peak memory of its block: `megabytes` (10^6 bytes) afterwards.

    On a GPU the memory that torch allocated; on a CPU that of the whole process with its libraries, on Linux only.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.megabytes: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET_PEAK.exists():  # some sandboxes have MEMORY_STATUS only
            RESET_PEAK.write_text("5")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif RESET_PEAK.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", MEMORY_STATUS.read_text())):
            self.megabytes = int(peak[1]) * 1024 / 1e6


@torch.inference_mode()
def measure_cost(
    run: Callable,
    singles: Sequence[tuple],
    several: tuple,
    batch_size: int,
    device: torch.device,
    precision: str,
    parameters: int | None = None,
) -> Cost:
    """Time a detector.

    Args:
        run: the detector with its post-processing; what it returns is on the CPU, so that a GPU has finished.
        singles: its arguments for one image each.
        several: its arguments for `batch_size` images at once.
        batch_size: of `several`.
        device: that the detector runs on.
        precision: fp32, bf16, fp16 or int8.
        parameters: of the detector, where they are known.
    """

    def seconds(inputs: tuple) -> float:
        start = time.perf_counter()
        run(*inputs)
        return time.perf_counter() - start

    with PeakMemory(device) as memory:
        times = [seconds(singles[i % len(singles)]) for i in range(WARM_UP + TIMED)][WARM_UP:]
        together = min(seconds(several) for _ in range(2))
    return Cost(
        parameters=parameters,
        ms_per_image=1000 * statistics.median(times),
        images_per_s=batch_size / together,
        batch_size=batch_size,
        peak_memory_mb=memory.megabytes,
        device=device_name(device),
        precision=precision,
    )
