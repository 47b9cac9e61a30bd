"""The folder of a training run: its log, its checkpoints, and the state from which a stopped run goes on.

A resumed run computes, to the bit, what the uninterrupted one would have computed: weights, optimizer, schedule,
average and position are saved, and all random numbers are functions of (seed, epoch, step or image, process).
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.cli import flag, flag_name
from common.console import InputError, Interrupted, NotFiniteError, finish_step_first
from common.data.coco import CocoData
from common.evaluate.coco_metrics import format_headline
from common.evaluate.detect import validate
from common.files import atomic_write, check_writable, is_file, remove_leftovers
from common.model.checkpoint import Checkpoint, load_detector, save_detector
from common.runtime import RuntimeFlags
from common.train.state import TrainState

STATE_VERSION = 2
EPOCH_VAL_IMAGES = 100  # the validation after each epoch looks at the first so many
FINISHED = "finished"  # an empty file that marks a run as complete


@dataclass(frozen=True)
class RunFlags(RuntimeFlags):
    """Training run."""

    deterministic: bool = flag(False, "the same numbers each time on a GPU too, slower", on_resume="free")
    resume: bool = flag(
        False, "go on with the stopped run in --run-dir; begin where there is none", on_resume="unrecorded"
    )
    save_steps: int = flag(
        0, "save the run's state every so many steps, not only after each epoch", at_least=0, on_resume="unrecorded"
    )
    run_dir: str = flag("runs/detector", "folder for the run's log and its checkpoints", on_resume="free")
    output: str = flag("detector.pth", "the checkpoint to write", on_resume="free")

    def check_paths(self) -> None:
        """Before hours of work: can the output and the run folder be written, and would a run be lost?

        Raises:
            InputError: they cannot, or the folder has an unfinished run and `resume` is not set.
        """
        folder = Path(self.run_dir)
        if not self.resume and is_file(folder / "state.pth") and not is_file(folder / FINISHED):
            raise InputError(
                f"the run in {folder} is not finished: go on with --resume, name another --run-dir, or delete it"
            )
        check_writable(self.output)
        check_writable(folder / "state.pth")


def training_conditions(settings: RunFlags, data: CocoData, accelerator: Accelerator) -> dict:
    """The conditions of a run, for its checkpoints: the settings that are recorded, and the data and processes."""
    recorded = [field.name for field in fields(settings) if field.metadata["on_resume"] != "unrecorded"]
    return {name: getattr(settings, name) for name in recorded} | {
        "train_images_used": len(data),
        "train_fingerprint": data.fingerprint(),
        "processes": accelerator.num_processes,
    }


class RunFolder:
    """A run's files: `settings.json`, `log.jsonl` with one line an epoch, `last.pth`, `best.pth` and `state.pth`.

    A new run replaces the files of a finished one in the same folder, a resumed run goes on with them. `state.pth` is
    written when a stage begins, after every epoch and every `save_steps` steps; the state before it is kept as
    `state.previous.pth`. Of several processes the first writes; all read, so that they need the same folder.

    Args:
        settings: of the run; the folder is its `run_dir`.
        train_data: the training images and boxes, which a resumed run must have unchanged.
        accelerator: of the run.
        stages: the names of its stages, in order. The best checkpoint of each but the last is also kept as NAME.pth.

    Raises:
        InputError: with `resume`, other training data, settings that do not fit, or a state that cannot be read.
    """

    def __init__(
        self,
        settings: RunFlags,
        train_data: CocoData,
        accelerator: Accelerator,
        stages: tuple[str, ...] = ("only",),
    ):
        self.settings, self.path, self.accelerator = settings, Path(settings.run_dir), accelerator
        self.writes, self.stages = accelerator.is_main_process, stages
        self.best, self.best_score, self.log = self.path / "best.pth", -1.0, []
        self.run = {
            "settings": asdict(settings),
            "train_fingerprint": train_data.fingerprint(),
            "images_per_step": settings.batch_size * accelerator.num_processes,
        }
        self.saved = self._read_state() if settings.resume else None
        if self.saved:
            self._check_saved(self.saved)
            self.best_score, self.log = self.saved["best_score"], self.saved["log"]
        accelerator.wait_for_everyone()  # all have read what the first will now replace
        if self.writes:
            self._begin()

    def _begin(self) -> None:
        """Remove what does not belong to this run, and write the settings and the log so far."""
        (self.path / FINISHED).unlink(missing_ok=True)
        if not self.saved:
            for name in ("state.pth", "state.previous.pth"):
                (self.path / name).unlink(missing_ok=True)
        files = ("settings.json", "log.jsonl", "last.pth", "best.pth", "state.pth", *(f"{s}.pth" for s in self.stages))
        for name in files:
            remove_leftovers(self.path / name)
        with atomic_write(self.path / "settings.json", "w") as file:
            json.dump(self.run["settings"], file, indent=2)
        self._write_log()

    def is_past(self, stage: str) -> bool:
        """Was the resumed run already in a later stage?"""
        return bool(self.saved) and self.stages.index(stage) < self.stages.index(self.saved["train"]["stage"])

    def best_of(self, stage: str) -> Path:
        """The checkpoint of the best epoch up to the end of a stage."""
        self.accelerator.wait_for_everyone()
        return self.best if stage == self.stages[-1] else self.path / f"{stage}.pth"

    @contextmanager
    def keeping(self, state: TrainState) -> Iterator[None]:
        """Around the epochs of a stage: they start where a resumed run stopped, and a signal is obeyed between steps.

        Raises:
            Interrupted: with the state saved, and advice on how to go on.
            NotFiniteError: with a report of the step written to `not_finite_0.json` (1, … on further processes).
        """
        if self.saved and self.saved["train"]["stage"] == state.stage:
            state.load_state_dict(self.saved["train"])
            where = f"epoch {state.epoch + 1}, step {state.step + 1}"
            self.accelerator.print(f"going on in stage {state.stage} at {where}", flush=True)
        else:
            self.save(state)
        try:
            with finish_step_first():
                yield
        except Interrupted as interrupted:
            if not interrupted.at_once:
                self.save(state)
            interrupted.advice = self.advice
            raise
        except NotFiniteError as error:
            report = self.path / f"not_finite_{self.accelerator.process_index}.json"  # each process has its own images
            with atomic_write(report, "w") as file:
                json.dump(error.report, file, indent=2)
            raise

    @property
    def advice(self) -> str:
        return f"the run's state is in {self.path}; go on with the same command and --resume"

    def save_if_due(self, state: TrainState) -> None:
        """After a step: save the state every `--save-steps` steps."""
        if self.settings.save_steps and state.step % self.settings.save_steps == 0:
            self.save(state)

    def log_epoch(self, state: TrainState, checkpoint: Checkpoint) -> None:
        """Log the epoch, write `last.pth`, and `best.pth` where mAP@0.5 is the highest so far (the first of equals).

        Args:
            state: with the losses and the time of the epoch.
            checkpoint: the detector after this epoch, and its numbers.
        """
        losses, seconds = state.mean_losses(), state.seconds
        rounded = {name: round(value, 4) for name, value in losses.items()}
        line = {"stage": state.stage, "epoch": checkpoint.epoch, "loss": rounded, "val": checkpoint.metrics}
        self.log.append(line | {"seconds": round(seconds, 1)})
        score = checkpoint.metrics["AP50"] or 0.0
        is_best, self.best_score = score > self.best_score, max(score, self.best_score)
        if self.writes:
            terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            numbers = format_headline(checkpoint.metrics)
            tqdm.write(f"epoch {checkpoint.epoch}: loss {terms}; {numbers}; {seconds:.0f} s")
            save_detector(self.path / "last.pth", checkpoint)
            if is_best:
                save_detector(self.best, checkpoint)
                if state.stage != self.stages[-1]:
                    save_detector(self.path / f"{state.stage}.pth", checkpoint)
            self._write_log()

    def save(self, state: TrainState) -> None:
        """Write `state.pth`; what it held becomes `state.previous.pth`."""
        content = state.state_dict()
        self.accelerator.wait_for_everyone()
        if not self.writes:
            return
        content = self.run | {"best_score": self.best_score, "log": self.log, "train": content}
        path = self.path / "state.pth"
        with atomic_write(path) as file:
            torch.save(content | {"state_version": STATE_VERSION}, file)
            if path.is_file():
                path.replace(path.with_name("state.previous.pth"))

    def finish(self) -> None:
        """Mark the run as complete, so that a new run may replace it."""
        if self.writes:
            (self.path / FINISHED).touch()

    def _write_log(self) -> None:
        with atomic_write(self.path / "log.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.log)

    def _read_state(self) -> dict | None:
        """The last state that is whole; None where there is none at all."""
        paths = [path for name in ("state.pth", "state.previous.pth") if (path := self.path / name).is_file()]
        for path in paths:
            try:
                with zipfile.ZipFile(path) as parts:
                    if parts.testzip():  # torch does not look at the checksums
                        raise OSError("damaged")
                content = torch.load(path, map_location="cpu", weights_only=True)
                version = content["state_version"]
            except Exception:  # a damaged file raises whatever its bytes lead torch to
                self.accelerator.print(f"{path} is damaged; going back to the state before it", flush=True)
                continue
            if version != STATE_VERSION:
                raise InputError(f"{path} is of another version of this program; begin again in another --run-dir")
            return content
        if paths:
            raise InputError(f"no whole state in {self.path}: delete that folder, or begin again in another --run-dir")
        self.accelerator.print(f"nothing to resume in {self.path} yet: beginning", flush=True)
        return None

    def _check_saved(self, saved: dict) -> None:
        """Refuse to go on with what does not fit, and print the changes that matter."""
        before, now = saved["settings"], self.run["settings"]
        if saved["train_fingerprint"] != self.run["train_fingerprint"]:
            raise InputError(f"--resume: the run in {self.path} was trained on other images or boxes")
        rules = {field.name: field.metadata["on_resume"] for field in fields(self.settings)}
        changed = sorted(name for name in now if now[name] != before.get(name))
        words = {name: f"{flag_name(name)} (was {before.get(name)}, is {now[name]})" for name in changed}
        if refused := [words[name] for name in changed if rules[name] == "refuse"]:
            raise InputError(f"--resume: the run in {self.path} cannot go on with another {', '.join(refused)}")
        if saved["images_per_step"] != self.run["images_per_step"] and saved["train"]["step"]:
            raise InputError(
                f"--resume: the run in {self.path} stopped inside an epoch of {saved['images_per_step']} images a "
                f"step, over all processes, and not {self.run['images_per_step']}"
            )
        if warned := [words[name] for name in changed if rules[name] == "warn"]:
            changes = ", ".join(warned)
            self.accelerator.print(f"warning: these changes make it another run from here on: {changes}", flush=True)


def publish_best(run: RunFolder, val_loader: DataLoader, val_data: CocoData) -> dict[str, float | None]:
    """Validate the best epoch's checkpoint on all of `val_data`, write it to `--output` and return its numbers."""
    run.accelerator.wait_for_everyone()
    best, output = load_detector(run.best), run.settings.output
    model = run.accelerator.prepare_model(best.detector, evaluation_mode=True)
    val_loader = run.accelerator.prepare(val_loader)
    try:
        numbers = validate(model, val_loader, val_data, best.class_names, run.accelerator)
    except Interrupted as interrupted:
        interrupted.advice = run.advice
        raise
    if run.writes:
        remove_leftovers(Path(output))
        save_detector(output, replace(best, metrics=numbers))
        headline = format_headline(numbers)
        print(f"epoch {best.epoch} on {len(val_data)} validation images: {headline}; written to {output}")
    run.finish()
    return numbers
