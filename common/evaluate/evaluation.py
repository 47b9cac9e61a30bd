"""What a model detects, and the ground truth -> its record, for both validation scripts. Runs no model."""

import itertools
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.console import InputError, first_few
from common.data.memory import DetectionData
from common.evaluate import bootstrap, metrics
from common.evaluate.bootstrap import Sampled, resample
from common.evaluate.detections import DetectionTable, ModelRun, label_map
from common.evaluate.diagnosis import diagnose
from common.evaluate.primary import primary_numbers, primary_pairs
from common.evaluate.results import DataDescription, DetectionNumbers, PrimaryNumbers, ValidationRecord
from common.evaluate.trust import check_agreement
from common.model import postprocess

log = logging.getLogger(__name__)
MANY_IMAGES = 1000  # whose intervals take seconds
NAME_BYTES = 200  # of a model's name, from which file names are made
PROTOCOL = {  # what all models share, with the seed; of the detections' limits those of this project's detectors
    "max_detections": postprocess.MAX_DETECTIONS,
    "min_score": postprocess.MIN_SCORE,
    "nms_iou": postprocess.NMS_IOU,
    "crowds": "ignored, as COCO does",
    "primary_object": "largest non-crowd box and highest-scoring detection; class averages by support",
    "intervals": f"Bayesian bootstrap over images, {bootstrap.RESAMPLES} resamples, {bootstrap.SHOWN_LEVEL}%",
    "verdicts": f"{bootstrap.VERDICT_LEVEL}% interval of the difference",
}


@dataclass(frozen=True)
class Evaluation:
    """A record, with its detections and its numbers in the resamples unless the record has an error."""

    record: ValidationRecord
    table: DetectionTable | None = None
    samples: dict[str, Sampled] = field(default_factory=dict)


def evaluate(
    name: str, path: str, run: ModelRun, data: DetectionData, weights: np.ndarray | None = None, strict: bool = False
) -> Evaluation:
    """Measure the model of that name, whose file is in `path`, by what it detects on the images of `data`.

    `weights` (P, R) are `bootstrap.image_weights`; without them intervals, diagnosis and `trust` are left out. Raises
    InputError: it has no class of the data; with `strict`, its detections do not look as they are meant.
    """
    labels = label_map(run.class_names, data)
    if not (known := int((labels >= 0).sum())):
        raise InputError(f"{path}: none of its classes ({first_few(run.class_names)}) is in {data.source}")
    table = run.table.relabelled(labels)
    matched = metrics.match_detections(table, data)
    point, boxes_alone = metrics.operating_point(matched), metrics.match_boxes_alone(matched)
    primary, agnostic = primary_pairs(matched, point.score), metrics.mean(metrics.average_precision(boxes_alone))
    record = ValidationRecord(
        name,
        path,
        detection=DetectionNumbers(**metrics.coco_numbers(matched), class_agnostic_AP50=agnostic),
        primary=PrimaryNumbers(**primary_numbers(primary)),
        cost=run.cost,
        conditions=run.conditions | {"classes_compared": known, "classes_in_data": len(data.class_names)},
        warnings=[*run.warnings, *_data_warnings(run.class_names, labels, data)],
    )
    if weights is None:
        return Evaluation(record, table)
    doubts = check_agreement(matched)
    if doubts and strict:
        raise InputError(f"{path}: {doubts[0]} (refused by --strict)")
    if len(data) > MANY_IMAGES:
        log.info(f"{name}: intervals of the numbers on {len(data)} images")
    numbers, resamples = vars(record.primary) | vars(record.detection), resample(matched, boxes_alone, primary, weights)
    samples = {key: Sampled(numbers[key], values) for key, values in resamples.items() if numbers[key] is not None}
    intervals = {key: np.clip(samples[key].interval(), 0, 1).tolist() if key in samples else None for key in resamples}
    warnings, diagnosis = [*record.warnings, *doubts], diagnose(matched, point)
    return Evaluation(replace(record, diagnosis=diagnosis, intervals=intervals, warnings=warnings), table, samples)


def describe_data(data: DetectionData, source: str, split: str = "val", copies: int | None = None) -> DataDescription:
    """The data set of the results, called as `--data` or `--val-json` names it, of the hub with its revision."""
    if data.source.startswith(f"{source}@"):
        source = data.source.rpartition(",")[0]
    counts, names = data.class_counts().tolist(), list(data.class_names)
    numbers, digest = (len(data), sum(counts), len(names)), data.fingerprint()
    return DataDescription(source, split, *numbers, names, digest, counts, copies)


def _data_warnings(class_names: tuple[str, ...], labels: np.ndarray, data: DetectionData) -> list[str]:
    """Which classes were matched although their names differ, which the model lacks, and images of too many objects."""
    pairs, warnings = zip(class_names, (data.class_names[k] if k >= 0 else None for k in labels), strict=True), []
    if differ := [f"{own} = {name}" for own, name in pairs if name not in (own, None)]:
        warnings.append(f"{len(differ)} classes were matched although their names differ ({first_few(differ)})")
    if missing := [name for label, name in enumerate(data.class_names) if label not in labels]:
        about = f"the model lacks {len(missing)} of the {len(data.class_names)} classes of {data.source}"
        warnings.append(f"{about} ({first_few(missing)}); their objects count as missed")
    if many := int((np.bincount(data.image_of_box()[~data.crowd]) > metrics.MAX_DETECTIONS).sum()):
        limit = f"more than {metrics.MAX_DETECTIONS} objects, the most that COCO counts of a class"
        warnings.append(f"{many} images have {limit} and that this project's detectors give in all: AR is below 1")
    return warnings


def unique_names(paths: Sequence[str]) -> list[str]:
    """A name for each path, from which files are named: its stem, with a number where another has it, case aside."""
    names: dict[str, str] = {}
    for path in paths:
        stem = Path(os.path.abspath(path)).stem.strip(".\\")  # noqa: PTH100 (resolve follows links)
        stem = os.fsdecode(os.fsencode(stem)[-NAME_BYTES:].decode(errors="ignore").encode()) or "model"
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        name = next(name for name in candidates if unicodedata.normalize("NFC", name).casefold() not in names)
        names[unicodedata.normalize("NFC", name).casefold()] = name
    return list(names.values())
