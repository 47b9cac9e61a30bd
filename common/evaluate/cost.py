"""What detection costs: parameters, time, memory."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.runtime import device_name
from common.types import Batch, Detections, Target

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
def measure_cost(
    run: Callable[[Tensor, list[Target]], list[Detections]],
    batch: Batch,
    device: torch.device,
    precision: str,
    parameters: int | None = None,
) -> Cost:
    """Time a detector on the images of one batch.

    Args:
        run: the detector with its post-processing; its detections are on the CPU, so that a GPU has finished.
        batch: on the device.
        device: that the detector runs on.
        precision: fp32, bf16, fp16 or int8.
        parameters: of the detector, where they are known.
    """

    def seconds(images: Tensor, targets: list[Target]) -> float:
        start = time.perf_counter()
        run(images, targets)
        return time.perf_counter() - start

    singles = [i % len(batch.images) for i in range(WARM_UP + TIMED)]
    with PeakMemory(device) as memory:
        times = [seconds(batch.images[i : i + 1], batch.targets[i : i + 1]) for i in singles][WARM_UP:]
        whole = min(seconds(batch.images, batch.targets) for _ in range(2))
    return Cost(
        parameters=parameters,
        ms_per_image=1000 * statistics.median(times),
        images_per_s=len(batch.images) / whole,
        batch_size=len(batch.images),
        peak_memory_mb=memory.megabytes,
        device=device_name(device),
        precision=precision,
    )
