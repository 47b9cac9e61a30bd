"""Names in any writing: drawn as they are if a font has the letters, otherwise replaced, and a line is printed."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import record_of, results_of
from matplotlib.font_manager import fontManager

from common.evaluate.results import Calibration, ClassNumbers, Diagnosis, ErrorKind, OperatingPoint
from common.show import charts, fonts

COVERED = ("dog", "собака", "γάτα", "café", "$5 and $10", "<b>&amp;")
CAT = "猫"


@pytest.fixture
def cat_font(no_further_fonts, monkeypatch, tmp_path):
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
    builder.setupNameTable({"familyName": "Only Cats", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    path = tmp_path / "cats.ttf"
    builder.save(path)
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(path), str(tmp_path / "damaged.ttf")])
    fonts._further_font.cache_clear()
    yield path
    fonts._further_font.cache_clear()


@pytest.fixture
def no_further_fonts(monkeypatch):
    """Only the fonts of matplotlib are installed."""
    ours = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", ours)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    fonts._further_font.cache_clear()
    yield
    fonts._further_font.cache_clear()


def results_with(names):
    per_class = {name: ClassNumbers(0.5, 0.5) for name in names}
    confusion = [[2 * (row == column) for column in range(len(names) + 1)] for row in range(len(names) + 1)]
    diagnosis = Diagnosis(OperatingPoint(0.5, 0.5, 0.5, 0.5), ERRORS, Calibration(None, []), confusion)
    record = record_of(names[-1], AP50=0.5, per_class=per_class, diagnosis=diagnosis)
    return results_of(record, source=names[-1], class_names=names)


ERRORS = dict.fromkeys(("class", "localisation", "both", "duplicate", "background", "missed"), ErrorKind(0.1, 1))


def test_greek_cyrillic_and_signs_are_drawn_as_written(no_further_fonts, capsys):
    assert fonts.class_labels(COVERED) == list(COVERED)
    fonts.print_replaced(COVERED)
    assert capsys.readouterr().out == ""


def test_letters_that_no_font_has_are_replaced_and_printed(no_further_fonts, capsys):
    names = ("dog", CAT, "자동차", "cat 猫", "\ue000")
    assert fonts.class_labels(names) == ["dog", "2: ?", "???", "cat ?", "5: ?"]
    fonts.print_replaced([*names, CAT])
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 names (猫, 자동차, cat 猫)" in line and "Noto Sans CJK" in line


def test_an_installed_font_is_found(cat_font, capsys):
    assert [name for name, _ in fonts.fonts_for(f"dog {CAT}")] == ["DejaVu Sans", "Only Cats"]
    assert fonts.class_labels(("dog", CAT)) == ["dog", CAT]
    fonts.print_replaced([CAT])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("installed", [False, True])
def test_charts_draw_every_letter_or_its_replacement(installed, no_further_fonts, request, capsys):
    if installed:
        request.getfixturevalue("cat_font")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter that its fonts lack
        results = results_with([*COVERED, CAT])
        charts.render(results, dpi=40)
    labels = [label.get_text() for label in charts.per_class(results).axes[0].get_yticklabels()]
    assert sorted(labels) == sorted([*COVERED, CAT if installed else "?"])
    assert bool(capsys.readouterr().out) != installed
