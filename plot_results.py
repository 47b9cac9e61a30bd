"""Draw the comparison from validation_results.json alone; needs neither torch nor any picture.

Three panels: the study's six metrics as bars with their values, AP by object size, and accuracy against speed. Works
with one model or many; a model that could not be evaluated is named below the chart with its reason.

  python plot_results.py                    validation_results.json -> model_comparison_charts.png
  python plot_results.py --results a.json --output a.png
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns

from common import cli
from common.cli import flag
from common.errors import InputError
from common.files import atomic_write
from common.results import ValidationRecord, ValidationResults, read_results

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
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "||", "**")  # tell bars apart without colour
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Settings:
    results: str = flag("validation_results.json", "what comprehensive_validation.py wrote")
    output: str = flag("model_comparison_charts.png", "the chart to write")


def value_of(record: ValidationRecord, part: str, key: str) -> float | None:
    """A number of the record; None where it is missing."""
    number = (getattr(record, part) or {}).get(key)
    return float(number) if isinstance(number, int | float) else None


def style_of(position: int, count: int) -> dict:
    """Colour (told apart by the colour-blind) and hatch of the model at `position` of `count`."""
    palette = sns.color_palette("colorblind", max(count, 1))
    return {"facecolor": palette[position], "hatch": HATCHES[position % len(HATCHES)], "edgecolor": "black"}


def draw_bars(axes: Axes, models: list[ValidationRecord], metrics: dict[str, tuple[str, str]]) -> None:
    """Groups of bars, one group a metric and one bar a model, each with its value above it."""
    width = min(0.28, 0.84 / len(models))
    turned = len(models) > 4
    for position, record in enumerate(models):
        for group, (part, key) in enumerate(metrics.values()):
            value, x = value_of(record, part, key), group + width * (position - (len(models) - 1) / 2)
            axes.bar(x, value or 0, width * 0.94, linewidth=0.6, **style_of(position, len(models)))
            text = "–" if value is None else f"{value:.2f}" if turned else f"{value:.3f}"
            axes.annotate(
                text,
                (x, value or 0),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if turned else 0,
                fontsize=7 if turned else 9,
            )
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    axes.tick_params(axis="x", length=0)
    highest = max([value_of(r, *keys) or 0 for r in models for keys in metrics.values()] + [0.05])
    axes.set_ylim(0, highest * (1.22 if turned else 1.14))
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)


def draw_speed(axes: Axes, models: list[ValidationRecord]) -> None:
    """mAP@0.5 against pictures per second, one marker a model, named by the figure's legend."""
    known = [
        r for r in models if value_of(r, "cost", "pictures_per_s") and value_of(r, "detection", "AP50") is not None
    ]
    for record in known:
        position = models.index(record)
        axes.plot(
            value_of(record, "cost", "pictures_per_s"),
            value_of(record, "detection", "AP50"),
            **marker_of(position, style_of(position, len(models))),
            markersize=11,
        )
    speeds = [value_of(r, "cost", "pictures_per_s") for r in known] or [1.0]
    axes.set_xscale("log")
    low, high = min(speeds) / 3, max(speeds) * 3
    axes.set_xlim(low, high)
    ticks = [t * 10**e for e in range(-3, 5) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max([value_of(r, "detection", "AP50") for r in known] + [0.05]))
    devices = {str((r.cost or {}).get("device")) for r in known}
    axes.set_xlabel("pictures per second" + (f"\n{devices.pop()}" if len(devices) == 1 else ""))
    axes.set_ylabel("mAP@0.5")
    axes.grid(alpha=0.4)


def add_legend(figure: Figure, models: list[ValidationRecord]) -> None:
    """Name each model once, with its bar and its marker, in as many columns as the names leave room for."""
    names = [textwrap.shorten(record.name, 40, placeholder="…") for record in models]
    styles = [style_of(position, len(models)) for position in range(len(models))]
    handles = [(Patch(**style), Line2D([], [], **marker_of(position, style))) for position, style in enumerate(styles)]
    columns = max(1, min(len(models), 120 // (max(map(len, names)) + 12)))
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3.5,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
    )


def marker_of(position: int, style: dict) -> dict:
    """The scatter marker that goes with a bar's style."""
    marker = MARKERS[position % len(MARKERS)]
    return {"marker": marker, "color": style["facecolor"], "markeredgecolor": "black", "linestyle": "none"}


def caption(results: ValidationResults) -> str:
    """What the numbers were measured on, and which models are missing from the chart."""
    data = results.dataset
    lines = [
        f"{data.get('pictures', '?')} validation pictures of {data.get('source', '?')}, {data.get('boxes', '?')} boxes"
    ]
    for record in results.models:
        if record.error:
            lines += textwrap.wrap(f"{record.name} was not evaluated: {record.error}", 150)[:2]
    return "\n".join(lines)


def draw_chart(results: ValidationResults) -> Figure:
    """The whole figure.

    Raises:
        InputError: no model with numbers.
    """
    models = [record for record in results.models if not record.error]
    if not models:
        raise InputError("there is no model with numbers to draw: all have an error")
    sns.set_theme(style="ticks", font_scale=0.95)
    figure = plt.figure(figsize=(13, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.1, 1))
    wide, left, right = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    draw_bars(wide, models, STUDY_METRICS)
    wide.set_title("Primary object (first five) and detection of all objects (mAP@0.5)")
    draw_bars(left, models, SIZES)
    left.set_title("AP@[.5:.95] by object size")
    draw_speed(right, models)
    right.set_title("Accuracy against speed")
    sns.despine(figure)
    add_legend(figure, models)
    figure.supxlabel(caption(results), fontsize=9, color="0.3")
    return figure


def main(settings: Settings) -> Path:
    """Write the chart and return its path."""
    figure = draw_chart(read_results(settings.results))
    path = Path(settings.output)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    with Image.open(path) as image:
        print(f"chart of {image.width} x {image.height} pixels written to {path}")
    return path


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
