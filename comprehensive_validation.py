"""Judge detectors by one protocol: COCO's numbers, the study's columns, how sure they are, why, and at what cost.

Every model sees the same images; its detections are made once, and all numbers come from them, with 95% intervals by
resampling the images. A model that cannot be had keeps a record with its error; the others are still evaluated.

  python comprehensive_validation.py                     both detectors, YOLOv8n and YOLOv8x on 500 images of COCO
  python comprehensive_validation.py --models a.pth yolov8n.pt exported_openvino_model --data my_folder --val-images 0
  python comprehensive_validation.py --models a.pth --from-detections other.json --report report.html

Writes OUTPUT (JSON, the README explains every field), which plot_results.py turns into charts, and beside it each
model's detections in COCO's results format.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import set_seed

from common import cli
from common.cli import flag
from common.console import InputError, Interrupted
from common.data.coco import CocoData
from common.data.sources import DataSource, load_split
from common.evaluate.bootstrap import LEVEL, RESAMPLES, comparisons, draws
from common.evaluate.detections import coco_detections
from common.evaluate.evaluation import Judgement, Runner, found_by_checkpoint, found_in_file, judge, unique_names
from common.evaluate.results import ValidationRecord, ValidationResults, read_results, write_results
from common.files import atomic_write, check_writable
from common.model.postprocess import MAX_DETECTIONS, MIN_SCORE, NMS_IOU
from common.runtime import make_accelerator
from common.show.tables import format_comparisons, format_table
from common.types import Found

MODELS = ("dino2_detector.pth", "improved_dino2_detector.pth", "yolov8n.pt", "yolov8x.pt")
NOT_ALL = 3  # exit code of --strict where a model could not be evaluated


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = flag(
        (),
        "checkpoints (.pth), and weight files or exported folders that ultralytics runs "
        f"(default: {' '.join(MODELS)}; none with --from-detections)",
    )
    from_detections: tuple[str, ...] = flag((), "files of detections in COCO's results format, each one more model")
    data: str = flag("detection-datasets/coco", "folder of labelled images, hub data set id, coco-official, or demo")
    val_json: str = flag("", "validation annotations, where the folder has no known layout")
    val_images_dir: str = flag("", "the folder of their images")
    image_ids: str = flag("", "file of the images to take, a line each: train or val, and the id")
    sample_seed: int = flag(-1, "draw the images at random by this seed; -1 = take the first", at_least=-1)
    box_format: str = flag("auto", "boxes of hub data; auto = what fits best, said", choices=("auto", "xyxy", "xywh"))
    val_images: int = flag(500, "validation images, the first of the file; 0 = all", at_least=0)
    flip: bool = flag(False, "checkpoints look at each image's mirror image too: half as fast")
    batch_size: int = flag(16, "images at once", at_least=1)
    precision: str = flag("auto", "arithmetic; auto = the fastest here", choices=("auto", "fp32", "bf16", "fp16"))
    workers: int = flag(2, "processes that decode images", at_least=0)
    seed: int = flag(0, "of the resampled images; detection itself draws nothing", at_least=0, at_most=cli.MAX_SEED)
    strict: bool = flag(
        False, f"exit with {NOT_ALL} where a model could not be evaluated, stop where data would have to be repaired"
    )
    output: str = flag("validation_results.json", "the results to write")
    resume: bool = flag(False, "go on where an interrupted validation of the same images stopped")
    report: str = flag("", "also write a report with charts and images, one HTML file")


def find(path: str, settings: Settings, data: CocoData, runner: Runner) -> Found:
    """What the model in `path` finds on the images."""
    if path in settings.from_detections:
        return found_in_file(path, data)
    if path.endswith(".pth"):
        return found_by_checkpoint(path, data, runner)
    from common.evaluate.yolo import found_by_yolo

    return found_by_yolo(path, data, settings.batch_size, runner.accelerator.device)


def judge_model(name: str, path: str, settings: Settings, data: CocoData, runner: Runner, weights) -> Judgement:
    """The judgement of one model: with numbers and detections written, or with its error.

    Several processes look at the images together; the first alone judges, and runs what is not of this project.
    """
    try:
        together = path.endswith(".pth") and path not in settings.from_detections
        found = find(path, settings, data, runner) if together or runner.accelerator.is_main_process else None
        if not runner.accelerator.is_main_process:
            return Judgement(ValidationRecord(name, path))
        judgement = judge(name, path, found, data, weights)
    except InputError as error:
        return Judgement(ValidationRecord(name, path, error=str(error)))
    for warning in judgement.record.warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr, flush=True)
    output = Path(settings.output)
    file = Path(f"{output.stem}_detections", f"{name}.json")
    with atomic_write(output.parent / file, "w") as stream:
        json.dump(coco_detections(judgement.table, data.category_ids), stream)
    return replace(judgement, record=replace(judgement.record, detections=str(file)))


def judged_before(settings: Settings, data: CocoData) -> dict[str, ValidationRecord]:
    """By path: the records that an interrupted validation left, with --resume, of models that have not changed since.

    Raises:
        InputError: it was of other images, or by another protocol.
    """
    path = partial_file(settings)
    if not settings.resume or not path.is_file():
        return {}
    before = read_results(path)
    if (before.dataset.get("fingerprint"), before.protocol) != (data.fingerprint(), describe_protocol(settings.seed)):
        raise InputError(f"--resume: {path} is of other images or another protocol; begin again, without --resume")
    since = path.stat().st_mtime
    whole = [record for record in before.models if record.detections]
    return {r.path: r for r in whole if not Path(r.path).exists() or Path(r.path).stat().st_mtime < since}


def judge_again(record: ValidationRecord, settings: Settings, data: CocoData, weights) -> Judgement:
    """The judgement behind a record, from the detections that were written with it."""
    found = found_in_file(str(Path(settings.output).parent / record.detections), data)
    return replace(judge(record.name, record.path, found, data, weights), record=record)


def partial_file(settings: Settings) -> Path:
    """Where the records of an interrupted validation wait for --resume."""
    return Path(settings.output).with_suffix(".partial.json")


def judge_all(settings: Settings, data: CocoData, runner: Runner) -> list[Judgement]:
    """The judgement of every model.

    Raises:
        Interrupted: with the records of the models that are done kept in `partial_file`.
    """
    models = settings.models or (() if settings.from_detections else MODELS)
    paths = (*models, *settings.from_detections)
    if len(set(paths)) < len(paths):
        raise InputError(f"a model is named twice: {', '.join(paths)}")
    weights = draws(len(data), settings.seed)
    before, judgements = judged_before(settings, data), []
    try:
        for name, path in zip(unique_names(paths), paths, strict=True):
            if path in before:
                judgements.append(judge_again(before[path], settings, data, weights))
            else:
                judgements.append(judge_model(name, path, settings, data, runner, weights))
    except Interrupted as interrupted:
        if judgements and runner.accelerator.is_main_process:
            write_results(partial_file(settings), summary(settings, data, judgements))
            interrupted.advice = f"{len(judgements)} of {len(paths)} models are done; go on with --resume"
        raise
    return judgements


def summary(settings: Settings, data: CocoData, judgements: Sequence[Judgement]) -> ValidationResults:
    """The content of the results file."""
    compared = comparisons({j.record.name: j.samples for j in judgements if j.samples})
    records = tuple(judgement.record for judgement in judgements)
    return ValidationResults(describe_protocol(settings.seed), describe_data(settings, data), records, compared)


def describe_protocol(seed: int) -> dict:
    """What was the same for every model."""
    return {
        "max_detections": MAX_DETECTIONS,
        "min_score": MIN_SCORE,
        "nms_iou": NMS_IOU,
        "crowds": "ignored, as COCO does",
        "primary_object": "largest non-crowd box against the highest-scoring detection; class averages by support",
        "evaluator": "faster-coco-eval",
        "intervals": f"Bayesian bootstrap over images, {RESAMPLES} resamples, {LEVEL}%",
        "seed": seed,
    }


def describe_data(settings: Settings, data: CocoData) -> dict:
    """What the numbers were measured on."""
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
    """Evaluate every model, print the table, write and return the results; of several processes, the first does."""
    check_writable(settings.output)
    if settings.report:
        check_writable(settings.report)
    set_seed(settings.seed)
    runner = Runner(make_accelerator(settings.precision), settings.batch_size, settings.workers, settings.flip)
    source = cli.part(settings, DataSource)
    with runner.accelerator.main_process_first():  # what is fetched or drawn is then there for the others
        data = load_split(source, "val", settings.val_images, settings.strict)
    judgements = judge_all(settings, data, runner)
    results = summary(settings, data, judgements)
    records = results.models
    if not runner.accelerator.is_main_process:
        return results
    if all(record.error for record in records):
        raise InputError("no model could be evaluated: " + "; ".join(str(record.error) for record in records))
    write_results(settings.output, results)
    partial_file(settings).unlink(missing_ok=True)
    print(f"{len(data)} validation images of {results.dataset['source']}")
    print(format_table(records), format_comparisons(results), f"written to {settings.output}", sep="\n")
    if settings.report:
        from common.show.report import write_report

        write_report(Path(settings.report), results, data, {j.record.name: j.table for j in judgements if j.samples})
        print(f"report written to {settings.report}")
    if settings.strict and any(record.error for record in records):
        sys.exit(NOT_ALL)
    return results


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
