"""From a model and a data set to a record, for both validation scripts.

A model is a checkpoint of this project, one of its exports, anything that transformers or ultralytics runs, or a file
of detections. Each gives `Predictions`, which one function evaluates.
"""

import itertools
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from common.console import InputError, first_few, progress_bar
from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.evaluate.bootstrap import interval, resampled
from common.evaluate.coco_metrics import evaluate_table, match_all
from common.evaluate.detect import Cost, detect, measure_cost, predict
from common.evaluate.detections import DetectionTable, TablePredictions, detection_table, label_map
from common.evaluate.diagnosis import diagnose, self_check
from common.evaluate.results import ValidationRecord
from common.model.checkpoint import Checkpoint, load_checkpoint
from common.model.exported import ExportedDetector, is_exported, load_exported
from common.model.postprocess import detections_of, postprocess
from common.runtime import precision_name
from common.types import Batch, Detections, ImageMeta, Predictions

Model = Checkpoint | ExportedDetector
NAME_BYTES = 200  # of a model's name, from which file names are made


def load_model(path: str) -> Model:
    """Read a checkpoint, or a detector that was exported.

    Raises:
        InputError: a missing or damaged detector, or one whose runtime is not installed.
    """
    return load_exported(path) if is_exported(path) else load_checkpoint(path)


@dataclass(frozen=True)
class Predictor:
    """Runs detectors of this project, `batch_size` images at once.

    Checkpoints run on the device and in the precision of `accelerator`, exported detectors on the CPU in their own.
    `workers` processes decode the images; with `flip` a checkpoint also runs on the mirror image of each.
    """

    accelerator: Accelerator
    batch_size: int
    workers: int
    flip: bool = False

    def detect(self, model: Model, data: DetectionData, title: str) -> list[Detections]:
        """Detections on every image of `data`, in its order, in the model's labels.

        Args:
            title: of the progress bar.

        Raises:
            InputError: mirrored images are requested of an exported detector.
        """
        loader = make_eval_loader(data, model.image_size, self.batch_size, self.workers)
        if isinstance(model, Checkpoint):
            detector = self.accelerator.prepare_model(model.detector, evaluation_mode=True)
            return detect(detector, self.accelerator.prepare(loader), self.accelerator, title, self.flip)
        if self.flip:
            raise InputError(f"{title}: --flip is for checkpoints, not for exported detectors")
        detections: list[Detections] = []
        with progress_bar(len(data), title) as bar:
            for batch in loader:
                detections += detections_of(*model.run(batch.inputs), batch.meta)
                bar.update(len(batch.meta))
        return detections

    def cost(self, model: Model, data: DetectionData) -> dict:
        """Parameters, if they are known, and speed, the fields of `Cost`, measured on the first images of `data`."""
        batch = next(iter(make_eval_loader(data.first(self.batch_size), model.image_size, self.batch_size, workers=0)))
        if isinstance(model, ExportedDetector):

            def run_exported(images: Tensor, meta: list[ImageMeta]) -> list[Detections]:
                return detections_of(*model.run(images), meta)

            return asdict(_cost_on(batch, run_exported, torch.device("cpu"), model.precision))
        detector = self.accelerator.prepare_model(model.detector, evaluation_mode=True).eval()
        parameters = sum(p.numel() for p in detector.parameters())

        def run(images: Tensor, meta: list[ImageMeta]) -> list[Detections]:
            return postprocess(*predict(detector, images, self.flip), meta)

        device, precision = self.accelerator.device, precision_name(self.accelerator)
        return asdict(_cost_on(batch.to(device), run, device, precision, parameters))

    def predictions(self, path: str, data: DetectionData) -> Predictions:
        """What the checkpoint or the exported detector in `path` detects on the images of `data`.

        Raises:
            InputError: what `load_model` and `detect` raise.
        """
        model = load_model(path)
        detections = self.detect(model, data, Path(path).stem)
        conditions = model.conditions() | {"flip": self.flip}
        return Predictions(detections, model.class_names, self.cost(model, data), conditions)


def _cost_on(batch: Batch, run: Callable, *about) -> Cost:
    """What `run`, a function of images and targets, costs on the images of a batch."""
    singles = [(batch.inputs[i : i + 1], batch.meta[i : i + 1]) for i in range(len(batch.meta))]
    return measure_cost(run, singles, (batch.inputs, batch.meta), len(singles), *about)


@dataclass(frozen=True)
class Evaluation:
    """A record, with its detections and its numbers in each resample unless the record has an error."""

    record: ValidationRecord
    table: DetectionTable = field(default_factory=DetectionTable.empty)
    samples: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate(
    name: str, path: str, predictions: Predictions, data: DetectionData, weights: np.ndarray | None = None
) -> Evaluation:
    """Measure one model on `data`.

    Args:
        name: of the model, in tables and charts.
        path: of its file.
        weights: (P, R) as `bootstrap.draws` returns them; None leaves out intervals, diagnosis and self-check.

    Raises:
        InputError: the model and the data set have no class in common.
    """
    labels = label_map(predictions.class_names, data)
    known = int((labels >= 0).sum())
    if known == 0:
        raise InputError(f"{path}: none of its classes ({first_few(predictions.class_names)}) is in {data.source}")
    read = predictions.table if isinstance(predictions, TablePredictions) else None
    table = detection_table(predictions.detections, labels) if read is None else read
    conditions = predictions.conditions | {"classes_compared": known, "classes_in_data": len(data.class_names)}
    matched = match_all(table, data)
    parts = evaluate_table(table, data, matched) | {"cost": predictions.cost, "conditions": conditions}
    warnings = [*predictions.warnings, *_class_warnings(predictions.class_names, labels, data)]
    samples: dict[str, np.ndarray] = {}
    if weights is not None:
        samples = resampled(matched, data, weights)
        parts |= {
            "diagnosis": diagnose(table, matched.by_class, data),
            "intervals": {key: interval(values) for key, values in samples.items()},
        }
        warnings += self_check(table, data)
    return Evaluation(ValidationRecord(name, path, **parts, warnings=warnings), table, samples)


def _class_warnings(class_names: tuple[str, ...], labels: np.ndarray, data: DetectionData) -> list[str]:
    """Which classes were matched although their names differ, and which classes of the data set the model lacks."""
    matched = [(name, data.class_names[label]) for name, label in zip(class_names, labels, strict=True) if label >= 0]
    differ = [f"{own} = {name}" for own, name in matched if own != name]
    missing = [name for label, name in enumerate(data.class_names) if label not in labels]
    warnings = []
    if differ:
        warnings.append(f"{len(differ)} classes were matched although their names differ ({first_few(differ)})")
    if missing:
        warnings.append(
            f"the model lacks {len(missing)} of the {len(data.class_names)} classes of {data.source} "
            f"({first_few(missing)}); their objects count as missed"
        )
    return warnings


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for each file, no two of them equal, not even on file systems that ignore case.

    The name is the file's stem, where stems are equal with its suffix, then with as many folders as necessary; a number
    distinguishes files whose names differ in case only.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] or ("model",) for path in paths]  # noqa: PTH100 (resolve follows links)
    for depth in range(1, max(map(len, parts), default=1) + 1):
        for whole in (False, True):
            names = [_join(p[-depth:], whole) for p in parts]
            if len(set(map(_folded, names))) == len(names):
                return names
    unique: dict[str, str] = {}
    for name in (_join(p[-1:], False) for p in parts):
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        chosen = next(n for n in itertools.chain([name], numbered) if _folded(n) not in unique)
        unique[_folded(chosen)] = chosen
    return list(unique.values())


def _join(parts: Sequence[str], whole: bool) -> str:
    """The folders and the file name of a path, without its suffix unless `whole`, as one file name."""
    name = "-".join([*parts[:-1], parts[-1] if whole else Path(parts[-1]).stem]).strip("./\\")
    return os.fsencode(name)[-NAME_BYTES:].decode(errors="ignore") or "model"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
