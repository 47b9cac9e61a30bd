"""Names in any writing: drawn as they are if an installed font has the letters, else a line is printed."""

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import record_of, results_of
from matplotlib.font_manager import fontManager
from PIL import ImageFont

from common.evaluate.results import ClassNumbers
from common.show import charts, fonts

COVERED = ("dog", "собака", "γάτα", "café", "$5 and $10", "<b>&amp;")
CAT = "猫"


@pytest.fixture
def only_matplotlibs_fonts(monkeypatch):
    ours = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", ours)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    fontManager._findfont_cached.cache_clear()
    fonts.installed_fonts.cache_clear()
    yield
    fonts.installed_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()


@pytest.fixture
def cat_font(only_matplotlibs_fonts, monkeypatch, tmp_path):
    """A font, installed after matplotlib first ran, that has the letter of CAT and no other."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    path, damaged = tmp_path / "cats.ttf", tmp_path / "damaged.ttf"
    builder.save(path)
    damaged.write_bytes(b"no font")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(path), str(damaged)])
    return path


def test_greek_cyrillic_and_signs_are_drawn_as_written(only_matplotlibs_fonts, capsys):
    fonts.print_missing(COVERED)
    assert capsys.readouterr().out == "" and "DejaVuSans" in fonts.font_for("собака γάτα 0.93")


def test_letters_that_no_font_has_are_printed(only_matplotlibs_fonts, capsys, recwarn):
    names = ("dog", CAT, "cat 猫", "자동차", CAT)
    record = record_of("m", AP50=0.5, per_class={name: ClassNumbers(0.5, 0.5) for name in names})
    charts.render(results_of(record, class_names=names), dpi=40)
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 names (猫, cat 猫, 자동차)" in line and "Noto Sans CJK" in line and not recwarn


def test_an_installed_font_is_found(cat_font, capsys):
    fonts.print_missing([f"dog {CAT}"])
    assert capsys.readouterr().out == ""
    assert list(fonts.installed_fonts()) == ["DejaVu Sans", "Noto Sans CJK JP"]
    assert fonts.font_for(CAT) == str(cat_font)
    assert ImageFont.truetype(fonts.font_for(f"dog {CAT}"), 12).getname()[0] == "DejaVu Sans"
