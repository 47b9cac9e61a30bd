"""The scripts as users run them: the whole chain, an overfit run, their help, bad input, and the notebook."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, TINY
from nbclient import NotebookClient
from PIL import Image
from transformers import Dinov2Backbone, Dinov2Config

import comprehensive_validation
import finetune_dino2_simple
import improved_dino_detector
import plot_results
import validate_models
from common import cli, console
from common.data.transforms import ScaleTransform
from common.evaluate.results import read_results
from common.model.checkpoint import load_checkpoint
from common.show import charts
from common.types import InputSize

pytestmark = pytest.mark.slow
MODULES = {
    "simple": finetune_dino2_simple,
    "improved": improved_dino_detector,
    "check": validate_models,
    "validation": comprehensive_validation,
    "plot": plot_results,
}
PRIMARY = ("accuracy", "precision", "recall", "f1", "mean_iou", "found")
CHECKPOINTS = ("dino2_detector.pth", "improved_dino2_detector.pth")
CHAIN = """
simple --data {demo} --backbone {tiny} --image-size 112 --blocks 2 -1 --batch-size 4 --workers 0 --epochs 2
    --val-every 2
improved --data {demo} --backbone {tiny} --image-size 112 --blocks 2 -1 --batch-size 4 --workers 0 --epochs-frozen 2
    --epochs-unfrozen 1
check --data {demo} --workers 0 --draw 3 --min-score 0.01
validation --data {demo} --workers 0 --report r.html --models dino2_detector.pth improved_dino2_detector.pth missing.pth
    no<b>model.pt
plot
"""


def lines_of(table):
    """Its lines; one that is indented goes on with the former."""
    return re.sub(r"\n +", " ", table).strip().splitlines()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, demo, tiny_backbone) -> Path:
    """A folder in which the five scripts have run one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DETECTION_CACHE", str(folder / "cache"))
        patch.setattr(console, "raise_on_signals", lambda: None)  # for the tests that follow
        for line in lines_of(CHAIN):
            name, *flags = line.format(demo=demo, tiny=tiny_backbone).split()
            AcceleratorState._reset_state(reset_partial_state=True)
            patch.setattr(sys, "argv", [MODULES[name].__file__, *flags])
            runpy.run_path(MODULES[name].__file__, run_name="__main__")
    return folder


@pytest.mark.parametrize(("name", "checkpoint"), [("simple", CHECKPOINTS[0]), ("improved", CHECKPOINTS[1])])
def test_files_of_a_training_run(name, checkpoint, chain):
    folder = chain / "runs" / name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = ["only", "only"] if name == "simple" else ["frozen", "frozen", "unfrozen"]
    assert [line["stage"] for line in lines] == stages
    assert (set(PRIMARY) <= lines[1]["val"].keys()) == (name == "simple")  # which is validated after its second epoch
    assert [line["epoch"] for line in lines] == list(range(1, len(stages) + 1))
    assert {"object", "class", "box"} <= lines[0]["loss"].keys()
    assert json.loads((folder / "settings.json").read_text())["image_size"] == 112
    last, final = load_checkpoint(folder / "last.pth"), load_checkpoint(chain / checkpoint)
    assert last.epoch == final.epoch == len(lines) and last.metrics == final.metrics
    assert final.category_ids == (1, 2, 3, 5, 8, 10, 11, 12, 20, 33) and final.train_config["train_images_used"] == 12
    assert final.train_config["precision"] in ("fp32", "bf16")  # the precision that auto selected
    if name == "improved":
        before, after = load_checkpoint(folder / "frozen.pth").detector.state_dict(), last.detector.state_dict()
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert still == ["backbone.vit.embeddings.mask_token"]  # stage 2 trains all that the features depend on


def test_results_have_their_documented_form_and_agree_with_the_training(chain, monkeypatch):
    monkeypatch.chdir(chain)
    content = json.loads(Path("validation_results.json").read_text())
    schema = json.loads((ROOT / "docs" / "validation_results.schema.json").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"models": [content["models"][0] | {"primary": {"accuracy": 50}}]}, schema)
    simple, improved, *failed = read_results("validation_results.json").models
    assert all(record.error and record.detection is None for record in failed) and len(failed) == 2
    for name, record, epochs in zip(CHECKPOINTS, (simple, improved), (2, 3), strict=True):
        trained = load_checkpoint(name).metrics
        assert vars(record.primary) == pytest.approx({key: trained[key] for key in PRIMARY})
        assert pytest.approx(trained["AP50"]) == record.detection.AP50
        assert len(charts.read_log(record)) == epochs  # of which the training curves are drawn
    assert simple.conditions["seed"] == 0 and improved.conditions["head"] == "pyramid"


def test_images_charts_and_a_report_that_needs_no_other_file_are_drawn(chain):
    assert len(list((chain / "predictions" / "dino2_detector").glob("*.jpg"))) == 3
    for path in [chain / "predictions" / "contact_sheet.jpg", chain / "model_comparison_charts.png"]:
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 50
    text = (chain / "r.html").read_text()
    assert text.count("<img") == text.count('src="data:image/') > 10
    assert "http" not in text and "no&lt;b&gt;model" in text and "<b>" not in text
    assert "too few images" in text and "95%" in text  # six, of which no model is called the better one


def test_own_images_need_no_ground_truth(chain, demo, tmp_path):
    images = (str(demo / "val2017" / "000001.jpg"), str(demo / "train2017"))
    options = {"images": images, "workers": 0, "output": str(tmp_path)}
    validate_models.main(validate_models.Settings(checkpoints=(str(chain / CHECKPOINTS[0]),), **options))
    assert len(list((tmp_path / "dino2_detector").glob("*.jpg"))) == 13
    found = json.loads((tmp_path / "dino2_detector" / "detections.json").read_text())
    assert {d["image_id"] for d in found} <= set(range(1, 14)) and Path(found[0]["file_name"]).is_file()
    assert found[0].keys() == {"image_id", "category_id", "bbox", "score", "file_name", "category_name"}


OVERFIT = {
    "simple": {"epochs": 150, "lr": 2e-3, "backbone_lr": 1e-3},
    "improved": {
        "epochs_frozen": 0,
        "epochs_unfrozen": 120,
        "dropout": 0.0,
        "lr_unfrozen": 1e-3,
        "head_lr_factor": 2.0,
    },
}


@pytest.mark.parametrize("script", OVERFIT)
def test_a_detector_overfits_four_images(script, demo, tmp_path, monkeypatch):
    """From random weights, without augmentation: the whole of assignment, loss, decoding, post-processing, metrics."""
    module = MODULES[script]
    monkeypatch.setattr(module, "TrainTransform", lambda size, *_, **_options: ScaleTransform(InputSize(size, 14)))
    torch.manual_seed(0)
    shape = TINY | {"hidden_size": 96, "num_hidden_layers": 3, "image_size": 140}
    Dinov2Backbone(Dinov2Config(**shape, patch_size=14)).save_pretrained(tmp_path / "vit")
    shutil.copytree(demo / "train2017", tmp_path / "val")
    annotations = str(demo / "annotations" / "instances_train2017.json")
    data = {"train_json": annotations, "val_json": annotations, "sample_seed": -1, "train_images": 4, "val_images": 4}
    data |= {"train_images_dir": str(demo / "train2017"), "val_images_dir": str(tmp_path / "val"), "workers": 0}
    sizes = {"backbone": (str(tmp_path / "vit"),), "blocks": (-1,), "image_size": 140, "batch_size": 4}
    paths = {"output": str(tmp_path / "out.pth"), "run_dir": str(tmp_path / "run")}
    assert module.main(module.Settings(**data, **sizes, **paths, **OVERFIT[script]))["AP50"] >= 0.9


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_help_names_the_defaults(module, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(module.Settings, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "default:" in text and "--output" in text


BAD = """
simple | --data no/such/folder | --data no/such/folder (no such folder) is in none of the forms demo,
improved | --data {bad}/empty | empty (empty) is in none of the forms demo,
simple | --data {long} | File name too long
simple | --data detection-datasets/coco --backbone {tiny} |
    cannot fetch the hub data set detection-datasets/coco: HF_HUB_OFFLINE is set; give a folder or demo
simple | {train} --val-json {bad}/other.json --val-images-dir {bad} |
    other.json as JSON in COCO's instances form: it lacks 'categories'
improved | {train} --val-json {bad}/text.json --val-images-dir {bad} |
    text.json as JSON in COCO's instances form: Expecting value
improved | {train} --val-json {bad}/animals.json {val_images} | animals.json have no class in common: disc
simple | --train-json {bad}/small.json {train_images} {val} --backbone {tiny} --blocks 2 4 |
    training objects are smaller than 2 pixels at --image-size 448 and cannot be learned
simple | --train-json {bad}/none.json {train_images} {val} | none.json: of its 0 boxes none is an object
simple | {train} --val-json {bad}/nothing.json {val_images} --strict | refused by --strict
simple | --colour red | unrecognized arguments: --colour red (--help explains every flag)
check | --batch-size many | argument --batch-size: invalid int value: 'many'
improved | --batch-size 0 | argument --batch-size: 0 is below 1
validation | --batch-size -1 | argument --batch-size: -1 is below 1
simple | --seed 4294967296 | argument --seed: 4294967296 is above 4294967295
improved | --dropout 1.5 | argument --dropout: 1.5 is above 1
simple | --precision fp16 --data {demo} | --precision fp16 needs a GPU; take bf16, fp32 or auto
simple | --lora 4 --freeze-backbone | the backbone, which --freeze-backbone leaves as it is
improved | --lora 4 --unfreeze-blocks 1 | give it without --unfreeze-blocks
improved | --start-from a.pth --head linear | give it without --head
improved | --start-from a.pth --image-size 224 | give it without --image-size
improved | --scales 2.0 1.0 | --scales
improved | --epochs-frozen 0 --epochs-unfrozen 0 | no stage to train: give --epochs-frozen or --epochs-unfrozen
improved | --stop-after frozen --epochs-frozen 0 | no stage to train: give --epochs-frozen or --epochs-unfrozen
improved | --image-size 100 --blocks 2 4 {tiny_run} | image size 100 is not a multiple of 14; take 98 or 112
simple | --backbone {bad}/empty --data {demo} | empty is no backbone: it has no readable config.json
improved | --backbone facebook/dinov2-small --data {demo} |
    backbone facebook/dinov2-small is not in the cache: HF_HUB_OFFLINE is set
improved | --start-from {bad}/absent.pth --data {demo} | absent.pth: no such checkpoint; train one with
improved | --start-from {pth} --data {demo} --unfreeze-blocks 13 |
    --unfreeze-blocks: the detector uses only 4 blocks of the backbone
improved | --start-from {pth} --data {demo} --crop-size 100 | crop size 100 is not a multiple of 14; take 98 or 112
simple | --run-dir {bad}/other.json {tiny_run} | other.json/settings.json: File exists
improved | --output {bad}/other.json/a.pth {tiny_run} | other.json/a.pth: File exists
simple | --output {bad} {tiny_run} | : it is a folder
check | --data {demo} --checkpoints {bad}/other.pth | other.pth: damaged, or not a detector's checkpoint
check | --checkpoints {pth} --images {bad}/absent.jpg | absent.jpg
check | --checkpoints {pth} --data {demo} --output {bad}/other.json/a | other.json/a/contact_sheet.jpg: Not a directory
validation | --models {pth} --data no/such/folder | --data no/such/folder (no such folder) is in none of the forms demo,
validation | --data {demo} --models {bad}/other.pth | no model could be evaluated:
validation | --data {demo} --models {bad}/a.pth {bad}/a.pth | a model is given twice:
validation | --models {pth} --data {demo} --output {bad}/other.json/a.json | other.json/a.json: File exists
validation | --models {pth} --data {demo} --output r.txt | r.txt: results are JSON; give a name that ends in .json
plot | --results {bad}/absent.json | absent.json: No such file or directory; comprehensive_validation.py writes it
plot | --results {bad}/other.json | other.json is not a file of validation results of format version 2
plot | --results {json} --output {bad}/chart.pdf | chart.pdf: charts are PNG files; give a name that ends in .png
plot | --results {json} --output {bad}/other.json/a.png | other.json/a.png: File exists
"""


@pytest.fixture(scope="module")
def bad(demo, tmp_path_factory) -> Path:
    """Files with which no script can do anything."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    torch.save({"weights": torch.zeros(3)}, folder / "other.pth")
    train, val = (json.loads((demo / f"annotations/instances_{p}2017.json").read_text()) for p in ("train", "val"))
    small = [a | {"bbox": [*a["bbox"][:2], 0.5, 9], "area": 4.5} for a in train["annotations"]]
    animals = [c | {"name": f"animal {c['id']}"} for c in val["categories"]]
    contents = {"none": train | {"annotations": []}, "nothing": val | {"annotations": []}, "other": {"hello": "world"}}
    contents |= {"small": train | {"annotations": small}, "animals": val | {"categories": animals}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "text.json").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def words(chain, bad, demo, tiny_backbone):
    """What stands for the words in brackets."""
    words = {"demo": demo, "bad": bad, "tiny": tiny_backbone, "long": "a" * 5000, "pth": chain / CHECKPOINTS[0]}
    words |= {"json": chain / "validation_results.json", "tiny_run": f"--data {demo} --backbone {tiny_backbone}"}
    for part in ("train", "val"):
        words[f"{part}_images"] = f"--{part}-images-dir {demo}/{part}2017"
        words[part] = f"--{part}-json {demo}/annotations/instances_{part}2017.json {words[f'{part}_images']}"
    return words


@pytest.mark.parametrize("line", lines_of(BAD), ids=lambda line: line[:70])
def test_bad_input_ends_in_one_line_and_status_2(line, words, tmp_path, monkeypatch, capfd):
    script, flags, message = line.split(" | ")
    module = MODULES[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module.__file__, *flags.format(**words).split()])
    with pytest.raises(SystemExit) as ended:
        cli.run(module.main, module.Settings, module.__doc__)
    *above, line = capfd.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and not above
    assert line.startswith(f"{module.__name__}.py: error: ") and message.strip() in line
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".json", ".pth")]


ENVIRONMENTS = {  # a variable: the flags, and the line; the address of a socket in TMPDIR has at most 108 letters
    "HF_HUB_OFFLINE=1": ("--data no/such/folder", "--data no/such/folder"),
    "WORLD_SIZE=2": ("", "RANK, LOCAL_RANK or WORLD_SIZE is set"),
    "TMPDIR={long}": (
        "--backbone {tiny} --data {demo} --image-size 56 --blocks 2 4",
        "a process that decodes images was",
    ),
}


@pytest.mark.parametrize("variable", ENVIRONMENTS)
def test_a_process_of_its_own_ends_in_one_line_and_imports_no_trackers(variable, demo, tiny_backbone, tmp_path):
    flags, message = ENVIRONMENTS[variable]
    command = [sys.executable, "-X", "importtime", str(ROOT / "finetune_dino2_simple.py")]
    command += flags.format(tiny=tiny_backbone, demo=demo).split()
    (tmp_path / ("t" * 120)).mkdir()
    environment = os.environ | dict([variable.format(long=tmp_path / ("t" * 120)).split("=")])
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = [text for text in result.stderr.splitlines() if not text.startswith("import time:")]
    assert result.returncode == 2 and line.startswith(f"finetune_dino2_simple.py: error: {message}")
    imported = {text.rpartition("|")[2].strip() for text in result.stderr.splitlines()}
    assert "torch" in imported and not imported & {"tensorboard", "mlflow", "wandb", "matplotlib"}


NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SMALL = """DATA, BACKBONE, FOLDER = {demo!r}, ({backbone!r},), {folder!r}
IMAGE_SIZE, EPOCHS_FROZEN, EPOCHS_UNFROZEN = 112, 2, 1"""


def test_the_notebook_is_stored_without_outputs_and_runs_in_a_kernel(demo, tmp_path, monkeypatch):
    """With its settings replaced by those of a small detector, started in its own folder."""
    vit, run = tmp_path / "backbone", tmp_path / "run"
    Dinov2Backbone(Dinov2Config(**TINY | {"num_hidden_layers": 6}, patch_size=14)).save_pretrained(vit)
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert cells[0].source.startswith('DATA = "demo"')
    cells[0].source = SMALL.format(demo=str(demo), backbone=str(vit), folder=str(run))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [out.data for cell in cells for out in cell.outputs if out.output_type == "display_data"]
    assert len([data for data in shown if "image/png" in data or "image/jpeg" in data]) == 2
    assert (run / "detector.pth").is_file() and (run / "charts.png").is_file()
