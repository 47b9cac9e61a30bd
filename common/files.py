"""Files that are complete or absent, and the cache folder."""

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from common.console import InputError, Interrupted

PROGRAM = "dinov2-detection"  # in the metadata of charts, reports and annotated images
SIGNS = re.compile(  # how its files begin; an empty one may be replaced, too
    rb'(?s)\Z|\[\]\Z|\[\{"image_id": .*"category_name": |\{\n  "format_version": \d+,\n  "protocol": '  # results
    rb'|\{\n  "data": [^\n]*\n  "val_json": |\{"stage": "\w+", "epoch": 1, '  # settings and log of a run
    rb"|PK.*data\.pkl.{,40}(format_version.{,20}model_config|description.{,20}data)"  # a checkpoint, the state of a run
    rb"|.*" + PROGRAM.encode()  # metadata
)


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`, which replaces it when the block succeeds; else `path` is unchanged.

    Missing folders are created. Raises InputError where they can't be written to, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own
        if isinstance(cause, Interrupted):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A hidden name beside `path`, of this thread; a file system takes 255 bytes, a letter has up to four."""
    return path.with_name(f".{path.name[:60]}.{threading.get_native_id()}.tmp")


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Delete temporary files that killed processes left in a folder, unmodified for `age` seconds."""
    for leftover in folder.glob(".*.[0-9]*.tmp"):
        with suppress(FileNotFoundError):  # its process has renamed it in the meantime
            if time.time() - leftover.stat().st_mtime >= age:
                leftover.unlink()


def link_or_copy(source: Path, path: Path) -> None:
    """Make `path` another name of a file that is never changed, only replaced; a copy where there are no links."""
    temporary = _temporary(path)
    try:
        temporary.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(path)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that becomes `folder`, of the cache, unless another process was faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            yield made
            made.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # it is where another process was faster
            raise InputError(f"cannot write {folder}: {error.strerror or error}: set DETECTION_CACHE") from error


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Check before hours of work that its outputs can be written; missing folders are created.

    Raises:
        InputError: an output can't be written, is one of the `inputs`, by whatever name or link, or a file that this
            program did not write; or two outputs are one file, on some systems because only case differs.
    """
    places: dict[str, Path] = {}
    for path in outputs:
        if (other := places.setdefault(os.path.realpath(path).casefold(), path)) is not path:
            raise InputError(f"{other} and {path} would be written to one file: give them different names")
    existing = [path for path in places.values() if path.is_file()]
    for read in inputs if existing else ():
        if written := next((path for path in existing if is_same_file(path, Path(read))), None):
            raise InputError(f"the output {written} would overwrite the input {read}: name another output")
    for path in existing:
        with path.open("rb") as file:
            if not SIGNS.match(file.read(1000)):
                raise InputError(f"{path} was not written by this program: move it, or name another output")
    for path in places.values():
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is a folder or a device")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def is_same_file(path: Path, other: Path) -> bool:
    """Whether both paths lead to one existing file; False for names that the file system can't hold."""
    with suppress(OSError, ValueError):
        return path.samefile(other)
    return False


def cache_folder(*parts: str) -> Path:
    """`$DETECTION_CACHE`, else `dinov2-detection` in the user's cache folder, with `parts` below it (not created)."""
    try:
        if root := os.environ.get("DETECTION_CACHE"):
            return Path(root, *parts).expanduser()  # files such as .env keep the ~
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", PROGRAM, *parts)
    except RuntimeError as error:
        raise InputError("this user has no home folder for the cache: set DETECTION_CACHE to a folder") from error
