"""Device, precision, processes and seeds."""

import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from common.cli import flag
from common.console import InputError

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PROCESS_TIMEOUT = timedelta(hours=6)  # the other processes wait while the first fetches data or evaluates
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MAX_SEED = 2**32 - 1  # the largest that numpy takes


@dataclass(frozen=True)
class RuntimeFlags:
    """Computation."""

    batch_size: int = flag(16, "images a step, on each process", at_least=1)
    workers: int = flag(2, "processes that decode images", at_least=0)
    precision: str = flag("auto", "arithmetic; auto = the fastest of this hardware", choices=PRECISIONS)
    seed: int = flag(0, "seed of all random numbers", at_least=0, at_most=MAX_SEED)


class Purpose(IntEnum):
    """What random numbers are drawn for."""

    ORDER = 1
    SAMPLE = 2
    DROPOUT = 3


def seed_of(purpose: Purpose, *numbers: int) -> int:
    """A 64-bit seed, the same on every machine; numbers count from 0, with which NumPy fills up missing ones."""
    return int(np.random.SeedSequence([purpose, *(number + 1 for number in numbers)]).generate_state(1, np.uint64)[0])


def make_accelerator(precision: str = "auto", deterministic: bool = False) -> Accelerator:
    """Device, processes and mixed precision, as detected by `accelerate` or set by its launcher.

    Raises InputError: fp16 without a GPU, or a launcher that shards the weights.
    """
    chosen = choose_precision(precision)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by CUDA's matrix products
        torch.use_deterministic_algorithms(True, warn_only=True)
    if "MASTER_ADDR" in os.environ:  # of a launcher; where it is left over, nobody else comes
        print(f"joining all WORLD_SIZE={os.environ.get('WORLD_SIZE')} processes", file=sys.stderr)
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}  # no exception ends a wait
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(chosen, chosen),
        cpu=not torch.accelerator.is_available(),  # otherwise several CPU processes would not communicate
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    if accelerator.distributed_type in SHARDING:
        raise InputError(f"{accelerator.distributed_type.value} shards the weights; launch with --multi_gpu instead")
    if not accelerator.is_main_process:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  only one process prints; all report errors on stderr
    return accelerator


def prepare_worker(_worker: int) -> None:
    """In a process that decodes images, ignore what a terminal sends to all processes: the parent ends it.

    It also ends where it cannot send a batch, which Python else loses, so that the parent would wait for it for ever.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = lambda *_: os._exit(1)  # type: ignore[attr-defined]


def default_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def choose_precision(precision: str) -> str:
    """fp32, bf16 or fp16; "auto" is the fastest of the default device. Raises InputError: fp16 without a GPU."""
    device = default_device().type
    if precision == "fp16" and device == "cpu":
        raise InputError("--precision fp16 needs a GPU; take bf16, fp32 or auto")
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    supported = torch.cpu.get_capabilities()  # without these instructions bf16 is five times slower than fp32
    return "bf16" if device == "cpu" and (supported.get("avx512_bf16") or supported.get("amx_bf16")) else "fp32"


def check_single_process() -> None:
    """Raises InputError where a launcher has started several processes."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError("validation runs in one process: start it with python, or unset WORLD_SIZE")


def precision_name(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads, to be reported with timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{torch.cpu.get_capabilities().get('cpu_name') or 'CPU'}, {threads} thread{'s' * (threads > 1)}"
    return device.type
