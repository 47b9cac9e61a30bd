"""Results as text tables for the terminal."""

from common.evaluate.results import ValidationRecord, ValidationResults

TABLE = (  # heading, part, key, format
    ("accuracy", "primary", "accuracy", "{:.1%}"),
    ("precision", "primary", "precision", "{:.1%}"),
    ("recall", "primary", "recall", "{:.1%}"),
    ("F1", "primary", "f1", "{:.1%}"),
    ("mean IoU", "primary", "mean_iou", "{:.3f}"),
    ("mAP@0.5", "detection", "AP50", "{:.3f}"),
    ("AP", "detection", "AP", "{:.3f}"),
    ("S / M / L", "detection", ("AP_small", "AP_medium", "AP_large"), "{:.3f}"),
    ("images/s", "cost", "images_per_s", "{:.1f}"),
    ("ms", "cost", "ms_per_image", "{:.0f}"),
)


def format_table(records: tuple[ValidationRecord, ...], headings: tuple[str, ...] = ()) -> str:
    """A table for the terminal, one line a model; `headings` picks columns of TABLE, none = all of them."""
    columns = [column for column in TABLE if not headings or column[0] in headings]
    rows = [["model", *(column[0] for column in columns)]]
    rows += [[record.name, *(cell(record, *column[1:]) for column in columns)] for record in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    for position, record in enumerate(records, 1):
        if record.error:
            lines[position] = f"{record.name.ljust(widths[0])}  not evaluated: {record.error}"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *others = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([first.strip().ljust(widths[0]), *others])


def cell(record: ValidationRecord, part: str, key: str | tuple[str, ...], form: str) -> str:
    """What a row of TABLE says of a model."""
    values = [(getattr(record, part) or {}).get(k) for k in ((key,) if isinstance(key, str) else key)]
    return " / ".join("-" if value is None else form.format(value) for value in values)


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


def format_comparisons(results: ValidationResults, numbers: tuple[str, ...] = ("AP50", "AP", "accuracy")) -> str:
    """A line for each pair of models: the 95% interval of the difference of some numbers, and the verdict."""
    lines = []
    for pair in results.comparisons:
        parts = []
        for key in numbers:
            if key in pair["numbers"]:
                low, high = pair["numbers"][key]["interval"]
                parts.append(f"{NAMES[key]} [{low:+.3f}, {high:+.3f}] {pair['numbers'][key]['verdict']}")
        lines.append(f"{pair['a']} against {pair['b']}: {'; '.join(parts)}")
    return "\n".join(lines)
