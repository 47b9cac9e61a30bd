"""How every script ends: exit status, one line on stderr, a traceback where it is requested."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT

from common import cli
from common.console import InputError, Interrupted, raise_if_interrupted, raise_on_signals


@dataclass(frozen=True)
class Settings:
    """No flags."""


class WrongSizeError(InputError):
    """As a module raises its own."""


WORKER = "Caught WrongSizeError in worker 0.\n...\ntests.test_cli.WrongSizeError: a.jpg is 3x4 pixels"
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed."
ERRORS = [  # what main raises, the line on stderr, the exit status
    (InputError("a.json: no such file"), "a.json: no such file", 2),
    (InputError("no such image: a\nb\x1b[2J.jpg"), "no such image: a b?[2J.jpg", 2),
    (InputError("a" * 50000), "a" * 500 + "…" + "a" * 499, 2),
    (WrongSizeError(WORKER), "a.jpg is 3x4 pixels", 2),
    (PermissionError(13, "Permission denied", "a.json"), "[Errno 13] Permission denied: 'a.json'", 2),
    (MemoryError(), "out of memory; take a smaller", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; take a smaller", 2),
    (RuntimeError(KILLED), "a process that decodes", 2),
    (Interrupted(signal.SIGTERM), "interrupted; go on with --resume", 143),
]


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize(("error", "line", "status"), ERRORS, ids=[line[:30] for _, line, _ in ERRORS])
def test_errors_end_in_one_line_and_debugging_adds_the_traceback(error, line, status, debug, monkeypatch, capsys):
    def main(_settings):
        raise error from ValueError("the cause")

    error.__notes__ = ["go on with --resume"] if isinstance(error, Interrupted) else []
    monkeypatch.setenv("DETECTION_DEBUG", debug)
    monkeypatch.setattr(sys, "argv", ["/some/script.py"])
    with pytest.raises(SystemExit) as exit:
        cli.run(main, Settings, "")
    *above, last = capsys.readouterr().err.splitlines()
    assert exit.value.code == status and last.startswith(f"script.py: error: {line}")
    assert ("ValueError: the cause" in above and "in main" in "".join(above)) if debug else not above


def test_any_name_can_be_printed_and_a_line_does_not_wait_for_others():
    """On a terminal of any encoding, also what Python makes of bytes in a file name that are not valid text."""
    program = "import os; from dataclasses import make_dataclass as m; from common import cli\n"
    program += "cli.run(lambda _: (print('caf\\xe9 \\u732b \\udcff'), os._exit(0)), m('Settings', []), '')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "caf\\xe9 \\u732b \\udcff\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_python_drops_is_raised_at_the_next_step(number):
    class Finalised:
        def __del__(self):
            signal.raise_signal(number)

    raise_on_signals()
    Finalised()  # Python reports the exception and goes on
    with pytest.raises(Interrupted) as caught:
        raise_if_interrupted()
    assert caught.value.number == number
    raise_if_interrupted()  # once
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    raise_on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
