"""Checkpoints: the same detections in another process; damaged, foreign and hostile files are refused in one line."""

import json
import math
import pickle
import random
import re
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
    assert checkpoint.train_config == {"lr": 1e-3, "blocks": (2, 4)} and checkpoint.metrics == {"AP50": None}
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
    "folder": (lambda path, content: (path.unlink(), path.mkdir()), "no detector's folder"),
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


NO_INT = (math.nan, math.inf, "1", None, True, [1], {}, torch.ones(2))
SETTINGS = {
    "head": ("round", "Linear", "", 3, None, ["linear"], torch.ones(2)),
    "image_size": (0, -112, 100, 112.0, *NO_INT),
    "num_classes": (0, -10, 10.0, *NO_INT),
    "blocks": (
        (),
        (0,),
        (2, 2),
        (4, 2),
        (2, 5),
        (-1,),
        (2.0, 4),
        (True, 4),
        (2, "4"),
        [2, 4],
        "24",
        3,
        None,
        (None,),
        torch.ones(2),
        (torch.ones(2),),
    ),
    "dropout": (-0.1, 1.1, *NO_INT),
    "backbone": ({}, {"hidden_size": 48}, ["model_type"], "model_type", None, {"model_type": torch.ones(2)}),
}
BACKBONE = {
    "model_type": ("bert", "", 3, None, ["dinov2"]),
    "hidden_size": (0, 47, -48, 10**6, 48.0, *NO_INT),
    "num_hidden_layers": (0, -4, 10**6, 4.0, *NO_INT),
    "num_attention_heads": (0, 5, -3, 3.0, *NO_INT),
    "mlp_ratio": (0, 10**9, 2.5, *NO_INT),
    "hidden_act": ("eval", "", 3, None),
    "layer_norm_eps": (1, "1", None, [1e-6], torch.ones(2)),
    "image_size": (0, 10**6, 70.0, [70, 70], *NO_INT),
    "patch_size": (0, -14, 10**6, [14, 14], *NO_INT),
    "num_channels": (1, 4, *NO_INT),
    "qkv_bias": (1, "yes", None),
    "use_swiglu_ffn": (0, "no"),
    "num_register_tokens": (-1, 10**9, *NO_INT),
    "_attn_implementation": ("eager",),
    "quantization_config": ({"quant_method": "x"},),
}


def itself() -> list:
    value = []
    value.append(value)
    return value


VALUES = {  # the message, and the values
    "format_version": ("format", (0, 3, "1", 1.0, True, None, [1], torch.ones(2))),
    "model_config": ("model_config", (None, [], {}, {"wings": 2}, {1: 2})),
    "class_names": ("class.names?", (None, (), "abcdefghij", NAMES, list(NAMES[:9]), [*NAMES, "k"])),
    "category_ids": ("category.ids", (None, IDS, list(IDS[:9]), [*IDS, 0])),
    "train_config": ("train_config", (None, [], {1: 2}, {"a": torch.ones(2)}, {"a": {("b",): 1}})),
    "metrics": ("metrics|recursion", (None, [], {"AP50": torch.ones(())}, {"a": itself()})),
    "epoch": ("epoch", (-1, 1.0, "1", None, True)),
    "model": ("model|weights", (None, [], {}, {"x": 1})),
}
TEXTS = ("a\nb", "\x1b[2J", "\0", "\x9b", "\u2028", "\ud800", 3, None)
CASES = [("model_config", key, f"^a detector's .*{key}|^a backbone's", values) for key, values in SETTINGS.items()]
CASES += [("backbone", key, f"^a backbone's .*{key}", values) for key, values in BACKBONE.items()]
CASES += [("content", key, *case) for key, case in VALUES.items()]
CASES += [("content", "class_names", "class name", [[*NAMES[:9], text] for text in TEXTS])]
CASES += [("content", "category_ids", "category ids", [[*IDS[:9], i] for i in (10, 2**63, -(2**64), 1.5, *NO_INT)])]


@pytest.mark.parametrize(("part", "key", "message", "values"), CASES, ids=[f"{part}-{key}" for part, key, *_ in CASES])
def test_a_wrong_value_is_refused_in_one_line(saved, content, part, key, message, values):
    config = content["model_config"]
    for value in values:
        wrong = {"content": {key: value}, "model_config": {"model_config": config | {key: value}}}
        wrong["backbone"] = {"model_config": config | {"backbone": config["backbone"] | {key: value}}}
        torch.save(content | wrong[part], saved)
        assert re.search(message, refusal(saved)), value


CONTRADICTIONS = [
    {"num_classes": 11},
    {"head": "pyramid"},
    {"head": "multi-layer"},
    {"blocks": (2,)},
    {"blocks": (1, 3)},
    {"num_classes": 10**30},
    {
        "backbone": {"model_type": "dinov2", "hidden_size": 8192, "num_hidden_layers": 64, "num_attention_heads": 64},
        "blocks": (64,),
    },
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=str)
def test_settings_that_contradict_the_weights_are_refused(saved, content, change):
    torch.save(content | {"model_config": content["model_config"] | change}, saved)
    assert re.search("weights do not fit|describes no detector", refusal(saved))


WEIGHTS = {  # the change of a weight (10 + 1, 96), and the message
    "missing": (lambda w: None, "shape (11, 96)"),
    "no tensor": (lambda w: [0.0], "shape (11, 96)"),
    "another shape": (lambda w: w[:5].clone(), "shape (11, 96)"),
    "half precision": (lambda w: w.half(), "torch.float32"),
    "nan": (lambda w: torch.full_like(w, math.nan), "inf or NaN"),
    "one inf": (lambda w: w.clone().index_fill_(1, torch.tensor(3), -math.inf), "inf or NaN"),
    "sparse": (lambda w: w.to_sparse(), ""),
    "no data": (lambda w: w.to("meta"), ""),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(saved, content, change, message):
    weights, name = content["model"], "head.dense.classify.weight"
    changed = {**weights, name: change(weights[name])}
    torch.save(content | {"model": {k: v for k, v in changed.items() if v is not None}}, saved)
    assert message in refusal(saved)


def test_unknown_weights_are_refused(saved, content):
    torch.save(content | {"model": content["model"] | {"x": torch.zeros(1)}}, saved)
    assert "has no 'x'" in refusal(saved)


UNREADABLE = [{"class_names": NAMES[:9]}, {"class_names": ("a\nb", *NAMES[1:])}, {"epoch": -1}]
UNREADABLE += [{"metrics": {"a": value}} for value in ({1}, np.float64(1), torch.ones(()))]


@pytest.mark.parametrize("change", UNREADABLE, ids=str)
def test_values_that_could_not_be_reloaded_are_not_written(file, change):
    with pytest.raises(InputError):
        replace(load_checkpoint(file), **change)


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
    with pytest.raises(InputError, match=r"hub:somebody/other: detector somebody/other is not in the cache and"):
        load_checkpoint("hub:somebody/other")
    with pytest.raises(InputError, match="is named hub:user/name"):
        load_checkpoint("hub:../mine")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("library_name", lambda c: c | {"library_name": "timm"}),
        ("damaged", lambda c: "{"),
        ("not a detector's folder", lambda c: [c]),
        ("blocks must rise", lambda c: c | {"model_config": c["model_config"] | {"blocks": [4, 2]}}),
        ("image_size must be a multiple", lambda c: c | {"model_config": c["model_config"] | {"image_size": 13}}),
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
    with pytest.raises(InputError, match="weights do not fit"):
        load_checkpoint(hub_folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(hub_folder)
    path.unlink()
    with pytest.raises(InputError, match=r"no detector's folder, which has config\.json and model\.safetensors"):
        load_checkpoint(hub_folder)
