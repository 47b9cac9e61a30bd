"""Text tables for the terminal."""

from common.evaluate.results import ValidationRecord, read_results
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
