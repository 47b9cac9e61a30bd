"""The detections of many images in a file that grows: result, progress, and what a stopped run goes on from."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import filelock

from common.console import InputError, first_few
from common.files import PROGRAM, atomic_write, remove_leftovers
from common.model import TrainedDetector

FORMAT_VERSION = 1
NAME, LOCK = "detections.jsonl", "lock"
OF_A_COMMAND = ("detector", "batch_size")  # what may be another where a run goes on


class Line(NamedTuple):
    """Where an image's line is, and what it says of the file."""

    start: int  # bytes
    end: int
    state: list[int] | None  # of `state_of`
    is_error: bool


def state_of(path: Path) -> list[int] | None:
    """Size and time of change of a file, by which another of its name is told; None where there is none."""
    try:
        return [path.stat().st_size, path.stat().st_mtime_ns]
    except OSError:
        return None


class Journal:
    """FOLDER/detections.jsonl: a line that describes the detector, then one for each image, written in batches.

    Raises InputError: the folder has files of others, is in use, cannot be written to, or holds the detections of
    another detector, or from another score on.
    """

    def __init__(self, folder: Path, name: str, detector: TrainedDetector, min_score: float, batch_size: int):
        self.path, self.lines = folder / NAME, dict[str, Line]()
        content = {file.name for file in folder.iterdir()} if folder.is_dir() else set[str]()
        if content - {LOCK} and NAME not in content:
            raise InputError(f"{folder} has no {NAME}, but other content: name another --output")
        header = {"format_version": FORMAT_VERSION, "program": PROGRAM, "detector": name, "batch_size": batch_size}
        header |= {"min_score": min_score, "class_names": detector.class_names, "precision": detector.precision}
        self.header = json.loads(json.dumps(header | {"trained": detector.conditions()}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / LOCK)
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise InputError(f"another process writes into {folder}: wait, or name another --output") from error
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error

    def __enter__(self) -> "Journal":
        for folder in (self.path.parent, self.path.with_name("labels")):
            remove_leftovers(folder)
        try:
            for start, line in self._lines():
                content = json.loads(line)
                if start:
                    is_error = "error" in content or not content["width"]
                    self.lines[content["file"]] = Line(start, start + len(line), content["state"], is_error)
                else:
                    self._check(content)
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(f"{self.path} is damaged: delete its folder, or name another --output") from error
        return self

    def __exit__(self, *_error: object) -> None:
        self.lock.release()

    def _check(self, header: dict) -> None:
        changed = [key for key in self.header if key not in OF_A_COMMAND and header[key] != self.header[key]]
        if changed:
            raise InputError(f"{self.path} was begun with another {', '.join(changed)}: name another --output")
        self.header = header

    def missing(self, files: Mapping[str, Path]) -> list[str]:
        """The images to detect: without a line, changed, or, where all have a line, those that could not be read.

        An incomplete last batch begins anew: the last digits of an image's numbers depend on its batch, and a killed
        run shall end as one that was not. Raises InputError for lines of other images.
        """
        if others := sorted(self.lines.keys() - files.keys()):
            about = f"{self.path} has {len(others)} images that are not named now ({first_few(others)})"
            raise InputError(f"{about}: name them too, or another --output")
        again = {name for name, line in self.lines.items() if line.state != state_of(files[name])}
        if len(self.lines) < len(files):
            again |= set(list(self.lines)[len(self.lines) - len(self.lines) % self.header["batch_size"] :])
        else:
            again |= {name for name, line in self.lines.items() if line.is_error}
        self._rewrite([name for name in self.lines if name not in again])
        return [name for name in files if name not in self.lines]

    def append(self, rows: Iterable[dict]) -> None:
        """Write the lines of a batch."""
        with self.path.open("ab") as file:
            for row in rows:
                start = file.tell()
                file.write(f"{json.dumps(row)}\n".encode())
                self.lines[row["file"]] = Line(start, file.tell(), row["state"], "error" in row)

    def sort(self) -> None:
        """Bring the lines into the order of the names."""
        self._rewrite(sorted(self.lines))

    def _rewrite(self, names: list[str]) -> None:
        """Keep the lines of these images alone, in this order; a file that has just these stays."""
        kept = dict[str, Line]()
        if self.lines and names == [*self.lines] and self.path.stat().st_size == self.lines[names[-1]].end:
            return
        with atomic_write(self.path) as new, (self.path if self.lines else Path(os.devnull)).open("rb") as old:
            new.write(f"{json.dumps(self.header)}\n".encode())
            for name in names:
                line, start = self.lines[name], new.tell()
                old.seek(line.start)
                new.write(old.read(line.end - line.start))
                kept[name] = line._replace(start=start, end=new.tell())
        self.lines = kept

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines, and where they begin, without the one that a kill has cut."""
        start = 0
        for line in self.path.open("rb") if self.path.exists() else ():
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)

    def rows(self) -> Iterator[dict]:
        """The lines of the images, one at a time."""
        for start, line in self._lines():
            if start:
                yield json.loads(line)
