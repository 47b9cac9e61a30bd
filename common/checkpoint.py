"""Detector checkpoints: tensors and plain types only, read with `weights_only=True` and never otherwise."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from common.detector import Detector, DetectorConfig, build_detector
from common.errors import InputError
from common.files import atomic_write

FORMAT_VERSION = 1
KEYS = {"format_version", "model_config", "class_names", "category_ids", "model", "train_config", "metrics", "epoch"}


@dataclass(frozen=True)
class Checkpoint:
    """A detector and what is known of it; plain types, so that it can be stored."""

    detector: Detector
    class_names: tuple[str, ...]  # of the labels 0..K-1
    category_ids: tuple[int, ...]  # of the data set that it was trained on
    train_config: dict = field(default_factory=dict)  # settings and conditions of its training
    metrics: dict = field(default_factory=dict)  # on the validation pictures of its training
    epoch: int = 0  # finished epochs


def save_detector(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a `.pth` that alone rebuilds the detector; whatever stood at `path` stays until it is whole.

    Raises:
        InputError: the file can't be written.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "model_config": asdict(checkpoint.detector.config),
        "class_names": list(checkpoint.class_names),
        "category_ids": list(checkpoint.category_ids),
        "model": {name: tensor.detach().cpu() for name, tensor in checkpoint.detector.state_dict().items()},
        "train_config": checkpoint.train_config,
        "metrics": checkpoint.metrics,
        "epoch": checkpoint.epoch,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_detector(path: str | Path) -> Checkpoint:
    """Read what `save_detector` wrote, onto the CPU, in evaluation mode, without any network.

    Raises:
        InputError: no such file, not a checkpoint of this project, or weights that do not fit its settings.
    """
    content = _read(path)
    try:
        config = content["model_config"]
        detector = build_detector(DetectorConfig(**config | {"blocks": tuple(config["blocks"])}))
        detector.load_state_dict(content["model"])
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit its settings: {str(error).splitlines()[0]}") from error
    names, ids = tuple(content["class_names"]), tuple(content["category_ids"])
    if not len(names) == len(ids) == detector.config.num_classes:
        raise InputError(f"{path}: {len(names)} class names for {detector.config.num_classes} classes")
    known = {key: content[key] for key in ("train_config", "metrics", "epoch")}
    return Checkpoint(detector.eval(), names, ids, **known)


def _read(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}; train one with finetune_dino2_simple.py, or name another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file fails in as many ways as there are files
        raise InputError(f"{path} is not a checkpoint of plain tensors; it is damaged or of another program") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise InputError(f"{path} is a checkpoint of another kind: a detector's has the keys {', '.join(sorted(KEYS))}")
    if content["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path} has format {content['format_version']}, this version reads {FORMAT_VERSION}")
    return content
