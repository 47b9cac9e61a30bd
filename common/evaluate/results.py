"""`validation_results.json`: written by the validation, read for charts. Imports no torch.

The dataclasses are the form of the file, which `from_json` checks once. Numbers are fractions, None where a number does
not exist.
"""

import json
import os
import platform
import types
import typing
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from common.console import InputError
from common.files import atomic_write

FORMAT_VERSION = 2
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")
LARGEST = 2**53  # of whole numbers that a float holds exactly
Number = float | None


@dataclass(frozen=True)
class ClassNumbers:
    AP: Number
    AP50: Number


@dataclass(frozen=True)
class DetectionNumbers:  # pycocotools' twelve first
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
    per_class: dict[str, ClassNumbers]  # by name
    precision_at_recall: dict[str, list[float] | None]  # by IoU, at the recalls 0, 0.01, …, 1


@dataclass(frozen=True)
class PrimaryNumbers:  # of the largest object of each image
    accuracy: Number
    precision: Number
    recall: Number
    f1: Number
    mean_iou: Number
    found: Number


@dataclass(frozen=True)
class Cost:  # with post-processing, without decoding and resizing of image files
    parameters: int | None  # None for an exported model
    ms_per_image: float  # batch of one, median
    images_per_s: float  # at `batch_size`
    batch_size: int
    peak_memory_mb: Number  # of a GPU
    device: str
    precision: str


@dataclass(frozen=True)
class OperatingPoint:  # the score with the best F1; the numbers are of detections with at least that score
    score: Number
    precision: Number
    recall: Number
    f1: Number


@dataclass(frozen=True)
class ErrorKind:
    gain: Number  # by how much AP50 would rise without the errors of this kind
    count: int  # with at least the score of the operating point


@dataclass(frozen=True)
class Bin:  # detections of similar scores
    score: float  # mean
    precision: float
    count: int


@dataclass(frozen=True)
class Calibration:
    expected_error: Number  # mean distance of score and precision
    bins: list[Bin]  # those that have detections


@dataclass(frozen=True)
class Diagnosis:  # at IoU 0.5
    operating_point: OperatingPoint
    errors: dict[str, ErrorKind]
    calibration: Calibration
    confusion: list[list[int]]  # counts, true class by detected class, background last


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
    intervals: dict[str, list[float] | None] | None = None  # 95%, [low, high] by number
    diagnosis: Diagnosis | None = None
    warnings: list[str] = field(default_factory=list)
    detections: str | None = None  # the file with its detections, relative to the results

    def number(self, part: str, key: str) -> Number:
        """A number of `detection`, `primary` or `cost`; None where the record has none."""
        return getattr(getattr(self, part), key, None)

    def interval(self, key: str) -> list[float] | None:
        return (self.intervals or {}).get(key)


@dataclass(frozen=True)
class Verdict:
    interval: list[float]  # 95%, of the difference of two models in one number
    verdict: str  # what follows from the 99% interval


@dataclass(frozen=True)
class Comparison:  # of a pair of models
    a: str
    b: str
    numbers: dict[str, Verdict]  # of a - b, on a


@dataclass(frozen=True)
class DataDescription:
    source: str
    split: str
    images: int
    boxes: int  # without crowds
    classes: int
    class_names: list[str]
    fingerprint: str
    class_boxes: list[int] = field(default_factory=list)
    copies: int | None = None  # images that are near-copies of training images; None: not known


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
    """Write the file with the current time, software and hardware."""
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
    """Read and check the file. Raises InputError: no such file, or another form."""
    content = read_json(path, "; comprehensive_validation.py writes it")
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        about = f"validation results of format version {FORMAT_VERSION}, but of {version}"
        raise InputError(f"{path} is not a file of {about}: run comprehensive_validation.py again")
    return from_json(ValidationResults, content, str(path))


def read_json(path: str | Path, advice: str = "") -> typing.Any:
    """The content of a JSON file. Raises InputError: no such file, with `advice`, or another form."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}{advice}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {str(error)[:120]}") from error


def from_json(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """A value of JSON as `kind`: a dataclass, a list or dictionary, a plain type, or one of them or None.

    Raises InputError with `where`, its place, where it has another type or lacks a field.
    """
    origin, inside, is_record = typing.get_origin(kind), typing.get_args(kind), is_dataclass(kind)
    if origin is types.UnionType:
        return None if value is None else from_json(inside[0], value, where)
    if kind is float and type(value) is int and abs(value) < LARGEST:
        return float(value)
    if type(value) is not (dict if is_record else origin or kind):
        raise InputError(f"{where} must be {getattr(kind, '__name__', kind)}, not {str(value)[:40]}")
    if is_record:
        given = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in value}
        try:
            return kind(**{name: from_json(hint, value[name], f"{where}: {name}") for name, hint in given.items()})
        except TypeError as error:
            raise InputError(f"{where}: {error}") from error
    if origin is list:
        return [from_json(inside[0], item, f"{where}: {number}") for number, item in enumerate(value)]
    if origin is dict:
        return {key: from_json(inside[1], item, f"{where}: {key}") for key, item in value.items()}
    return value
