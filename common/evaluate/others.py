"""Detectors of others as `ModelRun`s: those of transformers, and YOLO and other models of ultralytics.

ultralytics (AGPL-3.0) is an optional package, imported only here and only for such a model. Its update checks, usage
statistics and automatic installation of packages are switched off; it only fetches a published weight file.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from common.console import InputError, check_packages, first_few, last_line, to_one_line
from common.data.memory import DetectionData
from common.evaluate.detect import detect, measure_cost, seconds
from common.evaluate.detections import DetectionTable, ModelRun, detection_table
from common.files import cache_folder
from common.model.postprocess import MAX_DETECTIONS, MIN_SCORE
from common.types import Detections

MAX_YOLO = 300  # detections of an image
# ultralytics' settings of evaluation, but `predict` gives each box one class and its validation gives it several, and
# inputs are squares, as those of exported models are.
YOLO_SETTINGS = {"conf": 0.001, "iou": 0.7, "max_det": MAX_YOLO, "rect": False}
Columns = tuple[Tensor, Tensor, Tensor]  # of one image: boxes (N, 4) xyxy original pixels, scores (N,), labels (N,)
InputsOf = Callable[[np.ndarray], Any]  # from the indices of some images
Run = Callable[[Any], list[Columns]]
DESCRIPTIONS = (".json", ".yaml", ".yml", ".txt")  # of detections, of data, and of models without weights


@torch.inference_mode()
def run_transformers(folder: str, data: DetectionData, batch_size: int, device: torch.device) -> ModelRun:
    """What the model in a folder detects on each image alone, in fp32, by its own processor and post-processing.

    `batch_size` images are only timed together, since padding them to a common shape may change scores. Raises
    InputError: the folder is damaged or holds no detector, or a package that it needs is not installed.
    """
    processor, model = _load_transformers(folder)
    model.to(device)

    def inputs_of(part: np.ndarray) -> tuple[Any, list[tuple[int, int]]]:
        images = [data.images[index].open() for index in part]
        return processor(images=images, return_tensors="pt").to(device), [image.size[::-1] for image in images]

    def run(inputs: tuple[Any, list[tuple[int, int]]]) -> list[Columns]:
        tensors, sizes = inputs
        found = processor.post_process_object_detection(model(**tensors), threshold=MIN_SCORE, target_sizes=sizes)
        return [(image["boxes"].cpu(), image["scores"].cpu(), image["labels"].cpu()) for image in found]

    table = _run_each(data, inputs_of, run, MAX_DETECTIONS, Path(folder).name)
    parameters, count = sum(p.numel() for p in model.parameters()), min(batch_size, len(data))
    cost = measure_cost(lambda inputs: seconds(run, inputs), inputs_of, count, device, "fp32", parameters)
    names = tuple(str(model.config.id2label[label]) for label in sorted(model.config.id2label))
    conditions = {"model_type": model.config.model_type, "transformers": transformers.__version__}
    return ModelRun(table, names, cost, conditions)


def _load_transformers(folder: str) -> tuple[Any, Any]:
    """The processor and the model."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = {"local_files_only": True, "trust_remote_code": False}
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors: convert its weights by from_pretrained and save_pretrained")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        model, report = AutoModelForObjectDetection.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files, other models and missing packages raise many types
        raise InputError(f"{folder}: transformers loads no detector from it: {last_line(error):.300}") from error
    labels, missing = sorted(model.config.id2label), sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights, the first of them {missing[0]}")
    if labels != list(range(len(labels))):
        raise InputError(f"{folder}: its outputs are numbered from 0, its id2label has {first_few(labels)}")
    if getattr(processor, "do_pad", True) and getattr(processor, "pad_size", None):
        about = f"{folder}: its processor pads images to {dict(processor.pad_size)}, of which boxes may be fractions"
        raise InputError(f"{about}: give its detections with --from-detections")
    return processor, model.eval()


def run_yolo(name: str, data: DetectionData, batch_size: int, device: torch.device) -> ModelRun:
    """What a model of ultralytics detects on each image alone; `batch_size` images are only timed together.

    `name` is a weight file or exported folder, or the name of a published weight file, fetched into the cache once.
    Raises InputError: ultralytics is not installed, or the model is missing, damaged or no detector.
    """
    options = YOLO_SETTINGS | {"device": str(device), "verbose": False}
    opened, saved, threads = Image.open, torch.save, torch.get_num_threads()  # which ultralytics replaces or changes

    def pixels_of(part: np.ndarray) -> list[np.ndarray]:
        """(H, W, 3) uint8, blue first, as ultralytics takes images from memory."""
        return [np.ascontiguousarray(np.asarray(data.images[index].open())[..., ::-1]) for index in part]

    def run(images: list[np.ndarray]) -> list[Columns]:
        found = [result.boxes.cpu() for result in model.predict(images, **options)]
        return [(boxes.xyxy, boxes.conf, boxes.cls) for boxes in found]

    def times(images: list[np.ndarray]) -> float:
        """Of network and post-processing, without resizing, as for the other models."""
        return sum(r.speed["inference"] + r.speed["postprocess"] for r in model.predict(images, **options)) / 1000

    try:
        model = _load_yolo(name)
        names = model.predict(pixels_of(np.arange(1)), **options)[0].names  # an exported model is only loaded now
        torch.set_num_threads(threads)
        table = _run_each(data, pixels_of, run, MAX_YOLO, Path(name).stem)
        exported = not isinstance(model.model, torch.nn.Module)
        count, precision = (1, "as exported") if exported else (min(batch_size, len(data)), "fp32")
        parameters = None if exported else sum(p.numel() for p in model.model.parameters())
        cost = measure_cost(times, pixels_of, count, device, precision, parameters)
    except Exception as error:  # damaged files, other tasks and missing packages raise many types
        reason = to_one_line(str(error) or type(error).__name__, 200)
        raise InputError(f"{name}: ultralytics cannot run it as a detector: {reason}") from error
    finally:
        Image.open, torch.save = opened, saved
        torch.set_num_threads(threads)
    conditions = {"image_size": model.predictor.args.imgsz, "labels_a_box": 1, **YOLO_SETTINGS}
    return ModelRun(table, tuple(names[key] for key in sorted(names)), cost, conditions)


def _load_yolo(name: str) -> Any:
    """ultralytics' model of that name, which it fetches into the cache where it publishes it."""
    check_packages("it", "ultralytics")
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")  # read at the import
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it sets 1
    os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder("ultralytics")))
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    from ultralytics import YOLO
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    if Path(name).suffix.lower() in DESCRIPTIONS:
        raise InputError("it holds no trained model (files of detections are read with --from-detections)")
    if not Path(name).exists() and name not in GITHUB_ASSETS_NAMES:
        raise InputError("it is neither a file or folder nor a weight file that ultralytics publishes")
    return YOLO(name if Path(name).exists() else cache_folder("ultralytics", name))


def _run_each(data: DetectionData, inputs_of: InputsOf, run: Run, limit: int, title: str) -> DetectionTable:
    """At most `limit` detections on each image of `data`, from the inputs of that image alone."""

    def run_one(index: int) -> list[Detections]:
        ((boxes, scores, labels),) = run(inputs_of(np.array([index])))
        order = scores.argsort(descending=True, stable=True)[:limit]
        return [Detections(data.images[index].id, boxes[order].float(), scores[order].float(), labels[order].long())]

    return detection_table(detect(range(len(data)), run_one, len(data), title), data)
