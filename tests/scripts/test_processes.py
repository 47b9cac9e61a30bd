"""Several processes on one machine: the same results as one process with all of their images."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT

from common.data.demo import make_demo

pytestmark = pytest.mark.slow
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
}
SIZES = ("--blocks", 2, 4, "--image-size", 56, "--workers", 0, "--precision", "fp32", "--dropout", 0)
EPOCHS = ("--epochs-frozen", 2, "--epochs-unfrozen", 2)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """19 training and 7 validation scenes: two processes cannot share them evenly."""
    folder = tmp_path_factory.mktemp("odd") / "demo"
    make_demo(folder, train=19, val=7, seed=1)
    return folder


def start(folder, script, *flags, processes=2, launcher="torchrun"):
    """Start `script` in `folder`, in one process or several; its output is written to a file there."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "DETECTION_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    launch = LAUNCHERS[launcher]
    count = ["--num_processes" if launcher == "accelerate" else "--nproc_per_node", processes]
    launched = [*launch, *count] if processes > 1 else []
    command = [sys.executable, *launched, ROOT / script, *flags]
    with (folder / "output.txt").open("a") as out:
        return subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def run(folder, *arguments, **options):
    folder.mkdir(exist_ok=True)
    assert start(folder, *arguments, **options).wait(300) == 0, (folder / "output.txt").read_text()[-3000:]


def train(folder, odd, vit, *flags, **options):
    paths = ("--data", odd, "--backbone", vit, "--output", "out.pth", "--run-dir", "run")
    run(folder, "improved_dino_detector.py", *paths, *SIZES, *EPOCHS, *flags, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, odd, tiny_backbone):
    """The same training by one process, and by two with half of every batch each."""
    folders = {n: tmp_path_factory.mktemp(f"by{n}") for n in (1, 2)}
    train(folders[1], odd, tiny_backbone, "--batch-size", 4, processes=1)
    train(folders[2], odd, tiny_backbone, "--batch-size", 2, launcher="accelerate")
    return folders


def log_of(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_with_twice_the_batch(trained):
    ours, theirs = log_of(trained[2]), log_of(trained[1])
    assert [line["stage"] for line in ours] == ["frozen", "frozen", "unfrozen", "unfrozen"]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    files = [sorted(p.name for p in (f / "cache" / "features").iterdir()) for f in trained.values()]
    assert files[0] == files[1] and len(files[0]) == 2
    assert (trained[2] / "output.txt").read_text().count("stage frozen: ") == 1  # one of them prints


def test_two_accumulated_batches_train_as_one_of_twice_the_size(trained, odd, tiny_backbone, tmp_path):
    train(tmp_path, odd, tiny_backbone, "--batch-size", 2, "--accumulate", 2, processes=1)
    for one, other in zip(log_of(tmp_path), log_of(trained[1]), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    ours, theirs = (torch.load(folder / "out.pth", weights_only=True)["model"] for folder in (tmp_path, trained[1]))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def test_two_killed_processes_resume_to_the_same_result(trained, odd, tiny_backbone, tmp_path):
    flags = ("--batch-size", 2, "--resume")
    paths = ("--data", odd, "--backbone", tiny_backbone, "--output", "out.pth", "--run-dir", "run")
    for number, lines in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        process = start(tmp_path, "improved_dino_detector.py", *paths, *SIZES, *EPOCHS, *flags)
        while process.poll() is None:
            log = tmp_path / "run" / "log.jsonl"
            if log.is_file() and log.read_text().count("\n") >= lines:
                break
            time.sleep(0.01)
        assert process.poll() is None
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)  # the launcher hands on SIGTERM alone
        assert process.wait(120) != 0
        for worker in workers if number == signal.SIGKILL else ():
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(workers, 120)
    train(tmp_path, odd, tiny_backbone, *flags)
    assert [line["loss"] for line in log_of(tmp_path)] == [line["loss"] for line in log_of(trained[2])]
    ours, theirs = (torch.load(folder / "out.pth", weights_only=True)["model"] for folder in (tmp_path, trained[2]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
