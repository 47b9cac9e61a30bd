"""The layout of the code: which room may import which, and how large a room, a folder and a function may be."""

import ast

import pytest
from helpers import ROOT

MAY_IMPORT = {  # room of common/: the rooms that its modules may import, beside their own; "" are the files at its root
    "": set(),
    "data": {""},
    "model": {""},
    "evaluate": {"", "data", "model"},
    "train": {"", "data", "model", "evaluate"},
    "show": {"", "data", "model", "evaluate"},
    "export": {"", "data", "model", "evaluate"},
    "predict": {"", "data", "model"},
}
# `load_detector` is the one way in for every form of a detector: it asks the export's runtime for those that it wrote.
UPWARD = {("common/model/__init__.py", "common.export.runtime")}
LINES = {  # of the files that a pattern finds, at most
    "*.py": 778,
    "common/*.py": 1119,
    "common/data/*.py": 2066,
    "common/model/*.py": 1498,
    "common/train/*.py": 726,
    "common/evaluate/*.py": 1478,
    "common/show/*.py": 618,
    "common/export/*.py": 340,
    "common/predict/*.py": 405,
    "tests/**/*.py": 7527,
}
MODULES = 14  # in one folder
FUNCTION_LINES = 60
CODE = [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("dev/*.py")]
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def imported(file):
    """The modules that a file imports, with their dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(parts):
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    for file in ROOT.glob(f"common/{room}/*.py" if room else "common/*.py"):
        for module in imported(file):
            parts = module.split(".")
            if parts[0] == "common" and (str(file.relative_to(ROOT)), ".".join(parts[:3])) not in UPWARD:
                assert room_of(parts) in MAY_IMPORT[room] | {room}, f"{file}: {module}"


def test_no_script_imports_a_script_and_no_test_a_test():
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for file in ROOT.glob("*.py"):
        assert not scripts & {module.split(".")[0] for module in imported(file)}, file
    tests = {file.stem for file in TESTS} - {"helpers", "loopback"}
    for file in TESTS:
        assert not tests & {part for module in imported(file) for part in module.split(".")}, file


def test_only_the_command_line_knows_argparse():
    assert [file.name for file in CODE if "argparse" in set(imported(file))] == ["cli.py"]


@pytest.mark.parametrize("pattern", LINES)
def test_no_room_has_more_lines_than_its_budget(pattern):
    assert sum(len(file.read_text().splitlines()) for file in ROOT.glob(pattern)) <= LINES[pattern]


def test_no_folder_is_crowded_and_no_function_long():
    for folder in {file.parent for file in CODE}:
        assert len(list(folder.glob("*.py"))) <= MODULES, folder
    for file in [*CODE, *TESTS]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{file}: {node.name}"
