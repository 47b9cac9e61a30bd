"""Fonts that have the letters of names, for charts and images. Imports no torch."""

import functools
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from matplotlib.font_manager import findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

from common.console import first_few, to_one_line

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


def print_missing(names: Iterable[str]) -> None:
    """Print a line on the names with letters that no font has, which are drawn as empty boxes."""
    known = frozenset().union(*(font.letters for font in installed_fonts().values()))
    names = [to_one_line(name) for name in dict.fromkeys(names)]
    if missing := [name for name in names if not known.issuperset(map(ord, name))]:
        advice = "install one that has them, such as Noto Sans CJK"
        print(f"no font has all letters of {len(missing)} names ({first_few(missing)}): {advice}")
