"""Detectors that `python -m common.export` wrote, run by ONNX Runtime or OpenVINO on the CPU."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.console import InputError, check_packages, last_line
from common.evaluate.results import from_json
from common.files import PROGRAM
from common.model.trained import TrainedDetector
from common.types import InputSize

FORMAT_VERSION = 2
INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
Session = Callable[[np.ndarray], list[np.ndarray]]  # images (B, 3, H, W) float32 in 0..1 -> the three outputs


@dataclass(frozen=True)
class Description:
    """What an exported file says of its detector: JSON under the key PROGRAM of its metadata."""

    format_version: int
    class_names: list[str]
    category_ids: list[int]
    image_size: int  # longer side of the input, pixels
    patch_size: int  # of which both sides are multiples
    min_score: float
    precision: str
    conditions: dict  # how it was trained


@dataclass(frozen=True)
class ExportedDetector(TrainedDetector):
    """A detector that its runtime executes. It may be used by several threads at once, and pickled as its path."""

    file: Path
    about: dict  # how it was trained, and what runs it
    session: Session

    @property
    def parameters(self) -> None:
        return None

    def __reduce__(self) -> tuple:
        return load_exported, (self.file,)

    def conditions(self) -> dict:
        return self.about

    def run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = map(torch.from_numpy, self.session((images.float() / 255).numpy()))
        return boxes, scores, labels.long()


def exported_file(path: str | Path) -> Path | None:
    """The .onnx or .xml of a detector of this project, given it or its folder, or None. InputError: there are two."""
    files = sorted(Path(path).glob("*.xml")) if Path(path).is_dir() else [Path(path)]
    files = [file for file in files if file.suffix.lower() in RUNTIMES and file.is_file()]
    ours = [file for file in files if PROGRAM.encode() in file.read_bytes()]
    if len(ours) > 1:
        raise InputError(f"{path} holds several detectors: name one of {', '.join(map(str, ours))}")
    return ours[0] if ours else None


def load_exported(file: Path) -> ExportedDetector:
    """Read an exported detector, a file as `exported_file` returns it.

    Raises InputError: a missing package, a damaged file, one of another version, or without a complete description.
    """
    read, runtime, package = RUNTIMES[file.suffix.lower()]
    check_packages(str(file), package)
    try:
        text, session = read(file)
        content = json.loads(text)
    except Exception as error:  # neither runtime documents what it raises at damaged files
        raise InputError(f"{runtime} cannot read {file}: {last_line(error):.300}") from error
    about = from_json(Description, content, f"{file}: its description")
    if about.format_version != FORMAT_VERSION or len(about.class_names) != len(about.category_ids):
        raise InputError(f"{file} is not of format_version {FORMAT_VERSION}: export its checkpoint again")
    names, ids = tuple(about.class_names), tuple(about.category_ids)
    size = InputSize(about.image_size, about.patch_size)
    shared = names, ids, size, about.min_score, torch.device("cpu"), about.precision
    return ExportedDetector(*shared, file, about.conditions | {"runtime": runtime}, session)


def _read_onnx(file: Path) -> tuple[str, Session]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(PROGRAM, "")
    return text, lambda images: session.run(OUTPUTS, {INPUT: images})


@functools.cache
def openvino_core() -> Any:
    """The one of this process: once two have ended in the order of their beginnings, Ctrl-C is a segmentation fault."""
    import openvino

    return openvino.Core()


def _read_openvino(file: Path) -> tuple[str, Session]:
    model = openvino_core().read_model(file)
    text = model.get_rt_info([PROGRAM]).astype(str)
    # By default OpenVINO computes in 16 bits where the CPU can, which changes scores in the second digit.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino_core().compile_model(model, "CPU", options)

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = compiled.create_infer_request().infer({INPUT: images})  # the model's own request is for one thread
        return [outputs[name] for name in OUTPUTS]

    return text, run


RUNTIMES = {".onnx": (_read_onnx, "ONNX Runtime", "onnxruntime"), ".xml": (_read_openvino, "OpenVINO", "openvino")}
