"""No script overwrites what it reads, or images of its user, whatever the paths look like."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

import comprehensive_validation
import plot_results
import validate_models
from common.cli import flag
from common.console import InputError
from common.files import check_outputs
from common.model.checkpoint import Checkpoint, save_detector
from common.train.run import Run, RunFlags


@pytest.fixture
def folder(tmp_path, detector, demo_val, monkeypatch) -> Path:
    """The working folder, with a checkpoint cats.pth and two images in cats/."""
    checkpoint = Checkpoint(detector, demo_val.class_names, demo_val.category_ids, {})
    save_detector(tmp_path / "cats.pth", checkpoint)
    (tmp_path / "cats").mkdir()
    for name in ("1.jpg", "2.png"):
        Image.new("RGB", (200, 150), "red").save(tmp_path / "cats" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(images, output, checkpoint="cats.pth"):
    settings = validate_models.Settings(checkpoints=(checkpoint,), images=images, output=output, workers=0)
    return validate_models.main(settings)


OVERWRITING = {  # --images and --output
    "folder": (("cats",), "."),
    "one image": (("cats/1.jpg",), "."),
    "absolute image": (("{folder}/cats",), "."),
    "absolute output": (("cats",), "{folder}"),
    "roundabout": (("cats",), "cats/../../{name}"),
    "link to the folder": (("link",), "."),
    "link to the output": (("cats",), "here"),
    "link to an image": (("linked/a.jpg",), "."),
    "image among the links": (("cats/1.jpg",), "links"),
}


@pytest.mark.parametrize(("images", "output"), OVERWRITING.values(), ids=OVERWRITING)
def test_the_images_of_the_user_are_never_overwritten(images, output, folder):
    (folder / "link").symlink_to("cats")
    (folder / "here").symlink_to(".")
    (folder / "linked").mkdir()
    (folder / "linked" / "a.jpg").symlink_to("../cats/1.jpg")
    (folder / "cats" / "a.jpg").hardlink_to(folder / "cats" / "1.jpg")
    (folder / "links" / "cats").mkdir(parents=True)
    (folder / "links" / "cats" / "1.jpg").symlink_to("../../cats/1.jpg")
    before = content(folder)
    names = {"folder": folder, "name": folder.name}
    with pytest.raises(InputError, match=r"would overwrite the input .*: name another output"):
        check(tuple(image.format(**names) for image in images), output.format(**names))
    assert content(folder) == before


def test_the_images_of_a_data_set_are_not_overwritten(folder, demo):
    data = shutil.copytree(demo, "data")
    shutil.copy("cats.pth", "val2017.pth")
    before = content(folder)
    settings = validate_models.Settings(data, checkpoints=("val2017.pth",), output=data, workers=0)
    with pytest.raises(InputError, match=r"would overwrite the input data/val2017/"):
        validate_models.main(settings)
    assert content(folder) == before


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(folder, monkeypatch):
    monkeypatch.delattr("validate_models.run_one")
    Path("out").mkdir()
    for make in (Path.touch, lambda path: path.symlink_to("cats")):  # a file, a link to itself
        make(Path("out/cats"))
        with pytest.raises(InputError, match=r"cannot write out/cats"):
            check(("cats",), "out")
        Path("out/cats").unlink()


def test_an_image_that_is_no_input_is_not_overwritten_either(folder):
    shutil.copytree("cats", "other")
    before = content(folder)
    with pytest.raises(InputError, match=r"cats/1.jpg was not written by this program"):
        check(("other",), ".")
    assert content(folder) == before


def test_contact_sheet_and_detections_do_not_overwrite_inputs(folder):
    shutil.copy("cats/1.jpg", "contact_sheet.jpg")
    with pytest.raises(InputError, match=r"contact_sheet.jpg would overwrite the input"):
        check(("contact_sheet.jpg",), ".")
    Path("out/cats").mkdir(parents=True)
    shutil.copy("cats/1.jpg", "out/cats/detections.json")  # an image by its content
    with pytest.raises(InputError, match=r"detections.json would overwrite the input"):
        check(("out/cats/detections.json",), "out")
    assert not list(Path("out").rglob("*.jpg"))


def test_own_outputs_are_replaced_by_the_next_run(folder):
    for _ in range(2):
        check(("cats",), "out")
    assert {path.name for path in Path("out/cats").iterdir()} == {"1.jpg", "2.jpg", "detections.json"}


def test_images_of_one_name_have_their_own_annotated_images(folder):
    Image.new("RGB", (200, 150), "blue").save("cats/1.png")
    Image.new("RGB", (200, 150), "blue").save("cats/1.webp")
    check(("cats",), "out")
    written = [path.name.casefold() for path in Path("out/cats").glob("*.jpg")]
    assert len(set(written)) == len(written) == 4


@pytest.fixture
def detections(folder, demo, demo_val) -> Path:
    """The ground truth of the demo as a file of detections."""
    truth = json.loads((demo / "annotations" / "instances_val2017.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    entries = [{key: a[key] for key in keys} | {"score": 0.9} for a in truth["annotations"]]
    path = folder / "theirs.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("read", ["theirs.json", "val.json", "cats.pth"])
def test_results_and_report_do_not_overwrite_inputs(read, report, detections, demo):
    shutil.copy(demo / "annotations" / "instances_val2017.json", "val.json")
    output = {"report": f"./{read}", "output": "new.json"} if report else {"output": f"./{read}"}
    before = Path(read).read_bytes()
    settings = comprehensive_validation.Settings(
        val_json="val.json",
        val_images_dir=str(demo / "val2017"),
        models=("cats.pth",),
        from_detections=("theirs.json",),
        workers=0,
        **output,
    )
    with pytest.raises(InputError, match=r"would overwrite the input|results are JSON"):
        comprehensive_validation.main(settings)
    assert Path(read).read_bytes() == before


def test_detections_of_an_earlier_run_can_be_read_where_they_are(detections, demo):
    """The command that an interrupted validation prints names the files that the new validation writes."""
    Path("r_detections").mkdir()
    own = shutil.move(detections, "r_detections/theirs.json")
    before = Path(own).read_bytes()
    settings = comprehensive_validation.Settings(str(demo), from_detections=(own,), workers=0, output="r.json")
    (record,) = comprehensive_validation.main(settings).models
    assert record.detections == own and Path(own).read_bytes() == before
    assert pytest.approx(1) == record.detection.AP50


def test_a_report_that_fails_leaves_the_results(detections, demo, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("of a chart")

    monkeypatch.setattr("common.show.charts.per_class", fail)
    settings = comprehensive_validation.Settings(
        str(demo), from_detections=(str(detections),), workers=0, output="r.json", report="r.html"
    )
    with pytest.raises(InputError, match=r"the results are in r.json, but the report failed: ZeroDivisionError: of a"):
        comprehensive_validation.main(settings)
    assert json.loads(Path("r.json").read_text())["models"][0]["error"] is None and not Path("r.html").exists()


@dataclass(frozen=True)
class TrainSettings(RunFlags):
    start_from: str = flag("", "a checkpoint")


@pytest.mark.parametrize(
    ("start", "output"),
    [("cats.pth", "./cats/../cats.pth"), ("linked.pth", "cats.pth"), ("run/best.pth", "new.pth")],
)
def test_training_does_not_overwrite_what_it_reads(start, output, folder):
    Path("run").mkdir()
    shutil.copy("cats.pth", "run/best.pth")
    Path("run/settings.json").touch()
    Path("linked.pth").symlink_to("cats.pth")
    with pytest.raises(InputError, match="would overwrite the input"):
        Run(TrainSettings(run_dir="run", output=output, start_from=start), Accelerator(cpu=True))
    Run(TrainSettings(run_dir="run", output="new.pth", start_from="cats.pth"), Accelerator(cpu=True))


def test_two_outputs_are_two_files(tmp_path):
    for names in (("a.jpg", "a.jpg"), ("a.jpg", "A.JPG"), ("a.jpg", "b/../a.jpg")):
        with pytest.raises(InputError, match="to one file"):
            check_outputs([tmp_path / name for name in names], [])
    check_outputs([tmp_path / "a.jpg", tmp_path / "b.jpg"], ["no\0name", "x" * 5000, os.devnull, "", "hub/name"])


FOREIGN = {
    "r.json": b'{"mine": 1}',
    "r.html": b"<html><title>Mine</title></html>",
    "r_detections/theirs.json": b'[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 1, 1], "score": 1}]',
}


@pytest.mark.parametrize("file", FOREIGN)
def test_a_file_of_another_program_is_not_overwritten_but_an_own_one_is(file, detections, demo):
    flags = {"from_detections": (str(detections),), "workers": 0, "output": "r.json", "report": "r.html"}
    for _ in range(2):
        comprehensive_validation.main(comprehensive_validation.Settings(str(demo), **flags))
    Path(file).write_bytes(FOREIGN[file])
    with pytest.raises(InputError, match=f"{file} was not written by this program"):
        comprehensive_validation.main(comprehensive_validation.Settings(str(demo), **flags))
    assert Path(file).read_bytes() == FOREIGN[file]


def test_results_are_json(demo):
    with pytest.raises(InputError, match=r"--output r.txt: results are JSON"):
        comprehensive_validation.main(comprehensive_validation.Settings(str(demo), output="r.txt"))


def test_charts_of_an_earlier_run_go_and_those_of_others_stay(detections, demo):
    flags = {"from_detections": (str(detections),), "workers": 0, "output": "r.json"}
    comprehensive_validation.main(comprehensive_validation.Settings(str(demo), **flags))
    settings = plot_results.Settings("r.json", "c.png")
    plot_results.main(settings)
    shutil.copy("c.png", "c_training.png")  # an own chart for which there are no numbers any more
    plot_results.main(settings)
    assert not Path("c_training.png").exists()
    Image.new("RGB", (9, 9)).save("c_training.png")
    with pytest.raises(InputError, match=r"c_training.png was not written by this program"):
        plot_results.main(settings)
