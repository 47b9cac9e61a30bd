"""Detections in the forms that other tools read."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO
from urllib.parse import quote

from common.cli import flag
from common.console import InputError
from common.files import PROGRAM, atomic_write
from common.predict.journal import Journal


@dataclass(frozen=True)
class LabelStudioFlags:
    """Label Studio."""

    url_prefix: str = flag("/data/local-files/?d=", "what stands before an image's name to make its address there")
    from_name: str = flag("label", "name of the RectangleLabels in the labelling configuration")
    to_name: str = flag("image", "name of the Image in the labelling configuration")


def check_stems(names: Iterable[str]) -> None:
    """Raises InputError for two images that would share a label file of YOLO."""
    stems: dict[PurePosixPath, str] = {}
    for name in names:
        if (other := stems.setdefault(PurePosixPath(name).with_suffix(""), name)) != name:
            raise InputError(f"{other} and {name} would share a label file: rename one, or leave out --formats yolo")


def write_coco(journal: Journal, file: IO, _flags: LabelStudioFlags) -> None:
    """A COCO data set with scores: every field that some importer asks for, ids from 1."""
    classes = journal.header["class_names"]
    file.write(f'{{"info": {{"description": "{PROGRAM}"}}, "licenses": [], "categories": ')
    json.dump([{"id": label, "name": name, "supercategory": ""} for label, name in enumerate(classes, 1)], file)
    images = (
        {"id": n, "file_name": r["file"], "width": r["width"], "height": r["height"]} for n, r in _images(journal)
    )
    for key, values in (("images", images), ("annotations", _annotations(journal))):
        file.write(f', "{key}": ')
        _write_list(file, values)
    file.write("}\n")


def _annotations(journal: Journal) -> Iterable[dict]:
    number = 0
    for image, row in _images(journal):
        for (x1, y1, x2, y2), score, name in _objects(row):
            number, width, height = number + 1, round(x2 - x1, 2), round(y2 - y1, 2)
            ids = {"id": number, "image_id": image, "category_id": journal.header["class_names"].index(name) + 1}
            shape = {"bbox": [x1, y1, width, height], "area": round(width * height, 2), "segmentation": []}
            yield ids | shape | {"iscrowd": 0, "score": score}


def write_yolo(journal: Journal, file: IO, _flags: LabelStudioFlags) -> None:
    """classes.txt, and beside it labels/NAME.txt with a line an object: class, centre and sides; without scores."""
    classes = journal.header["class_names"]
    file.writelines(f"{name}\n" for name in classes)
    for _, row in _images(journal):
        width, height = row["width"], row["height"]
        with atomic_write((journal.path.parent / "labels" / row["file"]).with_suffix(".txt"), "w") as labels:
            for (x1, y1, x2, y2), _, name in _objects(row):
                box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                labels.write(" ".join([str(classes.index(name)), *(f"{part:.6f}" for part in box)]) + "\n")


def write_csv(journal: Journal, file: IO, _flags: LabelStudioFlags) -> None:
    """A row an object, corners in pixels."""
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(["file", "width", "height", "class", "score", "x1", "y1", "x2", "y2"])
    for _, row in _images(journal):
        image = [row["file"], row["width"], row["height"]]
        writer.writerows([*image, name, score, *box] for box, score, name in _objects(row))


def write_label_studio(journal: Journal, file: IO, flags: LabelStudioFlags) -> None:
    """Tasks with predictions, boxes in per cent; the score of a task is the mean of its boxes'."""
    _write_list(file, (_task(row, flags, journal.header["detector"]) for _, row in _images(journal)))


def _task(row: dict, flags: LabelStudioFlags, version: str) -> dict:
    width, height, result = row["width"], row["height"], []
    names: dict = {"type": "rectanglelabels", "from_name": flags.from_name, "to_name": flags.to_name}
    names |= {"original_width": width, "original_height": height, "image_rotation": 0}
    for number, ((x1, y1, x2, y2), score, name) in enumerate(_objects(row), 1):
        place = {"x": x1 / width, "y": y1 / height, "width": (x2 - x1) / width, "height": (y2 - y1) / height}
        value = {side: 100 * share for side, share in place.items()} | {"rotation": 0, "rectanglelabels": [name]}
        result.append({"id": str(number)} | names | {"value": value, "score": score})
    prediction = {"model_version": version, "score": sum(row["scores"]) / max(1, len(result)), "result": result}
    return {"data": {flags.to_name: flags.url_prefix + quote(row["file"])}, "predictions": [prediction]}


def _images(journal: Journal) -> Iterable[tuple[int, dict]]:
    """The images that could be read, numbered from 1."""
    return enumerate((row for row in journal.rows() if "error" not in row), 1)


def _objects(row: dict) -> Iterable[tuple[list[float], float, str]]:
    return zip(row["boxes"], row["scores"], row["classes"], strict=True)


def _write_list(file: IO, values: Iterable[dict]) -> None:
    """The values as JSON, a line each, however many there are."""
    file.write("[")
    for number, value in enumerate(values):
        file.write(("," if number else "") + "\n" + json.dumps(value))
    file.write("]\n")


FORMATS: dict[str, tuple[str, Callable[[Journal, IO, LabelStudioFlags], None]]] = {  # the file, and what writes it
    "coco": ("coco.json", write_coco),
    "yolo": ("classes.txt", write_yolo),
    "csv": ("detections.csv", write_csv),
    "label-studio": ("label_studio.json", write_label_studio),
}
