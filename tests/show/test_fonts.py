"""Names in any writing: drawn as they are if an installed font has the letters, else a line is printed."""

import pytest
from helpers import record_of, results_of
from matplotlib.font_manager import fontManager

from common.evaluate.results import ClassNumbers
from common.show import charts, fonts

CAT = "猫"
CIRCLED = "Ⓐ"  # STIXGeneral has it, DejaVu Sans does not


@pytest.fixture(autouse=True)
def only_dejavu(monkeypatch):
    ours = [font for font in fontManager.ttflist if "mpl-data" in font.fname and font.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", ours)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    fontManager._findfont_cached.cache_clear()
    fonts.installed_fonts.cache_clear()
    yield
    fonts.installed_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()


def test_greek_cyrillic_and_signs_are_drawn_as_written(capsys):
    fonts.print_missing(["dog", "собака", "γάτα", "café", "$5 and $10", "<b>&amp;"])
    assert capsys.readouterr().out == "" and "DejaVuSans" in fonts.font_for("собака γάτα 0.93")


def test_letters_that_no_font_has_are_printed(capsys, recwarn):
    names = ("dog", CAT, "cat 猫", "자동차", CAT)
    record = record_of("m", AP50=0.5, per_class={name: ClassNumbers(0.5, 0.5) for name in names})
    charts.render(results_of(record, class_names=names), dpi=40)
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 names (猫, cat 猫, 자동차)" in line and "Noto Sans CJK" in line and not recwarn


def test_a_font_that_was_installed_after_matplotlib_first_ran_is_found(monkeypatch, tmp_path, capsys):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    stix = fonts.findfont("DejaVu Sans").replace("DejaVuSans", "STIXGeneral")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf"), stix])
    monkeypatch.setattr(fonts, "FAMILIES", ("DejaVu Sans", "No Such Font", "STIXGeneral"))
    fonts.print_missing([f"dog {CIRCLED}"])
    assert capsys.readouterr().out == "" and list(fonts.installed_fonts()) == ["DejaVu Sans", "STIXGeneral"]
    assert fonts.font_for(CIRCLED) == stix and "DejaVuSans" in fonts.font_for("собака")
