"""The detector, and what teaches it. `load_detector` is the way in for Python programs."""

from pathlib import Path

import torch

from common.model.trained import TrainedDetector, load_on_device


def load_detector(
    path: str | Path, device: str | torch.device | None = None, precision: str = "auto"
) -> TrainedDetector:
    """Read a trained detector.

    Args:
        path: a `.pth` that a training script wrote, or what `python -m common.export` made of it: a `.onnx` file, a
            folder for OpenVINO or its `.xml`, or a folder for the hub. The checkpoint of an exported detector is not
            needed. `hub:user/name` fetches a folder, once; nothing else needs a network.
        device: of a checkpoint: "cpu", "cuda", "cuda:1", "mps", …; None = the GPU if there is one. Exported detectors
            run on the CPU.
        precision: of a checkpoint: fp32, bf16, fp16, or auto: the fastest of the device.

    Raises:
        InputError: the file is missing, damaged or no detector of this project, or there is no such device.
    """
    from common.export.runtime import exported_file, load_exported  # upward: what was exported is a detector as well

    file = exported_file(path)
    return load_exported(file) if file else load_on_device(path, device, precision)
