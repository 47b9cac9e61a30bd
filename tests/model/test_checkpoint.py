"""Checkpoints: the same detector again; damaged, foreign and hostile files are refused in one line."""

import math
import pickle
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import TINY, Hostile, pixels_of
from transformers import Dinov2Backbone, Dinov2Config, Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig

from common.console import InputError
from common.model.checkpoint import Checkpoint, is_checkpoint, load_checkpoint, save_detector, save_folder
from common.model.detector import new_detector
from improved_dino_detector import Settings, continued_checkpoint

NAMES, IDS = (*"abcdefghi", "\u0645\u06cc\u200c\u0632"), tuple(range(10, 30, 2))  # one name as Persian is written


@pytest.fixture(scope="module")
def file(build, tmp_path_factory) -> Path:
    """A good checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("good") / "detector.pth"
    metrics = {"AP50": None, "AP": np.float64(0.5)}
    save_detector(path, Checkpoint(build(), NAMES, IDS, {"lr": 1e-3, "blocks": (2, 4)}, metrics, 3))
    return path


@pytest.fixture
def saved(file, tmp_path, monkeypatch) -> Path:
    """A copy of it in the working folder, for tests to change."""
    monkeypatch.chdir(tmp_path)
    return shutil.copy(file, tmp_path / "detector.pth")


def refusal(path) -> str:
    """The error message for a checkpoint, without its path."""
    with pytest.raises(InputError) as caught, warnings.catch_warnings(record=True) as warned:
        load_checkpoint(path)
    assert not warned and not Path("hacked").exists()
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    return str(caught.value).removeprefix(f"{path}: ")


def same(one: Checkpoint, other: Checkpoint) -> bool:
    weights = other.detector.state_dict()
    return replace(one, detector=other.detector) == other and all(
        torch.equal(weight, weights[name]) for name, weight in one.detector.state_dict().items()
    )


KINDS = {  # a head, its second look, a backbone
    "gated": ("multi-layer", 0, Dinov2Backbone, Dinov2Config, {"use_swiglu_ffn": True}),
    "registers": ("pyramid", 20, Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig, {"num_register_tokens": 4}),
}


@pytest.mark.parametrize(("head", "second_look", "model", "config", "options"), KINDS.values(), ids=KINDS)
def test_every_kind_of_detector_is_reloaded_and_can_be_trained(head, second_look, model, config, options, tmp_path):
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


def test_checkpoints_of_the_first_version_are_read(build, tmp_path):
    """They had the second look beside the dense head, the oldest had none."""
    checkpoint = Checkpoint(build("pyramid", second_look=20), NAMES, IDS)
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
WEIGHT = "head.dense.classify.weight"  # (10 + 1, 96)
ENDLESS = {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 10**6, "num_attention_heads": 3}
FILES = {  # in place of a checkpoint
    "missing": (lambda path: path.unlink(), "no such checkpoint"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), NOT_OURS),
    "bare weights": (lambda path: torch.save(torch.load(path, weights_only=True)["model"], path), NOT_OURS),
    "text": (lambda path: path.write_text("not a checkpoint"), NOT_OURS),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Hostile())), NOT_OURS),
    "pickle": (lambda path: torch.save(Hostile(), path), NOT_OURS),
    "old format": (lambda path: torch.save(Hostile(), path, _use_new_zipfile_serialization=False), NOT_OURS),
    "newer": (lambda path: torch.save({"format_version": 99}, path), "this program reads 1 and 2"),
}
CHANGES = [  # of the content of a good checkpoint
    {"class_names": [*NAMES[1:], Hostile()]},
    {"x": Hostile()},
    {"model_config": None},
    {"class_names": NAMES[:9]},
    {"class_names": ["a\nb", *NAMES[1:]]},
    {"class_names": ["\x1b[2J", *NAMES[1:]]},
    {"category_ids": [*IDS[:9], 10]},
    {"category_ids": [*IDS[:9], 1.5]},
    {"metrics": {"AP50": torch.ones(())}},
    {"epoch": None},
    {"model": {}},
]
CONFIGS = [  # of its model_config
    {"head": "round"},
    {"image_size": 112.0},
    {"num_classes": 11},
    {"blocks": (4, 2)},
    {"blocks": (2, 5)},
    {"dropout": 1.1},
    {"wings": 2},
    {"backbone": {"model_type": "bert"}},
    {"backbone": ENDLESS, "blocks": (10**6,)},
]
WEIGHTS = {  # of its weights
    "missing": (lambda w: {}, WEIGHT),
    "unknown": (lambda w: {WEIGHT: w, "x": w}, "Unexpected key"),
    "hostile": (lambda w: {WEIGHT: w, "x": Hostile()}, NOT_OURS),
    "no tensor": (lambda w: {WEIGHT: [0.0]}, WEIGHT),
    "another shape": (lambda w: {WEIGHT: w[:5].clone()}, WEIGHT),
    "half precision": (lambda w: {WEIGHT: w.half()}, "not all finite"),
    "nan": (lambda w: {WEIGHT: w * math.nan}, "not all finite"),
    "one inf": (lambda w: {WEIGHT: w.clone().index_fill_(1, torch.tensor(3), -math.inf)}, "not all finite"),
    "sparse": (lambda w: {WEIGHT: w.to_sparse()}, NOT_OURS),
    "no data": (lambda w: {WEIGHT: w.to("meta")}, NOT_OURS),
}


@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
def test_other_files_are_refused_and_hostile_ones_have_no_effect(saved, write, message):
    write(saved)
    assert message in refusal(saved)


def test_contents_that_describe_no_detector_or_another_are_refused_in_one_line(file, saved):
    content = torch.load(file, weights_only=True)
    for change in [*CHANGES, *({"model_config": content["model_config"] | config} for config in CONFIGS)]:
        torch.save(content | change, saved)
        assert refusal(saved), change


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(file, saved, change, message):
    content = torch.load(file, weights_only=True)
    weights = content["model"]
    torch.save(content | {"model": weights | change(weights.pop(WEIGHT))}, saved)
    assert message in refusal(saved)


def test_a_truncated_file_is_refused_and_a_flipped_bit_changes_nothing_or_is(file, saved):
    whole, good, draw = file.read_bytes(), load_checkpoint(file), random.Random(0)
    for length in (0, 4, len(whole) // 10, -len(whole) // 100, -98, -22, -1):
        saved.write_bytes(whole[:length])
        assert "damaged" in refusal(saved)
    weights = good.detector.state_dict().values()
    within = [whole.index(weight.numpy().tobytes()[:64]) + draw.randrange(64) for weight in weights]
    places = [*within[::4], *draw.sample(range(len(whole)), 30), *range(len(whole) - 98, len(whole), 5)]
    flips = [(place, draw.randrange(8)) for place in places]
    flips.append((whole.rindex(b"PK\1\2") + 38, 4))  # the last part is called a folder
    for place, bit in flips:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert same(load_checkpoint(saved), good) and place not in within
        except InputError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize(("head", "second_look"), [("linear", 0), ("pyramid", 20)])
def test_training_for_other_classes_keeps_all_but_the_class_layers(
    head, second_look, build, demo_val, tmp_path, capsys
):
    """The class layers are copied row by row: "Disc " has the row of "disc", new classes have random ones."""
    names = ("cat", demo_val.class_names[3].upper() + " ", demo_val.class_names[0])
    old, path = build(head, num_classes=3, second_look=second_look), str(tmp_path / "old.pth")
    save_detector(path, Checkpoint(old, names, (1, 2, 3), {"backbone": "tiny"}))
    start = continued_checkpoint(Settings(start_from=path), demo_val)
    assert start.class_names == demo_val.class_names and start.category_ids == demo_val.category_ids
    assert start.train_config == {"backbone": "tiny", "started_from": path}
    assert "2 of 10 classes; new: " in capsys.readouterr().out
    before, after = old.state_dict(), start.detector.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if ".classify." not in name:
            assert torch.equal(after[name], weight), name
            continue
        others = len(weight) - 3
        assert others == len(after[name]) - 10 == (head == "linear")
        kept = [*range(others), others + 3, others]  # the object's row, those of the classes 3 and 0
        assert torch.equal(after[name][kept], weight[[*range(others), others + 1, others + 2]])
        assert name.endswith("bias") or not torch.equal(after[name][others + 1], weight[others])


def test_training_for_the_same_classes_starts_from_the_whole_detector(file, saved, demo_val):
    known = replace(load_checkpoint(file), class_names=demo_val.class_names, category_ids=demo_val.category_ids)
    save_detector(saved, known)
    start = continued_checkpoint(Settings(start_from=str(saved)), demo_val)
    assert same(replace(start, train_config=known.train_config, metrics=known.metrics, epoch=3), known)


def test_a_detector_on_the_hub_is_read_from_the_cache(file, tmp_path, monkeypatch):
    cache = tmp_path / "models--somebody--mine"
    save_folder(cache / "snapshots" / ("0" * 40), load_checkpoint(file))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_checkpoint("hub:somebody/mine").class_names == NAMES
    with pytest.raises(InputError, match="detector somebody/other is not in the cache: HF_HUB_OFFLINE is set"):
        load_checkpoint("hub:somebody/other")
    with pytest.raises(InputError, match="is named hub:user/name"):
        load_checkpoint("hub:../mine")


def test_damaged_folders_are_refused(file, tmp_path):
    save_folder(tmp_path, load_checkpoint(file))
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    text = config.read_text()
    foreign, small = text.replace("dinov2-detection", "timm"), text.replace('"image_size": 112', '"image_size": 13')
    for changed in (foreign, small, "{", "[1]"):
        config.write_text(changed)
        assert changed != text and refusal(tmp_path)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refusal(tmp_path)
