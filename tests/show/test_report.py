"""The report: complete in itself, and whatever comes from files is shown as text."""

import html.parser
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import torch
from helpers import results_of, truth_as_detections
from PIL import Image

from common.data.memory import DetectionData, ImageFile
from common.evaluate.bootstrap import comparisons, image_weights
from common.evaluate.detections import ModelRun, detection_table
from common.evaluate.evaluation import describe_data, evaluate
from common.evaluate.results import Comparison, ValidationRecord, ValidationResults
from common.show.report import write_report
from common.types import Detections

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt; $\\frac$ {{ 7 * 7 }}{% raw %}"
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td", "small"}
TAGS |= {"br", "img", "figure", "figcaption", "pre"}
ATTRIBUTES = {"lang", "charset", "name", "content", "class", "colspan", "alt", "src"}


class Page(html.parser.HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        assert all(value.startswith("data:image/") for name, value in attrs if name == "src")

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_what_comes_from_files_as_text(demo_val, tmp_path):
    ending = os.fsdecode(b"\xff.jpg") if sys.platform == "linux" else ".jpg"  # such a name is no text
    images = []
    for image in demo_val.images:
        images.append(replace(image, path=tmp_path / f'{image.id} "><script>alert(1)<{ending}'))
        shutil.copy(image.path, images[-1].path)
    names = tuple(f"{name} {EVIL}" for name in demo_val.class_names)
    data = replace(demo_val, images=tuple(images), class_names=names, source=EVIL)
    found = []
    for index, image in enumerate(images):
        boxes, labels = data.target(index).boxes, data.target(index).labels
        found.append(Detections(image.id, boxes, torch.full((len(boxes),), 0.9), labels))
    conditions = {EVIL: EVIL, "list": [EVIL, {EVIL: EVIL}]}
    run = ModelRun(detection_table(found, data), names, conditions=conditions)
    evaluations = [evaluate(name, EVIL, run, data, image_weights(len(data), 0)) for name in (f"a {EVIL}", f"b {EVIL}")]
    records = [replace(e.record, warnings=[f"warned {EVIL}"]) for e in evaluations]
    failed = ValidationRecord(f"c {EVIL}", EVIL, error=f"failed {EVIL}\n{EVIL}")
    pairs = comparisons({e.record.name: e.samples for e in evaluations}, len(data))
    results = ValidationResults({EVIL: EVIL}, describe_data(data, EVIL), [*records, failed], pairs)
    write_report(tmp_path / "r.html", results, data, {e.record.name: e.table for e in evaluations})
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags == TAGS and page.attributes <= ATTRIBUTES
    for text in (f"a {EVIL}", f"b {EVIL}", f"c {EVIL}", f"failed {EVIL}", f"warned {EVIL}", f"{EVIL}: {EVIL}"):
        assert text in page.text
    assert '"><script>alert(1)<' in page.text.partition("best and worst")[2]


def test_a_report_on_boxes_of_negative_size(demo_val, tmp_path):
    table = detection_table(truth_as_detections(demo_val), demo_val)
    boxes = table.boxes * (1, 1, -1, -1)
    run = ModelRun(replace(table, boxes=boxes), demo_val.class_names)
    evaluated = evaluate("m", "m.json", run, demo_val, image_weights(len(demo_val), 0))
    results = results_of(evaluated.record, comparisons=[Comparison("m", "n", {})], class_names=demo_val.class_names)
    write_report(tmp_path / "r.html", results, demo_val, {"m": evaluated.table})
    page = Page((tmp_path / "r.html").read_text())
    assert "m against n" in " ".join(page.text.replace("against", " against").split())
    assert page.text.count("F1 0.00") > 0


def test_a_report_on_an_image_of_extreme_shape(tmp_path):
    Image.new("RGB", (10, 6000), "grey").save(tmp_path / "tall.png")
    data = DetectionData(
        (ImageFile(1, tmp_path / "tall.png", 10, 6000),),
        (1,),
        ("cat",),
        np.array([[1.0, 100.0, 8.0, 800.0]]),
        np.array([0]),
        np.array([False]),
        np.array([6400.0]),
        np.array([0, 1]),
        "tall",
    )
    found = [Detections(1, torch.tensor([[1.0, 100.0, 9.0, 900.0]]), torch.tensor([0.9]), torch.tensor([0]))]
    evaluated = evaluate("m", "m.json", ModelRun(detection_table(found, data), ("cat",)), data, image_weights(1, 0))
    write_report(tmp_path / "r.html", results_of(evaluated.record, class_names=("cat",)), data, {"m": evaluated.table})
    assert "F1 1.00" in Page((tmp_path / "r.html").read_text()).text
