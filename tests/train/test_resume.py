"""Runs that are killed, stopped or continued with other settings: they end where the uninterrupted one does."""

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
    """All bits of the final checkpoint, and the log without times."""
    log = [json.loads(line) | {"seconds": 0} for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    content = torch.load(folder / "out.pth", weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("model").items()}
    return content, weights, log


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo, tiny_backbone):
    """What each script's run ends with; the settings do not name the folders, so that the bytes can be compared."""
    found = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        os.environ["DETECTION_CACHE"] = str(folder / "cache")
        with contextlib.chdir(folder):
            script.main(in_this_folder(settings_of(name, folder, demo, tiny_backbone)))
        found[name] = results(folder)
    return found


def in_this_folder(settings):
    return replace(settings, output="out.pth", run_dir="run")


def train(name, settings, folder):
    """In a process of its own: run the script in `folder`."""
    os.chdir(folder)
    os.environ["DETECTION_CACHE"] = str(folder / "cache")
    sys.stdout = sys.stderr = (folder / "output.txt").open("a")
    feature_cache.SHARD = 4
    sys.argv = [f"{name}.py", *arguments_of(settings)]
    cli.run(SCRIPTS[name].main, type(settings), "")


@pytest.fixture(scope="module")
def fork_server():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_dino2_simple", "improved_dino_detector", "common.evaluate.coco_metrics"])
    return context


def start(fork_server, name, settings, folder):
    process = fork_server.Process(target=train, args=(name, settings, folder))
    process.start()
    return process


def wait_for(moment, folder, process):
    """Wait until the cache is being built (-1), or so many epochs are done, or the process has ended."""
    log = folder / "run" / "log.jsonl"
    while process.is_alive():
        if moment < 0 and any((folder / "cache").rglob("*features*")):
            return
        if moment >= 0 and log.is_file() and log.read_text().count("\n") >= moment:
            return
        time.sleep(0.005)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    fork_server, uninterrupted, demo, tiny_backbone, tmp_path
):
    """SIGKILL in the cache's building, in both stages, between them, and while files are written."""
    dice = random.Random(0)
    kills = rounds = 0
    where = set()
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        settings = in_this_folder(settings_of("improved", folder, demo, tiny_backbone, save_steps=2, resume=True))
        for moment in sorted(dice.choices(range(-1, 7), k=6)):
            process = start(fork_server, "improved", settings, folder)
            wait_for(moment, folder, process)
            time.sleep(dice.random() * 0.4)
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
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    name, step, number, uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    settings = in_this_folder(settings_of(name, tmp_path, demo, tiny_backbone))
    finish_step, done = TrainState.finish_step, []

    def finish(progress, losses):
        done.append(finish_step(progress, losses))
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
    """Run it until `step` steps are done."""
    steps = iter(range(1, step + 1))
    finish_step = TrainState.finish_step

    def finish(progress, losses):
        finish_step(progress, losses)
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(folder)
    install_handlers()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainState, "finish_step", finish)
        SCRIPTS[name].main(settings)
    install_handlers()


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped"])
def test_a_damaged_state_gives_way_to_the_one_before(
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
    assert "state.pth is damaged; going back to the state before it" in capsys.readouterr().out
    assert results(tmp_path)[1] == uninterrupted["simple"][1]
    ours, theirs = (
        torch.load(path, weights_only=True)["model"] for path in (tmp_path / "out.pth", tmp_path / "run/best.pth")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nothing_whole_to_resume_is_refused_and_nothing_at_all_begins(
    demo, tiny_backbone, tmp_path, monkeypatch, capsys
):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, epochs=1, resume=True))
    monkeypatch.chdir(tmp_path)
    finetune_dino2_simple.main(settings)
    assert "nothing to resume in run yet: beginning" in capsys.readouterr().out
    for path in (tmp_path / "run").glob("state*.pth"):
        path.write_bytes(b"")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="no whole state in run"):
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


def test_settings_that_count_are_said(demo, tiny_backbone, tmp_path, monkeypatch, capsys):
    settings = in_this_folder(settings_of("simple", tmp_path, demo, tiny_backbone, precision="fp32"))
    stopped("simple", tmp_path, monkeypatch, settings)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune_dino2_simple.main(replace(settings, resume=True, lr=5e-4, workers=1, epochs=4, precision="bf16"))
    text = capsys.readouterr().out
    changes = "--epochs (was 3, is 4), --lr (was 0.001, is 0.0005), --precision (was fp32, is bf16)"
    assert f"another run from here on: {changes}" in text
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_that_is_resumed_changes_nothing(uninterrupted, demo, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = in_this_folder(settings_of("improved", tmp_path, demo, tiny_backbone))
    improved_dino_detector.main(replace(settings, stop_after="frozen"))
    improved_dino_detector.main(replace(settings, resume=True))
    improved_dino_detector.main(replace(settings, resume=True))
    _, *rest = results(tmp_path)
    assert tuple(rest) == uninterrupted["improved"][1:]
