"""YOLO baselines and other models of ultralytics: their detections as a `ModelRun`.

ultralytics (AGPL-3.0) is an optional package, imported only here and only for such a model. Its update checks, usage
statistics and automatic installation of packages are switched off; it only fetches a published weight file.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.console import InputError, check_packages, to_one_line
from common.data.memory import DetectionData
from common.evaluate.detect import detect, measure_cost
from common.evaluate.detections import ModelRun, detection_table
from common.files import cache_folder
from common.types import Detections

# ultralytics' settings of evaluation, but `predict` gives each box one class and its validation gives it several. With
# `rect` the input of an image, and so its detections, would depend on the shapes of the others in its batch.
SETTINGS = {"conf": 0.001, "iou": 0.7, "max_det": 300, "rect": False}
DESCRIPTIONS = (".json", ".yaml", ".yml", ".txt")  # of detections, of data, and of models without weights


def run_yolo(name: str, data: DetectionData, batch_size: int, device: torch.device) -> ModelRun:
    """The detections of a YOLO on every image of `data`, `batch_size` at once, one where it is exported.

    `name` is a weight file or exported folder, or the name of a published weight file, fetched into the cache once.

    Raises:
        InputError: ultralytics is not installed, or the model is missing, damaged or no detector.
    """
    options, threads = SETTINGS | {"device": str(device), "verbose": False}, torch.get_num_threads()
    path = _find(name)
    try:
        from ultralytics import YOLO

        model: Any = YOLO(path)
        names = model.predict(_pixels(data, 0), **options)[0].names  # an exported model is only loaded now
        torch.set_num_threads(threads)  # which ultralytics changes
        exported = not isinstance(model.model, torch.nn.Module)
        at_once = 1 if exported else batch_size
        parts = [range(n, min(n + at_once, len(data))) for n in range(0, len(data), at_once)]

        def run(part: range) -> list[Detections]:
            results = model.predict([_pixels(data, index) for index in part], **options)
            return [_detections(r, data.images[index].id) for r, index in zip(results, part, strict=True)]

        def times(images: list[np.ndarray]) -> float:
            """Of network and post-processing, without resizing, as for the other models."""
            results = model.predict(images, **options)
            return sum(r.speed["inference"] + r.speed["postprocess"] for r in results) / 1000

        detections = detect(parts, run, len(data), path.stem)
        images = [_pixels(data, index) for index in parts[0]]
        parameters = None if exported else sum(p.numel() for p in model.model.parameters())
        precision = "as exported" if exported else "fp32"
        cost = measure_cost(times, [[image] for image in images], images, device, precision, parameters)
    except Exception as error:  # damaged files, other tasks and missing packages raise many types
        reason = to_one_line(str(error) or type(error).__name__, 200)
        raise InputError(f"{name}: ultralytics cannot run it as a detector: {reason}") from error
    conditions = {"image_size": model.predictor.args.imgsz, "labels_a_box": 1, **SETTINGS}
    return ModelRun(detection_table(detections, data), tuple(names[key] for key in sorted(names)), cost, conditions)


def _find(name: str) -> Path:
    """The path of a model, in the cache where ultralytics publishes it; sets what ultralytics reads when imported."""
    path = Path(name)
    if path.suffix.lower() in DESCRIPTIONS:
        raise InputError(f"{path} holds no trained model (files of detections are read with --from-detections)")
    check_packages(name, "ultralytics")
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it sets 1
    os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder("ultralytics")))
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    if path.exists():
        return path
    if name not in GITHUB_ASSETS_NAMES:
        raise InputError(f"no model {name}: neither a file or folder nor a weight file that ultralytics publishes")
    return cache_folder("ultralytics", name)  # where ultralytics puts it


def _pixels(data: DetectionData, index: int) -> np.ndarray:
    """(H, W, 3) uint8, blue first, as ultralytics takes images from memory."""
    return np.ascontiguousarray(np.asarray(data.images[index].open())[..., ::-1])


def _detections(result: Any, image_id: int) -> Detections:
    boxes = result.boxes.cpu()
    order = boxes.conf.argsort(descending=True, stable=True)
    return Detections(image_id, boxes.xyxy[order].float(), boxes.conf[order].float(), boxes.cls[order].long())
