"""Where a run computes: device, precision, processes, and stopping between two steps."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from common.cli import flag
from common.console import InputError, Interrupted, pending_signal

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PROCESS_TIMEOUT = timedelta(hours=6)  # the other processes wait while the first fetches data or evaluates
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MAX_SEED = 2**32 - 1  # the largest that numpy takes


@dataclass(frozen=True)
class RuntimeFlags:
    """Computation."""

    batch_size: int = flag(16, "images a step, on each process", at_least=1)
    workers: int = flag(2, "processes that decode images", at_least=0, on_resume="free")
    precision: str = flag("auto", "arithmetic; auto = the fastest of this hardware", choices=PRECISIONS)
    seed: int = flag(0, "of all random numbers", at_least=0, at_most=MAX_SEED)


def derived_seed(*numbers: int) -> int:
    """A seed of 64 bits for each tuple of numbers from 0 on, the same on every machine (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by CUDA's matrix products
        torch.use_deterministic_algorithms(True, warn_only=True)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(chosen, chosen),
        cpu=not torch.accelerator.is_available(),  # otherwise several processes without a GPU run apart
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    if accelerator.distributed_type in SHARDING:
        name = accelerator.distributed_type.value
        raise InputError(f"{name} shards the weights; launch with --multi_gpu, where each process has all of them")
    if not accelerator.is_main_process:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  one process prints; errors of all reach stderr
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


def stop_if_asked(accelerator: Accelerator) -> None:
    """Between two steps: raises `Interrupted`, on all processes at once, where one of them got a signal."""
    number = torch.tensor(float(pending_signal() or 0), device=accelerator.device)
    if accelerator.num_processes > 1:
        number = accelerator.gather(number[None]).max()
    if number:
        raise Interrupted(int(number))


def device_name(device: torch.device) -> str:
    """What stands beside a speed: the GPU's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.cpu.get_capabilities().get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"
    return device.type
