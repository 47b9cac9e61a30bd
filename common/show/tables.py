"""Results as text tables for the terminal, and names short enough for tables and charts. Imports no torch."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from common.console import to_one_line
from common.evaluate.results import ValidationRecord, ValidationResults


class Column(NamedTuple):
    """One column of the results table: the numbers under `keys` of one part of a record, each in the given format."""

    heading: str
    part: str
    keys: tuple[str, ...]
    format: str


COLUMNS = (
    Column("accuracy", "primary", ("accuracy",), "{:.1%}"),
    Column("precision", "primary", ("precision",), "{:.1%}"),
    Column("recall", "primary", ("recall",), "{:.1%}"),
    Column("F1", "primary", ("f1",), "{:.1%}"),
    Column("mean IoU", "primary", ("mean_iou",), "{:.3f}"),
    Column("found", "primary", ("found",), "{:.1%}"),
    Column("mAP@0.5", "detection", ("AP50",), "{:.3f}"),
    Column("AP", "detection", ("AP",), "{:.3f}"),
    Column("S / M / L", "detection", ("AP_small", "AP_medium", "AP_large"), "{:.3f}"),
    Column("images/s", "cost", ("images_per_s",), "{:.1f}"),
    Column("ms", "cost", ("ms_per_image",), "{:.0f}"),
)
NAMES = {  # of the numbers that have intervals
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "mean_iou": "mean IoU",
    "found": "found",
    "AP50": "mAP@0.5",
    "AP": "AP",
    "class_agnostic_AP50": "class-agnostic mAP@0.5",
}


def short_names(names: Sequence[str], width: int = 40) -> list[str]:
    """The names on one line of at most `width` characters, different where the names are.

    Long names lose their middle; where that makes some of them equal, these begin where they begin to differ, and if
    that does not help either, with a number.
    """
    short = [to_one_line(name, width) for name in names]
    alike = [place for place, text in enumerate(short) if short.count(text) > 1]
    common = os.path.commonprefix([names[place] for place in alike])  # noqa: RUF071 (of letters, not of folders)
    start = common.rfind("_") + 1
    cut = {place: to_one_line(f"{common[: width // 4]}…{names[place][start:]}", 10 * width)[:width] for place in alike}
    for number, place in enumerate(alike, 1):
        is_unique = list(cut.values()).count(cut[place]) == 1
        short[place] = cut[place] if is_unique else f"{number}: {short[place]}"[:width]
    return short


def format_cell(record: ValidationRecord, column: Column) -> str:
    """The text of one model in one column of the table, "-" for a number that does not exist."""
    numbers = [record.number(column.part, key) for key in column.keys]
    return " / ".join("-" if number is None else column.format.format(number) for number in numbers)


def format_table(records: Sequence[ValidationRecord], headings: Sequence[str] = ()) -> str:
    """A table for the terminal, one line per model; `headings` selects columns; empty selects all."""
    columns = [column for column in COLUMNS if not headings or column.heading in headings]
    names = short_names([record.name for record in records])
    rows = [["model", *(column.heading for column in columns)]]
    rows += [[name, *(format_cell(r, column) for column in columns)] for name, r in zip(names, records, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    for position, record in enumerate(records, 1):
        if record.error:
            lines[position] = f"{rows[position][0].ljust(widths[0])}  not evaluated: {to_one_line(record.error, 300)}"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _aligned(row: list[str], widths: list[int]) -> str:
    """The first cell flush left, the others flush right."""
    others = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *others])


def format_comparisons(results: ValidationResults, numbers: Sequence[str] = ("AP50", "AP", "accuracy")) -> str:
    """A line per pair of models: the 95% interval of the difference of some numbers, and the verdict."""
    names = [record.name for record in results.models]
    short, lines = dict(zip(names, short_names(names), strict=True)), []
    for pair in results.comparisons:
        verdicts = {NAMES[key]: pair.numbers[key] for key in numbers if key in pair.numbers}
        parts = [f"{name} [{v.interval[0]:+.3f}, {v.interval[1]:+.3f}] {v.verdict}" for name, v in verdicts.items()]
        lines.append(f"{short.get(pair.a, pair.a)} against {short.get(pair.b, pair.b)}: {'; '.join(parts)}")
    return "\n".join(lines)
