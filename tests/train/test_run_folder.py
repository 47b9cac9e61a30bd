"""The run folder: which epoch is kept, unfinished and finished runs, and the flags of a resumed run."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import arguments_of, stop_at_step, tiny_settings

import finetune_dino2_simple
import improved_dino_detector
from common import cli
from common.cli import ON_RESUME
from common.console import InputError
from common.data.dataset import EpochOrder
from common.model.checkpoint import Checkpoint, load_checkpoint
from common.train import run_folder
from common.train.optim import cosine_schedule
from common.train.run_folder import RunFlags, RunFolder
from common.train.state import TrainState

pytestmark = pytest.mark.slow
SCRIPTS = {"simple": finetune_dino2_simple, "improved": improved_dino_detector}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def settings_of(name, data, tiny_backbone, **options):
    epochs = {"epochs": 2} if name == "simple" else {"epochs_frozen": 2, "epochs_unfrozen": 1}
    common = {"output": "out.pth", "run_dir": "run", "precision": "fp32"}
    return tiny_settings(SCRIPTS[name], data, tiny_backbone, **common | epochs | options)


def epochs_of(*files):
    return [load_checkpoint(file).epoch for file in files]


def log_of(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def contents(folder="run"):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


BEST = {  # mAP@0.5 of the epochs, and the epoch that is kept
    "highest": ((0.1, 0.3, 0.2), 2),
    "later of equals": ((0.3, 0.3, 0.1), 2),
    "all 0": ((0.0, 0.0, 0.0), 3),
    "rises from 0": ((0.0, 0.1, 0.0), 2),
    "none": ((None, None, None), 3),
    "NaN": ((math.nan, math.nan), 2),
    "NaN after a number": ((0.2, math.nan, None), 1),
    "number after none": ((None, 0.1, None), 2),
    "single": ((None,), 1),
    "single NaN": ((math.nan,), 1),
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("scores", "expected"), BEST.values(), ids=BEST)
def test_best_epoch_has_the_highest_map_and_is_the_last_of_equals(resumed, scores, expected, detector, demo_val):
    accelerator, stages = Accelerator(cpu=True), ("frozen", "unfrozen")
    numbers = dict.fromkeys(("AP", "accuracy", "mean_iou"), 0.0)
    checkpoint = Checkpoint(detector, demo_val.class_names, demo_val.category_ids)
    optimizer = torch.optim.SGD(detector.head.parameters(), 0.1)
    state = TrainState("frozen", detector, optimizer, cosine_schedule(optimizer, 9), EpochOrder(6, 0), accelerator)
    run = RunFolder(RunFlags(run_dir="run"), demo_val, accelerator, stages)
    for epoch, score in enumerate(scores, 1):
        run.log_epoch(state, replace(checkpoint, metrics=numbers | {"AP50": score}, epoch=epoch))
        state.finish_epoch()
        run.save(state)
        if resumed:
            run = RunFolder(RunFlags(run_dir="run", resume=True), demo_val, accelerator, stages)
    assert epochs_of("run/best.pth", "run/frozen.pth", "run/last.pth") == [expected, expected, len(scores)]


@pytest.mark.parametrize(
    ("patience", "scores", "stalled"),
    [
        (0, (0.3, 0.2, 0.1), False),
        (2, (0.3, 0.2), False),
        (2, (0.3, 0.2, 0.1), True),
        (2, (0.3, 0.2, 0.4), False),
        (2, (0.3, 0.3, 0.3), True),
        (1, (0.1, math.nan), True),
        (1, (None, 0.1), False),
    ],
)
def test_patience_ends_a_stage_that_does_not_improve(patience, scores, stalled, detector, demo_val):
    run = RunFolder(RunFlags(run_dir="run", patience=patience), demo_val, Accelerator(cpu=True), ("frozen", "unfrozen"))
    run.log = [{"stage": "frozen", "val": {"AP50": score}} for score in scores]
    assert run.has_stalled("frozen") is stalled and not run.has_stalled("unfrozen")


@pytest.fixture
def val_with(demo, tmp_path):
    """Writes the demo's validation annotations, each changed by a function (None: omitted), and returns flags."""

    def write(change):
        content = json.loads((demo / "annotations" / "instances_val2017.json").read_text())
        content["annotations"] = [one for one in map(change, content["annotations"]) if one]
        (tmp_path / "val.json").write_text(json.dumps(content))
        return {"val_json": str(tmp_path / "val.json"), "val_images_dir": str(demo / "val2017")}

    return write


WITHOUT_OBJECTS = {
    "no box": (lambda annotation: None, "no box on the 6 validation images"),
    "only crowds": (lambda annotation: annotation | {"iscrowd": 1}, r"all \d+ boxes are crowds .* on the 6 validation"),
}


@pytest.mark.parametrize(("change", "message"), WITHOUT_OBJECTS.values(), ids=WITHOUT_OBJECTS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_without_validation_objects_the_last_epoch_is_kept(name, change, message, val_with, demo, tiny_backbone, capfd):
    settings = settings_of(name, demo, tiny_backbone, **val_with(change))
    with pytest.raises(InputError, match=rf"val\.json: {message}.*refused by --strict"):
        SCRIPTS[name].main(replace(settings, strict=True))
    assert not Path("run").exists() or not list(Path("run").iterdir())
    numbers = SCRIPTS[name].main(settings)
    text = capfd.readouterr().out
    assert numbers["AP50"] is None and f"warning: {settings.val_json}: " in text
    assert "mAP@0.5 could not be computed after any epoch: the last epoch is kept" in text
    last = 2 if name == "simple" else 3
    assert epochs_of("out.pth", "run/best.pth", "run/last.pth") == [last] * 3
    assert name == "simple" or epochs_of("run/frozen.pth") == [2]


def test_a_resumed_run_without_validation_objects_keeps_the_last_epoch(val_with, demo, tiny_backbone):
    settings = settings_of("improved", demo, tiny_backbone, **val_with(lambda annotation: None))
    stop_at_step(improved_dino_detector, settings, 4)  # in epoch 2 of stage 1
    improved_dino_detector.main(replace(settings, resume=True))
    assert epochs_of("run/frozen.pth", "out.pth") == [2, 3]


def test_with_equal_map_the_last_epoch_is_kept(demo, tiny_backbone, capfd):
    """At learning rate 0 every epoch has the same mAP@0.5."""
    finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone, lr=0.0, backbone_lr=0.0))
    first, second = (line["val"]["AP50"] for line in log_of())
    assert first == second is not None and epochs_of("out.pth") == [2]
    assert f"mAP@0.5 was {first:.3f} after every epoch: the last epoch is kept" in capfd.readouterr().out


def test_first_validation_images_without_objects_are_reported(val_with, demo, tiny_backbone, monkeypatch, capfd):
    """The images of the validation after each epoch have no box, later images have."""
    monkeypatch.setattr(run_folder, "EPOCH_VAL_IMAGES", 2)
    flags = val_with(lambda annotation: annotation if annotation["image_id"] > 2 else None)
    numbers = finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone, **flags, strict=True))
    assert "no object on the first 2 validation images" in capfd.readouterr().out
    assert [line["val"]["AP50"] for line in log_of()] == [None, None]
    assert numbers["AP50"] is not None and epochs_of("out.pth") == [2]


def test_validation_objects_print_no_warning(demo, tiny_backbone, capfd):
    finetune_dino2_simple.main(settings_of("simple", demo, tiny_backbone, epochs=1, strict=True))
    assert "warning" not in capfd.readouterr().out


def test_an_unfinished_run_is_not_overwritten(demo, tiny_backbone, monkeypatch, capfd):
    settings = settings_of("simple", demo, tiny_backbone)
    stop_at_step(finetune_dino2_simple, settings, 1)
    before = contents()
    arguments = arguments_of(replace(settings, data="no/such/data"))  # which is not looked for
    monkeypatch.setattr("sys.argv", ["finetune_dino2_simple.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(finetune_dino2_simple.main, finetune_dino2_simple.Settings, "")
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert ended.value.code == 2 and "the run in run is not finished: go on with --resume" in line
    assert contents() == before and not Path("out.pth").exists()


def test_a_finished_run_is_replaced(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone)
    finetune_dino2_simple.main(settings)
    finetune_dino2_simple.main(replace(settings, epochs=1, seed=1))
    assert [line["epoch"] for line in log_of()] == [1] and epochs_of("out.pth", "run/last.pth") == [1, 1]
    assert json.loads(Path("run/settings.json").read_text())["seed"] == 1


def test_a_finished_run_is_resumed_with_more_epochs(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone, epochs=1)
    finetune_dino2_simple.main(settings)
    (first,) = log_of()
    finetune_dino2_simple.main(replace(settings, epochs=3, resume=True))
    assert [line["epoch"] for line in log_of()] == [1, 2, 3] and log_of()[0] == first
    assert epochs_of("run/last.pth") == [3]
    finetune_dino2_simple.main(settings)  # it is finished again, so that it may be replaced
    assert len(log_of()) == 1


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_flag_states_what_a_resumed_run_may_do_with_it(script):
    assert {field.metadata["on_resume"] for field in fields(script.Settings)} == set(ON_RESUME)


REFUSED = [
    ({"blocks": (3, 4)}, "another --blocks"),
    ({"image_size": 70}, "another --image-size"),
    ({"freeze_backbone": True}, "another --freeze-backbone"),
    ({"train_images": 8}, "other images or boxes"),
    ({"batch_size": 2}, "inside an epoch of 4 images a step"),
]


def test_settings_that_do_not_fit_a_resumed_run_are_refused(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone)
    stop_at_step(finetune_dino2_simple, settings, 2)
    before = contents()
    for change, message in REFUSED:
        with pytest.raises(InputError, match=message):
            finetune_dino2_simple.main(replace(settings, resume=True, **change))
        assert contents() == before


def test_changed_settings_of_a_resumed_run_are_printed(demo, tiny_backbone, capfd):
    """Flags with "warn" are; those with "free" and "unrecorded" are not."""
    settings = settings_of("simple", demo, tiny_backbone)
    stop_at_step(finetune_dino2_simple, settings, 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    capfd.readouterr()
    changes = {"lr": 5e-4, "epochs": 3, "precision": "bf16", "workers": 1, "output": "other.pth", "save_steps": 1}
    finetune_dino2_simple.main(replace(settings, resume=True, **changes))
    (warning,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: these"))
    expected = "--epochs (was 2, is 3), --lr (was 0.001, is 0.0005), --precision (was fp32, is bf16)"
    assert warning.endswith(f"another run from here on: {expected}")
    assert [line["epoch"] for line in log_of()] == [1, 2, 3]
    recorded = load_checkpoint("other.pth").train_config
    assert recorded["lr"] == 5e-4 and recorded["workers"] == 1 and not {"resume", "save_steps"} & recorded.keys()


def test_a_folder_in_which_another_process_trains_is_refused(demo, tiny_backbone):
    settings = settings_of("simple", demo, tiny_backbone, resume=True)
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
