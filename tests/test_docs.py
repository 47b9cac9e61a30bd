"""README.md and docs/ stay true: their commands parse, and the files, names and fields that they mention exist."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from PIL import Image

from common import cli
from common.model.checkpoint import Checkpoint, save_detector

README = ROOT / "README.md"
PAGES = (README, *sorted(ROOT.glob("docs/*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:\S*/)?(?:python3?|make|accelerate) ")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OWN_FILE = re.compile(r"`((?:common|dev|docs|tests)/[\w./]*)`")
NAME_IN_FILE = re.compile(r"`(\w+)`\s+in\s+`([\w/]+\.\w+)`")
MAX_LINES, MAX_WORDS = 150, 1100  # of the README
MAX_WORDS_OF_PAGES = 7000  # of the others together, without the recipes
MAX_WORDS_OF_RECIPES = 800  # with their code
MAX_LINES_OF_A_RECIPE = 15  # that are not empty


def lines_of(block):
    """Its commands without comments; a line that ends in a backslash goes on in the next, && separates two."""
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        yield from filter(None, map(str.strip, re.split(r"(?:^|\s)#", line)[0].split("&&")))


def commands():
    return [
        pytest.param(line, id=f"{page.name}: {line}")
        for page in PAGES
        for kind, block in FENCE.findall(page.read_text())
        for line in lines_of(block)
        if kind == "sh" or COMMAND.match(line)
    ]


def settings_class(module):
    """The settings of a program, None where it takes no flags."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    return getattr(importlib.import_module(f"{module}.__main__" if package else module), "Settings", None)


def settings_of(module, flags):
    """Exits where a flag does not exist or its value is refused."""
    if settings := settings_class(module.removesuffix(".py")):
        return cli.parse(settings, "", flags)
    assert not flags, f"{module} takes no flags"


@pytest.mark.parametrize("line", commands())
def test_command_exists_with_its_flags_and_values(line):
    assert COMMAND.match(line), "no command that this test knows"
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    program, first, *others = [Path(words[0]).name, *words[1:]]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {first, *others} <= set(targets)
    elif program == "accelerate":
        assert first == "launch"
        launched = launch_command_parser().parse_args(others)
        settings_of(launched.training_script, launched.training_script_args)
    elif first != "-m":
        settings_of(first, others)
    elif others[0].startswith(("dev.", "common.")):
        settings_of(others[0], others[1:])
    else:
        assert importlib.util.find_spec(others[0])


def test_make_demo_runs_the_five_scripts():
    made = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runs = [words[1:] for words in map(shlex.split, lines_of(made)) if words[0].endswith("/python")]
    assert sorted(run[0] for run in runs) == sorted(path.name for path in ROOT.glob("*.py"))
    for script, *flags in runs:
        assert settings_of(script, flags).output.startswith("runs/demo/")


def test_python_of_the_readme_runs(detector, tmp_path, monkeypatch, capsys):
    names = tuple(f"class {number}" for number in range(10))
    save_detector(tmp_path / "mine.pth", Checkpoint(detector, names, tuple(range(1, 11))))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40)).save("street.jpg")
    (code,) = (block for kind, block in FENCE.findall(README.read_text()) if kind == "python")
    variables: dict = {}
    exec(code, variables)
    found = variables["found"]
    assert found.class_names == names and found.names == [names[label] for label in found.labels]
    assert str(found.names) in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_links_files_and_names_exist(page):
    text = page.read_text()
    programs = [path.stem for path in ROOT.glob("*.py")] + [f"dev.{path.stem}" for path in ROOT.glob("dev/*.py")]
    classes = filter(None, map(settings_class, [*programs, "common.export", "common.predict"]))
    known = {"help"} | {field.name.replace("_", "-") for settings in classes for field in dataclasses.fields(settings)}
    assert set(re.findall(r"--([a-z][a-z0-9-]*)\b", FENCE.sub("", text))) <= known  # accelerate's have a _
    links = [page.parent / link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert not [path for path in (*links, *(ROOT / name for name in OWN_FILE.findall(text))) if not path.exists()]
    for name, file in NAME_IN_FILE.findall(text):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} in {file}"
    start = {"README.md": "", "results.md": r"# .+\n\n[^#|]+\n\|"}.get(page.name, r"# .+\n\n```sh\n")
    assert re.match(start, text), "a page begins with its command, the results with their table"


def test_pages_are_short():
    words = {page.name: len(page.read_text().split()) for page in PAGES}
    assert len(README.read_text().splitlines()) <= MAX_LINES and words.pop("README.md") <= MAX_WORDS
    assert words.pop("recipes.md") <= MAX_WORDS_OF_RECIPES and sum(words.values()) <= MAX_WORDS_OF_PAGES
    recipes = [block for kind, block in FENCE.findall(ROOT.joinpath("docs/recipes.md").read_text()) if kind == "python"]
    assert max(len(re.findall(r"^.*\S", block, re.MULTILINE)) for block in recipes) <= MAX_LINES_OF_A_RECIPE


def fields_of(schema):
    """The names of all properties in a JSON schema."""
    if isinstance(schema, dict):
        yield from (name for key in ("properties", "required") for name in schema.get(key, ()))
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from fields_of(part)


def test_every_field_of_the_results_is_explained():
    schema = json.loads((ROOT / "docs" / "validation_results.schema.json").read_text())
    text = (ROOT / "docs" / "evaluation.md").read_text()
    fields = {name for name in fields_of(schema) if name.isidentifier()}
    assert {"models", "ms_per_image", "AP50"} <= fields
    assert not [name for name in sorted(fields) if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)]
