"""Charts of validation results: readable without colour, at half size, and with one model or ten. Imports no torch.

Each model keeps its colour, hatch, marker and line in every chart. No figure is registered with pyplot, so none has to
be closed and no window system is needed; the caller's settings of matplotlib stay as they are.

A chart is a function of the models that are drawn and the data set. It returns None where it has nothing to show.
"""

import io
import itertools
import json
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from common.console import InputError, to_one_line
from common.evaluate.results import DataDescription, ValidationRecord, ValidationResults
from common.files import PROGRAM
from common.show.fonts import installed_fonts, print_missing
from common.show.tables import COLUMNS, short_names

Models = Sequence[ValidationRecord]

HEADLINE = COLUMNS[:7]
SIZES = {"small\n(< 32² px)": "AP_small", "medium": "AP_medium", "large\n(> 96² px)": "AP_large"}
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")
COLOURS = sns.color_palette("colorblind")  # ten, distinguishable for colour-blind readers too
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # distinguish bars without colour
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
MAX_MODELS = len(COLOURS)  # drawn; no two of them look alike
MAX_CLASSES = 60  # drawn, those with most objects
CONFUSION_CLASSES = 15  # likewise, in a confusion matrix


def render(results: ValidationResults, dpi: int) -> dict[str, bytes]:
    """PNG files of every chart for which there are numbers, by name; names that no font can draw are printed.

    Raises InputError where no model has numbers.
    """
    models, data = drawn_models(results), results.dataset
    print_missing([data.source, *data.class_names, *(record.name for record in models)])
    style: dict[str, Any] = {"axes.grid": True, "grid.alpha": 0.4, "axes.spines.right": False, "axes.spines.top": False}
    style |= {"font.family": list(installed_fonts()), "text.parse_math": False}
    pages = {}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that no font has
        matplotlib.rcdefaults()  # the user's own settings may ask for LaTeX, or for fonts with few letters
        sns.set_theme(style="ticks", font_scale=0.95, rc=style)
        for name, chart in CHARTS.items():
            if figure := chart(models, data):
                figure.supxlabel(caption(results, int(11.5 * figure.get_figwidth())), fontsize=9, color="0.3")
                stream = io.BytesIO()
                figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": PROGRAM})
                pages[name] = stream.getvalue()
    return pages


def drawn_models(results: ValidationResults) -> Models:
    """The models with numbers, the first MAX_MODELS of them, under short names. Raises InputError where none has."""
    named = zip(results.models, short_names([record.name for record in results.models]), strict=True)
    if models := [replace(record, name=name) for record, name in named if not record.error]:
        return models[:MAX_MODELS]
    raise InputError("no model with numbers to draw: every model has an error")


def caption(results: ValidationResults, width: int = 150) -> str:
    """What the numbers were measured on, and which models are missing from the charts and why."""
    data, failed = results.dataset, [record for record in results.models if record.error]
    lines = [f"{data.images} images of {to_one_line(data.source, 100)} ({data.split}), {data.boxes} boxes"]
    if (evaluated := len(results.models) - len(failed)) > MAX_MODELS:
        lines.append(f"the first {MAX_MODELS} of {evaluated} models")
    for r in failed:
        lines += textwrap.wrap(f"{to_one_line(r.name)} was not evaluated: {to_one_line(r.error, 2 * width)}", width)[:2]
    return "\n".join(lines)


def bar_style(place: int) -> dict[str, Any]:
    """Colour and hatch of the model at `place` among those drawn."""
    return {"facecolor": COLOURS[place], "hatch": HATCHES[place], "edgecolor": "black"}


def line_style(place: int, points: int = 0) -> dict[str, Any]:
    """The markers of that model, about ten of the points, joined by its line; without points single markers."""
    line = {"linestyle": LINES[place % len(LINES)] if points else "none", "markevery": max(1, points // 10)}
    return {"marker": MARKERS[place], "color": COLOURS[place], "markeredgecolor": "black"} | line


def _add_legend(figure: Figure, models: Models) -> Figure:
    """A legend in as many columns as the names allow, for which the figure grows."""
    keys: list[Any] = [(Patch(**bar_style(n)), Line2D([], [], **line_style(n))) for n in range(len(models))]
    names = [record.name for record in models]
    columns = max(1, min(len(names), int(9.2 * figure.get_figwidth()) // (max(map(len, names)) + 12)))
    look: Any = {"frameon": False, "handlelength": 3.5, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.6)}}
    figure.legend(keys, names, loc="outside upper center", ncols=columns, **look)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(names) // columns))
    return figure


def draw_bars(axes: Axes, title: str, labels: Iterable[str], numbers: Sequence, intervals: Sequence = ()) -> None:
    """A group of bars for each label, in it one bar a model, with its number and, where it is known, its interval.

    Shapes: numbers (M, G) for M models and G labels, None where one does not exist; intervals (M, G, 2), likewise NaN.
    """
    values = np.array(numbers, float)  # None becomes NaN
    count, groups = values.shape
    width = min(0.28, 0.84 / count)
    digits, size, angle = (2, 7, 90) if count > 4 else (3, 9, 0)
    for place, heights in enumerate(np.nan_to_num(values)):
        spread = np.nan_to_num(np.abs(np.transpose(intervals[place]) - heights)) if len(intervals) else np.zeros(2)
        bars = axes.bar(
            np.arange(groups) + width * (place - (count - 1) / 2),
            heights,
            width * 0.94,
            yerr=spread if spread.any() else None,
            error_kw={"elinewidth": 1, "capsize": min(3, 12 * width)},
            linewidth=0.6,
            **bar_style(place),
        )
        texts = ["–" if np.isnan(number) else f"{number:.{digits}f}" for number in values[place]]
        axes.bar_label(bars, texts, padding=3, fontsize=size, rotation=angle)
    axes.set_xticks(range(groups), labels)
    low, high = axes.dataLim.intervaly
    axes.set(title=title, xlim=(-0.5, groups - 0.5), ylim=(1.4 * min(0, low), max(0.06, 1.18 * high)))
    axes.grid(visible=False, axis="x")


def draw_speed(axes: Axes, models: Models) -> None:
    """mAP@0.5 with its interval against images per second, one marker for each model that was timed."""
    timed = [(place, r, r.cost) for place, r in enumerate(models) if r.cost]
    for place, record, cost in timed:
        ap = record.number("detection", "AP50") or 0.0
        axes.plot([cost.images_per_s] * 2, record.interval("AP50") or [ap, ap], color="0.4", linewidth=1)
        axes.plot(cost.images_per_s, ap, **line_style(place), markersize=11)
    speeds, devices = [cost.images_per_s for *_, cost in timed], {cost.device for *_, cost in timed}
    axes.set(xscale="log", xlim=(min(speeds) / 3, max(speeds) * 3), ylim=(0, max(0.06, 1.1 * axes.get_ylim()[1])))
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    device = f"\n{to_one_line(devices.pop(), 60)}" if len(devices) == 1 else ""
    axes.set(title="Accuracy against speed", xlabel=f"images per second{device}", ylabel="mAP@0.5")


def comparison(models: Models, _: DataDescription) -> Figure:
    """The study's metrics and `found`, AP by object size, accuracy against speed, and the costs of errors."""
    rows = ["aa", "bc" if any(record.cost for record in models) else "bb"]
    rows += ["dd"] * any(record.diagnosis for record in models)
    figure = Figure((13, 0.6 + 3.8 * len(rows)), layout="constrained")
    panels = figure.subplot_mosaic("\n".join(rows))
    title = "Primary object (first six) and detection of all objects (mAP@0.5), with 95% intervals where they are known"
    numbers = [[record.number(column.part, column.keys[0]) for column in HEADLINE] for record in models]
    intervals = [[record.interval(column.keys[0]) or [np.nan] * 2 for column in HEADLINE] for record in models]
    draw_bars(panels["a"], title, [column.heading for column in HEADLINE], numbers, intervals)
    sizes = [[record.number("detection", key) for key in SIZES.values()] for record in models]
    draw_bars(panels["b"], "AP@[.5:.95] by object size", SIZES, sizes)
    if "c" in panels:
        draw_speed(panels["c"], models)
    if "d" in panels:
        gains = [[r.diagnosis.errors[kind].gain if r.diagnosis else None for kind in ERRORS] for r in models]
        draw_bars(panels["d"], "Cost of each kind of error: mAP@0.5 gained if it alone were corrected", ERRORS, gains)
    return _add_legend(figure, models)


def precision_recall(models: Models, _: DataDescription) -> Figure:
    """Precision at each recall, the mean over the classes, at IoU 0.5 and 0.75."""
    figure = Figure((12, 5.6), layout="constrained")
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), ("0.5", "0.75"), strict=True):
        for place, record in enumerate(models):
            curve = (record.detection and record.detection.precision_at_recall[iou]) or []
            axes.plot(np.linspace(0, 1, len(curve)), curve, **line_style(place, len(curve)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", title=f"IoU {iou}")
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _add_legend(figure, models)


def per_class(models: Models, data: DataDescription) -> Figure:
    """AP@0.5 of the classes with most objects, those with the highest on top."""
    columns = [record.detection.per_class if record.detection else {} for record in models]
    values = np.array([[c[name].AP50 if name in c else None for c in columns] for name in data.class_names], float)
    known = np.nonzero(~np.isnan(values).all(1))[0]
    counts = np.array(data.class_boxes or [1] * len(values))
    kept = known[np.argsort(-counts[known], kind="stable")][:MAX_CLASSES]
    kept = kept[np.argsort(np.nanmean(values[kept], 1), kind="stable")]
    figure = Figure((9, 1.6 + 0.19 * len(kept)), layout="constrained")
    axes = figure.subplots()
    axes.hlines(range(len(kept)), np.nanmin(values[kept], 1), np.nanmax(values[kept], 1), color="0.75", linewidth=1)
    for place, column in enumerate(values[kept].T):
        axes.plot(column, range(len(kept)), **line_style(place), markersize=6)
    axes.set_yticks(range(len(kept)), np.array(short_names(data.class_names))[kept], fontsize=8)
    axes.set(ylim=(-0.7, len(kept) - 0.3), xlim=(-0.02, 1.02), xlabel="AP@0.5")
    if len(known) > MAX_CLASSES:
        axes.set_title(f"the {MAX_CLASSES} of {len(known)} classes with most objects")
    return _add_legend(figure, models)


def confusion(models: Models, data: DataDescription) -> Figure | None:
    """The class that objects of the most frequent classes are detected as, for each model at its best-F1 score."""
    diagnoses = {r.name: r.diagnosis for r in models if r.diagnosis and r.diagnosis.confusion}
    if not diagnoses:
        return None
    names, columns = short_names(data.class_names, 20), min(len(diagnoses), 3)
    rows = -(-len(diagnoses) // columns)
    figure = Figure((5.4 * columns + 0.8, 5.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, diagnosis), axes in zip(diagnoses.items(), panels, strict=False):
        counts = np.array(diagnosis.confusion)
        kept = np.argsort(-counts[:-1].sum(1), kind="stable")[:CONFUSION_CLASSES]
        others = counts[kept, :-1].sum(1) - counts[np.ix_(kept, kept)].sum(1)
        detected = np.column_stack([counts[np.ix_(kept, kept)], others, counts[kept, -1]])
        image = axes.imshow(detected / np.maximum(detected.sum(1, keepdims=True), 1), cmap="cividis", vmin=0, vmax=1)
        labels = [names[k] for k in kept]
        axes.set_xticks(range(len(kept) + 2), [*labels, "others", "missed"], rotation=90, fontsize=8)
        axes.set_yticks(range(len(kept)), labels, fontsize=8)
        axes.set_title(f"{name}\nscores from {diagnosis.operating_point.score or 0:.2f}", fontsize=10)
        axes.set(xlabel="detected as", ylabel="object")
        axes.grid(visible=False)
    for axes in panels:
        axes.set_visible(False)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="fraction of the class's objects")
    return figure


def calibration(models: Models, _: DataDescription) -> Figure | None:
    """Precision of detections by their score; on the diagonal the two are equal."""
    if not any(record.diagnosis for record in models):
        return None
    figure = Figure((7.5, 7), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for place, record in enumerate(models):
        bins = record.diagnosis.calibration.bins if record.diagnosis else []
        axes.plot([b.score for b in bins], [b.precision for b in bins], **line_style(place, len(bins)))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision at IoU 0.5", aspect="equal")
    return _add_legend(figure, models)


def training(models: Models, _: DataDescription) -> Figure | None:
    """Loss, and mAP@0.5 where epochs were validated, of the models whose log still exists; dotted lines part stages."""
    logs = [read_log(record) for record in models]
    if not any(logs):
        return None
    figure = Figure((12, 5.2), layout="constrained")
    left, *right = figure.subplots(1, 1 + any(epoch["val"] for log in logs for epoch in log), squeeze=False)[0]
    for place, log in enumerate(logs):
        line, validated = line_style(place, len(log)), [epoch for epoch in log if epoch["val"]]
        left.plot([epoch["epoch"] for epoch in log], [sum(epoch["loss"].values()) for epoch in log], **line)
        for axes in right:
            numbers = np.array([(epoch["epoch"], epoch["val"]["AP50"]) for epoch in validated], float).reshape(-1, 2)
            axes.plot(*numbers.T, **line)
            axes.set(xlabel="epoch", ylabel="mAP@0.5", title="On the validation images", ylim=(0, None))
        starts = [b["epoch"] for a, b in itertools.pairwise(log) if a["stage"] != b["stage"]]
        for axes, start in itertools.product(figure.axes, starts):
            axes.axvline(start - 0.5, color=line["color"], linewidth=0.8, linestyle=":")
    left.set(xlabel="epoch", ylabel="loss", title="Training loss, all terms")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _add_legend(figure, models)


def read_log(record: ValidationRecord) -> list[dict]:
    """The lines of the log of a model's training; none where its run folder is gone, or was used for another run."""
    folder, trained = Path(str(record.conditions.get("run_dir"))), json.loads(json.dumps(record.conditions))
    try:
        settings = json.loads((folder / "settings.json").read_bytes())
        lines = (folder / "log.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines] if settings.items() <= trained.items() else []
    except (OSError, ValueError):
        return []


CHARTS = {f.__name__: f for f in (comparison, precision_recall, per_class, confusion, calibration, training)}
