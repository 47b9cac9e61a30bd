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

TIMED, WARM_UP = 15, 3  # images timed one at a time, and those before them that are not
LINUX_MEMORY, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What detection costs here. Decoding and resizing of the image files are not counted; post-processing is."""

    parameters: int | None  # of an exported model they are not known
    ms_per_image: float  # batch of one, median
    images_per_s: float  # at `batch_size`
    batch_size: int
    peak_memory_mb: float | None  # see `PeakMemory`
    device: str
    precision: str


class PeakMemory:
    """The most memory in use inside, in `megabytes` (10^6 bytes) afterwards.

    On a GPU what torch allocated there; on a CPU the whole process, libraries included, known on Linux alone.
    """

    def __init__(self, device: torch.device):
        self.device, self.megabytes = device, None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif FORGET_PEAK.exists():  # some sandboxes have only the other
            FORGET_PEAK.write_text("5")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif FORGET_PEAK.exists():
            self.megabytes = int(re.search(r"VmHWM:\s+(\d+) kB", LINUX_MEMORY.read_text())[1]) * 1024 / 1e6


@torch.inference_mode()
def measure_cost(model: nn.Module, batch: Batch, accelerator: Accelerator, flip: bool = False) -> Cost:
    """Time a prepared model on the images of one batch that is on its device already."""
    model.eval()

    def seconds(images: torch.Tensor, targets: list) -> float:
        start = time.perf_counter()
        postprocess(predict(model, images, flip), targets)  # ends on the CPU, so nothing is left running
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
