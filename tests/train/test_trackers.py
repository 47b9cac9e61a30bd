"""What a run sends to trackers, read back; without the flag nothing is written and nothing imported."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, tiny_settings
from PIL import Image

import finetune_dino2_simple
import improved_dino_detector
from common.console import InputError


def settings_of(script, demo, tiny_backbone, **options):
    epochs = {"epochs": 2} if script is finetune_dino2_simple else {"epochs_frozen": 1, "epochs_unfrozen": 1}
    return tiny_settings(
        script, demo, tiny_backbone, **epochs | {"output": "out.pth", "run_dir": "runs/mine"} | options
    )


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("script", [finetune_dino2_simple, improved_dino_detector], ids=["simple", "improved"])
def test_tensorboard_holds_losses_rates_numbers_and_a_sheet(script, demo, tiny_backbone, here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers = script.main(settings_of(script, demo, tiny_backbone, log_with=("tensorboard",), accumulate=2))
    events = EventAccumulator(str(here / "runs" / "mine" / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    losses = [event.step for event in scalars["loss/object"]]
    assert losses == list(range(1, len(losses) + 1)) and len(scalars["lr/highest"]) == len(losses)
    assert len(scalars["validation/AP50"]) == 2 and scalars["validation/AP50"][-1].step == losses[-1]
    assert scalars["final/AP50"][0].value == pytest.approx(numbers["AP50"], abs=1e-6)
    sheets = events.Images("detections")
    assert [sheet.step for sheet in sheets] == [losses[-1] // 2, losses[-1]]
    (here / "sheet.png").write_bytes(sheets[-1].encoded_image_string)
    pixels = np.asarray(Image.open(here / "sheet.png"))
    assert pixels.shape[1] == 1800 and pixels.std() > 20
    assert any("mine" in str(text) for text in (here / "runs" / "mine" / "tensorboard").rglob("hparams.yml"))


@pytest.mark.slow
def test_mlflow_holds_the_run_under_the_name_of_its_folder(demo, tiny_backbone, here, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{here / 'mlruns'}")
    numbers = finetune_dino2_simple.main(settings_of(finetune_dino2_simple, demo, tiny_backbone, log_with=("mlflow",)))
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0" and run.data.metrics["final/AP50"] == pytest.approx(numbers["AP50"], abs=1e-6)
    assert list((here / "mlruns").rglob("*.png"))


def test_a_missing_package_is_named(demo, tiny_backbone, here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log-with wandb needs its package: pip install wandb"):
        finetune_dino2_simple.main(settings_of(finetune_dino2_simple, demo, tiny_backbone, log_with=("wandb",)))
    assert not (here / "runs" / "mine" / "settings.json").exists()


@pytest.mark.slow
def test_nothing_is_imported_without_the_flag():
    packages = ("tensorboard", "mlflow", "wandb", "matplotlib")
    code = f"import sys, finetune_dino2_simple; print([name for name in {packages} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
