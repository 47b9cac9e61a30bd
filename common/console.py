"""How a program talks to its user: errors, progress bars, signals. Imports no torch."""

import importlib.util
import logging
import os
import signal
import sys
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

NAMED = 3  # ids or names in a message


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to correct it.

    `cli.run` prints it and exits with status 2; any other exception that reaches the user is a bug.
    """


class NotFiniteError(InputError):
    """A loss or gradient in training is inf or NaN; `report` describes the step in plain types."""

    def __init__(self, message: str, report: dict):
        super().__init__(message)
        self.report = report


def check_packages(user: str, *packages: str) -> None:
    """Raises InputError where a package is not installed that `user` needs, a flag or a program."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"{user} needs its package{'s' * (len(missing) > 1)}: pip install {' '.join(missing)}")


def last_line(error: BaseException) -> str:
    """The last line of an error's message, its type where the message is empty.

    A data-loading worker's error carries a traceback, which ends in the message itself.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def name_some(values: Sequence[object], width: int = 40) -> str:
    """The first few of the values, each cut to `width` characters, for a message."""
    texts = [str(value)[:width] for value in values[:NAMED]]
    return ", ".join([*texts, "…"] if len(values) > NAMED else texts)


def print_traceback() -> None:
    """Print the traceback of the error being handled, where the environment has `DETECTION_DEBUG=1`."""
    if os.environ.get("DETECTION_DEBUG") == "1":
        traceback.print_exc()


def one_line(text: object, width: int = 40) -> str:
    """The text on one line of at most `width` characters, for messages, tables, charts and images.

    Line ends become spaces, what cannot be printed (control characters, invalid text) "?"; invisible marks, such as
    those that change the direction of writing, are left out; long texts lose their middle.
    """
    words = " ".join(unicodedata.normalize("NFC", str(text)).split())
    visible = [c if c.isprintable() else "?" for c in words if unicodedata.category(c) != "Cf"]
    head = width // 2
    tail = len(visible) - (width - 1 - head)
    return "".join(visible if len(visible) <= width else [*visible[:head], "…", *visible[tail:]])


def progress_bar(total: int | None, what: str, unit: str = "image", shown: bool = True) -> tqdm:
    """A bar with the remaining time on stderr; in a log file, a line every half minute."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, disable=not shown, mininterval=0.5 if interactive else 30, leave=False
    )


def show_messages() -> None:
    """From now on print what the modules of `common/` log, a line each on stdout."""
    logger = logging.getLogger("common")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]


SIGNAL_STATUS = 128  # added to a signal's number, this is the exit status that shells expect


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived.

    It does not inherit from Exception, like KeyboardInterrupt, so that `except Exception` does not catch it.

    `at_once`: it arrived in the middle of a step, which is incomplete. `advice` is one line: what was saved, how to
    resume.
    """

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(number)
        self.number, self.at_once, self.advice = number, at_once, ""


_loops = 0  # active `finish_step_first` blocks
_pending: int | None = None  # a signal that arrived inside one of them


def install_handlers() -> None:
    """From now on SIGINT and SIGTERM raise `Interrupted`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _receive)


def _receive(number: int, _frame: object) -> None:
    global _pending
    if _loops and _pending is None:
        _pending = number
    else:  # no step to finish, or the second signal
        raise Interrupted(number, at_once=True)


@contextmanager
def finish_step_first() -> Iterator[None]:
    """Inside the block a first signal is only recorded for `pending_signal`; `Interrupted` is raised when it ends."""
    global _loops, _pending
    _loops += 1
    number = None
    try:
        yield
    finally:
        _loops -= 1
        if not _loops:
            number, _pending = _pending, None
    if number is not None:
        raise Interrupted(number)


def pending_signal() -> int | None:
    """The number of the signal that arrived inside `finish_step_first`, if any."""
    return _pending


def ignore_in_worker(_worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a data-loading worker: its parent handles them and needs the current batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
