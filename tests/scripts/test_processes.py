"""Several processes on one machine: the same results as one process with all of their images."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, arguments_of, start_training, tiny_settings

import improved_dino_detector as improved
from common.data.demo import make_demo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]
LAUNCHER = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2".split()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_backbone):
    odd = tmp_path_factory.mktemp("odd") / "demo"
    make_demo(odd, train=19, val=7, seed=1)  # two processes cannot share them evenly
    options = {
        "precision": "fp32",
        "dropout": 0.0,
        "epochs_frozen": 2,
        "epochs_unfrozen": 2,
        "batch_size": 2,
        "image_size": 112,
    }
    return tiny_settings(improved, odd, tiny_backbone, **options, output="out.pth", run_dir="run")


@pytest.fixture(scope="module")
def two(tmp_path_factory, settings):
    """The folder of a training by two processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, *LAUNCHER, str(ROOT / "improved_dino_detector.py"), *arguments_of(settings)]
    environment = os.environ | {"DETECTION_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stage frozen: ") == 1  # one of them prints
    return folder


def losses_of(folder="."):
    return [json.loads(line)["loss"] for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_with_twice_the_batch(settings, two):
    improved.main(replace(settings, batch_size=4))
    for epoch, (ours, theirs) in enumerate(zip(losses_of(two), losses_of(), strict=True)):
        for name, loss in theirs.items():  # each process draws boxes of its own for the second look, whose gradient
            is_same = epoch == 0 and not name.startswith("second")  # is clipped together with that of the dense head
            assert ours[name] == pytest.approx(loss, rel=2e-3 if is_same else 0.1)
    files = [sorted(path.name for path in (folder / "cache" / "features").iterdir()) for folder in (Path(), two)]
    assert files[0] == files[1] and len(files[0]) == 1


def test_two_killed_processes_resume_to_the_same_result(settings, two):
    settings = replace(settings, resume=True)
    workers = start_training(improved.main, settings, processes=2)
    while not Path("run/log.jsonl").is_file() and all(worker.is_alive() for worker in workers):
        workers[0].join(0.01)
    for worker in workers:
        worker.kill()
        worker.join()
    assert 0 < len(losses_of()) < 4
    for worker in start_training(improved.main, settings, processes=2):
        worker.join(300)
        assert worker.exitcode == 0
    assert losses_of() == losses_of(two)
    weights, theirs = (torch.load(Path(folder, "out.pth"), weights_only=True)["model"] for folder in (".", two))
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())
