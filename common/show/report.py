"""The results as one self-contained HTML file: table, verdicts, charts, best and worst images, all conditions.

This file prepares plain values, report.html holds all markup; jinja2 escapes everything that is filled in.
"""

import base64
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageOps

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import match_detections
from common.evaluate.results import Comparison, ValidationRecord, ValidationResults
from common.files import PROGRAM, atomic_write
from common.show import charts
from common.show.drawing import detected_boxes, draw_boxes, side_by_side, true_boxes
from common.show.tables import COLUMNS, NAMES, format_cell

TEMPLATE = Path(__file__).with_suffix(".html")
EXTREMES = 4  # best images, and as many worst ones, of each model
CHART_DPI = 90
IMAGE_SIDE = 900  # pixels, the longer side of an image and its ground truth together


def write_report(
    path: Path, results: ValidationResults, data: DetectionData, tables: dict[str, DetectionTable]
) -> None:
    """Write the report; an existing file is replaced only once the new one is complete.

    Args:
        path: the HTML file.
        results: the content of the report.
        data: the validation images and their ground truth.
        tables: the detections of each model that has numbers, by name.

    Raises:
        InputError: no model has numbers, an image can't be read, or the file can't be written.
    """
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(TEMPLATE.name).render(
        program=PROGRAM,
        caption=charts.caption(results),
        warnings=[f"{record.name}: {warning}" for record in results.models for warning in record.warnings],
        headings=[column.heading for column in COLUMNS],
        rows=[_row(record) for record in results.models],
        numbers=list(NAMES.values()),
        pairs=[_pair(comparison) for comparison in results.comparisons],
        charts=[
            {"title": name.replace("_", " ").capitalize(), "data": base64.b64encode(chart).decode()}
            for name, chart in charts.render(results, CHART_DPI).items()
        ],
        models=_models(results, data, tables),
        conditions=_conditions(results),
    )
    with atomic_write(path) as file:
        file.write(page.encode(errors="replace"))  # a file name may hold bytes that are not valid text


def _row(record: ValidationRecord) -> dict:
    """One model's line of the table: its error, or its numbers with their intervals."""
    cells = []
    for column in COLUMNS:
        interval = record.interval(column.keys[0])
        limits = " to ".join(map(column.format.format, interval)) if interval else ""
        cells.append({"text": format_cell(record, column), "interval": limits})
    return {"name": record.name, "error": record.error, "cells": cells}


def _pair(pair: Comparison) -> dict:
    """One pair's line of the verdicts: in which numbers `a` is better than `b`, with the intervals."""
    verdicts = [pair.numbers.get(key) for key in NAMES]
    cells = [
        {"text": v.verdict, "interval": f"{v.interval[0]:+.3f} to {v.interval[1]:+.3f}"}
        if v
        else {"text": "–", "interval": ""}
        for v in verdicts
    ]
    return {"a": pair.a, "b": pair.b, "cells": cells}


def _base64(save: Callable[[io.BytesIO], object]) -> str:
    """What `save` writes to a stream, as the text of a data: address."""
    stream = io.BytesIO()
    save(stream)
    return base64.b64encode(stream.getvalue()).decode()


def _models(results: ValidationResults, data: DetectionData, tables: dict[str, DetectionTable]) -> Iterator[dict]:
    """Each model's images with the best and the worst F1 at its own threshold, beside the ground truth."""
    for record in results.models:
        score = record.diagnosis.operating_point.score if record.diagnosis else None
        if record.name not in tables or score is None:
            continue
        table = tables[record.name]
        images = _extremes(record.name, table.select(table.score >= score), data)
        yield {"name": record.name, "score": f"{score:.2f}", "images": images}


def _extremes(name: str, table: DetectionTable, data: DetectionData) -> Iterator[dict]:
    """The best and the worst images that have objects; of equal ones, those with more objects come first."""
    f1, objects = _f1_of_images(table, data)
    candidates = np.nonzero(objects > 0)[0]
    for rank, order in (("best", -f1), ("worst", f1)):
        chosen = candidates[np.lexsort((-objects[candidates], order[candidates]))][:EXTREMES]
        for index in chosen.tolist():
            encoded = _base64(partial(_draw(name, index, table, data).save, format="JPEG", quality=80))
            yield {"rank": rank, "file": data.images[index].path.name, "f1": f"{f1[index]:.2f}", "data": encoded}


def _f1_of_images(table: DetectionTable, data: DetectionData) -> tuple[np.ndarray, np.ndarray]:
    """(P,) float64 F1 at IoU 0.5 of each image, and (P,) int64 its number of objects."""
    m = match_detections(table, data)
    objects, detected, correct = (
        np.bincount(images, minlength=len(data))
        for images in (data.image_of_box()[m.objects], m.table.image[~m.ignored[0]], m.table.image[m.hit[0]])
    )
    return 2 * correct / np.maximum(objects + detected, 1), objects


def _draw(name: str, index: int, table: DetectionTable, data: DetectionData) -> Image.Image:
    """Image `index` with its true boxes, and beside it with the detections of the table."""
    image = data.images[index].open()
    boxes = detected_boxes(table, index, data.class_names)
    strip = side_by_side(
        [("ground truth", draw_boxes(image, true_boxes(data, index))), (name, draw_boxes(image, boxes))]
    )
    return ImageOps.contain(strip, (IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)


def _conditions(results: ValidationResults) -> list[tuple[str, dict]]:
    """The conditions of the numbers: by title, the settings of the data set, the protocol and each model."""
    long = ("class_names", "class_boxes")
    dataset = {key: value for key, value in vars(results.dataset).items() if key not in long}
    models = [(r.name, {"path": r.path} | (vars(r.cost) if r.cost else {}) | r.conditions) for r in results.models]
    return [("data", dataset), ("protocol", results.protocol), *models]
