"""One checkpoint, one data set, one record: what both validation scripts share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

from common import metrics
from common.checkpoint import Checkpoint
from common.coco import CocoData
from common.errors import InputError
from common.inference import detect, eval_loader, measure_cost
from common.results import ValidationRecord
from common.types import Detections


@dataclass(frozen=True)
class Runner:
    """How detectors are run: where, how many pictures at once, decoded by how many processes, mirrored too?"""

    accelerator: Accelerator
    batch_size: int
    workers: int
    flip: bool = False  # look at the mirrored pictures too

    def detect(self, checkpoint: Checkpoint, data: CocoData, what: str) -> list[Detections]:
        """Detections on every picture of `data`, in its order, in the checkpoint's own labels."""
        loader = eval_loader(data, checkpoint.detector.config.image_size, self.batch_size, self.workers)
        model, loader = self.accelerator.prepare(checkpoint.detector, loader)
        return detect(model, loader, self.accelerator, what, self.flip)

    def cost(self, checkpoint: Checkpoint, data: CocoData) -> dict:
        """Parameters and speed, as `inference.Cost` names them, on the first pictures of `data`."""
        loader = eval_loader(data.first(self.batch_size), checkpoint.detector.config.image_size, self.batch_size, 0)
        model = self.accelerator.prepare(checkpoint.detector)
        batch = next(iter(loader)).to(self.accelerator.device)
        return asdict(measure_cost(model, batch, self.accelerator, self.flip))


def validate_checkpoint(
    name: str, path: str, checkpoint: Checkpoint, data: CocoData, runner: Runner
) -> tuple[ValidationRecord, list[Detections]]:
    """Everything that is measured of one checkpoint on `data`, and the detections behind it.

    Raises:
        InputError: the checkpoint and the data set have no class in common.
    """
    labels = metrics.label_map(checkpoint.class_names, data)
    known = int((labels >= 0).sum())
    if known == 0:
        raise InputError(
            f"{path}: none of its classes ({', '.join(checkpoint.class_names[:3])}, …) is in {data.source}"
        )
    found = runner.detect(checkpoint, data, name)
    numbers = metrics.evaluate(found, data, labels)
    config = checkpoint.detector.config
    conditions = checkpoint.train_config | {
        "epoch": checkpoint.epoch,
        "image_size": config.image_size,
        "blocks": list(config.blocks),
        "head": config.head,
        "flip": runner.flip,
        "classes_compared": known,
        "classes_in_data": len(data.class_names),
    }
    record = ValidationRecord(name, path, **numbers, cost=runner.cost(checkpoint, data), conditions=conditions)
    return record, found


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for each file: its stem, with as many folders before it as make it the only one."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["-".join(p[-depth:]).strip("./") for p in parts]
