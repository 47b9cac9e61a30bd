"""Files that are either whole or absent, and the folder for what can be made or fetched again."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.console import InputError


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; flush it to disk and rename it over `path` when the block succeeds.

    Where the block fails, `path` stays as it was. Missing folders are made.

    Raises:
        InputError: the folder can't be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(mode, dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the file raised
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path, age: float = 0.0) -> None:
    """Delete what killed writers of `path` left beside it, not written to for `age` seconds."""
    for leftover in path.parent.glob(f".{path.name}.????????"):
        if time.time() - leftover.stat().st_mtime >= age:
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill an empty folder beside `folder`, which takes its place when the block succeeds.

    Where another process was faster, its folder stays and this one's is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        yield made
        if not folder.is_dir():
            made.rename(folder)


def check_writable(path: str | Path) -> None:
    """Before hours of work: can `path` be written in the end? Makes missing folders.

    Raises:
        InputError: it is a folder, or its folder can't be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def is_file(path: Path) -> bool:
    """Is there such a file? None has a name that no file system would take, of which pathlib makes an error."""
    try:
        return path.is_file()
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder(*parts: str) -> Path:
    """`$DETECTION_CACHE`, else `dinov2-detection` in the user's cache folder, with `parts` below it (not made)."""
    root = os.environ.get("DETECTION_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(root, *parts) if root else base.joinpath("dinov2-detection", *parts)


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
