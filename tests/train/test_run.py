"""A run: what it writes, and that a stopped run goes on to the same result."""

import fcntl
import gc
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import TensorBoardTracker
from helpers import data_flags, start_training, stop_at_step, tiny_settings

import finetune_dino2_simple as simple
import improved_dino_detector as improved
from common.console import InputError
from common.data.dataset import SampleDataset, make_train_loader
from common.data.sources import load_split
from common.model.checkpoint import load_checkpoint
from common.model.detector import Detector
from common.model.losses import DetectionLoss
from common.runtime import Purpose, seed_of
from common.train.optim import Schedule
from common.train.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]
LORA = {"batch_size": 2, "accumulate": 2, "lora": 2, "checkpoint_activations": True}
CASES = {"simple": (simple, {}, 7), "stage 1": (improved, {}, 5), "LoRA": (improved, LORA, 11)}  # step of the stop


@pytest.fixture(scope="module")
def settings_of(demo, tiny_backbone):
    """Settings of a script, three steps an epoch, its paths in the working folder."""

    def settings(script, data=demo, **options):
        epochs = {"epochs": 3} if script is simple else {"epochs_frozen": 2, "epochs_unfrozen": 2, "dropout": 0.3}
        common = {"output": "out.pth", "run_dir": "run", "precision": "fp32"}
        tiny = tiny_settings(script, data, tiny_backbone, **common | epochs | options)
        return replace(tiny, backbone=("better", str(tiny_backbone)))  # the first does not exist

    return settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings_of):
    """The folder in which one of CASES was trained in one go, or stopped in its step."""

    @cache
    def train(case, stopped=False):
        (script, options, step), folder = CASES[case], tmp_path_factory.mktemp("trained")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DETECTION_CACHE", str(folder / "cache"))
            patch.chdir(folder)
            if stopped:
                notes = stop_at_step(script, settings_of(script, **options), step).__notes__
                assert notes == [f"the state after epoch {step // 3} is in run: go on with --resume"]
            else:
                script.main(settings_of(script, **options))
        return folder

    return train


@pytest.fixture
def stopped(trained, settings_of):
    """Copies a stopped run into the working folder; returns the settings that resume it."""

    def copy(case):
        shutil.copytree(trained(case, stopped=True), ".", dirs_exist_ok=True)
        return settings_of(CASES[case][0], resume=True, **CASES[case][1])

    return copy


def log_of(folder="."):
    return [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]


def results(folder="."):
    """The final checkpoint and its weights as bytes, and the log without times."""
    content = torch.load(Path(folder, "out.pth"), weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("model").items()}
    return content, weights, [line | {"seconds": 0} for line in log_of(folder)]


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_same_result(case, stopped, trained, tiny_backbone):
    """Although a backbone that is named before its own has appeared since."""
    shutil.copytree(tiny_backbone, "better")
    config = json.loads(Path("better/config.json").read_text())
    Path("better/config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-2}))
    settings = stopped(case)
    Path("run/.last.pth.7.tmp").touch()  # of a process that was killed while it wrote
    if case == "stage 1":  # whose state holds the head alone, as the backbone does not change
        names = torch.load("run/state.pth", weights_only=True)["parts"]["trained"]
        assert all(name.startswith(("dense.", "second_look.")) for name in names)
    CASES[case][0].main(settings)
    assert results() == results(trained(case)) and results()[0]["train_config"]["backbone"] == str(tiny_backbone)
    assert not any("lora" in name for name in results()[1]) and not list(Path("run").glob(".*"))


def test_killed_runs_go_on_to_the_same_result_and_a_finished_one_does_not_change(trained, settings_of):
    """SIGKILL while the cache is built, and in both stages."""
    settings = settings_of(improved, resume=True)
    for moment in (-1, 1, 3):  # the cache is being built, or so many epochs are logged
        (process,) = start_training(improved.main, settings)
        while process.is_alive():
            log = Path("run/log.jsonl")
            if any(Path("cache").rglob("*.features*")) if moment < 0 else log.is_file() and len(log_of()) >= moment:
                process.kill()
            process.join(0.01)
        assert process.exitcode == -signal.SIGKILL
    for _ in range(2):
        improved.main(settings)
        assert results() == results(trained("stage 1"))


def test_stage_1_alone_goes_on_and_other_runs_start_from_it(trained, settings_of, demo, tiny_backbone, capfd):
    """A stopped one does not need the file that it started from. At learning rate 0 the weights stay the same."""
    settings = settings_of(improved, resume=True)
    improved.main(replace(settings, stop_after="frozen", output="start.pth"))
    assert "nothing to resume in run yet: starting" in capfd.readouterr().out
    improved.main(settings)
    assert results()[1:] == results(trained("stage 1"))[1:]
    data = {"data": str(demo), "workers": 0, "batch_size": 4, "precision": "fp32", "run_dir": "from"}
    epochs = {"epochs_frozen": 0, "epochs_unfrozen": 2, "lr_unfrozen": 0.0}
    settings = improved.Settings(**data, **epochs, start_from="start.pth")
    stop_at_step(improved, settings, 5)
    before = load_checkpoint(Path("start.pth").rename("moved.pth")).detector.state_dict()
    improved.main(replace(settings, resume=True))
    after = load_checkpoint("from/last.pth").detector.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    conditions = load_checkpoint("from/last.pth").conditions()
    assert conditions["started_from"] == "start.pth" and conditions["backbone"] == str(tiny_backbone)
    assert conditions["second_look"] == 100 and conditions["dropout"] == 0.3 and conditions["crop_size"] == 56


REFUSED = [  # changes of a run that was stopped in stage 1
    ({"blocks": (3, 4)}, "cannot go on with another --blocks"),
    ({"head": "linear"}, "cannot go on with another --head"),
    ({"lora": 2}, "cannot go on with another --lora"),
    ({"train_images": 8}, "had other train images or boxes"),
    ({"data": "other_train"}, "had other train images or boxes"),
    ({"backbone": ("other",)}, "cannot go on with another --backbone"),
    ({"epochs_frozen": 0}, "is in the stage frozen, now left out"),
    ({"resume": False, "data": "not/looked/for"}, "the run in run is not finished: go on with --resume"),
]


def test_what_does_not_fit_a_stopped_run_and_damaged_states_are_refused(stopped, demo):
    def contents():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("run").iterdir()}

    shutil.copytree(demo, "other_train")
    first, second, *_ = sorted(Path("other_train", "train2017").iterdir())
    shutil.copy(first, second)  # other pixels under the same name
    settings = stopped("stage 1")
    before, state = contents(), Path("run/state.pth").read_bytes()
    for change, message in REFUSED:
        with pytest.raises(InputError, match=message):
            improved.main(replace(settings, **change))
        assert contents() == before
    middle = len(state) // 2
    for damaged in (state[:-1], state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]):
        Path("run/state.pth").write_bytes(damaged)
        with pytest.raises(InputError, match=r"run/state\.pth is damaged: delete that folder, or name another"):
            improved.main(settings)
        assert Path("run/state.pth").read_bytes() == damaged


def test_a_resumed_run_has_the_rates_and_batches_of_its_settings(stopped, demo, monkeypatch, capfd):
    """Its learning rates are those of a run with them in one go; what has changed is said, and recorded."""
    shutil.copytree(demo, "moved", copy_function=shutil.copyfile)  # files of another time
    flags = {"data": "moved", "val_images": 3, "output": "other.pth"}
    settings = replace(stopped("simple"), epochs=4, batch_size=6, lr=0.1, **flags)
    used, set_rates = [], Schedule.set_rates

    def recording(schedule, *position):
        set_rates(schedule, *position)
        used.append(schedule.optimizer.param_groups[-1]["lr"])

    monkeypatch.setattr(Schedule, "set_rates", recording)
    simple.main(replace(settings, backbone=tuple(f"moved/{Path(name).name}" for name in settings.backbone)))
    out, changes = capfd.readouterr().out, ("--data (", "--batch-size (was 4, is 6)", "--lr (was 0.001, is 0.1)")
    assert "from here on with another " in out and all(text in out for text in changes)
    assert "warning: it had other validation images" in out and "on 3 validation images: " in out
    resumed = used.copy()
    used.clear()
    simple.main(replace(settings, resume=False, run_dir="whole"))
    assert resumed == used[len(used) // 2 :] and len(used) == 8
    assert (used[0], used[-1]) == pytest.approx((0.1, 0.1 * 0.5 * (1 + math.cos(math.pi * 7 / 8))))
    config = load_checkpoint("other.pth").train_config
    assert config["lr"] == 0.1 and config["batch_size"] == 6 and "resume" not in config
    assert [line["epoch"] for line in log_of()] == [1, 2, 3, 4]


def test_stage_2_goes_on_whatever_stage_1_is_said_to_have_been(stopped):
    changed = {"epochs_frozen": 1, "epochs_unfrozen": 3, "lr_unfrozen": 7e-5, "head_lr_factor": 1.0}
    improved.main(replace(stopped("LoRA"), **changed))
    stages = ["frozen", "frozen", "unfrozen", "unfrozen", "unfrozen"]
    assert [(line["epoch"], line["stage"]) for line in log_of()] == list(enumerate(stages, 1))
    assert changed.items() <= load_checkpoint("run/last.pth").train_config.items()


def test_a_folder_in_which_another_process_trains_is_refused(settings_of, monkeypatch, capfd):
    Path("same").mkdir()
    code = "import filelock, time; x = filelock.FileLock('same/lock'); x.acquire(); print(flush=True); time.sleep(300)"
    settings, accelerator = settings_of(simple, resume=True, run_dir="same"), Accelerator(cpu=True)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process trains in same: wait, or name another --run-dir"):
            Run(settings, accelerator)
        assert [path.name for path in Path("same").iterdir()] == ["lock"]
        other.kill()
    Run(settings, accelerator).lock.release()  # the lock of a killed process is free
    monkeypatch.setattr(fcntl, "flock", lambda *_: open("absent"))  # noqa: PTH123 SIM115  any OSError
    Run(settings, accelerator)
    assert "warning: same: No such file or directory: start no second training there" in capfd.readouterr().out


def test_a_full_disk_ends_in_one_line_and_loses_nothing(stopped, trained):
    settings, hard = stopped("simple"), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    old = Path(shutil.copy("run/last.pth", "out.pth")).read_bytes()
    for allowed in (5000, len(old) - 1, len(old) + 100_000):  # no weights, a checkpoint without its end, no state
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
        try:
            with pytest.raises(InputError, match=r"cannot write run/\w+\.pth: File too large"):
                simple.main(settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert not list(Path("run").glob(".*")) and Path("out.pth").read_bytes() == old
    simple.main(settings)
    assert results() == results(trained("simple"))


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


def test_small_sets_make_at_least_one_step_and_none_is_dropped_in_silence(demo, settings_of):
    with pytest.raises(InputError, match="--accumulate 8: an epoch has only 3 batches"):
        simple.main(settings_of(simple, accumulate=8))
    ten = SampleDataset(load_split(data_flags(demo, limit=10), "train"), seed=0)
    assert [len(make_train_loader(ten, 8, 0, processes)) for processes in (1, 2)] == [1, 2]  # 16: accelerate fills up


def test_two_accumulated_batches_train_as_one_of_twice_the_size(settings_of, trained):
    simple.main(settings_of(simple, batch_size=2, accumulate=2))
    for two, one in zip(log_of(), log_of(trained("simple")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    files = Path("out.pth"), trained("simple") / "out.pth"
    weights, theirs = (load_checkpoint(file).detector.state_dict() for file in files)
    assert all(torch.allclose(weight, theirs[name], atol=1e-3) for name, weight in weights.items())


def test_seeds_of_different_purposes_and_numbers_differ():
    seeds = [seed_of(purpose, *numbers) for purpose in Purpose for numbers in ((0,), (1,), (0, 1), (0, 1, 0), (1, 0))]
    assert len(set(seeds)) == len(seeds) == 15


def test_two_stages_hold_one_model_at_a_time_and_trackers_the_numbers_of_each_epoch(settings_of, monkeypatch):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alive, finish_epoch = [], Run.finish_epoch

    def counting(*arguments):
        gc.collect()
        kinds = [type(one) for one in gc.get_objects()]
        alive.append((kinds.count(AcceleratedOptimizer), kinds.count(Detector)))
        finish_epoch(*arguments)

    monkeypatch.setattr(Run, "finish_epoch", counting)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{Path('mlruns').absolute()}")
    trackers = {"log_with": ("tensorboard", "mlflow"), "run_dir": "runs/mine"}
    settings = settings_of(improved, train_images=4, val_every=2, **trackers)
    with monkeypatch.context() as patch, pytest.raises(AttributeError):  # killed before the state of an epoch is saved
        patch.delattr(Run, "_save")
        improved.main(replace(settings, log_with=("tensorboard",)))
    alive.clear()
    numbers = improved.main(settings)
    assert alive == [(1, 1)] * 4
    events = EventAccumulator("runs/mine/dinov2-detection", {"scalars": 0})
    events.Reload()
    for name, epochs in {"loss/object": [1, 2, 3, 4], "validation/AP50": [2, 4]}.items():
        assert [event.step for event in events.Scalars(name)] == epochs
    assert events.Scalars("final/AP50")[0].value == pytest.approx(numbers["AP50"], abs=1e-6)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0" and run.data.metrics["final/AP50"] == pytest.approx(numbers["AP50"], abs=1e-6)


def test_a_tracker_out_of_reach_is_refused_before_training_and_a_warning_within(settings_of, monkeypatch, capfd):
    def unreachable(*_arguments, **_options):
        raise ConnectionError("no route to\nthe tracker")

    settings = settings_of(simple, log_with=("tensorboard",), train_images=4, epochs=2)
    simple.main(settings)
    before = results()
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", unreachable)
        with pytest.raises(InputError, match="--log-with tensorboard: the tracker"):
            simple.main(settings)
    assert results() == before and Path("run/finished").exists()  # nothing of the former run is lost
    for name, epoch in (("log", 1), ("finish", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(TensorBoardTracker, name, unreachable)
            simple.main(settings)
        out = capfd.readouterr().out
        assert out.count(f"warning: tensorboard is lost after epoch {epoch}: the tracker") == 1
        assert "the finished run in run is replaced: dinov2-detection, 20" in out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log-with tensorboard needs its package: pip install tensorboard"):
        simple.main(settings)


def test_stage_1_has_ten_epochs_and_with_few_images_two_hundred_steps():
    passes = {images: improved.Settings().head_epochs(images) for images in (20, 40, 150, 600)}
    assert passes == {20: 80, 40: 40, 150: 11, 600: 10}
    assert improved.Settings(epochs_frozen=3).head_epochs(20) == 3
