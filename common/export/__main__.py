"""Export a detector: a checkpoint -> a file that runs without this project, or a folder for the hub.

  python -m common.export improved_dino2_detector.pth                       -> improved_dino2_detector.onnx
  python -m common.export improved_dino2_detector.pth --format openvino     -> improved_dino2_detector_openvino_model/
  python -m common.export improved_dino2_detector.pth --format openvino --int8 --calibration my_folder
                                                                       -> improved_dino2_detector_int8_openvino_model/
  python -m common.export improved_dino2_detector.pth --format hub          -> improved_dino2_detector_hub/

ONNX and OpenVINO take `images` (B, 3, S, S) float32 RGB in 0..1, letterboxed, any B, and return `boxes` (B, D, 4) xyxy
pixels of the input, `scores` (B, D) and `labels` (B, D), at most 100 an image, by falling score, after NMS; a score of
0 says that an image has fewer. Class names, input size and conditions of the training are in the file's metadata.

The folder for the hub has weights, settings and a model card; `hf upload` publishes it, and `load_detector` reads it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common import cli
from common.cli import flag
from common.console import InputError, check_packages
from common.data.dataset import make_eval_loader
from common.data.sources import TrainDataFlags, load_split
from common.export.graph import onnx_graph, write_onnx, write_openvino
from common.export.hub import write_hub_folder
from common.export.int8 import quantised
from common.export.runtime import FORMAT_VERSION, OPENVINO_FOLDER, openvino_file
from common.files import check_outputs
from common.hub import CONFIG
from common.model import load_detector
from common.model.checkpoint import Checkpoint, load_checkpoint

ENDS = {"onnx": ".onnx", "openvino": OPENVINO_FOLDER, "hub": "_hub"}  # of the names that are written
PACKAGES = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino"), "hub": ()}


@dataclass(frozen=True)
class Settings:
    checkpoint: str = flag("improved_dino2_detector.pth", "the detector to export", positional=True)
    format: str = flag("onnx", "onnx = one file; openvino and hub = a folder", choices=tuple(ENDS))
    output: str = flag("", "the file or folder to write; by default beside the checkpoint, with its name")
    int8: bool = flag(False, "compute in 8 bits, see --calibration")
    calibration: str = flag("", "with --int8: the data whose training images set the ranges, as --data elsewhere")
    calibration_images: int = flag(100, "so many of them, the first; 0 = all", at_least=0)
    results: str = flag("", "with --format hub: a validation_results.json with this checkpoint, for the model card")


def output_of(settings: Settings) -> Path:
    """The file or folder to write, with the end of its name by which `load_detector` knows it."""
    end = ENDS[settings.format]
    default = Path(settings.checkpoint).with_suffix("").as_posix() + "_int8" * settings.int8
    return Path((settings.output.rstrip("/") or default).removesuffix(end) + end)


def check_flags(settings: Settings) -> None:
    """Raises InputError for flags that do not belong together."""
    if settings.int8 and settings.format == "hub":
        raise InputError("--int8 is for --format onnx and openvino")
    if settings.int8 != bool(settings.calibration):
        raise InputError("--int8 and --calibration go together: name a data set with images like those to come")
    if settings.results and settings.format != "hub":
        raise InputError("--results is for --format hub")


def calibration_images(settings: Settings, image_size: int) -> Iterator[Tensor]:
    """The images for `quantised`, (1, 3, S, S) each; raises InputError at once where there is no such data."""
    data = load_split(TrainDataFlags(settings.calibration, train_images=settings.calibration_images), "train")
    return (batch.inputs.float() / 255 for batch in make_eval_loader(data, image_size, batch_size=1, workers=0))


def describe(settings: Settings, checkpoint: Checkpoint) -> str:
    """The description of a detector that an exported file holds, JSON."""
    conditions = checkpoint.conditions()
    if settings.int8:
        conditions |= {"calibration": settings.calibration, "calibration_images": settings.calibration_images}
    content = {
        "format_version": FORMAT_VERSION,
        "class_names": list(checkpoint.class_names),
        "category_ids": list(checkpoint.category_ids),
        "image_size": checkpoint.image_size,
        "min_score": checkpoint.min_score,
        "precision": "int8" if settings.int8 else "fp32",
        "conditions": conditions,
    }
    return json.dumps(content)


def write_graph(settings: Settings, checkpoint: Checkpoint, file: Path) -> None:
    """Write an ONNX or OpenVINO detector."""
    images = calibration_images(settings, checkpoint.image_size) if settings.int8 else None
    graph = onnx_graph(checkpoint.detector, describe(settings, checkpoint))
    if images:
        graph = quantised(graph, images)
    write = write_onnx if settings.format == "onnx" else write_openvino
    write(graph, file)


def main(settings: Settings) -> Path:
    """Write the exported detector, check that it loads, and return its path."""
    check_flags(settings)
    check_packages("the export", *PACKAGES[settings.format], *["nncf"] * settings.int8)
    checkpoint, output = load_checkpoint(settings.checkpoint), output_of(settings)
    files = {"onnx": output, "openvino": openvino_file(output), "hub": output / CONFIG}
    file = files[settings.format]
    check_outputs([file], [settings.checkpoint, settings.results])
    if settings.format == "hub":
        write_hub_folder(checkpoint, output, settings.results)
    else:
        write_graph(settings, checkpoint, file)
    load_detector(output)
    written = output.iterdir() if output.is_dir() else [output]
    megabytes = sum(part.stat().st_size for part in written) / 1e6
    print(f"{output}: {megabytes:.0f} MB, {len(checkpoint.class_names)} classes")
    return output


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
