"""Checkpoints: the same detections in another process; damaged, foreign and hostile files are refused in one line."""

import json
import math
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, Hostile
from torch import nn
from transformers import Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig

import improved_dino_detector
from common.console import InputError
from common.model.checkpoint import Checkpoint, is_checkpoint, load_checkpoint, save_detector, save_folder
from common.model.detector import new_detector

NAMES, IDS = (*"abcdefghi", "\u0645\u06cc\u200c\u0632"), tuple(range(10, 30, 2))  # one name as Persian is written

DETECT = """
import sys, torch
from common.model.checkpoint import load_checkpoint
checkpoint = load_checkpoint(sys.argv[1])
with torch.no_grad():
    out = checkpoint.detector(torch.load(sys.argv[2], weights_only=True))
torch.save([out.object_logits, out.class_logits, out.boxes], sys.argv[3])
"""


@pytest.fixture(scope="module")
def file(tiny_backbone, tmp_path_factory) -> Path:
    """A good checkpoint that no test changes."""
    torch.manual_seed(0)
    detector = new_detector(tiny_backbone, head="linear", blocks=(2, -1), image_size=112, num_classes=10)
    path = tmp_path_factory.mktemp("good") / "detector.pth"
    save_detector(path, Checkpoint(detector, NAMES, IDS, {"lr": 1e-3, "blocks": (2, 4)}, {"AP50": None}, 3))
    return path


@pytest.fixture
def saved(file, tmp_path) -> Path:
    """A copy of it, for tests to change."""
    path = tmp_path / "detector.pth"
    path.write_bytes(file.read_bytes())
    return path


@pytest.fixture
def content(file) -> dict:
    return torch.load(file, weights_only=True)


def refusal(path) -> str:
    """The error message for a checkpoint, without its path."""
    with pytest.raises(InputError) as caught, warnings.catch_warnings(record=True) as warned:
        load_checkpoint(path)
    assert not warned
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    return str(caught.value).removeprefix(f"{path}: ")


def same(one: Checkpoint, other: Checkpoint) -> bool:
    weights = other.detector.state_dict()
    return replace(one, detector=other.detector) == other and all(
        torch.equal(weight, weights[name]) for name, weight in one.detector.state_dict().items()
    )


@pytest.mark.slow
def test_reload_in_a_new_process_gives_identical_bits(detector, file, tmp_path):
    images = torch.rand(2, 3, 112, 112)
    torch.save(images, tmp_path / "images.pt")
    files = [str(file), str(tmp_path / "images.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", DETECT, *files], cwd=ROOT, check=True)
    with torch.no_grad():
        out = detector(images)
    reloaded = torch.load(files[2], weights_only=True)
    for ours, theirs in zip((out.object_logits, out.class_logits, out.boxes), reloaded, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("head", "registers"), [("linear", True), ("multi-layer", False), ("pyramid", True)])
def test_every_kind_of_detector_is_reloaded_and_can_be_trained(head, registers, tiny_backbone, tmp_path):
    if registers:
        shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 70}
        Dinov2WithRegistersBackbone(Dinov2WithRegistersConfig(**shape, patch_size=14)).save_pretrained(tmp_path)
    folder = tmp_path if registers else tiny_backbone
    detector = new_detector(folder, head=head, blocks=(1, 3), image_size=112, num_classes=10, dropout=0.1).eval()
    save_detector(tmp_path / "a.pth", Checkpoint(detector, NAMES, IDS))
    reloaded = load_checkpoint(tmp_path / "a.pth")
    images = torch.rand(1, 3, 112, 112)
    assert same(Checkpoint(detector, NAMES, IDS), reloaded) and not reloaded.detector.training
    assert reloaded.detector.config == detector.config
    assert torch.equal(reloaded.detector(images).boxes, detector(images).boxes)
    reloaded.detector.train()(images).boxes.sum().backward()
    torch.optim.SGD(reloaded.detector.parameters(), 1.0).step()
    save_detector(tmp_path / "b.pth", reloaded)
    assert not same(load_checkpoint(tmp_path / "b.pth"), load_checkpoint(tmp_path / "a.pth"))


def test_checkpoints_of_the_first_version_are_read(tiny_backbone, tmp_path):
    """They had the second look beside the dense head."""
    torch.manual_seed(0)
    options = {"head": "pyramid", "blocks": (2, 4), "image_size": 112, "num_classes": 10, "second_look": 20}
    checkpoint = Checkpoint(new_detector(tiny_backbone, **options).eval(), NAMES, IDS)
    save_detector(tmp_path / "new.pth", checkpoint)
    content = torch.load(tmp_path / "new.pth", weights_only=True) | {"format_version": 1}
    places = {"head.dense.": "head.", "head.second_look.": "second_look."}
    for new, old in places.items():
        content["model"] = {name.replace(new, old): weight for name, weight in content["model"].items()}
    torch.save(content, tmp_path / "old.pth")
    assert "second_look.classify.weight" in content["model"] and "head.reduce.weight" in content["model"]
    assert same(load_checkpoint(tmp_path / "old.pth"), checkpoint)


def test_every_field_is_reloaded(file, detector):
    checkpoint = load_checkpoint(file)
    assert checkpoint.detector.config == detector.config and not checkpoint.detector.training
    assert (checkpoint.class_names, checkpoint.category_ids, checkpoint.epoch) == (NAMES, IDS, 3)
    assert checkpoint.train_config == {"lr": 1e-3, "blocks": [2, 4]} and checkpoint.metrics == {"AP50": None}
    assert torch.load(file, weights_only=True)["format_version"] == 2


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    def full(content, file):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    before, checkpoint = saved.read_bytes(), load_checkpoint(saved)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_detector(saved, checkpoint)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


def write_other_archive(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme.txt", "hello")


OTHERS = {
    "missing": (lambda path, content: path.unlink(), "no such checkpoint"),
    "folder": (lambda path, content: (path.unlink(), path.mkdir()), "not a detector's checkpoint"),
    "text": (lambda path, content: path.write_text("not a checkpoint"), "not a detector's checkpoint"),
    "archive": (lambda path, content: write_other_archive(path), "not a detector's checkpoint"),
    "list": (lambda path, content: torch.save([content], path), "not a detector's checkpoint"),
    "bare weights": (lambda path, content: torch.save(content["model"], path), "not a detector's checkpoint"),
    "module": (lambda path, content: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path), "not a detector's"),
    "newer": (lambda path, content: torch.save({"format_version": 99}, path), "this program reads 1 and 2"),
}


@pytest.mark.parametrize(("write", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_files_are_refused(saved, content, write, message):
    write(saved, content)
    assert message in refusal(saved)


LENGTHS = {"empty": 0, "1 byte": 1, "4 bytes": 4, "a header": 64, "a tenth": 0.1, "half": 0.5, "most": 0.99}
LENGTHS |= {"all but the last 98": -98, "all but the last 22": -22, "all but the last": -1}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_truncated_file_is_refused_as_damaged(saved, length):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: round(length * len(whole)) if isinstance(length, float) else length])
    assert "damaged" in refusal(saved)


def flipped(whole: bytes, place: int, bit: int = 0) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_a_flipped_bit_changes_nothing_or_is_refused_as_damage(file, saved):
    whole, good, draw = file.read_bytes(), load_checkpoint(file), random.Random(0)
    with zipfile.ZipFile(file) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
    within = []
    for part in draw.sample(parts, 30):
        header = sum(struct.unpack_from("<HH", whole, part.header_offset + 26))
        within.append(part.header_offset + 30 + header + draw.randrange(part.file_size))
    places = [*within, *draw.sample(range(len(whole)), 60), *range(len(whole) - 98, len(whole), 3)]
    flips = [(place, draw.randrange(8)) for place in places]
    flips.append((whole.rindex(b"PK\1\2") + 38, 4))  # the last part is called a folder
    for place, bit in flips:
        saved.write_bytes(flipped(whole, place, bit))
        try:
            assert same(load_checkpoint(saved), good) and place not in within
        except InputError as error:
            assert "damaged" in str(error)


HOSTILE = {
    "bare pickle": lambda path, content: path.write_bytes(pickle.dumps(Hostile())),
    "torch's old format": lambda path, content: torch.save(Hostile(), path, _use_new_zipfile_serialization=False),
    "nothing else": lambda path, content: torch.save(Hostile(), path),
    "a name": lambda path, content: torch.save(content | {"class_names": [*NAMES[1:], Hostile()]}, path),
    "a weight": lambda path, content: torch.save(content | {"model": content["model"] | {"x": Hostile()}}, path),
    "an unused key": lambda path, content: torch.save(content | {"x": Hostile()}, path),
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_has_no_effect(saved, content, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(saved, content)
    assert "not a detector's checkpoint" in refusal(saved)
    assert not (tmp_path / "hacked").exists()


CHANGES = {  # of the content of a good checkpoint, or of its model_config
    "other head": {"head": "pyramid"},
    "unknown head": {"head": "round"},
    "head of another type": {"head": ["linear"]},
    "size of no whole patches": {"image_size": 100},
    "fraction": {"image_size": 112.0},
    "more classes": {"num_classes": 11},
    "too many classes": {"num_classes": 10**30},
    "no classes": {"num_classes": 0},
    "no blocks": {"blocks": []},
    "falling blocks": {"blocks": (4, 2)},
    "other blocks": {"blocks": (1, 3)},
    "a block too many": {"blocks": (2, 5)},
    "dropout": {"dropout": 1.1},
    "second look": {"second_look": -1},
    "unknown setting": {"wings": 2},
    "no backbone": {"backbone": {}},
    "another backbone": {"backbone": {"model_type": "bert"}},
    "endless backbone": {
        "backbone": {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 10**6, "num_attention_heads": 3},
        "blocks": (10**6,),
    },
    "version": {"format_version": 3},
    "version of another type": {"format_version": "2"},
    "no settings": {"model_config": None},
    "a name too few": {"class_names": NAMES[:9]},
    "two lines": {"class_names": ["a\nb", *NAMES[1:]]},
    "escape": {"class_names": ["\x1b[2J", *NAMES[1:]]},
    "surrogate": {"class_names": ["\ud800", *NAMES[1:]]},
    "number as a name": {"class_names": [3, *NAMES[1:]]},
    "an id twice": {"category_ids": [*IDS[:9], 10]},
    "fraction as an id": {"category_ids": [*IDS[:9], 1.5]},
    "tensor in the numbers": {"metrics": {"AP50": torch.ones(())}},
    "no numbers": {"metrics": None},
    "set in the settings": {"train_config": {"a": {1}}},
    "epoch": {"epoch": None},
    "no weights": {"model": {}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_settings_that_describe_no_detector_or_another_are_refused_in_one_line(saved, content, change):
    top = content.keys() & change.keys()
    changed = change if top else {"model_config": content["model_config"] | change}
    torch.save(content | changed, saved)
    assert refusal(saved)


WEIGHTS = {  # the change of a weight (10 + 1, 96)
    "missing": lambda w: None,
    "no tensor": lambda w: [0.0],
    "another shape": lambda w: w[:5].clone(),
    "half precision": lambda w: w.half(),
    "nan": lambda w: torch.full_like(w, math.nan),
    "one inf": lambda w: w.clone().index_fill_(1, torch.tensor(3), -math.inf),
    "sparse": lambda w: w.to_sparse(),
    "no data": lambda w: w.to("meta"),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(saved, content, change):
    weights, name = content["model"], "head.dense.classify.weight"
    changed = {**weights, name: change(weights[name])}
    torch.save(content | {"model": {k: v for k, v in changed.items() if v is not None}}, saved)
    assert "weights are not all finite" in refusal(saved) or name in refusal(saved) or "(" in refusal(saved)


def test_unknown_weights_are_refused(saved, content):
    torch.save(content | {"model": content["model"] | {"x": torch.zeros(1)}}, saved)
    assert "Unexpected key" in refusal(saved)


def test_numbers_of_numpy_are_written_as_plain_ones(file, saved):
    save_detector(saved, replace(load_checkpoint(file), metrics={"AP50": np.float64(0.5)}))
    assert load_checkpoint(saved).metrics == {"AP50": 0.5}


def start_from(path, data) -> Checkpoint:
    return improved_dino_detector.initial_checkpoint(improved_dino_detector.Settings(start_from=str(path)), data)


@pytest.mark.parametrize(("head", "second_look"), [("linear", 0), ("pyramid", 20)])
def test_training_for_other_classes_keeps_all_but_the_class_layers(
    head, second_look, tiny_backbone, demo_val, tmp_path, capsys
):
    """The class layers are copied row by row: "Disc " has the row of "disc", new classes have random ones."""
    torch.manual_seed(0)
    names = ("cat", demo_val.class_names[3].upper() + " ", demo_val.class_names[0])
    options = {"head": head, "blocks": (2, 4), "image_size": 112, "second_look": second_look}
    old = new_detector(tiny_backbone, num_classes=3, **options)
    save_detector(tmp_path / "old.pth", Checkpoint(old, names, (1, 2, 3), {"backbone": "tiny"}))
    start = start_from(tmp_path / "old.pth", demo_val)
    assert start.class_names == demo_val.class_names and start.category_ids == demo_val.category_ids
    assert start.train_config == {"backbone": "tiny", "started_from": str(tmp_path / "old.pth")}
    assert "2 of 10 classes; new: " in capsys.readouterr().out
    before, after = old.state_dict(), start.detector.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if ".classify." not in name:
            assert torch.equal(after[name], weight), name
            continue
        others = len(weight) - 3
        assert others == len(after[name]) - 10 == (head == "linear")
        assert torch.equal(after[name][:others], weight[:others])
        for label, row in ((3, 1), (0, 2)):
            assert torch.equal(after[name][others + label], weight[others + row])
        if name.endswith("weight"):
            assert not torch.equal(after[name][others + 1], weight[others])
    images = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(old(images).object_logits, start.detector.eval()(images).object_logits)


def test_training_starts_only_from_good_checkpoints(file, saved, content, demo_val):
    known = replace(load_checkpoint(file), class_names=demo_val.class_names, category_ids=demo_val.category_ids)
    save_detector(saved, known)
    parts = {"train_config": known.train_config, "metrics": known.metrics, "epoch": 3}
    assert same(replace(start_from(saved, demo_val), **parts), known)
    whole, weight = saved.read_bytes(), content["model"]["head.dense.classify.weight"].numpy().tobytes()
    other = content | {"model_config": content["model_config"] | {"head": "pyramid"}}
    for change in (
        lambda: saved.write_bytes(whole[:-1]),
        lambda: saved.write_bytes(flipped(whole, whole.index(weight))),
        lambda: torch.save(Hostile(), saved),
        lambda: torch.save(other, saved),
    ):
        change()
        with pytest.raises(InputError, match=str(saved)) as caught:
            start_from(saved, demo_val)
        assert str(caught.value).isprintable()


@pytest.fixture
def hub_folder(file, tmp_path) -> Path:
    save_folder(tmp_path / "mine_hub", load_checkpoint(file))
    return tmp_path / "mine_hub"


def test_a_folder_for_the_hub_holds_the_same_checkpoint(file, hub_folder):
    original, read = load_checkpoint(file), load_checkpoint(hub_folder)
    assert is_checkpoint(hub_folder) and not is_checkpoint(hub_folder.parent)
    assert read.class_names == NAMES and read.category_ids == IDS and read.epoch == 3
    assert read.detector.config == original.detector.config and read.train_config["lr"] == 1e-3
    weights = read.detector.state_dict()
    for name, weight in original.detector.state_dict().items():
        assert torch.equal(weights[name], weight)


def test_a_detector_on_the_hub_is_read_from_the_cache(hub_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--somebody--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    hub_folder.rename(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load_checkpoint("hub:somebody/mine").class_names == NAMES
    with pytest.raises(InputError, match="detector somebody/other is not in the cache and"):
        load_checkpoint("hub:somebody/other")
    with pytest.raises(InputError, match="is named hub:user/name"):
        load_checkpoint("hub:../mine")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("library_name", lambda c: c | {"library_name": "timm"}),
        ("damaged", lambda c: "{"),
        ("not a detector's checkpoint", lambda c: [c]),
        ("blocks must rise", lambda c: c | {"model_config": c["model_config"] | {"blocks": [4, 2]}}),
        (
            "image_size 13 is not a multiple of 14",
            lambda c: c | {"model_config": c["model_config"] | {"image_size": 13}},
        ),
        ("class names", lambda c: c | {"class_names": ["a"]}),
    ],
)
def test_damaged_settings_of_a_folder_are_refused(hub_folder, message, change):
    path = hub_folder / "config.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=message):
        load_checkpoint(hub_folder)


def test_damaged_weights_of_a_folder_are_refused(hub_folder):
    path = hub_folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: w for name, w in weights.items() if "head" not in name}, path)
    with pytest.raises(InputError, match="Missing key"):
        load_checkpoint(hub_folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(hub_folder)
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_checkpoint(hub_folder)
