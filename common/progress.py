"""The one kind of progress bar."""

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str = "picture", shown: bool = True) -> tqdm:
    """A bar with the time left on stderr; in a log file, a line every half minute."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, disable=not shown, mininterval=0.5 if interactive else 30, leave=False
    )
