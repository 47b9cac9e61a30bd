"""The charts: for one model or ten, with gaps, with any names, and wherever they are drawn."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image

import plot_results
from common.console import InputError
from common.evaluate.results import ValidationRecord, ValidationResults, read_results
from common.show import charts


def test_plotting_needs_no_torch():
    program = "import sys, plot_results\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_backend_of_a_notebook_is_not_used(results_file, tmp_path):
    flags = ("--results", str(results_file), "--output", str(tmp_path / "chart.png"))
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    subprocess.run([sys.executable, "plot_results.py", *flags], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "chart.png").is_file()


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
    expected = [getattr(r, part)[key] for r in models for part, key in charts.STUDY_METRICS.values()]
    assert heights == pytest.approx(expected)


def test_charts_without_any_numbers():
    failed = ValidationRecord("a", "a.pth", error="no such file")
    with pytest.raises(InputError, match="no model with numbers"):
        charts.figures(ValidationResults({}, {}, (failed,)))
