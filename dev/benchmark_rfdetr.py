"""Train RF-DETR for some minutes on a CPU, and write its detections as COCO results.

  python -m dev.benchmark_rfdetr --data COCO --backbone DINOV2 --minutes 30 --output rfdetr.json
  python comprehensive_validation.py --data COCO --from-detections rfdetr.json

The first command runs in an environment of its own (`pip install "rfdetr[train]==1.11.2"`), from the root of this
repository and without a network. RF-DETR base starts from the DINOv2 weights in a folder, not from its own pretrained
detector. Losses, learning rates, augmentation, multi-scale training and EMA are the package's defaults; a clock ends
the training, and nothing is validated or kept before. Its default learning rates are constant for 100 epochs, more than
a CPU reaches; `--lr-scheduler cosine` is its other preset, over the minutes in place of the epochs.
"""

import functools
import json
import math
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image

from common import cli
from common.cli import flag
from common.console import InputError

BEST = 100  # detections per image, as many as COCO evaluates
THRESHOLD = 0.001
EPOCHS = 10_000  # more than the minutes allow


@dataclass(frozen=True)
class Settings:
    data: str = flag("", "COCO-format folder: annotations/instances_*2017.json, *2017/")
    train_json: str = flag("", "annotations of the training images, in place of those of --data")
    train_images_dir: str = flag("", "folder of the training images, likewise")
    val_json: str = flag("", "annotations of the validation images, likewise")
    val_images_dir: str = flag("", "folder of the validation images, likewise")
    backbone: str = flag("", "folder with the model.safetensors of DINOv2-small")
    minutes: float = flag(30.0, "wall time of training", at_least=0.1)
    batch_size: int = flag(4, "images per step", at_least=1)
    accumulate: int = flag(1, "parts that a step takes its images in; 2 halve the memory, of 8 GB", at_least=1)
    resolution: int = flag(448, "side of the square images, a multiple of 56; training takes 168 to 728 px for 448")
    lr_scheduler: str = flag("step", "learning rates: constant, or a cosine", choices=("step", "cosine"))
    workers: int = flag(2, "processes that decode training images", at_least=0)
    seed: int = flag(0, "of the weights, the order and the augmentation")
    output: str = flag("rfdetr.json", "the detections to write, COCO results")


def split_files(settings: Settings, split: str) -> tuple[Path, Path]:
    """The annotations and the image folder of a split, "train" or "val"."""
    annotations, images = getattr(settings, f"{split}_json"), getattr(settings, f"{split}_images_dir")
    annotations = annotations or f"{settings.data}/annotations/instances_{split}2017.json"
    return Path(annotations).resolve(strict=True), Path(images or f"{settings.data}/{split}2017").resolve(strict=True)


def link_training_data(settings: Settings, root: Path) -> None:
    """Lay out COCO as RF-DETR expects it. Its "val", which must exist and is not evaluated, is the training images."""
    annotations, images = split_files(settings, "train")
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").symlink_to(annotations)
        (root / f"{split}2017").symlink_to(images)


def read_backbone_from(folder: str) -> None:
    """Let RF-DETR load its DINOv2 from this folder, not from the hub; refuse weights that are not exactly its own."""
    from rfdetr.models.backbone.dinov2 import WindowedDinov2WithRegistersBackbone as Backbone
    from safetensors.torch import load_file

    def from_pretrained(name: str, config) -> torch.nn.Module:
        weights = {key: value.float() for key, value in load_file(Path(folder) / "model.safetensors").items()}
        backbone = Backbone(config)
        try:
            backbone.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise InputError(f"{folder} does not hold the weights of {name}: {error}") from error
        return backbone

    Backbone.from_pretrained = from_pretrained


def cosine_over_minutes(optimizer: torch.optim.Optimizer, minutes: float) -> torch.optim.lr_scheduler.LambdaLR:
    """RF-DETR's cosine, by the share of the minutes that has passed."""
    start = time.monotonic()

    def factor(_: int) -> float:
        return (1 + math.cos(math.pi * min(1.0, (time.monotonic() - start) / (60 * minutes)))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(detector, settings: Settings, root: Path) -> None:
    """Train, leave the EMA's weights in `detector`, and print what was done."""
    from pytorch_lightning.callbacks import LambdaCallback, Timer
    from rfdetr.config import TrainConfig
    from rfdetr.training import RFDETRDataModule, RFDETRModelModule, build_trainer
    from rfdetr.training.callbacks import RFDETREMACallback

    cosine = functools.partial(cosine_over_minutes, minutes=settings.minutes)
    constant = {"lr_scheduler": "step", "lr_scheduler_kwargs": {"lr_drop": EPOCHS}}
    config = TrainConfig(
        dataset_file="coco",
        dataset_dir=str(root),
        output_dir=str(root / "output"),
        epochs=EPOCHS,
        batch_size=settings.batch_size // settings.accumulate,
        grad_accum_steps=settings.accumulate,
        num_workers=settings.workers,
        seed=settings.seed,
        tensorboard=False,
        accelerator="cpu",
        **(constant if settings.lr_scheduler == "step" else {"lr_scheduler": cosine}),
    )

    def print_epoch(trainer, _) -> None:
        loss = trainer.callback_metrics["train/loss"].item()
        print(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: loss {loss:.3f}", flush=True)

    timer = Timer(timedelta(minutes=settings.minutes))
    ema = RFDETREMACallback(config.ema_decay, config.ema_tau, update_interval_steps=config.ema_update_interval)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    callbacks = [ema, timer, LambdaCallback(on_train_epoch_end=print_epoch)]
    trainer = build_trainer(config, detector.model_config, callbacks=callbacks, **options)
    module, data = RFDETRModelModule(detector.model_config, config), RFDETRDataModule(detector.model_config, config)
    cpu_start = time.process_time()
    trainer.fit(module, data)
    cpu_seconds = time.process_time() - cpu_start
    detector.model.model = module.model.eval()
    seconds, images = timer.time_elapsed("train"), trainer.global_step * settings.batch_size
    epochs = trainer.global_step * settings.accumulate / trainer.num_training_batches
    print(
        f"trained for {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time without workers: {epochs:.2f} epochs, "
        f"{trainer.global_step} steps, {images / seconds:.2f} images/s at batch {settings.batch_size}, precision "
        f"{trainer.precision}, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    )


def detect(detector, settings: Settings) -> list[dict]:
    """The detections on the validation images, COCO results; prints what they cost."""
    path, folder = split_files(settings, "val")
    data = json.loads(path.read_bytes())
    categories = {category["id"] for category in data["categories"]}
    rows, forward, whole = [], [], []  # and seconds per image
    detector.model.model.register_forward_pre_hook(lambda *_: forward.append(-time.perf_counter()))
    detector.model.model.register_forward_hook(lambda *_: forward.append(forward.pop() + time.perf_counter()))
    for entry in data["images"]:
        with Image.open(folder / entry["file_name"]) as file:
            image = file.convert("RGB")
        start = time.perf_counter()
        found = detector.predict(image, threshold=THRESHOLD, include_source_image=False)
        whole.append(time.perf_counter() - start)
        best = [i for i in (-found.confidence).argsort(kind="stable") if found.class_id[i] in categories][:BEST]
        for i in best:
            x1, y1, x2, y2 = found.xyxy[i].tolist()
            row = {"image_id": entry["id"], "category_id": int(found.class_id[i]), "score": float(found.confidence[i])}
            rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1], "file_name": entry["file_name"]})
    print(
        f"{len(rows)} detections on {len(whole)} images; median {1000 * statistics.median(forward):.0f} ms forward, "
        f"{1000 * statistics.median(whole):.0f} ms with its pre- and post-processing"
    )
    return rows


def main(settings: Settings) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of rfdetr
    try:
        from rfdetr import RFDETRBase
    except ImportError as error:
        raise InputError(f"this runs in an environment of its own with rfdetr[train]: {error}") from error
    if settings.batch_size % settings.accumulate:
        raise InputError(f"--batch-size {settings.batch_size} is not a multiple of --accumulate {settings.accumulate}")
    torch.manual_seed(settings.seed)
    split_files(settings, "val")
    read_backbone_from(settings.backbone)
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    categories = json.loads(split_files(settings, "train")[0].read_bytes())["categories"]
    classes = max(category["id"] for category in categories)  # a class of RF-DETR is a category id
    detector = RFDETRBase(pretrain_weights=None, resolution=settings.resolution, num_classes=classes, device="cpu")
    parameters = sum(parameter.numel() for parameter in detector.model.model.parameters())
    print(f"all weights of {settings.backbone} are in RF-DETR base, which has {parameters} parameters")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        link_training_data(settings, Path(root))
        train(detector, settings, Path(root))
    Path(settings.output).write_text(json.dumps(detect(detector, settings)))
    print(f"written to {settings.output}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
