"""Running a detector: device and precision, loaders, pictures in and `Detections` out, and what that costs.

Training's validation, the validation scripts and users' own pictures all go through `detect`.
"""

import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.utils.data import DataLoader

from common.boxes import mirror_boxes
from common.coco import CocoData, DetectionDataset, collate
from common.errors import InputError
from common.postprocess import postprocess
from common.progress import progress_bar
from common.signals import Interrupted, leave_to_parent, steps_finished, waiting
from common.transforms import LetterboxTransform
from common.types import Batch, Detections, RawOutput

TIMED, WARM_UP = 15, 3  # pictures timed one at a time, and those before them that are not
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PATIENCE = timedelta(hours=6)  # of the processes that wait while the first fetches data or judges
LINUX_MEMORY, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make_accelerator(precision: str = "auto", deterministic: bool = False) -> Accelerator:
    """Device, processes and mixed precision, as `accelerate` finds or is told them.

    Args:
        precision: fp32, bf16, fp16, or auto: bf16 where the hardware computes in it (fp16 on older GPUs), else fp32.
        deterministic: also on a GPU the same numbers each time, slower; torch names the operations that cannot.

    Raises:
        InputError: fp16 without a GPU; a way of launching that shards the weights.
    """
    chosen = _fastest_precision() if precision == "auto" else precision
    if chosen == "fp16" and not torch.accelerator.is_available():
        raise InputError("--precision fp16 needs a GPU; take bf16, fp32 or auto")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products want for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(chosen, chosen),
        cpu=not torch.accelerator.is_available(),  # else several processes without a GPU would not find each other
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type in SHARDING:
        name = accelerator.distributed_type.value
        raise InputError(f"{name} cuts the weights apart; launch with --multi_gpu: each process has all of them")
    if not accelerator.is_main_process:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  one voice is enough; errors still reach stderr
    return accelerator


def _fastest_precision() -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.backends.mps.is_available():
        return "fp32"
    able = torch.cpu.get_capabilities()  # without these instructions bf16 is five times slower than fp32
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def precision_name(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def eval_loader(data: CocoData, image_size: int, batch_size: int, workers: int) -> DataLoader:
    """Letterboxed pictures of `data`, in its order."""
    dataset = DetectionDataset(data, LetterboxTransform(image_size))
    return DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers, worker_init_fn=leave_to_parent)


def stop_if_asked(accelerator: Accelerator) -> None:
    """Between two steps: raises `Interrupted`, on all processes at once, where one of them got a signal."""
    number = torch.tensor(float(waiting() or 0), device=accelerator.device)
    if accelerator.num_processes > 1:
        number = accelerator.gather(number[None]).max()
    if number:
        raise Interrupted(int(number))


def predict(model: nn.Module, images: torch.Tensor, flip: bool) -> RawOutput:
    """What `model` says of `images`; with `flip` also of their mirror images, as further locations of the same picture.

    Post-processing then keeps, of the two views of an object, the one that is surer of it.
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
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, what: str = "detecting", flip: bool = False
) -> list[Detections]:
    """Detections of every picture of `loader`, each exactly once, also where several processes share the work.

    Args:
        model: a `Detector`, prepared by `accelerator`; left in evaluation mode.
        loader: batches of letterboxed pictures, or of cached features, prepared by `accelerator`.
        what: the progress bar's title.
        flip: look at the mirrored pictures too; pictures only.

    Raises:
        Interrupted: between two batches, where a signal came in the meantime.
    """
    model.eval()
    found: list[Detections] = []
    with steps_finished(), progress_bar(len(loader.dataset), what, shown=accelerator.is_main_process) as bar:
        for batch in loader:
            detections = postprocess(predict(model, batch.images, flip), batch.targets)
            found += accelerator.gather_for_metrics(detections, use_gather_object=True)
            bar.update(len(found) - bar.n)
            stop_if_asked(accelerator)
    return found


@dataclass(frozen=True)
class Cost:
    """What detection costs here. Decoding and resizing of the picture files are not counted; post-processing is."""

    parameters: int | None  # of an exported model they are not known
    ms_per_picture: float  # batch of one, median
    pictures_per_s: float  # at `batch_size`
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
    """Time a prepared model on the pictures of one batch that is on its device already."""
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
        ms_per_picture=1000 * statistics.median(times),
        pictures_per_s=len(batch.images) / whole,
        batch_size=len(batch.images),
        peak_memory_mb=memory.megabytes,
        device=device_name(accelerator.device),
        precision=precision_name(accelerator),
    )


def device_name(device: torch.device) -> str:
    """What stands beside a speed: the GPU's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.cpu.get_capabilities().get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"
    return device.type
