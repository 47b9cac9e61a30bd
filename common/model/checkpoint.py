"""Detector checkpoints: `.pth` files of tensors and plain types, read with `weights_only=True`, which runs nothing.

A folder for the hub holds the same in config.json and model.safetensors. Since a checkpoint may come from an unknown
source, all that is wrong with it ends in one InputError.
"""

import json
import re
import unicodedata
import warnings
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.console import InputError, last_line
from common.files import PROGRAM, atomic_write
from common.hub import CONFIG, WEIGHTS, located
from common.model.detector import Detector, DetectorConfig, build_detector

FORMAT_VERSION = 2
DEFAULT_MIN_SCORE = 0.3  # of detections that are shown, where no operating point is known
FOLDER = 0x10  # the attribute of a folder in a ZIP archive
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, line and paragraph ends


@dataclass(frozen=True)
class Checkpoint:
    """A detector and its description in plain types."""

    detector: Detector
    class_names: tuple[str, ...]  # of the labels 0..K-1
    category_ids: tuple[int, ...]  # of the data set that it was trained on
    train_config: dict = field(default_factory=dict)  # settings and conditions of its training
    metrics: dict = field(default_factory=dict)  # on the validation images of its training
    epoch: int = 0  # finished epochs

    @property
    def min_score(self) -> float:
        """The operating point: the score with the best F1 on the validation images of its training, or the default."""
        score = self.metrics.get("operating_point")
        return score if type(score) is float and 0 <= score <= 1 else DEFAULT_MIN_SCORE

    def conditions(self) -> dict:
        """How the detector was trained and what it is, for records of evaluations and descriptions of exports."""
        config = _plain(asdict(self.detector.config))
        del config["backbone"]  # its architecture; `train_config` has its name
        return self.train_config | {"epoch": self.epoch, "validation_metrics": self.metrics} | config


def save_detector(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a `.pth` from which `load_checkpoint` rebuilds the detector; an existing file stays until then."""
    with atomic_write(path) as file:
        torch.save(_description(checkpoint) | {"model": _weights(checkpoint)}, file)


def save_folder(folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json and model.safetensors, from which `load_checkpoint` rebuilds the detector."""
    with atomic_write(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(_weights(checkpoint), metadata={"format": "pt", "library_name": PROGRAM}))
    with atomic_write(folder / CONFIG, "w") as file:
        json.dump({"library_name": PROGRAM} | _description(checkpoint), file, indent=2)


def _description(checkpoint: Checkpoint) -> dict:
    content = {
        "format_version": FORMAT_VERSION,
        "model_config": asdict(checkpoint.detector.config),
        "class_names": checkpoint.class_names,
        "category_ids": checkpoint.category_ids,
        "train_config": checkpoint.train_config,
        "metrics": checkpoint.metrics,
        "epoch": checkpoint.epoch,
    }
    return _plain(content, default=float)  # numbers of NumPy among them


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in checkpoint.detector.state_dict().items()}


def is_checkpoint(path: str | Path) -> bool:
    """Is this a checkpoint of this project: by its name a `.pth`, or a folder for the hub?"""
    if str(path).lower().endswith(".pth"):
        return True
    try:
        content = json.loads(Path(path, CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("library_name") == PROGRAM


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_detector` or `save_folder` wrote, onto the CPU, in evaluation mode.

    Args:
        path: a file, a folder, or `hub:user/name`, for which alone a network is needed, and that only once.

    Raises:
        InputError: the file is missing, damaged, no checkpoint of this project, or its weights do not fit its settings.
    """
    place = Path(located(str(path)))
    if not place.exists():
        raise InputError(f"{path}: no such checkpoint; train one with finetune_dino2_simple.py, or name another")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what then raises as well
            return _rebuild(_read_folder(place) if place.is_dir() else read_archive(place))
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # damaged and foreign files raise many types
        reason = f"{type(error).__name__}: {last_line(error):.200}"
        raise InputError(f"{path}: damaged, or not a detector's checkpoint ({reason})") from error


def _read_folder(folder: Path) -> dict:
    content = json.loads((folder / CONFIG).read_bytes())
    if content["library_name"] != PROGRAM:
        raise InputError(f"not a detector's folder, whose {CONFIG} has the library_name {PROGRAM}")
    return content | {"model": safetensors.torch.load_file(folder / WEIGHTS)}


def read_archive(path: Path) -> dict:
    """What `torch.save` wrote, onto the CPU; raises whatever Python and torch do where the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        # torch verifies no checksums, and reads no data from a part that one flipped bit marks as a folder
        if archive.testzip() or any(part.external_attr & FOLDER for part in archive.infolist()):
            raise zipfile.BadZipFile("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def _rebuild(content: dict) -> Checkpoint:
    version = content["format_version"]
    if version not in (1, FORMAT_VERSION):
        raise InputError(f"its format_version is {version!r:.40}, this program reads 1 and {FORMAT_VERSION}")
    with torch.device("meta"):  # shapes without data: the weights of the file are assigned, not copied
        detector = build_detector(DetectorConfig(**content["model_config"]))
    weights = content["model"] if version == FORMAT_VERSION else _renamed(content["model"])
    detector.load_state_dict(weights, assign=True)
    if not all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values()):
        raise InputError("its weights are not all finite numbers of 32 bits")
    names, ids = tuple(content["class_names"]), tuple(content["category_ids"])
    if not len(names) == len(set(ids)) == len(ids) == detector.config.num_classes:
        raise InputError(f"its {len(names)} class names and {len(ids)} category ids are not those of different classes")
    if UNPRINTABLE & set(map(unicodedata.category, "".join(names))) or not all(type(i) is int for i in ids):
        raise InputError("its class names are not lines of printable text, or its category ids not whole numbers")
    train_config, metrics = map(_plain, (content["train_config"], content["metrics"]))
    return Checkpoint(detector.eval(), names, ids, dict(train_config), dict(metrics), int(content["epoch"]))


def _plain(content: Any, **options: Any) -> Any:
    """A copy of plain types alone, as JSON has them. Raises TypeError or ValueError where it holds others."""
    return json.loads(json.dumps(content, **options))


def _renamed(weights: dict) -> dict:
    """The weights of format version 1, where the dense head and the second look stood beside each other."""
    names = {name: re.sub(r"^head\.", "head.dense.", name) for name in weights}
    return {re.sub(r"^second_look\.", "head.second_look.", names[name]): weight for name, weight in weights.items()}
