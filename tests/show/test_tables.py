"""Text tables for the terminal."""

from common.evaluate.results import ValidationRecord, ValidationResults, read_results
from common.show.tables import format_comparisons, format_table


def test_table_names_failed_models():
    good = ValidationRecord("good", "g.pth", primary={"accuracy": 0.5}, detection={"AP50": None})
    table = format_table((good, ValidationRecord("bad", "b.pth", error="no such file"))).splitlines()
    assert "50.0%" in table[2] and table[3] == "bad    not evaluated: no such file"


def test_columns_can_be_selected():
    record = ValidationRecord("m", "m.pth", detection={"AP50": 0.25, "AP_small": 0.1, "AP_large": 0.3})
    table = format_table((record,), ("mAP@0.5", "S / M / L")).splitlines()
    assert table[0].split() == ["model", "mAP@0.5", "S", "/", "M", "/", "L"]
    assert table[2].split() == ["m", "0.250", "0.100", "/", "-", "/", "0.300"]


def test_each_pair_of_models_has_a_verdict(results_file):
    (line,) = format_comparisons(read_results(results_file), ("AP50",)).splitlines()
    (pair,) = read_results(results_file).comparisons
    assert line.startswith("first against second: mAP@0.5 [")
    assert line.endswith(pair["numbers"]["AP50"]["verdict"])


def test_tables_keep_one_line_a_model_whatever_the_names_are():
    good = [ValidationRecord(name, "m.pth") for name in ("a\nb", "\x1b[2J", "y" * 250)]
    table = format_table((*good, ValidationRecord("z", "z.pth", error="a\nb"))).splitlines()
    assert len(table) == 6 and "\x1b" not in "".join(table)
    assert table[2].startswith("a b ") and table[3].startswith("?[2J ")
    assert table[5].endswith("not evaluated: a b") and len(table[4]) < 160


def test_a_pair_without_an_interval_or_a_verdict():
    numbers = {"AP50": {"interval": None, "verdict": "better"}, "AP": {"interval": [-0.1, 0.2], "verdict": None}}
    results = ValidationResults({}, {}, (), [{"a": "a", "b": "b", "numbers": numbers}, {"a": "a", "b": "b"}])
    assert format_comparisons(results).splitlines() == [
        "a against b: AP [-0.100, +0.200] no verdict",
        "a against b: ",
    ]
