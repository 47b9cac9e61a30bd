"""Folds, for few labels: each image is detected by a head that has not seen it, and so all of them are evaluated."""

import json
import logging
from pathlib import Path

from common.data.memory import DetectionData
from common.evaluate import bootstrap
from common.evaluate.detections import DetectionTable, ModelRun
from common.evaluate.evaluation import PROTOCOL, describe_data, evaluate
from common.evaluate.label_check import doubtful_labels
from common.evaluate.results import ValidationResults, write_results
from common.files import atomic_write

log = logging.getLogger(__name__)
RESULTS, DOUBTS = "folds.json", "labels_to_check.json"


def write_folds(
    folder: Path, table: DetectionTable, data: DetectionData, source: str, seed: int
) -> tuple[ValidationResults, list[dict]]:
    """Write the evaluation of these detections and the labels that they doubt, and return both."""
    weights = bootstrap.image_weights(len(data), seed)
    record = evaluate("folds", str(folder), ModelRun(table, data.class_names), data, weights).record
    about = PROTOCOL | {"seed": seed}, describe_data(data, source, "train")
    results, doubts = ValidationResults(*about, [record]), doubtful_labels(table, data)
    write_results(folder / RESULTS, results)
    with atomic_write(folder / DOUBTS, "w") as file:
        json.dump(doubts, file, indent=1)
    low, high = record.interval("AP50") or (0, 1)
    number = f"mAP@0.5 {record.number('detection', 'AP50') or 0:.3f} [{low:.3f}, {high:.3f}]"
    log.info(f"each of {len(data)} images detected by a head that has not seen it: {number}; {folder / RESULTS}")
    log.info(f"{len(doubts)} labels to look at, the most doubtful first: {folder / DOUBTS}")
    return results, doubts
