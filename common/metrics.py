"""Detections and ground truth -> the numbers, by one protocol for every model.

COCO's own numbers come from faster-coco-eval, which equals pycocotools (a test holds them together). The
primary-object columns are those of the study that this project grew from.
"""

from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from common.coco import CocoData
from common.matching import IOU_THRESHOLDS, average_precision, match, ranking
from common.types import Detections

COCO_NUMBERS = (  # pycocotools' twelve, in its order
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
CURVES = {"0.5": 0, "0.75": 5}  # IoU and its place among COCO's thresholds


def label_map(class_names: tuple[str, ...], data: CocoData) -> np.ndarray:
    """(K,) the data set's label of each of a model's classes, by name; -1 where the data set has no such class."""
    labels = {name: label for label, name in enumerate(data.class_names)}
    return np.array([labels.get(name, -1) for name in class_names], np.int64)


def evaluate(detections: list[Detections], data: CocoData, labels: np.ndarray) -> dict:
    """What `evaluate_table` returns, of one entry a picture of `data`; `labels` as `label_map` returns it."""
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


def detection_table(detections: list[Detections], labels: np.ndarray) -> np.ndarray:
    """(M, 7) float64 rows: image id, x, y, width, height in original pixels, score, label in the data set's terms.

    Detections of classes that the data set does not have are left out.
    """
    rows = []
    for found in detections:
        boxes = found.boxes.numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        ids, names = np.full(len(boxes), found.image_id), labels[found.labels.numpy()]
        rows.append(np.column_stack([ids, boxes, found.scores.numpy(), names])[names >= 0])
    return np.concatenate(rows) if rows else np.zeros((0, 7))


def coco_dict(data: CocoData, category_ids: tuple[int, ...] | None = None) -> dict:
    """The ground truth as a COCO instances dictionary, annotation ids from 1 (an id of 0 would count as unmatched)."""
    category_ids = category_ids or data.category_ids
    counts = np.diff(data.starts)
    image_ids = np.repeat([p.id for p in data.pictures], counts)
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
    images = [{"id": p.id, "file_name": p.path.name, "width": p.width, "height": p.height} for p in data.pictures]
    names = dict(zip(category_ids, data.class_names, strict=False))
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in names.items()],
    }


def coco_detections(table: np.ndarray, category_ids: tuple[int, ...]) -> list[dict]:
    """The rows of `detection_table` in COCO's results format."""
    columns = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64), table[:, 1:5], table[:, 5]
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]


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
    """Keep the best-scoring row of those that name one box of a picture several times, by different classes."""
    order = np.argsort(-table[:, 5], kind="stable")
    _, first = np.unique(table[order][:, :5], axis=0, return_index=True)
    return table[order[np.sort(first)]]


def _mean(precision: np.ndarray) -> float | None:
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def _existing(number: float) -> float | None:
    return None if number < 0 else float(number)


@dataclass(frozen=True)
class PrimaryPairs:
    """The largest object of each of V pictures beside the model's surest detection there.

    Shapes: picture (V,) int64, index into `CocoData.pictures`; truth, answer (V,) int64 labels, the answer -1 where
    nothing was detected; iou (V,) float64 of the two boxes, 0 likewise.
    """

    picture: np.ndarray
    truth: np.ndarray
    answer: np.ndarray
    iou: np.ndarray


def primary_pairs(table: np.ndarray, data: CocoData) -> PrimaryPairs:
    """The pairs of all pictures with at least one non-crowd box."""
    best, rows = _best_rows(table), []
    for index, picture in enumerate(data.pictures):
        part = np.arange(data.starts[index], data.starts[index + 1])
        part = part[~data.crowd[part]]
        if len(part) == 0:
            continue
        largest = part[np.argmax(data.boxes[part, 2] * data.boxes[part, 3])]
        found = best.get(picture.id)
        answer, iou = (-1, 0.0) if found is None else (int(found[6]), _iou(data.boxes[largest], found[1:5]))
        rows.append((index, data.labels[largest], answer, iou))
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return PrimaryPairs(*columns[:3].astype(np.int64), columns[3])


def primary_object(table: np.ndarray, data: CocoData) -> dict:
    """The study's columns: the picture's largest object against the model's highest-scoring detection.

    Only pictures with at least one non-crowd box count. Precision, recall and F1 are averaged over the classes,
    weighted by how many pictures have that class (so recall equals accuracy). IoU is 0 where nothing was detected.
    """
    pairs = primary_pairs(table, data)
    scores = weighted_scores(pairs, np.ones((len(pairs.picture), 1)))
    return {name: None if np.isnan(value) else float(value) for name, (value,) in scores.items()}


def weighted_scores(pairs: PrimaryPairs, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The study's columns under any number of weightings of the pairs: (V, W) -> (W,) each, NaN without any pair.

    Precision, recall and F1 of a class count by its support, 0 where they are undefined.
    """
    classes = np.unique(pairs.truth)
    right = pairs.truth == pairs.answer
    truth, answer = ((labels == classes[:, None]).astype(np.float64) for labels in (pairs.truth, pairs.answer))
    support, hits, answered = truth @ weights, (truth * right) @ weights, answer @ weights  # (C, W)
    total = weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = support / total
        return {
            "accuracy": right @ weights / total,
            "precision": np.where(total, (_ratio(hits, answered) * share).sum(0), np.nan),
            "recall": hits.sum(0) / total,
            "f1": np.where(total, (_ratio(2 * hits, answered + support) * share).sum(0), np.nan),
            "mean_iou": pairs.iou @ weights / total,
        }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _best_rows(table: np.ndarray) -> dict[int, np.ndarray]:
    """Image id -> the row with the highest score, the first of equals."""
    order = np.argsort(-table[:, 5], kind="stable")
    image_ids, first = np.unique(table[order, 0], return_index=True)
    return dict(zip(image_ids.astype(np.int64).tolist(), table[order[first]], strict=True))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two xywh boxes."""
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    overlap = np.prod(np.maximum(sides, 0))
    return float(overlap / (a[2] * a[3] + b[2] * b[3] - overlap))
