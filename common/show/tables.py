"""Results as text tables for the terminal, and how a number is read from a record. Imports no torch."""

from typing import Any, NamedTuple

from common.evaluate.results import ValidationRecord, ValidationResults


class Column(NamedTuple):
    """One column of the results table: the numbers under `keys` of one part of a record, each in the given format."""

    heading: str
    part: str
    keys: tuple[str, ...]
    form: str


TABLE = (
    Column("accuracy", "primary", ("accuracy",), "{:.1%}"),
    Column("precision", "primary", ("precision",), "{:.1%}"),
    Column("recall", "primary", ("recall",), "{:.1%}"),
    Column("F1", "primary", ("f1",), "{:.1%}"),
    Column("mean IoU", "primary", ("mean_iou",), "{:.3f}"),
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
    "AP50": "mAP@0.5",
    "AP": "AP",
    "class_agnostic_AP50": "class-agnostic mAP@0.5",
}


def value_of(record: ValidationRecord, *keys: str) -> Any:
    """What a record holds under a field's name and the keys below it; None where any of them is missing."""
    value: Any = vars(record)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number_of(record: ValidationRecord, *keys: str) -> float | None:
    """The number under these keys; None where there is none."""
    value = value_of(record, *keys)
    return float(value) if isinstance(value, int | float) else None


def interval_of(record: ValidationRecord, key: str) -> tuple[float, float] | None:
    """The 95% interval of a number; None where there is none."""
    interval = value_of(record, "intervals", key)
    return (float(interval[0]), float(interval[1])) if interval else None


def cell(record: ValidationRecord, column: Column) -> str:
    """The text of one model in one column of the table, "-" for a number that does not exist."""
    numbers = [number_of(record, column.part, key) for key in column.keys]
    return " / ".join("-" if number is None else column.form.format(number) for number in numbers)


def format_table(records: tuple[ValidationRecord, ...], headings: tuple[str, ...] = ()) -> str:
    """A table for the terminal, one line per model; `headings` selects columns of TABLE; empty selects all."""
    columns = [column for column in TABLE if not headings or column.heading in headings]
    rows = [["model", *(column.heading for column in columns)]]
    rows += [[record.name, *(cell(record, column) for column in columns)] for record in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    for position, record in enumerate(records, 1):
        if record.error:
            lines[position] = f"{record.name.ljust(widths[0])}  not evaluated: {record.error}"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _aligned(row: list[str], widths: list[int]) -> str:
    """The first cell flush left, the others flush right."""
    others = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *others])


def format_comparisons(results: ValidationResults, numbers: tuple[str, ...] = ("AP50", "AP", "accuracy")) -> str:
    """A line per pair of models: the 95% interval of the difference of some numbers, and the verdict."""
    lines = []
    for pair in results.comparisons:
        parts = []
        for key in numbers:
            if key in pair["numbers"]:
                low, high = pair["numbers"][key]["interval"]
                parts.append(f"{NAMES[key]} [{low:+.3f}, {high:+.3f}] {pair['numbers'][key]['verdict']}")
        lines.append(f"{pair['a']} against {pair['b']}: {'; '.join(parts)}")
    return "\n".join(lines)
