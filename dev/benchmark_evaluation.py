"""CPU time and memory of the evaluation: all numbers and the resamples, beside pycocotools' twelve numbers.

python -m dev.benchmark_evaluation --annotations instances_val2017.json
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from common import cli
from common.cli import flag
from common.data.memory import DetectionData
from common.data.readers import Request, read_coco
from common.evaluate.bootstrap import image_weights, resample
from common.evaluate.detections import DetectionTable
from common.evaluate.diagnosis import diagnose
from common.evaluate.metrics import (
    average_precision,
    coco_numbers,
    match_boxes_alone,
    match_detections,
    operating_point,
)
from common.evaluate.primary import primary_numbers, primary_pairs
from common.evaluate.trust import check_agreement
from tests.helpers import pycocotools_numbers

DETECTIONS = 100  # an image
RESULT = TypeVar("RESULT")


@dataclass(frozen=True)
class Settings:
    annotations: str = flag("instances_val2017.json", "COCO instances; the images are not needed")
    seed: int = flag(0, "of the generated detections", at_least=0)


def read_truth(path: Path) -> DetectionData:
    """The annotations, with empty files in the images' place."""
    with tempfile.TemporaryDirectory() as folder:
        for image in json.loads(path.read_text())["images"]:
            Path(folder, image["file_name"]).touch()
        return read_coco(Request("", "val", (str(path), folder))).check()


def generated_detections(data: DetectionData, seed: int) -> DetectionTable:
    """DETECTIONS an image: the true boxes with noise, every fifth class at random, then random boxes."""
    rng = np.random.default_rng(seed)
    boxes, scores, labels = [], [], []
    for index, image in enumerate(data.images):
        part = slice(data.starts[index], min(data.starts[index + 1], data.starts[index] + DETECTIONS))
        count, size = part.stop - part.start, np.array([image.width, image.height])
        corner = rng.random((DETECTIONS - count, 2)) * size
        background = np.hstack([corner, rng.random(corner.shape) * size / 2 + 1])
        boxes += [data.boxes[part] + rng.normal(0, 3, (count, 4)), background]
        scores += [rng.beta(2, 2, count), rng.beta(1, 4, DETECTIONS - count)]
        labels += [data.labels[part], rng.integers(0, len(data.class_names), DETECTIONS - count)]
    label, rectangle = np.concatenate(labels), np.concatenate(boxes)
    wrong = rng.random(len(label)) < 0.2
    label[wrong] = rng.integers(0, len(data.class_names), wrong.sum())
    rectangle[:, 2:] = np.maximum(rectangle[:, 2:], 1)
    image = np.repeat(np.arange(len(data)), DETECTIONS)
    return DetectionTable(image, rectangle, np.concatenate(scores), label)


def timed(title: str, work: Callable[[], RESULT]) -> tuple[RESULT, float]:
    """What `work` returns, and the CPU seconds that it took, which are printed with the rise of the peak of memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result, seconds = work(), time.process_time() - start
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{title}: {seconds:.1f} s, {rise / 1e3:.0f} MB")
    return result, seconds


def all_numbers(table: DetectionTable, data: DetectionData) -> dict:
    """Everything in a record but the intervals."""
    matched = match_detections(table, data)
    point, agnostic = operating_point(matched), average_precision(match_boxes_alone(matched))
    primary, warnings = primary_numbers(primary_pairs(matched, point.score)), check_agreement(matched)
    return coco_numbers(matched) | primary | vars(diagnose(matched, point)) | {"": agnostic, "warnings": warnings}


def main(settings: Settings) -> None:
    data = read_truth(Path(settings.annotations))
    table = generated_detections(data, settings.seed)
    print(f"{len(data)} images, {len(data.boxes)} boxes, {len(table)} detections")
    numbers, ours = timed("all numbers", lambda: all_numbers(table, data))
    matched, weights = match_detections(table, data), image_weights(len(data), settings.seed)
    parts = matched, match_boxes_alone(matched), primary_pairs(matched, 0.5)
    timed(f"{weights.shape[1]} resamples", lambda: resample(*parts, weights))
    expected, theirs = timed("pycocotools' twelve", lambda: pycocotools_numbers(table, data))
    print(f"ratio {ours / theirs:.3f}; AP {numbers['AP']:.15f} and {expected[0]:.15f}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
