"""Files that are complete or absent, and the cache folder."""

import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.console import InputError


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; flush it to disk and rename it over `path` when the block succeeds.

    When the block fails, `path` is unchanged. Missing parent folders are created.

    Raises:
        InputError: the folder can't be created or written to, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding, prefix = None if "b" in mode else "utf-8", _temporary_prefix(path)
        with tempfile.NamedTemporaryFile(mode, -1, encoding, dir=path.parent, prefix=prefix, delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _temporary_prefix(path: Path) -> str:
    """Of the names of temporary files for `path`; a file system takes 255 bytes, a letter has up to four."""
    return f".{path.name[:60]}."


def remove_leftovers(path: Path, age: float = 0.0) -> None:
    """Delete temporary files of `path` that killed processes left behind, unmodified for `age` seconds."""
    for leftover in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}????????"):
        if time.time() - leftover.stat().st_mtime >= age:
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder beside `folder` and rename it to `folder` when the block succeeds.

    When another process has created `folder` in the meantime, that one stays and this one is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        yield made
        if not folder.is_dir():
            made.rename(folder)


def check_writable(path: str | Path) -> None:
    """Check before hours of work that `path` can be written at their end; creates missing parent folders.

    Raises:
        InputError: `path` is a folder, or its folder can't be created or written to.
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


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Check before the work that it overwrites no input, also by a link or another spelling of the path.

    Args:
        outputs: the files that will be written.
        inputs: the files that are read; names of files that do not exist are ignored.

    Raises:
        InputError: an output is an input file, or two outputs are one file, on some systems because only case differs.
    """
    places: dict[str, Path] = {}
    for path in outputs:
        if (other := places.setdefault(os.path.realpath(path).casefold(), path)) is not path:
            raise InputError(f"{other} and {path} would be written to one file: give them different names")
    existing = {identity: path for path in places.values() if (identity := _identity(path))}
    for read in inputs if existing else ():
        identity = _identity(Path(read))
        if identity in existing:
            raise InputError(f"the output {existing[identity]} would overwrite the input {read}: name another output")


def is_same_file(path: Path, other: Path) -> bool:
    """Whether both paths lead to one existing file."""
    return (identity := _identity(path)) is not None and identity == _identity(other)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of an existing file, the same under all its paths; None where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_file(path: Path) -> bool:
    """Whether the file exists; False for names that the file system can't hold, for which pathlib raises OSError."""
    try:
        return path.is_file()
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder(*parts: str) -> Path:
    """`$DETECTION_CACHE`, else `dinov2-detection` in the user's cache folder, with `parts` below it (not created).

    Raises:
        InputError: the environment names no cache folder and the user has no home folder.
    """
    if root := os.environ.get("DETECTION_CACHE"):
        return Path(root, *parts).expanduser()  # files such as .env keep the ~
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise InputError("this user has no home folder for the cache: set DETECTION_CACHE to a folder") from error
    return base.joinpath("dinov2-detection", *parts)


def ensure_home() -> None:
    """Make `$DETECTION_CACHE` the home folder of a user who has none, since libraries stop without one."""
    try:
        Path.home()
    except RuntimeError:
        if root := os.environ.get("DETECTION_CACHE"):
            os.environ["HOME"] = str(Path(root).absolute())


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
