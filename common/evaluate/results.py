"""`validation_results.json`: written by the validation, read for charts. Imports no torch.

A `ValidationRecord` holds the numbers of one model and the conditions under which they were measured; a model that
could not be evaluated has a record with its `error`. Numbers are fractions, null where a number does not exist.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from common.console import InputError
from common.files import atomic_write

FORMAT_VERSION = 2
BIN = ("score", "precision", "count")  # of a bin of the calibration
REASON_LENGTH = 120  # characters of the parser's message
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class ValidationRecord:
    """The numbers of one model.

    `detection` and `primary` as `coco_metrics.evaluate_table` returns them; `cost` has the fields of `detect.Cost`;
    `intervals` by number; `diagnosis` as `diagnosis.diagnose` returns it; `detections` is the path of the file with the
    model's detections, relative to the results.
    """

    name: str
    path: str
    error: str | None = None
    detection: dict | None = None
    primary: dict | None = None
    cost: dict | None = None
    conditions: dict = field(default_factory=dict)  # of its training and evaluation: backbone, images, seed, epochs, …
    intervals: dict | None = None
    diagnosis: dict | None = None
    warnings: list[str] = field(default_factory=list)
    detections: str | None = None


@dataclass(frozen=True)
class ValidationResults:
    """The content of the file, without its version."""

    protocol: dict
    dataset: dict  # source, split, images, boxes, fingerprint
    models: tuple[ValidationRecord, ...]
    comparisons: list[dict] = field(default_factory=list)  # as `bootstrap.comparisons` returns them
    created: str = ""
    software: dict = field(default_factory=dict)
    hardware: dict = field(default_factory=dict)


def describe_software() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, str | int | None]:
    """Machine type, system and number of processor cores; the device of each model is in its cost."""
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}


def write_results(path: str | Path, results: ValidationResults) -> None:
    """Write the file with the current time, software and hardware; an existing file is replaced once it is complete.

    Raises:
        InputError: the file can't be written.
    """
    stamped = {
        "format_version": FORMAT_VERSION,
        **asdict(results),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": describe_software(),
        "hardware": describe_hardware(),
    }
    with atomic_write(path, "w") as file:
        json.dump(_without_nan(stamped), file, indent=2, allow_nan=False)
        file.write("\n")


def read_results(path: str | Path) -> ValidationResults:
    """Read and check the file.

    Raises:
        InputError: no such file, not this format, or no models in it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; comprehensive_validation.py writes it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {str(error)[:REASON_LENGTH]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("models"), list):
        raise InputError(f"{path} is not a file of validation results: it has no list 'models'")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and this program reads {FORMAT_VERSION}: run "
            "comprehensive_validation.py again"
        )
    if not content["models"]:
        raise InputError(f"{path} holds no models")
    records = tuple(_record(path, entry) for entry in content["models"])
    return ValidationResults(
        protocol=_dict(content.get("protocol")),
        dataset=_dict(content.get("dataset")),
        models=records,
        comparisons=[pair for entry in _list(content.get("comparisons")) if (pair := _comparison(entry))],
        created=str(content.get("created") or ""),
        software=_dict(content.get("software")),
        hardware=_dict(content.get("hardware")),
    )


def _record(path: str | Path, entry: object) -> ValidationRecord:
    """The known fields of one record. Parts that are missing or malformed are None or empty, unknown ones left out."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{path}: a model without a name: {str(entry)[:80]}")
    for part in ("detection", "primary", "cost", "conditions", "intervals", "diagnosis"):
        if not isinstance(entry.get(part), dict | None):
            raise InputError(f"{path}: {part!r} of the model {entry['name']} is not an object")
    text = {key: entry[key] for key in ("error", "detections") if isinstance(entry.get(key), str)}
    intervals = entry.get("intervals")
    return ValidationRecord(
        entry["name"],
        str(entry.get("path") or ""),
        **text,
        detection=_detection(entry.get("detection")),
        primary=entry.get("primary"),
        cost=entry.get("cost"),
        conditions=entry.get("conditions") or {},
        intervals=intervals and {key: _interval(value) for key, value in intervals.items()},
        diagnosis=_diagnosis(entry.get("diagnosis")),
        warnings=[warning for warning in _list(entry.get("warnings")) if isinstance(warning, str)],
    )


def _detection(part: dict | None) -> dict | None:
    if part is None:
        return None
    per_class = {name: _dict(numbers) for name, numbers in _dict(part.get("per_class")).items()}
    curves = {iou: _numbers(curve) for iou, curve in _dict(part.get("precision_at_recall")).items()}
    return part | {"per_class": per_class, "precision_at_recall": curves}


def _diagnosis(part: dict | None) -> dict | None:
    if part is None:
        return None
    objects = {key: _dict(part.get(key)) for key in ("operating_point", "errors", "calibration")}
    bins = [b for b in _list(objects["calibration"].get("bins")) if _numbers([_dict(b).get(key) for key in BIN])]
    rows = [_numbers(row) for row in _list(part.get("confusion"))]
    square = all(row is not None and len(row) == len(rows) for row in rows)
    objects["errors"] = {kind: _dict(error) for kind, error in objects["errors"].items()}
    objects["calibration"] = objects["calibration"] | {"bins": bins}
    return objects | {"confusion": rows if square else []}


def _comparison(entry: object) -> dict | None:
    """A pair of models with the numbers that have an interval and a verdict; None where it names no pair."""
    pair = _dict(entry)
    if not isinstance(pair.get("a"), str) or not isinstance(pair.get("b"), str):
        return None
    numbers = {key: _dict(number) for key, number in _dict(pair.get("numbers")).items()}
    complete = {
        key: number
        for key, number in numbers.items()
        if _interval(number.get("interval")) and isinstance(number.get("verdict"), str)
    }
    return {"a": pair["a"], "b": pair["b"], "numbers": complete}


def _interval(value: object) -> list[float] | None:
    numbers = _numbers(value)
    return numbers if numbers and len(numbers) == 2 else None


def _numbers(value: object) -> list[float] | None:
    """The value if it is a list of numbers."""
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        return None
    return value


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _without_nan(value: object) -> object:
    """The value with null in place of inf and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
