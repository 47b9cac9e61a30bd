"""Check trained detectors quickly: a few numbers, and their boxes on images.

On validation images, prints the study's columns, mAP@0.5 and speed, and draws predictions beside the ground truth.
With --images no ground truth is needed: detections on your own images are drawn and written in COCO's format.

  python validate_models.py                                        both detectors on 500 images of COCO
  python validate_models.py --checkpoints a.pth b.pth --data my_folder --val-images 0
  python validate_models.py --checkpoints a.pth --images holiday/ cat.jpg

Writes into OUTPUT: contact_sheet.jpg, and in a folder for each model the annotated images and, with --images,
detections.json (COCO results format, with file_name and category_name beside the ids).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import set_seed
from PIL import Image

from common import cli
from common.cli import flag, flag_texts
from common.console import InputError
from common.data.memory import DetectionData
from common.data.sources import DataFlags, load_split, unlabelled_images
from common.evaluate.detections import coco_detections, detection_table
from common.evaluate.evaluation import Model, Predictor, evaluate, load_model, unique_names
from common.files import atomic_write, check_outputs, check_writable
from common.runtime import RuntimeFlags, make_accelerator
from common.show.drawing import contact_sheet, detected_boxes, draw_boxes, side_by_side, true_boxes
from common.show.fonts import print_replaced
from common.show.tables import format_table, number_of
from common.types import Detections, Predictions

SHEET_IMAGES = 16
JPEG_COMMENT = b"annotated by validate_models.py"
COLUMNS = ("accuracy", "precision", "recall", "F1", "mean IoU", "mAP@0.5", "images/s")


@dataclass(frozen=True)
class Settings(RuntimeFlags, DataFlags):
    checkpoints: tuple[str, ...] = flag(
        ("dino2_detector.pth", "improved_dino2_detector.pth"), "detectors to check, or their exports"
    )
    images: tuple[str, ...] = flag((), "your own image files and folders, instead of validation images")
    draw: int = flag(24, "validation images to draw for each model, drawn at random by --seed; 0 = all", at_least=0)
    min_score: float = flag(
        -1.0, "draw detections with this score or a higher one, 0..1; below 0 = each detector's operating point"
    )
    flip: bool = flag(False, "detect on the mirror image of each image too: more accurate, half as fast")
    output: str = flag("predictions", "folder for the images and detections")


def images_to_draw(settings: Settings, data: DetectionData) -> dict[int, str]:
    """The names of the annotated images, without suffix, by the index of the image in `data`."""
    chosen = np.arange(len(data))
    if settings.draw and not settings.images and settings.draw < len(data):
        chosen = np.sort(np.random.default_rng(settings.seed).choice(len(data), settings.draw, replace=False))
    return dict(zip(chosen.tolist(), unique_names([str(data.images[i].path) for i in chosen]), strict=True))


def check_files(settings: Settings, models: Sequence[str], data: DetectionData, drawn: dict[int, str]) -> None:
    """Refuse to overwrite what is read, or an image that this script did not write.

    Raises:
        InputError: an output is an input file, or an image of somebody else.
    """
    folder = Path(settings.output)
    images = [folder / "contact_sheet.jpg", *(folder / m / f"{name}.jpg" for m in models for name in drawn.values())]
    outputs = images + [folder / model / "detections.json" for model in models if settings.images]
    check_outputs(outputs, [*flag_texts(settings, "output"), data.source, *(image.path for image in data.images)])
    for path in images:
        if path.exists() and not is_own_jpeg(path):
            raise InputError(f"{path} exists and was not written by this script: delete it, or name another --output")
    for model in models:
        check_writable(folder / model / "detections.json")


def write_images(
    settings: Settings,
    data: DetectionData,
    models: dict[str, tuple[Model, list[Detections]]],
    drawn: dict[int, str],
) -> Path:
    """Annotated images of each model and one contact sheet with all models; returns the sheet's path."""
    truth = bool(len(data.labels))
    print_replaced([*models, *data.class_names, *(name for c, _ in models.values() for name in c.class_names)])
    sheet: list[Image.Image] = []
    for index, name in drawn.items():
        file = data.images[index]
        image = file.open()
        left = [("ground truth", draw_boxes(image, true_boxes(data, index)))] if truth else []
        panels = []
        for model, (checkpoint, detections) in models.items():
            d = detections[index].at_least(checkpoint.min_score if settings.min_score < 0 else settings.min_score)
            boxes = detected_boxes(d.boxes, d.scores, d.labels, checkpoint.class_names)
            panels.append((model, draw_boxes(image, boxes)))
            save_jpeg(side_by_side([*left, panels[-1]]), Path(settings.output, model, f"{name}.jpg"))
        if len(sheet) < SHEET_IMAGES:
            sheet.append(side_by_side([*left, *panels]))
    path = Path(settings.output, "contact_sheet.jpg")
    save_jpeg(contact_sheet(sheet), path)
    return path


def is_own_jpeg(path: Path) -> bool:
    """Whether this script wrote the image, by its JPEG comment."""
    try:
        with Image.open(path) as image:
            return image.info.get("comment") == JPEG_COMMENT
    except OSError:
        return False


def save_jpeg(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as file:
        image.save(file, "JPEG", quality=88, comment=JPEG_COMMENT)


def write_detections(path: Path, model: Model, detections: list[Detections], data: DetectionData) -> int:
    """COCO results JSON of one model on images without ground truth; returns the number of detections."""
    table = detection_table(detections, np.arange(len(model.class_names)))
    files = {image.id: str(image.path) for image in data.images}
    names = dict(zip(model.category_ids, model.class_names, strict=True))
    entries = [
        e | {"file_name": files[e["image_id"]], "category_name": names[e["category_id"]]}
        for e in coco_detections(table, model.category_ids)
    ]
    with atomic_write(path, "w") as file:
        json.dump(entries, file)
    return len(entries)


def main(settings: Settings) -> dict[str, dict]:
    """Returns, by model, the primary-object numbers and mAP@0.5; nothing with --images."""
    check_writable(Path(settings.output, "contact_sheet.jpg"))
    set_seed(settings.seed)
    predictor = Predictor(make_accelerator(settings.precision), settings.batch_size, settings.workers, settings.flip)
    checkpoints = [load_model(path) for path in settings.checkpoints]
    names = unique_names(settings.checkpoints)
    if settings.images:
        first = checkpoints[0]
        data = unlabelled_images([Path(p) for p in settings.images], first.class_names, first.category_ids)
    else:
        with predictor.accelerator.main_process_first():  # it downloads or generates the data once for all
            data = load_split(settings, "val")
    drawn = images_to_draw(settings, data)
    check_files(settings, names, data, drawn)

    models, records = {}, []
    for name, path, checkpoint in zip(names, settings.checkpoints, checkpoints, strict=True):
        detections = predictor.detect(checkpoint, data, name)
        models[name] = (checkpoint, detections)
        if not predictor.accelerator.is_main_process:
            continue
        if settings.images:
            file = Path(settings.output, name, "detections.json")
            print(f"{name}: {write_detections(file, checkpoint, detections, data)} detections in {file}")
        else:
            predictions = Predictions(detections, checkpoint.class_names, predictor.cost(checkpoint, data))
            records.append(evaluate(name, path, predictions, data).record)
    if settings.min_score < 0 and predictor.accelerator.is_main_process:
        points = ", ".join(f"{checkpoint.min_score:.2f} ({name})" for name, (checkpoint, _) in models.items())
        print(f"drawn are detections from the operating point on, the score with the best F1 in validation: {points}")
    if records:
        print(format_table(tuple(records), COLUMNS))
    if predictor.accelerator.is_main_process:
        print(f"annotated images in {settings.output}/, contact sheet: {write_images(settings, data, models, drawn)}")
    return {r.name: {**(r.primary or {}), "AP50": number_of(r, "detection", "AP50")} for r in records}


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
