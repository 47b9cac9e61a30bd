"""Fine-tune DINOv2 with deeper heads in two stages: the improved detector.

Stage 1 trains the head on features of a frozen backbone, which are cached on disk: each image, and its mirror image,
passes the backbone once. Stage 2 trains both end to end on crops with scale and colour jitter, at low learning rates
that decrease from block to block and fall twice; it keeps the mean of the weights of both ends, and a fifth of before.

  python improved_dino_detector.py                             5,000 images of COCO -> improved_dino2_detector.pth
  python improved_dino_detector.py --train-images 0            all of COCO
  python improved_dino_detector.py --stop-after frozen         stage 1 alone
  python improved_dino_detector.py --epochs-frozen 0 --start-from runs/improved/frozen.pth --run-dir runs/unfrozen
                                                                   stage 2 alone
  python improved_dino_detector.py --folds 5 --stop-after frozen   few labels: numbers and doubts from all of them
  python improved_dino_detector.py --head multi-layer --second-look 0 --assignment center --scores focal \\
      --boxes smooth-l1 --ema 0 --lr-unfrozen 1e-5 --head-lr-factor 1 --epochs-unfrozen 5 --cycles 1
                                                                   the original study's recipe

Writes OUTPUT, and in RUN_DIR frozen.pth (stage 1's end), last.pth, settings.json and log.jsonl.
"""

import copy
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from common import cli
from common.cli import flag, flag_name, with_default
from common.console import InputError, first_few
from common.data.checks import check_object_sizes
from common.data.dataset import DetectionDataset, make_train_loader
from common.data.hold_out import assign_folds
from common.data.memory import DetectionData
from common.data.sources import TrainDataFlags
from common.data.transforms import AugmentationFlags, TrainTransform
from common.evaluate.detections import detection_table, label_map
from common.model.backbone import BackboneFlags
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import HEADS, Detector, DetectorFlags, check_side, new_detector, replace_classes
from common.model.losses import DetectionLoss, LossConfig
from common.runtime import make_accelerator, precision_name
from common.show.report import write_report
from common.train.calibration import split_calibration
from common.train.feature_cache import CachedDataset, cached_features, feature_gigabytes
from common.train.folds import write_folds
from common.train.optim import Ema, Schedule, parameter_groups
from common.train.run import Run, RunFlags, fetch_inputs
from common.types import Detections

WEIGHT_DECAY = 0.05
LAYER_DECAY = 0.8  # rate of each block in stage 2, in multiples of the following one's (BEiT, arXiv 2106.08254)
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it
START_SHARE = 0.2  # of stage 2, unless --ema 0 takes the last weights
NO_WORKERS = 0  # reading a memory map is faster than receiving it from another process
HEAD_EPOCHS, HEAD_STEPS = 10, 200  # of stage 1, at least: 40 images have 5 steps an epoch
STAGES = ("frozen", "unfrozen")
OF_THE_DETECTOR = ("head", "dropout", "second_look", "blocks", "image_size", "backbone")  # fixed by --start-from


@dataclass(frozen=True)
class Settings(RunFlags, LossConfig, AugmentationFlags, BackboneFlags, DetectorFlags, TrainDataFlags):
    train_images: int = with_default(TrainDataFlags, "train_images", 5000)
    batch_size: int = with_default(RunFlags, "batch_size", 8)
    head: str = flag("pyramid", "the head; see common/model/heads.py", choices=tuple(HEADS), fixed=True)
    dropout: float = flag(
        0.1, "share of the head's hidden units dropped, thrice in the second look", at_least=0, at_most=1, fixed=True
    )
    second_look: int = flag(100, "boxes an image whose features are looked at again; 0 = none", at_least=0, fixed=True)
    epochs_frozen: int = flag(
        -1, "passes over the images in stage 1; 0 = no stage 1; -1 = 10, or as many as make 200 steps", at_least=-1
    )
    epochs_unfrozen: int = flag(16, "passes in stage 2; 0 = no stage 2", at_least=0)
    cycles: int = flag(
        2, "times that the learning rates fall in stage 2; --ema averages the weights at their ends", at_least=1
    )
    lr_frozen: float = flag(1e-3, "learning rate of the head in stage 1", at_least=0)
    lr_unfrozen: float = flag(1e-4, "learning rate of the backbone's last block in stage 2", at_least=0)
    head_lr_factor: float = flag(5.0, "learning rate of the head in stage 2, in multiples of --lr-unfrozen", at_least=0)
    unfreeze_blocks: int = flag(0, "stage 2 trains the last N blocks of the backbone; 0 = all", at_least=0, fixed=True)
    feature_cache: float = flag(
        100.0, "GB of cached features; above it stage 1 runs the backbone at every step, on crops", at_least=0
    )
    crop_size: int = flag(336, "side of the crops, pixels, at most that of the input", at_least=1)
    scales: tuple[float, ...] = with_default(AugmentationFlags, "scales", (0.5, 2.0))
    folds: int = flag(
        0,
        "N = first train N heads, each on all images but an Nth, to write what they say about all labels",
        at_least=0,
        fixed=True,
    )
    calibration: float = flag(
        0.05, "share of the images to calibrate class scores on; no stage is trained on them", at_least=0, at_most=0.5
    )
    stop_after: str = flag("", "frozen = end with stage 1", choices=STAGES[:1])
    start_from: str = flag(
        "", "checkpoint to start from, also with other classes; its head, blocks and size are kept", fixed=True
    )
    ema: float = flag(
        0.125, "share of a cycle that the moving average of the weights reaches back; 0 = none", at_least=0, at_most=1
    )
    run_dir: str = with_default(RunFlags, "run_dir", "runs/improved")
    output: str = with_default(RunFlags, "output", "improved_dino2_detector.pth")

    def __post_init__(self) -> None:
        self.check_augmentation()
        if not self.stages:
            raise InputError("there is no stage to train: give --epochs-frozen or --epochs-unfrozen")
        if self.folds == 1 or (self.folds and not self.epochs_frozen):
            raise InputError("--folds needs at least 2, and --epochs-frozen")
        if self.lora and self.unfreeze_blocks:
            raise InputError("--lora trains changes of all blocks: give it without --unfreeze-blocks")
        given = [f.name for f in fields(self) if f.name in OF_THE_DETECTOR and getattr(self, f.name) != f.default]
        if self.start_from and given:
            raise InputError(f"--start-from keeps what the detector has: give it without {flag_name(given[0])}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are requested."""
        epochs = {"frozen": self.epochs_frozen, "unfrozen": self.epochs_unfrozen}
        return tuple(name for name in STAGES if epochs[name] and self.stop_after in ("", name))

    def head_epochs(self, images: int) -> int:
        """The passes over so many images in stage 1."""
        fewest = max(HEAD_EPOCHS, math.ceil(HEAD_STEPS * self.batch_size * self.accumulate / images))
        return fewest if self.epochs_frozen < 0 else self.epochs_frozen

    @property
    def fold_stages(self) -> tuple[str, ...]:
        """The stages of the folds, which come first."""
        return tuple(f"fold_{number}" for number in range(1, self.folds + 1))


def train_one_epoch(
    model: nn.Module,
    criterion: DetectionLoss,
    loader: DataLoaderShard,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    average: Ema,
    epoch: int,
    run: Run,
) -> None:
    """One pass over the training images, or their features."""
    model.train()
    for step, batches in enumerate(run.steps(loader)):
        cycle = schedule.set_rates(epoch, step)
        counts = run.mean([batch.targets.counts() for batch in batches])
        for batch in batches:
            with run.exchange(model, now=batch is batches[-1]):
                losses = criterion(model(batch.inputs, batch.targets), batch.targets, counts)
                run.backward(losses)
        norm = run.accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        run.check_finite(norm, step, batches)
        optimizer.step()
        optimizer.zero_grad()
        average.update(cycle)


class Stage(NamedTuple):
    """What is trained in a stage, on what, and how."""

    name: str
    epochs: int
    cycles: int  # of the learning rates
    model: nn.Module  # called on the batches
    trained: nn.Module  # of the model: all that is averaged, and saved to be resumed
    groups: list[dict]  # of its weights, with their learning rates
    loader: DataLoader
    start_share: float = 0.0  # of the weights before the stage in those that it ends with


def head_stage(
    detector: Detector, data: DetectionData, settings: Settings, accelerator: Accelerator, chosen: np.ndarray
) -> Stage:
    """Stage 1: the head alone, on features that each of the chosen images, and its mirror image, gives once."""
    detector.to(accelerator.device).backbone.requires_grad_(False)
    groups = parameter_groups(detector, settings.lr_frozen, 0.0, WEIGHT_DECAY)
    epochs = settings.head_epochs(len(chosen))
    views = 1 if settings.no_mirror else 2
    if (size := feature_gigabytes(detector, data, views)) > settings.feature_cache:
        accelerator.print(f"a feature cache would take {size:.2g} GB: stage 1 runs without it, on crops")
        loader = crop_loader(detector, data.select(chosen), settings, accelerator)
        return Stage("frozen", epochs, 1, detector, detector.head, groups, loader)
    options = {"batch_size": settings.batch_size, "workers": settings.workers, "accelerator": accelerator}
    features = cached_features(detector, data, views=views, **options)
    part = data.select(chosen), [features[index] for index in chosen]
    samples = CachedDataset(*part, detector.input_size, mirror=views > 1, seed=settings.seed)
    loader = make_train_loader(samples, settings.batch_size, NO_WORKERS, accelerator.num_processes)
    return Stage("frozen", epochs, 1, detector.head, detector.head, groups, loader)


def detector_stage(detector: Detector, data: DetectionData, settings: Settings, accelerator: Accelerator) -> Stage:
    """Stage 2: backbone and head on crops, each block slower than the one behind it."""
    detector.backbone.set_trainable(settings, settings.unfreeze_blocks)
    rates = settings.lr_unfrozen * settings.head_lr_factor, settings.lr_unfrozen
    groups = parameter_groups(detector, *rates, WEIGHT_DECAY, LAYER_DECAY)
    loader = crop_loader(detector, data, settings, accelerator)
    share = START_SHARE * (settings.ema > 0)
    return Stage("unfrozen", settings.epochs_unfrozen, settings.cycles, detector, detector, groups, loader, share)


def crop_loader(detector: Detector, data: DetectionData, settings: Settings, accelerator: Accelerator) -> DataLoader:
    """Batches of crops."""
    transform = TrainTransform(detector.config.image_size, settings.crop_size, settings)
    samples = DetectionDataset(data, transform, settings.seed)
    return make_train_loader(samples, settings.batch_size, settings.workers, accelerator.num_processes)


def train_stage(
    stage: Stage, start: Checkpoint, train_data: DetectionData, val_data: DetectionData, settings: Settings, run: Run
) -> None:
    """Train a stage from the detector of `start`; the checkpoints of its epochs are in the run's folder."""
    accelerator = run.accelerator
    criterion = DetectionLoss(settings, train_data.class_shares()).to(accelerator.device)
    optimizer = torch.optim.AdamW(stage.groups, fused=True)
    model, optimizer, loader = accelerator.prepare(stage.model, optimizer, stage.loader)
    schedule = Schedule(optimizer, stage.epochs, run.epoch_steps(loader), stage.cycles)
    average = Ema(stage.trained, settings.ema * schedule.steps / schedule.cycles, stage.start_share)
    parts = {"trained": stage.trained, "optimizer": optimizer, "average": average}
    accelerator.print(f"stage {stage.name}: {stage.epochs} epochs on {len(train_data)} images")
    for epoch in run.epochs(stage.name, stage.epochs, **parts):
        train_one_epoch(model, criterion, loader, optimizer, schedule, average, epoch, run)
        with average.applied():
            run.finish_epoch(start, val_data)
    accelerator.free_memory()


def train_folds(start: Checkpoint, data: DetectionData, val_data: DetectionData, settings: Settings, run: Run) -> None:
    """Train a head on all images but those of each fold, and write what they detect on these."""
    fold, found = assign_folds(data, settings.folds), list[Detections]()
    if not run.saved and run.accelerator.is_main_process:
        save_detector(run.path / "start.pth", start)  # from which a resumed run goes on with the next head
    for number, name in enumerate(settings.fold_stages):
        kept, left_out = np.nonzero(fold != number)[0], np.nonzero(fold == number)[0]
        if not run.is_past(name):
            own = replace(start, detector=copy.deepcopy(start.detector))
            stage = head_stage(own.detector, data, settings, run.accelerator, kept)
            train_stage(stage._replace(name=name), own, data.select(kept), val_data, settings, run)
        found += run.detect(run.latest(name), data.select(left_out))
    table = detection_table(found, data)
    if run.accelerator.is_main_process:
        results, doubts = write_folds(run.path, table, data, settings.data, settings.seed)
        write_report(run.path / "folds.html", results, data, {"folds": table}, doubts)
        run.operating_point = results.models[0].diagnosis.operating_point.score


def initial_checkpoint(settings: Settings, name: str, folder: Path, data: DetectionData) -> Checkpoint:
    """The pretrained backbone of that name in a folder, with an untrained head."""
    options = {"blocks": settings.blocks, "image_size": settings.image_size, "num_classes": len(data.class_names)}
    hidden = {"dropout": settings.dropout, "second_look": settings.second_look}
    detector = new_detector(folder, head=settings.head, **options, **hidden)
    return Checkpoint(detector, data.class_names, data.category_ids, {"backbone": name})


def continued_checkpoint(settings: Settings, data: DetectionData) -> Checkpoint:
    """The detector of `--start-from`; where the data have other classes, only class layers of equal names are kept."""
    start = load_checkpoint(settings.start_from)
    origin = {"backbone": start.train_config.get("backbone"), "started_from": settings.start_from}
    detector = start.detector
    if start.class_names != data.class_names:
        old_label = {new: old for old, new in enumerate(label_map(start.class_names, data)) if new >= 0}
        detector = replace_classes(detector, [old_label.get(label) for label in range(len(data.class_names))])
        new = [name for label, name in enumerate(data.class_names) if label not in old_label]
        kept = f"{len(old_label)} of {len(data.class_names)} classes; new: {first_few(new) if new else 'none'}"
        print(f"all but the class layers of {settings.start_from} are kept, and in them {kept}")
    return Checkpoint(detector, data.class_names, data.category_ids, origin)


def main(settings: Settings) -> dict:
    """Train the stages, and return the detector's numbers on the validation images."""
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision, settings.deterministic)
    settings = replace(settings, precision=precision_name(accelerator))  # auto depends on the machine
    with Run(settings, accelerator, (*settings.fold_stages, *STAGES)) as run:
        with accelerator.main_process_first():  # the others then read what it downloaded or generated
            names = () if run.saved or settings.start_from else settings.backbone
            backbone, train_data, val_data = fetch_inputs(settings, names)
        is_calibrated = settings.second_look > 0 and not settings.folds
        train_data, held_out = split_calibration(train_data, settings.calibration * is_calibrated)
        run.begin(train_data, val_data, (*settings.fold_stages, *settings.stages))
        if backbone:
            start = initial_checkpoint(settings, *backbone, train_data)
        else:
            stage = "start" if settings.folds else run.saved.get("stage", "")
            start = run.latest(stage) if run.saved else continued_checkpoint(settings, train_data)
        size, depth = start.detector.input_size, start.detector.backbone.depth
        settings = replace(settings, crop_size=min(settings.crop_size, size.side))
        check_side("crop size", settings.crop_size, size.patch)
        check_object_sizes(train_data, size)
        if settings.unfreeze_blocks > depth:
            raise InputError(f"--unfreeze-blocks: the detector uses only {depth} blocks of the backbone")
        start = run.describe(start, crop_size=settings.crop_size)
        if settings.folds:
            train_folds(start, train_data, val_data, settings, run)
        for name in (name for name in settings.stages if not run.is_past(name)):
            parts = start.detector, train_data, settings, accelerator
            stage = head_stage(*parts, np.arange(len(train_data))) if name == "frozen" else detector_stage(*parts)
            train_stage(stage, start, train_data, val_data, settings, run)
            start = replace(start, detector=run.latest(name).detector)
        return run.finish(val_data, held_out)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
