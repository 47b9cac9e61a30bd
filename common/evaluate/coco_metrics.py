"""A table of detections and the ground truth -> the numbers, by one protocol for every model.

COCO's own numbers come from faster-coco-eval, which equals pycocotools (tests compare them).
"""

from dataclasses import dataclass, replace

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from common.data.memory import DetectionData
from common.evaluate.detections import DetectionTable, coco_detections
from common.evaluate.matching import IOU_THRESHOLDS, Matches, average_precision, match, operating_point, ranking
from common.evaluate.primary import PrimaryPairs, primary_object, primary_pairs

COCO_NUMBERS = (  # pycocotools' twelve, in its order
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
CURVES = {"0.5": 0, "0.75": 5}  # IoU and its index among COCO's thresholds


@dataclass(frozen=True)
class Matched:
    """What the numbers of one model, their intervals and its diagnosis have in common, computed once."""

    by_class: Matches  # at COCO's thresholds
    agnostic: Matches  # of its `best_of_duplicates`, all classes as one, at IoU 0.5
    operating_point: dict[str, float | None]
    primary: PrimaryPairs


def match_all(table: DetectionTable, data: DetectionData) -> Matched:
    """Match the detections of one model with the ground truth."""
    by_class = match(table, data)
    point = operating_point(ranking(by_class))
    agnostic = match(best_of_duplicates(table), data, IOU_THRESHOLDS[:1], by_class=False)
    return Matched(by_class, agnostic, point, primary_pairs(table, data, point["score"]))


def evaluate_table(table: DetectionTable, data: DetectionData, matched: Matched | None = None) -> dict:
    """The numbers of one model, as fractions; None where a number does not exist (no objects of that size, say).

    Args:
        table: the detections of one model.
        data: the ground truth.
        matched: what `match_all` returns for them, where it is known already.

    Returns:
        {"detection": AP, AP50, …, AR_large, per_class, precision_at_recall, class_agnostic_AP50;
        "primary": accuracy, …, mean_iou, found}.
    """
    matched = matched or match_all(table, data)
    return {
        "detection": coco_numbers(table, data) | {"class_agnostic_AP50": _class_agnostic_ap50(matched.agnostic, data)},
        "primary": primary_object(matched.primary),
    }


def coco_dict(data: DetectionData) -> dict:
    """The ground truth as a COCO instances dictionary, annotation ids from 1 (an id of 0 would count as unmatched)."""
    columns = (data.image_of_box(), data.labels, data.boxes, data.areas, data.crowd)
    annotations = [
        {
            "id": number,
            "image_id": data.images[index].id,
            "category_id": data.category_ids[label],
            "bbox": box.tolist(),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for number, (index, label, box, area, crowd) in enumerate(zip(*columns, strict=True), 1)
    ]
    images = [{"id": i.id, "file_name": i.path.name, "width": i.width, "height": i.height} for i in data.images]
    categories = zip(data.category_ids, data.class_names, strict=True)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


def _coco_evaluation(table: DetectionTable, data: DetectionData) -> COCOeval_faster:
    """The library's evaluation, with ids that it can hold: images and categories are numbered from 1 by rising id."""
    ids = np.sort(np.array([image.id for image in data.images], np.int64))
    images = tuple(replace(image, id=int(np.searchsorted(ids, image.id)) + 1) for image in data.images)
    categories = tuple(range(1, len(data.class_names) + 1))
    truth = coco_dict(replace(data, images=images, category_ids=categories))
    rows = coco_detections(replace(table, image_id=np.searchsorted(ids, table.image_id) + 1), categories)
    ground_truth = COCO(truth)
    results = (
        ground_truth.loadRes(rows) if rows else COCO({**truth, "annotations": []})
    )  # loadRes refuses an empty list
    evaluation = COCOeval_faster(ground_truth, results, "bbox", print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def coco_numbers(table: DetectionTable, data: DetectionData) -> dict:
    """pycocotools' twelve numbers, AP and AP50 of each class by name, and precision at the recalls 0, 0.01, …, 1.

    The precision at a recall is the best from there on, and the mean over the classes, as in AP.
    """
    evaluation = _coco_evaluation(table, data)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes)
    per_class = {
        name: {"AP": _mean(precision[:, :, label]), "AP50": _mean(precision[0, :, label])}
        for label, name in enumerate(data.class_names)
    }
    exists = (precision[0] > -1).all(0)
    curves = {iou: precision[t][:, exists].mean(1).tolist() if exists.any() else None for iou, t in CURVES.items()}
    numbers = dict(zip(COCO_NUMBERS, map(_existing, evaluation.stats[:12]), strict=True))
    return numbers | {"per_class": per_class, "precision_at_recall": curves}


def _class_agnostic_ap50(agnostic: Matches, data: DetectionData) -> float | None:
    """AP at IoU 0.5 with all classes taken as one: how well objects are localised, whatever their class."""
    (precision,) = average_precision(ranking(agnostic), 1, np.ones((len(data), 1), np.float32))[0]
    return None if np.isnan(precision) else float(precision)


def best_of_duplicates(table: DetectionTable) -> DetectionTable:
    """One row for each box of an image, that of its highest-scoring class, by falling score."""
    order = np.argsort(-table.score, kind="stable")
    _, image = np.unique(table.image_id, return_inverse=True)
    keys = np.column_stack([image, table.boxes])[order]
    _, first = np.unique(keys, axis=0, return_index=True)
    return table.select(order[np.sort(first)])


def _mean(precision: np.ndarray) -> float | None:
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def _existing(number: float) -> float | None:
    return None if number < 0 else float(number)


def headline(table: DetectionTable, data: DetectionData) -> dict[str, float | None]:
    """The study's six columns, `found`, AP, and the operating point, which a checkpoint keeps."""
    matched = match_all(table, data)
    numbers = evaluate_table(table, data, matched)
    detection = {key: numbers["detection"][key] for key in ("AP50", "AP")}
    return {**numbers["primary"], **detection, "operating_point": matched.operating_point["score"]}


def format_headline(numbers: dict[str, float | None]) -> str:
    """mAP@0.5, AP, accuracy and mean IoU as text, for the terminal."""
    chosen = {"mAP@0.5": "AP50", "AP": "AP", "accuracy": "accuracy", "mean IoU": "mean_iou"}
    return ", ".join(f"{name} {'-' if numbers[key] is None else f'{numbers[key]:.3f}'}" for name, key in chosen.items())
