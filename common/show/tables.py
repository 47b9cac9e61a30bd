"""Results as text tables for the terminal, and names short enough for tables and charts. Imports no torch."""

from collections import Counter
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
# Of the numbers that have intervals.
NAMES = {column.keys[0]: column.heading for column in COLUMNS[:8]} | {"class_agnostic_AP50": "class-agnostic mAP@0.5"}


def short_names(names: Sequence[str], width: int = 40) -> list[str]:
    """The names on one line of at most `width` characters; those that would be equal begin with their number."""
    short = [to_one_line(name, width) for name in names]
    count = Counter(short)
    return [to_one_line(f"{n}: {s}", width) if count[s] > 1 else s for n, s in enumerate(short, 1)]


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
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(first), *(text.rjust(width) for text, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    for place, record in enumerate(records, 1):
        if record.error:
            lines[place] = f"{names[place - 1].ljust(first)}  not evaluated: {to_one_line(record.error, 300)}"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_comparisons(results: ValidationResults, numbers: Sequence[str] = ("AP50", "AP", "accuracy")) -> str:
    """A line per pair of models: the 95% interval of the difference of some numbers, and the verdict."""
    names = [record.name for record in results.models]
    short, lines = dict(zip(names, short_names(names), strict=True)), []
    for pair in results.comparisons:
        verdicts = [(NAMES[key], pair.numbers[key]) for key in numbers if key in pair.numbers]
        parts = [f"{name} [{v.interval[0]:+.3f}, {v.interval[1]:+.3f}] {v.verdict}" for name, v in verdicts]
        lines.append(f"{short.get(pair.a, pair.a)} against {short.get(pair.b, pair.b)}: {'; '.join(parts)}")
    return "\n".join(lines)
