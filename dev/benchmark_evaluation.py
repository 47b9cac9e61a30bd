"""How long judging takes: all numbers against pycocotools' twelve, and the intervals of four models.

python -m dev.benchmark_evaluation --annotations instances_val2017.json
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import cli
from common.cli import flag
from common.data.annotations import load_coco
from common.data.coco import CocoData
from common.evaluate.bootstrap import comparisons, draws, resampled
from common.evaluate.coco_metrics import best_of_duplicates, evaluate_table
from common.evaluate.diagnosis import diagnose, self_check
from common.evaluate.matching import IOU_THRESHOLDS, match
from tests.helpers import pycocotools_numbers

DETECTIONS = 100  # an image


@dataclass(frozen=True)
class Settings:
    annotations: str = flag("instances_val2017.json", "COCO instances; the images are not needed")
    seed: int = flag(0, "of the made-up detections", at_least=0)


def read_truth(path: Path) -> CocoData:
    """The annotations, with empty files in the images' place."""
    with tempfile.TemporaryDirectory() as folder:
        for image in json.loads(path.read_text())["images"]:
            Path(folder, image["file_name"]).touch()
        return load_coco(path, Path(folder))


def made_up(data: CocoData, seed: int) -> np.ndarray:
    """(M, 7) detections: the true boxes, shaken, some misnamed, filled up with boxes anywhere."""
    rng, rows = np.random.default_rng(seed), []
    for index, image in enumerate(data.images):
        part = slice(data.starts[index], data.starts[index + 1])
        true = data.boxes[part][:DETECTIONS] * rng.normal(1, 0.1, (min(len(data.boxes[part]), DETECTIONS), 4)).clip(0.5)
        count = DETECTIONS - len(true)
        width, height = image.width, image.height
        other = rng.random((count, 4)) * (width, height, width / 2, height / 2) + (0, 0, 1, 1)
        labels = np.concatenate([data.labels[part][:DETECTIONS], rng.integers(0, len(data.class_names), count)])
        wrong = rng.random(DETECTIONS) < 0.2
        labels[wrong] = rng.integers(0, len(data.class_names), wrong.sum())
        scores = np.concatenate([rng.beta(2, 2, len(true)), rng.beta(1, 4, count)])
        rows.append(np.column_stack([np.full(DETECTIONS, image.id), np.concatenate([true, other]), scores, labels]))
    return np.concatenate(rows)


def timed(what: str, work):
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    print(f"{what}: {seconds:.1f} s", flush=True)
    return result, seconds


def all_numbers(table: np.ndarray, data: CocoData) -> dict:
    return (
        evaluate_table(table, data) | diagnose(table, match(table, data), data) | {"warnings": self_check(table, data)}
    )


def intervals(tables: list[np.ndarray], data: CocoData) -> list[dict]:
    weights, samples = draws(len(data), 0), {}
    for number, table in enumerate(tables):
        agnostic = match(best_of_duplicates(table), data, IOU_THRESHOLDS[:1], by_class=False)
        samples[str(number)] = resampled(table, match(table, data), agnostic, data, weights)
    return comparisons(samples)


def main(settings: Settings) -> None:
    data = read_truth(Path(settings.annotations))
    table = made_up(data, settings.seed)
    print(f"{len(data)} images, {len(data.boxes)} boxes, {len(table)} detections")
    numbers, ours = timed("all numbers", lambda: all_numbers(table, data))
    expected, theirs = timed("pycocotools' twelve", lambda: pycocotools_numbers(table, data))
    print(f"ratio {ours / theirs:.2f}; AP {numbers['detection']['AP']:.6f} and {expected[0]:.6f}")
    few = data.first(500)
    tables = [made_up(few, seed) for seed in range(4)]
    timed(f"intervals and verdicts of 4 models on {len(few)} images", lambda: intervals(tables, few))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
