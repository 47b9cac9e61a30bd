"""Charts of validation results: readable without colour, at half size, and with one model or ten. Imports no torch.

Each model keeps its colour, hatch, marker and line in every chart. No figure is registered with pyplot, so none has to
be closed and no window system is needed; the caller's settings of matplotlib stay as they are.
"""

import io
import itertools
import json
import textwrap
import warnings
from collections.abc import Mapping, Sequence
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
from matplotlib.ticker import LogLocator, MaxNLocator

from common.console import InputError, to_one_line
from common.evaluate.results import ValidationRecord, ValidationResults
from common.files import PROGRAM
from common.show.fonts import installed_fonts, print_missing
from common.show.tables import COLUMNS, short_names

Metrics = Mapping[str, tuple[str, str]]  # by label the part of a record and the number in it

HEADLINE = {column.heading: (column.part, column.keys[0]) for column in COLUMNS[:7]}
SIZES = {size: ("detection", f"AP_{size.split()[0]}") for size in ("small\n(< 32² px)", "medium", "large\n(> 96² px)")}
ERRORS = {kind: ("errors", kind) for kind in ("class", "localisation", "both", "duplicate", "background", "missed")}
COLOURS = sns.color_palette("colorblind")  # ten, distinguishable for colour-blind readers too
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # distinguish bars without colour
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
CHARTS = ("comparison", "precision_recall", "per_class", "confusion", "calibration", "training")
MAX_MODELS = len(COLOURS)  # drawn; no two of them look alike
MAX_CLASSES = 60  # drawn, those with most objects
CONFUSION_CLASSES = 15  # likewise, in a confusion matrix


def render(results: ValidationResults, dpi: int) -> dict[str, bytes]:
    """PNG files of every chart for which there are numbers, by name; names that no font can draw are printed.

    Raises:
        InputError: no model has numbers.
    """
    models, data = drawn_models(results), results.dataset
    print_missing([data.source, *data.class_names, *(record.name for record in models)])
    charts = [comparison, precision_recall, per_class]
    charts += [confusion] if any(record.diagnosis and record.diagnosis.confusion for record in models) else []
    charts += [calibration] if any(record.diagnosis for record in models) else []
    charts += [training] if any(map(read_log, models)) else []
    style = {"axes.grid": True, "grid.alpha": 0.4, "font.family": list(installed_fonts()), "text.parse_math": False}
    pages = {}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that no font has
        matplotlib.rcdefaults()  # the user's own settings may ask for LaTeX, or for fonts with few letters
        sns.set_theme(style="ticks", font_scale=0.95, rc=style)
        for chart in charts:
            stream = io.BytesIO()
            chart(results).savefig(stream, format="png", dpi=dpi, metadata={"Software": PROGRAM})
            pages[chart.__name__] = stream.getvalue()
    return pages


def drawn_models(results: ValidationResults) -> list[ValidationRecord]:
    """The models with numbers, at most MAX_MODELS of them, under short names.

    Raises:
        InputError: there are none.
    """
    short = short_names([record.name for record in results.models])
    named = [replace(record, name=name) for record, name in zip(results.models, short, strict=True)]
    models = [record for record in named if not record.error]
    if not models:
        raise InputError("no model with numbers to draw: every model has an error")
    return models[:MAX_MODELS]


def bar_style(position: int) -> dict:
    """Colour and hatch of the model at `position` among those drawn."""
    return {"facecolor": COLOURS[position], "hatch": HATCHES[position], "edgecolor": "black"}


def line_style(position: int, points: int = 0) -> dict:
    """The markers of that model, about ten of the points, joined by its line; without points single markers."""
    line = {"linestyle": LINES[position % len(LINES)] if points else "none", "markevery": max(1, points // 10)}
    return {"marker": MARKERS[position], "color": COLOURS[position], "markeredgecolor": "black"} | line


def draw_bars(axes: Axes, title: str, models: Sequence[ValidationRecord], metrics: Metrics) -> None:
    """Groups of bars, one per number, and in each one bar per model, with its value and, if known, its interval.

    `metrics` has, by the label of the group, the part of a record and the number in it; of "errors" the gain is drawn.
    """
    width = min(0.28, 0.84 / len(models))
    digits, size, angle = (2, 7, 90) if len(models) > 4 else (3, 9, 0)
    for position, record in enumerate(models):
        numbers = [_number(record, part, key) for part, key in metrics.values()]
        heights = np.array([number or 0.0 for number in numbers])
        ends = [record.interval(key) or (h, h) for (_, key), h in zip(metrics.values(), heights, strict=True)]
        spread = np.abs(np.array(ends).T - heights)
        bars = axes.bar(
            np.arange(len(metrics)) + width * (position - (len(models) - 1) / 2),
            heights,
            width * 0.94,
            yerr=spread if spread.any() else None,
            error_kw={"elinewidth": 1, "capsize": min(3, 12 * width)},
            linewidth=0.6,
            **bar_style(position),
        )
        texts = ["–" if number is None else f"{number:.{digits}f}" for number in numbers]
        axes.bar_label(bars, texts, padding=3, fontsize=size, rotation=angle)
    axes.set_xticks(range(len(metrics)), metrics)
    low, high = axes.dataLim.intervaly
    axes.set(title=title, xlim=(-0.5, len(metrics) - 0.5), ylim=(1.4 * min(0, low), max(0.06, 1.18 * high)))
    axes.grid(visible=False, axis="x")


def _number(record: ValidationRecord, part: str, key: str) -> float | None:
    if part != "errors":
        return record.number(part, key)
    return record.diagnosis.errors[key].gain if record.diagnosis else None


def draw_speed(axes: Axes, models: Sequence[ValidationRecord]) -> None:
    """mAP@0.5 with its interval against images per second, one marker per model, named by the figure's legend."""
    timed = [(position, r, r.cost) for position, r in enumerate(models) if r.cost]
    if not timed:
        axes.text(0.5, 0.5, "no speeds were measured", ha="center", transform=axes.transAxes, color="0.4")
        return axes.set_axis_off()
    for position, record, cost in timed:
        ap = record.number("detection", "AP50") or 0.0
        axes.plot([cost.images_per_s] * 2, record.interval("AP50") or [ap, ap], color="0.4", linewidth=1)
        axes.plot(cost.images_per_s, ap, **line_style(position), markersize=11)
    speeds, devices = [cost.images_per_s for *_, cost in timed], {cost.device for *_, cost in timed}
    axes.set(xscale="log", xlim=(min(speeds) / 3, max(speeds) * 3), ylim=(0, max(0.06, 1.1 * axes.get_ylim()[1])))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    device = f"\n{to_one_line(devices.pop(), 60)}" if len(devices) == 1 else ""
    axes.set(title="Accuracy against speed", xlabel=f"images per second{device}", ylabel="mAP@0.5")


def caption(results: ValidationResults, width: int = 150) -> str:
    """What the numbers were measured on, and which models are missing from the charts and why."""
    data, failed = results.dataset, [record for record in results.models if record.error]
    lines = [f"{data.images} validation images of {to_one_line(data.source, 100)}, {data.boxes} boxes"]
    if (evaluated := len(results.models) - len(failed)) > MAX_MODELS:
        lines.append(f"the first {MAX_MODELS} of {evaluated} models")
    for record in failed:
        text = f"{to_one_line(record.name)} was not evaluated: {to_one_line(record.error, 2 * width)}"
        lines += textwrap.wrap(text, width)[:2]
    return "\n".join(lines)


def _finish(figure: Figure, results: ValidationResults, more: str = "", legend: bool = True) -> Figure:
    """Caption, and a legend of the models in as many columns as their names allow, for which the figure grows."""
    text = "\n".join(filter(None, (caption(results, int(11.5 * figure.get_figwidth())), more)))
    figure.supxlabel(text, fontsize=9, color="0.3")
    if not legend:
        return figure
    names = [record.name for record in drawn_models(results)]
    keys: list[Any] = [(Patch(**bar_style(n)), Line2D([], [], **line_style(n))) for n in range(len(names))]
    columns = max(1, min(len(names), int(9.2 * figure.get_figwidth()) // (max(map(len, names)) + 12)))
    look: Any = {"frameon": False, "handlelength": 3.5, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.6)}}
    figure.legend(keys, names, loc="outside upper center", ncols=columns, **look)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(names) // columns))
    sns.despine(figure)
    return figure


def comparison(results: ValidationResults) -> Figure:
    """The study's metrics and `found`, AP by object size, accuracy against speed, and the costs of errors."""
    models = drawn_models(results)
    rows = ["aa", "bc", *["dd"] * any(record.diagnosis for record in models)]
    figure = Figure((13, 0.6 + 3.8 * len(rows)), layout="constrained")
    panels = figure.subplot_mosaic("\n".join(rows))
    title = "Primary object (first six) and detection of all objects (mAP@0.5), with 95% intervals where they are known"
    draw_bars(panels["a"], title, models, HEADLINE)
    draw_bars(panels["b"], "AP@[.5:.95] by object size", models, SIZES)
    draw_speed(panels["c"], models)
    if "d" in panels:
        title = "Cost of each kind of error: mAP@0.5 gained if this kind alone were corrected"
        draw_bars(panels["d"], title, models, ERRORS)
    return _finish(figure, results)


def precision_recall(results: ValidationResults) -> Figure:
    """Precision at each recall, the mean over the classes, at IoU 0.5 and 0.75."""
    figure = Figure((12, 5.6), layout="constrained")
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), ("0.5", "0.75"), strict=True):
        for position, record in enumerate(drawn_models(results)):
            curve = (record.detection and record.detection.precision_at_recall[iou]) or []
            axes.plot(np.linspace(0, 1, len(curve)), curve, **line_style(position, len(curve)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", title=f"IoU {iou}")
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _finish(figure, results)


def per_class(results: ValidationResults) -> Figure:
    """AP@0.5 of the classes with most objects, those with the highest on top."""
    data, per_model = results.dataset, [r.detection.per_class if r.detection else {} for r in drawn_models(results)]
    values = np.array([[c[name].AP50 if name in c else None for c in per_model] for name in data.class_names], float)
    known = np.nonzero(~np.isnan(values).all(1))[0]  # None became NaN
    counts = np.array(data.class_boxes or [1] * len(values))
    kept = known[np.argsort(-counts[known], kind="stable")][:MAX_CLASSES]
    kept = kept[np.argsort(np.nanmean(values[kept], 1), kind="stable")]
    figure = Figure((9, 1.6 + 0.19 * len(kept)), layout="constrained")
    axes = figure.subplots()
    axes.hlines(range(len(kept)), np.nanmin(values[kept], 1), np.nanmax(values[kept], 1), color="0.75", linewidth=1)
    for position, column in enumerate(values[kept].T):
        axes.plot(column, range(len(kept)), **line_style(position), markersize=6)
    names = short_names(data.class_names)
    axes.set_yticks(range(len(kept)), [names[k] for k in kept], fontsize=8)
    axes.set(ylim=(-0.7, len(kept) - 0.3), xlim=(-0.02, 1.02), xlabel="AP@0.5")
    more = f"the {MAX_CLASSES} of {len(known)} classes with most objects" if len(known) > MAX_CLASSES else ""
    return _finish(figure, results, more)


def confusion(results: ValidationResults) -> Figure:
    """The class that objects of the most frequent classes are detected as, for each model at its best-F1 score."""
    models = [(r.name, r.diagnosis) for r in drawn_models(results) if r.diagnosis and r.diagnosis.confusion]
    names, columns = short_names(results.dataset.class_names, 20), min(len(models), 3)
    rows = -(-len(models) // columns)
    figure = Figure((5.4 * columns + 0.8, 5.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, diagnosis), axes in zip(models, panels, strict=False):
        counts = np.array(diagnosis.confusion)
        kept = np.argsort(-counts[:-1].sum(1), kind="stable")[:CONFUSION_CLASSES]
        detected = counts[kept]
        others = detected[:, :-1].sum(1) - detected[:, kept].sum(1)
        detected = np.column_stack([detected[:, kept], others, detected[:, -1]])
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
    return _finish(figure, results, legend=False)


def calibration(results: ValidationResults) -> Figure:
    """Precision of detections by their score; on the diagonal the two are equal."""
    figure = Figure((7.5, 7), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for position, record in enumerate(drawn_models(results)):
        bins = record.diagnosis.calibration.bins if record.diagnosis else []
        axes.plot([b.score for b in bins], [b.precision for b in bins], **line_style(position, len(bins)))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision at IoU 0.5", aspect="equal")
    return _finish(figure, results)


def training(results: ValidationResults) -> Figure:
    """Loss and mAP@0.5 after each epoch of the models whose log still exists; the stages are parted by dotted lines."""
    figure = Figure((12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for position, record in enumerate(drawn_models(results)):
        log = read_log(record)
        numbers, line = [epoch["epoch"] for epoch in log], line_style(position, len(log))
        left.plot(numbers, [sum(epoch["loss"].values()) for epoch in log], **line)
        right.plot(numbers, [np.nan if (ap := epoch["val"]["AP50"]) is None else ap for epoch in log], **line)
        starts = [b["epoch"] for a, b in itertools.pairwise(log) if a["stage"] != b["stage"]]
        for axes, start in itertools.product((left, right), starts):
            axes.axvline(start - 0.5, color=line["color"], linewidth=0.8, linestyle=":")
    left.set(xlabel="epoch", ylabel="loss", title="Training loss, all terms")
    right.set(xlabel="epoch", ylabel="mAP@0.5", title="On the first validation images, at most 100", ylim=(0, None))
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, results)


def read_log(record: ValidationRecord) -> list[dict]:
    """The lines of the log of a model's training; none where its run folder is gone, or was used for another run."""
    folder, trained = Path(str(record.conditions.get("run_dir"))), json.loads(json.dumps(record.conditions))
    try:
        settings = json.loads((folder / "settings.json").read_bytes())
        lines = (folder / "log.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines] if settings.items() <= trained.items() else []
    except (OSError, ValueError):
        return []
