"""What a run sends to experiment trackers: nothing, unless --log-with names one.

TensorBoard writes into the run folder. Weights & Biases and MLflow send to where their own environment variables say;
both name the run after its folder.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from common.console import check_packages

TRACKERS = ("tensorboard", "wandb", "mlflow")  # names of the packages too
PROJECT = "dinov2-detection"


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for a tracker whose package is not installed."""
    for name in names:
        check_packages(f"--log-with {name}", name)


class Trackers:
    """The trackers of a run, through accelerate.

    Args:
        names: of TRACKERS.
        folder: of the run.
        settings: of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict):
        self.trackers = [_new_tracker(name, folder) for name in dict.fromkeys(names)]
        self.step = 0  # of the last numbers
        for tracker in self.trackers:
            tracker.start()
            tracker.store_init_configuration({name: _plain(value) for name, value in settings.items()})

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def log(self, numbers: Mapping[str, float | None], step: int) -> None:
        """Send numbers by name; those that do not exist are left out."""
        self.step = step
        for tracker in self.trackers:
            tracker.log({name: number for name, number in numbers.items() if number is not None}, step=step)

    def log_image(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        """Send an image, which is drawn only if there is a tracker."""
        if not self.trackers:
            return
        image = draw()
        for tracker in self.trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [image]}, step=step)
            elif isinstance(tracker, MLflowTracker):
                import mlflow

                mlflow.log_image(image, key=name, step=step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _new_tracker(name: str, folder: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker(name, logging_dir=folder)
    if name == "wandb":
        return WandBTracker(PROJECT, name=folder.name, dir=folder)
    return MLflowTracker(PROJECT, run_name=folder.name)


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)
