"""The results as one self-contained HTML file: table, verdicts, charts, best and worst images, all conditions."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from common.data.coco import CocoData
from common.data.images import open_image
from common.evaluate.detections import DetectionTable
from common.evaluate.matching import match
from common.evaluate.results import ValidationRecord, ValidationResults
from common.files import atomic_write
from common.show import charts
from common.show.drawing import LabelledBox, draw_boxes, side_by_side, true_boxes
from common.show.tables import NAMES, TABLE, cell

EXTREMES = 4  # best images, and as many worst ones, of each model
IMAGE_WIDTH = 900  # pixels

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222 }
table { font-size: 13px; border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .3em .7em; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left }
td small { color: #666; display: block; white-space: nowrap }
.pairs th, .pairs td { white-space: normal; padding: .3em .5em }
img { max-width: 100%; height: auto; display: block; margin: .6em 0 }
figure { margin: 1em 0 } figcaption { color: #555 }
.warning { background: #fff3cd; padding: .5em 1em } pre { overflow-x: auto; background: #f6f6f6; padding: .7em }
"""


def write_report(path: Path, results: ValidationResults, data: CocoData, tables: dict[str, DetectionTable]) -> None:
    """Write the report; an earlier one stays until it is whole.

    Args:
        path: the HTML file.
        results: what the report is about.
        data: the validation images and their ground truth.
        tables: the detections of each model that has numbers, by name.
    """
    parts = [
        "<h1>Detection results</h1>",
        f"<p>{_escape(charts.caption(results))}</p>",
        *(f'<p class="warning">{_escape(f"{r.name}: {w}")}</p>' for r in results.models for w in r.warnings),
        _table(results),
        _verdicts(results),
        *(_chart(name, figure) for name, figure in charts.figures(results).items()),
        *(_images(record, data, tables[record.name]) for record in results.models if record.name in tables),
        _conditions(results),
    ]
    head = f'<meta charset="utf-8"><title>Detection results</title><style>{STYLE}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n'
    with atomic_write(path) as file:
        file.write(page.encode(errors="replace"))  # names of files need not be text


def _escape(text: object) -> str:
    return html.escape(str(text)).replace("\n", "<br>")


def _table(results: ValidationResults) -> str:
    """Every model's numbers, those with intervals above them."""
    rows = ["<tr><th>model</th>" + "".join(f"<th>{_escape(column[0])}</th>" for column in TABLE) + "</tr>"]
    for record in results.models:
        if record.error:
            rows.append(
                f'<tr><td>{_escape(record.name)}</td><td class="text" colspan="{len(TABLE)}">not evaluated: '
                f"{_escape(record.error)}</td></tr>"
            )
            continue
        cells = [
            f"<td>{cell(record, part, key, form)}{_interval(record, key, form)}</td>" for _, part, key, form in TABLE
        ]
        rows.append(f"<tr><td>{_escape(record.name)}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _interval(record: ValidationRecord, key: str | tuple[str, ...], form: str) -> str:
    found = charts.interval_of(record, key) if isinstance(key, str) else None
    return f"<small>{form.format(found[0])} to {form.format(found[1])}</small>" if found else ""


def _verdicts(results: ValidationResults) -> str:
    """For each pair of models, which is better in what, as far as the images tell."""
    if not results.comparisons:
        return ""
    head = "<tr><th>is … better?</th>" + "".join(f"<th>{_escape(name)}</th>" for name in NAMES.values()) + "</tr>"
    rows = []
    for pair in results.comparisons:
        cells = []
        for key in NAMES:
            number = pair["numbers"].get(key)
            text = "–" if number is None else number["verdict"]
            small = "" if number is None else "<small>{:+.3f} to {:+.3f}</small>".format(*number["interval"])
            cells.append(f"<td>{text}{small}</td>")
        rows.append(f"<tr><td>{_escape(pair['a'])}<br>against {_escape(pair['b'])}</td>{''.join(cells)}</tr>")
    return f'<h2>Pairs</h2><p>95% intervals of the difference.</p><table class="pairs">{head}{"".join(rows)}</table>'


def _chart(name: str, figure) -> str:
    title = name.replace("_", " ").capitalize()
    image = _embedded("png", lambda stream: figure.savefig(stream, format="png", dpi=90), title)
    plt.close(figure)
    return f"<h2>{title}</h2>{image}"


def _embedded(kind: str, save: Callable[[io.BytesIO], object], alt: str) -> str:
    stream = io.BytesIO()
    save(stream)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{_escape(alt)}" src="data:image/{kind};base64,{encoded}">'


def _images(record: ValidationRecord, data: CocoData, table: DetectionTable) -> str:
    """The images with the best and the worst F1 at the model's own threshold, beside the truth."""
    score = record.diagnosis["operating_point"]["score"]
    if score is None:
        return ""
    sure = table.at_least(score)
    f1, objects = _f1_of_images(sure, data)
    asked = np.nonzero(objects > 0)[0]
    ranked = asked[np.lexsort((-objects[asked], -f1[asked]))]
    worst = asked[np.lexsort((-objects[asked], f1[asked]))]
    chosen = {"best": ranked[:EXTREMES], "worst": worst[:EXTREMES]}
    parts = [f"<h2>{_escape(record.name)}: best and worst images</h2><p>By F1 at scores from {score:.2f}.</p>"]
    for title, indices in chosen.items():
        parts += [_image(title, record.name, int(index), sure, data, f1[index]) for index in indices]
    return "\n".join(parts)


def _f1_of_images(table: DetectionTable, data: CocoData) -> tuple[np.ndarray, np.ndarray]:
    """F1 at IoU 0.5 of each image, and its number of objects."""
    m = match(table, data, np.array([0.5]))
    count = len(data)
    objects = np.bincount(m.images[m.objects], minlength=count)
    found = np.bincount(m.image[~m.ignored[0]], minlength=count)
    right = np.bincount(m.image[m.hit[0]], minlength=count)
    return 2 * right / np.maximum(objects + found, 1), objects


def _image(title: str, name: str, index: int, table: DetectionTable, data: CocoData, f1: float) -> str:
    file = data.images[index]
    image = open_image(file.path, (file.width, file.height))
    rows = table.select(table.image_id == file.id)
    rows = rows.select(np.argsort(-rows.score))
    boxes = [
        LabelledBox(tuple(box), label, f"{data.class_names[label]} {score:.2f}")
        for box, score, label in zip(rows.boxes.tolist(), rows.score.tolist(), rows.label.tolist(), strict=True)
    ]
    panels = [("ground truth", draw_boxes(image, true_boxes(data, index))), (name, draw_boxes(image, boxes))]
    strip = side_by_side(panels)
    size = (IMAGE_WIDTH, round(strip.height * IMAGE_WIDTH / strip.width))
    strip = strip.resize(size, Image.Resampling.LANCZOS)
    embedded = _embedded("jpeg", lambda stream: strip.save(stream, "JPEG", quality=80), file.path.name)
    text = f"{title}: {file.path.name}, F1 {f1:.2f}"
    return f"<figure>{embedded}<figcaption>{_escape(text)}</figcaption></figure>"


def _conditions(results: ValidationResults) -> str:
    """How every number came about."""
    shared = {"data": results.dataset, "protocol": results.protocol}
    shared["data"] = {k: v for k, v in results.dataset.items() if k != "class_names"}
    blocks = [_lines(title, content) for title, content in shared.items()]
    for record in results.models:
        blocks.append(_lines(record.name, {"path": record.path} | (record.cost or {}) | record.conditions))
    return "<h2>Conditions</h2>" + "".join(blocks)


def _lines(title: str, content: dict) -> str:
    return f"<h3>{_escape(title)}</h3><pre>{html.escape(chr(10).join(f'{k}: {v}' for k, v in content.items()))}</pre>"
