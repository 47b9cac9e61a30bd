"""The results as one self-contained HTML file: table, verdicts, charts, best and worst images, all conditions.

report.html holds all markup; jinja2 escapes everything that is filled in.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import ImageOps

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable
from common.evaluate.metrics import match_detections
from common.evaluate.results import ValidationResults
from common.files import PROGRAM, atomic_write
from common.show import charts
from common.show.drawing import LabelledBoxes, detected_boxes, draw_boxes, side_by_side, true_boxes
from common.show.tables import COLUMNS, NAMES, format_cell
from common.types import convert_boxes

TEMPLATE = Path(__file__).with_suffix(".html")
DOUBTS = 24  # labels to check
DRAWN = (("label", "box"), ("detected", "detected_box"))  # of each, where it has them
EXTREMES = 4  # best images, and as many worst ones, of each model
CHART_DPI = 90
IMAGE_SIDE = 900  # pixels, the longer side of an image and its ground truth together


def write_report(
    path: Path,
    results: ValidationResults,
    data: DetectionData,
    tables: dict[str, DetectionTable],
    doubts: Sequence[dict] = (),
) -> None:
    """Write the report to the HTML file `path`, with the detections of each model that has numbers, by its name.

    Of `doubtful_labels` the first are shown.

    Raises InputError where no model has numbers, an image can't be read, or the file can't be written.
    """
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    dataset = {key: value for key, value in vars(results.dataset).items() if key not in ("class_names", "class_boxes")}
    models = {r.name: {"path": r.path} | (vars(r.cost) if r.cost else {}) | r.conditions for r in results.models}
    page = environment.get_template(TEMPLATE.name).render(
        program=PROGRAM,
        results=results,
        caption=charts.caption(results),
        columns=COLUMNS,
        names=NAMES,
        format_cell=format_cell,
        charts={name: base64.b64encode(chart).decode() for name, chart in charts.render(results, CHART_DPI).items()},
        images={"Labels to check": list(_doubtful(data, doubts[:DOUBTS]))}
        | {f"{name}: best and worst images": list(_extremes(name, results, data, t)) for name, t in tables.items()},
        conditions=[("data", dataset), ("protocol", results.protocol), *models.items()],
    )
    with atomic_write(path) as file:
        file.write(page.encode(errors="replace"))  # a file name may hold bytes that are not valid text


def _extremes(name: str, results: ValidationResults, data: DetectionData, table: DetectionTable) -> Iterator[dict]:
    """The images with the best and the worst F1 at IoU 0.5 and at the model's operating point, with its boxes and the
    true ones; of those with equal F1, the ones with more objects first."""
    (diagnosis,) = (record.diagnosis for record in results.models if record.name == name)
    if diagnosis is None or (score := diagnosis.operating_point.score) is None:
        return
    table = table.select(table.score >= score)
    m = match_detections(table, data)
    places = data.image_of_box()[m.objects], m.table.image[~m.ignored[0]], m.table.image[m.hit[0]]
    objects, detected, correct = (np.bincount(images, minlength=len(data)) for images in places)
    f1 = 2 * correct / np.maximum(objects + detected, 1)
    candidates = np.nonzero(objects > 0)[0]
    for rank, order in (("best", -f1), ("worst", f1)):
        for place in candidates[np.lexsort((-objects[candidates], order[candidates]))][:EXTREMES].tolist():
            text = f"{rank} at scores from {score:.2f}: {data.images[place].path.name}, F1 {f1[place]:.2f}"
            yield _figure(text, data, place, name, detected_boxes(table, place, data.class_names))


def _doubtful(data: DetectionData, doubts: Sequence[dict]) -> Iterator[dict]:
    """The images with labels that are doubted."""
    places = {image.id: place for place, image in enumerate(data.images)}
    for doubt in doubts:
        captions, boxes = zip(*((f"{k}: {doubt[k]}", doubt[box]) for k, box in DRAWN if box in doubt), strict=True)
        marked = LabelledBoxes(convert_boxes(np.array(boxes), "xywh", "xyxy"), np.arange(len(boxes)), list(captions))
        text = f"{doubt['kind']}, {doubt['doubt']:.2f}: {doubt['file']}"
        yield _figure(text, data, places[doubt["image_id"]], "doubt", marked)


def _figure(text: str, data: DetectionData, place: int, title: str, boxes: LabelledBoxes) -> dict:
    """An image with its labels, and beside it with other boxes."""
    image = data.images[place].open()
    panels = [("ground truth", true_boxes(data, place)), (title, boxes)]
    strip, stream = side_by_side([(name, draw_boxes(image, drawn)) for name, drawn in panels]), io.BytesIO()
    ImageOps.contain(strip, (IMAGE_SIDE, IMAGE_SIDE)).save(stream, "JPEG", quality=80)
    return {"text": text, "data": base64.b64encode(stream.getvalue()).decode()}
