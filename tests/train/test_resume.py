"""Killed, stopped and resumed runs, which end with the results of the uninterrupted one."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import arguments_of, stop_at_step, tiny_settings

import finetune_dino2_simple
import improved_dino_detector
from common import cli
from common.console import InputError
from common.train import feature_cache
from common.train.state import TrainState

pytestmark = pytest.mark.slow
KILLS = 20
SCRIPTS = {"simple": finetune_dino2_simple, "improved": improved_dino_detector}


def settings_of(name, folder, demo, tiny_backbone, **options):
    epochs = {"epochs": 3} if name == "simple" else {"epochs_frozen": 3, "epochs_unfrozen": 3, "dropout": 0.3}
    paths = {"output": str(folder / "out.pth"), "run_dir": str(folder / "run")}
    return tiny_settings(SCRIPTS[name], demo, tiny_backbone, **paths | epochs | options)


def results(folder):
    """The final checkpoint and its weights as bytes, and the log without times."""
    log = [json.loads(line) | {"seconds": 0} for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    content = torch.load(folder / "out.pth", weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("model").items()}
    return content, weights, log


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo, tiny_backbone):
    """The results of each script; the settings do not name the folders, so that the bytes can be compared."""
    ends = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        os.environ["DETECTION_CACHE"] = str(folder / "cache")
        with contextlib.chdir(folder):
            script.main(in_this_folder(settings_of(name, folder, demo, tiny_backbone)))
        ends[name] = results(folder)
    return ends


def in_this_folder(settings):
    return replace(settings, output="out.pth", run_dir="run")


def train(name, settings, folder):
    """Run in a new process: the script in `folder`."""
    os.chdir(folder)
    os.environ["DETECTION_CACHE"] = str(folder / "cache")
    sys.stdout = sys.stderr = (folder / "output.txt").open("a")
    feature_cache.SHARD = 4
    sys.argv = [f"{name}.py", *arguments_of(settings)]
    cli.run(SCRIPTS[name].main, type(settings), "")


@pytest.fixture(scope="module")
def fork_server():
    """Starts processes that have already imported the scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_dino2_simple", "improved_dino_detector", "common.evaluate.primary"])
    return context


def start(fork_server, name, settings, folder):
    process = fork_server.Process(target=train, args=(name, settings, folder))
    process.start()
    return process


def wait_for(moment, folder, process):
    """Wait until the cache is being built (-1), or `moment` epochs are done, or the process has ended."""
    log = folder / "run" / "log.jsonl"
    while process.is_alive():
        if moment < 0 and any((folder / "cache").rglob("*features*")):
            return
        if moment >= 0 and log.is_file() and log.read_text().count("\n") >= moment:
            return
        time.sleep(0.005)


def test_killed_runs_resume_to_the_same_result(fork_server, uninterrupted, demo, tiny_backbone, tmp_path):
    """SIGKILL while the cache is built, in both stages, between them, and while files are written."""
    rng = random.Random(0)
    kills = rounds = 0
    where = set()
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        settings = in_this_folder(settings_of("improved", folder, demo, tiny_backbone, save_steps=2, resume=True))
        for moment in sorted(rng.choices(range(-1, 7), k=6)):
            process = start(fork_server, "improved", settings, folder)
            wait_for(moment, folder, process)
            time.sleep(rng.random() * 0.4)
            if process.is_alive():
                process.kill()
                kills += 1
                where.add(moment)
            process.join()
        process = start(fork_server, "improved", settings, folder)
        process.join()
        assert process.exitcode == 0, (folder / "output.txt").read_text()[-2000:]
        assert results(folder) == uninterrupted["improved"]
        assert [p.name for p in (folder / "run").iterdir() if p.name.startswith(".")] == []
    assert {-1, 1, 4} <= where


@pytest.mark.parametrize(("name", "step"), [("simple", 2), ("improved", 5)])
def test_accumulated_steps_resume_to_the_same_result(name, step, demo, tiny_backbone, tmp_path, monkeypatch):
    """Inside an epoch of three steps of two batches, also with low-rank changes of the backbone."""
    ends = []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        options = {"batch_size": 2, "accumulate": 2, "lora": 2, "checkpoint_activations": True}
        settings = in_this_folder(settings_of(name, folder, demo, tiny_backbone, **options))
        if folder.name == "stopped":
            stop_at_step(SCRIPTS[name], settings, step)
            settings = replace(settings, resume=True)
        SCRIPTS[name].main(settings)
        ends.append(results(folder))
    assert ends[0] == ends[1]
    assert not any("lora" in weight for weight in ends[0][1])


@pytest.mark.parametrize(
    ("name", "step"), [("simple", 1), ("simple", 5), ("improved", 4), ("improved", 9), ("improved", 14)]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_the_state(
    name, step, number, uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    settings = in_this_folder(settings_of(name, tmp_path, demo, tiny_backbone))
    finish_step, done = TrainState.finish_step, []

    def finish(state):
        done.append(finish_step(state))
        if len(done) == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "finish_step", finish)
        patch.setattr(sys, "argv", ["train.py", *arguments_of(settings)])
        with pytest.raises(SystemExit) as ended:
            cli.run(SCRIPTS[name].main, type(settings), "")
    assert ended.value.code == 128 + number and len(done) == step
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("go on with the same command and --resume")
    SCRIPTS[name].main(replace(settings, resume=True))
    assert results(tmp_path) == uninterrupted[name]


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped"])
def test_a_damaged_state_falls_back_to_the_previous_one(
    damage, uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, save_steps=1))
    monkeypatch.chdir(tmp_path)
    stop_at_step(finetune_dino2_simple, settings, 5)
    state = tmp_path / "run" / "state.pth"
    content = bytearray(state.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    state.write_bytes(content[: {"cut": len(content) - 1, "half": len(content) // 2, "empty": 0}.get(damage)])
    finetune_dino2_simple.main(replace(settings, resume=True))
    assert "state.pth is damaged; resuming from the previous state" in capsys.readouterr().out
    assert results(tmp_path)[1] == uninterrupted["simple"][1]
    ours, theirs = (
        torch.load(path, weights_only=True)["model"] for path in (tmp_path / "out.pth", tmp_path / "run/best.pth")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_without_a_state_starts_and_with_damaged_states_is_refused(
    demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, epochs=1, resume=True))
    monkeypatch.chdir(tmp_path)
    finetune_dino2_simple.main(settings)
    assert "nothing to resume in run yet: starting" in capsys.readouterr().out
    for path in (tmp_path / "run").glob("state*.pth"):
        path.write_bytes(b"")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="every state in run is damaged"):
        finetune_dino2_simple.main(settings)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()) == before


def test_resuming_a_finished_run_changes_nothing(uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = in_this_folder(settings_of("improved", tmp_path, demo, tiny_backbone))
    improved_dino_detector.main(replace(settings, stop_after="frozen"))
    improved_dino_detector.main(replace(settings, resume=True))
    improved_dino_detector.main(replace(settings, resume=True))
    _, *rest = results(tmp_path)
    assert tuple(rest) == uninterrupted["improved"][1:]
