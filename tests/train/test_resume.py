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
from accelerate.state import AcceleratorState
from helpers import arguments_of

import finetune_dino2_simple
import improved_dino_detector
from common import cli
from common.console import InputError, Interrupted, install_handlers
from common.train import feature_cache
from common.train.state import TrainState

pytestmark = pytest.mark.slow
KILLS = 20
SCRIPTS = {"simple": finetune_dino2_simple, "improved": improved_dino_detector}


def settings_of(name, folder, demo, tiny_backbone, **options):
    epochs = {"epochs": 3} if name == "simple" else {"epochs_frozen": 3, "epochs_unfrozen": 3, "dropout": 0.3}
    return SCRIPTS[name].Settings(
        **{
            "data": str(demo),
            "backbone": (str(tiny_backbone),),
            "blocks": (2, 4),
            "image_size": 56,
            "batch_size": 4,
            "workers": 0,
            "output": str(folder / "out.pth"),
            "run_dir": str(folder / "run"),
            **epochs,
            **options,
        }
    )


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
    context.set_forkserver_preload(["finetune_dino2_simple", "improved_dino_detector", "common.evaluate.coco_metrics"])
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

    def finish(state, losses):
        done.append(finish_step(state, losses))
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


def stopped(name, folder, monkeypatch, settings, step=5):
    """Run the script until `step` steps are done."""
    steps = iter(range(1, step + 1))
    finish_step = TrainState.finish_step

    def finish(state, losses):
        finish_step(state, losses)
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(folder)
    install_handlers()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainState, "finish_step", finish)
        SCRIPTS[name].main(settings)
    install_handlers()


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped"])
def test_a_damaged_state_falls_back_to_the_previous_one(
    damage, uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, save_steps=1))
    stopped("simple", tmp_path, monkeypatch, settings)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (3, 4)}, "another --blocks"),
        ({"image_size": 70}, "another --image-size"),
        ({"freeze_backbone": True}, "another --freeze-backbone"),
        ({"train_images": 8}, "other images or boxes"),
        ({"batch_size": 2}, "inside an epoch of 4 images a step"),
    ],
)
def test_settings_that_do_not_fit_a_resumed_run_are_refused(
    change, message, demo, tiny_backbone, tmp_path, monkeypatch
):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone))
    stopped("simple", tmp_path, monkeypatch, settings)
    before = (tmp_path / "run" / "state.pth").read_bytes()
    with pytest.raises(InputError, match=message):
        finetune_dino2_simple.main(replace(settings, resume=True, **change))
    assert (tmp_path / "run" / "state.pth").read_bytes() == before


def test_changed_settings_of_a_resumed_run_are_printed(demo, tiny_backbone, tmp_path, monkeypatch, capsys):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, precision="fp32"))
    stopped("simple", tmp_path, monkeypatch, settings)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune_dino2_simple.main(replace(settings, resume=True, lr=5e-4, workers=1, epochs=4, precision="bf16"))
    text = capsys.readouterr().out
    changes = "--epochs (was 3, is 4), --lr (was 0.001, is 0.0005), --precision (was fp32, is bf16)"
    assert f"another run from here on: {changes}" in text
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_resuming_a_finished_run_changes_nothing(uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = in_this_folder(settings_of("improved", tmp_path, demo, tiny_backbone))
    improved_dino_detector.main(replace(settings, stop_after="frozen"))
    improved_dino_detector.main(replace(settings, resume=True))
    improved_dino_detector.main(replace(settings, resume=True))
    _, *rest = results(tmp_path)
    assert tuple(rest) == uninterrupted["improved"][1:]
