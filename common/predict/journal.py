"""The detections of many images in a file that grows: result, progress, and what a stopped run goes on from."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import filelock

from common.console import InputError
from common.files import PROGRAM
from common.model import TrainedDetector

FORMAT_VERSION = 1
NAME = "detections.jsonl"


class Journal:
    """FOLDER/detections.jsonl: a line that describes the detector, then one for each image, written in batches.

    Raises InputError: the folder has files of others, is in use, cannot be written to, or holds the detections of
    another detector, or from another score on.
    """

    def __init__(self, folder: Path, name: str, detector: TrainedDetector, min_score: float):
        self.path = folder / NAME
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not self.path.is_file())):
            raise InputError(f"{folder} has no {NAME}, but other content: name another --output")
        header = {"format_version": FORMAT_VERSION, "program": PROGRAM, "detector": name, "min_score": min_score}
        used = {"class_names": detector.class_names, "precision": detector.precision, "trained": detector.conditions()}
        self.header = json.loads(json.dumps(header | used))
        self.ends: dict[str, int] = {"": 0}  # of the first line, and of those of the images by name, in bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / "lock")
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise InputError(f"another process writes into {folder}: wait, or name another --output") from error
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error

    def __enter__(self) -> "Journal":
        end = 0
        try:
            for line in self.path.open("rb") if self.path.exists() else ():
                if line.endswith(b"\n"):  # not cut by a kill
                    content, is_first, end = json.loads(line), not end, end + len(line)
                    if is_first:
                        self._check(content)
                    self.ends["" if is_first else content["file"]] = end
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(f"{self.path} is damaged: delete it, or name another --output") from error
        with self.path.open("ab") as file:
            file.truncate(end)
            if not end:
                self.ends[""] = file.write(f"{json.dumps(self.header)}\n".encode())
        return self

    def __exit__(self, *_error: object) -> None:
        self.lock.release()

    def _check(self, header: dict) -> None:
        if changed := [key for key in self.header if key != "detector" and header[key] != self.header[key]]:
            raise InputError(f"{self.path} was begun with another {', '.join(changed)}: name another --output")

    def missing(self, names: Collection[str], batch_size: int) -> list[str]:
        """The names without a line.

        An incomplete last batch begins anew: the last digits of an image's numbers depend on its batch, and a killed
        run shall end as one that was not.
        """
        rest = (len(self.ends) - 1) % batch_size
        if rest and not set(names) <= self.ends.keys():
            for name in list(self.ends)[-rest:]:
                del self.ends[name]
            os.truncate(self.path, max(self.ends.values()))
        return [name for name in names if name not in self.ends]

    def append(self, rows: Iterable[dict]) -> None:
        """Write the lines of a batch."""
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        with self.path.open("a") as file:
            file.write(lines)

    def rows(self) -> Iterator[dict]:
        """The lines of the images, one at a time."""
        with self.path.open() as file:
            next(file)
            yield from map(json.loads, file)
