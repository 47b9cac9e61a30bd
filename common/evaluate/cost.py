"""What detection costs: parameters, time, memory."""

import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from common.evaluate.detect import predict
from common.model.postprocess import postprocess
from common.runtime import device_name, precision_name
from common.types import Batch

TIMED, WARM_UP = 15, 3  # images timed one at a time, and images before them that are not counted
MEMORY_STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


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
def measure_cost(model: nn.Module, batch: Batch, accelerator: Accelerator, flip: bool = False) -> Cost:
    """Time a prepared model on the images of one batch on its device."""
    model.eval()

    def seconds(images: torch.Tensor, targets: list) -> float:
        start = time.perf_counter()
        postprocess(*predict(model, images, flip), targets)  # on the CPU, so the GPU has finished
        return time.perf_counter() - start

    singles = [i % len(batch.images) for i in range(WARM_UP + TIMED)]
    with PeakMemory(accelerator.device) as memory:
        times = [seconds(batch.images[i : i + 1], batch.targets[i : i + 1]) for i in singles][WARM_UP:]
        whole = min(seconds(batch.images, batch.targets) for _ in range(2))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        ms_per_image=1000 * statistics.median(times),
        images_per_s=len(batch.images) / whole,
        batch_size=len(batch.images),
        peak_memory_mb=memory.megabytes,
        device=device_name(accelerator.device),
        precision=precision_name(accelerator),
    )
