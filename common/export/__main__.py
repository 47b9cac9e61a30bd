"""Export a detector: a checkpoint -> a file that runs without this project.

  python -m common.export improved_dino2_detector.pth                       -> improved_dino2_detector.onnx
  python -m common.export improved_dino2_detector.pth --format openvino     -> improved_dino2_detector_openvino_model/

Input: `images` (B, 3, S, S) float32 RGB in 0..1, letterboxed, any B. Outputs: `boxes` (B, D, 4) xyxy pixels of the
input, `scores` (B, D) and `labels` (B, D), at most 100 an image, by falling score, after NMS; a score of 0 says that an
image has fewer. Class names, input size and conditions of the training are in the file's metadata.
"""

from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import flag
from common.export.graph import describe, write_onnx, write_openvino
from common.files import check_outputs, check_writable
from common.model import load_detector
from common.model.checkpoint import load_checkpoint
from common.model.exported import OPENVINO_FOLDER, openvino_file

FORMATS = ("onnx", "openvino")


@dataclass(frozen=True)
class Settings:
    checkpoint: str = flag("improved_dino2_detector.pth", "the detector to export", positional=True)
    format: str = flag("onnx", "onnx = one file; openvino = a folder", choices=FORMATS)
    output: str = flag("", "the .onnx file or the folder ..._openvino_model to write; by default beside the checkpoint")


def output_of(settings: Settings) -> Path:
    """The file or folder to write, with the end of its name by which `load_detector` knows it."""
    end = ".onnx" if settings.format == "onnx" else OPENVINO_FOLDER
    name = settings.output.rstrip("/") or str(Path(settings.checkpoint).with_suffix(""))
    return Path(name.removesuffix(end) + end)


def main(settings: Settings) -> Path:
    """Write the exported detector, check that it loads, and return its path."""
    checkpoint, output = load_checkpoint(settings.checkpoint), output_of(settings)
    file = output if settings.format == "onnx" else openvino_file(output)
    check_writable(file)
    check_outputs([file], [settings.checkpoint])
    write = write_onnx if settings.format == "onnx" else write_openvino
    write(checkpoint, file, describe(checkpoint))
    load_detector(output)
    megabytes = sum(part.stat().st_size for part in ([file] if settings.format == "onnx" else output.iterdir())) / 1e6
    print(f"{output}: {megabytes:.0f} MB, {len(checkpoint.class_names)} classes")
    return output


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
