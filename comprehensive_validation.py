"""Evaluate detectors by one protocol: COCO's numbers, the study's columns, their uncertainty, errors and cost.

Every model runs once on the same images; all numbers come from these detections, with 95% intervals by resampling the
images. A model that cannot be loaded has a record with its error, and the others are still evaluated.

  python comprehensive_validation.py                     both detectors, YOLOv8n and YOLOv8x on 500 images of COCO
  python comprehensive_validation.py --models a.pth yolov8n.pt exported_openvino_model --data my_folder --val-images 0
  python comprehensive_validation.py --models a.pth --from-detections other.json --report report.html

Writes OUTPUT (JSON; docs/evaluation.md explains every field), which plot_results.py turns into charts, and beside it
each model's detections in COCO's results format.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.utils import set_seed

from common import cli
from common.cli import flag
from common.console import InputError, Interrupted
from common.data.coco import CocoData
from common.data.sources import DataFlags, load_split
from common.evaluate import bootstrap
from common.evaluate.detections import coco_detections, read_detections
from common.evaluate.evaluation import Evaluation, Predictor, evaluate, unique_names
from common.evaluate.results import ValidationRecord, ValidationResults, write_results
from common.files import atomic_write, check_writable
from common.model import postprocess
from common.runtime import RuntimeFlags, make_accelerator
from common.show.tables import format_comparisons, format_table
from common.types import Predictions

MODELS = ("dino2_detector.pth", "improved_dino2_detector.pth", "yolov8n.pt", "yolov8x.pt")
INCOMPLETE = 3  # exit status of --strict where a model could not be evaluated


@dataclass(frozen=True)
class Settings(RuntimeFlags, DataFlags):
    models: tuple[str, ...] = flag(
        (),
        "checkpoints (.pth), and weight files or exported folders that ultralytics runs "
        f"(default: {' '.join(MODELS)}; none with --from-detections)",
    )
    from_detections: tuple[str, ...] = flag((), "files of detections in COCO's results format, each one more model")
    flip: bool = flag(False, "run checkpoints on the mirror image of each image too: half as fast")
    strict: bool = flag(
        False, f"exit with {INCOMPLETE} where a model could not be evaluated, stop where data would have to be repaired"
    )
    output: str = flag("validation_results.json", "the results to write")
    report: str = flag("", "also write a report with charts and images, one HTML file")


def predict(path: str, settings: Settings, data: CocoData, predictor: Predictor) -> Predictions:
    """The detections of the model in `path` on the images."""
    if path in settings.from_detections:
        return read_detections(path, data)
    if path.endswith(".pth"):
        return predictor.predictions(path, data)
    from common.evaluate.yolo import yolo_predictions  # ultralytics is optional

    return yolo_predictions(path, data, settings.batch_size, predictor.accelerator.device)


def detections_file(settings: Settings, name: str) -> Path:
    """The file that the detections of a model are written to."""
    output = Path(settings.output)
    return output.parent / f"{output.stem}_detections" / f"{name}.json"


def evaluate_model(
    name: str, path: str, settings: Settings, data: CocoData, predictor: Predictor, weights: np.ndarray
) -> Evaluation:
    """Evaluate one model and write its detections; the record has numbers, or an error.

    Several processes share the images of a checkpoint; the main one runs other models, and evaluates.
    """
    is_main = predictor.accelerator.is_main_process
    shared = path.endswith(".pth") and path not in settings.from_detections
    try:
        predictions = predict(path, settings, data, predictor) if shared or is_main else None
        if predictions is None or not is_main:
            return Evaluation(ValidationRecord(name, path))
        evaluation = evaluate(name, path, predictions, data, weights)
    except InputError as error:
        return Evaluation(ValidationRecord(name, path, error=str(error)))
    for warning in evaluation.record.warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr, flush=True)
    file = detections_file(settings, name)
    with atomic_write(file, "w") as stream:
        json.dump(coco_detections(evaluation.table, data.category_ids), stream)
    relative = str(file.relative_to(Path(settings.output).parent))
    return replace(evaluation, record=replace(evaluation.record, detections=relative))


def evaluate_all(settings: Settings, data: CocoData, predictor: Predictor) -> list[Evaluation]:
    """The evaluation of every model.

    Raises:
        InputError: a model is given twice.
        Interrupted: its advice are the flags that read the detections of the finished models.
    """
    models = settings.models or (() if settings.from_detections else MODELS)
    paths = (*models, *settings.from_detections)
    if len(set(paths)) < len(paths):
        raise InputError(f"a model is given twice: {', '.join(paths)}")
    weights = bootstrap.draws(len(data), settings.seed)
    evaluations: list[Evaluation] = []
    try:
        for name, path in zip(unique_names(paths), paths, strict=True):
            evaluations.append(evaluate_model(name, path, settings, data, predictor, weights))
    except Interrupted as interrupted:
        written = [str(detections_file(settings, e.record.name)) for e in evaluations if e.record.detections]
        if written:
            interrupted.advice = f"the finished models do not have to run again: --from-detections {' '.join(written)}"
        raise
    return evaluations


def describe_protocol(seed: int) -> dict:
    """The settings that all models share."""
    return {
        "max_detections": postprocess.MAX_DETECTIONS,
        "min_score": postprocess.MIN_SCORE,
        "nms_iou": postprocess.NMS_IOU,
        "crowds": "ignored, as COCO does",
        "primary_object": "largest non-crowd box and highest-scoring detection; class averages by support",
        "evaluator": "faster-coco-eval",
        "intervals": f"Bayesian bootstrap over images, {bootstrap.RESAMPLES} resamples, {bootstrap.LEVEL}%",
        "seed": seed,
    }


def describe_data(settings: Settings, data: CocoData) -> dict:
    """The data set of the results."""
    return {
        "source": settings.val_json or settings.data,
        "split": "val",
        "images": len(data),
        "boxes": int((~data.crowd).sum()),
        "classes": len(data.class_names),
        "class_names": list(data.class_names),
        "fingerprint": data.fingerprint(),
    }


def main(settings: Settings) -> ValidationResults:
    """Evaluate every model, print the table, write and return the results; only the main process prints and writes."""
    check_writable(settings.output)
    if settings.report:
        check_writable(settings.report)
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision)
    predictor = Predictor(accelerator, settings.batch_size, settings.workers, settings.flip)
    with accelerator.main_process_first():  # it fetches or draws data for the others
        data = load_split(settings, "val")
    evaluations = evaluate_all(settings, data, predictor)
    records = tuple(evaluation.record for evaluation in evaluations)
    samples = {e.record.name: e.samples for e in evaluations if e.samples}
    results = ValidationResults(
        describe_protocol(settings.seed), describe_data(settings, data), records, bootstrap.comparisons(samples)
    )
    if not accelerator.is_main_process:
        return results
    if all(record.error for record in records):
        raise InputError("no model could be evaluated: " + "; ".join(str(record.error) for record in records))
    write_results(settings.output, results)
    print(f"{len(data)} validation images of {results.dataset['source']}")
    print(format_table(records), format_comparisons(results), f"written to {settings.output}", sep="\n")
    if settings.report:
        from common.show.report import write_report  # matplotlib and jinja2 are only needed for it

        write_report(Path(settings.report), results, data, {e.record.name: e.table for e in evaluations if e.samples})
        print(f"report written to {settings.report}")
    if settings.strict and any(record.error for record in records):
        sys.exit(INCOMPLETE)
    return results


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
