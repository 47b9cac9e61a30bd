"""A run: what it writes, which epoch is kept, and that a stopped run goes on to the same result."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from helpers import ROOT, arguments_of, stop_at_step, tiny_settings

import finetune_dino2_simple
import improved_dino_detector
from common import cli
from common.console import InputError
from common.data.demo import make_demo
from common.model.checkpoint import Checkpoint, load_checkpoint
from common.train.optim import Schedule
from common.train.run import Run, RunFlags

pytestmark = pytest.mark.slow
SCRIPTS = {"simple": finetune_dino2_simple, "improved": improved_dino_detector}
STAGES = ("frozen", "unfrozen")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(name, data, tiny_backbone, **options):
    epochs = {"epochs": 3} if name == "simple" else {"epochs_frozen": 2, "epochs_unfrozen": 2, "dropout": 0.3}
    common = {"output": "out.pth", "run_dir": "run", "precision": "fp32"}
    return tiny_settings(SCRIPTS[name], data, tiny_backbone, **common | epochs | options)


def log_of(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def epochs_of(*files):
    return [load_checkpoint(file).epoch for file in files]


def results(folder="."):
    """The final checkpoint and its weights as bytes, and the log without times."""
    content = torch.load(Path(folder, "out.pth"), weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("model").items()}
    return content, weights, [line | {"seconds": 0} for line in log_of(Path(folder, "run"))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo, tiny_backbone):
    """The results of each script, trained in one go."""
    ends = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DETECTION_CACHE", str(folder / "cache"))
            patch.chdir(folder)
            script.main(settings_of(name, demo, tiny_backbone))
        ends[name] = results(folder)
    return ends


STOPS = [("simple", 2), ("simple", 7), ("improved", 5), ("improved", 8), ("improved", 11)]


@pytest.mark.parametrize(("name", "step"), STOPS)
def test_a_stopped_run_goes_on_to_the_same_result(name, step, uninterrupted, demo, tiny_backbone, capfd):
    """In the first epoch, of which nothing is kept, in later ones and in stage 2; three steps an epoch."""
    settings = settings_of(name, demo, tiny_backbone)
    stopped = stop_at_step(SCRIPTS[name], settings, step)
    notes = getattr(stopped, "__notes__", [])
    assert notes == ([f"the state after epoch {step // 3} is in run: go on with --resume"] if step > 3 else [])
    if name == "improved" and step < 6:  # the state of stage 1 holds the head alone, as its backbone does not change
        trained = torch.load("run/state.pth", weights_only=True)["parts"]["trained"]
        assert all(name.startswith(("dense.", "second_look.")) for name in trained)
    SCRIPTS[name].main(replace(settings, resume=True))
    assert results() == uninterrupted[name]
    assert not [path.name for path in Path("run").iterdir() if path.name.startswith(".")]


def test_killed_runs_go_on_to_the_same_result(uninterrupted, demo, tiny_backbone):
    """SIGKILL while the cache is built, in both stages, and while files are written."""
    settings = settings_of("improved", demo, tiny_backbone, resume=True)
    command = [sys.executable, str(ROOT / "improved_dino_detector.py"), *arguments_of(settings)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for moment in (-1, 1, 2, 3):  # the cache is being built, or so many epochs are logged
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                log = Path("run/log.jsonl")
                if any(Path("cache").rglob("*.features*")) if moment < 0 else log.is_file() and len(log_of()) >= moment:
                    process.kill()
            assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert results() == uninterrupted["improved"]
    assert not [path.name for path in Path("run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_accumulated_steps_and_lora_go_on_to_the_same_result(name, demo, tiny_backbone, tmp_path, monkeypatch):
    ends = []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        options = {"batch_size": 2, "accumulate": 2, "lora": 2, "checkpoint_activations": True}
        settings = settings_of(name, demo, tiny_backbone, **options)
        if folder.name == "stopped":
            stop_at_step(SCRIPTS[name], settings, 11 if name == "improved" else 5)
            settings = replace(settings, resume=True)
        SCRIPTS[name].main(settings)
        ends.append(results(folder))
    assert ends[0] == ends[1]
    assert not any("lora" in weight for weight in ends[0][1])


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped"])
def test_a_damaged_state_is_refused(damage, demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone)
    stop_at_step(finetune_dino2_simple, settings, 4)
    state = Path("run/state.pth")
    content = bytearray(state.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    state.write_bytes(content[: {"cut": len(content) - 1, "half": len(content) // 2, "empty": 0}.get(damage)])
    before = contents()
    with pytest.raises(InputError, match=r"run/state\.pth is damaged: delete that folder, or name another --run-dir"):
        finetune_dino2_simple.main(replace(settings, resume=True))
    assert contents() == before


def contents(folder="run"):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


def test_resume_without_a_state_starts_and_of_a_finished_run_changes_nothing(uninterrupted, demo, tiny_backbone, capfd):
    settings = settings_of("improved", demo, tiny_backbone, resume=True)
    improved_dino_detector.main(replace(settings, stop_after="frozen"))
    assert "nothing to resume in run yet: starting" in capfd.readouterr().out
    for _ in range(2):
        improved_dino_detector.main(settings)
        _, *rest = results()
        assert tuple(rest) == uninterrupted["improved"][1:]


def test_weights_that_are_not_finite_are_not_written(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone, train_images=4, lr=1e38, backbone_lr=1e38)
    with pytest.raises(InputError, match="not finite after epoch 1; lower the learning rate"):
        finetune_dino2_simple.main(settings)
    assert not list(Path("run").glob("*.pth"))


REFUSED = {
    "blocks": ({"blocks": (3, 4)}, "cannot go on with another --blocks"),
    "size": ({"image_size": 70}, "cannot go on with another --image-size"),
    "head": ({"head": "linear"}, "cannot go on with another --head"),
    "lora": ({"lora": 2}, "cannot go on with another --lora"),
    "training images": ({"train_images": 8}, "had other train images or boxes"),
    "validation images": ({"val_images": 3}, "had other val images or boxes"),
    "stage": ({"epochs_frozen": 0}, "is in the stage frozen, now left out"),
}


def test_settings_that_do_not_fit_a_resumed_run_are_refused(demo, tiny_backbone):
    settings = settings_of("improved", demo, tiny_backbone)
    stop_at_step(improved_dino_detector, settings, 5)
    before = contents()
    for change, message in REFUSED.values():
        with pytest.raises(InputError, match=message):
            improved_dino_detector.main(replace(settings, resume=True, **change))
        assert contents() == before


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_resumed_run_with_other_rates_and_batches_has_those_of_its_settings(
    batch_size, demo, tiny_backbone, monkeypatch, capfd
):
    """Each learning rate is that of an uninterrupted run with these settings, and the checkpoint records them."""
    settings = settings_of("simple", demo, tiny_backbone, epochs=4)
    stop_at_step(finetune_dino2_simple, settings, 7)
    AcceleratorState._reset_state(reset_partial_state=True)
    changed = replace(settings, batch_size=batch_size, lr=0.1, output="other.pth")
    used, set_rates = [], Schedule.set_rates

    def recorded(schedule, *position):
        cycle = set_rates(schedule, *position)
        used.append(schedule.optimizer.param_groups[-1]["lr"])
        return cycle

    monkeypatch.setattr(Schedule, "set_rates", recorded)
    capfd.readouterr()
    finetune_dino2_simple.main(replace(changed, resume=True))
    changes = capfd.readouterr().out.partition("from here on with another ")[2].splitlines()[0].split(", --")
    assert sorted(changes) == [
        f"--batch-size (was 4, is {batch_size})",
        "lr (was 0.001, is 0.1)",
        "output (was out.pth, is other.pth)",
    ]
    resumed = used.copy()
    used.clear()
    finetune_dino2_simple.main(replace(changed, run_dir="whole"))
    assert resumed == used[len(used) // 2 :] and max(used) == pytest.approx(0.1, rel=0.01) and min(resumed) > 0
    recorded = load_checkpoint("other.pth").train_config
    assert recorded["lr"] == 0.1 and recorded["batch_size"] == batch_size and "resume" not in recorded
    assert [line["epoch"] for line in log_of()] == [1, 2, 3, 4]


@pytest.mark.parametrize("epochs_frozen", [1, 4])
def test_stage_2_goes_on_whatever_stage_1_is_said_to_have_been(epochs_frozen, demo, tiny_backbone):
    settings = settings_of("improved", demo, tiny_backbone, epochs_unfrozen=3)
    stop_at_step(improved_dino_detector, settings, 11)  # in epoch 2 of stage 2
    changed = {"epochs_frozen": epochs_frozen, "lr_unfrozen": 7e-5, "head_lr_factor": 1.0}
    improved_dino_detector.main(replace(settings, resume=True, **changed))
    assert [line["epoch"] for line in log_of()] == [1, 2, 3, 4, 5]
    assert [line["stage"] for line in log_of()] == ["frozen"] * 2 + ["unfrozen"] * 3
    recorded = load_checkpoint("run/last.pth").train_config
    assert {name: recorded[name] for name in changed} == changed


def test_a_resumed_run_reads_no_other_detector_or_backbone(demo, tiny_backbone, uninterrupted):
    """Neither the backbone that has appeared in front of the one it took, nor the file that it started from."""
    both = (str(Path("better").absolute()), str(tiny_backbone))
    settings = replace(settings_of("improved", demo, tiny_backbone), backbone=both)
    stop_at_step(improved_dino_detector, settings, 5)
    shutil.copytree(tiny_backbone, "better")
    config = json.loads(Path("better/config.json").read_text())
    Path("better/config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-2}))
    improved_dino_detector.main(replace(settings, resume=True))
    content, weights, _ = results()
    assert content["train_config"]["backbone"] == str(tiny_backbone) and weights == uninterrupted["improved"][1]

    shutil.copy("out.pth", "start.pth")
    data = {"data": str(demo), "workers": 0, "batch_size": 4, "precision": "fp32", "run_dir": "from"}
    settings = improved_dino_detector.Settings(**data, start_from="start.pth", epochs_frozen=1, epochs_unfrozen=2)
    stop_at_step(improved_dino_detector, settings, 8)
    Path("start.pth").unlink()
    improved_dino_detector.main(replace(settings, resume=True))
    conditions = load_checkpoint("from/last.pth").conditions()
    assert conditions["started_from"] == "start.pth" and conditions["backbone"] == str(tiny_backbone)
    assert conditions["second_look"] == 100 and conditions["dropout"] == 0.3 and conditions["crop_size"] == 56


def test_changed_image_files_are_said(tmp_path, tiny_backbone, capfd):
    make_demo(tmp_path / "own", train=12, val=6, seed=1)
    settings = settings_of("simple", tmp_path / "own", tiny_backbone, epochs=2)
    stop_at_step(finetune_dino2_simple, settings, 4)
    image = next((tmp_path / "own" / "train2017").iterdir())
    os.utime(image, (0, 0))
    finetune_dino2_simple.main(replace(settings, resume=True))
    assert "warning: image files were written since the run began" in capfd.readouterr().out


def test_stage_2_holds_one_model_and_one_optimizer(demo, tiny_backbone, monkeypatch):
    alive, validate = [], improved_dino_detector.validate

    def counting(*arguments):
        gc.collect()
        objects = gc.get_objects()
        alive.append([sum(isinstance(o, kind) for o in objects) for kind in (AcceleratedOptimizer, type(arguments[0]))])
        return validate(*arguments)

    monkeypatch.setattr(improved_dino_detector, "validate", counting)
    improved_dino_detector.main(settings_of("improved", demo, tiny_backbone, epochs_frozen=1, epochs_unfrozen=1))
    assert alive == [[1, 1], [1, 1]]


BEST = {  # mAP@0.5 of the epochs, and the epoch that is kept
    "highest": ((0.1, 0.3, 0.2), 2),
    "later of equals": ((0.3, 0.3, 0.1), 2),
    "all 0": ((0.0, 0.0, 0.0), 3),
    "none": ((None, None, None), 3),
    "NaN": ((math.nan, math.nan), 2),
    "NaN after a number": ((0.2, math.nan, None), 1),
    "number after none": ((None, 0.1, None), 2),
    "single NaN": ((math.nan,), 1),
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("scores", "expected"), BEST.values(), ids=BEST)
def test_best_epoch_has_the_highest_map_and_is_the_last_of_equals(resumed, scores, expected, detector, demo_val):
    numbers = dict.fromkeys(("AP", "accuracy", "mean_iou"), 0.0)
    checkpoint = Checkpoint(detector, demo_val.class_names, demo_val.category_ids)
    pending = iter(enumerate(scores))
    for _ in range(len(scores) if resumed else 1):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = Run(RunFlags(run_dir="run", resume=resumed), Accelerator(cpu=True), STAGES)
        run.begin(demo_val, demo_val, STAGES)
        checkpoint = run.describe(checkpoint)
        for done, epoch in enumerate(run.epochs("frozen", len(scores), trained=detector.head)):
            if resumed and done:
                break  # stopped in the next epoch
            run.began, run.sums = 0.0, {}
            position, score = next(pending)
            assert epoch == position
            run.finish_epoch(replace(checkpoint, metrics=numbers | {"AP50": score}))
    kept = [Path("run", name) for name in ("best.pth", "frozen.pth", "last.pth")]
    assert epochs_of(*kept) == [expected, expected, len(scores)]
    assert kept[0].samefile(kept[1])


@pytest.fixture
def val_with(demo, tmp_path):
    """Writes the demo's validation annotations, each changed by a function (None: omitted), and returns flags."""

    def write(change):
        content = json.loads((demo / "annotations" / "instances_val2017.json").read_text())
        content["annotations"] = [one for one in map(change, content["annotations"]) if one]
        (tmp_path / "val.json").write_text(json.dumps(content))
        return {
            "train_json": str(demo / "annotations" / "instances_train2017.json"),
            "train_images_dir": str(demo / "train2017"),
            "val_json": str(tmp_path / "val.json"),
            "val_images_dir": str(demo / "val2017"),
        }

    return write


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_validation_objects_the_last_epoch_is_kept(name, val_with, demo, tiny_backbone, capfd):
    settings = settings_of(name, demo, tiny_backbone, **val_with(lambda annotation: None))
    with pytest.raises(InputError, match=r"val\.json: no box on the 6 validation images.*refused by --strict"):
        SCRIPTS[name].main(replace(settings, strict=True))
    numbers = SCRIPTS[name].main(settings)
    assert numbers["AP50"] is None
    assert "mAP@0.5 was the same after every epoch: the last one is kept" in capfd.readouterr().out
    last = 3 if name == "simple" else 4
    assert epochs_of("out.pth", "run/best.pth", "run/last.pth") == [last] * 3


def test_first_validation_images_without_objects_are_reported(val_with, demo, tiny_backbone, monkeypatch, caplog):
    """The images of the validation after each epoch have no box, later images have."""
    monkeypatch.setattr("common.evaluate.detect.VAL_SUBSET", 2)
    flags = val_with(lambda annotation: annotation if annotation["image_id"] > 2 else None)
    numbers = finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone, **flags, strict=True))
    assert "no object on the first 2 validation images" in caplog.text
    assert [line["val"]["AP50"] for line in log_of()] == [None] * 3 and numbers["AP50"] is not None


def test_an_unfinished_run_is_not_overwritten_and_a_finished_one_is(demo, tiny_backbone, monkeypatch, capfd):
    settings = settings_of("simple", demo, tiny_backbone, epochs=2)
    stop_at_step(finetune_dino2_simple, settings, 4)
    before = contents()
    arguments = arguments_of(replace(settings, data="no/such/data"))  # which is not looked for
    monkeypatch.setattr("sys.argv", ["finetune_dino2_simple.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(finetune_dino2_simple.main, finetune_dino2_simple.Settings, "")
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert ended.value.code == 2 and "the run in run is not finished: go on with --resume" in line
    assert contents() == before and not Path("out.pth").exists()
    finetune_dino2_simple.main(replace(settings, resume=True))
    finetune_dino2_simple.main(replace(settings, epochs=1, seed=1))
    assert [line["epoch"] for line in log_of()] == [1] and epochs_of("out.pth", "run/last.pth") == [1, 1]
    finetune_dino2_simple.main(replace(settings, epochs=3, seed=1, resume=True))  # with more epochs
    assert [line["epoch"] for line in log_of()] == [1, 2, 3] and epochs_of("run/last.pth") == [3]


def test_files_of_others_are_not_overwritten(demo, tiny_backbone):
    Path("run").mkdir()
    Path("run/best.pth").write_text("of another trainer")
    with pytest.raises(InputError, match=r"run has a best\.pth of another program: name another --run-dir"):
        finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone))
    assert Path("run/best.pth").read_text() == "of another trainer"
    improved_dino_detector.main(settings_of("improved", demo, tiny_backbone, run_dir="own", stop_after="frozen"))
    before = contents("own")
    for start in ("own/frozen.pth", "own/last.pth"):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = improved_dino_detector.Settings(str(demo), start_from=start, run_dir="own", output="new.pth")
        with pytest.raises(InputError, match=f"would overwrite the input {start}"):
            improved_dino_detector.main(settings)
    assert contents("own") == before


def test_a_folder_in_which_another_process_trains_is_refused(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone, resume=True, epochs=1)
    Path("run").mkdir()
    code = "import filelock, time; x = filelock.FileLock('run/lock'); x.acquire(); print(flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in run: wait for it, stop it, or name"):
            finetune_dino2_simple.main(settings)
        assert [path.name for path in Path("run").iterdir()] == ["lock"]
        other.kill()
    finetune_dino2_simple.main(settings)  # the lock of a killed process is free
    assert log_of() and Path("out.pth").is_file()


CONTRADICTIONS = [
    (finetune_dino2_simple, {"lora": 4, "freeze_backbone": True}, "--freeze-backbone"),
    (improved_dino_detector, {"lora": 4, "unfreeze_blocks": 1}, "--unfreeze-blocks"),
    (improved_dino_detector, {"start_from": "a.pth", "head": "linear"}, "--head"),
    (improved_dino_detector, {"start_from": "a.pth", "second_look": 0}, "--second-look"),
    (improved_dino_detector, {"start_from": "a.pth", "image_size": 224}, "--image-size"),
    (improved_dino_detector, {"epochs_frozen": 0, "epochs_unfrozen": 0}, "no stage to train"),
    (improved_dino_detector, {"scales": (2.0, 1.0)}, "--scales"),
]


@pytest.mark.parametrize(("script", "flags", "message"), CONTRADICTIONS, ids=[str(case[1]) for case in CONTRADICTIONS])
def test_flags_without_effect_are_refused(script, flags, message):
    with pytest.raises(InputError, match=message):
        script.Settings(**flags)


def test_more_batches_a_step_than_an_epoch_has_are_refused(demo, tiny_backbone):
    with pytest.raises(InputError, match="--accumulate 8: an epoch has only 3 batches"):
        finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone, accumulate=8))


def test_tensorboard_and_mlflow_hold_the_numbers_of_each_epoch(demo, tiny_backbone, monkeypatch):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{Path('mlruns').absolute()}")
    settings = settings_of("improved", demo, tiny_backbone, log_with=("tensorboard", "mlflow"), run_dir="runs/mine")
    numbers = improved_dino_detector.main(settings)
    events = EventAccumulator("runs/mine/dinov2-detection", {"scalars": 0})
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert [event.step for event in scalars["loss/object"]] == [event.step for event in scalars["validation/AP50"]]
    assert [event.step for event in scalars["loss/object"]] == [1, 2, 3, 4]
    assert scalars["final/AP50"][0].value == pytest.approx(numbers["AP50"], abs=1e-6)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0" and run.data.metrics["final/AP50"] == pytest.approx(numbers["AP50"], abs=1e-6)


def test_a_tracker_that_cannot_be_reached_is_refused_before_training_and_a_warning_within(
    demo, tiny_backbone, monkeypatch, capfd
):
    settings = settings_of("simple", demo, tiny_backbone, log_with=("tensorboard",), epochs=1)

    def unreachable(*_arguments, **_options):
        raise ConnectionError("no route to\nthe tracker")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", unreachable)
        with pytest.raises(InputError, match="--log-with tensorboard: the tracker"):
            finetune_dino2_simple.main(settings)
    monkeypatch.setattr(Accelerator, "log", unreachable)
    finetune_dino2_simple.main(replace(settings, run_dir="other"))
    assert "warning: a tracker did not take epoch 1: the tracker" in capfd.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log-with tensorboard needs its package: pip install tensorboard"):
        finetune_dino2_simple.main(replace(settings, run_dir="third"))


def test_nothing_of_trackers_or_charts_is_imported_without_the_flag():
    packages = ("tensorboard", "mlflow", "wandb", "matplotlib")
    code = f"import sys, finetune_dino2_simple; print([name for name in {packages} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
