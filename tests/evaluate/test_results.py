"""`comprehensive_validation.py` on files of detections, and reading results that were edited or are incomplete."""

import json
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import ROOT, random_detections, results_of, truth_as_detections

import comprehensive_validation
import validate_models
from common.console import InputError
from common.evaluate import results as kinds
from common.evaluate.detections import coco_detections, detection_table, relative_files
from common.evaluate.results import read_results, write_results
from common.model import checkpoint, trained
from common.model.checkpoint import Checkpoint, save_detector
from comprehensive_validation import Settings, main


@pytest.fixture
def settings(demo, demo_val, tmp_path, monkeypatch):
    """The settings that evaluate the detections of two models on the demo's validation images."""
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.json", "b.json")):
        write_rows(name, random_detections(demo_val, seed), demo_val)
    return Settings(data=str(demo), val_images=0, workers=0, from_detections=("a.json", "b.json"), output="out/r.json")


def write_rows(name, found, data, unit=1):
    """The detections as a file of that name."""
    rows = coco_detections(detection_table(found, data), data, relative_files(data))
    Path(name).write_text(json.dumps([row | {"bbox": [value / unit for value in row["bbox"]]} for row in rows]))


def test_written_detections_give_the_same_numbers(settings, capsys):
    results = main(settings)
    assert "a verdict needs 20 images with objects, and these are 6" in capsys.readouterr().out
    written = tuple(f"out/{record.detections}" for record in results.models)
    again = main(replace(settings, from_detections=written, output="2.json"))
    for one, other, read in zip(results.models, again.models, read_results(settings.output).models, strict=True):
        assert one.name == other.name and one.intervals == other.intervals
        assert (one.detection, one.primary) == (other.detection, other.primary) == (read.detection, read.primary)


def test_models_that_fail_keep_the_numbers_of_the_others(settings, tmp_path, monkeypatch):
    """Damaged files, boxes without numbers, a file for a model, a fault of the program, and no model at all."""
    Path("c.json").write_bytes(bytes(range(256)) * 200)
    Path("masks.json").write_text(json.dumps([{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": []}] * 5))
    Path("empty.pt").touch()
    models = (str(tmp_path), "empty.pt", "a.json")
    main(replace(settings, models=models, from_detections=("b.json", "c.json", "masks.json")))
    *failed, good, broken, masks = read_results(settings.output).models
    assert good.detection.AP > 0 and "bbox must be x, y, width, height" in masks.error
    for record in (*failed, broken, masks):
        assert record.error and "\n" not in record.error and len(record.error) <= 400
    with pytest.raises(InputError, match="no model could be evaluated"):
        main(replace(settings, from_detections=("c.json",)))

    def evaluate(name, *arguments):
        return 1 / 0 if name == "b" else original(name, *arguments)

    original = comprehensive_validation.evaluate
    monkeypatch.setattr(comprehensive_validation, "evaluate", evaluate)
    a, b = main(settings).models
    assert a.detection.AP > 0 and b.error == "ZeroDivisionError: division by zero"


def test_strict_fails_where_a_model_is_missing_or_misread(settings, demo_val):
    for name, unit in (("right.json", 1), ("misread.json", 100)):
        write_rows(name, truth_as_detections(demo_val), demo_val, unit)
    settings = replace(settings, strict=True, from_detections=("right.json",))
    main(settings)
    for change in ({"models": ("missing.pth",)}, {"from_detections": ("right.json", "misread.json")}):
        with pytest.raises(SystemExit) as ended:
            main(replace(settings, **change))
        assert ended.value.code == 3
        assert [bool(record.error) for record in read_results(settings.output).models].count(True) == 1


@pytest.mark.parametrize("script", [comprehensive_validation, validate_models])
def test_one_model_is_alive_at_a_time_and_its_warnings_are_printed(
    script, detector, demo, demo_val, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = ("a.pth", "b.pth", "c.pth")
    for path in paths:
        save_detector(path, Checkpoint(detector, (*demo_val.class_names[:9], "y"), demo_val.category_ids))
    alive, load = [], checkpoint.load_checkpoint

    def counting(path):
        assert not any(reference() for reference in alive)
        loaded = load(path)
        alive.append(weakref.ref(loaded.detector))
        return loaded

    monkeypatch.setattr(trained, "load_checkpoint", counting)
    option = {"models" if script is comprehensive_validation else "checkpoints": paths}
    script.main(script.Settings(data=str(demo), val_images=0, workers=0, **option))
    printed = capsys.readouterr()
    assert len(alive) == (printed.out + printed.err).count("the model lacks 1 of the 10 classes") == 3


@pytest.mark.parametrize("script", [comprehensive_validation, validate_models])
def test_several_processes_are_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        script.main(script.Settings())


EDITS = {  # a change of the file, and words of the refusal
    "text for a number": (lambda c: c["models"][0]["detection"].update(AP="0.5"), "0: detection: AP must be float"),
    "no number": (lambda c: c["models"][0]["primary"].pop("f1"), "models: 0: primary: .* missing .*'f1'"),
    "a list for errors": (lambda c: c["models"][0]["diagnosis"].update(errors=[]), "diagnosis: errors must be dict"),
    "null for a name": (lambda c: c["models"][1].update(name=None), "models: 1: name must be str, not None"),
    "a huge number": (lambda c: c["models"][0]["intervals"].update(AP=[0, 10**400]), "intervals: AP: 1 must be float"),
    "a number for a model": (lambda c: c.update(models=[3]), "models: 0 must be ValidationRecord, not 3"),
    "another version": (lambda c: c.update(format_version=1), "format version 2, but of 1: run comprehensive_v"),
}


def test_results_are_read_as_they_were_written(results_file, tmp_path):
    first, *_ = read_results(results_file).models
    written = results_of(replace(first, conditions={"lr": float("nan"), "epochs": 3}))
    write_results(tmp_path / "r.json", written)
    read = read_results(tmp_path / "r.json")
    assert read.models == [replace(first, conditions={"lr": None, "epochs": 3})]
    assert read.dataset == written.dataset and read.software["torch"] and read.created


@pytest.mark.parametrize(("change", "words"), EDITS.values(), ids=EDITS)
def test_results_of_another_form_are_refused_with_the_place(results_file, tmp_path, change, words):
    content = json.loads(results_file.read_text())
    change(content)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_results(tmp_path / "r.json")


def test_the_schema_has_the_fields_of_the_dataclasses():
    schema = json.loads(Path(ROOT, "docs", "validation_results.schema.json").read_text())
    model = schema["$defs"]["model"]["properties"]
    names = {"ValidationResults": {*schema["required"]} - {"format_version"}, "ValidationRecord": model}
    names |= {"DataDescription": schema["properties"]["dataset"]["required"], "Cost": model["cost"]["required"]}
    names |= {"DetectionNumbers": model["detection"]["required"], "PrimaryNumbers": model["primary"]["required"]}
    for kind, required in (names | {"Diagnosis": model["diagnosis"]["required"]}).items():
        assert {field.name for field in fields(getattr(kinds, kind))} == {*required}
