"""The charts: for one model or ten, with gaps, with any names, and wherever they are drawn."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import ROOT
from PIL import Image

import plot_results
from common.console import InputError
from common.evaluate.results import ValidationRecord, ValidationResults, read_results
from common.show import charts
from common.show.tables import format_table


def test_plotting_needs_no_torch():
    program = "import sys, plot_results\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_charts_in_a_notebook_without_a_home_folder(results_file, tmp_path):
    flags = ("--results", str(results_file), "--output", str(tmp_path / "chart.png"))
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    (tmp_path / "home").touch()  # no folder, so that nothing can be written there
    environment |= {"HOME": str(tmp_path / "home"), "DETECTION_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "plot_results.py"), *flags]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert (tmp_path / "chart.png").is_file() and result.stderr == ""


@pytest.mark.parametrize("count", [1, 2, 10])
def test_charts_of_one_to_ten_models_with_gaps(count, results_file, tmp_path):
    content = json.loads(results_file.read_text())
    good, _, failed = content["models"]
    models = [good | {"name": f"model {i}"} for i in range(count)]
    models[-1] = {**models[-1], "detection": {"AP50": None}, "cost": None, "intervals": None, "diagnosis": None}
    (tmp_path / "r.json").write_text(json.dumps(content | {"models": [*models, failed]}))
    path = plot_results.main(plot_results.Settings(str(tmp_path / "r.json"), str(tmp_path / "chart.png")))
    with Image.open(path) as image:
        assert image.size == (1690, 1118 if count == 1 else 1560)
    others = {"precision_recall", "per_class"} | ({"confusion", "calibration"} if count > 1 else set())
    assert {p.stem.removeprefix("chart_") for p in tmp_path.glob("chart_*.png")} == others


def test_names_that_are_formulas_or_not_valid_text(results_file, tmp_path):
    name = "$\\frac$ \udcff"  # no valid formula, and what Python makes of the byte 0xff in a file name
    text = results_file.read_text().replace("demo", json.dumps(name)[1:-1]).replace("square", json.dumps(name)[1:-1])
    (tmp_path / "r.json").write_text(text.replace('"first"', json.dumps(name)))
    results = read_results(tmp_path / "r.json")
    assert results.models[0].name == name and results.dataset["source"] == name
    assert name in results.dataset["class_names"]
    for chart, figure in charts.figures(results).items():
        figure.savefig(tmp_path / f"{chart}.png")
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_bars_show_the_numbers_of_the_records(results_file):
    models = charts.evaluated(read_results(results_file))
    axes = charts.comparison(read_results(results_file)).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    expected = [getattr(r, part)[key] for r in models for part, key in charts.HEADLINE_METRICS.values()]
    assert heights == pytest.approx(expected)


BROKEN = (None, "text", {"a": None}, -1, 10**400, [None, None], [[1, "x"], [2]])
PARTS = (
    *((part,) for part in ("detection", "primary", "cost", "intervals", "diagnosis")),
    ("detection", "AP50"),
    ("detection", "per_class"),
    ("detection", "per_class", "square"),
    ("detection", "precision_at_recall"),
    ("detection", "precision_at_recall", "0.5"),
    ("primary", "f1"),
    ("cost", "images_per_s"),
    ("cost", "device"),
    ("intervals", "AP50"),
    ("diagnosis", "confusion"),
    ("diagnosis", "operating_point"),
    ("diagnosis", "calibration", "bins"),
    ("diagnosis", "errors"),
)


def broken_record(good, part, value):
    """The record with `value` in place of a part of it."""
    fields = json.loads(json.dumps(vars(good)))
    place = fields
    for key in part[:-1]:
        place = place[key]
    place[part[-1]] = value
    return ValidationRecord(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [PARTS[::2], PARTS[1::2]], ids=["even", "odd"])
@pytest.mark.parametrize("value", BROKEN, ids=lambda value: str(value)[:20])
def test_broken_parts_of_records_are_numbers_that_do_not_exist(value, parts, results_file):
    results = read_results(results_file)
    good = charts.evaluated(results)[0]
    models = (good, *(broken_record(good, part, value) for part in parts))
    assert set(charts.figures(replace(results, models=models))) >= {"comparison", "per_class", "confusion"}
    assert format_table(models).count("first") == len(models)


def test_bars_of_zeros_stand_on_the_axis(results_file):
    results = read_results(results_file)
    record = replace(charts.evaluated(results)[0], detection={key: 0.0 for _, key in charts.SIZES.values()})
    assert charts.comparison(replace(results, models=(record,))).axes[1].get_ylim()[0] == 0


def test_bars_without_an_interval(results_file):
    results = read_results(results_file)
    record = replace(charts.evaluated(results)[0], intervals={"AP50": None, "accuracy": [None, None]})
    bars = charts.comparison(replace(results, models=(record,))).axes[0]
    assert len(bars.patches) == len(charts.HEADLINE_METRICS) and not bars.containers[0].errorbar


EPOCHS = [
    {"epoch": 1, "stage": "only", "loss": {"box": 2.0, "class": 1.5}, "val": {"AP50": None}},
    {"epoch": 2, "stage": "only", "loss": {"box": 1.0, "class": 0.5}, "val": {"AP50": 0.25}},
]
SETTINGS = {"epochs": 2, "blocks": [2, -1], "output": "a.pth", "train_fingerprint": "abc"}


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a training run of two epochs."""
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, EPOCHS)))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | {"resume": True}))
    return tmp_path


def trained(name, folder, **changes):
    conditions = SETTINGS | {"run_dir": str(folder), "epoch": 2, "blocks": (2, 4)} | changes
    return ValidationRecord(name, f"{name}.pth", detection={"AP50": 0.5}, conditions=conditions)


def test_training_curves_have_the_numbers_of_the_log(run_dir, capsys):
    results = ValidationResults({}, {}, (trained("a", run_dir), trained("b", "no/folder")))
    logs = charts.logs_of(results)
    assert list(logs) == [0] and [epoch.loss for epoch in logs[0]] == [3.5, 1.5]
    loss, ap50 = (axes.lines[0].get_ydata() for axes in charts.training(results, logs).axes)
    assert list(loss) == [3.5, 1.5] and list(ap50)[1] == 0.25
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"output": "b.pth"}, {"train_fingerprint": "other images"}])
def test_the_log_of_a_later_run_is_not_drawn(changes, run_dir, capsys):
    results = ValidationResults({}, {}, (trained("a", run_dir, **changes), trained("b", run_dir)))
    assert list(charts.logs_of(results)) == [1]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a: no training curve") and line.endswith(next(iter(changes)))


@pytest.mark.parametrize("file", ["log.jsonl", "settings.json"])
@pytest.mark.parametrize("content", ["", "{}", "[1]", "hello", '{"epoch": 1, "loss": {"box": null}, "val": {}}'])
def test_a_log_that_cannot_be_read_leaves_the_other_charts(file, content, run_dir, capsys):
    (run_dir / file).write_text(content)
    drawn = charts.figures(ValidationResults({}, {}, (trained("a", run_dir),)))
    assert {"comparison", "precision_recall", "per_class"} <= set(drawn)
    assert capsys.readouterr().out.count("no training curve") == ("training" not in drawn)


def test_charts_without_any_numbers():
    failed = ValidationRecord("a", "a.pth", error="no such file")
    with pytest.raises(InputError, match="no model with numbers"):
        charts.figures(ValidationResults({}, {}, (failed,)))
