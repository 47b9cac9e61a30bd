"""Detectors of transformers as `ModelRun`s: what `AutoModelForObjectDetection` loads, with its image processor."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from common.console import InputError, first_few, last_line
from common.data.memory import DetectionData
from common.evaluate.detect import detect, measure_cost, seconds
from common.evaluate.detections import ModelRun, detection_table
from common.hub import CONFIG
from common.model.postprocess import MAX_DETECTIONS, MIN_SCORE
from common.types import Detections


def is_transformers(path: str) -> bool:
    """Is this a folder with a model of transformers?"""
    return Path(path, CONFIG).is_file()


@torch.inference_mode()
def run_transformers(folder: str, data: DetectionData, batch_size: int, device: torch.device) -> ModelRun:
    """The detections of the model in a folder on every image of `data`, in fp32, as its own post-processing returns
    them. Where `batch_size` images are padded to a common shape, only their speed is measured together.

    Raises:
        InputError: the folder is damaged or holds no detector, or a package that it needs is not installed.
    """
    processor, model = _load(folder)
    model.to(device)

    def inputs_of(part: range) -> tuple[range, Any, list[tuple[int, int]]]:
        images = [data.images[index].open() for index in part]
        return part, processor(images=images, return_tensors="pt").to(device), [image.size[::-1] for image in images]

    def run(inputs: tuple[range, Any, list[tuple[int, int]]]) -> list[Detections]:
        part, tensors, sizes = inputs
        found = processor.post_process_object_detection(model(**tensors), threshold=MIN_SCORE, target_sizes=sizes)
        return [_detections(result, data.images[index].id) for result, index in zip(found, part, strict=True)]

    try:
        padded = "pixel_mask" in inputs_of(range(1))[1]  # to a common shape, which changes scores in the second digit
        at_once = 1 if padded else batch_size
        parts = (range(n, min(n + at_once, len(data))) for n in range(0, len(data), at_once))
        detections = detect(map(inputs_of, parts), run, len(data), Path(folder).name)
        several = range(min(len(data), batch_size))
        inputs = [inputs_of(range(n, n + 1)) for n in several], inputs_of(several)
        parameters = sum(p.numel() for p in model.parameters())
        cost = measure_cost(lambda part: seconds(run, part), *inputs, device, "fp32", parameters)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of settings that transformers did not check
        raise InputError(f"{folder}: transformers cannot run it: {last_line(error):.300}") from error
    names, conditions = model.config.id2label, {"model_type": model.config.model_type}
    conditions["transformers"] = transformers.__version__
    class_names = tuple(str(names[label]) for label in sorted(names))
    return ModelRun(detection_table(detections, data), class_names, cost, conditions)


def _load(folder: str) -> tuple[Any, Any]:
    """The processor and the model."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        model, report = AutoModelForObjectDetection.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files, other models and missing packages raise many types
        raise InputError(f"{folder}: transformers loads no detector from it: {last_line(error):.300}") from error
    labels = sorted(model.config.id2label)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{folder} lacks {len(missing)} weights, the first of them {missing[0]}")
    if labels != list(range(len(labels))):
        raise InputError(f"{folder}: its outputs are numbered from 0, its id2label has {first_few(labels)}")
    if getattr(processor, "pad_size", None):
        raise InputError(
            f"{folder}: its processor pads images to {dict(processor.pad_size)}, and nothing tells whether boxes are "
            "fractions of the padded image: give its detections with --from-detections"
        )
    return processor, model.eval()


def _detections(found: dict, image_id: int) -> Detections:
    """The best detections of one image, by falling score."""
    order = found["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    boxes, scores, labels = (found[name][order].cpu() for name in ("boxes", "scores", "labels"))
    return Detections(image_id, boxes.float(), scores.float(), labels)
