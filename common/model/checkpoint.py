"""Detector checkpoints: `.pth` files of tensors and plain types, read with `weights_only=True`, which runs nothing.

A folder for the hub holds the same in two files, config.json and model.safetensors. A checkpoint may come from an
unknown source, so `load_checkpoint` checks everything that a `Detector` relies on, and raises InputError for a damaged
file or one of another kind.
"""

import json
import re
import reprlib
import unicodedata
import warnings
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.console import InputError
from common.files import atomic_write
from common.hub import CONFIG, WEIGHTS, located
from common.model.detector import Detector, DetectorConfig, build_detector

FORMAT_VERSION = 2
DEFAULT_MIN_SCORE = 0.3  # of detections that are shown, where no operating point is known
CONTENT = {
    "model_config": dict,
    "class_names": list,
    "category_ids": list,
    "model": dict,
    "train_config": dict,
    "metrics": dict,
    "epoch": int,
}
LIBRARY = "dinov2-detection"  # library_name in its config.json
FOLDER = 0x10  # the attribute of a folder in a ZIP archive
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, line and paragraph ends


@dataclass(frozen=True)
class Checkpoint:
    """A detector and its description in plain types.

    Raises:
        InputError: names that are not printable, ids that are not distinct 64-bit integers, another number of them than
            of classes, or values of other types.
    """

    detector: Detector
    class_names: tuple[str, ...]  # of the labels 0..K-1
    category_ids: tuple[int, ...]  # of the data set that it was trained on
    train_config: dict = field(default_factory=dict)  # settings and conditions of its training
    metrics: dict = field(default_factory=dict)  # on the validation images of its training
    epoch: int = 0  # finished epochs

    def __post_init__(self) -> None:
        names, ids, classes = self.class_names, self.category_ids, self.detector.config.num_classes
        if not len(names) == len(ids) == classes:
            raise InputError(f"{len(names)} class names and {len(ids)} category ids for {classes} classes")
        for name in names:
            if type(name) is not str or UNPRINTABLE & {unicodedata.category(character) for character in name}:
                raise InputError(f"the class name {reprlib.repr(name)} is not one line of printable text")
        if not all(type(i) is int and -(2**63) <= i < 2**63 for i in ids) or len(set(ids)) < classes:
            raise InputError("the category ids are not different whole numbers of 64 bits")
        if type(self.epoch) is not int or self.epoch < 0:
            raise InputError(f"epoch must be a whole number from 0, not {reprlib.repr(self.epoch)}")
        if not _is_plain([self.train_config, self.metrics]):
            raise InputError("train_config and metrics must consist of plain types")

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self.detector.config.image_size

    @property
    def min_score(self) -> float:
        """The operating point: the score with the best F1 on the validation images of its training, or the default."""
        score = self.metrics.get("operating_point")
        return score if type(score) is float and 0 <= score <= 1 else DEFAULT_MIN_SCORE

    def conditions(self) -> dict:
        """How the detector was trained and what it is, for records of evaluations and descriptions of exports."""
        config = self.detector.config
        return self.train_config | {
            "epoch": self.epoch,
            "validation_metrics": self.metrics,
            "image_size": self.image_size,
            "blocks": list(config.blocks),
            "head": config.head,
        }


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (str, int, float, bool, type(None))


def save_detector(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a `.pth` from which `load_checkpoint` rebuilds the detector; an existing file stays until it is complete.

    Raises:
        InputError: the file can't be written.
    """
    with atomic_write(path) as file:
        torch.save(_description(checkpoint) | {"model": _weights(checkpoint)}, file)


def save_folder(folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json and model.safetensors, from which `load_checkpoint` rebuilds the detector.

    Raises:
        InputError: a file can't be written.
    """
    with atomic_write(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(_weights(checkpoint), metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG, "w") as file:
        json.dump({"library_name": LIBRARY} | _description(checkpoint), file, indent=2)


def _description(checkpoint: Checkpoint) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "model_config": asdict(checkpoint.detector.config),
        "class_names": list(checkpoint.class_names),
        "category_ids": list(checkpoint.category_ids),
        "train_config": checkpoint.train_config,
        "metrics": checkpoint.metrics,
        "epoch": checkpoint.epoch,
    }


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
    return isinstance(content, dict) and content.get("library_name") == LIBRARY


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_detector` or `save_folder` wrote, onto the CPU, in evaluation mode.

    Args:
        path: a file, a folder, or `hub:user/name`, for which alone a network is needed, and that only once.

    Raises:
        InputError: the file is missing, damaged, no checkpoint of this project, or its weights do not fit its settings.
    """
    try:
        place = Path(located(str(path)))
        return _rebuild(_read_folder(place) if place.is_dir() else _read(place))
    except (InputError, RuntimeError) as error:  # RuntimeError: tensors without data, a list that contains itself
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _read_folder(folder: Path) -> Any:
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except OSError as error:
        raise InputError(
            f"no detector's folder, which has {CONFIG} and {WEIGHTS}: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError("the folder is damaged or not a detector's") from error
    if not isinstance(content, dict) or content.pop("library_name", None) != LIBRARY:
        raise InputError(f"not a detector's folder, whose {CONFIG} has the library_name {LIBRARY}")
    config = content.get("model_config")
    if isinstance(config, dict) and isinstance(config.get("blocks"), list):
        config["blocks"] = tuple(config["blocks"])  # JSON has no tuples
    return content | {"model": weights}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError("no such checkpoint; train one with finetune_dino2_simple.py, or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch verifies no checksums, and reads no data from a part that one flipped bit marks as a folder
            if archive.testzip() or any(part.external_attr & FOLDER for part in archive.infolist()):
                raise zipfile.BadZipFile
        with warnings.catch_warnings(action="ignore"):  # of TorchScript, which raises as well
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError("no permission to read it") from error
    except Exception as error:  # zipfile and torch document few of the errors that damaged and foreign files raise
        raise InputError("the file is damaged or not a detector's checkpoint") from error


def _rebuild(content: Any) -> Checkpoint:
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise InputError("not a detector's checkpoint, which has a format_version")
    if version not in (1, FORMAT_VERSION):
        raise InputError(f"its format_version is {version}, this program reads 1 and {FORMAT_VERSION}")
    for key, kind in CONTENT.items():
        if type(content.get(key)) is not kind:
            raise InputError(f"{key} must be of the type {kind.__name__}")
    try:
        with torch.device("meta"):  # shapes without data: the weights of the file are assigned, not copied
            detector = build_detector(DetectorConfig(**content["model_config"]))
    except TypeError as error:  # unknown or missing keys, a number beyond torch's integers
        raise InputError(f"its model_config describes no detector: {str(error).splitlines()[0]}") from error
    weights = content["model"] if version == FORMAT_VERSION else _renamed(content["model"])
    _check_weights(weights, detector.state_dict())
    detector.load_state_dict(weights, assign=True)
    names, ids = tuple(content["class_names"]), tuple(content["category_ids"])
    return Checkpoint(detector.eval(), names, ids, content["train_config"], content["metrics"], content["epoch"])


def _renamed(weights: dict) -> dict:
    """The weights of format version 1, where the dense head and the second look stood beside each other."""
    names = {name: re.sub(r"^head\.", "head.dense.", str(name)) for name in weights}
    return {re.sub(r"^second_look\.", "head.second_look.", names[name]): weight for name, weight in weights.items()}


def _check_weights(weights: dict, expected: dict[str, Tensor]) -> None:
    """Raises InputError unless the weights have the names, shapes and dtypes of `expected`, and finite values."""
    misfit = "its weights do not fit its settings"
    for name, like in expected.items():
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or (weight.shape, weight.dtype) != (like.shape, like.dtype):
            raise InputError(f"{misfit}: {name} must be a tensor of shape {tuple(like.shape)} and type {like.dtype}")
        if not weight.isfinite().all():
            raise InputError(f"its weight {name} contains inf or NaN")
    if unknown := weights.keys() - expected.keys():
        raise InputError(f"{misfit}: this detector has no {min(map(repr, unknown))}")
