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


def drawn(chart, *records, **data):
    results = results_of(*records, **data)
    return chart(charts.drawn_models(results), results.dataset)


@pytest.mark.slow
def test_plotting_needs_no_torch_no_window_and_no_home_folder(results_file, tmp_path):
    (tmp_path / "home").touch()  # no folder, so that nothing can be written there
    places = {"HOME": str(tmp_path / "home"), "DETECTION_CACHE": str(tmp_path / "cache")}
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"} | places
    program = "import sys, plot_results as p; p.main(p.Settings(*sys.argv[1:])); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, results_file, tmp_path / "chart.png"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (tmp_path / "chart.png").is_file() and done.stderr == ""


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
    with pytest.raises(InputError, match="no model with numbers"):
        charts.render(results_of(ValidationRecord("a", "a.pth", error="no such file")), dpi=40)


def test_names_that_are_no_valid_text_or_formula_and_settings_of_matplotlib_that_stay(results_file, tmp_path):
    name = "$\\frac$ \udcff"  # no valid formula, and what Python makes of the byte 0xff in a file name
    text = results_file.read_text().replace("demo", json.dumps(name)[1:-1]).replace("square", json.dumps(name)[1:-1])
    (tmp_path / "r.json").write_text(text.replace('"first"', json.dumps(name)))
    results = read_results(tmp_path / "r.json")
    assert results.models[0].name == name and results.dataset.source == name and name in results.dataset.class_names
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 7}):
        before = dict(matplotlib.rcParams)
        assert len(charts.render(results, dpi=40)) == 5
        assert dict(matplotlib.rcParams) == before


def test_ten_models_with_long_names_and_sixty_classes_are_drawn_and_said():
    names = [f"class {n}" for n in range(1500)]
    per_class = {name: ClassNumbers(0.5, n / 1500) for n, name in enumerate(names)}
    records = [record_of(f"model {n} with a name as long as a line of a table", per_class=per_class) for n in range(14)]
    results = results_of(*records, class_names=names)
    data = replace(results.dataset, class_boxes=list(range(1500)))
    figure = charts.per_class(charts.drawn_models(results), data)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == names[-60:]
    assert figure.axes[0].get_title() == "the 60 of 1500 classes with most objects"
    assert "the first 10 of 14 models" in charts.caption(results) and len(figure.legends[0].get_texts()) == 10
    assert len({repr((charts.line_style(n), charts.bar_style(n))) for n in range(10)}) == 10
    figure = charts.per_class(charts.drawn_models(results), replace(data, class_names=names[:2], class_boxes=[]))
    figure.draw_without_rendering()
    assert (figure.axes[0].get_position().size * figure.get_size_inches()).min() > 0.3  # beside the legend


def test_confusion_shows_the_shares_of_each_class(results_file):
    counts = [[3, 0, 1], [1, 1, 0], [5, 5, 0]]
    diagnosis = replace(read_results(results_file).models[0].diagnosis, confusion=counts)
    axes = drawn(charts.confusion, record_of("m", diagnosis=diagnosis)).axes[0]
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0, 0, 0.25], [0.5, 0.5, 0, 0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "others", "missed"]


def test_bars_show_the_numbers_of_the_records_and_the_intervals_that_exist(results_file):
    results = read_results(results_file)
    models = charts.drawn_models(results)
    axes = charts.comparison(models, results.dataset).axes[0]
    expected = [r.number(column.part, column.keys[0]) for r in models for column in charts.HEADLINE]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected)
    lines = axes.containers[1].errorbar.lines[2][0].get_segments()
    assert [line[:, 1].tolist() for line in lines][-1] == pytest.approx(models[0].interval("AP50"))
    figure = drawn(charts.comparison, record_of("a", AP_small=0.0, AP50=0.5, intervals={"AP50": None}))
    assert figure.axes[1].get_ylim()[0] == 0  # bars of zeros stand on the axis
    assert len(figure.axes[0].patches) == len(charts.HEADLINE) and not figure.axes[0].containers[0].errorbar


def test_training_curves_have_the_numbers_of_the_log_of_that_run(tmp_path):
    settings = {"epochs": 2, "blocks": [2, -1], "output": "a.pth", "train_fingerprint": "abc"}
    first = {"epoch": 1, "stage": "only", "loss": {"box": 2.0, "class": 1.5}, "val": {}}
    second = {"epoch": 2, "stage": "only", "loss": {"box": 1.0, "class": 0.5}, "val": {"AP50": 0.25}}

    def trained(folder, **changes):
        return record_of("m", AP50=0.5, conditions=settings | {"run_dir": str(folder), "epoch": 2} | changes)

    (tmp_path / "log.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    loss, ap50 = drawn(charts.training, trained("no/folder"), trained(tmp_path)).axes
    assert [len(line.get_ydata()) for line in loss.lines] == [0, 2]
    assert list(loss.lines[1].get_ydata()) == [3.5, 1.5] and list(ap50.lines[1].get_ydata()) == [0.25]
    for later in ({"epochs": 3}, {"output": "b.pth"}, {"train_fingerprint": "other images"}):
        assert charts.read_log(trained(tmp_path, **later)) == []
    for file in ("log.jsonl", "settings.json"):  # damaged: the other charts are drawn
        (tmp_path / file).write_text('{"epoch": 1, ')
        assert charts.read_log(trained(tmp_path)) == []
