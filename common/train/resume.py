"""The state file of a training run, and the conditions for resuming it.

On a CPU, a resumed run computes the same bits as the uninterrupted one: weights, optimizer, schedule, average and
position are saved, and all random numbers are functions of (seed, epoch, step or image, process).
"""

import zipfile
from dataclasses import Field
from pathlib import Path

import torch

from common.cli import ON_RESUME, flag_name
from common.console import InputError
from common.files import atomic_write

STATE_VERSION = 3


def state_files(folder: Path) -> tuple[Path, Path]:
    """The files of the last state of the run in `folder`, and of the state before it."""
    return folder / "state.pth", folder / "state.previous.pth"


def write_state(folder: Path, content: dict) -> None:
    """Write `state.pth`; its former content becomes `state.previous.pth`.

    Args:
        folder: of the run.
        content: tensors and plain types.
    """
    path, previous = state_files(folder)
    with atomic_write(path) as file:
        torch.save(content | {"state_version": STATE_VERSION}, file)
        if path.is_file():
            path.replace(previous)


def read_state(folder: Path) -> dict | None:
    """The last undamaged state of the run in `folder`; None where there is no state at all.

    Raises:
        InputError: every state is damaged, or the state is of another version of this program.
    """
    existing = [path for path in state_files(folder) if path.is_file()]
    for path in existing:
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch does not verify the checksums
                    raise zipfile.BadZipFile
            content = torch.load(path, map_location="cpu", weights_only=True)
            version = content["state_version"]
        except Exception:  # torch documents few of the errors that damaged files raise
            print(f"{path} is damaged; resuming from the previous state", flush=True)
            continue
        if version != STATE_VERSION:
            raise InputError(f"{path} is of another version of this program; start again in another --run-dir")
        return content
    if existing:
        raise InputError(f"every state in {folder} is damaged: delete that folder, or name another --run-dir")
    print(f"nothing to resume in {folder} yet: starting", flush=True)
    return None


def check_resumable(run: dict, saved: dict, flags: tuple[Field, ...]) -> None:
    """Check that a run fits a saved state, and print the changed settings that affect its results.

    Args:
        run: the settings by name, and the fingerprint and batch size; see `RunFolder`.
        saved: the state, which contains the same of the saved run.
        flags: of the settings.

    Raises:
        InputError: other training data, other settings whose `on_resume` is "refuse", or another batch size in the
            middle of an epoch.
    """
    refusal = f"--resume: the run in {run['settings']['run_dir']}"
    if saved["train_fingerprint"] != run["train_fingerprint"]:
        raise InputError(f"{refusal} was trained on other images or boxes")
    changes: dict[str, list[str]] = {rule: [] for rule in ON_RESUME}
    for flag in sorted(flags, key=lambda flag: flag.name):
        before, now = saved["settings"].get(flag.name), run["settings"][flag.name]
        if now != before:
            changes[flag.metadata["on_resume"]].append(f"{flag_name(flag.name)} (was {before}, is {now})")
    if changes["refuse"]:
        raise InputError(f"{refusal} cannot continue with another {', '.join(changes['refuse'])}")
    before, now = saved["images_per_step"], run["images_per_step"]
    if now != before and saved["train"]["step"]:
        raise InputError(f"{refusal} stopped inside an epoch of {before} images a step on all processes, not {now}")
    if changes["warn"]:
        print(f"warning: these changes make it another run from here on: {', '.join(changes['warn'])}", flush=True)
