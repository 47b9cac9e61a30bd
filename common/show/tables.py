"""Results as text tables for the terminal, and how a number is read from a record. Imports no torch.

Results files may be edited by hand or come from an earlier version: a part that is missing, or not what the schema
says, is read as a number that does not exist.
"""

from typing import Any, NamedTuple

from common.console import to_one_line
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
MAX_NUMBER = 1e300  # beyond it Python's whole numbers do not fit into a float


def value_of(record: ValidationRecord, *keys: str) -> Any:
    """What a record holds under a field's name and the keys below it; None where any of them is missing."""
    value: Any = vars(record)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        return None
    return float(value)


def number_of(record: ValidationRecord, *keys: str) -> float | None:
    """The number under these keys; None where it does not exist or is inf or NaN."""
    return _number(value_of(record, *keys))


def list_of(record: ValidationRecord, *keys: str) -> list:
    """The list under these keys; empty where it does not exist."""
    value = value_of(record, *keys)
    return value if isinstance(value, list) else []


def _interval(value: object) -> tuple[float, float] | None:
    numbers = [_number(limit) for limit in value] if isinstance(value, list | tuple) else []
    match numbers:
        case [float(low), float(high)]:
            return low, high
    return None


def interval_of(record: ValidationRecord, key: str) -> tuple[float, float] | None:
    """The 95% interval of a number; None where it does not exist."""
    return _interval(value_of(record, "intervals", key))


class Verdict(NamedTuple):
    """Of one number of a pair of models: the interval of the difference, and what follows from it."""

    low: float
    high: float
    text: str


def verdict_of(pair: dict, key: str) -> Verdict | None:
    """The verdict of a pair of `ValidationResults.comparisons` on a number; None where it does not exist."""
    numbers = pair.get("numbers")
    number = numbers.get(key) if isinstance(numbers, dict) else None
    interval = _interval(number.get("interval")) if isinstance(number, dict) else None
    return Verdict(*interval, str(number.get("verdict") or "no verdict")) if number and interval else None


def cell(record: ValidationRecord, column: Column) -> str:
    """The text of one model in one column of the table, "-" for a number that does not exist."""
    numbers = [number_of(record, column.part, key) for key in column.keys]
    return " / ".join("-" if number is None else column.form.format(number) for number in numbers)


def format_table(records: tuple[ValidationRecord, ...], headings: tuple[str, ...] = ()) -> str:
    """A table for the terminal, one line per model; `headings` selects columns of TABLE; empty selects all."""
    columns = [column for column in TABLE if not headings or column.heading in headings]
    rows = [["model", *(column.heading for column in columns)]]
    rows += [[to_one_line(record.name), *(cell(record, column) for column in columns)] for record in records]
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


def format_comparisons(results: ValidationResults, numbers: tuple[str, ...] = ("AP50", "AP", "accuracy")) -> str:
    """A line per pair of models: the 95% interval of the difference of some numbers, and the verdict."""
    lines = []
    for pair in results.comparisons:
        verdicts = {NAMES[key]: verdict for key in numbers if (verdict := verdict_of(pair, key))}
        parts = [f"{name} [{v.low:+.3f}, {v.high:+.3f}] {v.text}" for name, v in verdicts.items()]
        lines.append(f"{to_one_line(pair.get('a'))} against {to_one_line(pair.get('b'))}: {'; '.join(parts)}")
    return "\n".join(lines)
