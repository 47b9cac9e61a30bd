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
    "python": [],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1, "--num_processes", 2],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2],
}
SIZES = ("--blocks", 2, 4, "--image-size", 56, "--workers", 0, "--precision", "fp32", "--dropout", 0)
OPTIONS = (*SIZES, "--epochs-frozen", 2, "--epochs-unfrozen", 2, "--output", "out.pth", "--run-dir", "run")


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_backbone):
    """Starts a training in a folder, in one process or two; its output is written to a file there."""
    odd = tmp_path_factory.mktemp("odd") / "demo"
    make_demo(odd, train=19, val=7, seed=1)  # two processes cannot share them evenly

    def begin(folder, launcher, *flags):
        environment = os.environ | {"DETECTION_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        script = (ROOT / "improved_dino_detector.py", "--data", odd, "--backbone", tiny_backbone)
        command = [str(word) for word in (sys.executable, *LAUNCHERS[launcher], *script, *OPTIONS, *flags)]
        with (folder / "output.txt").open("a") as out:
            options = {"stdout": out, "stderr": out, "start_new_session": True}
            return subprocess.Popen(command, cwd=folder, env=environment, **options)

    return begin


@pytest.fixture(scope="module")
def train(start):
    def until_its_end(folder, *arguments):
        assert start(folder, *arguments).wait(300) == 0, (folder / "output.txt").read_text()[-3000:]
        return folder

    return until_its_end


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    """The same training by one process, and by two with half of every batch each."""
    one = train(tmp_path_factory.mktemp("one"), "python", "--batch-size", 4)
    return one, train(tmp_path_factory.mktemp("two"), "accelerate", "--batch-size", 2)


def log_of(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return torch.load(folder / "out.pth", weights_only=True)["model"]


def test_two_processes_train_as_one_with_twice_the_batch(trained):
    one, two = trained
    for ours, theirs in zip(log_of(two), log_of(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    files = [sorted(p.name for p in (folder / "cache" / "features").iterdir()) for folder in trained]
    assert files[0] == files[1] and len(files[0]) == 2
    assert (two / "output.txt").read_text().count("stage frozen: ") == 1  # one of them prints


def test_two_killed_processes_resume_to_the_same_result(trained, start, train, tmp_path):
    flags = ("torchrun", "--batch-size", 2, "--resume")
    process, log = start(tmp_path, *flags), Path(tmp_path, "run", "log.jsonl")
    while not log.is_file() and process.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)  # the launcher does not hand it on
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers, 120)
    assert process.wait(120) == -signal.SIGKILL
    train(tmp_path, *flags)
    assert [line["loss"] for line in log_of(tmp_path)] == [line["loss"] for line in log_of(trained[1])]
    theirs = weights_of(trained[1])
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(tmp_path).items())
