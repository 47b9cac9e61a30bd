"""How a program talks to its user: errors, progress bars, signals. Imports no torch."""

import importlib.util
import io
import logging
import math
import os
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

NAMED = 3  # ids or names in a message
REFRESH_S, LOG_S = 3, 60  # between two signs of life on a terminal, and in a log


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to correct it.

    `cli.run` prints it and exits with status 2; any other exception that reaches the user is a bug.
    """


def check_packages(user: str, *packages: str) -> None:
    """Raises InputError where a package is not installed that `user` needs, a flag or a program."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"{user} needs its package{'s' * (len(missing) > 1)}: pip install {' '.join(missing)}")


def last_line(error: BaseException) -> str:
    """The last line of an error's message, in which the traceback of a worker's ends; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def first_few(values: Sequence[object], width: int = 40) -> str:
    """The first few of the values, each cut to `width` characters, for a message."""
    texts = [str(value)[:width] for value in values[:NAMED]]
    return ", ".join([*texts, "…"] if len(values) > NAMED else texts)


def print_traceback() -> None:
    """Print the traceback of the error being handled, where the environment has `DETECTION_DEBUG=1`."""
    if os.environ.get("DETECTION_DEBUG") == "1":
        traceback.print_exc()


def to_one_line(text: object, width: int = 40) -> str:
    """The text on one line of at most `width` characters: line ends become spaces, a long text loses its middle.

    What cannot be printed becomes "?". Invisible marks, such as those of the direction of writing, are left out.
    """
    words = " ".join(unicodedata.normalize("NFC", str(text)).split())
    visible = [c if c.isprintable() else "?" for c in words if unicodedata.category(c) != "Cf"]
    head, tail = width // 2, len(visible) - (width - 1 - width // 2)
    return "".join(visible if len(visible) <= width else [*visible[:head], "…", *visible[tail:]])


class _Bar(tqdm):
    """It also moves while an item takes long."""

    def __init__(self, seconds: float, **options: Any):
        self.ended = threading.Event()
        super().__init__(**options)
        if not self.disable:
            threading.Thread(target=self._refresh, args=(seconds,), daemon=True).start()

    def _refresh(self, seconds: float) -> None:
        while not self.ended.wait(seconds):
            self.refresh()

    def close(self) -> None:
        self.ended.set()
        super().close()


class _Lines(io.TextIOBase):
    """Whatever a bar would write over its last state, as lines of stderr."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr)
        return len(text)


def progress_bar(total: int | None, what: str, unit: str = "image", shown: bool = True) -> tqdm:
    """A bar with the remaining time on stderr, to be closed; in a log, a line a minute."""
    options = {"total": total, "desc": what, "unit": unit, "disable": not shown, "leave": False}
    if sys.stderr.isatty():
        return _Bar(REFRESH_S, **options)
    shape = "{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left"
    return _Bar(LOG_S, mininterval=math.inf, delay=LOG_S, file=_Lines(), bar_format=shape, **options)


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage())


def show_messages() -> None:
    """From now on print what the modules of `common/` log, a line each."""
    logger = logging.getLogger("common")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Printer()]


class Interrupted(BaseException):
    """A signal arrived, whose number it has; no Exception, so that `except Exception` does not catch it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


_received: list[int] = []  # signals of which the exception may have been lost


def raise_on_signals() -> None:
    """From now on SIGINT, SIGTERM and, unless `nohup` has it ignored, SIGHUP raise `Interrupted`."""

    def receive(number: int, _frame: object) -> None:
        _received.append(number)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)


def raise_if_interrupted() -> None:
    """Raise `Interrupted` once more, where Python has dropped it: in a finaliser, or in a callback from C."""
    if _received:
        number = _received[0]
        _received.clear()
        raise Interrupted(number)
