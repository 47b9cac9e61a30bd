"""Export a detector: a checkpoint -> a file that runs without this project, or a folder for the hub.

  python -m common.export improved_dino2_detector.pth                       -> improved_dino2_detector.onnx
  python -m common.export improved_dino2_detector.pth --format openvino     -> improved_dino2_detector_openvino_model/
  python -m common.export improved_dino2_detector.pth --format openvino --int8 --calibration my_images
                                                                       -> improved_dino2_detector_int8_openvino_model/
  python -m common.export improved_dino2_detector.pth --format hub          -> improved_dino2_detector_hub/

docs/deployment.md says what an exported graph takes and returns, and how the folder for the hub is published.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from common import cli
from common.cli import flag
from common.console import InputError, check_packages, last_line
from common.data.dataset import make_eval_loader
from common.data.sources import unlabelled_images
from common.export.graph import onnx_graph, quantize, write_graph
from common.export.runtime import FORMAT_VERSION, Description
from common.files import check_outputs
from common.hub import CONFIG, WEIGHTS
from common.images import find_images
from common.model import load_detector
from common.model.checkpoint import Checkpoint
from common.model.trained import load_on_device
from common.types import InputSize

ENDS = {"onnx": ".onnx", "openvino": "_openvino_model", "hub": "_hub"}  # of the names that are written
PACKAGES = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino"), "hub": ()}
LARGEST_GRAPH = 2 * 10**9  # bytes of weights; with the rest of the graph ONNX can hold 2^31


@dataclass(frozen=True)
class Settings:
    checkpoint: str = flag("improved_dino2_detector.pth", "the detector to export", positional=True)
    format: str = flag("onnx", "onnx = one file; openvino and hub = a folder", choices=tuple(ENDS))
    output: str = flag("", "the file or folder to write; by default beside a .pth file, with its name")
    int8: bool = flag(False, "compute in 8 bits, see --calibration")
    calibration: str = flag("", "with --int8: a folder of images like those to come, which set the ranges")
    calibration_images: int = flag(100, "at most so many of them, spread over the folder", at_least=1)


def check_flags(settings: Settings) -> None:
    """Raises InputError for flags that do not belong together, and for packages that are missing."""
    if settings.int8 != bool(settings.calibration):
        raise InputError("--int8 and --calibration go together: name a folder of images like those to come")
    if settings.int8 and settings.format == "hub":
        raise InputError("--int8 is for --format onnx and openvino")
    check_packages("the export", *PACKAGES[settings.format], *["nncf"] * settings.int8)


def output_of(settings: Settings) -> Path:
    """The file or folder to write. Raises InputError where it has no name: a folder or a name of the hub gives none."""
    given, end = Path(settings.output or settings.checkpoint), ENDS[settings.format]
    if not given.name.strip(".") or not (settings.output or given.suffix.lower() == ".pth"):
        raise InputError(f"{given} gives the export no name, as a .pth file does: give its name with --output")
    name = str(given).removesuffix(".xml") if settings.output else f"{given.with_suffix('')}{'_int8' * settings.int8}"
    return Path(name if name.lower().endswith(end) else name + end)


def calibration_loader(settings: Settings, size: InputSize) -> DataLoader:
    """Batches of one image each. Raises InputError where there are none."""
    images, _ = find_images(Path(settings.calibration))
    count = min(len(images), settings.calibration_images)
    chosen = [images[number * len(images) // count] for number in range(count)]
    data = unlabelled_images(chosen or [Path(settings.calibration)])
    return make_eval_loader(data, size, batch_size=1, workers=0)


def export_graph(checkpoint: Checkpoint, settings: Settings, file: Path) -> None:
    """Write an ONNX or OpenVINO detector. Raises InputError: too large for ONNX, no calibration images, a full disk."""
    weights = sum(weight.nbytes for weight in checkpoint.detector.parameters())
    if weights >= LARGEST_GRAPH:
        raise InputError(f"the weights have {weights / 1e9:.1f} GB, and ONNX takes 2: export a smaller backbone")
    size = checkpoint.detector.input_size
    loader = calibration_loader(settings, size) if settings.int8 else None
    used = {"calibration": settings.calibration, "calibration_images": len(loader)} if loader else {}
    precision, conditions = "int8" if loader else "fp32", checkpoint.conditions() | used
    names, ids = list(checkpoint.class_names), list(checkpoint.category_ids)
    description = Description(FORMAT_VERSION, names, ids, *size, checkpoint.min_score, precision, conditions)
    graph = onnx_graph(checkpoint.detector, json.dumps(asdict(description)))
    graph = quantize(graph, loader) if loader else graph
    try:
        write_graph(graph, file)
    except (OSError, RuntimeError) as error:  # OpenVINO has no other
        raise InputError(f"cannot write the graph, is the disk full? {last_line(error)}") from error


def main(settings: Settings) -> Path:
    """Write the exported detector, which replaces an earlier one once it has been loaded, and return its path."""
    check_flags(settings)
    output = output_of(settings)
    detector = load_on_device(settings.checkpoint, "cpu")
    xml = output / f"{output.name.removesuffix(ENDS['openvino'])}.xml"
    file = {"onnx": output, "openvino": xml, "hub": output / CONFIG}[settings.format]
    check_outputs([file, *[output / WEIGHTS] * (settings.format == "hub")], [settings.checkpoint])
    print(f"exporting {settings.checkpoint}, which takes about a minute")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch, file.name)
        if settings.format == "hub":
            detector.save_pretrained(scratch)
        else:
            export_graph(detector.checkpoint, settings, made)
        load_detector(scratch if settings.format == "hub" else made, "cpu")
        for part in sorted(made.parent.iterdir()):
            place = file.with_name(part.name)
            if part.name != "README.md" or not place.exists():  # a model card may have been edited
                part.replace(place)
    megabytes = sum(part.stat().st_size for part in (output.iterdir() if output.is_dir() else [output])) / 1e6
    print(f"{output}: {megabytes:.0f} MB, {len(detector.class_names)} classes")
    return output


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
