"""How long evaluation takes: all numbers against pycocotools' twelve, and the intervals of four models.

python -m dev.benchmark_evaluation --annotations instances_val2017.json
"""

import json
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
from common.evaluate.bootstrap import comparisons, draws, resampled
from common.evaluate.coco_metrics import evaluate_table, match_all
from common.evaluate.detections import DetectionTable
from common.evaluate.diagnosis import diagnose, self_check
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
        return read_coco(path, Path(folder), Request("", "val")).check()


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
    image_id = np.repeat([image.id for image in data.images], DETECTIONS)
    return DetectionTable(image_id, rectangle, np.concatenate(scores), label)


def timed(title: str, work: Callable[[], RESULT]) -> tuple[RESULT, float]:
    """What `work` returns, and the seconds that it took, which are printed."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    print(f"{title}: {seconds:.1f} s", flush=True)
    return result, seconds


def all_numbers(table: DetectionTable, data: DetectionData) -> dict:
    matched = match_all(table, data)
    diagnosis = diagnose(table, matched.by_class, data)
    return evaluate_table(table, data, matched) | diagnosis | {"warnings": self_check(table, data)}


def intervals(tables: list[DetectionTable], data: DetectionData) -> list[dict]:
    weights, samples = draws(len(data), 0), {}
    for number, table in enumerate(tables):
        samples[str(number)] = resampled(match_all(table, data), data, weights)
    return comparisons(samples, len(data.with_objects()))


def main(settings: Settings) -> None:
    data = read_truth(Path(settings.annotations))
    table = generated_detections(data, settings.seed)
    print(f"{len(data)} images, {len(data.boxes)} boxes, {len(table)} detections")
    numbers, ours = timed("all numbers", lambda: all_numbers(table, data))
    expected, theirs = timed("pycocotools' twelve", lambda: pycocotools_numbers(table, data))
    print(f"ratio {ours / theirs:.2f}; AP {numbers['detection']['AP']:.6f} and {expected[0]:.6f}")
    few = data.first(500)
    tables = [generated_detections(few, seed) for seed in range(4)]
    timed(f"intervals and verdicts of 4 models on {len(few)} images", lambda: intervals(tables, few))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
