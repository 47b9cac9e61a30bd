"""The scripts as users run them: the whole chain, an overfit run, their help, and bad input."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers import ROOT
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import comprehensive_validation
import finetune_dino2_simple
import improved_dino_detector
import plot_results
import validate_models
from common import cli
from common.data.transforms import LetterboxTransform
from common.evaluate.results import read_results
from common.model.checkpoint import load_checkpoint
from common.show import charts

pytestmark = pytest.mark.slow
MODULES = (
    finetune_dino2_simple,
    improved_dino_detector,
    validate_models,
    comprehensive_validation,
    plot_results,
)
PRIMARY = ("accuracy", "precision", "recall", "f1", "mean_iou", "found")
SCRIPTS = tuple(f"{module.__name__}.py" for module in MODULES)
SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION, PLOT = SCRIPTS
CHECKPOINTS = ("dino2_detector.pth", "improved_dino2_detector.pth")
STAGES = ("--epochs-frozen", 2, "--epochs-unfrozen", 1)
EVALUATED = (*CHECKPOINTS, "missing.pth", "no<b>model.pt")


def run(script, *flags, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "DETECTION_CACHE": str(Path(cwd, "cache"))}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, demo, tiny_backbone) -> Path:
    """A folder in which the five scripts have run one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    sizes = ("--image-size", 112, "--blocks", 2, -1, "--batch-size", 4, "--workers", 0)
    training = ("--data", demo, "--backbone", tiny_backbone, *sizes)
    done = [
        run(SIMPLE, *training, "--epochs", 2, cwd=folder),
        run(IMPROVED, *training, *STAGES, cwd=folder),
        run(QUICK_CHECK, "--data", demo, "--workers", 0, "--draw", 3, "--min-score", 0.01, cwd=folder),
        run(VALIDATION, "--data", demo, "--workers", 0, "--report", "r.html", "--models", *EVALUATED, cwd=folder),
        run(PLOT, cwd=folder),
    ]
    for result in done:
        assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text("\n".join(result.stdout for result in done))
    return folder


def test_files_of_a_training_run(chain):
    lines = [json.loads(line) for line in (chain / "runs/simple/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["loss"].keys() == {"object", "class", "box"} and set(PRIMARY) <= lines[0]["val"].keys()
    assert json.loads((chain / "runs/simple/settings.json").read_text())["image_size"] == 112
    best, last = (load_checkpoint(chain / "runs/simple" / name) for name in ("best.pth", "last.pth"))
    final = load_checkpoint(chain / "dino2_detector.pth")
    assert last.epoch == 2 and final.epoch == best.epoch
    assert final.category_ids == (1, 2, 3, 5, 8, 10, 11, 12, 20, 33) and final.train_config["train_images_used"] == 12
    scores = [line["val"]["AP50"] for line in lines]
    assert best.metrics["AP50"] == max(scores)
    assert best.epoch == max(epoch for epoch, score in enumerate(scores, 1) if score == max(scores))


def test_results_have_their_documented_form(chain):
    content = json.loads((chain / "validation_results.json").read_text())
    schema = json.loads((ROOT / "docs" / "validation_results.schema.json").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"models": [content["models"][0] | {"primary": {"accuracy": 50}}]}, schema)
    assert content["dataset"]["images"] == 6
    simple, improved, missing, unknown = content["models"]
    assert simple["conditions"]["seed"] == 0 and simple["conditions"]["image_size"] == 112
    (pair,) = content["comparisons"]
    assert (pair["a"], pair["b"]) == (simple["name"], improved["name"])
    assert unknown["error"] and unknown["intervals"] is None
    assert improved["detection"].keys() == simple["detection"].keys() and improved["conditions"]["head"] == "pyramid"
    assert missing["error"] and missing["detection"] is None
    assert "not evaluated" in (chain / "output.txt").read_text()


def test_pycocotools_gets_the_same_numbers_from_the_detections_file(chain, demo):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(demo / "annotations" / "instances_val2017.json"))
        for record in read_results(chain / "validation_results.json").models[:2]:
            reference = COCOeval(truth, truth.loadRes(str(chain / record.detections)), "bbox")
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
            assert reference.stats[1] == pytest.approx(record.detection.AP50, abs=1e-6)


def test_the_report_needs_no_other_file(chain):
    text = (chain / "r.html").read_text()
    assert text.count("<img") == text.count('src="data:image/') > 10
    assert "http" not in text and "no&lt;b&gt;model" in text and "<b>" not in text
    assert "too few images" in text and "95%" in text  # six, of which no model is called the better one


def test_training_and_both_validations_agree(chain):
    for name, record in zip(CHECKPOINTS, read_results(chain / "validation_results.json").models, strict=False):
        trained = load_checkpoint(chain / name).metrics
        assert vars(record.primary) == pytest.approx({key: trained[key] for key in PRIMARY})
        assert pytest.approx(trained["AP50"]) == record.detection.AP50


def test_files_of_a_run_of_two_stages(chain):
    folder = chain / "runs/improved"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [("frozen", 1), ("frozen", 2), ("unfrozen", 3)]
    frozen, last, final = (
        load_checkpoint(path) for path in (folder / "frozen.pth", folder / "last.pth", chain / CHECKPOINTS[1])
    )
    assert last.epoch == 3 and frozen.epoch <= 2
    scores = [line["val"]["AP50"] for line in lines]
    assert final.epoch == max(range(len(scores)), key=lambda epoch: (scores[epoch], epoch)) + 1  # the last of equals
    before, after = frozen.detector.state_dict(), last.detector.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["backbone.vit.embeddings.mask_token"]  # stage 2 trains all that the features depend on
    assert final.train_config["precision"] in ("fp32", "bf16")  # the precision that auto selected


@pytest.mark.parametrize("checkpoint", ["runs/improved/frozen.pth", "dino2_detector.pth"])
def test_stage_2_starts_from_any_checkpoint(chain, demo, tmp_path, checkpoint):
    """At learning rate 0 the weights stay those that it started from."""
    paths = {"output": str(tmp_path / "out.pth"), "run_dir": str(tmp_path / "run")}
    rates = {"epochs_frozen": 0, "epochs_unfrozen": 1, "lr_unfrozen": 0.0, "workers": 0}
    start = str(chain / checkpoint)
    improved_dino_detector.main(improved_dino_detector.Settings(str(demo), start_from=start, **rates, **paths))
    before, after = load_checkpoint(chain / checkpoint), load_checkpoint(tmp_path / "out.pth")
    weights = after.detector.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in before.detector.state_dict().items())
    assert after.detector.config == before.detector.config
    assert after.train_config["started_from"] == str(chain / checkpoint)


def test_images_are_drawn(chain):
    assert len(list((chain / "predictions" / "dino2_detector").glob("*.jpg"))) == 3
    for path in [chain / "predictions" / "contact_sheet.jpg", chain / "model_comparison_charts.png"]:
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 50


def test_own_images_need_no_ground_truth(chain, demo, tmp_path):
    files = [demo / "val2017" / "000001.jpg", demo / "train2017"]
    checkpoint = chain / "dino2_detector.pth"
    flags = ("--checkpoints", checkpoint, "--images", *files, "--workers", 0, "--output", tmp_path)
    assert run(QUICK_CHECK, *flags, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "dino2_detector").glob("*.jpg"))) == 13
    found = json.loads((tmp_path / "dino2_detector" / "detections.json").read_text())
    assert {d["image_id"] for d in found} <= set(range(1, 14)) and Path(found[0]["file_name"]).is_file()
    assert found[0].keys() == {"image_id", "category_id", "bbox", "score", "file_name", "category_name"}


def overfit(script, demo, folder, **options):
    """Train on four scenes, with random weights and no augmentation, and return the numbers on the same four."""
    torch.manual_seed(0)
    from transformers import Dinov2Backbone, Dinov2Config

    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 140}
    Dinov2Backbone(Dinov2Config(**shape, patch_size=14)).save_pretrained(folder / "vit")
    annotations = str(demo / "annotations" / "instances_train2017.json")
    shutil.copytree(demo / "train2017", folder / "val")
    settings = script.Settings(
        **{f"{part}_json": annotations for part in ("train", "val")},
        train_images_dir=str(demo / "train2017"),
        val_images_dir=str(folder / "val"),
        sample_seed=-1,
        train_images=4,
        val_images=4,
        backbone=(str(folder / "vit"),),
        blocks=(-1,),
        image_size=140,
        batch_size=4,
        workers=0,
        output=str(folder / "out.pth"),
        run_dir=str(folder / "run"),
        **options,
    )
    return script.main(settings)


def test_the_simple_detector_overfits_four_images(demo, tmp_path, monkeypatch):
    """End to end from random weights: the whole of assignment, loss, box decoding, post-processing and metrics."""
    monkeypatch.setattr("finetune_dino2_simple.TrainTransform", lambda size, flags: LetterboxTransform(size))
    numbers = overfit(finetune_dino2_simple, demo, tmp_path, epochs=150, lr=2e-3, backbone_lr=1e-3)
    assert numbers["AP50"] >= 0.9


def test_the_improved_detector_overfits_four_images(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("improved_dino_detector.TrainTransform", lambda size, *_: LetterboxTransform(size))
    rates = {"lr_unfrozen": 1e-3, "head_lr_factor": 2.0}
    numbers = overfit(
        improved_dino_detector, demo, tmp_path, epochs_frozen=0, epochs_unfrozen=100, dropout=0.0, **rates
    )
    assert numbers["AP50"] >= 0.9


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_script_and_the_defaults(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert script in result.stdout and "default:" in result.stdout and "--output" in result.stdout


BAD = {
    "wrong path": {"--data": "no/such/folder/here"},
    "empty folder": {"--data": "{tmp}/empty"},
    "json that is not COCO": {"--val-json": "{tmp}/other.json", "--val-images-dir": "{tmp}"},
    "json that is not JSON": {"--val-json": "{tmp}/text.json", "--val-images-dir": "{tmp}"},
    "checkpoint of another kind": {"--checkpoint": "{tmp}/other.pth", "--data": "{demo}"},
    "no checkpoint": {"--checkpoint": "{tmp}/none.pth", "--data": "{demo}"},
    "no such image": {"--checkpoint": "{chain}/dino2_detector.pth", "--images": "{tmp}/none.jpg"},
    "no such flag": {"--colour": "red"},
    "not a number": {"--batch-size": "many"},
    "number too small": {"--batch-size": "0"},
    "number below 0": {"--batch-size": "-1"},
    "wrong image size": {"--image-size": "100", "--data": "{demo}"},
    "wrong backbone": {"--backbone": "{tmp}/empty", "--data": "{demo}"},
    "no hub": {"--backbone": "facebook/dinov2-small", "--data": "{demo}"},
    "no data hub": {"--data": "detection-datasets/coco"},
    "no objects": {
        **{f"--{part}-json": "{tmp}/empty.json" for part in ("train", "val")},
        **{f"--{part}-images-dir": "{demo}/train2017" for part in ("train", "val")},
    },
    "objects too small": {
        **{f"--{part}-json": "{tmp}/small.json" for part in ("train", "val")},
        **{f"--{part}-images-dir": "{demo}/train2017" for part in ("train", "val")},
        "--backbone": "{tiny}",
    },
    "no class in common": {"--val-json": "{tmp}/animals.json", "--val-images-dir": "{demo}/val2017"},
    "nothing to train": {"--stop-after": "frozen", "--epochs-frozen": "0", "--data": "{demo}"},
    "no checkpoint to start from": {"--start-from": "{tmp}/none.pth", "--data": "{demo}"},
    "no results": {"--results": "{tmp}/none.json"},
    "other results": {"--results": "{tmp}/other.json"},
    "output below a file": {"--output": "{tmp}/other.json/a"},
    "run folder is a file": {"--run-dir": "{tmp}/other.json", "--data": "{demo}"},
    "number too large": {"--seed": "4294967296"},
    "share above 1": {"--dropout": "1.5"},
    "name too long": {"--data": "a" * 5000},
    "more blocks than the backbone has": {
        "--unfreeze-blocks": "13",
        "--data": "{demo}",
        "--start-from": "{chain}/dino2_detector.pth",
    },
    "crops that are no multiple of the patch": {
        "--crop-size": "100",
        "--data": "{demo}",
        "--start-from": "{chain}/dino2_detector.pth",
    },
    "the same model twice": {"--models": "{tmp}/a.pth {tmp}/a.pth", "--data": "{demo}"},
    "not a PNG": {"--results": "{chain}/validation_results.json", "--output": "{tmp}/chart.pdf"},
    "output is a folder": {"--output": "{tmp}"},
    "unwritable output": {"--results": "{chain}/validation_results.json", "--output": "{tmp}/other.json/a.png"},
}
CASES = [(s, c) for s in (SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION) for c in list(BAD)[:4]]
CASES += [(s, c) for s in (QUICK_CHECK, VALIDATION) for c in list(BAD)[4:6]]
CASES += [(QUICK_CHECK, "no such image"), (SIMPLE, "output is a folder"), (VALIDATION, "output is a folder")]
CASES += [(s, "output below a file") for s in (SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION)]
CASES += [
    (s, c)
    for s in (SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION)
    for c in ("no such flag", "not a number", "number below 0")
]
CASES += [(s, "number too small") for s in (SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION)]
CASES += [(IMPROVED, c) for c in ("nothing to train", "no checkpoint to start from")]
CASES += [(s, c) for s in (SIMPLE, IMPROVED) for c in ("no objects", "objects too small", "no class in common")]
CASES += [(s, c) for s in (SIMPLE, IMPROVED) for c in ("wrong image size", "wrong backbone", "no hub", "no data hub")]
CASES += [(s, c) for s in (SIMPLE, IMPROVED) for c in ("run folder is a file", "number too large")]
CASES += [(s, "name too long") for s in (SIMPLE, QUICK_CHECK, VALIDATION)]
CASES += [
    (IMPROVED, c)
    for c in ("share above 1", "more blocks than the backbone has", "crops that are no multiple of the patch")
]
CASES += [(VALIDATION, "the same model twice")]
CASES += [(PLOT, c) for c in ("not a PNG", "no such flag", "no results", "other results", "unwritable output")]


@pytest.mark.parametrize(("script", "case"), CASES)
def test_bad_input_ends_in_one_line_and_status_2(
    script, case, chain, demo, tiny_backbone, tmp_path, monkeypatch, capfd
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"hello": "world"}')
    (tmp_path / "text.json").write_text("hello")
    annotated = json.loads((demo / "annotations" / "instances_train2017.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(annotated | {"annotations": []}))
    small = [a | {"bbox": [*a["bbox"][:2], 0.5, 9], "area": 4.5} for a in annotated["annotations"]]
    (tmp_path / "small.json").write_text(json.dumps(annotated | {"annotations": small}))
    animals = [c | {"name": f"animal {c['id']}"} for c in annotated["categories"]]
    truth = json.loads((demo / "annotations" / "instances_val2017.json").read_text())
    (tmp_path / "animals.json").write_text(json.dumps(truth | {"categories": animals}))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    flags = {"--models": chain / "dino2_detector.pth"} if script == VALIDATION else {}
    flags |= {"--checkpoints": chain / "dino2_detector.pth"} if script == QUICK_CHECK else {}
    if (
        script in (SIMPLE, IMPROVED) and "--val-json" in BAD[case]
    ):  # with good training images, so that the bad ones are reached
        flags = {
            "--train-json": "{demo}/annotations/instances_train2017.json",
            "--train-images-dir": "{demo}/train2017",
        }
    bad = dict(BAD[case])
    if "--checkpoint" in bad:
        bad["--models" if script == VALIDATION else "--checkpoints"] = bad.pop("--checkpoint")
    places = {"tmp": tmp_path, "demo": demo, "chain": chain, "tiny": tiny_backbone}
    words = [word for pair in (flags | bad).items() for w in pair for word in str(w).format(**places).split(" ")]
    module = MODULES[SCRIPTS.index(script)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
    with pytest.raises(SystemExit) as ended:
        cli.run(module.main, module.Settings, module.__doc__)
    lines = capfd.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), lines
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "validation_results.json").exists()


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = run(VALIDATION, "--data", "no/such/folder/here", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no/such/folder/here" in result.stderr


def test_training_curves_are_drawn_where_the_logs_are(chain, monkeypatch):
    monkeypatch.chdir(chain)
    results = read_results("validation_results.json")
    drawn = charts.drawn_models(results)
    assert {record.name for record in drawn if charts.read_log(record)} == {Path(n).stem for n in CHECKPOINTS}
    epochs = [len(line.get_xdata()) for line in charts.training(results).axes[1].lines if len(line.get_xdata()) > 2]
    assert epochs == [3]
