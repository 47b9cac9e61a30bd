"""The charts: for one model or ten, with gaps, with any names, and wherever they are drawn."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from helpers import ROOT, record_of, results_of

import plot_results
from common.console import InputError
from common.evaluate.results import ClassNumbers, ValidationRecord, read_results
from common.show import charts


def test_plotting_needs_no_torch():
    program = "import sys, plot_results\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_charts_in_a_notebook_without_a_home_folder(results_file, tmp_path):
    (tmp_path / "home").touch()  # no folder, so that nothing can be written there
    places = {"HOME": str(tmp_path / "home"), "DETECTION_CACHE": str(tmp_path / "cache")}
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"} | places
    command = [sys.executable, ROOT / "plot_results.py", "--results", results_file, "--output", tmp_path / "chart.png"]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert (tmp_path / "chart.png").is_file() and result.stderr == ""


@pytest.mark.parametrize("count", [1, 2, 14])
def test_charts_of_any_number_of_models_with_gaps(count, results_file, tmp_path):
    content = json.loads(results_file.read_text())
    good, _, failed = content["models"]
    models = [good | {"name": f"model {i}"} for i in range(count)]
    nothing = models[0]["detection"] | {"AP50": None, "precision_at_recall": {"0.5": None, "0.75": None}}
    models[0] = {**models[0], "detection": nothing, "cost": None, "intervals": None, "diagnosis": None}
    (tmp_path / "r.json").write_text(json.dumps(content | {"models": [*models, failed]}))
    for name in ("training", "calibration"):
        (tmp_path / f"chart_{name}.png").write_bytes(b"dinov2-detection")  # of an earlier run
    plot_results.main(plot_results.Settings(str(tmp_path / "r.json"), str(tmp_path / "chart.png")))
    others = {"precision_recall", "per_class"} | ({"confusion", "calibration"} if count > 1 else set())
    assert {p.stem.removeprefix("chart_") for p in tmp_path.glob("chart_*.png")} == others


def test_names_that_are_formulas_or_not_valid_text(results_file, tmp_path):
    name = "$\\frac$ \udcff"  # no valid formula, and what Python makes of the byte 0xff in a file name
    text = results_file.read_text().replace("demo", json.dumps(name)[1:-1]).replace("square", json.dumps(name)[1:-1])
    (tmp_path / "r.json").write_text(text.replace('"first"', json.dumps(name)))
    results = read_results(tmp_path / "r.json")
    assert results.models[0].name == name and results.dataset.source == name and name in results.dataset.class_names
    assert len(charts.render(results, dpi=40)) == 5


def test_ten_models_and_sixty_classes_are_drawn_and_said(results_file):
    names = [f"class {n}" for n in range(1500)]
    per_class = {name: ClassNumbers(0.5, n / 1500) for n, name in enumerate(names)}
    records = [record_of(f"m{n}", AP50=0.5, per_class=per_class) for n in range(14)]
    results = results_of(*records, class_names=names)
    results = replace(results, dataset=replace(results.dataset, class_boxes=list(range(1500))))
    figure = charts.per_class(results)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == names[-60:]
    caption = figure.get_supxlabel()
    assert "the first 10 of 14 models" in caption and "the 60 of 1500 classes with most objects" in caption
    assert len(figure.legends[0].get_texts()) == 10
    looks = [repr((charts.line_style(n), charts.bar_style(n))) for n in range(10)]
    assert len(set(looks)) == 10


def test_a_long_legend_leaves_room_for_the_axes():
    names = [f"model {n} with a name as long as a line of a table" for n in range(10)]
    per_class = {"a": ClassNumbers(0.5, 0.5), "b": ClassNumbers(0.5, 0.5)}
    figure = charts.per_class(results_of(*(record_of(name, AP50=0.5, per_class=per_class) for name in names)))
    figure.draw_without_rendering()
    size = figure.axes[0].get_position().size * figure.get_size_inches()
    assert size.min() > 0.3


def test_confusion_shows_the_shares_of_each_class(results_file):
    results = read_results(results_file)
    diagnosis = replace(results.models[0].diagnosis, confusion=[[3, 0, 1], [1, 1, 0], [5, 5, 0]])
    axes = charts.confusion(results_of(record_of("m", diagnosis=diagnosis))).axes[0]
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0, 0, 0.25], [0.5, 0.5, 0, 0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "others", "missed"]


def test_settings_of_matplotlib_stay_as_they_are(results_file):
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 7}):
        before = dict(matplotlib.rcParams)
        charts.render(read_results(results_file), dpi=40)
        assert dict(matplotlib.rcParams) == before


def test_bars_show_the_numbers_of_the_records(results_file):
    models = charts.drawn_models(read_results(results_file))
    axes = charts.comparison(read_results(results_file)).axes[0]
    expected = [r.number(part, key) for r in models for part, key in charts.HEADLINE.values()]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected)


def test_bars_of_zeros_stand_on_the_axis_and_those_without_an_interval_have_no_line():
    figure = charts.comparison(results_of(record_of("a", AP_small=0.0, AP50=0.5, intervals={"AP50": None})))
    assert figure.axes[1].get_ylim()[0] == 0
    assert len(figure.axes[0].patches) == len(charts.HEADLINE) and not figure.axes[0].containers[0].errorbar


EPOCHS = [
    {"epoch": 1, "stage": "only", "loss": {"box": 2.0, "class": 1.5}, "val": {"AP50": None}},
    {"epoch": 2, "stage": "only", "loss": {"box": 1.0, "class": 0.5}, "val": {"AP50": 0.25}},
]
SETTINGS = {"epochs": 2, "blocks": [2, -1], "output": "a.pth", "train_fingerprint": "abc"}


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a training run of two epochs."""
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, EPOCHS)))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def trained(name, folder, **changes):
    return record_of(name, AP50=0.5, conditions=SETTINGS | {"run_dir": str(folder), "epoch": 2} | changes)


def test_training_curves_have_the_numbers_of_the_log(run_dir):
    loss, ap50 = charts.training(results_of(trained("a", "no/folder"), trained("b", run_dir))).axes
    assert [len(line.get_ydata()) for line in loss.lines] == [0, 2]
    assert list(loss.lines[1].get_ydata()) == [3.5, 1.5] and ap50.lines[1].get_ydata()[1] == 0.25


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"output": "b.pth"}, {"train_fingerprint": "other images"}])
def test_the_log_of_a_later_run_is_not_drawn(changes, run_dir):
    assert charts.read_log(trained("b", run_dir)) == EPOCHS
    assert charts.read_log(trained("a", run_dir, **changes)) == []


@pytest.mark.parametrize("file", ["log.jsonl", "settings.json"])
def test_a_damaged_log_leaves_the_other_charts(file, run_dir):
    (run_dir / file).write_text('{"epoch": 1, ')
    assert "training" not in charts.render(results_of(trained("a", run_dir)), dpi=40)


def test_charts_without_any_numbers():
    with pytest.raises(InputError, match="no model with numbers"):
        charts.render(results_of(ValidationRecord("a", "a.pth", error="no such file")), dpi=40)
