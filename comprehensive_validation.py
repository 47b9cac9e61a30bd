"""Evaluate detectors by one protocol: COCO's numbers, the study's columns, their uncertainty, errors and cost.

Every model runs once on the same images. One that cannot be evaluated has a record with its error.

  python comprehensive_validation.py                     both detectors, YOLOv8n and YOLOv8x on 500 images of COCO
  python comprehensive_validation.py --models a.pth yolov8n.pt exported_openvino_model --data my_folder --val-images 0
  python comprehensive_validation.py --models a.pth --from-detections other.json --report report.html

Writes OUTPUT (JSON; docs/evaluation.md explains every field), which plot_results.py turns into charts, and beside it
each model's detections in COCO's results format.
"""

import gc
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import cli
from common.cli import flag, flag_texts, message_of
from common.console import InputError, Interrupted, last_line, print_traceback
from common.data.memory import DetectionData
from common.data.sources import DataFlags, count_copies, load_split
from common.evaluate import bootstrap
from common.evaluate.detect import run_detector
from common.evaluate.detections import ModelRun, coco_detections, read_detections, relative_files
from common.evaluate.evaluation import PROTOCOL, Evaluation, describe_data, evaluate, unique_names
from common.evaluate.others import run_transformers, run_yolo
from common.evaluate.results import ValidationRecord, ValidationResults, write_results
from common.export.runtime import exported_file
from common.files import atomic_write, check_outputs, is_same_file
from common.hub import CONFIG, hub_name, located
from common.model import load_detector
from common.model.checkpoint import is_checkpoint
from common.runtime import RuntimeFlags, check_single_process, default_device
from common.show.tables import format_comparisons, format_table

MODELS = ("dino2_detector.pth", "improved_dino2_detector.pth", "yolov8n.pt", "yolov8x.pt")
INCOMPLETE = 3  # exit status of --strict where a model could not be evaluated


@dataclass(frozen=True)
class Settings(RuntimeFlags, DataFlags):
    split: str = flag("val", "the part to evaluate on", choices=("val", "test"))
    models: tuple[str, ...] = flag(
        (),
        "checkpoints (.pth), their exports, folders and hub ids of transformers' detectors, and what ultralytics runs "
        f"(default: {' '.join(MODELS)}; none with --from-detections)",
    )
    from_detections: tuple[str, ...] = flag((), "files of detections in COCO's results format, each one more model")
    strict: bool = flag(
        False,
        f"exit with {INCOMPLETE} where a model has no numbers or was misread, stop where data would be repaired",
    )
    output: str = flag("validation_results.json", "the results to write")
    report: str = flag("", "also write a report with charts and images, one HTML file")


def run_model(path: str, settings: Settings, data: DetectionData) -> ModelRun:
    """What the model or the file of detections in `path` has on the images."""
    if path in settings.from_detections:
        return read_detections(path, data)
    path, device = located(hub_name(path)), default_device()
    if is_checkpoint(path) or exported_file(path):
        detector = load_detector(path, precision=settings.precision)
        return run_detector(detector, data, settings.batch_size, settings.workers, Path(path).stem)
    run = run_transformers if Path(path, CONFIG).is_file() else run_yolo
    return run(path, data, settings.batch_size, device)


def detections_file(settings: Settings, name: str) -> Path:
    """The file that the detections of a model are written to."""
    return Path(f"{Path(settings.output).with_suffix('')}_detections", f"{name}.json")


def evaluate_model(name: str, path: str, settings: Settings, data: DetectionData, weights: np.ndarray) -> Evaluation:
    """Evaluate one model and write its detections; the record has numbers, or an error.

    A file of detections that is read from its own place stays: it may hold more images than were evaluated.
    """
    file = detections_file(settings, name)
    try:
        evaluation = evaluate(name, path, run_model(path, settings, data), data, weights, settings.strict)
        if not is_same_file(file, Path(path)):
            with atomic_write(file, "w") as stream:
                json.dump(coco_detections(evaluation.table, data, relative_files(data)), stream)
    except Exception as error:  # other people's files and models raise any; the other models are still evaluated
        print_traceback()
        return Evaluation(ValidationRecord(name, path, error=describe_error(error)))
    finally:
        gc.collect()  # the model, before the next one is loaded
    for warning in evaluation.record.warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr)
    written = str(file.relative_to(Path(settings.output).parent))
    return replace(evaluation, record=replace(evaluation.record, detections=written))


def describe_error(error: Exception) -> str:
    """What a user can do about it; where the program does not expect it, its type and the last line of its message."""
    return message_of(error) or f"{type(error).__name__}: {last_line(error)[:400]}"


def prepare(settings: Settings) -> tuple[DetectionData, dict[str, str]]:
    """The images, and the path of each model by its short name. Raises InputError: a model is given twice, or an output
    cannot be written, is read, or is a file of another program."""
    check_single_process()
    if Path(settings.output).suffix.lower() != ".json":
        raise InputError(f"--output {settings.output}: results are JSON; give a name that ends in .json")
    paths = (*(settings.models or (() if settings.from_detections else MODELS)), *settings.from_detections)
    if len(set(paths)) < len(paths):
        raise InputError(f"a model is given twice: {', '.join(paths)}")
    data, models = load_split(settings, settings.split), dict(zip(unique_names(paths), paths, strict=True))
    outputs = [Path(path) for path in (settings.output, settings.report) if path]
    files = {detections_file(settings, name): path for name, path in models.items()}
    outputs += [file for file, path in files.items() if not is_same_file(file, Path(path))]
    inputs = [*flag_texts(settings, "output", "report"), *paths, data.source, *(image.path for image in data.images)]
    check_outputs(outputs, inputs)
    return data, models


def main(settings: Settings) -> ValidationResults:
    """Evaluate every model, print the table, write and return the results."""
    data, models = prepare(settings)
    weights, copies = bootstrap.image_weights(len(data), settings.seed), count_copies(settings, data)
    done = list[Evaluation]()
    try:
        for name, path in models.items():
            done.append(evaluate_model(name, path, settings, data, weights))
    except Interrupted as interrupted:
        if written := [str(detections_file(settings, e.record.name)) for e in done if not e.record.error]:
            interrupted.add_note(f"finished models do not have to run again: --from-detections {shlex.join(written)}")
        raise
    records = [evaluation.record for evaluation in done]
    if all(record.error for record in records):
        raise InputError("no model could be evaluated: " + "; ".join(str(record.error) for record in records))
    about = describe_data(data, settings.val_json or settings.data, settings.split, copies)
    images = len(data.with_objects())
    comparisons = bootstrap.comparisons({e.record.name: e.samples for e in done if e.samples}, images)
    results = ValidationResults(PROTOCOL | {"seed": settings.seed}, about, records, comparisons)
    write_results(settings.output, results)
    print(f"{len(data)} images of {about.source}, {about.split}", format_table(records), sep="\n")
    print(format_comparisons(results))
    if comparisons and images < bootstrap.MIN_IMAGES_FOR_VERDICT:
        print(f"a verdict needs {bootstrap.MIN_IMAGES_FOR_VERDICT} images with objects, and these are {images}")
    print(f"written to {settings.output}")
    if settings.report:
        try:
            from common.show.report import write_report  # matplotlib and jinja2 are only needed for it

            write_report(Path(settings.report), results, data, {e.record.name: e.table for e in done if e.samples})
        except Exception as error:
            message = f"the results are in {settings.output}, but the report failed: {describe_error(error)}"
            raise InputError(message) from error
        print(f"report written to {settings.report}")
    if settings.strict and any(record.error for record in records):
        sys.exit(INCOMPLETE)
    return results


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
