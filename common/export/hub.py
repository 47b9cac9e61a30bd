"""A folder for the hub: the weights, their settings and a model card, which `hf upload USER/NAME FOLDER` publishes."""

import json
import re
from pathlib import Path

import yaml

from common.console import InputError
from common.evaluate.results import ValidationRecord, ValidationResults, read_results
from common.files import PROGRAM, atomic_write, check_writable
from common.hub import HUB_ID
from common.model.checkpoint import Checkpoint, save_folder

CARD = "README.md"
NUMBERS = {  # of the card: the part of a record and the field
    "mAP@0.5": ("detection", "AP50"),
    "AP": ("detection", "AP"),
    "accuracy": ("primary", "accuracy"),
    "F1": ("primary", "f1"),
    "mean IoU": ("primary", "mean_iou"),
    "found": ("primary", "found"),
}
CONDITIONS = ("backbone", "data", "train_images_used", "seed", "image_size", "head", "precision", "epoch")
CARD_TEXT = """
# {name}

An object detector on a DINOv2 backbone with {classes} classes, {parameters:.1f} million parameters, for images scaled
to {size} pixels. It runs with the project *{library}*:

```python
from common.model import load_detector

detector = load_detector("hub:USER/{name}")
detections = detector.predict("street.jpg")
```

## Numbers

{numbers}

mAP@0.5 and AP are COCO's. Accuracy, F1 and mean IoU compare the surest detection of an image with its largest object;
*found* is the share of images whose largest object is found and named by a detection from the operating point
({operating_point:.2f}) on.

## Training

| | |
|---|---|
{training}

## Classes

{class_names}

## Licence

The weights derive from those of the backbone and from the training data. The terms of both apply to them.
"""


def write_hub_folder(checkpoint: Checkpoint, folder: Path, results: str = "") -> None:
    """Write config.json, model.safetensors and README.md, the model card.

    Args:
        checkpoint: to publish.
        folder: made where it does not exist.
        results: a validation_results.json with this checkpoint, whose numbers and intervals the card shows; without it
            the card shows the numbers of the validation during training, which have no intervals.

    Raises:
        InputError: results that cannot be read or do not hold this checkpoint, or a file that cannot be written.
    """
    check_writable(folder / CARD)
    numbers = _evaluated(checkpoint, results) if results else _of_training(checkpoint)
    save_folder(folder, checkpoint)
    with atomic_write(folder / CARD, "w") as file:
        file.write(model_card(checkpoint, folder.name.removesuffix("_hub"), numbers))


def model_card(checkpoint: Checkpoint, name: str, numbers: str) -> str:
    """The text of the card, Markdown after the hub's YAML header."""
    conditions = checkpoint.conditions()
    backbone, data = str(conditions.get("backbone", "")), str(conditions.get("data", ""))
    header: dict[str, object] = {"library_name": PROGRAM, "pipeline_tag": "object-detection"}
    if re.fullmatch(HUB_ID, backbone):
        header |= {"base_model": backbone}
    if re.fullmatch(HUB_ID, data):
        header |= {"datasets": [data]}
    text = CARD_TEXT.format(
        name=name,
        classes=len(checkpoint.class_names),
        parameters=sum(weight.numel() for weight in checkpoint.detector.parameters()) / 1e6,
        size=checkpoint.image_size,
        library=PROGRAM,
        numbers=numbers,
        operating_point=checkpoint.min_score,
        training="\n".join(f"| {key} | {conditions[key]} |" for key in CONDITIONS if key in conditions),
        class_names=", ".join(checkpoint.class_names),
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n{text}"


def _of_training(checkpoint: Checkpoint) -> str:
    numbers = {name: checkpoint.metrics.get(key) for name, (_, key) in NUMBERS.items()}
    rows = [f"| {name} | {number:.3f} |" for name, number in numbers.items() if isinstance(number, float)]
    source = "On the validation images of its training, by which the best epoch was chosen:"
    return "\n".join([source, "", "| | |", "|---|---|", *rows]) if rows else "It was not evaluated."


def _evaluated(checkpoint: Checkpoint, path: str) -> str:
    results = read_results(path)
    record = _record_of(checkpoint, results)
    if record is None:
        raise InputError(f"{path} has no numbers of this checkpoint; run comprehensive_validation.py --models with it")
    rows = [f"| {name} | {_cell(record, *field)} |" for name, field in NUMBERS.items()]
    data = results.dataset
    source = f"On {data.images} images of {data.source}, with 95% intervals over the images:"
    return "\n".join([source, "", "| | |", "|---|---|", *rows])


def _record_of(checkpoint: Checkpoint, results: ValidationResults) -> ValidationRecord | None:
    """The record of the checkpoint itself, not of its exports, by how it was trained."""
    expected = json.loads(json.dumps(checkpoint.conditions()))
    del expected["validation_metrics"]
    for record in results.models:
        found = record.conditions
        if found.items() >= expected.items() and "runtime" not in found:
            return record
    return None


def _cell(record: ValidationRecord, part: str, key: str) -> str:
    value, interval = record.number(part, key), record.interval(key)
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
