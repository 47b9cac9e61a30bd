"""YOLO baselines and other models of ultralytics: their detections as a `ModelRun`.

ultralytics (AGPL-3.0) is an optional package, imported only here and only for such a model. Its update checks, usage
statistics and automatic installation of packages are switched off; it only fetches a published weight file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.console import InputError, check_packages, progress_bar
from common.data.memory import DetectionData
from common.evaluate.cost import measure_cost
from common.evaluate.detections import ModelRun, detection_table
from common.files import cache_folder
from common.types import Detections

# ultralytics' settings of evaluation, but `predict` gives each box one class and its validation gives it several. With
# `rect` the input of an image, and so its detections, would depend on the shapes of the others in its batch.
SETTINGS = {"conf": 0.001, "iou": 0.7, "max_det": 300, "rect": False}
EXPORTED_FOLDERS = ("_model", ".mlpackage", ".aimodel")  # ends of their names
DESCRIPTIONS = (".json", ".yaml", ".yml", ".txt")  # of detections, of data, and of models without weights
REASON_LENGTH = 200  # characters of ultralytics' message


def run_yolo(name: str, data: DetectionData, batch_size: int, device: torch.device) -> ModelRun:
    """The detections of a YOLO on every image of `data`.

    Args:
        name: a weight file or exported folder, or the name of a published weight file, fetched into the cache once.
        data: the images.
        batch_size: images at once; exported models take one.
        device: to run on.

    Raises:
        InputError: ultralytics is not installed, or the model is missing, damaged or no detector.
    """
    model = _load(name)
    options = SETTINGS | {"device": str(device), "verbose": False}
    images = [_pixels(data, index) for index in range(min(len(data), batch_size))]
    detections: list[Detections] = []
    try:
        with _restore_patched():
            names = model.predict(images[:1], **options)[0].names  # an exported model is only loaded now
        exported = not isinstance(model.model, torch.nn.Module)
        batch = 1 if exported else batch_size
        with progress_bar(len(data), Path(name).stem) as bar:
            for first in range(0, len(data), batch):
                indices = range(first, min(first + batch, len(data)))
                results = model.predict([_pixels(data, index) for index in indices], **options)
                detections += [_detections(r, data.images[i].id) for r, i in zip(results, indices, strict=True)]
                bar.update(len(indices))
        cost = measure_cost(
            lambda number: _seconds(model.predict([images[number % len(images)]], **options)),
            lambda: _seconds(model.predict(images[:batch], **options)),
            len(images[:batch]),
            device,
            "as exported" if exported else "fp32",
            None if exported else sum(p.numel() for p in model.model.parameters()),
        )
    except Exception as error:  # damaged files and missing packages raise many types
        raise InputError(f"{name}: ultralytics cannot run it: {_reason(error)}") from error
    conditions = {"image_size": model.predictor.args.imgsz, "labels_a_box": 1, **SETTINGS}
    class_names = tuple(names[key] for key in sorted(names))
    return ModelRun(detection_table(detections, data), class_names, cost, conditions)


def _load(name: str) -> Any:
    path = Path(name)
    _check_kind(path)
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it sets 1
    os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder("ultralytics")))
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    check_packages(name, "ultralytics")
    try:
        with _restore_patched():
            from ultralytics import YOLO

            model = YOLO(path if path.exists() else _fetch(name))
    except InputError:
        raise
    except Exception as error:  # likewise
        raise InputError(f"{name} is not a model of ultralytics: {_reason(error)}") from error
    if model.task != "detect":
        raise InputError(f"{name} is a model for {model.task}, not for detection")
    return model


def _check_kind(path: Path) -> None:
    """Raise InputError where an existing file or folder cannot be a model."""
    if path.is_dir() and not (path.name.endswith(EXPORTED_FOLDERS) and any(path.iterdir())):
        raise InputError(f"{path} is a folder that holds no exported model (such as best_openvino_model)")
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path} is empty")
    if path.suffix.lower() in DESCRIPTIONS:
        raise InputError(f"{path} holds no trained model (files of detections are read with --from-detections)")


def _reason(error: Exception) -> str:
    """The first line of an error's message, its type where the message is empty, REASON_LENGTH characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:REASON_LENGTH]


@contextmanager
def _restore_patched() -> Iterator[None]:
    """Restores `Image.open`, `torch.save` and the number of threads, which ultralytics replaces."""
    opened, saved, threads = Image.open, torch.save, torch.get_num_threads()
    try:
        yield
    finally:
        Image.open, torch.save = opened, saved
        torch.set_num_threads(threads)


def _fetch(name: str) -> Path:
    """The published weight file of that name, from the cache or from ultralytics."""
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    path = cache_folder("ultralytics", Path(name).name)
    if path.is_file():
        return path
    if name not in GITHUB_ASSETS_NAMES:
        raise InputError(f"no model {name}: neither a file or folder nor a weight file that ultralytics publishes")
    partial = path.with_name(f"{path.stem}.partial") / path.name
    partial.parent.mkdir(exist_ok=True)
    try:
        attempt_download_asset(partial, retry=0, progress=False)
        partial.replace(path)
    except Exception as error:
        raise InputError(f"{name} does not exist and cannot be fetched: download it and give its path") from error
    return path


def _pixels(data: DetectionData, index: int) -> np.ndarray:
    """(H, W, 3) uint8, blue first, as ultralytics takes images from memory."""
    image = data.images[index]
    return np.ascontiguousarray(np.asarray(image.open())[..., ::-1])


def _seconds(results: list) -> float:
    """Time of network and post-processing, without resizing, as for the other models."""
    return sum(r.speed["inference"] + r.speed["postprocess"] for r in results) / 1000


def _detections(result: Any, image_id: int) -> Detections:
    boxes = result.boxes.cpu()
    order = boxes.conf.argsort(descending=True, stable=True)
    return Detections(image_id, boxes.xyxy[order].float(), boxes.conf[order].float(), boxes.cls[order].long())
