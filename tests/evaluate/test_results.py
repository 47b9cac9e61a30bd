"""`comprehensive_validation.py` on files of detections, and reading results that were edited or are incomplete."""

import json
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import ROOT, random_detections, record_of, results_of, truth_as_detections

import comprehensive_validation
import validate_models
from common.console import InputError
from common.evaluate.detections import coco_detections, detection_table, relative_files
from common.evaluate.results import (
    Bin,
    Calibration,
    Cost,
    DataDescription,
    DetectionNumbers,
    Diagnosis,
    ErrorKind,
    OperatingPoint,
    PrimaryNumbers,
    ValidationRecord,
    ValidationResults,
    read_results,
    write_results,
)
from common.model import checkpoint, trained
from common.model.checkpoint import Checkpoint, save_detector


@pytest.fixture
def settings(demo, demo_val, tmp_path, monkeypatch):
    """The settings that evaluate the detections of two models on the demo's validation images."""
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    found = {"a": random_detections(demo_val, 0), "b": random_detections(demo_val, 1)}
    files = [write_rows(tmp_path / name, detections, demo_val) for name, detections in found.items()]
    output = str(tmp_path / "out" / "r.json")
    return comprehensive_validation.Settings(
        data=str(demo), val_images=0, workers=0, from_detections=tuple(files), output=output
    )


def write_rows(path, found, data, unit=1):
    """The detections as a file of that name."""
    rows = coco_detections(detection_table(found, data), data, relative_files(data))
    rows = [row | {"bbox": [value / unit for value in row["bbox"]]} for row in rows]
    path.with_suffix(".json").write_text(json.dumps(rows))
    return str(path.with_suffix(".json"))


def numbers(results):
    return [record.detection.AP for record in results.models]


def test_written_detections_give_the_same_numbers(settings, tmp_path, capsys):
    results = comprehensive_validation.main(settings)
    assert "a verdict needs 20 images with objects, and these are 6" in capsys.readouterr().out
    written = tuple(str(tmp_path / "out" / record.detections) for record in results.models)
    again = comprehensive_validation.main(replace(settings, from_detections=written, output=str(tmp_path / "2.json")))
    assert numbers(again) == numbers(results) == numbers(read_results(settings.output))


def test_models_that_fail_keep_the_numbers_of_the_others(settings, tmp_path, monkeypatch):
    """Damaged files, a file for a model, a fault of the program, and no model at all."""
    (tmp_path / "c.json").write_bytes(bytes(range(256)) * 200)
    (tmp_path / "empty.pt").touch()
    models = (str(tmp_path), str(tmp_path / "empty.pt"), str(tmp_path / "a.json"))
    files = (*settings.from_detections[1:], str(tmp_path / "c.json"))
    comprehensive_validation.main(replace(settings, models=models, from_detections=files))
    *failed, good, broken = read_results(settings.output).models
    assert good.detection.AP > 0
    for record in (*failed, broken):
        assert record.error and "\n" not in record.error and len(record.error) <= 400
    with pytest.raises(InputError, match="no model could be evaluated"):
        comprehensive_validation.main(replace(settings, from_detections=(str(tmp_path / "c.json"),)))

    def evaluate(name, *arguments):
        return 1 / 0 if name == "b" else original(name, *arguments)

    original = comprehensive_validation.evaluate
    monkeypatch.setattr(comprehensive_validation, "evaluate", evaluate)
    a, b = comprehensive_validation.main(settings).models
    assert a.detection.AP > 0 and b.error == "ZeroDivisionError: division by zero"


def test_strict_fails_where_a_model_is_missing_or_misread(settings, demo_val, tmp_path):
    right, misread = (
        write_rows(tmp_path / name, truth_as_detections(demo_val), demo_val, unit)
        for name, unit in (("right", 1), ("misread", 100))
    )
    settings = replace(settings, strict=True, from_detections=(right,))
    comprehensive_validation.main(settings)
    for changed in (replace(settings, models=("missing.pth",)), replace(settings, from_detections=(right, misread))):
        with pytest.raises(SystemExit) as ended:
            comprehensive_validation.main(changed)
        assert ended.value.code == 3
        assert [bool(record.error) for record in read_results(settings.output).models].count(True) == 1


@pytest.mark.parametrize("script", [comprehensive_validation, validate_models])
def test_one_model_is_alive_at_a_time(script, detector, demo, demo_val, tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{name}.pth") for name in "abc"]
    for path in paths:
        save_detector(path, Checkpoint(detector, demo_val.class_names, demo_val.category_ids))
    alive, load = [], checkpoint.load_checkpoint

    def counting(path):
        assert not any(reference() for reference in alive)
        loaded = load(path)
        alive.append(weakref.ref(loaded.detector))
        return loaded

    monkeypatch.setattr(trained, "load_checkpoint", counting)
    monkeypatch.chdir(tmp_path)
    option = {"models" if script is comprehensive_validation else "checkpoints": tuple(paths)}
    script.main(script.Settings(data=str(demo), val_images=0, workers=0, **option))
    assert len(alive) == 3


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
    "another version": (lambda c: c.update(format_version=1), "format version 2, but of 1: run comprehensive_v"),
}


def two_records():
    point, errors = OperatingPoint(0.5, 0.5, 0.5, 0.5), {"class": ErrorKind(0.1, 2)}
    diagnosis = Diagnosis(point, errors, Calibration(0.1, [Bin(0.5, 0.5, 3)]), [[1, 0], [0, 0]])
    conditions = {"lr": float("nan"), "epochs": 3}
    return record_of("a", AP=0.5, diagnosis=diagnosis, intervals={"AP": [0.4, 1], "AP50": None}), record_of(
        "b", conditions=conditions
    )


def test_results_are_read_as_they_were_written(tmp_path):
    written = results_of(*two_records(), class_names=("a",))
    write_results(tmp_path / "r.json", written)
    read = read_results(tmp_path / "r.json")
    assert read.models[0] == written.models[0] and read.dataset == written.dataset
    assert read.models[1].conditions == {"lr": None, "epochs": 3} and read.software["torch"] and read.created


@pytest.mark.parametrize("edit", EDITS)
def test_results_of_another_form_are_refused_with_the_place(tmp_path, edit):
    change, words = EDITS[edit]
    write_results(tmp_path / "r.json", results_of(*two_records(), class_names=("a",)))
    content = json.loads((tmp_path / "r.json").read_text())
    change(content)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, bytes(range(256)), b'{"models": [3], "format_version": 2}'])
def test_other_files_are_no_results(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_results(tmp_path / "r.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_schema_has_the_fields_of_the_dataclasses():
    def names(kind):
        return {field.name for field in fields(kind)}

    schema = json.loads(Path(ROOT, "docs", "validation_results.schema.json").read_text())
    model = schema["$defs"]["model"]["properties"]
    assert names(ValidationResults) | {"format_version"} == set(schema["required"])
    assert names(ValidationRecord) == set(model)
    assert names(DataDescription) == set(schema["properties"]["dataset"]["required"])
    for part, kind in PARTS.items():
        assert names(kind) == set(model[part]["required"])


PARTS = {"detection": DetectionNumbers, "primary": PrimaryNumbers, "cost": Cost, "diagnosis": Diagnosis}
