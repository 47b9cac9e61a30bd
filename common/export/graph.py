"""A detector with its post-processing as a graph: ONNX, and OpenVINO from it."""

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from common.export.runtime import INPUT, METADATA, OUTPUTS
from common.files import atomic_write
from common.model.detector import Detector
from common.model.postprocess import fuse_predictions, select_detections

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
MAX_BATCH = 1024  # images at once; torch.export needs a limit
ATTENTION = "matrix-products"


class WholeDetector(nn.Module):
    """Images (B, 3, S, S) RGB in 0..1 -> boxes (B, D, 4) xyxy input pixels, scores (B, D), labels (B, D) int64."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector.float().eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.detector(images)
        boxes, scores, labels = select_detections(*fuse_predictions(out))
        return boxes.clamp(0, self.detector.config.image_size), scores, labels


def attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **unused
) -> tuple[Tensor, None]:
    """Attention as two matrix products, query, key and value (B, heads, N, c) -> (B, N, heads, c).

    The attention of transformers exports a mask that masks nothing, which costs a seventh of the graph's time.
    """
    weights = (query * scaling @ key.transpose(2, 3)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


def onnx_graph(detector: Detector, description: str) -> "ModelProto":
    """A detector as an ONNX graph that computes in fp32, for any number of images at once.

    Args:
        detector: its attention is left as that of the graph.
        description: for the graph's metadata.
    """
    size = detector.config.image_size
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    AttentionInterface.register(ATTENTION, attention)
    detector.backbone.vit.set_attn_implementation(ATTENTION)
    with warnings.catch_warnings(action="ignore"), torch.inference_mode():
        program = torch.onnx.export(
            WholeDetector(detector),
            (torch.rand(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.optimize()
    program.model.metadata_props[METADATA] = description
    return program.model_proto


def write_onnx(graph: "ModelProto", path: Path) -> None:
    """Write a graph as one ONNX file.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(graph.SerializeToString())


def write_openvino(graph: "ModelProto", path: Path) -> None:
    """Write a graph as OpenVINO's `path` (.xml) and the weights beside it (.bin).

    Raises:
        InputError: the files cannot be written.
    """
    import openvino

    (description,) = [entry.value for entry in graph.metadata_props if entry.key == METADATA]
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, path.name)
        write_onnx(graph, made.with_suffix(".onnx"))
        model = openvino.convert_model(made.with_suffix(".onnx"))
        model.set_rt_info(description, [METADATA])
        openvino.save_model(model, made, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            with atomic_write(path.with_suffix(suffix)) as file:
                file.write(made.with_suffix(suffix).read_bytes())
