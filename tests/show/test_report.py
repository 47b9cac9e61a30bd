"""The report: complete in itself, and whatever comes from files is shown as text."""

import html.parser
import os
import shutil
import sys
from dataclasses import replace

import pytest
from helpers import evaluated, results_of, truth_as_detections

from common.evaluate.bootstrap import comparisons, image_weights
from common.evaluate.detections import ModelRun, detection_table
from common.evaluate.evaluation import describe_data, evaluate
from common.evaluate.results import ValidationRecord, ValidationResults
from common.show.report import write_report

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
    table = detection_table(truth_as_detections(data), data)
    run = ModelRun(table, names, conditions={EVIL: EVIL, "list": [EVIL, {EVIL: EVIL}]})
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


@pytest.mark.parametrize(("sides", "best"), [(1, "F1 1.00"), (-1, "F1 0.00")])
def test_the_best_images_are_those_with_the_best_f1_also_with_boxes_of_negative_size(sides, best, demo_val, tmp_path):
    table = detection_table(truth_as_detections(demo_val), demo_val)
    table = replace(table, boxes=table.boxes * (1, 1, sides, sides))
    record = evaluated(table, demo_val, image_weights(len(demo_val), 0)).record
    write_report(tmp_path / "r.html", results_of(record, class_names=demo_val.class_names), demo_val, {"m": table})
    assert best in Page((tmp_path / "r.html").read_text()).text.partition("best at scores")[2].partition("best at")[0]
