"""8-bit weights and activations, calibrated on images."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from common.export.runtime import INPUT

if TYPE_CHECKING:
    from onnx import ModelProto


def quantised(graph: "ModelProto", images: Iterable[Tensor]) -> "ModelProto":
    """A graph whose matrix products compute in 8 bits, by NNCF's scheme for transformers.

    That is SmoothQuant (arXiv 2211.10438) and a correction of the biases; the products and the softmax of attention
    stay in fp32.

    Args:
        graph: as `onnx_graph` returns it.
        images: (1, 3, S, S) RGB in 0..1, whose activations set the ranges of the 8-bit numbers.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    inputs = [{INPUT: image.numpy()} for image in images]
    options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(inputs)}
    return nncf.quantize(graph, nncf.Dataset(inputs), **options)
