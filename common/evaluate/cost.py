"""What detection costs: parameters, time, memory."""

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.evaluate.results import Cost
from common.runtime import device_name

TIMED, WARM_UP = 15, 3  # images timed one at a time, and images before them that are not counted
MEMORY_STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


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


def seconds(run: Callable, *arguments) -> float:
    """How long a call takes; what it returns is on the CPU, so that a GPU has finished."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


@torch.inference_mode()
def measure_cost(
    single: Callable[[int], float],
    several: Callable[[], float],
    batch_size: int,
    device: torch.device,
    precision: str,
    parameters: int | None = None,
) -> Cost:
    """Time a detector with its post-processing.

    Args:
        single: detects on one image, given a number from 0 that chooses it, and returns its seconds.
        several: detects on `batch_size` images at once and returns its seconds.
        batch_size: of `several`.
        device: that the detector runs on.
        precision: fp32, bf16, fp16 or int8.
        parameters: of the detector, where they are known.
    """
    with PeakMemory(device) as memory:
        singles = [single(number) for number in range(WARM_UP + TIMED)][WARM_UP:]
        together = min(several() for _ in range(2))
    return Cost(
        parameters=parameters,
        ms_per_image=1000 * statistics.median(singles),
        images_per_s=batch_size / together,
        batch_size=batch_size,
        peak_memory_mb=memory.megabytes,
        device=device_name(device),
        precision=precision,
    )
