"""A training run's folder: its log, its checkpoints, and the state from which a stopped run goes on.

What a resumed run computes is, to the bit, what the uninterrupted one would have: weights, optimizer, schedule, average
and position are kept, and all random numbers are functions of (seed, epoch, step or image, process).
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.console import InputError, Interrupted, NotFiniteError, finish_step_first
from common.data.coco import CocoData
from common.evaluate.coco_metrics import in_words
from common.evaluate.detect import validate
from common.files import atomic_write, remove_leftovers
from common.model.checkpoint import Checkpoint, load_detector, save_detector
from common.train.state import Progress

STATE_VERSION = 1
# Settings that a resumed run may change without a word, as they change no number; of the data, the fingerprint counts.
FREE = {"resume", "output", "run_dir", "workers", "strict", "save_steps", "stop_after", "deterministic"}
FREE |= {"data", "train_json", "val_json", "train_images_dir", "val_images_dir", "image_ids", "train_images"}
FREE |= {"sample_seed", "box_format", "feature_cache_limit"}
# Settings that it may not change: the weights and their optimizer's memory would not fit.
FIXED = {"backbone", "blocks", "image_size", "head", "dropout", "start_from"}
FIXED |= {"freeze_backbone", "unfreeze_blocks", "layer_decay", "head_lr_factor"}


class RunFolder:
    """A run's files: `settings.json`, `log.jsonl` with one line an epoch, `last.pth`, `best.pth` and `state.pth`.

    A new run replaces the files of an earlier one in the same folder, a resumed run goes on with them. `state.pth` is
    written when a stage begins, after every epoch and every `save_steps` steps; the one before it stays beside it as
    `state.previous.pth`. Of several processes the first writes; all read, so they need the same folder.

    Args:
        path: the folder.
        settings: of the run, plain types. With `resume` it goes on from `state.pth`, or begins where there is none.
        fingerprint: of the training images and boxes.
        accelerator: of the run.
        stages: the names of its stages, in order. The best of each but the last is also kept as NAME.pth.

    Raises:
        InputError: `resume` with other training data, settings that do not fit, or a state that can't be read.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict,
        fingerprint: str,
        accelerator: Accelerator,
        stages: tuple[str, ...] = ("only",),
    ):
        self.path, self.accelerator, self.writes = Path(path), accelerator, accelerator.is_main_process
        self.best, self.best_score, self.log = self.path / "best.pth", -1.0, []
        self.save_steps, self.stages = settings["save_steps"], stages
        self.run = {
            "settings": settings,
            "train_fingerprint": fingerprint,
            "at_once": settings["batch_size"] * accelerator.num_processes,
        }
        self.saved = self._read_state() if settings["resume"] else None
        if self.saved:
            self._check_saved()
            self.best_score, self.log = self.saved["best_score"], self.saved["log"]
        accelerator.wait_for_everyone()  # all have read what the first will now replace
        if self.writes:
            if not self.saved:
                for name in ("state.pth", "state.previous.pth"):
                    (self.path / name).unlink(missing_ok=True)
            for name in ("settings.json", "log.jsonl", "last.pth", "state.pth", *(f"{stage}.pth" for stage in stages)):
                remove_leftovers(self.path / name)
            remove_leftovers(self.best)
            with atomic_write(self.path / "settings.json", "w") as file:
                json.dump(settings, file, indent=2)
            self._write_log()

    def has_passed(self, stage: str) -> bool:
        """Did the run that is resumed stand in a later stage already?"""
        return bool(self.saved) and self.stages.index(stage) < self.stages.index(self.saved["progress"]["stage"])

    def best_of(self, stage: str) -> Path:
        """The checkpoint of the best epoch up to the end of a stage."""
        self.accelerator.wait_for_everyone()
        return self.best if stage == self.stages[-1] else self.path / f"{stage}.pth"

    @contextmanager
    def keeping(self, progress: Progress) -> Iterator[None]:
        """Around the epochs of a stage: they start where a resumed run stopped, and a signal is obeyed between steps.

        Raises:
            Interrupted: with the state saved and advice how to go on.
            NotFiniteError: with what is known of the step written to `not_finite_0.json` (1, … on further processes).
        """
        if self.saved and self.saved["progress"]["stage"] == progress.stage:
            progress.load_state_dict(self.saved["progress"])
            where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
            self.accelerator.print(f"going on in stage {progress.stage} at {where}", flush=True)
        else:
            self.save(progress)
        try:
            with finish_step_first():
                yield
        except Interrupted as interrupted:
            if not interrupted.at_once:
                self.save(progress)
            interrupted.advice = self.advice
            raise
        except NotFiniteError as error:
            # Each process has images of its own.
            report = self.path / f"not_finite_{self.accelerator.process_index}.json"
            with atomic_write(report, "w") as file:
                json.dump(error.report, file, indent=2)
            raise

    @property
    def advice(self) -> str:
        return f"the run's state is in {self.path}; go on with the same command and --resume"

    def after_step(self, progress: Progress) -> None:
        """Save the state where that is due."""
        if self.save_steps and progress.step % self.save_steps == 0:
            self.save(progress)

    def finish_epoch(self, progress: Progress, checkpoint: Checkpoint) -> None:
        """Log the epoch, write `last.pth`, and `best.pth` where mAP@0.5 is the highest so far (the first of equals).

        Args:
            progress: with the epoch's losses and time.
            checkpoint: the detector after this epoch, and its numbers.
        """
        losses, seconds = progress.mean_losses(), progress.seconds
        rounded = {name: round(value, 4) for name, value in losses.items()}
        line = {"stage": progress.stage, "epoch": checkpoint.epoch, "loss": rounded, "val": checkpoint.metrics}
        self.log.append(line | {"seconds": round(seconds, 1)})
        score = checkpoint.metrics["AP50"] or 0.0
        is_best, self.best_score = score > self.best_score, max(score, self.best_score)
        if self.writes:
            terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            tqdm.write(f"epoch {checkpoint.epoch}: loss {terms}; {in_words(checkpoint.metrics)}; {seconds:.0f} s")
            save_detector(self.path / "last.pth", checkpoint)
            if is_best:
                save_detector(self.best, checkpoint)
                if progress.stage != self.stages[-1]:
                    save_detector(self.path / f"{progress.stage}.pth", checkpoint)
            self._write_log()

    def save(self, progress: Progress) -> None:
        """Write `state.pth`; what it held becomes `state.previous.pth`."""
        self.accelerator.wait_for_everyone()
        if not self.writes:
            return
        content = self.run | {"best_score": self.best_score, "log": self.log, "progress": progress.state_dict()}
        state = self.path / "state.pth"
        with atomic_write(state) as file:
            torch.save(content | {"state_version": STATE_VERSION}, file)
            if state.is_file():
                state.replace(state.with_name("state.previous.pth"))

    def _write_log(self) -> None:
        with atomic_write(self.path / "log.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.log)

    def _read_state(self) -> dict | None:
        """The last state that is whole; None where there is none at all."""
        paths = [path for name in ("state.pth", "state.previous.pth") if (path := self.path / name).is_file()]
        for path in paths:
            try:
                with zipfile.ZipFile(path) as parts:
                    if parts.testzip():  # torch does not look at the check sums
                        raise OSError("damaged")
                content = torch.load(path, map_location="cpu", weights_only=True)
                if content["state_version"] == STATE_VERSION:
                    return content
                raise InputError(f"{path} is of another version of this program; begin again, without --resume")
            except InputError:
                raise
            except Exception:  # a damaged file fails in as many ways as there are bytes
                self.accelerator.print(f"{path} is damaged; going back to the state before it", flush=True)
        if paths:
            raise InputError(f"no whole state in {self.path}: begin again, without --resume")
        self.accelerator.print(f"nothing to resume in {self.path} yet: beginning", flush=True)
        return None

    def _check_saved(self) -> None:
        """Refuse to go on with what does not fit, and say which changes count."""
        before, now = self.saved["settings"], self.run["settings"]
        if self.saved["train_fingerprint"] != self.run["train_fingerprint"]:
            raise InputError(f"--resume: the run in {self.path} was trained on other images or boxes")
        changed = sorted(key for key in now if now[key] != before.get(key) and key not in FREE)
        words = {key: f"--{key.replace('_', '-')} (was {before.get(key)}, is {now[key]})" for key in changed}
        if fixed := [words[key] for key in changed if key in FIXED]:
            raise InputError(f"--resume: the run in {self.path} cannot go on with another {', '.join(fixed)}")
        if self.saved["at_once"] != self.run["at_once"] and self.saved["progress"]["step"]:
            raise InputError(
                f"--resume: the run in {self.path} stopped inside an epoch of {self.saved['at_once']} images a step, "
                f"over all processes, and not {self.run['at_once']}"
            )
        if changed:
            told = ", ".join(words.values())
            self.accelerator.print(f"warning: these changes make it another run from here on: {told}", flush=True)


def publish_best(
    run: RunFolder, val_loader: DataLoader, val_data: CocoData, output: str | Path
) -> dict[str, float | None]:
    """Validate the best epoch's checkpoint on all of `val_data`, write it to `output` and return its numbers."""
    run.accelerator.wait_for_everyone()
    best = load_detector(run.best)
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
        print(f"epoch {best.epoch} on {len(val_data)} validation images: {in_words(numbers)}; written to {output}")
    return numbers
