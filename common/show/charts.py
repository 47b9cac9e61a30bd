"""Charts of validation results: readable without colour, at half size, and with one model or ten.

Imports no torch. Each model keeps its colour, hatch, marker and line in every chart. No figure is registered with
pyplot, so none has to be closed and no window system is needed; the caller's settings of matplotlib stay as they are.
"""

import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.console import InputError, to_one_line
from common.evaluate.results import ValidationRecord, ValidationResults
from common.show import fonts
from common.show.tables import short_names

HEADLINE_METRICS = {
    "Accuracy": ("primary", "accuracy"),
    "Precision": ("primary", "precision"),
    "Recall": ("primary", "recall"),
    "F1": ("primary", "f1"),
    "Mean IoU": ("primary", "mean_iou"),
    "Found": ("primary", "found"),
    "mAP@0.5": ("detection", "AP50"),
}
SIZES = {
    "small\n(< 32² px)": ("detection", "AP_small"),
    "medium": ("detection", "AP_medium"),
    "large\n(> 96² px)": ("detection", "AP_large"),
}
ERRORS = {
    "wrong class": ("errors", "class"),
    "localisation": ("errors", "localisation"),
    "both": ("errors", "both"),
    "duplicate": ("errors", "duplicate"),
    "background": ("errors", "background"),
    "missed": ("errors", "missed"),
}
COLOURS = sns.color_palette("colorblind")  # ten, distinguishable for colour-blind readers too
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # distinguish bars without colour
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
MAX_MODELS = len(COLOURS)  # drawn; no two of them look alike
MAX_CLASSES = 60  # drawn, those with most objects
CONFUSION_CLASSES = 15  # classes that a confusion matrix shows by name

# In the record they are those of the model, in a run's settings.json those requested.
RESOLVED = ("backbone", "blocks", "head", "image_size")

Models = Sequence[ValidationRecord]


class Epoch(NamedTuple):
    """One line of a run's log; NaN for a number that does not exist."""

    number: int
    stage: str
    loss: float  # the sum of all terms
    ap50: float


def render(results: ValidationResults, dpi: int) -> dict[str, bytes]:
    """PNG files of every chart for which there are numbers, by name; names that fonts cannot draw are printed.

    Raises:
        InputError: no model with numbers.
    """
    models, names = drawn_models(results), _names(results)
    fonts.print_replaced(names)
    reasons = [f"{record.error} {record.number('cost', 'device')}" for record in results.models]
    texts = [to_one_line(text, 1000) for text in (*names, *reasons)]
    family = list(dict.fromkeys(name for text in texts for name, _ in fonts.fonts_for(text)))
    charts = [comparison, precision_recall, per_class]
    charts += [confusion] if any(record.diagnosis and record.diagnosis.confusion for record in models) else []
    charts += [calibration] if any(record.diagnosis for record in models) else []
    logs = logs_of(results)
    pages = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own settings may ask for LaTeX, or for fonts with few letters
        no_formulas = {"text.parse_math": False}  # "$" in a name does not start a formula
        sns.set_theme(style="ticks", font_scale=0.95, rc={"font.family": family} | no_formulas)
        figures = {chart.__name__: chart(results) for chart in charts}
        for name, figure in (figures | ({"training": training(results, logs)} if logs else {})).items():
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=dpi)
            pages[name] = stream.getvalue()
    return pages


def drawn_models(results: ValidationResults) -> list[ValidationRecord]:
    """The models with numbers, at most MAX_MODELS of them.

    Raises:
        InputError: there are none.
    """
    models = [record for record in results.models if not record.error]
    if not models:
        raise InputError("no model with numbers to draw: every model has an error")
    return models[:MAX_MODELS]


def bar_style(position: int) -> dict:
    """Colour and hatch of the model at `position` among those drawn."""
    return {"facecolor": COLOURS[position], "hatch": HATCHES[position], "edgecolor": "black"}


def marker_style(position: int) -> dict:
    """The scatter marker of that model."""
    look = {"marker": MARKERS[position], "color": COLOURS[position]}
    return look | {"markeredgecolor": "black", "linestyle": "none"}


def line_style(position: int, points: int) -> dict:
    """The line of that model, with about ten markers on it."""
    line = {"linestyle": LINES[position % len(LINES)], "markevery": max(1, points // 10), "markersize": 5}
    return marker_style(position) | line


def draw_bars(axes: Axes, models: Models, metrics: Mapping[str, tuple[str, str]]) -> None:
    """Groups of bars, one group per number and one bar per model, each with its value and, if known, its interval.

    Args:
        metrics: by the label of the group, the part of a record and the number in it; of "errors" the gain is drawn.
    """
    width = min(0.28, 0.84 / len(models))
    crowded = len(models) > 4
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    text |= {"rotation": 90, "fontsize": 7} if crowded else {"rotation": 0, "fontsize": 9}
    lowest, highest = 0.0, 0.05
    for position, record in enumerate(models):
        for group, (part, key) in enumerate(metrics.values()):
            value, interval = _number(record, part, key), record.interval(key)
            x, top = group + width * (position - (len(models) - 1) / 2), value or 0.0
            axes.bar(x, top, width * 0.94, linewidth=0.6, **bar_style(position))
            if value is not None and interval:
                spread = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
                axes.errorbar(x, value, spread, color="black", linewidth=1, capsize=min(3, 12 * width))
                top = max(top, interval[1])
            label = "–" if value is None else f"{value:.2f}" if crowded else f"{value:.3f}"
            axes.annotate(label, (x, max(top, 0)), (0, 3), **text)
            lowest, highest = min(lowest, value or 0.0), max(highest, top)
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(1.1 * lowest, highest * (1.22 if crowded else 1.14))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)


def _number(record: ValidationRecord, part: str, key: str) -> float | None:
    if part != "errors":
        return record.number(part, key)
    return record.diagnosis.errors[key].gain if record.diagnosis else None


def draw_speed(axes: Axes, models: Models) -> None:
    """mAP@0.5 with its interval against images per second, one marker per model, named by the figure's legend."""
    places = {position: r for position, r in enumerate(models) if r.cost and r.detection}
    timed = [(place, r, r.cost, r.detection.AP50 or 0.0) for place, r in places.items() if r.cost and r.detection]
    if not timed:
        axes.text(0.5, 0.5, "no speeds were measured", ha="center", transform=axes.transAxes, color="0.4")
        axes.set_axis_off()
        return
    tops = [0.05]
    for position, record, cost, ap in timed:
        ends = record.interval("AP50") or [ap, ap]
        axes.plot([cost.images_per_s] * 2, ends, color="0.4", linewidth=1)
        axes.plot(cost.images_per_s, ap, **marker_style(position), markersize=11)
        tops += [ap, ends[1]]
    speeds, devices = [cost.images_per_s for _, _, cost, _ in timed], {cost.device for _, _, cost, _ in timed}
    axes.set_xscale("log")
    low, high = min(speeds) / 3, max(speeds) * 3
    axes.set_xlim(low, high)
    ticks = [t * 10**e for e in range(-3, 5) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(tops))
    axes.set_xlabel("images per second" + (f"\n{_text(devices.pop(), 60)}" if len(devices) == 1 else ""))
    axes.set_ylabel("mAP@0.5")
    axes.grid(alpha=0.4)


def caption(results: ValidationResults, width: int = 150) -> str:
    """What the numbers were measured on, and which models are missing from the charts and why."""
    data, evaluated = results.dataset, sum(not record.error for record in results.models)
    lines = [f"{data.images} validation images of {_text(data.source, 100)}, {data.boxes} boxes"]
    if evaluated > MAX_MODELS:
        lines.append(f"the first {MAX_MODELS} of {evaluated} models")
    for record in results.models:
        if record.error:
            text = f"{_text(record.name)} was not evaluated: {_text(record.error, 2 * width)}"
            lines += textwrap.wrap(text, width)[:2]
    return "\n".join(lines)


def _names(results: ValidationResults) -> list[str]:
    """All names that the charts show: of the data, its classes and the models."""
    return [results.dataset.source, *results.dataset.class_names, *(record.name for record in results.models)]


def _text(text: object, width: int = 40) -> str:
    """The text as the fonts can draw it, on one line of at most `width` characters."""
    return fonts.drawable(to_one_line(text, width))


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure((width, height), layout="constrained")


def _add_caption(figure: Figure, results: ValidationResults, more: str = "") -> None:
    text = caption(results, int(11.5 * figure.get_figwidth()))
    figure.supxlabel("\n".join(filter(None, (text, more))), fontsize=9, color="0.3")


def _finish(figure: Figure, results: ValidationResults, places: Sequence[int] | None = None, more: str = "") -> Figure:
    """Caption, and a legend of the models at these places (None = all) in as many columns as their names allow."""
    models = drawn_models(results)
    short = short_names([record.name for record in models])
    places = range(len(models)) if places is None else places
    names = [fonts.drawable(short[place]) for place in places]
    keys: list[Any] = [(Patch(**bar_style(place)), Line2D([], [], **marker_style(place))) for place in places]
    characters = int(9.2 * figure.get_figwidth())
    sns.despine(figure)
    figure.legend(
        keys,
        names,
        loc="outside upper center",
        ncols=max(1, min(len(names), characters // (max(map(len, names)) + 12))),
        frameon=False,
        handlelength=3.5,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
    )
    _add_caption(figure, results, more)
    return figure


def comparison(results: ValidationResults) -> Figure:
    """The study's metrics and `found`, AP by object size, accuracy against speed, and the costs of errors."""
    models = drawn_models(results)
    diagnosed = any(record.diagnosis for record in models)
    figure = _figure(13, 12 if diagnosed else 8.6)
    grid = figure.add_gridspec(2 + diagnosed, 2, height_ratios=(1.1, 1, 1)[: 2 + diagnosed])
    wide, left, right = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    draw_bars(wide, models, HEADLINE_METRICS)
    with_intervals = ", with 95% intervals" if any(record.intervals for record in models) else ""
    wide.set_title(f"Primary object (first six) and detection of all objects (mAP@0.5){with_intervals}")
    draw_bars(left, models, SIZES)
    left.set_title("AP@[.5:.95] by object size")
    draw_speed(right, models)
    right.set_title("Accuracy against speed")
    if diagnosed:
        lower = figure.add_subplot(grid[2, :])
        draw_bars(lower, models, ERRORS)
        lower.set_title("Cost of each kind of error: mAP@0.5 gained if this kind alone were corrected")
    return _finish(figure, results)


def precision_recall(results: ValidationResults) -> Figure:
    """Precision at each recall, the mean over the classes, at IoU 0.5 and 0.75."""
    figure = _figure(12, 5.6)
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), ("0.5", "0.75"), strict=True):
        for position, record in enumerate(drawn_models(results)):
            curve = record.detection.precision_at_recall[iou] if record.detection else None
            axes.plot(np.linspace(0, 1, len(curve or ())), curve or (), **line_style(position, len(curve or ())))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", title=f"IoU {iou}")
        axes.grid(alpha=0.4)
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _finish(figure, results)


def per_class(results: ValidationResults) -> Figure:
    """AP@0.5 of the classes with most objects, those with the highest on top."""
    models, names = drawn_models(results), results.dataset.class_names
    counts = np.array(results.dataset.class_boxes or np.ones(len(names)))
    values = np.array(
        [[_class_number(record, name) for record in models] for name in names], np.float64
    )  # None becomes NaN
    kept = np.nonzero(~np.isnan(values).all(1))[0]
    total = len(kept)
    kept = kept[np.argsort(-counts[kept], kind="stable")][:MAX_CLASSES]
    kept = kept[np.argsort(np.nanmean(values[kept], 1), kind="stable")]
    labels = fonts.class_labels(names)
    figure = _figure(9, 2.2 + 0.19 * len(kept))
    axes = figure.subplots()
    for height, row in enumerate(values[kept]):
        axes.plot([np.nanmin(row), np.nanmax(row)], [height, height], color="0.75", linewidth=1, zorder=0)
    for position, column in enumerate(values[kept].T):
        axes.plot(column, range(len(kept)), **marker_style(position), markersize=6)
    axes.set_yticks(range(len(kept)), [labels[k] for k in kept], fontsize=8)
    axes.set(ylim=(-0.7, len(kept) - 0.3), xlim=(-0.02, 1.02), xlabel="AP@0.5")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.4)
    more = f"the {MAX_CLASSES} of {total} classes with most objects" if total > MAX_CLASSES else ""
    return _finish(figure, results, more=more)


def _class_number(record: ValidationRecord, name: str) -> float | None:
    found = record.detection.per_class.get(name) if record.detection else None
    return found.AP50 if found else None


def confusion(results: ValidationResults) -> Figure:
    """The class that objects of the most frequent classes are detected as, for each model at its best-F1 score."""
    models = [(r.name, r.diagnosis) for r in drawn_models(results) if r.diagnosis and r.diagnosis.confusion]
    titles = short_names([name for name, _ in models], 36)
    names = fonts.class_labels(results.dataset.class_names)
    columns = min(len(models), 3)
    rows = -(-len(models) // columns)
    figure = _figure(5.4 * columns + 0.8, 5.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (_, diagnosis), title in zip(panels, models, titles, strict=False):
        counts, labels = _most_frequent(np.array(diagnosis.confusion, np.float64), names)
        fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        fractions[-1] = np.nan  # background has no objects, so no fraction of them
        image = axes.imshow(fractions, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), [*labels[:-1], "missed"], rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels) - 1), labels[:-1], fontsize=8)
        axes.set_ylim(len(labels) - 1.5, -0.5)
        score = diagnosis.operating_point.score or 0
        axes.set_title(f"{fonts.drawable(title)}\nscores from {score:.2f}", fontsize=10)
        axes.set(xlabel="detected as", ylabel="object")
    for axes in figure.axes[len(models) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="fraction of the class's objects")
    _add_caption(figure, results)
    return figure


def _most_frequent(counts: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The rows and columns of the classes with most objects, the others added up, background last."""
    kept = np.argsort(-counts[:-1].sum(1), kind="stable")[:CONFUSION_CLASSES]
    place = np.full(len(counts), len(kept))  # the others
    place[kept] = np.arange(len(kept))
    place[-1] = len(kept) + 1
    merged = np.zeros((len(kept) + 2,) * 2)
    np.add.at(merged, (place[:, None], place[None, :]), counts)
    labels = [names[k] for k in kept]
    if len(counts) - 1 > len(kept):
        return merged, [*labels, "others", "background"]
    chosen = np.array([*range(len(kept)), len(kept) + 1])
    return merged[np.ix_(chosen, chosen)], [*labels, "background"]


def calibration(results: ValidationResults) -> Figure:
    """Precision of detections by their score; on the diagonal the two are equal."""
    figure = _figure(7.5, 7)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for position, record in enumerate(drawn_models(results)):
        bins = record.diagnosis.calibration.bins if record.diagnosis else []
        line = line_style(position, len(bins)) | {"markersize": 7}
        axes.plot([b.score for b in bins], [b.precision for b in bins], **line)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision at IoU 0.5")
    axes.set_aspect("equal")
    axes.grid(alpha=0.4)
    return _finish(figure, results)


def training(results: ValidationResults, logs: dict[int, list[Epoch]]) -> Figure:
    """Loss and mAP@0.5 after each epoch of the models that have a log, as `logs_of` returns them; at least one."""
    figure = _figure(12, 5.2)
    left, right = figure.subplots(1, 2)
    for position, log in logs.items():
        numbers, line = [epoch.number for epoch in log], line_style(position, len(log))
        left.plot(numbers, [epoch.loss for epoch in log], **line)
        right.plot(numbers, [epoch.ap50 for epoch in log], **line)
        starts = [b.number for a, b in itertools.pairwise(log) if a.stage != b.stage]
        for axes, start in itertools.product((left, right), starts):
            axes.axvline(start - 0.5, color=line["color"], linewidth=0.8, linestyle=":")
    left.set(xlabel="epoch", ylabel="loss", title="Training loss, all terms")
    right.set(xlabel="epoch", ylabel="mAP@0.5", title="On the first validation images, at most 100")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.4)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _finish(figure, results, list(logs))


def logs_of(results: ValidationResults) -> dict[int, list[Epoch]]:
    """The training log of each model, by its place among those drawn.

    The run folder that a record names may have been deleted, or used again by a later run: the log is taken only where
    the settings beside it are those of the record. If they are not, or the log cannot be read, a line says so.
    """
    logs = {}
    for position, record in enumerate(drawn_models(results)):
        folder = Path(str(record.conditions.get("run_dir")))
        trained = json.loads(json.dumps(record.conditions, default=str))  # tuples become lists
        try:
            settings = json.loads((folder / "settings.json").read_bytes())
            changed = [k for k, v in settings.items() if k not in RESOLVED and trained.get(k, v) != v]
            if changed:
                raise ValueError(f"the settings in {folder} are not those of its training: {', '.join(changed)}")
            lines = (folder / "log.jsonl").read_bytes().splitlines()
            logs[position] = [_epoch(json.loads(line)) for line in lines if line.strip()]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{to_one_line(record.name)}: no training curve: {to_one_line(error, 200)}")
    return logs


def _epoch(line: dict) -> Epoch:
    ap50 = line["val"].get("AP50")
    return Epoch(
        int(line["epoch"]),
        str(line.get("stage")),
        float(sum(line["loss"].values())),
        np.nan if ap50 is None else float(ap50),
    )
