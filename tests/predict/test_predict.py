"""Detections in many images: what is written, what other readers find in it, and going on after a stop."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from helpers import load_coco
from PIL import Image
from torchvision.ops import box_convert

from common.console import InputError
from common.images import read_pixels
from common.model import load_detector
from common.model.checkpoint import Checkpoint, save_detector
from common.predict.__main__ import Settings, main
from common.predict.formats import FORMATS

NAMES = ("a b", "Vögel", "c, d")


@pytest.fixture(scope="module")
def checkpoint(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    detector = build("pyramid", second_look=20, num_classes=3, image_size=56)
    save_detector(path, Checkpoint(detector, NAMES, (4, 9, 2), {}, {"operating_point": 0.0}))
    return path


@pytest.fixture
def settings(checkpoint, demo, own_folder):
    """Seven images in a folder with subfolders, one of them damaged, and one turned by its EXIF orientation."""
    names = ("a.jpg", "b 1.png", "below/a.jpg", "below/ü.jpg", "c.jpg", "d.jpg")
    for name, source in zip(names, sorted((demo / "train2017").iterdir()), strict=False):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[274] = 6 if name == "c.jpg" else 1
        Image.open(source).save(Path("in", name), exif=exif)
    Path("in/broken.jpg").write_bytes(Path("in/a.jpg").read_bytes()[:300])
    options = {"formats": tuple(FORMATS), "batch_size": 2, "precision": "fp32", "url_prefix": "u/"}
    return Settings(detector=str(checkpoint), sources=("in",), **options)


def written(folder="found"):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def rows():
    return [json.loads(line) for line in Path("found/detections.jsonl").read_text().splitlines()]


def test_each_format_holds_what_the_detector_finds(settings):
    main(settings)
    header, *lines = rows()
    names = ["a.jpg", "b 1.png", "below/a.jpg", "below/ü.jpg", "broken.jpg", "c.jpg", "d.jpg"]
    assert [line["file"] for line in lines] == names and header["min_score"] == 0.0
    assert "cannot read the image in/broken.jpg" in lines.pop(4)["error"]
    detector = load_detector(settings.detector, precision="fp32")
    for line in lines:
        found = detector.predict(f"in/{line['file']}", min_score=0)
        boxes = torch.tensor(line["boxes"])
        assert len(boxes) > 5 and torch.allclose(boxes, found.boxes, atol=0.02) and line["classes"] == found.names
    assert (lines[4]["width"], lines[4]["height"]) == Image.open("in/c.jpg").size[::-1]
    boxes = torch.tensor([box for line in lines for box in line["boxes"]])
    classes = [name for line in lines for name in line["classes"]]
    data = load_coco(Path("found/coco.json"), Path("in"))
    assert [image.path.relative_to("in").as_posix() for image in data.images] == [line["file"] for line in lines]
    assert torch.allclose(box_convert(torch.tensor(data.boxes).float(), "xywh", "xyxy"), boxes, atol=0.01)
    assert [data.class_names[label] for label in data.labels] == classes and set(data.category_ids) == {1, 2, 3}
    scores = [entry["score"] for entry in json.loads(Path("found/coco.json").read_text())["annotations"]]
    assert scores == [score for line in lines for score in line["scores"]]
    table = list(csv.DictReader(Path("found/detections.csv").read_text().splitlines()))
    assert [row["class"] for row in table] == classes
    assert [float(row["x2"]) for row in table] == pytest.approx(boxes[:, 2].tolist(), abs=0.001)


def test_yolo_labels_and_tasks_of_label_studio_have_the_same_boxes(settings):
    main(settings)
    _, *lines = rows()
    tasks = json.loads(Path("found/label_studio.json").read_text())
    assert Path("found/classes.txt").read_text().splitlines() == list(NAMES)
    assert tasks[1]["data"]["image"] == "u/b%201.png" and tasks[3]["data"]["image"] == "u/below/%C3%BC.jpg"
    for line, task in zip([line for line in lines if "error" not in line], tasks, strict=True):
        sides = torch.tensor([line["width"], line["height"]] * 2)
        values = [entry["value"] for entry in task["predictions"][0]["result"]]
        assert [value["rectanglelabels"] for value in values] == [[name] for name in line["classes"]]
        found = torch.tensor([[value[key] for key in ("x", "y", "width", "height")] for value in values]) / 100
        text = Path("found/labels", line["file"]).with_suffix(".txt").read_text()
        labels = torch.tensor([[float(word) for word in row.split()] for row in text.splitlines()])
        assert labels[:, 0].tolist() == [NAMES.index(name) for name in line["classes"]]
        for corner, size in ((found[:, :2], found[:, 2:]), (labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 3:])):
            assert torch.allclose(torch.cat([corner, corner + size], 1) * sides, torch.tensor(line["boxes"]), atol=0.01)


def test_a_run_killed_at_any_byte_ends_with_the_same_files_and_a_finished_one_takes_in_new_images(settings):
    main(settings)
    whole, journal = written(), Path("found/detections.jsonl")
    size = journal.stat().st_size
    for kept in range(0, size, size // 23):
        journal.write_bytes(whole[str(journal)][:kept])
        main(settings)
        assert written() == whole, kept
    Image.new("RGB", (40, 30)).save("in/a new one.png")
    main(settings)
    before, after = (content.splitlines() for content in (whole[str(journal)], journal.read_bytes()))
    assert after[2:-1] == before[1:-1] and rows()[1]["file"] == "a new one.png" and rows()[-1]["file"] == "d.jpg"


def test_what_has_changed_or_could_not_be_read_is_detected_again(settings, monkeypatch, capsys):
    def failing(path):
        raise InputError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(
            "common.predict.__main__.read_pixels", lambda p: (failing if p.name == "c.jpg" else read_pixels)(p)
        )
        main(settings)
    before = {row["file"]: row for row in rows()[1:]}
    Image.new("RGB", (40, 30)).save("in/a.jpg")
    Path("in/raw.heic").touch()
    for _ in range(2):  # the second time all have a line
        main(replace(settings, batch_size=64))
    after = {row["file"]: row for row in rows()[1:]}
    assert [name for name in before if before[name] != after[name]] == ["a.jpg", "c.jpg"]
    assert (
        after["a.jpg"]["width"] == 40 and before["c.jpg"]["error"] == "too many open files" and after["c.jpg"]["boxes"]
    )
    assert "left out 1 files of an image format that Pillow does not read (in/raw.heic)" in capsys.readouterr().out


def test_files_without_a_detection_are_valid_and_none_of_which_an_image_can_be_read_is_an_error(settings):
    main(replace(settings, min_score=1.0))
    assert json.loads(Path("found/coco.json").read_text())["annotations"] == []
    assert [task["predictions"][0]["result"] for task in json.loads(Path("found/label_studio.json").read_text())] == [
        []
    ] * 6
    with pytest.raises(InputError, match=r"no image could be read: cannot read the image in/broken\.jpg"):
        main(replace(settings, sources=("in/broken.jpg",), output="none"))


REFUSED = [
    ({"min_score": 0.5}, "begun with another min_score: name another --output"),
    ({"precision": "bf16"}, "begun with another precision"),
    ({"detector": "other.pth"}, "begun with another class_names"),
    ({"sources": ("in", "in/below")}, "in/a.jpg and in/below/a.jpg would both be a.jpg: name the folder above both"),
    ({"sources": ("lists/names.txt",)}, "names lists/../in/a.jpg, not below its folder"),
    ({"sources": ("none",)}, "no such|cannot read"),
    ({"sources": ("empty",)}, "empty has no images"),
    ({"sources": ("in/below",)}, r"has 6 images that are not named now \(b 1.png, below/a.jpg, .*\): name them too"),
    ({"output": "in"}, "in has no detections.jsonl, but other content"),
    ({"sources": ("same",)}, "a.jpg and a.png would share a label file"),
    ({"output": "damaged"}, "damaged/detections.jsonl is damaged: delete its folder"),
    ({"output": "in/a.jpg"}, "cannot write into in/a.jpg"),
    ({"sources": ("raw.heic",)}, "raw.heic is of a format that Pillow does not read"),
]


def test_what_does_not_fit_is_refused_and_changes_nothing(settings, build):
    main(settings)
    for folder in ("lists", "empty", "same", "damaged"):
        Path(folder).mkdir()
    save_detector(
        "other.pth", Checkpoint(build(num_classes=3), ("a", "b", "c"), (1, 2, 3), {}, {"operating_point": 0.0})
    )
    Path("lists/names.txt").write_text("../in/a.jpg\n")
    Path("damaged/detections.jsonl").write_text("{}\n{")
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (40, 30)).save(Path("same", name))
    before = written(".")
    for change, message in REFUSED:
        with pytest.raises(InputError, match=message):
            main(replace(settings, **change))
        assert {name: content for name, content in written(".").items() if name in before} == before
    with filelock.FileLock("found/lock"), pytest.raises(InputError, match="another process writes into found"):
        main(settings)
