"""Command-line flags from a dataclass of settings, and the exit of every script.

The only module that knows argparse. A script declares its settings once, as a frozen dataclass of `flag(...)` fields,
and passes it to `run`. Flags that several scripts share are frozen dataclasses beside the code that reads them, from
which the script's settings inherit; nothing in `common/` sees a script's own settings.
"""

import argparse
import dataclasses
import io
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable

from common import console

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

MENDS = {  # what to do about errors of Python and torch, by a pattern
    "(?i)MemoryError|allocate memory|out of memory": "out of memory; take a smaller --batch-size or --image-size",
    "(?i)DataLoader worker|shared memory|bus error|open files|ancdata": "a process that decodes images was lost, often "
    "for want of memory, of shared memory (docker run --shm-size=8g), or of a short TMPDIR; take --workers 0",
    "MASTER_": "RANK, LOCAL_RANK or WORLD_SIZE is set, as by a launcher that is not there; unset it",
}
MESSAGE_LENGTH = 1000  # characters, of which names of files may need many
SETTINGS = typing.TypeVar("SETTINGS", bound="DataclassInstance")


def flag(
    default: typing.Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
    fixed: bool = False,
    positional: bool = False,
) -> typing.Any:
    """A dataclass field that becomes `--name`; a tuple as default makes a flag with several values.

    Args:
        default: the value where the flag is not given, of a plain type.
        help: the unit and the reason; the default is added to it.
        at_least, at_most, choices: the values allowed.
        fixed: a resumed run must have the same value, since the weights or their optimizer would not fit another.
        positional: it is given without its name, and may be left out.
    """
    rules = {"at_least": at_least, "at_most": at_most, "choices": choices, "fixed": fixed, "positional": positional}
    return dataclasses.field(default=default, metadata=rules | {"help": help})


def with_default(flags: type["DataclassInstance"], name: str, default: typing.Any) -> typing.Any:
    """The flag `name` of a dataclass, for a class that inherits from it and has another default."""
    (inherited,) = (field for field in dataclasses.fields(flags) if field.name == name)
    return dataclasses.field(default=default, metadata=inherited.metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def _checked(kind: type, at_least: float | None, at_most: float | None) -> Callable[[str], typing.Any]:
    def convert(text: str):
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no number")
        if at_least is not None and not value >= at_least:
            raise argparse.ArgumentTypeError(f"{text} is below {at_least}")
        if at_most is not None and not value <= at_most:
            raise argparse.ArgumentTypeError(f"{text} is above {at_most}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _group_title(settings_type: type, name: str) -> str:
    """The first line of the docstring of the class that declares the flag first, "this script" for the script's own."""
    declared_in = next(kind for kind in reversed(settings_type.__mro__) if name in getattr(kind, "__annotations__", {}))
    return "this script" if declared_in is settings_type else (declared_in.__doc__ or "").splitlines()[0].rstrip(".")


def _add_flag(parser: argparse._ArgumentGroup, field: dataclasses.Field, kind: type) -> None:
    name, metadata = flag_name(field.name), field.metadata
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    help = metadata["help"].replace("%", "%%") + ("" if shown is False or shown == "" else f" (default: {shown})")
    if kind is bool:
        parser.add_argument(name, action="store_true", help=help)
        return
    several = typing.get_origin(kind) is tuple
    element = typing.get_args(kind)[0] if several else kind
    metavar = None if metadata["choices"] else {int: "N", float: "X"}.get(element, "TEXT")
    if metadata["positional"]:
        name, metavar = field.name, field.name.upper()
    nargs = "+" if several else "?" if metadata["positional"] else None
    options = {"choices": metadata["choices"], "metavar": metavar, "default": field.default, "help": help}
    parser.add_argument(name, type=_checked(element, metadata["at_least"], metadata["at_most"]), nargs=nargs, **options)


def parse(settings_type: type[SETTINGS], description: str, argv: list[str] | None = None) -> SETTINGS:
    """Read `argv` (default: the command line) into `settings_type`; `--help` prints `description` and the flags."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    kinds = typing.get_type_hints(settings_type)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(settings_type):
        title = _group_title(settings_type, field.name)
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        _add_flag(groups[title], field, kinds[field.name])
    values = vars(parser.parse_args(argv))
    return settings_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def flag_name(field: str) -> str:
    """--batch-size for batch_size."""
    return "--" + field.replace("_", "-")


def flag_texts(settings: "DataclassInstance", *without: str) -> list[str]:
    """All texts among the values of the flags, paths of input files among them, but for those of some flags."""
    values = [getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name not in without]
    texts = [text for value in values for text in (value if isinstance(value, tuple) else (value,))]
    return [text for text in texts if isinstance(text, str)]


def run(main: Callable[[SETTINGS], object], settings_type: type[SETTINGS], description: str) -> None:
    """Parse the command line, call `main`, and exit: with 2 after bad input, 130 after SIGINT, 143 after SIGTERM.

    One line on stderr then says what happened. With `DETECTION_DEBUG=1` the traceback stands above it.
    """
    console.raise_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any name, in a log at once
    console.show_messages()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage that Pillow can read past, and of large images
    try:
        main(parse(settings_type, description or ""))
    except (Exception, console.Interrupted) as error:
        if (message := message_of(error)) is None:
            raise
        console.print_traceback()
        line = console.to_one_line("; ".join([message, *getattr(error, "__notes__", [])]), MESSAGE_LENGTH)
        print(f"{sys.argv[0].rpartition('/')[2]}: error: {line}", file=sys.stderr)
        sys.exit(128 + error.number if isinstance(error, console.Interrupted) else 2)  # as shells expect


def message_of(error: BaseException) -> str | None:
    """What a user can do something about; None for a fault of the program."""
    if isinstance(error, console.Interrupted):
        return "interrupted"
    if isinstance(error, console.InputError):  # a worker's begins with its traceback, which ends in its type
        return str(error).rpartition(f"{type(error).__name__}: ")[2]
    if isinstance(error, OSError):  # of a file, folder or connection
        return console.last_line(error)
    text = f"{type(error).__name__}: {error}"
    return next((mend for pattern, mend in MENDS.items() if re.search(pattern, text)), None)
