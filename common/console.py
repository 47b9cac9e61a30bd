"""How a program talks to its user: errors, progress bars, signals. Imports no torch."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    `cli.run` prints it and exits with status 2; anything else that reaches the user is a bug.
    """


class WrongSizeError(InputError):
    """An image is not of the size that its annotation tells."""


class NotFiniteError(InputError):
    """Training met an infinite number or none; `report` is what is known of the step, plain types."""

    def __init__(self, message: str, report: dict):
        super().__init__(message)
        self.report = report


def progress_bar(total: int, what: str, unit: str = "image", shown: bool = True) -> tqdm:
    """A bar with the time left on stderr; in a log file, a line every half minute."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, disable=not shown, mininterval=0.5 if interactive else 30, leave=False
    )


SIGNAL_STATUS = 128  # a shell's exit status for a signal: this and its number


class Interrupted(BaseException):
    """A signal asked for the end. Like KeyboardInterrupt, it is no Exception: nothing repairs it on its way up.

    `at_once`: it came in the middle of a step, whose work is torn. `advice` is one line: what was kept, how to go on.
    """

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(number)
        self.number, self.at_once, self.advice = number, at_once, ""


_loops = 0  # loops under way that finish their step first
_pending: int | None = None  # the signal that they have not acted on yet


def install_handlers() -> None:
    """From now on SIGINT and SIGTERM raise `Interrupted`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _receive)


def _receive(number: int, _frame: object) -> None:
    global _pending
    if _loops and _pending is None:
        _pending = number
    else:  # nothing to finish, or asked for a second time
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
    """The number of the signal that came in the meantime, if any."""
    return _pending


def ignore_in_worker(_worker: int) -> None:
    """In a process that loads data: the signals are its parent's business, which still wants the batch under way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
