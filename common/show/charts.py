"""Figures of validation results: readable without colour, at half size, and with one model or ten.

Imports no torch. Every function takes the records that have numbers; models keep colour, hatch and marker throughout.
"""

import itertools
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.console import InputError
from common.evaluate.results import ValidationRecord, ValidationResults

matplotlib.use("agg")

STUDY_METRICS = {
    "Accuracy": ("primary", "accuracy"),
    "Precision": ("primary", "precision"),
    "Recall": ("primary", "recall"),
    "F1": ("primary", "f1"),
    "Mean IoU": ("primary", "mean_iou"),
    "mAP@0.5": ("detection", "AP50"),
}
SIZES = {
    "small\n(< 32² px)": ("detection", "AP_small"),
    "medium": ("detection", "AP_medium"),
    "large\n(> 96² px)": ("detection", "AP_large"),
}
ERRORS = {
    "wrong class": "class",
    "localisation": "localisation",
    "both": "both",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed",
}
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # tell bars apart without colour
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
CONFUSED = 15  # classes that a confusion matrix shows by name

Models = Sequence[ValidationRecord]


def value_of(record: ValidationRecord, part: str, key: str) -> float | None:
    """A number of the record; None where it is missing."""
    number = (getattr(record, part) or {}).get(key)
    return float(number) if isinstance(number, int | float) else None


def interval_of(record: ValidationRecord, key: str) -> tuple[float, float] | None:
    """The 95% interval of a number; None where there is none."""
    found = (record.intervals or {}).get(key)
    return (float(found[0]), float(found[1])) if found else None


def style_of(position: int, count: int) -> dict:
    """Colour (told apart by the colour-blind) and hatch of the model at `position` of `count`."""
    palette = sns.color_palette("colorblind", max(count, 1))
    return {"facecolor": palette[position], "hatch": HATCHES[position % len(HATCHES)], "edgecolor": "black"}


def marker_of(position: int, style: dict) -> dict:
    """The scatter marker that goes with a bar's style."""
    marker = MARKERS[position % len(MARKERS)]
    return {"marker": marker, "color": style["facecolor"], "markeredgecolor": "black", "linestyle": "none"}


def line_of(position: int, count: int, points: int) -> dict:
    """The line that goes with a bar's style, its markers about ten to a line."""
    marker = marker_of(position, style_of(position, count))
    return marker | {"linestyle": LINES[position % len(LINES)], "markevery": max(1, points // 10), "markersize": 5}


def draw_bars(
    axes: Axes,
    models: Models,
    groups: dict[str, Callable[[ValidationRecord], tuple[float | None, tuple[float, float] | None]]],
) -> None:
    """Groups of bars, one group a number and one bar a model, each with its value and, if known, its interval."""
    width = min(0.28, 0.84 / len(models))
    turned = len(models) > 4
    highest = 0.05
    for position, record in enumerate(models):
        for group, read in enumerate(groups.values()):
            value, interval = read(record)
            x, top = group + width * (position - (len(models) - 1) / 2), value or 0.0
            axes.bar(x, top, width * 0.94, linewidth=0.6, **style_of(position, len(models)))
            if value is not None and interval:
                low, high = interval
                spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(x, value, spread, color="black", linewidth=1, capsize=min(3, 12 * width))
                top = max(top, high)
            text = "–" if value is None else f"{value:.2f}" if turned else f"{value:.3f}"
            axes.annotate(
                text,
                (x, max(top, 0)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if turned else 0,
                fontsize=7 if turned else 9,
            )
            highest = max(highest, top)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(min(0, axes.get_ylim()[0]), highest * (1.22 if turned else 1.14))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)


def draw_speed(axes: Axes, models: Models) -> None:
    """mAP@0.5 with its interval against images per second, one marker a model, named by the figure's legend."""
    known = [r for r in models if value_of(r, "cost", "images_per_s") and value_of(r, "detection", "AP50") is not None]
    for record in known:
        position = models.index(record)
        x, y = value_of(record, "cost", "images_per_s"), value_of(record, "detection", "AP50")
        low, high = interval_of(record, "AP50") or (y, y)
        axes.plot([x, x], [low, high], color="0.4", linewidth=1)
        axes.plot(x, y, **marker_of(position, style_of(position, len(models))), markersize=11)
    if not known:
        axes.text(0.5, 0.5, "no speeds were measured", ha="center", transform=axes.transAxes, color="0.4")
        axes.set_axis_off()
        return
    speeds = [value_of(r, "cost", "images_per_s") for r in known]
    axes.set_xscale("log")
    low, high = min(speeds) / 3, max(speeds) * 3
    axes.set_xlim(low, high)
    ticks = [t * 10**e for e in range(-3, 5) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    tops = [max(value_of(r, "detection", "AP50"), (interval_of(r, "AP50") or (0, 0))[1]) for r in known]
    axes.set_ylim(0, 1.15 * max([*tops, 0.05]))
    devices = {str((r.cost or {}).get("device")) for r in known}
    axes.set_xlabel("images per second" + (f"\n{devices.pop()}" if len(devices) == 1 else ""))
    axes.set_ylabel("mAP@0.5")
    axes.grid(alpha=0.4)


def add_legend(figure: Figure, models: Models, shown: Models) -> None:
    """Name each model shown once, with its bar and its marker, in as many columns as the names leave room for."""
    names = [textwrap.shorten(record.name, 40, placeholder="…") for record in shown]
    styles = {position: style_of(position, len(models)) for position in map(models.index, shown)}
    handles = [(Patch(**style), Line2D([], [], **marker_of(position, style))) for position, style in styles.items()]
    room = int(9.2 * figure.get_figwidth())  # characters
    columns = max(1, min(len(shown), room // (max(map(len, names)) + 12)))
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3.5,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
    )


def caption(results: ValidationResults, width: int = 150) -> str:
    """What the numbers were measured on, and which models are missing from the chart."""
    data = results.dataset
    measured = f"{data.get('images', '?')} validation images of {data.get('source', '?')}"
    lines = [f"{measured}, {data.get('boxes', '?')} boxes"]
    for record in results.models:
        if record.error:
            lines += textwrap.wrap(f"{record.name} was not evaluated: {record.error}", width)[:2]
    return "\n".join(lines)


def evaluated(results: ValidationResults) -> list[ValidationRecord]:
    """The models with numbers.

    Raises:
        InputError: there are none.
    """
    models = [record for record in results.models if not record.error]
    if not models:
        raise InputError("there is no model with numbers to draw: all have an error")
    return models


def _figure(size: tuple[float, float]) -> Figure:
    sns.set_theme(style="ticks", font_scale=0.95)
    return plt.figure(figsize=size, layout="constrained")


def _finish(figure: Figure, results: ValidationResults, models: Models, shown: Models = ()) -> Figure:
    sns.despine(figure)
    add_legend(figure, models, shown or models)
    figure.supxlabel(caption(results, int(11.5 * figure.get_figwidth())), fontsize=9, color="0.3")
    return figure


def figures(results: ValidationResults) -> dict[str, Figure]:
    """Every chart that there are numbers for, by its name.

    Raises:
        InputError: no model with numbers.
    """
    found: dict[str, Figure | None] = {"comparison": comparison(results)}
    found |= {"precision_recall": precision_recall(results), "per_class": per_class(results)}
    if any(record.diagnosis for record in results.models):
        found |= {"confusion": confusion(results), "calibration": calibration(results)}
    found["training"] = training(results, logs_of(results))
    return {name: figure for name, figure in found.items() if figure is not None}


def logs_of(results: ValidationResults) -> dict[str, Path]:
    """The training log of each model whose run folder, as its record names it, is still there."""
    paths = {r.name: Path(str(r.conditions.get("run_dir")), "log.jsonl") for r in results.models if not r.error}
    return {name: path for name, path in paths.items() if path.is_file()}


def comparison(results: ValidationResults) -> Figure:
    """The study's six metrics, AP by object size, accuracy against speed, and what each kind of error costs."""
    models = evaluated(results)
    diagnosed = any(record.diagnosis for record in models)
    figure = _figure((13, 12 if diagnosed else 8.6))
    grid = figure.add_gridspec(3 if diagnosed else 2, 2, height_ratios=(1.1, 1, 1)[: 3 if diagnosed else 2])
    wide, left, right = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])

    def reader(part: str, key: str):
        return lambda record: (value_of(record, part, key), interval_of(record, key))

    draw_bars(wide, models, {name: reader(*keys) for name, keys in STUDY_METRICS.items()})
    with_intervals = ", with 95% intervals" if any(record.intervals for record in models) else ""
    wide.set_title(f"Primary object (first five) and detection of all objects (mAP@0.5){with_intervals}")
    draw_bars(left, models, {name: reader(*keys) for name, keys in SIZES.items()})
    left.set_title("AP@[.5:.95] by object size")
    draw_speed(right, models)
    right.set_title("Accuracy against speed")
    if diagnosed:
        lower = figure.add_subplot(grid[2, :])
        draw_bars(lower, models, {name: _error_reader(kind) for name, kind in ERRORS.items()})
        lower.set_title("What each kind of error costs: mAP@0.5 gained if it alone were mended")
    return _finish(figure, results, models)


def _error_reader(kind: str):
    return lambda record: (((record.diagnosis or {}).get("errors") or {}).get(kind, {}).get("gain"), None)


def precision_recall(results: ValidationResults) -> Figure:
    """Precision at each recall, the mean over the classes, at IoU 0.5 and 0.75."""
    models = evaluated(results)
    figure = _figure((12, 5.6))
    for axes, iou in zip(figure.subplots(1, 2, sharey=True), ("0.5", "0.75"), strict=True):
        for position, record in enumerate(models):
            curve = ((record.detection or {}).get("precision_at_recall") or {}).get(iou)
            if curve:
                recall = np.linspace(0, 1, len(curve))
                axes.plot(recall, curve, **line_of(position, len(models), len(curve)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", title=f"IoU {iou}")
        axes.grid(alpha=0.4)
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _finish(figure, results, models)


def per_class(results: ValidationResults) -> Figure:
    """AP@0.5 of each class, the best-found classes on top."""
    models = evaluated(results)
    tables = [(record.detection or {}).get("per_class") or {} for record in models]
    names = sorted({name for table in tables for name in table})
    values = {
        name: [table[name]["AP50"] if name in table and table[name]["AP50"] is not None else np.nan for table in tables]
        for name in names
    }
    values = {name: row for name, row in values.items() if not np.isnan(row).all()}
    order = sorted(values, key=lambda name: np.nanmean(values[name]))
    figure = _figure((9, 2.2 + 0.19 * len(order)))
    axes = figure.subplots()
    for row, name in enumerate(order):
        axes.plot([np.nanmin(values[name]), np.nanmax(values[name])], [row, row], color="0.75", linewidth=1, zorder=0)
    for position in range(len(models)):
        own = [values[name][position] for name in order]
        axes.plot(own, range(len(order)), **marker_of(position, style_of(position, len(models))), markersize=6)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set(ylim=(-0.7, len(order) - 0.3), xlim=(-0.02, 1.02), xlabel="AP@0.5")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.4)
    return _finish(figure, results, models)


def confusion(results: ValidationResults) -> Figure:
    """Where the objects of the commonest classes go, for each model at its best-F1 score: shares of a true class."""
    models = [record for record in evaluated(results) if (record.diagnosis or {}).get("confusion")]
    names = list(results.dataset.get("class_names") or [])
    columns = min(len(models), 3) or 1
    rows = -(-len(models) // columns) or 1
    figure = _figure((5.4 * columns + 0.8, 5.6 * rows))
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, models, strict=False):
        counts, labels = _commonest(np.array(record.diagnosis["confusion"]), names)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        shares[-1] = np.nan  # detections on nothing are no share of any objects
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), [*labels[:-1], "missed"], rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels) - 1), labels[:-1], fontsize=8)
        axes.set_ylim(len(labels) - 1.5, -0.5)
        score, name = record.diagnosis["operating_point"]["score"], textwrap.shorten(record.name, 36, placeholder="…")
        axes.set_title(f"{name}\nscores from {score or 0:.2f}", fontsize=10)
        axes.set(xlabel="detected as", ylabel="object")
    for axes in figure.axes[len(models) :]:
        axes.set_visible(False)
    if models:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label="share of the class's objects")
    figure.supxlabel(caption(results, int(11.5 * figure.get_figwidth())), fontsize=9, color="0.3")
    return figure


def _commonest(counts: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The rows and columns of the classes with most objects, the others taken together, background last."""
    kept = np.argsort(-counts[:-1].sum(1), kind="stable")[:CONFUSED]
    place = np.full(len(counts), len(kept))  # the others
    place[kept] = np.arange(len(kept))
    place[-1] = len(kept) + 1
    merged = np.zeros((len(kept) + 2,) * 2)
    np.add.at(merged, (place[:, None], place[None, :]), counts)
    labels = [names[k] if k < len(names) else str(k) for k in kept]
    if len(counts) - 1 > len(kept):
        return merged, [*labels, "others", "background"]
    chosen = np.array([*range(len(kept)), len(kept) + 1])
    return merged[np.ix_(chosen, chosen)], [*labels, "background"]


def calibration(results: ValidationResults) -> Figure:
    """How often detections of a score are right; on the diagonal, a score says just that."""
    models = evaluated(results)
    figure = _figure((7.5, 7))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for position, record in enumerate(models):
        bins = ((record.diagnosis or {}).get("calibration") or {}).get("bins") or []
        line = line_of(position, len(models), len(bins)) | {"markersize": 7}
        axes.plot([b["score"] for b in bins], [b["precision"] for b in bins], **line)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share that is right at IoU 0.5")
    axes.set_aspect("equal")
    axes.grid(alpha=0.4)
    return _finish(figure, results, models)


def training(results: ValidationResults, logs: dict[str, Path]) -> Figure | None:
    """Loss and mAP@0.5 after each epoch of the models whose log is there; None where there is no log.

    Args:
        logs: by model name, its run's `log.jsonl`.
    """
    models = evaluated(results)
    figure = _figure((12, 5.2))
    left, right = figure.subplots(1, 2)
    drawn = []
    for position, record in enumerate(models):
        if record.name not in logs:
            continue
        lines = read_log(logs[record.name])
        epochs, line = [entry["epoch"] for entry in lines], line_of(position, len(models), len(lines))
        left.plot(epochs, [sum(entry["loss"].values()) for entry in lines], **line)
        right.plot(epochs, [entry["val"].get("AP50") for entry in lines], **line)
        starts = [b["epoch"] for a, b in itertools.pairwise(lines) if a.get("stage") != b.get("stage")]
        for axes in (left, right):
            for epoch in starts:
                axes.axvline(epoch - 0.5, color=line["color"], linewidth=0.8, linestyle=":")
        drawn.append(record)
    if not drawn:
        plt.close(figure)
        return None
    left.set(xlabel="epoch", ylabel="loss", title="Training loss, all terms")
    right.set(xlabel="epoch", ylabel="mAP@0.5", title="On the first 100 validation images")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.4)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _finish(figure, results, models, drawn)


def read_log(path: Path) -> list[dict]:
    """The epochs of a run's `log.jsonl`.

    Raises:
        InputError: the file can't be read, or is no such log.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for line in lines:
            line["epoch"], line["loss"].values(), line["val"].get
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no log of a training run: {error!r}") from error
    return lines
