"""Checkpoints: the same detector again; damaged, foreign and hostile files are refused in one line."""

import math
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import TINY, Hostile, pixels_of
from transformers import Dinov2Backbone, Dinov2Config, Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig

import improved_dino_detector
from common.console import InputError
from common.model.checkpoint import Checkpoint, is_checkpoint, load_checkpoint, save_detector, save_folder
from common.model.detector import new_detector

NAMES, IDS = (*"abcdefghi", "\u0645\u06cc\u200c\u0632"), tuple(range(10, 30, 2))  # one name as Persian is written


@pytest.fixture(scope="module")
def file(tiny_backbone, tmp_path_factory) -> Path:
    """A good checkpoint that no test changes."""
    torch.manual_seed(0)
    detector = new_detector(tiny_backbone, head="linear", blocks=(2, -1), image_size=112, num_classes=10)
    path = tmp_path_factory.mktemp("good") / "detector.pth"
    metrics = {"AP50": None, "AP": np.float64(0.5)}
    save_detector(path, Checkpoint(detector, NAMES, IDS, {"lr": 1e-3, "blocks": (2, 4)}, metrics, 3))
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


REGISTERS = Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig, {"num_register_tokens": 4}
GATED = Dinov2Backbone, Dinov2Config, {"use_swiglu_ffn": True}


@pytest.mark.parametrize(
    ("head", "second_look", "backbone"),
    [("multi-layer", 0, GATED), ("pyramid", 20, REGISTERS)],
    ids=["gated", "registers"],
)
def test_every_kind_of_detector_is_reloaded_and_can_be_trained(head, second_look, backbone, tmp_path):
    model, config, options = backbone
    model(config(**TINY, **options, patch_size=14)).save_pretrained(tmp_path)
    shape = {"blocks": (1, 3), "image_size": 112, "num_classes": 10, "dropout": 0.1, "second_look": second_look}
    detector = new_detector(tmp_path, head=head, **shape).eval()
    save_detector(tmp_path / "a.pth", Checkpoint(detector, NAMES, IDS))
    reloaded, images = load_checkpoint(tmp_path / "a.pth"), pixels_of(1, 3, 112, 112)
    assert same(Checkpoint(detector, NAMES, IDS), reloaded) and not reloaded.detector.training
    assert reloaded.detector.config == detector.config and options.items() <= detector.config.backbone.items()
    assert torch.equal(reloaded.detector(images).boxes, detector(images).boxes)
    reloaded.detector.train()(images).boxes.sum().backward()
    torch.optim.SGD(reloaded.detector.parameters(), 1.0).step()
    save_detector(tmp_path / "b.pth", reloaded)
    assert not same(load_checkpoint(tmp_path / "b.pth"), load_checkpoint(tmp_path / "a.pth"))


def test_checkpoints_of_the_first_version_are_read(tiny_backbone, tmp_path):
    """They had the second look beside the dense head, the oldest had none."""
    torch.manual_seed(0)
    options = {"head": "pyramid", "blocks": (2, 4), "image_size": 112, "num_classes": 10, "second_look": 20}
    checkpoint = Checkpoint(new_detector(tiny_backbone, **options).eval(), NAMES, IDS)
    save_detector(tmp_path / "new.pth", checkpoint)
    content = torch.load(tmp_path / "new.pth", weights_only=True) | {"format_version": 1}
    for new, old in {"head.dense.": "head.", "head.second_look.": "second_look."}.items():
        content["model"] = {name.replace(new, old): weight for name, weight in content["model"].items()}
    torch.save(content, tmp_path / "old.pth")
    assert "second_look.classify.weight" in content["model"] and "head.reduce.weight" in content["model"]
    assert same(load_checkpoint(tmp_path / "old.pth"), checkpoint)
    del content["model_config"]["second_look"]
    content["model"] = {name: w for name, w in content["model"].items() if not name.startswith("second_look")}
    torch.save(content, tmp_path / "oldest.pth")
    assert load_checkpoint(tmp_path / "oldest.pth").detector.head.second_look is None


def test_every_field_is_reloaded_from_a_file_and_from_a_folder_for_the_hub(file, detector, tmp_path):
    checkpoint = load_checkpoint(file)
    save_folder(tmp_path / "hub", checkpoint)
    assert same(load_checkpoint(tmp_path / "hub"), checkpoint) and is_checkpoint(tmp_path / "hub")
    assert is_checkpoint(file) and not is_checkpoint(tmp_path)
    assert checkpoint.detector.config == detector.config and not checkpoint.detector.training
    assert (checkpoint.class_names, checkpoint.category_ids, checkpoint.epoch) == (NAMES, IDS, 3)
    assert checkpoint.train_config == {"lr": 1e-3, "blocks": [2, 4]} and checkpoint.metrics == {"AP50": None, "AP": 0.5}
    assert torch.load(file, weights_only=True)["format_version"] == 2


NOT_OURS = "not a detector's checkpoint"
OTHERS = {
    "missing": (lambda path, content: path.unlink(), "no such checkpoint"),
    "folder": (lambda path, content: (path.unlink(), path.mkdir()), NOT_OURS),
    "text": (lambda path, content: path.write_text("not a checkpoint"), NOT_OURS),
    "bare weights": (lambda path, content: torch.save(content["model"], path), NOT_OURS),
    "newer": (lambda path, content: torch.save({"format_version": 99}, path), "this program reads 1 and 2"),
    "bare pickle": (lambda path, content: path.write_bytes(pickle.dumps(Hostile())), NOT_OURS),
    "pickle": (lambda path, content: torch.save(Hostile(), path), NOT_OURS),
    "name": (lambda path, content: torch.save(content | {"class_names": [*NAMES[1:], Hostile()]}, path), NOT_OURS),
    "old format": (lambda path, content: torch.save(Hostile(), path, _use_new_zipfile_serialization=False), NOT_OURS),
    "weight": (lambda path, c: torch.save(c | {"model": c["model"] | {"x": Hostile()}}, path), NOT_OURS),
    "unused key": (lambda path, content: torch.save(content | {"x": Hostile()}, path), NOT_OURS),
}


@pytest.mark.parametrize(("write", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused_and_hostile_pickles_have_no_effect(
    saved, content, write, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(saved, content)
    assert message in refusal(saved)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("length", [0, 4, 0.1, 0.99, -98, -22, -1])
def test_a_truncated_file_is_refused_as_damaged(saved, length):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: round(length * len(whole)) if isinstance(length, float) else length])
    assert "damaged" in refusal(saved)


def test_a_flipped_bit_changes_nothing_or_is_refused_as_damage(file, saved, content):
    whole, good, draw = file.read_bytes(), load_checkpoint(file), random.Random(0)
    within = [whole.index(weight.numpy().tobytes()[:64]) + draw.randrange(64) for weight in content["model"].values()]
    places = [*within[::4], *draw.sample(range(len(whole)), 30), *range(len(whole) - 98, len(whole), 5)]
    flips = [(place, draw.randrange(8)) for place in places]
    flips.append((whole.rindex(b"PK\1\2") + 38, 4))  # the last part is called a folder
    for place, bit in flips:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert same(load_checkpoint(saved), good) and place not in within
        except InputError as error:
            assert "damaged" in str(error)


ENDLESS = {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 10**6, "num_attention_heads": 3}
CHANGES = {  # of the content of a good checkpoint, or of its model_config
    "unknown head": {"head": "round"},
    "fraction": {"image_size": 112.0},
    "more classes": {"num_classes": 11},
    "falling blocks": {"blocks": (4, 2)},
    "a block too many": {"blocks": (2, 5)},
    "dropout": {"dropout": 1.1},
    "unknown setting": {"wings": 2},
    "another backbone": {"backbone": {"model_type": "bert"}},
    "endless backbone": {"backbone": ENDLESS, "blocks": (10**6,)},
    "no settings": {"model_config": None},
    "a name too few": {"class_names": NAMES[:9]},
    "two lines": {"class_names": ["a\nb", *NAMES[1:]]},
    "escape": {"class_names": ["\x1b[2J", *NAMES[1:]]},
    "an id twice": {"category_ids": [*IDS[:9], 10]},
    "fraction as an id": {"category_ids": [*IDS[:9], 1.5]},
    "tensor in the numbers": {"metrics": {"AP50": torch.ones(())}},
    "epoch": {"epoch": None},
    "no weights": {"model": {}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_settings_that_describe_no_detector_or_another_are_refused_in_one_line(saved, content, change):
    changed = change if content.keys() & change.keys() else {"model_config": content["model_config"] | change}
    torch.save(content | changed, saved)
    assert refusal(saved)


WEIGHT = "head.dense.classify.weight"  # (10 + 1, 96)
WEIGHTS = {  # its change, or what is said of it
    "missing": (lambda w: {}, WEIGHT),
    "unknown": (lambda w: {WEIGHT: w, "x": w}, "Unexpected key"),
    "no tensor": (lambda w: {WEIGHT: [0.0]}, WEIGHT),
    "another shape": (lambda w: {WEIGHT: w[:5].clone()}, WEIGHT),
    "half precision": (lambda w: {WEIGHT: w.half()}, "not all finite"),
    "nan": (lambda w: {WEIGHT: w * math.nan}, "not all finite"),
    "one inf": (lambda w: {WEIGHT: w.clone().index_fill_(1, torch.tensor(3), -math.inf)}, "not all finite"),
    "sparse": (lambda w: {WEIGHT: w.to_sparse()}, "damaged, or not a detector's checkpoint"),
    "no data": (lambda w: {WEIGHT: w.to("meta")}, "damaged, or not a detector's checkpoint"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(saved, content, change, message):
    weights = content["model"].copy()
    torch.save(content | {"model": weights | change(weights.pop(WEIGHT))}, saved)
    assert message in refusal(saved)


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


def test_training_for_the_same_classes_starts_from_the_whole_detector(file, saved, demo_val):
    known = replace(load_checkpoint(file), class_names=demo_val.class_names, category_ids=demo_val.category_ids)
    save_detector(saved, known)
    parts = {"train_config": known.train_config, "metrics": known.metrics, "epoch": 3}
    assert same(replace(start_from(saved, demo_val), **parts), known)


@pytest.fixture
def hub_folder(file, tmp_path) -> Path:
    save_folder(tmp_path / "mine_hub", load_checkpoint(file))
    return tmp_path / "mine_hub"


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


def test_damaged_folders_are_refused(hub_folder):
    weights, config = hub_folder / "model.safetensors", hub_folder / "config.json"
    text = config.read_text()
    for changed in (
        text.replace("dinov2-detection", "timm"),
        "{",
        "[1]",
        text.replace('"image_size": 112', '"image_size": 13'),
    ):
        config.write_text(changed)
        assert changed != text and refusal(hub_folder)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refusal(hub_folder)
