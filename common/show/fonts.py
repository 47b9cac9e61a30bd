"""Text as the fonts of this machine can draw it, in charts and on images. Imports no torch.

DejaVu Sans, which matplotlib brings, has Latin, Greek, Cyrillic and Arabic letters. For other letters the installed
fonts are searched; what none of them has is drawn as "?".
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from common.console import first_few, to_one_line

DEJAVU = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
REGULAR = (400, "normal", "regular", "book")  # weights
REPLACEMENT = "?"


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font file has; none where it cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _further_fonts(missing: frozenset[int]) -> tuple[tuple[str, str], ...]:
    """Name and path of installed fonts that together have as many as possible of these code points.

    Fonts of last resort have a sign for every letter, which only tells what kind of letter it is.
    """
    known = {font.fname for font in fontManager.ttflist}  # stored when matplotlib first ran
    for path in set(findSystemFonts()) - known:
        with suppress(OSError, RuntimeError):  # a damaged font, or one of fixed size
            fontManager.addfont(path)
    fonts = [font for font in fontManager.ttflist if "lastresort" not in font.name.replace(" ", "").lower()]
    regular = [font for font in fonts if font.style == "normal" and font.weight in REGULAR]
    chosen = []
    while missing and regular:
        best = max(regular, key=lambda font: len(missing & _letters(font.fname)))
        if not missing & _letters(best.fname):
            break
        chosen.append((best.name, best.fname))
        missing -= _letters(best.fname)
    return tuple(chosen)


def _fonts(text: str) -> tuple[tuple[str, str], ...]:
    """Name and path of DejaVu Sans and of the further fonts that the text needs."""
    return (("DejaVu Sans", DEJAVU), *_further_fonts(frozenset(map(ord, text)) - _letters(DEJAVU)))


def font_names(text: str) -> list[str]:
    """The fonts that matplotlib needs for the text, by name; each letter is drawn in the first that has it."""
    return [name for name, _ in _fonts(text)]


def drawable(text: str) -> str:
    """The text with "?" for each letter that no font has."""
    letters = [_letters(path) for _, path in _fonts(text)]
    return "".join(c if any(ord(c) in font for font in letters) else REPLACEMENT for c in text)


def image_text(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and the font, of `size` pixels, in which Pillow can draw most of it; "?" for each other letter."""
    path = max(
        (path for _, path in _fonts(text)), key=lambda path: sum(ord(letter) in _letters(path) for letter in text)
    )
    text = "".join(letter if ord(letter) in _letters(path) else REPLACEMENT for letter in text)
    return text, ImageFont.truetype(path, size)


def class_labels(names: Sequence[str]) -> list[str]:
    """The class names as they are drawn: short, on one line.

    Names with letters that no font has, and those that are equal once shortened, get the class's number.
    """
    short = [to_one_line(name) for name in names]
    labels, counts = [drawable(name) for name in short], Counter(short)
    return [
        label if label == name and counts[name] == 1 else f"class {number}: {label}"
        for number, (name, label) in enumerate(zip(short, labels, strict=True))
    ]


def print_replaced(names: Iterable[str]) -> None:
    """Print a line on the names that cannot be drawn as they are written, if there are any."""
    replaced = [name for name in map(to_one_line, dict.fromkeys(names)) if drawable(name) != name]
    if replaced:
        print(
            f"no installed font has all letters of {len(replaced)} names ({first_few(replaced)}): they are drawn with "
            f"{REPLACEMENT!r}, and classes with their number; install a font that has them, such as Noto Sans CJK"
        )
