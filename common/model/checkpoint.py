"""Detector checkpoints: tensors and plain types only, read with `weights_only=True` and never otherwise.

A checkpoint may come from anybody. Reading one runs nothing that is in it, takes memory in proportion to the file
whatever it claims, and ends in a detector or in one line: sums, settings, names and weights are checked on the way.
"""

import io
import pickletools
import re
import reprlib
import unicodedata
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from common.console import InputError
from common.files import atomic_write
from common.model.detector import Detector, DetectorConfig, build_detector

FORMAT_VERSION = 1
CONTENT = {
    "format_version": int,
    "model_config": dict,
    "class_names": list,
    "category_ids": list,
    "model": dict,
    "train_config": dict,
    "metrics": dict,
    "epoch": int,
}
PARTS = re.compile(r"[^/]+/(data\.pkl|data/\d+|byteorder|version)")  # of the archive, as far as torch needs them
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}  # what a tensor is made of
MAX_INSTRUCTIONS = 2_000_000  # of its pickle, each worth up to 200 bytes
MAX_TUPLES = 40_000  # four times as many within each other crash Python, where they are a key
MAX_PLAIN, MAX_DEPTH = 600_000, 8  # items and characters in all that is not a tensor; containers within each other
MAX_NAME = 1000  # characters
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's control characters, halves of characters, line and paragraph ends


@dataclass(frozen=True)
class Checkpoint:
    """A detector and what is known of it; plain types, so that it can be stored.

    Raises:
        InputError: other than one name and one id for each class, those that can't be shown or stored, no plain types.
    """

    detector: Detector
    class_names: tuple[str, ...]  # of the labels 0..K-1
    category_ids: tuple[int, ...]  # of the data set that it was trained on
    train_config: dict = field(default_factory=dict)  # settings and conditions of its training
    metrics: dict = field(default_factory=dict)  # on the validation images of its training
    epoch: int = 0  # finished epochs

    def __post_init__(self) -> None:
        names, ids, classes = self.class_names, self.category_ids, self.detector.config.num_classes
        _check_plain([names, ids, self.train_config, self.metrics, self.epoch])
        if not len(names) == len(ids) == classes:
            raise InputError(f"{len(names)} class names and {len(ids)} category ids for {classes} classes")
        for name in names:
            if type(name) is not str or len(name) > MAX_NAME or UNSEEN & {unicodedata.category(c) for c in name}:
                raise InputError(f"the class name {reprlib.repr(name)} is not one line of text")
        if not all(type(i) is int and -(2**63) <= i < 2**63 for i in ids) or len(set(ids)) < classes:
            raise InputError("the category ids are not different whole numbers of 64 bits")
        if self.epoch < 0:
            raise InputError(f"{self.epoch} is no number of finished epochs")


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
        InputError: no such file, a damaged one, not a checkpoint of this project, or weights that do not fit its
            settings.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}; train one with finetune_dino2_simple.py, or name another")
    try:
        return _rebuilt(read_content(Path(path)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_content(path: Path) -> object:
    """What a file of tensors and plain types holds; the tensors are on the CPU, and float32.

    torch does not look at the sums that guard an archive's parts. And its reader of archives is not Python's: a file
    can be made to hold other parts for the one than for the other. So it gets a new archive, of the parts seen here.

    Raises:
        InputError: the file is damaged, of another program, or holds anything else; without its path.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise InputError("its parts claim to be larger than the file; not read")
            for name in filter(PARTS.fullmatch, dict.fromkeys(archive.namelist())):
                part = archive.read(name)
                if name.endswith("/data.pkl"):
                    _check_instructions(part)
                checked.writestr(name, part)
        copy.seek(0)
        return torch.load(copy, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError as error:
        raise InputError("no permission to read it") from error
    except Exception as error:  # a foreign file fails in as many ways as there are files
        raise InputError("no checkpoint of plain tensors; it is damaged or of another program") from error


def _check_instructions(pickled: bytes) -> None:
    """torch runs nothing foreign, but what it does run can take any amount of memory: only a tensor's parts pass."""
    tuples = 0
    for number, (instruction, argument, _) in enumerate(pickletools.genops(pickled)):
        if instruction.proto > 2 or (instruction.name == "GLOBAL" and argument not in NAMED):
            what = f"{instruction.name} {argument!r:.80}"
            raise InputError(f"it holds {what}, which no checkpoint of a detector does; not read")
        tuples += instruction.name.startswith("TUPLE")
        if number >= MAX_INSTRUCTIONS or tuples > MAX_TUPLES:
            raise InputError("it holds more than a detector's weights and settings; not read")


def _rebuilt(content: object) -> Checkpoint:
    """The checkpoint of this content; nothing is allocated for its detector, which takes the tensors as they are."""
    if not isinstance(content, dict) or not content.keys() >= CONTENT.keys():
        raise InputError(f"a checkpoint of another kind: a detector's has the keys {', '.join(sorted(CONTENT))}")
    for key, kind in CONTENT.items():
        if type(content[key]) is not kind:
            raise InputError(f"{key} must be of the type {kind.__name__}")
    if content["format_version"] != FORMAT_VERSION:
        raise InputError(f"its format is {content['format_version']}, this version reads {FORMAT_VERSION}")
    _check_plain(content["model_config"])
    try:
        config = DetectorConfig(**content["model_config"])
    except TypeError as error:
        known = ", ".join(part.name for part in fields(DetectorConfig))
        raise InputError(f"model_config must have the keys {known}") from error
    with torch.device("meta"):  # shapes without memory
        detector = build_detector(config)
    _check_weights(content["model"], detector.state_dict())
    detector.load_state_dict(content["model"], assign=True)
    names, ids = tuple(content["class_names"]), tuple(content["category_ids"])
    return Checkpoint(detector.eval(), names, ids, content["train_config"], content["metrics"], content["epoch"])


def _check_plain(value: object) -> None:
    """Raises InputError for what is no plain type, or has no end when it is written: a list may hold itself."""
    waiting, size = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        size += 1 + (len(value) if isinstance(value, str | list | tuple | dict) else 0)
        if size > MAX_PLAIN or depth > MAX_DEPTH:
            raise InputError("names and settings are more, or deeper within each other, than any detector's")
        if type(value) in (list, tuple):
            waiting += [(item, depth + 1) for item in value]
        elif type(value) is dict and all(type(key) is str for key in value):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif type(value) not in (str, int, float, bool, type(None)):
            raise InputError(f"names and settings must be plain types; a {type(value).__name__} is among them")


def _check_weights(weights: dict, expected: dict[str, Tensor]) -> None:
    """Raises InputError unless the weights have the `expected` shapes, finite numbers, and each a memory of its own."""
    if weights.keys() != expected.keys():
        lacking = [f"{name} is missing" for name in expected if name not in weights]
        raise InputError(f"its weights do not fit its settings: {[*lacking, 'there are too many'][0]}")
    for name, like in expected.items():
        weight = weights[name]
        if not isinstance(weight, Tensor) or weight.shape != like.shape:
            raise InputError(f"its weights do not fit its settings: {name} must have the shape {tuple(like.shape)}")
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != weight.nbytes:
            raise InputError(f"its weight {name} does not hold as many numbers as it claims")
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise InputError(f"its weight {name} holds numbers that are infinite or none")
    if len({weight.data_ptr() for weight in weights.values()}) < len(weights):
        raise InputError("some of its weights are one and the same")
