"""Text tables for the terminal, and the names in them."""

import pytest
from helpers import record_of, results_of

from common.console import to_one_line
from common.evaluate.results import Comparison, ValidationRecord, Verdict
from common.show.tables import format_comparisons, format_table, short_names


def test_the_table_has_the_selected_columns_and_names_failed_models():
    records = record_of("m", AP50=0.25, AP_small=0.1, AP_large=0.3), ValidationRecord("bad", "b.pth", error="no file")
    table = format_table(records, ("mAP@0.5", "S / M / L")).splitlines()
    assert table[0].split() == ["model", "mAP@0.5", "S", "/", "M", "/", "L"]
    assert table[2].split() == ["m", "0.250", "0.100", "/", "-", "/", "0.300"]
    assert table[3] == "bad    not evaluated: no file"
    assert "50.0%" in format_table([record_of("good", primary={"accuracy": 0.5})])
    bad = [ValidationRecord(name, "m.pth", error="a\nb") for name in ("a\nb", "\x1b[2J", "y" * 250)]
    _, _, *lines = format_table(bad).splitlines()
    assert [line[:5] for line in lines] == ["a b  ", "?[2J ", "yyyyy"] and len(lines[2]) < 160
    assert all(line.endswith("  not evaluated: a b") for line in lines)


def test_names_that_differ_in_the_middle_alone_have_their_number():
    names = [f"improved_dinov2_small_448px_{lr}_blocks_8_9_10_focal_seed0_final" for lr in ("lr1e-3", "lr1e-4")]
    short = short_names(["short", *names])
    assert short[0] == "short" and [name[:12] for name in short[1:]] == ["2: improved_", "3: improved_"]
    assert all(len(name) <= 40 for name in short)
    pair = Comparison(*names, {"AP50": Verdict([-0.1, 0.2], "better")})
    results = results_of(*map(record_of, names), comparisons=[pair])
    first, second = (line.split("  ")[0] for line in format_table(results.models).splitlines()[2:])
    assert first != second
    assert format_comparisons(results) == f"{first} against {second}: mAP@0.5 [-0.100, +0.200] better"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\t c", "a b c"),
        ("red\x1b[31m\x00", "red?[31m?"),
        ("\u202egpj.exe", "gpj.exe"),
        ("byte \udcff", "byte ?"),
        ("e\u0301", "é"),
        ("x" * 100 + "_lr1", "x" * 20 + "…" + "x" * 15 + "_lr1"),
    ],
)
def test_names_become_one_short_line(text, line):
    assert to_one_line(text) == to_one_line(line) == line
    assert [to_one_line("abcdef", width) for width in (1, 2, 3, 5, 6)] == ["…", "a…", "a…f", "ab…ef", "abcdef"]
