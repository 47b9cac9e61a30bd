"""Fonts that have the letters of names, for charts and images. Imports no torch."""

import functools
from collections.abc import Iterable
from contextlib import suppress

from matplotlib.font_manager import findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

from common.console import first_few, to_one_line

# A letter is looked for in this order; the first, which matplotlib brings, has no Asian ones.
FAMILIES = (
    "DejaVu Sans,Noto Sans CJK SC,Noto Sans CJK JP,Noto Sans CJK KR,Source Han Sans SC,WenQuanYi Micro Hei,"
    "Droid Sans Fallback,Microsoft YaHei,Malgun Gothic,PingFang SC,Hiragino Sans,Apple SD Gothic Neo,"
    "Noto Sans Devanagari,Noto Sans Thai,Nirmala UI,Arial Unicode MS"
).split(",")


@functools.cache
def installed_fonts() -> dict[str, FT2Font]:
    """Those of FAMILIES that this machine has, by name."""
    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:  # newer than matplotlib's list
        with suppress(OSError, RuntimeError):  # a damaged font, or one of fixed size
            fontManager.addfont(path)
    fonts = {}
    for family in FAMILIES:
        with suppress(ValueError):
            fonts[family] = FT2Font(findfont(family, fallback_to_default=False))
    return fonts


def font_for(text: str) -> str:
    """The file of the font that has most of the letters of `text`, for Pillow, which draws a text in one font."""
    fonts = installed_fonts().values()
    return max(fonts, key=lambda font: sum(font.get_char_index(ord(letter)) > 0 for letter in text)).fname  # type: ignore[return-value]


def print_missing(names: Iterable[str]) -> None:
    """Print a line on the names with letters that no font has, which are drawn as empty boxes."""
    fonts, texts = installed_fonts().values(), [to_one_line(name) for name in dict.fromkeys(names)]
    letters = {c for c in set("".join(texts)) if not any(font.get_char_index(ord(c)) for font in fonts)}
    if missing := [text for text in texts if letters & set(text)]:
        advice = "install one that has them, such as Noto Sans CJK"
        print(f"no font has all letters of {len(missing)} names ({first_few(missing)}): {advice}")
