"""Text tables for the terminal."""

from helpers import record_of, results_of

from common.evaluate.results import Comparison, ValidationRecord, Verdict, read_results
from common.show.tables import format_comparisons, format_table, short_names


def test_table_names_failed_models():
    good = record_of("good", primary={"accuracy": 0.5})
    table = format_table((good, ValidationRecord("bad", "b.pth", error="no such file"))).splitlines()
    assert "50.0%" in table[2] and table[3] == "bad    not evaluated: no such file"


def test_columns_can_be_selected():
    record = record_of("m", AP50=0.25, AP_small=0.1, AP_large=0.3)
    table = format_table((record,), ("mAP@0.5", "S / M / L")).splitlines()
    assert table[0].split() == ["model", "mAP@0.5", "S", "/", "M", "/", "L"]
    assert table[2].split() == ["m", "0.250", "0.100", "/", "-", "/", "0.300"]


def test_each_pair_of_models_has_a_verdict(results_file):
    (line,) = format_comparisons(read_results(results_file), ("AP50",)).splitlines()
    (pair,) = read_results(results_file).comparisons
    assert line.startswith("first against second: mAP@0.5 [")
    assert line.endswith(pair.numbers["AP50"].verdict)


def test_tables_keep_one_line_a_model_whatever_the_names_are():
    good = [ValidationRecord(name, "m.pth") for name in ("a\nb", "\x1b[2J", "y" * 250)]
    table = format_table((*good, ValidationRecord("z", "z.pth", error="a\nb"))).splitlines()
    assert len(table) == 6 and "\x1b" not in "".join(table)
    assert table[2].startswith("a b ") and table[3].startswith("?[2J ")
    assert table[5].endswith("not evaluated: a b") and len(table[4]) < 160


def test_names_that_differ_in_the_middle_alone_stay_different():
    start, end = "improved_dinov2_small_448px_", "_blocks_8_9_10_focal_seed0_final"
    names = [f"{start}lr1e-3{end}", f"{start}lr1e-4{end}", "short"]
    assert short_names(names) == [
        "improved_d…lr1e-3_blocks_8_9_10_focal_se",
        "improved_d…lr1e-4_blocks_8_9_10_focal_se",
        "short",
    ]
    equal = [f"{'a' * 60}{letter}{'b' * 60}" for letter in "xy"]
    assert [name[:3] for name in short_names(equal)] == ["1: ", "2: "]
    assert all(len(name) <= 40 for name in short_names(names))
    records = [record_of(name) for name in names]
    pair = Comparison(names[0], names[1], {"AP50": Verdict([0.1, 0.2], "better")})
    assert format_comparisons(results_of(*records, comparisons=[pair])).startswith(
        "improved_d…lr1e-3_blocks_8_9_10_focal_se against improved_d…lr1e-4"
    )
    assert len({line.split("  ")[0] for line in format_table(records).splitlines()[2:]}) == 3
