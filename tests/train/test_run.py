"""A run: what it writes, which epoch is kept, and that a stopped run goes on to the same result."""

import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers import ROOT, arguments_of, data_flags, stop_at_step, tiny_settings

import finetune_dino2_simple as simple
import improved_dino_detector as improved
from common.console import InputError
from common.data.dataset import SampleDataset, make_train_loader
from common.data.demo import make_demo
from common.data.sources import load_split
from common.evaluate.detect import val_subset
from common.model.checkpoint import load_checkpoint
from common.model.losses import DetectionLoss
from common.runtime import Purpose, seed_of
from common.train.optim import Schedule

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def settings_of(demo, tiny_backbone):
    """Settings of a script, its paths in the working folder."""

    def settings(script, data=demo, **options):
        epochs = {"epochs": 3} if script is simple else {"epochs_frozen": 2, "epochs_unfrozen": 2, "dropout": 0.3}
        common = {"output": "out.pth", "run_dir": "run", "precision": "fp32"}
        return tiny_settings(script, data, tiny_backbone, **common | epochs | options)

    return settings


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, settings_of):
    """The results of a script, trained in one go."""

    @cache
    def train(script, options=()):
        folder = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DETECTION_CACHE", str(folder / "cache"))
            patch.chdir(folder)
            script.main(settings_of(script, **dict(options)))
            return results()

    return train


def log_of(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def epochs_of(*files):
    return [load_checkpoint(file).epoch for file in files]


def results():
    """The final checkpoint and its weights as bytes, and the log without times."""
    content = torch.load("out.pth", weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("model").items()}
    return content, weights, [line | {"seconds": 0} for line in log_of()]


def contents(folder="run"):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


LORA = (("batch_size", 2), ("accumulate", 2), ("lora", 2), ("checkpoint_activations", True))
STOPS = [(simple, 7, ()), (improved, 5, ()), (improved, 11, LORA)]  # three steps an epoch


@pytest.mark.parametrize(("script", "step", "options"), STOPS, ids=["simple", "stage 1", "LoRA"])
def test_a_stopped_run_goes_on_to_the_same_result(script, step, options, uninterrupted, settings_of):
    settings = settings_of(script, **dict(options))
    stopped = stop_at_step(script, settings, step)
    assert stopped.__notes__ == [f"the state after epoch {step // 3} is in run: go on with --resume"]
    if step == 5:  # the state of stage 1 holds the head alone, as its backbone does not change
        trained = torch.load("run/state.pth", weights_only=True)["parts"]["trained"]
        assert all(name.startswith(("dense.", "second_look.")) for name in trained)
    script.main(replace(settings, resume=True))
    assert results() == uninterrupted(script, options) and not any("lora" in name for name in results()[1])
    assert not [path.name for path in Path("run").iterdir() if path.name.startswith(".")]


def test_killed_runs_go_on_to_the_same_result(uninterrupted, settings_of):
    """SIGKILL while the cache is built, and in both stages."""
    settings = settings_of(improved, resume=True)
    command = [sys.executable, str(ROOT / "improved_dino_detector.py"), *arguments_of(settings)]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
    for moment in (-1, 1, 3):  # the cache is being built, or so many epochs are logged
        with subprocess.Popen(command, **options, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                log = Path("run/log.jsonl")
                if any(Path("cache").rglob("*.features*")) if moment < 0 else log.is_file() and len(log_of()) >= moment:
                    process.kill()
                time.sleep(0.01)
            assert process.wait() == -signal.SIGKILL
    improved.main(settings)
    assert results() == uninterrupted(improved)


def test_resume_without_a_state_starts_and_of_a_finished_run_changes_nothing(uninterrupted, settings_of, capfd):
    settings = settings_of(improved, resume=True)
    improved.main(replace(settings, stop_after="frozen"))
    assert "nothing to resume in run yet: starting" in capfd.readouterr().out
    for _ in range(2):
        improved.main(settings)
        assert results()[1:] == uninterrupted(improved)[1:]


REFUSED = {
    "blocks": ({"blocks": (3, 4)}, "cannot go on with another --blocks"),
    "size": ({"image_size": 70}, "cannot go on with another --image-size"),
    "head": ({"head": "linear"}, "cannot go on with another --head"),
    "lora": ({"lora": 2}, "cannot go on with another --lora"),
    "training images": ({"train_images": 8}, "had other train images or boxes"),
    "validation images": ({"val_images": 3}, "had other val images or boxes"),
    "stage": ({"epochs_frozen": 0}, "is in the stage frozen, now left out"),
}


def test_what_does_not_fit_a_stopped_run_and_damaged_states_are_refused(settings_of):
    settings = settings_of(improved)
    stop_at_step(improved, settings, 5)
    before, state = contents(), Path("run/state.pth").read_bytes()
    for change, message in REFUSED.values():
        with pytest.raises(InputError, match=message):
            improved.main(replace(settings, resume=True, **change))
        assert contents() == before
    with pytest.raises(InputError, match="the run in run is not finished: go on with --resume"):
        improved.main(replace(settings, data="no/such/data"))  # which is not looked for
    assert contents() == before
    middle = len(state) // 2
    for damaged in (state[:-1], state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]):
        Path("run/state.pth").write_bytes(damaged)
        with pytest.raises(InputError, match=r"run/state\.pth is damaged: delete that folder, or name another"):
            improved.main(replace(settings, resume=True))
        assert Path("run/state.pth").read_bytes() == damaged


def test_a_resumed_run_with_other_rates_and_batches_has_those_of_its_settings(settings_of, monkeypatch, capfd):
    """Each learning rate is that of an uninterrupted run with these settings, and the checkpoint records them."""
    settings = settings_of(simple, epochs=4)
    stop_at_step(simple, settings, 7)
    changed = replace(settings, batch_size=6, lr=0.1, output="other.pth")
    used, set_rates = [], Schedule.set_rates

    def recorded(schedule, *position):
        cycle = set_rates(schedule, *position)
        used.append(schedule.optimizer.param_groups[-1]["lr"])
        return cycle

    monkeypatch.setattr(Schedule, "set_rates", recorded)
    simple.main(replace(changed, resume=True))
    line = next(line for line in capfd.readouterr().out.splitlines() if "from here on with another " in line)
    assert "--batch-size (was 4, is 6)" in line and "--lr (was 0.001, is 0.1)" in line
    resumed = used.copy()
    used.clear()
    simple.main(replace(changed, run_dir="whole"))
    assert resumed == used[len(used) // 2 :] and max(used) == pytest.approx(0.1, rel=0.01) and min(resumed) > 0
    recorded = load_checkpoint("other.pth").train_config
    assert recorded["lr"] == 0.1 and recorded["batch_size"] == 6 and "resume" not in recorded
    assert [line["epoch"] for line in log_of()] == [1, 2, 3, 4]


def test_stage_2_goes_on_whatever_stage_1_is_said_to_have_been(settings_of):
    settings = settings_of(improved, epochs_unfrozen=3)
    stop_at_step(improved, settings, 11)  # in epoch 2 of stage 2
    changed = {"epochs_frozen": 1, "lr_unfrozen": 7e-5, "head_lr_factor": 1.0}
    improved.main(replace(settings, resume=True, **changed))
    assert [line["epoch"] for line in log_of()] == [1, 2, 3, 4, 5]
    assert [line["stage"] for line in log_of()] == ["frozen"] * 2 + ["unfrozen"] * 3
    recorded = load_checkpoint("run/last.pth").train_config
    assert {name: recorded[name] for name in changed} == changed


def test_a_resumed_run_reads_no_backbone_that_appeared_before_the_one_it_took(
    settings_of, tiny_backbone, uninterrupted
):
    settings = replace(settings_of(simple), backbone=(str(Path("better").absolute()), str(tiny_backbone)))
    stop_at_step(simple, settings, 5)
    shutil.copytree(tiny_backbone, "better")
    config = json.loads(Path("better/config.json").read_text())
    Path("better/config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-2}))
    simple.main(replace(settings, resume=True))
    content, weights, _ = results()
    assert content["train_config"]["backbone"] == str(tiny_backbone) and weights == uninterrupted(simple)[1]


def test_a_resumed_run_does_not_read_the_detector_that_it_started_from(settings_of, demo, tiny_backbone):
    improved.main(settings_of(improved, stop_after="frozen", output="start.pth"))
    data = {"data": str(demo), "workers": 0, "batch_size": 4, "precision": "fp32", "run_dir": "from"}
    settings = improved.Settings(**data, start_from="start.pth", epochs_frozen=1, epochs_unfrozen=2)
    stop_at_step(improved, settings, 8)
    Path("start.pth").unlink()
    improved.main(replace(settings, resume=True))
    conditions = load_checkpoint("from/last.pth").conditions()
    assert conditions["started_from"] == "start.pth" and conditions["backbone"] == str(tiny_backbone)
    assert conditions["second_look"] == 100 and conditions["dropout"] == 0.3 and conditions["crop_size"] == 56


def test_changed_image_files_are_said(tmp_path, settings_of, capfd):
    make_demo(tmp_path / "own", train=12, val=6, seed=1)
    settings = settings_of(simple, tmp_path / "own", epochs=1)
    simple.main(settings)
    os.utime(next((tmp_path / "own" / "train2017").iterdir()), (0, 0))
    simple.main(replace(settings, epochs=2, resume=True))
    assert "warning: image files were written since the run began" in capfd.readouterr().out


def test_stage_2_holds_one_model_and_one_optimizer(settings_of, monkeypatch):
    alive, validate = [], improved.validate

    def counting(model, *arguments):
        gc.collect()
        kinds = [type(one) for one in gc.get_objects()]
        alive.append((kinds.count(AcceleratedOptimizer), kinds.count(type(model))))
        return validate(model, *arguments)

    monkeypatch.setattr(improved, "validate", counting)
    improved.main(settings_of(improved, epochs_frozen=1, epochs_unfrozen=1))
    assert alive == [(1, 1), (1, 1)]


BEST = {  # mAP@0.5 of the epochs, and the epoch that is kept
    "highest": ((0.1, 0.3, 0.2), 2),
    "later of equals": ((0.3, 0.3, 0.1), 2),
    "none": ((None, None), 2),
    "NaN after a number": ((0.2, math.nan, None), 1),
    "number after none": ((None, 0.1, None), 2),
}


@pytest.mark.parametrize(("scores", "expected"), BEST.values(), ids=BEST)
def test_best_epoch_has_the_highest_map_and_is_the_last_of_equals(scores, expected, settings_of, monkeypatch, capfd):
    """Also where the run is resumed with more epochs; and a new run replaces a finished one."""
    numbers, pending = dict.fromkeys(("AP", "accuracy", "mean_iou"), 0.0), iter([0.9, *scores])
    monkeypatch.setattr(simple, "validate", lambda *_: numbers | {"AP50": next(pending)})
    settings = settings_of(simple, train_images=4, epochs=1)
    simple.main(replace(settings, seed=1))
    simple.main(replace(settings, epochs=len(scores) - 1))
    simple.main(replace(settings, epochs=len(scores), resume=True))
    assert epochs_of("run/best.pth", "run/last.pth", "out.pth") == [expected, len(scores), expected]
    assert Path("run/best.pth").samefile("run/last.pth") == (expected == len(scores))
    all_equal = any(len(set(part)) == 1 < len(part) for part in (scores[:-1], scores))  # of a run, when it ended
    assert ("the last one is kept" in capfd.readouterr().out) == all_equal


def test_validation_images_without_objects_are_said(demo, settings_of, monkeypatch, capfd):
    content = json.loads((demo / "annotations" / "instances_val2017.json").read_text())
    flags = {"train_json": str(demo / "annotations" / "instances_train2017.json"), "val_json": "val.json"}
    flags |= {f"{part}_images_dir": str(demo / f"{part}2017") for part in ("train", "val")}
    Path("val.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(InputError, match=r"val\.json: of its 0 boxes none is an object.*refused by --strict"):
        simple.main(settings_of(simple, **flags, strict=True))
    assert simple.main(settings_of(simple, **flags, epochs=1))["AP50"] is None and Path("out.pth").is_file()
    data = load_split(data_flags(demo), "val")
    monkeypatch.setattr("common.evaluate.detect.VAL_SUBSET", 2)
    val_subset(replace(data, crowd=data.image_of_box() < 2))
    assert "no object on the first" in capfd.readouterr().out


def test_a_folder_in_which_another_process_trains_is_refused(settings_of):
    Path("run").mkdir()
    code = "import filelock, time; x = filelock.FileLock('run/lock'); x.acquire(); print(flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in run: wait for it, stop it, or name"):
            simple.main(settings_of(simple, resume=True))
        assert [path.name for path in Path("run").iterdir()] == ["lock"]
        other.kill()
    simple.main(settings_of(simple, resume=True, epochs=1))  # the lock of a killed process is free


def test_a_full_disk_ends_in_one_line_and_loses_nothing(settings_of):
    settings = settings_of(simple, epochs=1)
    simple.main(settings)
    before, hard = Path("out.pth").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    size = len(Path("run/last.pth").read_bytes())
    for allowed in (5000, size - 1, size + 100_000):  # no weights, all but a checkpoint's end, all but the state
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
        try:
            with pytest.raises(InputError, match=r"cannot write run/\w+\.pth: File too large"):
                simple.main(replace(settings, epochs=2, resume=True))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert not list(Path("run").glob(".*")) and Path("out.pth").read_bytes() == before
    simple.main(replace(settings, epochs=2, resume=True))
    assert epochs_of("run/last.pth") == [2]


def test_nan_stops_the_run_before_it_reaches_the_weights(settings_of, monkeypatch):
    forward, calls = DetectionLoss.forward, iter(range(100))

    def with_nan(*arguments):
        losses = forward(*arguments)
        return losses | {"box": losses["box"] * (torch.nan if next(calls) == 1 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(DetectionLoss, "forward", with_nan)
        with pytest.raises(InputError, match=r"epoch 1, step 2, on the images (\d+, ){3}\d+; lower the learning rate"):
            simple.main(settings_of(simple))
    with pytest.raises(InputError, match="not finite after epoch 1; lower the learning rate"):
        simple.main(settings_of(simple, train_images=4, lr=1e38, backbone_lr=1e38))
    assert not list(Path("run").glob("*.pth"))


CONTRADICTIONS = [
    (simple, {"lora": 4, "freeze_backbone": True}, "--freeze-backbone"),
    (improved, {"lora": 4, "unfreeze_blocks": 1}, "--unfreeze-blocks"),
    (improved, {"start_from": "a.pth", "head": "linear"}, "--head"),
    (improved, {"start_from": "a.pth", "image_size": 224}, "--image-size"),
    (improved, {"epochs_frozen": 0, "epochs_unfrozen": 0}, "no stage to train"),
    (improved, {"scales": (2.0, 1.0)}, "--scales"),
]


@pytest.mark.parametrize(("script", "flags", "message"), CONTRADICTIONS, ids=[str(case[1]) for case in CONTRADICTIONS])
def test_flags_without_effect_are_refused(script, flags, message):
    with pytest.raises(InputError, match=message):
        script.Settings(**flags)


def test_small_sets_make_at_least_one_step_and_none_is_dropped_in_silence(demo, settings_of):
    with pytest.raises(InputError, match="--accumulate 8: an epoch has only 3 batches"):
        simple.main(settings_of(simple, accumulate=8))
    ten = SampleDataset(load_split(data_flags(demo, limit=10), "train"), seed=0)
    assert [len(make_train_loader(ten, 8, 0, processes)) for processes in (1, 2)] == [1, 2]  # 16: accelerate fills up


def test_two_accumulated_batches_train_as_one_of_twice_the_size(settings_of):
    for folder, options in (("one", {}), ("two", {"batch_size": 2, "accumulate": 2})):
        paths = {"run_dir": folder, "output": f"{folder}.pth"}
        simple.main(settings_of(simple, **paths, **options))
    for one, two in zip(log_of("one"), log_of("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    weights, theirs = (load_checkpoint(f"{name}.pth").detector.state_dict() for name in ("one", "two"))
    assert all(torch.allclose(weight, theirs[name], atol=1e-3) for name, weight in weights.items())


def test_seeds_of_different_purposes_and_numbers_differ():
    seeds = [seed_of(purpose, *numbers) for purpose in Purpose for numbers in ((0,), (1,), (0, 1), (0, 1, 0), (1, 0))]
    assert len(set(seeds)) == len(seeds) == 15


def test_tensorboard_and_mlflow_hold_the_numbers_of_each_epoch(settings_of, monkeypatch):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{Path('mlruns').absolute()}")
    numbers = improved.main(settings_of(improved, log_with=("tensorboard", "mlflow"), run_dir="runs/mine"))
    events = EventAccumulator("runs/mine/dinov2-detection", {"scalars": 0})
    events.Reload()
    for name in ("loss/object", "validation/AP50"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    assert events.Scalars("final/AP50")[0].value == pytest.approx(numbers["AP50"], abs=1e-6)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0" and run.data.metrics["final/AP50"] == pytest.approx(numbers["AP50"], abs=1e-6)


def test_nothing_of_trackers_or_charts_is_imported_without_the_flag():
    packages = ("tensorboard", "mlflow", "wandb", "matplotlib")
    code = f"import sys, finetune_dino2_simple; print([name for name in {packages} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_tracker_that_cannot_be_reached_is_refused_before_training_and_a_warning_within(
    settings_of, monkeypatch, capfd
):
    def unreachable(*_arguments, **_options):
        raise ConnectionError("no route to\nthe tracker")

    settings = settings_of(simple, log_with=("tensorboard",), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", unreachable)
        with pytest.raises(InputError, match="--log-with tensorboard: the tracker"):
            simple.main(settings)
    monkeypatch.setattr(Accelerator, "log", unreachable)
    simple.main(replace(settings, run_dir="other"))
    assert "warning: a tracker did not take epoch 1: the tracker" in capfd.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log-with tensorboard needs its package: pip install tensorboard"):
        simple.main(replace(settings, run_dir="third"))
