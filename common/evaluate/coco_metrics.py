"""Detections and ground truth -> the numbers, by one protocol for every model.

COCO's own numbers come from faster-coco-eval, which equals pycocotools (a test holds them together). The
primary-object columns are those of the study that this project grew from.
"""

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from common.data.coco import CocoData
from common.evaluate.detections import coco_detections, detection_table
from common.evaluate.matching import IOU_THRESHOLDS, average_precision, match, ranking
from common.evaluate.primary import primary_object
from common.types import Detections

COCO_NUMBERS = (  # pycocotools' twelve, in its order
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
CURVES = {"0.5": 0, "0.75": 5}  # IoU and its place among COCO's thresholds


def evaluate(detections: list[Detections], data: CocoData, labels: np.ndarray) -> dict:
    """What `evaluate_table` returns, of one entry an image of `data`; `labels` as `label_map` returns it."""
    return evaluate_table(detection_table(detections, labels), data)


def evaluate_table(table: np.ndarray, data: CocoData) -> dict:
    """The numbers of one model, as fractions; None where a number does not exist (no objects of that size, say).

    Args:
        table: (M, 7) as `detection_table` returns it.
        data: the ground truth.

    Returns:
        {"detection": AP, AP50, …, AR_large, per_class, precision_at_recall, class_agnostic_AP50;
        "primary": accuracy, …, mean_iou}.
    """
    return {
        "detection": coco_numbers(table, data) | {"class_agnostic_AP50": class_agnostic_ap50(table, data)},
        "primary": primary_object(table, data),
    }


def coco_dict(data: CocoData, category_ids: tuple[int, ...] | None = None) -> dict:
    """The ground truth as a COCO instances dictionary, annotation ids from 1 (an id of 0 would count as unmatched)."""
    category_ids = category_ids or data.category_ids
    counts = np.diff(data.starts)
    image_ids = np.repeat([p.id for p in data.images], counts)
    columns = (image_ids, data.labels, data.boxes, data.areas, data.crowd)
    annotations = [
        {
            "id": number,
            "image_id": int(image),
            "category_id": category_ids[label],
            "bbox": box.tolist(),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for number, (image, label, box, area, crowd) in enumerate(zip(*columns, strict=True), 1)
    ]
    images = [{"id": p.id, "file_name": p.path.name, "width": p.width, "height": p.height} for p in data.images]
    names = dict(zip(category_ids, data.class_names, strict=False))
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in names.items()],
    }


def _accumulate(table: np.ndarray, truth: dict, category_ids: tuple[int, ...]) -> COCOeval_faster:
    ground_truth = COCO(truth)
    found = coco_detections(table, category_ids)
    results = ground_truth.loadRes(found) if found else COCO({**truth, "annotations": []})  # loadRes refuses none
    judge = COCOeval_faster(ground_truth, results, "bbox", print_function=lambda *_: None)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


def coco_numbers(table: np.ndarray, data: CocoData) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and precision at the recalls 0, 0.01, …, 1.

    The precision at a recall is the best from there on, and the mean over the classes, as in AP.
    """
    judge = _accumulate(table, coco_dict(data), data.category_ids)
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes)
    per_class = {
        name: {"AP": _mean(precision[:, :, label]), "AP50": _mean(precision[0, :, label])}
        for label, name in enumerate(data.class_names)
    }
    exists = (precision[0] > -1).all(0)
    curves = {iou: precision[t][:, exists].mean(1).tolist() if exists.any() else None for iou, t in CURVES.items()}
    numbers = dict(zip(COCO_NUMBERS, map(_existing, judge.stats[:12]), strict=True))
    return numbers | {"per_class": per_class, "precision_at_recall": curves}


def class_agnostic_ap50(table: np.ndarray, data: CocoData) -> float | None:
    """AP at IoU 0.5 with all classes taken as one: how well objects are found, apart from their names."""
    matches = match(best_of_duplicates(table), data, IOU_THRESHOLDS[:1], by_class=False)
    (precision,) = average_precision(ranking(matches), 1, np.ones((len(data), 1), np.float32))[0]
    return None if np.isnan(precision) else float(precision)


def best_of_duplicates(table: np.ndarray) -> np.ndarray:
    """Keep the best-scoring row of those that name one box of an image several times, by different classes."""
    order = np.argsort(-table[:, 5], kind="stable")
    _, first = np.unique(table[order][:, :5], axis=0, return_index=True)
    return table[order[np.sort(first)]]


def _mean(precision: np.ndarray) -> float | None:
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def _existing(number: float) -> float | None:
    return None if number < 0 else float(number)


def headline(numbers: dict) -> dict[str, float | None]:
    """The few numbers of `evaluate` that fit a line: the study's six columns, and AP."""
    return {**numbers["primary"], "AP50": numbers["detection"]["AP50"], "AP": numbers["detection"]["AP"]}


def in_words(numbers: dict[str, float | None]) -> str:
    """The headline numbers that matter most, for a line on the terminal."""
    chosen = {"mAP@0.5": "AP50", "AP": "AP", "accuracy": "accuracy", "mean IoU": "mean_iou"}
    words = {name: "-" if numbers[key] is None else f"{numbers[key]:.3f}" for name, key in chosen.items()}
    return ", ".join(f"{name} {word}" for name, word in words.items())
