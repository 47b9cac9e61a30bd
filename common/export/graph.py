"""A detector with its post-processing as a graph: ONNX, in 8 bits on request, and OpenVINO from it."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image
from transformers import AttentionInterface
from transformers.models.dinov2.modeling_dinov2 import eager_attention_forward

from common.export.runtime import INPUT, OUTPUTS, openvino_core
from common.files import PROGRAM
from common.model.detector import Detector
from common.model.postprocess import fuse_predictions, select_detections

OPSET = 18
LARGEST_BATCH = 1024  # torch.export needs a limit
# transformers' attention as matrix products. Under its own name, as under all that the library knows, the graph adds a
# mask that masks nothing, which costs a seventh of its time.
ATTENTION = "unmasked"


class DetectorWithNms(nn.Module):
    """Images (B, 3, H, W) RGB in 0..1 -> boxes (B, D, 4) xyxy input pixels, scores (B, D), labels (B, D) int64."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector.float().eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scored = fuse_predictions(self.detector(images), self.detector.config.fusion)
        boxes, scores, labels = select_detections(*scored)
        return clip_boxes_to_image(boxes, images.shape[-2:]), scores, labels


def onnx_graph(detector: Detector, description: str) -> Any:
    """A detector as an ONNX `ModelProto` that computes in fp32, for any number of images of any sides.

    The description goes into its metadata. The detector keeps the attention of the graph.
    """
    side, patch = detector.input_size
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    rows, columns = (torch.export.Dim(name, min=1, max=side // patch) for name in ("rows", "columns"))
    AttentionInterface.register(ATTENTION, eager_attention_forward)
    detector.backbone.vit.set_attn_implementation(ATTENTION)
    with warnings.catch_warnings(action="ignore"), torch.inference_mode():
        program = torch.onnx.export(
            DetectorWithNms(detector),
            (torch.rand(2, 3, side, side),),
            dynamo=True,
            dynamic_shapes=({0: batch, 2: patch * rows, 3: patch * columns},),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # noqa: S101  (as torch declares it; with dynamo it never is)
    program.optimize()
    program.model.producer_name = PROGRAM  # at the start of the file: `check_outputs` knows it as ours
    program.model.metadata_props[PROGRAM] = description
    return program.model_proto


def quantize(graph: Any, loader: DataLoader) -> Any:
    """The graph with matrix products in 8 bits, by NNCF's scheme for transformers.

    That is SmoothQuant (arXiv 2211.10438) and a correction of the biases; the products and the softmax of attention
    stay in fp32. The ranges of the 8-bit numbers are those of the activations on the batches of `loader`.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function changes handlers that others have put there
    inputs = nncf.Dataset(loader, lambda batches: {INPUT: (batches[0].inputs.float() / 255).numpy()})  # of one image
    return nncf.quantize(graph, inputs, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(loader))


def write_graph(graph: Any, path: Path) -> None:
    """Write a graph as one ONNX file, or as OpenVINO's .xml and, beside it, the weights as .bin."""
    content = graph.SerializeToString()
    if path.suffix == ".onnx":
        path.write_bytes(content)
        return
    import openvino

    (description,) = [entry.value for entry in graph.metadata_props if entry.key == PROGRAM]
    model = openvino_core().read_model(content)
    model.set_friendly_name(PROGRAM)  # likewise
    model.set_rt_info(description, [PROGRAM])
    openvino.save_model(model, path, compress_to_fp16=False)
