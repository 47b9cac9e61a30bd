"""The folder of a training run: its log, its checkpoints, its state, and the choice of the best epoch."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import filelock
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.cli import flag, flag_texts
from common.console import InputError, Interrupted, NotFiniteError, finish_step_first
from common.data.memory import DetectionData
from common.evaluate.detect import validate
from common.evaluate.primary import format_headline
from common.files import atomic_write, check_outputs, check_writable, is_file, remove_leftovers
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import merged
from common.runtime import RuntimeFlags
from common.train.resume import check_resumable, read_state, state_files, write_state
from common.train.state import TrainState
from common.train.trackers import TRACKERS, Trackers, check_trackers

EPOCH_VAL_IMAGES = 100  # the first of the validation images, for the validation after each epoch
FINISHED = "finished"  # an empty file that marks a run as complete


@dataclass(frozen=True)
class RunFlags(RuntimeFlags):
    """Training run."""

    accumulate: int = flag(
        1, "batches a step, one after another: N need the memory of one, and one more forward pass", at_least=1
    )
    patience: int = flag(
        0, "end a stage after N epochs without a better mAP@0.5; 0 = never", at_least=0, on_resume="free"
    )
    log_with: tuple[str, ...] = flag(
        (), "trackers that the run is sent to; none = nothing is sent", choices=TRACKERS, on_resume="unrecorded"
    )
    deterministic: bool = flag(False, "the same numbers each time on a GPU too, slower", on_resume="free")
    resume: bool = flag(
        False, "continue the stopped run in --run-dir; start one if there is none", on_resume="unrecorded"
    )
    save_steps: int = flag(
        0, "also save the run's state every N steps, not only after each epoch", at_least=0, on_resume="unrecorded"
    )
    run_dir: str = flag("runs/detector", "folder for the run's log and its checkpoints", on_resume="free")
    output: str = flag("detector.pth", "the checkpoint to write", on_resume="free")

    def check_paths(self) -> None:
        """Check before hours of work that the output and the run folder can be written, and no run is overwritten.

        Raises:
            InputError: one of them cannot be written, or the folder has an unfinished run and `resume` is not set.
        """
        folder = Path(self.run_dir)
        if not self.resume and is_file(folder / "state.pth") and not is_file(folder / FINISHED):
            raise InputError(
                f"the run in {folder} is not finished: go on with --resume, name another --run-dir, or delete it"
            )
        check_trackers(self.log_with)
        check_writable(self.output)
        check_writable(folder / "state.pth")
        outputs = [Path(self.output), folder / "best.pth", folder / "last.pth"]
        check_outputs(outputs, flag_texts(self, "output", "run_dir"))


def training_conditions(settings: RunFlags, data: DetectionData, accelerator: Accelerator) -> dict:
    """The conditions of a run, for its checkpoints: the recorded settings, and the data and processes."""
    recorded = [field.name for field in fields(settings) if field.metadata["on_resume"] != "unrecorded"]
    return {name: getattr(settings, name) for name in recorded} | {
        "train_images_used": len(data),
        "train_fingerprint": data.fingerprint(),
        "processes": accelerator.num_processes,
    }


class RunFolder:
    """A run's files: `settings.json`, `log.jsonl` with one line an epoch, `last.pth`, `best.pth` and `state.pth`.

    A new run replaces the files of a finished one in the same folder, a resumed run continues with them. The state is
    written when a stage begins, after every epoch and every `save_steps` steps. Only the main process writes; all
    processes read, so that they need the same folder. The main process locks it as long as this object exists: the
    processes of a killed launcher (torchrun) may still be training.

    Args:
        settings: of the run; the folder is its `run_dir`.
        train_data: the training images and boxes, which must be the same in a resumed run.
        accelerator: of the run.
        stages: the names of its stages, in order. The best checkpoint of each but the last is also kept as NAME.pth.

    Raises:
        InputError: another run has locked the folder; or, with `resume`, other training data, settings that do not fit,
            or a state that cannot be read.
    """

    def __init__(
        self,
        settings: RunFlags,
        train_data: DetectionData,
        accelerator: Accelerator,
        stages: tuple[str, ...] = ("only",),
    ):
        self.settings, self.accelerator, self.stages = settings, accelerator, stages
        self.path = Path(settings.run_dir)
        self.best = self.path / "best.pth"
        self.run = {
            "settings": asdict(settings),
            "train_fingerprint": train_data.fingerprint(),
            "images_per_step": settings.batch_size * settings.accumulate * accelerator.num_processes,
        }
        if accelerator.is_main_process:
            self.lock = self._acquire_lock()
        accelerator.wait_for_everyone()  # nobody writes the state that all processes now read
        self.saved = read_state(self.path) if settings.resume else None
        if self.saved:
            check_resumable(self.run, self.saved, fields(settings))
        begun = self.saved or {"best_score": 0.0, "log": []}
        self.best_score: float = begun["best_score"]
        self.log: list[dict] = begun["log"]
        accelerator.wait_for_everyone()  # all processes have read the files that the main process now replaces
        if accelerator.is_main_process:
            self._prepare_folder()
        self.trackers = Trackers(settings.log_with if accelerator.is_main_process else (), self.path, asdict(settings))

    def _acquire_lock(self) -> filelock.BaseFileLock:
        lock = filelock.FileLock(self.path / "lock", is_singleton=True)  # a later run of this process may go on
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise InputError(
                f"another process is training in {self.path}: wait for it, stop it, or name another --run-dir"
            ) from error
        return lock

    def _prepare_folder(self) -> None:
        """Remove the files of other runs, and write the settings and the log so far."""
        (self.path / FINISHED).unlink(missing_ok=True)
        for path in () if self.saved else state_files(self.path):
            path.unlink(missing_ok=True)
        checkpoints = (f"{name}.pth" for name in ("last", "best", "state", *self.stages))
        for name in ("settings.json", "log.jsonl", *checkpoints):
            remove_leftovers(self.path / name)
        with atomic_write(self.path / "settings.json", "w") as file:
            json.dump(self.run["settings"] | {"train_fingerprint": self.run["train_fingerprint"]}, file, indent=2)
        self._write_log()

    def is_past(self, stage: str) -> bool:
        """Whether the resumed run was already in a later stage."""
        return self.saved is not None and self.stages.index(stage) < self.stages.index(self.saved["train"]["stage"])

    def best_of(self, stage: str) -> Path:
        """The checkpoint of the best epoch up to the end of a stage."""
        self.accelerator.wait_for_everyone()
        return self.best if stage == self.stages[-1] else self.path / f"{stage}.pth"

    @contextmanager
    def resumable(self, state: TrainState) -> Iterator[None]:
        """Around the epochs of a stage: load the saved state of a resumed run, and save the state after a signal.

        Raises:
            Interrupted: with the state saved, and advice on how to resume.
            NotFiniteError: with a report of the step written to `not_finite_0.json` (1, … on further processes).
        """
        if self.saved and self.saved["train"]["stage"] == state.stage:
            state.load_state_dict(self.saved["train"])
            print(f"resuming stage {state.stage} at epoch {state.epoch + 1}, step {state.step + 1}", flush=True)
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

    def after_step(self, state: TrainState) -> None:
        """Send the step to the trackers, if any, and save the state every `--save-steps` steps."""
        if self.trackers:
            losses = {f"loss/{name}": value.item() for name, value in state.step_losses.items()}
            rates = [float(rate) for rate in state.schedule.get_last_lr()]
            self.trackers.log(losses | {"lr/highest": max(rates), "lr/lowest": min(rates)}, state.total_steps)
        if self.settings.save_steps and state.step % self.settings.save_steps == 0:
            self.save(state)

    def log_epoch(
        self, state: TrainState, checkpoint: Checkpoint, draw: Callable[[], Image.Image] | None = None
    ) -> None:
        """Log the epoch, send it to the trackers, and write `last.pth`, and `best.pth` where mAP@0.5 is the highest.

        Of epochs with equal mAP@0.5 the last is the best one, so that `best.pth` equals `last.pth` where mAP@0.5 is
        always 0 or does not exist, as on images without boxes.

        Args:
            state: with the losses and the time of the epoch.
            checkpoint: the detector after this epoch, and its numbers. Low-rank changes are merged where it is written.
            draw: makes an image of its detections, which trackers receive.
        """
        losses = state.mean_losses()
        rounded = {name: round(value, 4) for name, value in losses.items()}
        line = {"stage": state.stage, "epoch": checkpoint.epoch, "loss": rounded, "val": checkpoint.metrics}
        self.log.append(line | {"seconds": round(state.seconds, 1)})
        score = _score(checkpoint.metrics)
        is_best, self.best_score = score >= self.best_score, max(score, self.best_score)
        if not self.accelerator.is_main_process:
            return
        self.trackers.log({f"validation/{k}": v for k, v in checkpoint.metrics.items()}, state.total_steps)
        if draw:
            self.trackers.log_image("detections", draw, state.total_steps)
        terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        numbers = format_headline(checkpoint.metrics)
        tqdm.write(f"epoch {checkpoint.epoch}: loss {terms}; {numbers}; {state.seconds:.0f} s")
        checkpoint = replace(checkpoint, detector=merged(checkpoint.detector))
        save_detector(self.path / "last.pth", checkpoint)
        if is_best:
            save_detector(self.best, checkpoint)
            if state.stage != self.stages[-1]:
                save_detector(self.path / f"{state.stage}.pth", checkpoint)
        self._write_log()

    def has_stalled(self, stage: str) -> bool:
        """Whether the last `--patience` epochs of a stage brought no better mAP@0.5 than those before them."""
        scores = [_score(line["val"]) for line in self.log if line["stage"] == stage]
        patience = self.settings.patience
        return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])

    def save(self, state: TrainState) -> None:
        """Write the state of the run."""
        content = state.state_dict()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_state(self.path, self.run | {"best_score": self.best_score, "log": self.log, "train": content})

    def _write_log(self) -> None:
        with atomic_write(self.path / "log.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.log)


def _score(metrics: dict) -> float:
    """mAP@0.5, 0 also for None and NaN."""
    return max(0.0, metrics["AP50"] or 0.0)


def quick_validation(val_data: DetectionData) -> DetectionData:
    """The images for the validation after each epoch: the first `EPOCH_VAL_IMAGES`.

    Prints a warning where they have no object, by which the best epoch could be chosen, although later images have.
    """
    quick = val_data.first(EPOCH_VAL_IMAGES)
    if quick.crowd.all() and not val_data.crowd.all():
        print(
            f"warning: {val_data.source}: no object on the first {len(quick)} validation images, on which the best "
            "epoch is chosen: the last epoch will be kept; --image-ids can put other images first",
            flush=True,
        )
    return quick


def _warn_of_equal_epochs(log: list[dict]) -> None:
    """Print a warning where mAP@0.5 is the same after every epoch, and so has not chosen one of them."""
    scores = {line["val"]["AP50"] for line in log}
    if len(log) > 1 and len(scores) == 1:
        value = scores.pop()
        text = "could not be computed after any" if value is None else f"was {value:.3f} after every"
        print(f"warning: mAP@0.5 {text} epoch: the last epoch is kept", flush=True)


def publish_best(run: RunFolder, val_loader: DataLoader, val_data: DetectionData) -> dict[str, float | None]:
    """Validate the best checkpoint on all of `val_data`, write it to `--output`, and mark the run as finished.

    Returns:
        Its headline numbers.
    """
    run.accelerator.wait_for_everyone()
    best, output = load_checkpoint(run.best), run.settings.output
    model = run.accelerator.prepare_model(best.detector, evaluation_mode=True)
    val_loader = run.accelerator.prepare(val_loader)
    try:
        numbers, _ = validate(model, val_loader, val_data, best.class_names, run.accelerator)
    except Interrupted as interrupted:
        interrupted.advice = run.advice
        raise
    if run.accelerator.is_main_process:
        remove_leftovers(Path(output))
        save_detector(output, replace(best, metrics=numbers))
        headline = format_headline(numbers)
        _warn_of_equal_epochs(run.log)
        print(f"epoch {best.epoch} on {len(val_data)} validation images: {headline}; written to {output}")
        (run.path / FINISHED).touch()
    run.trackers.log({f"final/{name}": number for name, number in numbers.items()}, run.trackers.step)
    run.trackers.finish()
    return numbers
