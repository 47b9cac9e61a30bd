"""COCO's twelve numbers on adversarial lists, from the files on disk, compared with pycocotools on the same files."""

import json

import numpy as np
import pytest
from helpers import load_coco, pycocotools_stats

from common.evaluate.detections import read_detections
from common.evaluate.metrics import COCO_NUMBERS, coco_numbers, match_detections

IMAGES, CLASSES = 8, (1, 2, 90)
STEPS = (1.0, 0.25, 0.1, 0.01, None)  # multiples of which the coordinates are; None: all digits of a float


def on_grid(values, step):
    return values.tolist() if step is None else [round(round(value / step) * step, 6) for value in values.tolist()]


def adversarial(seed, image_ids):
    """COCO ground truth and results: IoU on thresholds, tied scores, duplicates, crowds, tiny and empty boxes.

    A detection that is its object shortened to t of its width or height has IoU t; one shifted so that a share s
    overlaps has s / (2 - s).
    """
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for index, image_id in enumerate(image_ids):
        for _ in range(rng.integers(0, 9) if index else 150):  # the first image has more than 100 detections of a class
            step = STEPS[rng.integers(len(STEPS))]
            category = CLASSES[rng.integers(len(CLASSES))] if index else 1
            x, y, w, h = on_grid(rng.uniform((0, 0, 2, 2), (300, 200, 200, 200)), step)
            crowd = int(rng.random() < 0.15)
            area = w * h * rng.choice([1.0, 0.5])
            truth = {"image_id": image_id, "category_id": category, "bbox": [x, y, w, h], "iscrowd": crowd}
            annotations.append(truth | {"id": len(annotations) + 1, "area": area})
            share = rng.choice([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1 / 3, 2 / 3, 0.0])
            shift = w * (1 - 2 * share / (1 + share))
            boxes = [[x, y, w * share, h], [x, y, w, h * share], [x + shift, y, w, h], [x, y, w, h]]
            for box in rng.permutation(np.array(boxes))[: rng.integers(1, 4)].tolist() + boxes[-1:]:
                score = int(rng.integers(1, 6)) / 5
                label = category if rng.random() < 0.8 else CLASSES[rng.integers(len(CLASSES))]
                results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return annotations, [results[i] for i in rng.permutation(len(results))]


IDS = {
    "small": list(range(1, IMAGES + 1)),
    "unsorted": [7, 3, 9, 1, 100, 2, 50, 4],
    "beyond 2^53": [2**53 + 1 + n for n in range(IMAGES)],
    "up to 2^63": [2**63 - 1 - n for n in range(IMAGES)],
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("seed", range(5))
def test_adversarial_lists_give_the_numbers_of_pycocotools(tmp_path, seed, ids):
    annotations, results = adversarial(seed, IDS[ids])
    images = [{"id": i, "file_name": f"image{n}.jpg", "width": 640, "height": 480} for n, i in enumerate(IDS[ids])]
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in CLASSES],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    for image in images:
        (tmp_path / image["file_name"]).touch()
    data = load_coco(tmp_path / "truth.json", tmp_path)
    predictions = read_detections(str(tmp_path / "results.json"), data)
    expected = pycocotools_stats(truth, results)
    numbers = coco_numbers(match_detections(predictions.table, data))
    for name, value in zip(COCO_NUMBERS, expected, strict=True):
        assert numbers[name] == pytest.approx(value, abs=1e-12), name
    assert 0.1 < expected[0] < 0.9 and all("lowest score" in warning for warning in predictions.warnings)
