"""The scripts as users run them: the whole chain, an overfit run, their help, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers import ROOT, TINY
from PIL import Image
from transformers import Dinov2Backbone, Dinov2Config

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
SCRIPTS = finetune_dino2_simple, improved_dino_detector, validate_models, comprehensive_validation, plot_results
MODULES = {module.__name__: module for module in SCRIPTS}
SIMPLE, IMPROVED, QUICK_CHECK, VALIDATION, PLOT = MODULES
PRIMARY = ("accuracy", "precision", "recall", "f1", "mean_iou", "found")
CHECKPOINTS = ("dino2_detector.pth", "improved_dino2_detector.pth")


def run(script, *flags, cwd):
    environment = os.environ | {"COLUMNS": "100", "DETECTION_CACHE": str(Path(cwd, "cache"))}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, demo, tiny_backbone) -> Path:
    """A folder in which the five scripts have run one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    sizes = ("--image-size", 112, "--blocks", 2, -1, "--batch-size", 4, "--workers", 0)
    training = ("--data", demo, "--backbone", tiny_backbone, *sizes)
    models = (*CHECKPOINTS, "missing.pth", "no<b>model.pt")
    done = [
        run(SIMPLE, *training, "--epochs", 2, cwd=folder),
        run(IMPROVED, *training, "--epochs-frozen", 2, "--epochs-unfrozen", 1, cwd=folder),
        run(QUICK_CHECK, "--data", demo, "--workers", 0, "--draw", 3, "--min-score", 0.01, cwd=folder),
        run(VALIDATION, "--data", demo, "--workers", 0, "--report", "r.html", "--models", *models, cwd=folder),
        run(PLOT, cwd=folder),
    ]
    for result in done:
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("name", "checkpoint"), zip(("simple", "improved"), CHECKPOINTS, strict=True))
def test_files_of_a_training_run(name, checkpoint, chain):
    folder = chain / "runs" / name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = ["only", "only"] if name == "simple" else ["frozen", "frozen", "unfrozen"]
    assert [line["stage"] for line in lines] == stages and set(PRIMARY) <= lines[0]["val"].keys()
    assert [line["epoch"] for line in lines] == list(range(1, len(stages) + 1))
    assert {"object", "class", "box"} <= lines[0]["loss"].keys()
    assert json.loads((folder / "settings.json").read_text())["image_size"] == 112
    last, final = load_checkpoint(folder / "last.pth"), load_checkpoint(chain / checkpoint)
    scores = [line["val"]["AP50"] for line in lines]
    assert last.epoch == len(lines)
    assert final.epoch == max(epoch for epoch, score in enumerate(scores, 1) if score == max(scores))
    assert final.category_ids == (1, 2, 3, 5, 8, 10, 11, 12, 20, 33) and final.train_config["train_images_used"] == 12
    assert final.train_config["precision"] in ("fp32", "bf16")  # the precision that auto selected
    if name == "improved":
        before, after = load_checkpoint(folder / "frozen.pth").detector.state_dict(), last.detector.state_dict()
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert still == ["backbone.vit.embeddings.mask_token"]  # stage 2 trains all that the features depend on


def test_results_have_their_documented_form_and_agree_with_the_training(chain):
    content = json.loads((chain / "validation_results.json").read_text())
    schema = json.loads((ROOT / "docs" / "validation_results.schema.json").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"models": [content["models"][0] | {"primary": {"accuracy": 50}}]}, schema)
    simple, improved, *failed = read_results(chain / "validation_results.json").models
    assert all(record.error and record.detection is None for record in failed) and len(failed) == 2
    for name, record in zip(CHECKPOINTS, (simple, improved), strict=True):
        trained = load_checkpoint(chain / name).metrics
        assert vars(record.primary) == pytest.approx({key: trained[key] for key in PRIMARY})
        assert pytest.approx(trained["AP50"]) == record.detection.AP50
    assert simple.conditions["seed"] == 0 and improved.conditions["head"] == "pyramid"


def test_the_report_needs_no_other_file(chain):
    text = (chain / "r.html").read_text()
    assert text.count("<img") == text.count('src="data:image/') > 10
    assert "http" not in text and "no&lt;b&gt;model" in text and "<b>" not in text
    assert "too few images" in text and "95%" in text  # six, of which no model is called the better one


def test_images_are_drawn(chain):
    assert len(list((chain / "predictions" / "dino2_detector").glob("*.jpg"))) == 3
    for path in [chain / "predictions" / "contact_sheet.jpg", chain / "model_comparison_charts.png"]:
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 50


@pytest.mark.parametrize("checkpoint", ["runs/improved/frozen.pth", "dino2_detector.pth"])
def test_stage_2_starts_from_any_checkpoint(chain, demo, tmp_path, checkpoint):
    """At learning rate 0 the weights stay those that it started from."""
    paths = {"output": str(tmp_path / "out.pth"), "run_dir": str(tmp_path / "run")}
    rates = {"epochs_frozen": 0, "epochs_unfrozen": 1, "lr_unfrozen": 0.0, "workers": 0}
    start = str(chain / checkpoint)
    improved_dino_detector.main(improved_dino_detector.Settings(str(demo), start_from=start, **rates, **paths))
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "out.pth")
    weights = after.detector.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in before.detector.state_dict().items())
    assert after.detector.config == before.detector.config
    assert after.train_config["started_from"] == start and after.train_config["crop_size"] == 112  # 448, but no larger


def test_own_images_need_no_ground_truth(chain, demo, tmp_path):
    images = (str(demo / "val2017" / "000001.jpg"), str(demo / "train2017"))
    options = {"images": images, "workers": 0, "output": str(tmp_path)}
    validate_models.main(validate_models.Settings(checkpoints=(str(chain / CHECKPOINTS[0]),), **options))
    assert len(list((tmp_path / "dino2_detector").glob("*.jpg"))) == 13
    found = json.loads((tmp_path / "dino2_detector" / "detections.json").read_text())
    assert {d["image_id"] for d in found} <= set(range(1, 14)) and Path(found[0]["file_name"]).is_file()
    assert found[0].keys() == {"image_id", "category_id", "bbox", "score", "file_name", "category_name"}


OVERFIT = {
    SIMPLE: {"epochs": 150, "lr": 2e-3, "backbone_lr": 1e-3},
    IMPROVED: {"epochs_frozen": 0, "epochs_unfrozen": 100, "dropout": 0.0, "lr_unfrozen": 1e-3, "head_lr_factor": 2.0},
}


@pytest.mark.parametrize("script", OVERFIT)
def test_a_detector_overfits_four_images(script, demo, tmp_path, monkeypatch):
    """From random weights, without augmentation: the whole of assignment, loss, decoding, post-processing, metrics."""
    monkeypatch.setattr(f"{script}.TrainTransform", lambda size, *_, **_options: LetterboxTransform(size))
    torch.manual_seed(0)
    shape = TINY | {"hidden_size": 96, "num_hidden_layers": 3, "image_size": 140}
    Dinov2Backbone(Dinov2Config(**shape, patch_size=14)).save_pretrained(tmp_path / "vit")
    shutil.copytree(demo / "train2017", tmp_path / "val")
    annotations = str(demo / "annotations" / "instances_train2017.json")
    settings = MODULES[script].Settings(
        train_json=annotations,
        val_json=annotations,
        train_images_dir=str(demo / "train2017"),
        val_images_dir=str(tmp_path / "val"),
        sample_seed=-1,
        train_images=4,
        val_images=4,
        backbone=(str(tmp_path / "vit"),),
        blocks=(-1,),
        image_size=140,
        batch_size=4,
        workers=0,
        output=str(tmp_path / "out.pth"),
        run_dir=str(tmp_path / "run"),
        **OVERFIT[script],
    )
    assert MODULES[script].main(settings)["AP50"] >= 0.9


@pytest.mark.parametrize("script", MODULES)
def test_help_names_the_defaults(script, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(MODULES[script].Settings, MODULES[script].__doc__, ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "default:" in text and "--output" in text


GOOD_TRAIN = "--train-json {demo}/annotations/instances_train2017.json --train-images-dir {demo}/train2017 "
TRAIN = "--data {demo} --backbone {tiny} "
CHECK = "--checkpoints {chain}/dino2_detector.pth "
MODEL = "--models {chain}/dino2_detector.pth "
BAD = [  # a script, its flags, what the line says
    (SIMPLE, "--data no/such/folder", "--data no/such/folder (no such folder) is in none of the forms demo,"),
    (IMPROVED, "--data {bad}/empty", "empty (empty) is in none of the forms demo,"),
    (SIMPLE, "--data " + "a" * 5000, "File name too long"),
    (
        SIMPLE,
        "--data detection-datasets/coco",
        "cannot fetch the hub data set detection-datasets/coco: give a folder or demo",
    ),
    (
        SIMPLE,
        GOOD_TRAIN + "--val-json {bad}/other.json --val-images-dir {bad}",
        "other.json as COCO's instances form: it lacks 'categories'",
    ),
    (IMPROVED, GOOD_TRAIN + "--val-json {bad}/text.json --val-images-dir {bad}", "text.json as JSON: Expecting value"),
    (
        IMPROVED,
        GOOD_TRAIN + "--val-json {bad}/animals.json --val-images-dir {demo}/val2017",
        "animals.json have no class in common: disc",
    ),
    (
        SIMPLE,
        "--train-json {bad}/small.json --train-images-dir {demo}/train2017 --backbone {tiny} --blocks 2 4 "
        "--val-json {demo}/annotations/instances_val2017.json --val-images-dir {demo}/val2017",
        "training objects are smaller than 2 pixels at --image-size 448 and cannot be learned",
    ),
    (
        SIMPLE,
        "--train-json {bad}/none.json --train-images-dir {demo}/train2017 --val-json {bad}/none.json "
        "--val-images-dir {demo}/train2017",
        "none.json: of its 0 boxes none is an object",
    ),
    (SIMPLE, "--colour red", "unrecognized arguments: --colour red (--help explains every flag)"),
    (QUICK_CHECK, "--batch-size many", "argument --batch-size: invalid int value: 'many'"),
    (IMPROVED, "--batch-size 0", "argument --batch-size: 0 is below 1"),
    (VALIDATION, "--batch-size -1", "argument --batch-size: -1 is below 1"),
    (SIMPLE, "--seed 4294967296", "argument --seed: 4294967296 is above 4294967295"),
    (IMPROVED, "--dropout 1.5", "argument --dropout: 1.5 is above 1"),
    (SIMPLE, "--precision fp16 --data {demo}", "--precision fp16 needs a GPU; take bf16, fp32 or auto"),
    (IMPROVED, "--image-size 100 " + TRAIN, "image size 100 is not a multiple of 14; take 98 or 112"),
    (SIMPLE, "--backbone {bad}/empty --data {demo}", "empty is no backbone: it has no readable config.json"),
    (
        IMPROVED,
        "--backbone facebook/dinov2-small --data {demo}",
        "backbone facebook/dinov2-small is not in the cache and the hub can't be reached",
    ),
    (
        IMPROVED,
        "--stop-after frozen --epochs-frozen 0",
        "there is no stage to train: give --epochs-frozen or --epochs-unfrozen",
    ),
    (IMPROVED, "--start-from {bad}/absent.pth --data {demo}", "absent.pth: no such checkpoint; train one with"),
    (
        IMPROVED,
        "--start-from {chain}/dino2_detector.pth --data {demo} --unfreeze-blocks 13",
        "--unfreeze-blocks: the detector uses only 4 blocks of the backbone",
    ),
    (
        IMPROVED,
        "--start-from {chain}/dino2_detector.pth --data {demo} --crop-size 100",
        "crop size 100 is not a multiple of 14; take 98 or 112",
    ),
    (SIMPLE, "--run-dir {bad}/other.json " + TRAIN, "other.json/settings.json: File exists"),
    (IMPROVED, "--output {bad}/other.json/a.pth " + TRAIN, "other.json/a.pth: File exists"),
    (SIMPLE, "--output {bad} " + TRAIN, ": it is a folder"),
    (QUICK_CHECK, "--data {demo} --checkpoints {bad}/other.pth", "other.pth: damaged, or not a detector's checkpoint"),
    (QUICK_CHECK, CHECK + "--images {bad}/absent.jpg", "absent.jpg"),
    (
        QUICK_CHECK,
        CHECK + "--data {demo} --output {bad}/other.json/a",
        "other.json/a/contact_sheet.jpg: Not a directory",
    ),
    (
        VALIDATION,
        MODEL + "--data no/such/folder",
        "--data no/such/folder (no such folder) is in none of the forms demo,",
    ),
    (VALIDATION, "--data {demo} --models {bad}/other.pth", "no model could be evaluated: "),
    (VALIDATION, "--data {demo} --models {bad}/a.pth {bad}/a.pth", "a model is given twice: "),
    (VALIDATION, MODEL + "--data {demo} --output {bad}/other.json/a.json", "other.json/a.json: File exists"),
    (
        VALIDATION,
        MODEL + "--data {demo} --output r.txt",
        "--output r.txt: results are JSON; give a name that ends in .json",
    ),
    (
        PLOT,
        "--results {bad}/absent.json",
        "absent.json: No such file or directory; comprehensive_validation.py writes it",
    ),
    (PLOT, "--results {bad}/other.json", "other.json is not a file of validation results of format version 2"),
    (
        PLOT,
        "--results {chain}/validation_results.json --output {bad}/chart.pdf",
        "chart.pdf: charts are PNG files; give a name that ends in .png",
    ),
    (
        PLOT,
        "--results {chain}/validation_results.json --output {bad}/other.json/a.png",
        "other.json/a.png: File exists",
    ),
]


@pytest.fixture(scope="module")
def bad(demo, tmp_path_factory) -> Path:
    """Files with which no script can do anything."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "other.json").write_text('{"hello": "world"}')
    (folder / "text.json").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pth")
    train, val = (json.loads((demo / f"annotations/instances_{p}2017.json").read_text()) for p in ("train", "val"))
    small = [a | {"bbox": [*a["bbox"][:2], 0.5, 9], "area": 4.5} for a in train["annotations"]]
    animals = [c | {"name": f"animal {c['id']}"} for c in val["categories"]]
    contents = {"none": train | {"annotations": []}, "small": train | {"annotations": small}}
    for name, content in (contents | {"animals": val | {"categories": animals}}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("script", "flags", "message"), BAD, ids=[f"{s}: {f:.60}" for s, f, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(
    script, flags, message, chain, bad, demo, tiny_backbone, tmp_path, monkeypatch, capfd
):
    words = flags.format(bad=bad, demo=demo, chain=chain, tiny=tiny_backbone).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *words])
    with pytest.raises(SystemExit) as ended:
        cli.run(MODULES[script].main, MODULES[script].Settings, MODULES[script].__doc__)
    *above, line = capfd.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and not above
    assert line.startswith(f"{script}.py: error: ") and message in line
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".json", ".pth")]


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = run(VALIDATION, "--data", "no/such/folder/here", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no/such/folder/here" in result.stderr


def test_training_curves_are_drawn_where_the_logs_are(chain, monkeypatch):
    monkeypatch.chdir(chain)
    results = read_results("validation_results.json")
    drawn = charts.drawn_models(results)
    assert {record.name for record in drawn if charts.read_log(record)} == {Path(n).stem for n in CHECKPOINTS}
    ap50 = charts.training(drawn, results.dataset).axes[1]
    epochs = [len(line.get_xdata()) for line in ap50.lines if len(line.get_xdata()) > 2]
    assert epochs == [3]
