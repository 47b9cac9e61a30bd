"""Check trained detectors quickly: the study's columns and mAP@0.5, and boxes drawn beside the ground truth.

With --images no ground truth is needed: detections on your own images are drawn and written in COCO's format.

  python validate_models.py                                        both detectors on 500 images of COCO
  python validate_models.py --checkpoints a.pth b.pth --data my_folder --val-images 0
  python validate_models.py --checkpoints a.pth --images holiday/ cat.jpg

Writes into OUTPUT: contact_sheet.jpg, and in a folder for each model the annotated images and, with --images,
detections.json (COCO results format, with file_name and category_name beside the ids).
"""

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from common import cli
from common.cli import flag, flag_texts
from common.data.memory import DetectionData
from common.data.sources import DataFlags, load_split, unlabelled_images
from common.evaluate.detect import run_detector
from common.evaluate.detections import ModelRun, coco_detections
from common.evaluate.evaluation import evaluate, unique_names
from common.files import PROGRAM, atomic_write, check_outputs
from common.model import load_detector
from common.runtime import RuntimeFlags, check_single_process
from common.show.drawing import contact_sheet, detected_boxes, draw_boxes, side_by_side, true_boxes
from common.show.fonts import print_missing
from common.show.tables import format_table, short_names

SHEET_IMAGES = 16
COLUMNS = ("accuracy", "precision", "recall", "F1", "mean IoU", "mAP@0.5")


@dataclass(frozen=True)
class Settings(RuntimeFlags, DataFlags):
    split: str = flag("val", "the part to evaluate on", choices=("val", "test"))
    checkpoints: tuple[str, ...] = flag(
        ("dino2_detector.pth", "improved_dino2_detector.pth"), "detectors to check, or their exports"
    )
    images: tuple[str, ...] = flag((), "your own image files and folders, instead of validation images")
    draw: int = flag(24, "validation images to draw for each model, drawn at random by --seed; 0 = all", at_least=0)
    min_score: float = flag(
        -1.0, "draw detections with this score or a higher one, 0..1; below 0 = each detector's operating point"
    )
    output: str = flag("predictions", "folder for the images and detections")


def prepare(settings: Settings) -> tuple[DetectionData, dict[str, str], dict[int, str]]:
    """The images, the path of each detector by its short name, and the names of the images that are drawn, without
    suffix, by their index. Raises InputError: an output cannot be written, is read, or is a file of another program."""
    check_single_process()
    models = dict(zip(unique_names(settings.checkpoints), settings.checkpoints, strict=True))
    images = [Path(path) for path in settings.images]
    data = unlabelled_images(images) if images else load_split(settings, settings.split)
    chosen = np.arange(len(data))
    if settings.draw and not images and settings.draw < len(data):
        chosen = np.sort(np.random.default_rng(settings.seed).choice(len(data), settings.draw, replace=False))
    drawn = dict(zip(chosen.tolist(), unique_names([str(data.images[i].path) for i in chosen]), strict=True))
    files = [f"{name}.jpg" for name in drawn.values()] + ["detections.json"] * bool(images)
    outputs = [Path(settings.output, "contact_sheet.jpg")]
    outputs += [Path(settings.output, model, file) for model in models for file in files]
    inputs = [*flag_texts(settings, "output"), data.source, *(image.path for image in data.images)]
    check_outputs(outputs, inputs)
    return data, models, drawn


def run_one(path: str, name: str, settings: Settings, data: DetectionData) -> tuple[ModelRun, float]:
    """What one model detects, and its operating point; with --images the detections are written, too."""
    detector = load_detector(path, precision=settings.precision)
    run = run_detector(detector, data, settings.batch_size, settings.workers, name, timed=False)
    if not settings.images:
        return run, detector.min_score
    named = replace(data, class_names=detector.class_names, category_ids=detector.category_ids)
    file = Path(settings.output, name, "detections.json")
    with atomic_write(file, "w") as stream:
        json.dump(coco_detections(run.table, named, [str(image.path) for image in data.images]), stream)
    print(f"{name}: {len(run.table)} detections in {file}")
    return run, detector.min_score


def write_images(
    settings: Settings, data: DetectionData, runs: dict[str, ModelRun], scores: dict[str, float], drawn: dict[int, str]
) -> Path:
    """Annotated images of each model, from its own score on, and one contact sheet of all; returns the sheet's path."""

    def save(image: Image.Image, *parts: str) -> Path:
        with atomic_write(path := Path(settings.output, *parts)) as file:
            image.save(file, "JPEG", quality=88, comment=PROGRAM.encode())
        return path

    print_missing([*runs, *data.class_names, *(name for run in runs.values() for name in run.class_names)])
    sheet: list[Image.Image] = []
    for index, name in drawn.items():
        image = data.images[index].open()
        left = [("ground truth", draw_boxes(image, true_boxes(data, index)))] if len(data.labels) else []
        panels = []
        for title, (model, run) in zip(short_names(list(runs), 24), runs.items(), strict=True):
            panels.append((title, draw_boxes(image, detected_boxes(run.table, index, run.class_names, scores[model]))))
            save(side_by_side([*left, panels[-1]]), model, f"{name}.jpg")
        if len(sheet) < SHEET_IMAGES:
            sheet.append(side_by_side([*left, *panels]))
    return save(contact_sheet(sheet), "contact_sheet.jpg")


def main(settings: Settings) -> dict[str, dict]:
    """Returns, by model, the primary-object numbers and mAP@0.5; nothing with --images."""
    data, models, drawn = prepare(settings)
    runs, scores = {}, {}
    for name, path in models.items():
        runs[name], scores[name] = run_one(path, name, settings, data)
        gc.collect()  # the model, before the next one is loaded
    if settings.min_score >= 0:
        scores = dict.fromkeys(scores, settings.min_score)
    else:
        points = ", ".join(f"{score:.2f} ({name})" for name, score in scores.items())
        print(f"drawn are detections with at least the score of best F1 in validation, the operating point: {points}")
    records = []
    if not settings.images:
        records = [evaluate(name, models[name], run, data).record for name, run in runs.items()]
        warnings = [f"warning: {record.name}: {text}" for record in records for text in record.warnings]
        print(format_table(records, COLUMNS), *warnings, sep="\n")
    sheet = write_images(settings, data, runs, scores, drawn)
    print(f"annotated images in {settings.output}/, contact sheet: {sheet}")
    return {r.name: vars(r.primary) | {"AP50": r.number("detection", "AP50")} for r in records}


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
