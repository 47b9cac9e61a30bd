"""`validation_results.json`: written by the validation, read for charts. Imports no torch.

The dataclasses are the form of the file: `from_json` checks it once, so that readers use attributes. Numbers are
fractions, None where a number does not exist.
"""

import functools
import json
import os
import platform
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from common.console import InputError
from common.files import atomic_write

FORMAT_VERSION = 2
REASON_LENGTH = 120  # characters of the parser's message
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")
LARGEST = 2**53  # of whole numbers that a float holds exactly
Number = float | None
fields_of: Callable[[typing.Any], dict[str, typing.Any]] = functools.cache(typing.get_type_hints)


@dataclass(frozen=True)
class ClassNumbers:
    """Average precision of one class."""

    AP: Number
    AP50: Number


@dataclass(frozen=True)
class DetectionNumbers:
    """pycocotools' twelve numbers, AP50 of the boxes alone, classes by name, precision at 101 recalls by IoU."""

    AP: Number
    AP50: Number
    AP75: Number
    AP_small: Number
    AP_medium: Number
    AP_large: Number
    AR1: Number
    AR10: Number
    AR100: Number
    AR_small: Number
    AR_medium: Number
    AR_large: Number
    class_agnostic_AP50: Number
    per_class: dict[str, ClassNumbers]
    precision_at_recall: dict[str, list[float] | None]


@dataclass(frozen=True)
class PrimaryNumbers:
    """The study's columns, of the largest object of each image, and `found`."""

    accuracy: Number
    precision: Number
    recall: Number
    f1: Number
    mean_iou: Number
    found: Number


@dataclass(frozen=True)
class Cost:
    """Cost of detection on one machine. It contains post-processing, but not decoding and resizing of image files."""

    parameters: int | None  # None for an exported model
    ms_per_image: float  # batch of one, median
    images_per_s: float  # at `batch_size`
    batch_size: int
    peak_memory_mb: Number  # of a GPU
    device: str
    precision: str


@dataclass(frozen=True)
class OperatingPoint:
    """The score with the best F1, and precision, recall and F1 of detections with at least that score."""

    score: Number
    precision: Number
    recall: Number
    f1: Number


@dataclass(frozen=True)
class ErrorKind:
    """By how much AP50 would rise without errors of a kind, and how many there are from the operating point on."""

    gain: Number
    count: int


@dataclass(frozen=True)
class Bin:
    """Detections of similar scores: their mean score, their precision, their number."""

    score: float
    precision: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """The mean distance of score and precision, and the bins that have detections."""

    expected_error: Number
    bins: list[Bin]


@dataclass(frozen=True)
class Diagnosis:
    """At IoU 0.5; `errors` by kind; `confusion` counts, true class by detected class, background last."""

    operating_point: OperatingPoint
    errors: dict[str, ErrorKind]
    calibration: Calibration
    confusion: list[list[int]]


@dataclass(frozen=True)
class ValidationRecord:
    """The numbers of one model and the conditions under which they were measured, or its `error`."""

    name: str
    path: str
    error: str | None = None
    detection: DetectionNumbers | None = None
    primary: PrimaryNumbers | None = None
    cost: Cost | None = None
    conditions: dict = field(default_factory=dict)  # of its training and evaluation: backbone, images, seed, epochs, …
    intervals: dict[str, list[float] | None] | None = None  # [low, high] by number
    diagnosis: Diagnosis | None = None
    warnings: list[str] = field(default_factory=list)
    detections: str | None = None  # the file with its detections, relative to the results

    def number(self, part: str, key: str) -> Number:
        """A number of `detection`, `primary` or `cost`; None where the record has none."""
        return getattr(getattr(self, part), key, None)

    def interval(self, key: str) -> list[float] | None:
        """The 95% interval of a number, [low, high]."""
        return (self.intervals or {}).get(key)


@dataclass(frozen=True)
class Verdict:
    """The 95% interval of the difference of two models in one number, and what follows from its 99% interval."""

    interval: list[float]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A pair of models: the verdicts on `a`, by number."""

    a: str
    b: str
    numbers: dict[str, Verdict]


@dataclass(frozen=True)
class DataDescription:
    """The images that the models were evaluated on; `boxes` without crowds."""

    source: str
    split: str
    images: int
    boxes: int
    classes: int
    class_names: list[str]
    fingerprint: str
    class_boxes: list[int] = field(default_factory=list)  # objects of each class


@dataclass(frozen=True)
class ValidationResults:
    """The content of the file, without its version."""

    protocol: dict
    dataset: DataDescription
    models: list[ValidationRecord]
    comparisons: list[Comparison] = field(default_factory=list)
    created: str = ""
    software: dict = field(default_factory=dict)
    hardware: dict = field(default_factory=dict)


def write_results(path: str | Path, results: ValidationResults) -> None:
    """Write the file with the current time, software and hardware. Raises InputError as `atomic_write` does."""
    stamped = {
        "format_version": FORMAT_VERSION,
        **asdict(results),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
    }
    finite = json.loads(json.dumps(stamped), parse_constant=lambda _: None)  # JSON has neither NaN nor inf
    with atomic_write(path, "w") as file:
        json.dump(finite, file, indent=2)
        file.write("\n")


def read_results(path: str | Path) -> ValidationResults:
    """Read and check the file. Raises InputError: no such file, not this format, or no models in it."""
    content = read_json(path, "; comprehensive_validation.py writes it")
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        about = f"validation results of format version {FORMAT_VERSION}, but of {version}"
        raise InputError(f"{path} is not a file of {about}: run comprehensive_validation.py again")
    results = from_json(ValidationResults, content, str(path))
    if not results.models:
        raise InputError(f"{path} holds no models")
    return results


def read_json(path: str | Path, advice: str = "") -> typing.Any:
    """The content of a JSON file. Raises InputError: no such file, with `advice`, or another form."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}{advice}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {str(error)[:REASON_LENGTH]}") from error


def from_json(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """A value of JSON as `kind`: a dataclass, a list or dictionary of something, a plain type, or one of them or None.

    Raises InputError, with `where` as its place, where it has another type or lacks a field.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else from_json(inside[0], value, where)
    if type(value) in (int, float) and kind in (int, float) and abs(value) < LARGEST and value == kind(value):
        return kind(value)
    hints = fields_of(kind) if is_dataclass(kind) else None
    if type(value) is not (dict if hints else origin or kind):
        raise InputError(f"{where} must be {getattr(kind, '__name__', kind)}, not {str(value)[:40]}")
    if hints:
        given = {name: hint for name, hint in hints.items() if name in value}
        try:
            return kind(**{name: from_json(hint, value[name], f"{where}: {name}") for name, hint in given.items()})
        except TypeError as error:
            raise InputError(f"{where}: {error}") from error
    if origin is list:
        return [from_json(inside[0], item, f"{where}: {number}") for number, item in enumerate(value)]
    if origin is dict:
        return {key: from_json(inside[1], item, f"{where}: {key}") for key, item in value.items()}
    return value
