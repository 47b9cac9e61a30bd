"""One training run: its folder, its log, its state, and going on after a stop.

A run is resumed at the end of an epoch. Random numbers are functions of (seed, epoch, step or image, process) and
learning rates of the step, so that on a CPU the resumed run ends with the same bits as one that was never stopped.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import filelock
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import flag, flag_name, flag_texts
from common.console import InputError, check_packages, last_line, progress_bar, raise_if_interrupted
from common.data.dataset import make_eval_loader
from common.data.memory import DetectionData
from common.data.sources import TrainDataFlags, is_fetched, load_train_and_val
from common.evaluate.detect import detect_images
from common.evaluate.detections import detection_table, label_map
from common.evaluate.primary import format_headline, headline
from common.files import PROGRAM, atomic_write, check_outputs, link_or_copy, remove_leftovers
from common.model.backbone import fetch_backbone
from common.model.checkpoint import Checkpoint, load_checkpoint, read_archive, save_detector
from common.model.detector import merge_lora
from common.runtime import Purpose, RuntimeFlags, seed_of
from common.train.calibration import calibrate
from common.types import Batch, Detections

log = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "wandb", "mlflow")  # names of the packages too
STATE_VERSION = 7
FINISHED = "finished"  # a file that marks a run as complete, with its result
FILES = ("settings.json", "log.jsonl", "start.pth", "last.pth", "state.pth", FINISHED)
UNRECORDED = ("resume", "log_with")  # settings of the command, not of the run
ORIGIN = ("backbone", "started_from")  # of a checkpoint's description: where its weights began


@dataclass(frozen=True)
class RunFlags(RuntimeFlags):
    """Training run."""

    accumulate: int = flag(1, "batches a step, in the memory of one; those that fill no step are left out", at_least=1)
    val_every: int = flag(0, "validate after every N epochs, for curves; 0 = at the end alone", at_least=0)
    log_with: tuple[str, ...] = flag((), "trackers that the run is sent to; none = nothing is sent", choices=TRACKERS)
    deterministic: bool = flag(False, "the same numbers each time on a GPU too, slower")
    resume: bool = flag(False, "go on after the last epoch of the stopped run in --run-dir; start one if there is none")
    run_dir: str = flag("runs/detector", "folder for the run's log and its checkpoints")
    output: str = flag("detector.pth", "the checkpoint to write")


class Run:
    """The files of a run, and what is the same in every step and after every epoch.

    Its folder has `settings.json`, `log.jsonl` with a line an epoch, `last.pth`, after all stages but the last also
    STAGE.pth, and `state.pth`. The main process writes them, and locks the folder while it lives, since processes of a
    killed launcher may still be training.

    Raises:
        InputError: another process trains in the folder, an output cannot be written or is an input, or the run in the
            folder is not finished and cannot be resumed, or shall not be.
    """

    def __init__(self, settings: RunFlags, accelerator: Accelerator, stages: tuple[str, ...] = ("only",)):
        self.settings, self.accelerator, self.stages = settings, accelerator, stages
        self.path, self.stage = Path(settings.run_dir), stages[0]
        self._check_outputs()
        if accelerator.is_main_process:
            self.lock = filelock.FileLock(self.path.resolve() / "lock", is_singleton=True)  # reentrant
            try:
                self.lock.acquire(blocking=False)
            except filelock.Timeout as error:
                raise InputError(f"another process trains in {self.path}: wait, or name another --run-dir") from error
            except OSError as error:
                log.warning(f"warning: {self.path}: {error.strerror}: start no second training there")
        accelerator.wait_for_everyone()  # nobody writes the state that all processes now read
        self.saved = read_state(self.path) if settings.resume else {}
        self.log: list[dict] = self.saved.get("log", [])
        self.resumable = 0  # epochs after which this run can go on
        self.operating_point: float | None = None  # of folds, in place of that on the validation images

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """An error after an epoch ends with how to go on."""
        if error is not None and self.resumable:
            error.add_note(f"the state after epoch {self.resumable} is in {self.path}: go on with --resume")

    def begin(self, train_data: DetectionData, val_data: DetectionData, stages: tuple[str, ...] = ("only",)) -> None:
        """Begin to train the requested `stages`.

        Raises:
            InputError: a tracker cannot be reached, or a resumed run would have other images or boxes than before,
                another value of a flag that is `fixed`, or not the stage that it is in.
        """
        self.description = {name: value for name, value in asdict(self.settings).items() if name not in UNRECORDED} | {
            "train_source": train_data.source,  # of a hub's data set with the revision
            "train_fingerprint": fingerprint_of(train_data),
            "val_fingerprint": fingerprint_of(val_data),
            "train_images_used": len(train_data),
            "processes": self.accelerator.num_processes,
        }
        if self.saved:
            self._check_resumable(stages)
            self.resumable, self.stage = len(self.log), self.saved["stage"]
        self._start_trackers()
        self.accelerator.wait_for_everyone()  # all have read the files that the main process now replaces
        if self.accelerator.is_main_process:
            remove_leftovers(self.path)
            if (self.path / FINISHED).is_file() and not self.saved:
                log.info(f"the finished run in {self.path} is replaced: {(self.path / FINISHED).read_text()}")
            for name in (FINISHED,) if self.saved else (FINISHED, "state.pth", "log.jsonl"):
                (self.path / name).unlink(missing_ok=True)

    def describe(self, start: Checkpoint, **used: Any) -> Checkpoint:
        """The checkpoint that training begins with, described as one of this run; `used`: settings as they are used."""
        origin = {name: start.train_config[name] for name in ORIGIN if name in start.train_config}
        used |= {k: v for k, v in asdict(start.detector.config).items() if k in self.description and k not in ORIGIN}
        self._write("settings.json", json.dumps(self.description | used | origin, indent=2))
        return replace(start, train_config=self.description | used | origin, metrics={}, epoch=0)

    def latest(self, stage: str) -> Checkpoint:
        """The checkpoint after the last epoch of a stage; in a resumed one `epochs` replaces its averaged weights."""
        return load_checkpoint(self.path / ("last.pth" if stage == self.stages[-1] else f"{stage}.pth"))

    def is_past(self, stage: str) -> bool:
        """Whether the resumed run has begun a later stage."""
        return bool(self.saved) and self.stages.index(stage) < self.stages.index(self.saved["stage"])

    def epochs(self, stage: str, count: int, **parts: Any) -> Iterator[int]:
        """The epochs of a stage that remain, of `count` from 0; after each the state of `parts` is saved.

        These are all that an epoch changes, objects with `state_dict` and `load_state_dict`.
        """
        self.stage, first = stage, 0
        parts |= {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        if self.saved and self.saved["stage"] == stage:
            first = self.saved["epoch"]
            for name, part in parts.items():
                part.load_state_dict(self.saved["parts"][name])
            log.info(f"resuming stage {stage} after {first} of {count} epochs")
        if first > count:
            raise InputError(f"--resume: stage {stage} has had {first} epochs, more than {count}")
        self.saved = {}  # it holds the weights once more
        for epoch in range(first, count):
            yield epoch
            self._save(epoch + 1, parts)

    def epoch_steps(self, loader: DataLoaderShard) -> int:
        """Steps in an epoch. Raises InputError: not even one."""
        if len(loader) < self.settings.accumulate:
            raise InputError(f"--accumulate {self.settings.accumulate}: an epoch has only {len(loader)} batches")
        return len(loader) // self.settings.accumulate

    def steps(self, loader: DataLoaderShard) -> Iterator[list[Batch]]:
        """The batches of each step of an epoch, whose dropout is that of (seed, epoch, process); and a bar."""
        self.began, self.sums, self.batches = time.perf_counter(), dict[str, Tensor](), 0
        loader.set_epoch(len(self.log) + 1)  # passed on to the data set
        torch.manual_seed(seed_of(Purpose.DROPOUT, self.settings.seed, len(self.log), self.accelerator.process_index))
        steps, batches = self.epoch_steps(loader), iter(loader)
        with progress_bar(steps, f"epoch {len(self.log) + 1}", "step", self.accelerator.is_main_process) as bar:
            for _ in range(steps):
                raise_if_interrupted()
                yield [batch for group in itertools.islice(batches, self.settings.accumulate) for batch in group]
                self.batches += self.settings.accumulate
                bar.update()

    def mean(self, counts: list[Tensor]) -> Tensor:
        """The mean of vectors of a step's images over its loaded batches, those of other processes included."""
        return self.accelerator.reduce(torch.stack(counts).sum(0) / self.settings.accumulate, "mean")

    def exchange(self, model: nn.Module, now: bool) -> AbstractContextManager:
        """Inside, processes exchange the gradients of `model`, or leave that to a later batch of the step.

        Once a step: they have different numbers of batches, as these are of images of one shape.
        """
        return nullcontext() if now else self.accelerator.no_sync(model)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of one of the batches of a step, and its losses to the means of the epoch."""
        self.accelerator.backward(sum(losses.values()) / self.settings.accumulate)
        for name, value in losses.items():  # on the device, which is read at the end of the epoch
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def check_finite(self, norm: Tensor, step: int, batches: list[Batch]) -> None:
        """Raises InputError before a step would make the weights inf or NaN, `norm` () being that of the gradients.

        This is the one place where a step waits for the device. In fp16 a step is skipped where the loss scale, which
        then falls, was too high.
        """
        scaler = self.accelerator.scaler
        if torch.isfinite(norm) or (scaler and scaler.get_scale() > 1):
            return
        images = ", ".join(str(meta.image_id) for batch in batches for meta in batch.meta)
        where = f"epoch {len(self.log) + 1}, step {step + 1}, on the images {images}"
        raise InputError(f"the gradients became {norm.item()} in {where}; lower the learning rate, or use fp32")

    def finish_epoch(self, checkpoint: Checkpoint, val_data: DetectionData) -> None:
        """Log an epoch, and write the detector as `last.pth`, validated where `--val-every` wants it."""
        number = len(self.log) + 1
        if not all(weight.isfinite().all() for weight in checkpoint.detector.parameters()):
            raise InputError(f"the weights are not finite after epoch {number}; lower the learning rate")
        is_due = self.settings.val_every > 0 and number % self.settings.val_every == 0
        numbers = self.validate(checkpoint, val_data) if is_due else {}
        totals = self.accelerator.reduce(self.sums, "mean") if self.sums else {}
        losses = {name: round(float(total) / self.batches, 4) for name, total in totals.items()}
        seconds = round(time.perf_counter() - self.began, 1)
        line = {"stage": self.stage, "epoch": number, "loss": losses, "val": numbers, "seconds": seconds}
        self.log.append(line)
        if not self.accelerator.is_main_process:
            return
        terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        validated = f"; {format_headline(numbers)}" if is_due else ""
        tqdm.write(f"epoch {number}: loss {terms}{validated}; {seconds:.0f} s")
        merged = replace(checkpoint, detector=merge_lora(checkpoint.detector), metrics=numbers, epoch=number)
        save_detector(self.path / "last.pth", merged)
        if self.stage != self.stages[-1]:
            link_or_copy(self.path / "last.pth", self.path / f"{self.stage}.pth")

    def detect(self, checkpoint: Checkpoint, data: DetectionData) -> list[Detections]:
        """What a detector detects on the images of `data`."""
        detector, options = checkpoint.detector, (self.settings.batch_size, self.settings.workers)
        loader = self.accelerator.prepare(make_eval_loader(data, detector.input_size, *options))
        return detect_images(detector.to(self.accelerator.device), loader, len(data), self.accelerator)

    def validate(self, checkpoint: Checkpoint, val_data: DetectionData) -> dict[str, float | None]:
        """The headline numbers of a detector on the images of `val_data`."""
        table = detection_table(self.detect(checkpoint, val_data), val_data)
        return headline(table.relabelled(label_map(checkpoint.class_names, val_data)), val_data)

    def finish(self, val_data: DetectionData, held_out: DetectionData | None = None) -> dict[str, float | None]:
        """Validate the detector after the last epoch, write it to `--output`; returns its headline numbers.

        Its class scores are calibrated on the images that are `held_out` from training.
        """
        self.accelerator.wait_for_everyone()
        last, output = self.latest(self.stage), self.settings.output
        if held_out:
            calibrate(last.detector.to(self.accelerator.device), held_out, self.settings.workers, self.accelerator)
        numbers = self.validate(last, val_data)
        if self.operating_point is not None:
            numbers["operating_point"] = self.operating_point
        self._track(final=numbers)
        if self.accelerator.is_main_process:
            for path in (output, self.path / "last.pth"):
                save_detector(path, replace(last, metrics=numbers))
            result = f"on {len(val_data)} validation images: {format_headline(numbers)}"
            log.info(f"{result}; written to {output}")
            self._write(FINISHED, f"{PROGRAM}, {time.strftime('%Y-%m-%d %H:%M')}, {result}")
        self._track()
        self.accelerator.state.destroy_process_group()
        return numbers

    def _check_outputs(self) -> None:
        files = [self.path / name for name in (*FILES, *(f"{stage}.pth" for stage in self.stages[:-1]))]
        check_outputs([Path(self.settings.output), *files], flag_texts(self.settings, "output", "run_dir"))
        if (self.path / "state.pth").is_file() and not (self.path / FINISHED).is_file() and not self.settings.resume:
            raise InputError(f"the run in {self.path} is not finished: go on with --resume, or name another --run-dir")
        check_packages(f"--log-with {' '.join(self.settings.log_with)}", *self.settings.log_with)

    def _check_resumable(self, stages: tuple[str, ...]) -> None:
        before, now, run = self.saved["description"], self.description, f"--resume: the run in {self.path}"
        if before["train_fingerprint"] != now["train_fingerprint"]:
            raise InputError(f"{run} had other train images or boxes")
        if self.saved["stage"] not in stages:
            raise InputError(f"{run} is in the stage {self.saved['stage']}, now left out")
        changed = [field for field in fields(self.settings) if before.get(field.name) != now.get(field.name)]
        texts = {f.name: f"{flag_name(f.name)} (was {before[f.name]}, is {now[f.name]})" for f in changed}
        moved = [Path(n).name for n in before["backbone"]] == [Path(n).name for n in now["backbone"]]
        fixed = [texts[f.name] for f in changed if f.metadata["fixed"] and not (moved and f.name == "backbone")]
        if fixed:  # a backbone in another place is not read, as the state has its weights
            raise InputError(f"{run} cannot go on with another {', '.join(fixed)}")
        if changed:
            log.info(f"from here on with another {', '.join(texts.values())}")
        if before["val_fingerprint"] != now["val_fingerprint"]:
            log.warning("warning: it had other validation images or boxes, on which earlier epochs were validated")

    def _save(self, epoch: int, parts: dict[str, Any]) -> None:
        content = {name: getattr(self, name) for name in ("description", "stage", "log")}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic_write(self.path / "state.pth") as file:
                torch.save(content | {"state_version": STATE_VERSION, "epoch": epoch, "parts": states}, file)
        self._write("log.jsonl", "".join(f"{json.dumps(line)}\n" for line in self.log))
        self.resumable = len(self.log)
        self._track(loss=self.log[-1]["loss"], validation=self.log[-1]["val"])

    def _write(self, name: str, text: str) -> None:
        if self.accelerator.is_main_process:
            with atomic_write(self.path / name, "w") as file:
                file.write(text)

    def _start_trackers(self) -> None:
        self.accelerator.log_with = list(dict.fromkeys(self.settings.log_with))
        self.accelerator.project_configuration.set_directories(str(self.path))
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in self.description.items()}
        names = {"wandb": {"name": self.path.name, "dir": str(self.path)}, "mlflow": {"run_name": self.path.name}}
        try:
            self.accelerator.init_trackers(PROGRAM, plain, names)
        except Exception as error:  # each tracker has its own
            raise InputError(f"--log-with {' '.join(self.settings.log_with)}: {last_line(error):.300}") from error

    def _track(self, **groups: dict[str, Any]) -> None:
        """Send numbers to the trackers, or end them; one that fails does not end the training, and gets no more."""
        values = {f"{group}/{k}": v for group, part in groups.items() for k, v in part.items() if v is not None}
        for tracker in self.accelerator.trackers.copy():
            try:
                tracker.log(values, len(self.log)) if groups else tracker.finish()
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                log.warning(f"warning: {tracker.name} is lost after epoch {len(self.log)}: {last_line(error):.300}")


def fetch_inputs(
    flags: TrainDataFlags, names: tuple[str, ...]
) -> tuple[tuple[str, Path] | None, DetectionData, DetectionData]:
    """The backbone as `fetch_backbone` returns it, None where `names` is empty, and the training and validation images.

    The backbone comes first where the images are fetched, so that none are fetched for a backbone that can't be had.
    """
    backbone = fetch_backbone(names) if names and is_fetched(flags) else None
    train_data, val_data = load_train_and_val(flags)
    return backbone or (fetch_backbone(names) if names else None), train_data, val_data


def fingerprint_of(data: DetectionData) -> str:
    """Hex digest of the ground truth, the sizes of the image files, and the content of at most 100."""
    digest = hashlib.sha256(repr((data.fingerprint(), [i.path.stat().st_size for i in data.images])).encode())
    for image in data.images[:: 1 + len(data) // 100]:
        digest.update(image.path.read_bytes())
    return digest.hexdigest()[:16]


def read_state(folder: Path) -> dict[str, Any]:
    """The state of the run in `folder`, empty where there is none. Raises InputError where it cannot be used."""
    path = folder / "state.pth"
    if not path.is_file():
        log.info(f"nothing to resume in {folder} yet: starting")
        return {}
    try:
        content = read_archive(path)
        if content["state_version"] == STATE_VERSION:
            return content
        fault = "of another version of this program"
    except Exception:  # torch documents few of the errors that damaged files raise
        fault = "damaged"
    raise InputError(f"{path} is {fault}: delete that folder, or name another --run-dir")
