"""Detectors that `python -m common.export` wrote, run by ONNX Runtime or OpenVINO on the CPU."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import InputError, last_line
from common.model.trained import TrainedDetector

METADATA = "dinov2-detection"  # the key of the description in a file's metadata
FORMAT_VERSION = 1
INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
OPENVINO_FOLDER = "_openvino_model"  # end of the folder's name, as ultralytics has it
FIELDS = {
    "class_names": list,
    "category_ids": list,
    "image_size": int,
    "min_score": float,
    "precision": str,
    "conditions": dict,
}


@dataclass(frozen=True)
class ExportedDetector(TrainedDetector):
    """A detector that its runtime executes, described by the metadata of its file."""

    training: dict  # how it was trained
    runtime: str  # ONNX Runtime or OpenVINO
    session: Any  # of the runtime: a function from an array to three arrays

    @property
    def parameters(self) -> None:
        return None

    def conditions(self) -> dict:
        return self.training | {"runtime": self.runtime}

    def run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = (torch.from_numpy(array) for array in self.session((images.float() / 255).numpy()))
        return boxes, scores, labels.long()


def openvino_file(folder: Path) -> Path:
    """The model in a folder for OpenVINO."""
    return folder / f"{folder.name.removesuffix(OPENVINO_FOLDER)}.xml"


def is_exported(path: str | Path) -> bool:
    """Is this a detector of this project in another format, by its name and its metadata?"""
    path = Path(path)
    is_onnx = path.suffix.lower() == ".onnx"
    if not is_onnx and not path.name.endswith(OPENVINO_FOLDER):
        return False
    file = path if is_onnx else openvino_file(path)
    return file.is_file() and METADATA.encode() in file.read_bytes()


def load_exported(path: str | Path) -> ExportedDetector:
    """Read an exported detector.

    Raises:
        InputError: a missing package, a damaged file, one of another version, or without a complete description.
    """
    path = Path(path)
    read, runtime = (_read_onnx, "ONNX Runtime") if path.suffix.lower() == ".onnx" else (_read_openvino, "OpenVINO")
    try:
        text, session = read(path)
    except ImportError as error:
        raise InputError(f"{path} needs {runtime}: pip install {error.name}") from error
    except Exception as error:  # neither runtime documents what it raises at damaged files
        raise InputError(f"{runtime} cannot read {path}: {last_line(error):.300}") from error
    return ExportedDetector(**_description(path, text), device=torch.device("cpu"), runtime=runtime, session=session)


def _description(path: Path, text: str) -> dict:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} has no readable description of a detector") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version}, this program reads {FORMAT_VERSION}")
    for name, kind in FIELDS.items():
        if type(content.get(name)) is not kind:
            raise InputError(f"{path}: {name} of its description must be of the type {kind.__name__}")
    if len(content["class_names"]) != len(content["category_ids"]):
        raise InputError(f"{path}: its description has not as many category ids as class names")
    fields = {name: content[name] for name in FIELDS}
    fields["training"] = fields.pop("conditions")
    return fields | {name: tuple(content[name]) for name in ("class_names", "category_ids")}


def _read_onnx(path: Path) -> tuple[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "")
    return text, lambda images: session.run(OUTPUTS, {INPUT: images})


@functools.cache
def _openvino_core() -> Any:
    """One for the whole process.

    Each loads OpenVINO's CPU plugin, which replaces the stack that signal handlers run on and puts the one before it
    back at its end: of two that end in the order in which they began, the second puts back freed memory, and the next
    Ctrl-C ends in a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _read_openvino(path: Path) -> tuple[str, Any]:
    core = _openvino_core()
    model = core.read_model(openvino_file(path))
    text = model.get_rt_info([METADATA]).astype(str)
    # By default OpenVINO computes in 16 bits where the CPU can, which changes scores in the second digit.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", options)

    def run(images):
        outputs = compiled(images)
        return [outputs[name] for name in OUTPUTS]

    return text, run
