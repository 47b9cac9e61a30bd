"""Text as the fonts of this machine can draw it, in charts and on images. Imports no torch.

DejaVu Sans, which matplotlib brings, has Latin, Greek, Cyrillic and Arabic letters. For others one installed font is
taken; what it lacks is drawn as "?".
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.font_manager import findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

from common.console import first_few, to_one_line
from common.show.tables import short_names

DEJAVU = ("DejaVu Sans", str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")))
REGULAR = (400, "normal", "regular", "book")  # weights
REPLACEMENT = "?"
FAMILIES = (  # a letter is looked for in this order; the first, which matplotlib brings, has no Asian ones
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "Malgun Gothic", "PingFang SC"),
    *(
        "Hiragino Sans",
        "Apple SD Gothic Neo",
        "Noto Sans Devanagari",
        "Noto Sans Thai",
        "Nirmala UI",
        "Arial Unicode MS",
    ),
)


class Font(NamedTuple):
    """A font file and the code points that it has."""

    path: str
    letters: frozenset[int]


@functools.cache
def installed_fonts() -> dict[str, Font]:
    """Those of FAMILIES that this machine has, by name."""
    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:  # newer than matplotlib's list
        with suppress(OSError, RuntimeError):  # a damaged font, or one of fixed size
            fontManager.addfont(path)
    fonts = {}
    for family in FAMILIES:
        with suppress(ValueError):
            path = findfont(family, fallback_to_default=False)
            fonts[family] = Font(path, frozenset(FT2Font(path).get_charmap()))
    return fonts


def font_for(text: str) -> str:
    """The file of the font that has most of the letters of `text`, for Pillow, which draws a text in one font."""
    fonts = installed_fonts().values()
    return max(fonts, key=lambda font: sum(ord(letter) in font.letters for letter in text)).path


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font file has; none where it cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _further_font(missing: frozenset[int]) -> list[tuple[str, str]]:
    """Name and path of the installed font with most of these code points, if any has some.

    Fonts of last resort have a sign for every letter, which only tells what kind of letter it is.
    """
    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
        with suppress(OSError, RuntimeError):  # a damaged font, or one of fixed size
            fontManager.addfont(path)
    upright = [font for font in fontManager.ttflist if font.style == "normal" and font.weight in REGULAR]
    fonts = [(font.name, font.fname) for font in upright if "lastresort" not in font.name.replace(" ", "").lower()]
    best = max(fonts, key=lambda font: len(missing & _letters(font[1])))
    return [best] if missing & _letters(best[1]) else []


def fonts_for(text: str) -> list[tuple[str, str]]:
    """Name and path of DejaVu Sans and, where it lacks letters of the text, of one further font."""
    missing = frozenset(map(ord, text)) - _letters(DEJAVU[1])
    return [DEJAVU, *(_further_font(missing) if missing else [])]


def drawable(text: str) -> str:
    """The text with "?" for each letter that neither font has."""
    known = frozenset().union(*(_letters(path) for _, path in fonts_for(text)))
    return "".join(letter if ord(letter) in known else REPLACEMENT for letter in text)


def class_labels(names: Sequence[str]) -> list[str]:
    """The class names as they are drawn: short, on one line, different where the names are."""
    return short_names([drawable(to_one_line(name, 1000)) for name in names])


def print_replaced(names: Iterable[str]) -> None:
    """Print a line on the names that cannot be drawn as they are written, if there are any."""
    replaced = [name for name in map(to_one_line, dict.fromkeys(names)) if drawable(name) != name]
    if replaced:
        print(
            f"no installed font has all letters of {len(replaced)} names ({first_few(replaced)}): they are drawn with "
            f"{REPLACEMENT!r}; install a font that has them, such as Noto Sans CJK"
        )
