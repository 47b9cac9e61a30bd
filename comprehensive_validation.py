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
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate.utils import set_seed

from common import cli
from common.cli import flag, flag_texts
from common.console import InputError, Interrupted, last_line, print_traceback
from common.data.memory import DetectionData
from common.data.sources import DataFlags, load_split
from common.evaluate import bootstrap
from common.evaluate.auto import auto_predictions, is_auto
from common.evaluate.detections import DetectionTable, coco_detections, read_detections
from common.evaluate.evaluation import Evaluation, Predictor, evaluate, unique_names
from common.evaluate.results import ValidationRecord, ValidationResults, write_results
from common.files import atomic_write, check_outputs, check_writable, is_same_file
from common.hub import hub_name, located
from common.model import postprocess
from common.model.checkpoint import is_checkpoint
from common.model.exported import is_exported
from common.runtime import RuntimeFlags, make_accelerator
from common.show.tables import format_comparisons, format_table
from common.types import Predictions

MODELS = ("dino2_detector.pth", "improved_dino2_detector.pth", "yolov8n.pt", "yolov8x.pt")
ERROR_LENGTH = 400  # characters of the error in a record
INCOMPLETE = 3  # exit status of --strict where a model could not be evaluated


@dataclass(frozen=True)
class Settings(RuntimeFlags, DataFlags):
    models: tuple[str, ...] = flag(
        (),
        "checkpoints (.pth), their exports, folders and hub ids of detectors of transformers, and weight files or "
        "exported folders that ultralytics runs "
        f"(default: {' '.join(MODELS)}; none with --from-detections)",
    )
    from_detections: tuple[str, ...] = flag((), "files of detections in COCO's results format, each one more model")
    flip: bool = flag(False, "run checkpoints on the mirror image of each image too: half as fast")
    strict: bool = flag(
        False, f"exit with {INCOMPLETE} where a model could not be evaluated, stop where data would have to be repaired"
    )
    output: str = flag("validation_results.json", "the results to write")
    report: str = flag("", "also write a report with charts and images, one HTML file")


def predict(path: str, settings: Settings, data: DetectionData, predictor: Predictor) -> Predictions:
    """The detections of the model in `path` on the images."""
    if is_checkpoint(path) or is_exported(path):
        return predictor.predictions(path, data)
    if is_auto(path):
        return auto_predictions(path, data, settings.batch_size, predictor.accelerator.device)
    from common.evaluate.yolo import yolo_predictions  # ultralytics is optional

    return yolo_predictions(path, data, settings.batch_size, predictor.accelerator.device)


def detections_file(settings: Settings, name: str) -> Path:
    """The file that the detections of a model are written to."""
    output = Path(settings.output)
    return output.parent / f"{output.stem}_detections" / f"{name}.json"


def write_detections(settings: Settings, name: str, path: str, table: DetectionTable, data: DetectionData) -> str:
    """Write COCO results JSON with file names; returns its path relative to the results.

    A file that is itself read with --from-detections is left as it is: it may hold more images than were evaluated.
    """
    file = detections_file(settings, name)
    if not is_same_file(file, Path(path)):
        folder = os.path.commonpath([image.path.parent for image in data.images])
        names = {image.id: image.path.relative_to(folder).as_posix() for image in data.images}
        rows = [row | {"file_name": names[row["image_id"]]} for row in coco_detections(table, data.category_ids)]
        with atomic_write(file, "w") as stream:
            json.dump(rows, stream)
    return str(file.relative_to(Path(settings.output).parent))


def evaluate_model(
    name: str, path: str, settings: Settings, data: DetectionData, predictor: Predictor, weights: np.ndarray
) -> Evaluation:
    """Evaluate one model and write its detections; the record has numbers, or an error.

    Several processes share the images of a checkpoint; the main one runs other models, and evaluates.
    """
    is_main, shared, predictions = predictor.accelerator.is_main_process, False, None
    try:
        if path in settings.from_detections:
            predictions = read_detections(path, data)
        else:
            source = located(hub_name(path))
            shared = is_checkpoint(source)
            predictions = predict(source, settings, data, predictor) if shared or is_main else None
        if predictions is None or not is_main:
            return Evaluation(ValidationRecord(name, path))
        evaluation = evaluate(name, path, predictions, data, weights)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if shared and predictor.accelerator.num_processes > 1 and not isinstance(error, InputError):
            raise  # the other processes wait for this one
        print_traceback()
        return Evaluation(ValidationRecord(name, path, error=last_line(error)[:ERROR_LENGTH]))
    warnings, written = evaluation.record.warnings, None
    try:
        written = write_detections(settings, name, path, evaluation.table, data)
    except InputError as error:
        warnings = [*warnings, f"its detections are not kept: {error}"]
    for warning in warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr, flush=True)
    return replace(evaluation, record=replace(evaluation.record, detections=written, warnings=warnings))


def named_models(settings: Settings) -> dict[str, str]:
    """The path of each model, by its short name.

    Raises:
        InputError: a model is given twice.
    """
    models = settings.models or (() if settings.from_detections else MODELS)
    paths = (*models, *settings.from_detections)
    if len(set(paths)) < len(paths):
        raise InputError(f"a model is given twice: {', '.join(paths)}")
    return dict(zip(unique_names(paths), paths, strict=True))


def check_files(settings: Settings, models: dict[str, str], data: DetectionData) -> None:
    """Check before the work that no output overwrites a model, detections that are read, annotations or an image.

    Raises:
        InputError: an output would.
    """
    written = {name: detections_file(settings, name) for name in models}
    outputs = [file for name, file in written.items() if not is_same_file(file, Path(models[name]))]
    outputs += [Path(path) for path in (settings.output, settings.report) if path]
    images = (image.path for image in data.images)
    check_outputs(outputs, [*flag_texts(settings, "output", "report"), *models.values(), data.source, *images])


def evaluate_all(
    settings: Settings, models: dict[str, str], data: DetectionData, predictor: Predictor
) -> tuple[ValidationResults, list[Evaluation]]:
    """Evaluate every model and write the results, after an unexpected error those of the finished models.

    Raises:
        InputError: the results cannot be written.
        Interrupted: with the flags that read the detections of the finished models as its note.
    """
    weights = bootstrap.draws(len(data), settings.seed)
    evaluations: list[Evaluation] = []
    try:
        for name, path in models.items():
            evaluations.append(evaluate_model(name, path, settings, data, predictor, weights))
    except Interrupted as interrupted:
        written = [str(detections_file(settings, e.record.name)) for e in evaluations if e.record.detections]
        if written:
            interrupted.add_note(f"finished models do not have to run again: --from-detections {shlex.join(written)}")
        raise
    except Exception:  # a fault of the program does not lose what was computed
        write_evaluated(settings, data, evaluations, predictor)
        raise
    return write_evaluated(settings, data, evaluations, predictor), evaluations


def write_evaluated(
    settings: Settings, data: DetectionData, evaluations: list[Evaluation], predictor: Predictor
) -> ValidationResults:
    """The results of these models, written by the main process if any of them has numbers."""
    results = collect(settings, data, evaluations)
    if predictor.accelerator.is_main_process and any(evaluation.samples for evaluation in evaluations):
        write_results(settings.output, results)
    return results


def collect(settings: Settings, data: DetectionData, evaluations: list[Evaluation]) -> ValidationResults:
    """The results of these models."""
    samples = {e.record.name: e.samples for e in evaluations if e.samples}
    return ValidationResults(
        describe_protocol(settings.seed),
        describe_data(settings, data),
        tuple(evaluation.record for evaluation in evaluations),
        bootstrap.comparisons(samples, len(data.with_objects())),
    )


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


def describe_data(settings: Settings, data: DetectionData) -> dict:
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


def report(settings: Settings, results: ValidationResults, data: DetectionData, evaluations: list[Evaluation]) -> None:
    """Write the report.

    Raises:
        InputError: for any error, as the results are on disk already.
    """
    tables = {e.record.name: e.table for e in evaluations if e.samples}
    try:
        from common.show.report import write_report  # matplotlib and jinja2 are only needed for it

        write_report(Path(settings.report), results, data, tables)
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        message = f"the results are in {settings.output}, but the report failed: {kind}{last_line(error)}"
        raise InputError(message) from error
    print(f"report written to {settings.report}")


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
    models = named_models(settings)
    check_files(settings, models, data)
    results, evaluations = evaluate_all(settings, models, data, predictor)
    if not accelerator.is_main_process:
        return results
    if all(record.error for record in results.models):
        raise InputError("no model could be evaluated: " + "; ".join(str(record.error) for record in results.models))
    print(f"{len(data)} validation images of {results.dataset['source']}")
    print(format_table(results.models), format_comparisons(results), sep="\n")
    images = len(data.with_objects())
    if results.comparisons and images < bootstrap.MIN_IMAGES:
        print(f"a verdict needs {bootstrap.MIN_IMAGES} images with objects, and these are {images}")
    print(f"written to {settings.output}")
    if settings.report:
        report(settings, results, data, evaluations)
    if settings.strict and any(record.error for record in results.models):
        sys.exit(INCOMPLETE)
    return results


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
