"""A detector with its post-processing as a graph: ONNX, and OpenVINO from it."""

import json
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from common.console import InputError
from common.files import atomic_write
from common.model.checkpoint import Checkpoint
from common.model.exported import FORMAT_VERSION, INPUT, METADATA, OUTPUTS
from common.model.postprocess import best_boxes, predictions

OPSET = 18
MAX_BATCH = 1024  # images at once; torch.export needs a limit


class WholeDetector(nn.Module):
    """Images (B, 3, S, S) RGB in 0..1 -> boxes (B, D, 4) xyxy input pixels, scores (B, D), labels (B, D) int64."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.detector = checkpoint.detector.float().eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = best_boxes(*predictions(self.detector(images)))
        return boxes.clamp(0, self.detector.config.image_size), scores, labels


def describe(checkpoint: Checkpoint) -> str:
    """The description of a detector that an exported file holds, JSON."""
    content = {
        "format_version": FORMAT_VERSION,
        "class_names": list(checkpoint.class_names),
        "category_ids": list(checkpoint.category_ids),
        "image_size": checkpoint.detector.config.image_size,
        "min_score": checkpoint.min_score,
        "precision": "fp32",
        "conditions": checkpoint.conditions(),
    }
    return json.dumps(content)


def write_onnx(checkpoint: Checkpoint, path: Path, description: str) -> None:
    """Write a detector as one ONNX file, computing in fp32, for any number of images at once.

    Raises:
        InputError: a package that the export needs is not installed, or the file cannot be written.
    """
    size = checkpoint.detector.config.image_size
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with warnings.catch_warnings(action="ignore"), torch.inference_mode():
            program = torch.onnx.export(
                WholeDetector(checkpoint),
                (torch.rand(2, 3, size, size),),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                verbose=False,
            )
    except ImportError as error:
        raise InputError(f"the export needs {error.name}: pip install {error.name}") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.optimize()
    program.model.metadata_props[METADATA] = description
    with atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())


def write_openvino(checkpoint: Checkpoint, path: Path, description: str) -> None:
    """Write a detector as OpenVINO's `path` (.xml) and the weights beside it (.bin), in fp32, for any number of images.

    Raises:
        InputError: a package that the export needs is not installed, or the files cannot be written.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError("the export needs openvino: pip install openvino") from error
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, path.name)
        write_onnx(checkpoint, made.with_suffix(".onnx"), description)
        model = openvino.convert_model(made.with_suffix(".onnx"))
        model.set_rt_info(description, [METADATA])
        openvino.save_model(model, made, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            with atomic_write(path.with_suffix(suffix)) as file:
                file.write(made.with_suffix(suffix).read_bytes())
