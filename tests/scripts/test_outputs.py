"""No script overwrites what it reads, or files of its user, whatever the paths look like."""

import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import comprehensive_validation
import improved_dino_detector
import plot_results
import validate_models
from common import cli
from common.console import InputError, Interrupted, raise_on_signals
from common.evaluate.detect import run_detector
from common.evaluate.evaluation import unique_names
from common.files import check_outputs
from common.model.checkpoint import Checkpoint, save_detector

MODULES = {"check": validate_models, "validation": comprehensive_validation, "plot": plot_results}
MODULES |= {"improved": improved_dino_detector}


@pytest.fixture
def run(own_folder, detector, demo, demo_val):
    """Runs a script by its line, in a folder with a checkpoint, images, objects in val.json, and detections."""
    save_detector("cats.pth", Checkpoint(detector, demo_val.class_names, demo_val.category_ids, {}))
    Path("cats").mkdir()
    for name in ("1.jpg", "2.png"):
        Image.new("RGB", (200, 150), "red").save(Path("cats", name))
    shutil.copy(demo / "annotations" / "instances_val2017.json", "val.json")
    objects = json.loads(Path("val.json").read_text())["annotations"]
    Path("theirs.json").write_text(json.dumps([annotation | {"score": 0.9} for annotation in objects]))

    def run(line):
        name, *flags = line.format(demo=demo, here=own_folder, name=own_folder.name).split()
        return MODULES[name].main(cli.parse(MODULES[name].Settings, "", flags))

    return run


@pytest.fixture
def many_names(run, demo):
    """Links to the images and the checkpoint, and copies of both where outputs would be."""
    for name in ("linked", "links/cats", "out/cats", "blocked", "loop", "run", "foreign"):
        Path(name).mkdir(parents=True)
    links = {"link": "cats", "here": ".", "linked/a.jpg": "../cats/1.jpg", "links/cats/1.jpg": "../../cats/1.jpg"}
    for name, place in (links | {"linked.pth": "cats.pth", "loop/cats": "cats"}).items():
        Path(name).symlink_to(place)
    Path("cats/a.jpg").hardlink_to("cats/1.jpg")
    copies = {"cats/1.jpg": ("out/cats/detections.json", "contact_sheet.jpg", "blocked/cats", "foreign/last.pth")}
    copies["cats.pth"] = ("val2017.pth", "run/frozen.pth", "run/last.pth")
    for file, names in copies.items():
        for name in names:
            shutil.copy(file, name)
    Path("run/settings.json").touch()
    shutil.copytree(demo, "data")
    shutil.copytree("cats", "other")
    Path("other/cats").mkdir()
    shutil.copy("cats/1.jpg", "other/cats/1.jpg")


REFUSED = """
check --checkpoints cats.pth --images {here}/cats --output . | would overwrite the input .*: name another output
check --checkpoints cats.pth --images cats --output cats/../../{name} | would overwrite the input
check --checkpoints cats.pth --images link --output . | would overwrite the input
check --checkpoints cats.pth --images cats --output here | would overwrite the input
check --checkpoints cats.pth --images linked/a.jpg --output . | would overwrite the input
check --checkpoints cats.pth --images cats/1.jpg --output links | would overwrite the input
check --checkpoints cats.pth --images out/cats/detections.json --output out | would overwrite the input
check --checkpoints cats.pth --images contact_sheet.jpg --output . | would overwrite the input
check --checkpoints val2017.pth --data data --output data | would overwrite the input data/val2017/
check --checkpoints cats.pth --images linked cats/1.jpg --output other | cats/1.jpg was not written by this program
check --checkpoints cats.pth --images cats --output blocked | cannot write blocked/cats
check --checkpoints cats.pth --images cats --output loop | cannot write loop/cats
validation --models cats.pth --data {demo} --report cats.pth | would overwrite the input
validation --from-detections theirs.json --data {demo} --report theirs.json | would overwrite the input
validation --from-detections theirs.json --data {demo} --output theirs.json | would overwrite the input
validation --models cats.pth --val-json val.json --val-images-dir {demo}/val2017 --report val.json | would overwrite
validation --models cats.pth --val-json val.json --val-images-dir {demo}/val2017 --output val.json | would overwrite
validation --models cats.pth --data {demo} --output cats.pth | results are JSON
improved --start-from cats.pth --output ./cats/../cats.pth | would overwrite the input
improved --start-from linked.pth --output cats.pth | would overwrite the input
improved --start-from run/frozen.pth --run-dir run | would overwrite the input
improved --start-from run/last.pth --run-dir run | would overwrite the input
improved --run-dir foreign | foreign/last.pth was not written by this program: move it, or name another output
"""


def test_nothing_is_overwritten_by_whatever_name(run, many_names, monkeypatch):
    def content():
        files = [path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "cache"]
        return {str(path): path.read_bytes() for path in files}

    monkeypatch.delattr("validate_models.run_one")  # it is noticed before the work
    before = content()
    for line in REFUSED.strip().splitlines():
        command, message = line.split(" | ")
        with pytest.raises(InputError, match=message):
            run(command)
        assert content() == before, line


def test_own_outputs_are_replaced_and_images_of_one_name_have_their_own(run):
    for suffix in ("png", "webp"):
        Image.new("RGB", (200, 150), "blue").save(f"cats/1.{suffix}")
    for _ in range(2):
        run("check --checkpoints cats.pth --images cats --output out --workers 0")
    written = [path.name.casefold() for path in Path("out/cats").iterdir()]
    assert len(set(written)) == len(written) == 4 + 1 and "detections.json" in written


VALIDATE = "validation --data {demo} --from-detections theirs.json --output r.json --report r.html"
PLOT = "plot --results r.json --output c.png"
FOREIGN = {  # a file's content, and what would write it
    "c_training.png": (b"\x89PNG\r\n", PLOT),
    "r.html": (b"<html></html>", VALIDATE),
    "r_detections/theirs.json": (b'[{"image_id": 1}]', VALIDATE),
    "r.json": (b'{"mine": []}', VALIDATE),
    "settings.json": (b'{\n  "data": "mine"\n}', "improved --run-dir ."),
}


def test_own_results_and_charts_are_replaced_and_files_of_other_programs_never(run):
    for line in (VALIDATE, VALIDATE, PLOT):
        run(line)
    shutil.copy("c.png", "c_training.png")  # an own chart for which there are no numbers any more
    run(PLOT)
    assert not Path("c_training.png").exists()
    for file, (content, line) in FOREIGN.items():
        Path(file).write_bytes(content)
        with pytest.raises(InputError, match=f"{file} was not written by this program"):
            run(line)
        assert Path(file).read_bytes() == content
        Path(file).unlink()


def test_a_report_that_fails_leaves_the_results(run, monkeypatch):
    monkeypatch.delattr("common.show.charts.print_missing")
    with pytest.raises(InputError, match=r"the results are in r.json, but the report failed: "):
        run(VALIDATE)
    assert json.loads(Path("r.json").read_text())["models"][0]["error"] is None and not Path("r.html").exists()


def test_an_interrupted_validation_names_the_flags_that_read_what_is_finished(run, demo, monkeypatch):
    shutil.copy("cats.pth", "dogs.pth")
    models = {"models": ("cats.pth", "dogs.pth"), "workers": 0, "output": "r.json"}
    settings, number = comprehensive_validation.Settings(str(demo), **models), iter(range(2))
    whole = comprehensive_validation.main(settings).models
    before = Path("r.json").read_bytes()
    raise_on_signals()

    def stopped(*arguments):
        if next(number) == 1:  # the second model
            signal.raise_signal(signal.SIGTERM)
        return run_detector(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr("comprehensive_validation.run_detector", stopped)
        comprehensive_validation.main(settings)
    assert Path("r.json").read_bytes() == before
    (note,) = caught.value.__notes__
    files = tuple(shlex.split(note.partition("--from-detections ")[2]))
    resumed = comprehensive_validation.main(replace(settings, models=("dogs.pth",), from_detections=files)).models
    assert [record.name for record in resumed] == ["dogs", "cats"]
    for one, other in zip(reversed(resumed), whole, strict=True):
        assert vars(one.primary) == pytest.approx(vars(other.primary))
        assert pytest.approx(other.detection.AP, abs=1e-6) == one.detection.AP


def test_two_outputs_are_two_files(tmp_path):
    for names in (("a.jpg", "a.jpg"), ("a.jpg", "A.JPG"), ("a.jpg", "b/../a.jpg")):
        with pytest.raises(InputError, match="to one file"):
            check_outputs([tmp_path / name for name in names], [])
    with pytest.raises(InputError, match="cannot write /dev/null: it is a folder or a device"):
        check_outputs([Path(os.devnull)], [])
    check_outputs([tmp_path / "a.jpg", tmp_path / "b.jpg"], ["no\0name", "x" * 5000, os.devnull, "", "hub/name"])


def test_names_that_the_locale_cannot_write_are_those_of_the_files(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    assert os.fsencode(*unique_names([os.fsdecode("улица".encode()) + ".jpg"])) == "улица".encode()
