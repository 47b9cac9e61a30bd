"""Fine-tune DINOv2 with deeper heads in two stages: the improved detector.

Stage 1 trains the head on features of a frozen backbone, which are cached on disk: each image, and its mirror image,
passes the backbone once. Stage 2 trains both end to end, at a low learning rate that decreases from block to block, on
crops with scale and colour jitter. Its learning rates fall twice, and the mean of the weights at both ends is kept. The
best epoch by mAP@0.5 on the first 100 validation images becomes the checkpoint.

  python improved_dino_detector.py                             5,000 images of COCO -> improved_dino2_detector.pth
  python improved_dino_detector.py --train-images 0            all of COCO
  python improved_dino_detector.py --stop-after frozen         stage 1 alone
  python improved_dino_detector.py --epochs-frozen 0 --start-from runs/improved/frozen.pth      stage 2 alone
  python improved_dino_detector.py --head multi-layer --second-look 0 --assignment center --scores focal \\
      --boxes smooth-l1 --ema 0 --lr-unfrozen 1e-5 --head-lr-factor 1 --epochs-unfrozen 5 --cycles 1
                                                                   the original study's recipe

Writes OUTPUT, and in RUN_DIR frozen.pth (stage 1's best), best.pth, last.pth, settings.json and log.jsonl.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import cli
from common.cli import flag, with_default
from common.console import InputError, name_some, progress_bar
from common.data.checks import check_object_sizes
from common.data.dataset import (
    DetectionDataset,
    EpochOrder,
    SampleDataset,
    collate,
    make_eval_loader,
    make_train_loader,
)
from common.data.memory import DetectionData
from common.data.sources import TrainDataFlags, load_train_and_val
from common.data.transforms import AugmentationFlags, LetterboxTransform, MirrorTransform, TrainTransform
from common.evaluate.detect import validate
from common.evaluate.detections import label_map
from common.model.backbone import Backbone, BackboneFlags, fetch_backbone
from common.model.checkpoint import Checkpoint, load_checkpoint
from common.model.detector import HEADS, Detector, DetectorFlags, check_side, new_detector, with_classes
from common.model.losses import DetectionLoss, LossConfig
from common.model.second_look import JitteredBoxes
from common.runtime import make_accelerator, precision_name
from common.train.feature_cache import CachedDataset, cached_features, feature_gigabytes
from common.train.optim import Ema, cosine_schedule, cycle_ends, parameter_groups
from common.train.run_folder import RunFlags, RunFolder, publish_best, quick_validation, training_conditions
from common.train.state import TrainState, steps_an_epoch
from common.types import Batch, Detections

WEIGHT_DECAY = 0.05
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it
STAGES = ("frozen", "unfrozen")
AUGMENTATIONS = ("auto", "mirror", "crop")


@dataclass(frozen=True)
class Settings(RunFlags, LossConfig, AugmentationFlags, BackboneFlags, DetectorFlags, TrainDataFlags):
    train_images: int = with_default(TrainDataFlags, "train_images", 5000)
    batch_size: int = with_default(RunFlags, "batch_size", 8)
    head: str = flag("pyramid", "the head; see common/model/heads.py", choices=tuple(HEADS), on_resume="refuse")
    dropout: float = flag(
        0.1,
        "share of the head's hidden units dropped in training, three times as many in the second look",
        at_least=0,
        at_most=1,
        on_resume="refuse",
    )
    second_look: int = flag(
        100, "boxes an image whose features are looked at again; 0 = none", at_least=0, on_resume="refuse"
    )
    epochs_frozen: int = flag(10, "passes over the training images in stage 1; 0 = no stage 1", at_least=0)
    epochs_unfrozen: int = flag(20, "passes in stage 2; 0 = no stage 2", at_least=0)
    cycles: int = flag(
        2, "times that the learning rates fall in stage 2; --ema averages the weights at their ends", at_least=1
    )
    lr_frozen: float = flag(1e-3, "learning rate of the head in stage 1", at_least=0)
    lr_unfrozen: float = flag(1e-4, "learning rate of the backbone's last block in stage 2", at_least=0)
    head_lr_factor: float = flag(
        5.0, "learning rate of the head in stage 2, in multiples of --lr-unfrozen", at_least=0, on_resume="refuse"
    )
    layer_decay: float = flag(
        0.8,
        "learning rate of each block in stage 2, in multiples of the following one's",
        at_least=0,
        on_resume="refuse",
    )
    unfreeze_blocks: int = flag(
        0, "stage 2 trains the last N blocks of the backbone; 0 = all", at_least=0, on_resume="refuse"
    )
    no_feature_cache: bool = flag(False, "stage 1 runs the backbone at every step, on crops")
    feature_cache_limit: float = flag(
        100.0, "GB; a feature cache that would be larger is not built", at_least=0, on_resume="free"
    )
    augmentation: str = flag(
        "auto", "mirror, or crops with scale and colour jitter; auto = mirror with the cache", choices=AUGMENTATIONS
    )
    crop_size: int = flag(336, "side of the crops, pixels, at most that of the input", at_least=1)
    scales: tuple[float, ...] = with_default(AugmentationFlags, "scales", (0.5, 2.0))
    stop_after: str = flag("", "frozen = end with stage 1", choices=STAGES[:1], on_resume="free")
    start_from: str = flag(
        "", "checkpoint to start from, also with other classes; its head, blocks and size are kept", on_resume="refuse"
    )
    ema: float = flag(0.99, "decay of the moving average of the weights, a step; 0 = none", at_least=0, at_most=1)
    run_dir: str = with_default(RunFlags, "run_dir", "runs/improved")
    output: str = with_default(RunFlags, "output", "improved_dino2_detector.pth")


def train_one_epoch(
    model: nn.Module,
    criterion: DetectionLoss,
    jittered_boxes: JitteredBoxes,
    loader: DataLoaderShard,
    state: TrainState,
    run: RunFolder,
    bar: tqdm,
) -> None:
    """One pass over the training images, or their features, or the remaining steps of a resumed run."""
    accelerator, optimizer, schedule, ema = state.accelerator, state.optimizer, state.schedule, state.ema
    model.train()

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        out = model(batch.inputs, jittered_boxes(batch.targets))
        return criterion(out, batch.targets, state.mean_counts)

    for batches in state.steps(loader):
        for losses in state.losses(batches, model, losses_of):
            accelerator.backward(sum(losses.values()))
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        state.check_finite(losses, norm, batches)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            ema.update()
        state.finish_step()
        run.after_step(state)
        bar.update()


@dataclass(frozen=True)
class Stage:
    """One of the two stages: its length, its learning rates, and its training images."""

    name: str
    epochs: int
    head_lr: float
    backbone_lr: float  # 0: the backbone is frozen
    cached: bool  # on cached features
    crops: bool  # on crops with scale and colour jitter, else on the whole image, or its mirror image
    cycles: int = 1  # of the learning rates


def stages(settings: Settings) -> list[Stage]:
    """The stages that the settings request.

    Raises:
        InputError: settings that contradict each other, or no stage.
    """
    cached, crops = not settings.no_feature_cache, settings.augmentation != "mirror"
    if cached and settings.augmentation == "crop" and settings.epochs_frozen:
        raise InputError("--augmentation crop makes new images, which cannot be cached: add --no-feature-cache")
    head_lr = settings.lr_unfrozen * settings.head_lr_factor
    frozen = Stage("frozen", settings.epochs_frozen, settings.lr_frozen, 0.0, cached, crops and not cached)
    unfrozen = Stage("unfrozen", settings.epochs_unfrozen, head_lr, settings.lr_unfrozen, False, crops, settings.cycles)
    requested = [stage for stage in (frozen, unfrozen) if stage.epochs]
    if settings.stop_after:
        requested = [stage for stage in requested if stage.name == settings.stop_after]
    if not requested:
        raise InputError("there is no stage to train: give --epochs-frozen or --epochs-unfrozen")
    return requested


def views_of(settings: Settings) -> int:
    """How many views of a training image are cached: the image itself, and its mirror image."""
    return 1 if settings.no_mirror else 2


def fitted_to(settings: Settings, detector: Detector, train_images: int, val_images: int) -> Settings:
    """The settings with crops no larger than the input, and without a feature cache above the limit.

    Raises:
        InputError: --unfreeze-blocks beyond the depth of the backbone, or a crop size that is no multiple of its
            patch size.
    """
    backbone: Backbone = detector.backbone
    if settings.unfreeze_blocks > backbone.depth:
        raise InputError(f"--unfreeze-blocks: the detector uses only {backbone.depth} blocks of the backbone")
    settings = replace(settings, crop_size=min(settings.crop_size, detector.config.image_size))
    check_side("crop size", settings.crop_size, backbone.patch_size)
    size = feature_gigabytes(detector, train_images, views_of(settings)) + feature_gigabytes(detector, val_images, 1)
    if settings.no_feature_cache or settings.epochs_frozen == 0 or size <= settings.feature_cache_limit:
        return settings
    limit = f"--feature-cache-limit {settings.feature_cache_limit:g}"
    print(f"a feature cache would take {size:.0f} GB, above {limit}: stage 1 runs without it", flush=True)
    return replace(settings, no_feature_cache=True)


def stage_loaders(
    settings: Settings,
    stage: Stage,
    detector: Detector,
    train_data: DetectionData,
    val_data: DetectionData,
    accelerator: Accelerator,
) -> tuple[DataLoader, EpochOrder, DataLoader]:
    """Training batches and their order, and validation batches, of a stage: images, or their cached features."""
    size, batch_size, seed = detector.config.image_size, settings.batch_size, settings.seed
    if stage.cached:
        detector.to(accelerator.device)
        options = {"batch_size": batch_size, "workers": settings.workers, "accelerator": accelerator}
        features = cached_features(detector, train_data, views=views_of(settings), **options)
        val_features = cached_features(detector, val_data, views=1, **options)
        train_set: SampleDataset = CachedDataset(train_data, features, size, mirror=not settings.no_mirror, seed=seed)
        val_set = CachedDataset(val_data, val_features, size)
        workers = 0  # reading a memory map is faster than receiving it from another process
        val_loader = DataLoader(val_set, batch_size, collate_fn=collate)
    else:
        if stage.crops:
            transform: nn.Module = TrainTransform(size, settings.crop_size, settings)
        else:
            transform = LetterboxTransform(size) if settings.no_mirror else MirrorTransform(size)
        train_set = DetectionDataset(train_data, transform, seed)
        workers = settings.workers
        val_loader = make_eval_loader(val_data, size, batch_size, workers)
    return *make_train_loader(train_set, batch_size, workers), val_loader


def train_stage(
    settings: Settings,
    stage: Stage,
    start: Checkpoint,
    train_data: DetectionData,
    val_data: DetectionData,
    run: RunFolder,
) -> None:
    """Train one stage from the detector of `start`; the epochs' checkpoints are written to the `run` folder."""
    detector, accelerator = start.detector, run.accelerator
    if stage.backbone_lr:
        detector.backbone.prepare_training(settings, settings.unfreeze_blocks)
    else:
        detector.backbone.freeze()
    train_loader, order, val_loader = stage_loaders(settings, stage, detector, train_data, val_data, accelerator)
    groups = parameter_groups(detector, stage.head_lr, stage.backbone_lr, WEIGHT_DECAY, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups)
    trained = detector.head if stage.cached else detector
    model, optimizer, train_loader, val_loader = accelerator.prepare(trained, optimizer, train_loader, val_loader)
    epoch_steps = steps_an_epoch(train_loader, settings.accumulate)
    steps = stage.epochs * epoch_steps
    schedule = cosine_schedule(optimizer, steps, stage.cycles)
    ema = Ema(detector, settings.ema, cycle_ends(steps, stage.cycles)) if settings.ema else None
    options = {"ema": ema, "epoch": start.epoch, "accumulate": settings.accumulate}
    state = TrainState(stage.name, detector, optimizer, schedule, order, accelerator, **options)

    criterion = DetectionLoss(settings, train_data.class_shares()).to(accelerator.device)
    jittered_boxes = JitteredBoxes().to(accelerator.device)
    whole = "whole images" if settings.no_mirror else "whole images and their mirror images"
    views = f"crops of {settings.crop_size} px, {settings.describe()}" if stage.crops else whole
    accelerator.print(f"stage {stage.name}: {stage.epochs} epochs on {len(train_data)} images; {views}", flush=True)
    with progress_bar(steps, stage.name, "step", accelerator.is_main_process) as bar, run.resumable(state):
        bar.update((state.epoch - start.epoch) * epoch_steps + state.step)
        while state.epoch < start.epoch + stage.epochs and not run.has_stalled(state.stage):
            train_one_epoch(model, criterion, jittered_boxes, train_loader, state, run, bar)
            with ema.applied() if ema else nullcontext():
                numbers, found = validate(model, val_loader, val_data, start.class_names, accelerator)
                checkpoint = replace(start, metrics=numbers, epoch=state.epoch + 1)
                run.log_epoch(state, checkpoint, partial(sheet_of, val_data, found, checkpoint))
            state.finish_epoch()
            run.save(state)


def sheet_of(data: DetectionData, found: list[Detections], checkpoint: Checkpoint) -> Image.Image:
    """The first validation images with their detections, for trackers."""
    from common.show.drawing import detection_sheet  # it imports matplotlib, which nothing else here needs

    return detection_sheet(data, found, checkpoint.class_names, checkpoint.min_score)


def first_detector(settings: Settings, data: DetectionData) -> Checkpoint:
    """The detector to train: that of `--start-from`, or a new head on a pretrained backbone.

    Where the classes of the data are others than those of `--start-from`, all but the class layers are kept, and in
    them the weights of classes with the same name.

    Raises:
        InputError: no such checkpoint or backbone.
    """
    if settings.start_from:
        start = load_checkpoint(settings.start_from)
        origin = {"backbone": start.train_config.get("backbone"), "started_from": settings.start_from}
        detector = start.detector
        if start.class_names != data.class_names:
            old_label = {new: old for old, new in enumerate(label_map(start.class_names, data)) if new >= 0}
            detector = with_classes(detector, [old_label.get(label) for label in range(len(data.class_names))])
            new = [name for label, name in enumerate(data.class_names) if label not in old_label]
            print(
                f"all but the class layers of {settings.start_from} are kept, and in them {len(old_label)} of "
                f"{len(data.class_names)} classes; new: {name_some(new) if new else 'none'}",
                flush=True,
            )
        return Checkpoint(detector, data.class_names, data.category_ids, origin)
    name, folder = fetch_backbone(settings.backbone)
    detector = new_detector(
        folder,
        head=settings.head,
        blocks=settings.blocks,
        image_size=settings.image_size,
        num_classes=len(data.class_names),
        dropout=settings.dropout,
        second_look=settings.second_look,
    )
    return Checkpoint(detector, data.class_names, data.category_ids, {"backbone": name})


def main(settings: Settings) -> dict:
    """Train the stages, keep the best epoch, and return its numbers on the validation images."""
    stages(settings)  # raises for contradictory settings before anything is loaded
    settings.check_paths()
    settings.check_augmentation()
    set_seed(settings.seed)
    accelerator = make_accelerator(settings.precision, settings.deterministic)
    settings = replace(settings, precision=precision_name(accelerator))  # auto depends on the machine
    with accelerator.main_process_first():  # the others then read what it downloaded or generated
        train_data, val_data = load_train_and_val(settings)
    start = first_detector(settings, train_data)
    check_object_sizes(train_data, start.detector.config.image_size, start.detector.backbone.patch_size)
    quick_data = quick_validation(val_data)
    settings = fitted_to(settings, start.detector, len(train_data), len(quick_data))
    start = replace(start, train_config=training_conditions(settings, train_data, accelerator) | start.train_config)
    run = RunFolder(settings, train_data, accelerator, STAGES)
    for stage in stages(settings):
        if not run.is_past(stage.name):
            began = time.perf_counter()
            train_stage(settings, stage, start, train_data, quick_data, run)
            accelerator.print(f"stage {stage.name} took {time.perf_counter() - began:.0f} s", flush=True)
        start = replace(load_checkpoint(run.best_of(stage.name)), epoch=start.epoch + stage.epochs)
    full_loader = make_eval_loader(val_data, start.detector.config.image_size, settings.batch_size, settings.workers)
    return publish_best(run, full_loader, val_data)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
