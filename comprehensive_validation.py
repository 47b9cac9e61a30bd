"""Judge detectors by one protocol: COCO's numbers, the study's columns, and what each model costs.

Every model sees the same pictures; its detections are made once, and all numbers come from them. A model that cannot
be evaluated keeps a record with its error, and the others are still evaluated.

  python comprehensive_validation.py                               the two detectors on 500 pictures of COCO
  python comprehensive_validation.py --models a.pth b.pth --data my_folder --val-images 0

Writes OUTPUT (JSON, the README explains every field), which plot_results.py turns into charts.
"""

from dataclasses import dataclass

from accelerate.utils import set_seed

from common import cli, postprocess
from common.checkpoint import load_detector
from common.cli import flag
from common.coco import CocoData
from common.errors import InputError
from common.files import check_writable
from common.inference import make_accelerator
from common.results import ValidationRecord, ValidationResults, format_table, write_results
from common.sources import DataSource, load_split
from common.validation import Runner, unique_names, validate_checkpoint


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = flag(("dino2_detector.pth", "improved_dino2_detector.pth"), "checkpoints to judge")
    data: str = flag("detection-datasets/coco", "COCO-format folder, hub data set id, or demo")
    val_json: str = flag("", "validation annotations, where the folder has no known layout")
    val_images_dir: str = flag("", "the folder of their pictures")
    val_images: int = flag(500, "validation pictures, the first of the file; 0 = all", at_least=0)
    flip: bool = flag(False, "look at each picture's mirror image too: more accurate, half as fast")
    batch_size: int = flag(16, "pictures at once", at_least=1)
    precision: str = flag("auto", "arithmetic; auto = the fastest here", choices=("auto", "fp32", "bf16", "fp16"))
    workers: int = flag(2, "processes that decode pictures", at_least=0)
    seed: int = flag(0, "of anything random; detection itself is not", at_least=0)
    output: str = flag("validation_results.json", "the results to write")


def validate_model(name: str, path: str, data: CocoData, runner: Runner) -> ValidationRecord:
    """The record of one model, with its error where it could not be evaluated."""
    try:
        record, _ = validate_checkpoint(name, path, load_detector(path), data, runner)
    except InputError as error:
        return ValidationRecord(name, path, error=str(error))
    return record


def describe_protocol() -> dict:
    """What was the same for every model."""
    return {
        "max_detections": postprocess.MAX_DETECTIONS,
        "min_score": postprocess.MIN_SCORE,
        "nms_iou": postprocess.NMS_IOU,
        "crowds": "ignored, as COCO does",
        "primary_object": "largest non-crowd box against the highest-scoring detection; class averages by support",
        "evaluator": "faster-coco-eval",
    }


def main(settings: Settings) -> ValidationResults:
    """Evaluate every model, print the table, write and return the results."""
    check_writable(settings.output)
    set_seed(settings.seed)
    runner = Runner(make_accelerator(settings.precision), settings.batch_size, settings.workers, settings.flip)
    source = DataSource(settings.data, val_json=settings.val_json, val_images_dir=settings.val_images_dir)
    data = load_split(source, "val", settings.val_images)
    names = unique_names(settings.models)
    records = tuple(validate_model(n, p, data, runner) for n, p in zip(names, settings.models, strict=True))
    if all(record.error for record in records):
        raise InputError("no model could be evaluated: " + "; ".join(str(record.error) for record in records))
    dataset = {
        "source": settings.val_json or settings.data,
        "split": "val",
        "pictures": len(data),
        "boxes": int((~data.crowd).sum()),
        "classes": len(data.class_names),
        "fingerprint": data.fingerprint(),
    }
    results = ValidationResults(describe_protocol(), dataset, records)
    write_results(settings.output, results)
    print(
        f"{len(data)} validation pictures of {dataset['source']}\n{format_table(records)}\nwritten to {settings.output}"
    )
    return results


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
