"""The time of the head and post-processing, relative to the backbone.

  python -m dev.benchmark_head --data COCO --checkpoint improved_dino2_detector.pth

Backbone alone and whole detector take turns on the same images; medians are printed, and their ratio.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from common import cli
from common.cli import flag
from common.data.dataset import make_eval_loader
from common.data.sources import DataFlags, load_split
from common.model.checkpoint import load_checkpoint
from common.model.postprocess import fuse_predictions, postprocess
from common.runtime import make_accelerator, precision_name


@dataclass(frozen=True)
class Settings:
    data: str = flag("demo", "COCO-format folder, hub data set id, or demo")
    checkpoint: str = flag("improved_dino2_detector.pth", "the detector")
    batch_sizes: tuple[int, ...] = flag((1, 8), "images at once")
    rounds: int = flag(15, "measurements of each", at_least=1)
    precision: str = flag("auto", "arithmetic", choices=("auto", "fp32", "bf16", "fp16"))


@torch.inference_mode()
def main(settings: Settings) -> None:
    accelerator = make_accelerator(settings.precision)
    detector = load_checkpoint(settings.checkpoint).detector.to(accelerator.device)
    data = load_split(DataFlags(settings.data, val_images=max(settings.batch_sizes)), "val")
    for size in settings.batch_sizes:
        batches = next(iter(accelerator.prepare(make_eval_loader(data, detector.input_size, size, 0))))
        times: dict[str, list[float]] = {"backbone": [], "detector": []}
        for _ in range(settings.rounds + 2):
            for name, seconds in times.items():
                start = time.perf_counter()
                for batch in batches:
                    with accelerator.autocast():
                        if name == "backbone":
                            detector.backbone(batch.inputs).sum().item()  # waits for the device
                        else:
                            postprocess(*fuse_predictions(detector(batch.inputs)), batch.meta)
                seconds.append(time.perf_counter() - start)
        backbone, whole = (statistics.median(seconds[2:]) for seconds in times.values())
        print(
            f"batch {size}, {detector.config.image_size} px, {precision_name(accelerator)}: backbone "
            f"{1000 * backbone / size:.1f} ms/image, head and post-processing {whole / backbone - 1:.1%} on top"
        )


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
