"""No script overwrites what it reads, or files of its user, whatever the paths look like."""

import itertools
import json
import os
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

import plot_results
import validate_models
from common.cli import flag
from common.console import InputError, Interrupted, raise_on_signals
from common.evaluate.detect import run_detector
from common.files import check_outputs
from common.model.checkpoint import Checkpoint, save_detector
from common.train.run import Run, RunFlags
from comprehensive_validation import Settings, main


@pytest.fixture
def folder(tmp_path, detector, demo, demo_val, monkeypatch) -> Path:
    """The working folder: a checkpoint cats.pth, images in cats/, objects in val.json, detections in theirs.json."""
    monkeypatch.chdir(tmp_path)
    save_detector("cats.pth", Checkpoint(detector, demo_val.class_names, demo_val.category_ids, {}))
    Path("cats").mkdir()
    for name in ("1.jpg", "2.png"):
        Image.new("RGB", (200, 150), "red").save(Path("cats", name))
    truth = shutil.copy(demo / "annotations" / "instances_val2017.json", "val.json")
    keys = ("image_id", "category_id", "bbox")
    entries = [
        {key: a[key] for key in keys} | {"score": 0.9} for a in json.loads(Path(truth).read_text())["annotations"]
    ]
    Path("theirs.json").write_text(json.dumps(entries))
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(images, output):
    settings = {"checkpoints": ("cats.pth",), "images": images, "output": output, "workers": 0}
    return validate_models.main(validate_models.Settings(**settings))


OVERWRITING = {  # --images and --output
    "folder": ("{folder}/cats", "."),
    "roundabout": ("cats", "cats/../../{name}"),
    "link to the folder": ("link", "."),
    "link to the output": ("cats", "here"),
    "link to an image": ("linked/a.jpg", "."),
    "image among the links": ("cats/1.jpg", "links"),
    "detections": ("out/cats/detections.json", "out"),
    "contact sheet": ("contact_sheet.jpg", "."),
}


@pytest.mark.parametrize(("image", "output"), OVERWRITING.values(), ids=OVERWRITING)
def test_the_images_of_the_user_are_never_overwritten(image, output, folder):
    Path("link").symlink_to("cats")
    Path("here").symlink_to(".")
    for name in ("linked", "links/cats", "out/cats"):
        Path(name).mkdir(parents=True)
    Path("linked/a.jpg").symlink_to("../cats/1.jpg")
    Path("cats/a.jpg").hardlink_to("cats/1.jpg")
    Path("links/cats/1.jpg").symlink_to("../../cats/1.jpg")
    for name in ("out/cats/detections.json", "contact_sheet.jpg"):  # an image by its content
        shutil.copy("cats/1.jpg", name)
    before, names = content(folder), {"folder": folder, "name": folder.name}
    with pytest.raises(InputError, match=r"would overwrite the input .*: name another output"):
        check((image.format(**names),), output.format(**names))
    assert content(folder) == before


def test_images_of_a_data_set_or_of_somebody_else_are_not_overwritten(folder, demo):
    shutil.copytree(demo, "data")
    shutil.copytree("cats", "other")
    shutil.copy("cats.pth", "val2017.pth")
    before = content(folder)
    settings = validate_models.Settings("data", checkpoints=("val2017.pth",), output="data", workers=0)
    with pytest.raises(InputError, match=r"would overwrite the input data/val2017/"):
        validate_models.main(settings)
    with pytest.raises(InputError, match=r"cats/1.jpg was not written by this program"):
        check(("other",), ".")
    assert content(folder) == before


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(folder, monkeypatch):
    monkeypatch.delattr("validate_models.run_one")
    Path("out").mkdir()
    for make in (Path.touch, lambda path: path.symlink_to("cats")):  # a file, a link to itself
        make(Path("out/cats"))
        with pytest.raises(InputError, match=r"cannot write out/cats"):
            check(("cats",), "out")
        Path("out/cats").unlink()


def test_own_outputs_are_replaced_and_images_of_one_name_have_their_own(folder):
    for suffix in ("png", "webp"):
        Image.new("RGB", (200, 150), "blue").save(f"cats/1.{suffix}")
    for _ in range(2):
        check(("cats",), "out")
    written = [path.name.casefold() for path in Path("out/cats").iterdir()]
    assert len(set(written)) == len(written) == 4 + 1 and "detections.json" in written


def test_results_and_report_do_not_overwrite_inputs(folder, demo):
    models = {"models": ("cats.pth",), "from_detections": ("theirs.json",), "workers": 0}
    flags = models | {"val_json": "val.json", "val_images_dir": str(demo / "val2017"), "output": "new.json"}
    before = content(folder)
    for output, read in itertools.product(("report", "output"), ("theirs.json", "val.json", "cats.pth")):
        with pytest.raises(InputError, match=r"would overwrite the input|results are JSON"):
            main(Settings(**flags | {output: f"./{read}"}))
        assert content(folder) == before


def validate(demo):
    return main(Settings(str(demo), from_detections=("theirs.json",), workers=0, output="r.json", report="r.html"))


def plot(_demo):
    return plot_results.main(plot_results.Settings("r.json", "c.png"))


FOREIGN = {  # what would write a file, and its content
    "c_training.png": (plot, b"\x89PNG\r\n"),
    "r.html": (validate, b"<html></html>"),
    "r_detections/theirs.json": (validate, b'[{"image_id": 1}]'),
    "r.json": (validate, b'{"mine": 1}'),
}


def test_own_results_and_charts_are_replaced_and_files_of_other_programs_never(folder, demo):
    for _ in range(2):
        validate(demo)
        plot(demo)
        shutil.copy("c.png", "c_training.png")  # an own chart for which there are no numbers any more
    plot(demo)
    assert not Path("c_training.png").exists()
    for file, (write, foreign) in FOREIGN.items():
        Path(file).write_bytes(foreign)
        with pytest.raises(InputError, match=f"{file} was not written by this program"):
            write(demo)
        assert Path(file).read_bytes() == foreign
        Path(file).unlink()


def test_a_report_that_fails_leaves_the_results(folder, demo, monkeypatch):
    monkeypatch.delattr("common.show.charts.per_class")
    with pytest.raises(InputError, match=r"the results are in r.json, but the report failed: "):
        validate(demo)
    assert json.loads(Path("r.json").read_text())["models"][0]["error"] is None and not Path("r.html").exists()


def test_an_interrupted_validation_names_the_flags_that_read_what_is_finished(folder, demo, monkeypatch):
    shutil.copy("cats.pth", "dogs.pth")
    options = {"workers": 0, "output": "r.json"}
    whole = main(Settings(str(demo), models=("cats.pth", "dogs.pth"), **options))
    before, number = Path("r.json").read_bytes(), iter(range(2))
    raise_on_signals()

    def stopped(*arguments):
        if next(number) == 1:  # the second model
            signal.raise_signal(signal.SIGTERM)
        return run_detector(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr("common.evaluate.detect.run_detector", stopped)
        main(Settings(str(demo), models=("cats.pth", "dogs.pth"), **options))
    assert Path("r.json").read_bytes() == before
    (note,) = caught.value.__notes__
    files = shlex.split(note.partition("--from-detections ")[2])
    resumed = main(Settings(str(demo), models=("dogs.pth",), from_detections=tuple(files), **options)).models
    assert [record.name for record in resumed] == ["dogs", "cats"]
    for one, other in zip(reversed(resumed), whole.models, strict=True):
        assert vars(one.primary) == pytest.approx(vars(other.primary))
        assert pytest.approx(other.detection.AP, abs=1e-6) == one.detection.AP


@dataclass(frozen=True)
class TrainSettings(RunFlags):
    start_from: str = flag("", "a checkpoint")


def test_training_overwrites_neither_what_it_reads_nor_files_of_another_program(folder):
    def run(start="cats.pth", output="new.pth"):
        settings = TrainSettings(run_dir="run", output=output, start_from=start)
        return Run(settings, Accelerator(cpu=True), ("frozen", "unfrozen"))

    run()
    stages = [f"run/{name}.pth" for name in ("best", "frozen", "last")]
    for file in stages:
        shutil.copy("cats.pth", file)
    with pytest.raises(InputError, match=r"run has a \w+\.pth of another program: name another --run-dir"):
        run()
    Path("run/settings.json").touch()
    Path("linked.pth").symlink_to("cats.pth")
    for start, output in [
        ("cats.pth", "./cats/../cats.pth"),
        ("linked.pth", "cats.pth"),
        *((f, "new.pth") for f in stages),
    ]:
        with pytest.raises(InputError, match="would overwrite the input"):
            run(start, output)
    run()


def test_two_outputs_are_two_files(tmp_path):
    for names in (("a.jpg", "a.jpg"), ("a.jpg", "A.JPG"), ("a.jpg", "b/../a.jpg")):
        with pytest.raises(InputError, match="to one file"):
            check_outputs([tmp_path / name for name in names], [])
    check_outputs([tmp_path / "a.jpg", tmp_path / "b.jpg"], ["no\0name", "x" * 5000, os.devnull, "", "hub/name"])
