"""One model, one data set, one record: what both validation scripts share.

A model is a checkpoint of this project, anything that ultralytics runs, or a file of detections; each becomes `Found`,
and from there on all go the same way.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from common.console import InputError
from common.data.coco import CocoData
from common.data.dataset import make_eval_loader
from common.evaluate.bootstrap import interval, resampled
from common.evaluate.coco_metrics import best_of_duplicates, evaluate_table
from common.evaluate.cost import measure_cost
from common.evaluate.detect import detect
from common.evaluate.detections import detection_table, label_map
from common.evaluate.diagnosis import diagnose, self_check
from common.evaluate.matching import IOU_THRESHOLDS, match
from common.evaluate.results import ValidationRecord
from common.model.checkpoint import Checkpoint, load_detector
from common.types import Detections, Found, xywh_to_xyxy


@dataclass(frozen=True)
class Runner:
    """How detectors are run: where, how many images at once, decoded by how many processes, mirrored too?"""

    accelerator: Accelerator
    batch_size: int
    workers: int
    flip: bool = False  # look at the mirrored images too

    def detect(self, checkpoint: Checkpoint, data: CocoData, what: str) -> list[Detections]:
        """Detections on every image of `data`, in its order, in the checkpoint's own labels."""
        loader = make_eval_loader(data, checkpoint.detector.config.image_size, self.batch_size, self.workers)
        model = self.accelerator.prepare_model(checkpoint.detector, evaluation_mode=True)
        return detect(model, self.accelerator.prepare(loader), self.accelerator, what, self.flip)

    def cost(self, checkpoint: Checkpoint, data: CocoData) -> dict:
        """Parameters and speed, as `cost.Cost` names them, on the first images of `data`."""
        loader = make_eval_loader(
            data.first(self.batch_size), checkpoint.detector.config.image_size, self.batch_size, 0
        )
        model = self.accelerator.prepare_model(checkpoint.detector, evaluation_mode=True)
        batch = next(iter(loader)).to(self.accelerator.device)
        return asdict(measure_cost(model, batch, self.accelerator, self.flip))


def found_by_checkpoint(path: str, data: CocoData, runner: Runner) -> Found:
    """What a checkpoint of this project finds.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    checkpoint = load_detector(path)
    config = checkpoint.detector.config
    conditions = checkpoint.train_config | {
        "epoch": checkpoint.epoch,
        "image_size": config.image_size,
        "blocks": list(config.blocks),
        "head": config.head,
        "flip": runner.flip,
    }
    detections = runner.detect(checkpoint, data, Path(path).stem)
    return Found(detections, checkpoint.class_names, runner.cost(checkpoint, data), conditions)


def found_in_file(path: str, data: CocoData) -> Found:
    """What a file in COCO's results format holds: a list of image_id, category_id, bbox (xywh, original pixels), score.

    Raises:
        InputError: no such file, not that format, or of images that are not in `data`.
    """
    try:
        rows = json.loads(Path(path).read_text())
        table = np.array([(r["image_id"], *r["bbox"], r["score"], r["category_id"]) for r in rows], np.float64)
        table = table.reshape(-1, 7)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} does not hold detections: a list of image_id, category_id, bbox and score is wanted ({error!r})"
        ) from error
    if not np.isfinite(table).all():
        raise InputError(f"{path}: some numbers are infinite or not numbers")
    strangers = np.setdiff1d(table[:, 0], [image.id for image in data.images])
    if len(strangers):
        raise InputError(f"{path}: {len(strangers)} images are not in {data.source}, {strangers[0]:g} among them")
    label_of = {category: label for label, category in enumerate(data.category_ids)}
    labels = np.array([label_of.get(int(category), -1) for category in table[:, 6]], np.int64)
    order = np.lexsort((-table[:, 5], table[:, 0]))
    order = order[labels[order] >= 0]
    image_ids, found = table[order, 0], []
    for image in data.images:
        own = order[slice(*np.searchsorted(image_ids, (image.id, image.id + 1)))]
        boxes = xywh_to_xyxy(torch.from_numpy(table[own, 1:5]).float())
        scores, names = torch.from_numpy(table[own, 5]).float(), torch.from_numpy(labels[own])
        found.append(Detections(image.id, boxes, scores, names))
    return Found(found, data.class_names, conditions={"detections_of_unknown_categories": int((labels < 0).sum())})


@dataclass(frozen=True)
class Judgement:
    """A record, the (M, 7) detections behind it in the data set's terms, and its numbers in each resample, if any."""

    record: ValidationRecord
    table: np.ndarray | None = None
    samples: dict[str, np.ndarray] = field(default_factory=dict)


def judge(name: str, path: str, found: Found, data: CocoData, weights: np.ndarray | None = None) -> Judgement:
    """Everything that is measured of one model on `data`.

    Args:
        weights: (P, R) as `bootstrap.draws` returns them, for intervals and the diagnosis; None to do without both.

    Raises:
        InputError: the model and the data set have no class in common.
    """
    labels = label_map(found.class_names, data)
    known = int((labels >= 0).sum())
    if known == 0:
        raise InputError(f"{path}: none of its classes ({', '.join(found.class_names[:3])}, …) is in {data.source}")
    table = detection_table(found.detections, labels)
    conditions = found.conditions | {"classes_compared": known, "classes_in_data": len(data.class_names)}
    parts = evaluate_table(table, data) | {"cost": found.cost, "conditions": conditions}
    samples: dict[str, np.ndarray] = {}
    if weights is not None:
        matches = match(table, data)
        agnostic = match(best_of_duplicates(table), data, IOU_THRESHOLDS[:1], by_class=False)
        samples = resampled(table, matches, agnostic, data, weights)
        parts |= {
            "diagnosis": diagnose(table, matches, data),
            "intervals": {key: interval(values) for key, values in samples.items()},
            "warnings": self_check(table, data),
        }
    return Judgement(ValidationRecord(name, path, **parts), table, samples)


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for each file: its stem, with as many folders before it as make it the only one."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["-".join(p[-depth:]).strip("./") for p in parts]
