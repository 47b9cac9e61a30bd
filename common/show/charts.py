"""Figures of validation results: readable without colour, at half size, and with one model or ten.

Imports no torch. Each model keeps its colour, hatch, marker and line in every figure. No figure is registered with
pyplot, so none has to be closed and no window system is needed.
"""

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
from common.files import is_file
from common.show import fonts
from common.show.tables import interval_of, list_of, number_of, value_of

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
    "wrong class": ("diagnosis", "errors", "class", "gain"),
    "localisation": ("diagnosis", "errors", "localisation", "gain"),
    "both": ("diagnosis", "errors", "both", "gain"),
    "duplicate": ("diagnosis", "errors", "duplicate", "gain"),
    "background": ("diagnosis", "errors", "background", "gain"),
    "missed": ("diagnosis", "errors", "missed", "gain"),
}
COLOURS = sns.color_palette("colorblind")  # distinguishable for colour-blind readers too
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # distinguish bars without colour
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
CONFUSION_CLASSES = 15  # classes that a confusion matrix shows by name

# In the record they are those of the model, in a run's settings.json those requested; flip is the evaluation's.
RESOLVED = ("backbone", "blocks", "flip", "head", "image_size")

Models = Sequence[ValidationRecord]


def bar_style(position: int) -> dict:
    """Colour and hatch of the model at `position` among those with numbers."""
    colour, hatch = COLOURS[position % len(COLOURS)], HATCHES[position % len(HATCHES)]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "black"}


def marker_style(position: int) -> dict:
    """The scatter marker of that model."""
    colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
    return {"marker": marker, "color": colour, "markeredgecolor": "black", "linestyle": "none"}


def line_style(position: int, points: int) -> dict:
    """The line of that model, with about ten markers on it."""
    line = {"linestyle": LINES[position % len(LINES)], "markevery": max(1, points // 10), "markersize": 5}
    return marker_style(position) | line


def draw_bars(axes: Axes, models: Models, groups: Mapping[str, tuple[str, ...]]) -> None:
    """Groups of bars, one group per number and one bar per model, each with its value and, if known, its interval.

    Args:
        groups: by the label of the group, the keys of its number in a record.
    """
    width = min(0.28, 0.84 / len(models))
    crowded = len(models) > 4
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    text |= {"rotation": 90, "fontsize": 7} if crowded else {"rotation": 0, "fontsize": 9}
    lowest, highest = 0.0, 0.05
    for position, record in enumerate(models):
        for group, keys in enumerate(groups.values()):
            value, interval = number_of(record, *keys), interval_of(record, keys[-1])
            x, top = group + width * (position - (len(models) - 1) / 2), value or 0.0
            axes.bar(x, top, width * 0.94, linewidth=0.6, **bar_style(position))
            if value is not None and interval:
                low, high = interval
                spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(x, value, spread, color="black", linewidth=1, capsize=min(3, 12 * width))
                top = max(top, high)
            label = "–" if value is None else f"{value:.2f}" if crowded else f"{value:.3f}"
            axes.annotate(label, (x, max(top, 0)), (0, 3), **text)
            lowest, highest = min(lowest, value or 0.0), max(highest, top)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(1.1 * lowest, highest * (1.22 if crowded else 1.14))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)


def draw_speed(axes: Axes, models: Models) -> None:
    """mAP@0.5 with its interval against images per second, one marker per model, named by the figure's legend."""
    speeds, tops, devices = [], [0.05], set()
    for position, record in enumerate(models):
        speed, ap = number_of(record, "cost", "images_per_s"), number_of(record, "detection", "AP50")
        if speed is None or speed <= 0 or ap is None:
            continue
        low, high = interval_of(record, "AP50") or (ap, ap)
        axes.plot([speed, speed], [low, high], color="0.4", linewidth=1)
        axes.plot(speed, ap, **marker_style(position), markersize=11)
        speeds.append(speed)
        tops += [ap, high]
        devices.add(_text(value_of(record, "cost", "device"), 60))
    if not speeds:
        axes.text(0.5, 0.5, "no speeds were measured", ha="center", transform=axes.transAxes, color="0.4")
        axes.set_axis_off()
        return
    axes.set_xscale("log")
    low, high = min(speeds) / 3, max(speeds) * 3
    axes.set_xlim(low, high)
    ticks = [t * 10**e for e in range(-3, 5) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(tops))
    axes.set_xlabel("images per second" + (f"\n{devices.pop()}" if len(devices) == 1 else ""))
    axes.set_ylabel("mAP@0.5")
    axes.grid(alpha=0.4)


def caption(results: ValidationResults, width: int = 150) -> str:
    """What the numbers were measured on, and which models are missing from the chart and why."""
    images, source, boxes = (_text(results.dataset.get(key, "?"), 100) for key in ("images", "source", "boxes"))
    lines = [f"{images} validation images of {source}, {boxes} boxes"]
    for record in results.models:
        if record.error:
            lines += textwrap.wrap(f"{_text(record.name)} was not evaluated: {_text(record.error, 2 * width)}", width)[
                :2
            ]
    return "\n".join(lines)


def evaluated(results: ValidationResults) -> list[ValidationRecord]:
    """The models with numbers.

    Raises:
        InputError: there are none.
    """
    models = [record for record in results.models if not record.error]
    if not models:
        raise InputError("no model with numbers to draw: every model has an error")
    return models


def _figure(results: ValidationResults, width: float, height: float) -> Figure:
    """An empty figure for these results; sizes in inches."""
    matplotlib.rcdefaults()  # the user's own settings may ask for LaTeX, or for fonts with few letters
    reasons = [f"{record.error} {value_of(record, 'cost', 'device')}" for record in results.models]
    family = fonts.font_names("".join(to_one_line(text, 1000) for text in (*_names(results), *reasons)))
    no_formulas = {"text.parse_math": False}  # "$" in a name does not start a formula
    sns.set_theme(style="ticks", font_scale=0.95, rc={"font.family": family} | no_formulas)
    return Figure((width, height), layout="constrained")


def _names(results: ValidationResults) -> list[str]:
    """All names that the charts show: of the data, its classes and the models."""
    return [*map(str, (results.dataset.get("source"), *_class_names(results))), *(r.name for r in results.models)]


def _class_names(results: ValidationResults) -> list[str]:
    """The names of the classes, in the order of their labels; empty where the results lack them."""
    names = results.dataset.get("class_names")
    return list(map(str, names)) if isinstance(names, list | tuple) else []


def _text(text: object, width: int = 40) -> str:
    """The text as the fonts can draw it, on one line of at most `width` characters."""
    return fonts.drawable(to_one_line(text, width))


def _numbers(values: Sequence[object]) -> np.ndarray:
    """(N,) float64, NaN for what is not a number."""
    return np.array([v if isinstance(v, int | float) and abs(v) <= 1 else np.nan for v in values], np.float64)


def _add_caption(figure: Figure, results: ValidationResults) -> None:
    figure.supxlabel(caption(results, int(11.5 * figure.get_figwidth())), fontsize=9, color="0.3")


def _finish(figure: Figure, results: ValidationResults, shown: dict[int, ValidationRecord] | None = None) -> Figure:
    """Caption, and a legend of the models shown (by position; None = all) in as many columns as their names allow."""
    shown = dict(enumerate(evaluated(results))) if shown is None else shown
    names = [_text(record.name) for record in shown.values()]
    keys: list[Any] = [(Patch(**bar_style(place)), Line2D([], [], **marker_style(place))) for place in shown]
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
    _add_caption(figure, results)
    return figure


def figures(results: ValidationResults) -> dict[str, Figure]:
    """Every chart for which there are numbers, by name; names that the fonts cannot draw are printed.

    Raises:
        InputError: no model with numbers.
    """
    fonts.print_replaced(_names(results))
    drawn = {"comparison": comparison(results)}
    drawn |= {"precision_recall": precision_recall(results), "per_class": per_class(results)}
    if any(record.diagnosis for record in results.models):
        drawn |= {"confusion": confusion(results), "calibration": calibration(results)}
    logs = logs_of(results)
    return drawn | {"training": training(results, logs)} if logs else drawn


class Epoch(NamedTuple):
    """One line of a run's log; NaN for a number that does not exist."""

    number: int
    stage: str
    loss: float  # the sum of all terms
    ap50: float


def logs_of(results: ValidationResults) -> dict[int, list[Epoch]]:
    """The training log of each model, by its place among those with numbers.

    The run folder that a record names may have been deleted, or used again by a later run: the log is taken only where
    the settings beside it are those of the record. If they are not, or the log cannot be read, a line says so.
    """
    logs = {}
    for position, record in enumerate(evaluated(results)):
        folder = Path(str(record.conditions.get("run_dir")))
        if not is_file(folder / "log.jsonl"):
            continue
        try:
            if changed := _changed_settings(record, folder / "settings.json"):
                raise InputError(f"the settings in {folder} are not those of its training: {', '.join(changed)}")
            logs[position] = read_log(folder / "log.jsonl")
        except InputError as error:
            print(f"{to_one_line(record.name)}: no training curve: {error}")
    return logs


def _changed_settings(record: ValidationRecord, path: Path) -> list[str]:
    """The names of the settings in the file that differ from those with which the model of the record was trained."""
    try:
        settings = json.loads(path.read_bytes()).items()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    trained = json.loads(json.dumps(record.conditions, default=str))  # tuples become lists
    return sorted(name for name, value in settings if name not in RESOLVED and trained.get(name, value) != value)


def comparison(results: ValidationResults) -> Figure:
    """The study's metrics and `found`, AP by object size, accuracy against speed, and the costs of errors."""
    models = evaluated(results)
    diagnosed = any(record.diagnosis for record in models)
    figure = _figure(results, 13, 12 if diagnosed else 8.6)
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
    figure = _figure(results, 12, 5.6)
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), ("0.5", "0.75"), strict=True):
        for position, record in enumerate(evaluated(results)):
            curve = list_of(record, "detection", "precision_at_recall", iou)
            axes.plot(np.linspace(0, 1, len(curve)), _numbers(curve), **line_style(position, len(curve)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", title=f"IoU {iou}")
        axes.grid(alpha=0.4)
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _finish(figure, results)


def per_class(results: ValidationResults) -> Figure:
    """AP@0.5 of each class, the classes with the highest on top."""
    models = evaluated(results)
    parts = [value_of(record, "detection", "per_class") for record in models]
    values = {}
    for name in sorted({name for part in parts if isinstance(part, dict) for name in part}):
        row = [number_of(record, "detection", "per_class", name, "AP50") for record in models]
        if any(value is not None for value in row):
            values[name] = np.array(row, float)  # None becomes NaN
    names = sorted(values, key=lambda name: np.nanmean(values[name]))
    known = _class_names(results)
    labels = dict(zip(known, fonts.class_labels(known), strict=True))
    figure = _figure(results, 9, 2.2 + 0.19 * len(names))
    axes = figure.subplots()
    for height, name in enumerate(names):
        ends = [np.nanmin(values[name]), np.nanmax(values[name])]
        axes.plot(ends, [height, height], color="0.75", linewidth=1, zorder=0)
    for position in range(len(models)):
        own = [values[name][position] for name in names]
        axes.plot(own, range(len(names)), **marker_style(position), markersize=6)
    axes.set_yticks(range(len(names)), [labels.get(name) or _text(name) for name in names], fontsize=8)
    axes.set(ylim=(-0.7, len(names) - 0.3), xlim=(-0.02, 1.02), xlabel="AP@0.5")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.4)
    return _finish(figure, results)


def confusion(results: ValidationResults) -> Figure:
    """The class that objects of the most frequent classes are detected as, for each model at its best-F1 score."""
    models = [record for record in evaluated(results) if len(_confusion_counts(record))]
    names = fonts.class_labels(_class_names(results))
    columns = min(len(models), 3) or 1
    rows = -(-len(models) // columns) or 1
    figure = _figure(results, 5.4 * columns + 0.8, 5.6 * rows)
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, models, strict=False):
        counts, labels = _most_frequent(_confusion_counts(record), names)
        fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        fractions[-1] = np.nan  # background has no objects, so no fraction of them
        image = axes.imshow(fractions, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), [*labels[:-1], "missed"], rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels) - 1), labels[:-1], fontsize=8)
        axes.set_ylim(len(labels) - 1.5, -0.5)
        score = number_of(record, "diagnosis", "operating_point", "score") or 0
        axes.set_title(f"{_text(record.name, 36)}\nscores from {score:.2f}", fontsize=10)
        axes.set(xlabel="detected as", ylabel="object")
    for axes in figure.axes[len(models) :]:
        axes.set_visible(False)
    if models:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label="fraction of the class's objects")
    _add_caption(figure, results)
    return figure


def _confusion_counts(record: ValidationRecord) -> np.ndarray:
    """(K + 1, K + 1) float64 counts, true class by detected class, background last; (0, 0) where there are none."""
    rows = list_of(record, "diagnosis", "confusion")
    try:
        counts = np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        counts = np.zeros(0)
    return counts if counts.shape == (len(rows), len(rows)) and np.isfinite(counts).all() else np.zeros((0, 0))


def _most_frequent(counts: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The rows and columns of the classes with most objects, the others added up, background last."""
    kept = np.argsort(-counts[:-1].sum(1), kind="stable")[:CONFUSION_CLASSES]
    place = np.full(len(counts), len(kept))  # the others
    place[kept] = np.arange(len(kept))
    place[-1] = len(kept) + 1
    merged = np.zeros((len(kept) + 2,) * 2)
    np.add.at(merged, (place[:, None], place[None, :]), counts)
    labels = [names[k] if k < len(names) else f"class {k}" for k in kept]
    if len(counts) - 1 > len(kept):
        return merged, [*labels, "others", "background"]
    chosen = np.array([*range(len(kept)), len(kept) + 1])
    return merged[np.ix_(chosen, chosen)], [*labels, "background"]


def calibration(results: ValidationResults) -> Figure:
    """Precision of detections by their score; on the diagonal the two are equal."""
    figure = _figure(results, 7.5, 7)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for position, record in enumerate(evaluated(results)):
        bins = [b for b in list_of(record, "diagnosis", "calibration", "bins") if isinstance(b, dict)]
        line = line_style(position, len(bins)) | {"markersize": 7}
        axes.plot(*(_numbers([b.get(key) for b in bins]) for key in ("score", "precision")), **line)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision at IoU 0.5")
    axes.set_aspect("equal")
    axes.grid(alpha=0.4)
    return _finish(figure, results)


def training(results: ValidationResults, logs: dict[int, list[Epoch]]) -> Figure:
    """Loss and mAP@0.5 after each epoch of the models that have a log.

    Args:
        logs: as `logs_of` returns them; at least one.
    """
    figure = _figure(results, 12, 5.2)
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
    models = evaluated(results)
    return _finish(figure, results, {position: models[position] for position in logs})


def read_log(path: Path) -> list[Epoch]:
    """The epochs of a run's `log.jsonl`.

    Raises:
        InputError: the file can't be read, or is not such a log.
    """
    try:
        return [_epoch(json.loads(line)) for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the log of a training run: {error!r}") from error


def _epoch(line: dict) -> Epoch:
    loss, (ap50,) = sum(line["loss"].values()), _numbers([line["val"].get("AP50")])
    return Epoch(int(line["epoch"]), str(line.get("stage")), float(loss), float(ap50))
