"""Checkpoints: the same detections in another process, and nothing in a file that can do harm."""

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

import pytest
import torch
from helpers import ROOT, Hostile
from torch import nn
from transformers import Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig

import improved_dino_detector
from common.console import InputError
from common.evaluate.cost import FORGET_PEAK, PeakMemory
from common.model.checkpoint import MAX_INSTRUCTIONS, Checkpoint, load_detector, save_detector
from common.model.detector import MAX_CLASSES, DetectorConfig, build_detector, new_detector

NAMES, IDS = tuple("abcdefghij"), tuple(range(10, 30, 2))

DETECT = """
import sys, torch
from common.model.checkpoint import load_detector
checkpoint = load_detector(sys.argv[1])
with torch.no_grad():
    out = checkpoint.detector(torch.load(sys.argv[2], weights_only=True))
torch.save([out.object_logits, out.class_logits, out.boxes], sys.argv[3])
"""


@pytest.fixture(scope="module")
def file(tiny_backbone, tmp_path_factory) -> Path:
    """A good checkpoint, for tests that leave it as it is."""
    torch.manual_seed(0)
    detector = new_detector(tiny_backbone, head="linear", blocks=(2, -1), image_size=112, num_classes=10)
    path = tmp_path_factory.mktemp("good") / "detector.pth"
    save_detector(path, Checkpoint(detector, NAMES, IDS, {"lr": 1e-3, "blocks": (2, 4)}, {"AP50": None}, 3))
    return path


@pytest.fixture
def saved(file, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    path = tmp_path / "detector.pth"
    path.write_bytes(file.read_bytes())
    return path


@pytest.fixture
def content(file) -> dict:
    return torch.load(file, weights_only=True)


def refusal(path) -> str:
    """The one line in which a checkpoint is refused, without its path."""
    with pytest.raises(InputError) as caught, warnings.catch_warnings(record=True) as warned:
        load_detector(path)
    assert not warned
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    return str(caught.value).removeprefix(f"{path}: ")


def same(one: Checkpoint, other: Checkpoint) -> bool:
    weights = other.detector.state_dict()
    return replace(one, detector=other.detector) == other and all(
        torch.equal(weight, weights[name]) for name, weight in one.detector.state_dict().items()
    )


def repack(path: Path, compression: int = zipfile.ZIP_STORED, **parts: bytes) -> None:
    """Write the archive anew with other parts, named without their dots and folders: data_0 for data/0."""
    with zipfile.ZipFile(path) as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, part in whole.items():
            archive.writestr(name, parts.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), part))


def test_reload_in_a_new_process_gives_identical_bits(detector, file, tmp_path):
    images = torch.rand(2, 3, 112, 112)
    torch.save(images, tmp_path / "images.pt")
    files = [str(file), str(tmp_path / "images.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", DETECT, *files], cwd=ROOT, check=True)
    with torch.no_grad():
        out = detector(images)
    found = torch.load(files[2], weights_only=True)
    for ours, theirs in zip((out.object_logits, out.class_logits, out.boxes), found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("head", "registers"), [("linear", True), ("multi-layer", False), ("pyramid", True)])
def test_every_kind_of_detector_comes_back_and_can_be_trained(head, registers, tiny_backbone, tmp_path):
    if registers:
        shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 70}
        Dinov2WithRegistersBackbone(Dinov2WithRegistersConfig(**shape, patch_size=14)).save_pretrained(tmp_path)
    folder = tmp_path if registers else tiny_backbone
    detector = new_detector(folder, head=head, blocks=(1, 3), image_size=112, num_classes=10, dropout=0.1).eval()
    save_detector(tmp_path / "a.pth", Checkpoint(detector, NAMES, IDS))
    found = load_detector(tmp_path / "a.pth")
    images = torch.rand(1, 3, 112, 112)
    assert same(Checkpoint(detector, NAMES, IDS), found) and not found.detector.training
    assert found.detector.config == detector.config
    assert torch.equal(found.detector(images).boxes, detector(images).boxes)
    found.detector.train()(images).boxes.sum().backward()
    torch.optim.SGD(found.detector.parameters(), 1.0).step()
    save_detector(tmp_path / "b.pth", found)
    assert not same(load_detector(tmp_path / "b.pth"), load_detector(tmp_path / "a.pth"))


def test_everything_comes_back(file, detector):
    checkpoint = load_detector(file)
    assert checkpoint.detector.config == detector.config and not checkpoint.detector.training
    assert (checkpoint.class_names, checkpoint.category_ids, checkpoint.epoch) == (NAMES, IDS, 3)
    assert checkpoint.train_config == {"lr": 1e-3, "blocks": (2, 4)} and checkpoint.metrics == {"AP50": None}
    assert torch.load(file, weights_only=True)["format_version"] == 1


def test_the_largest_vocabulary_is_no_trouble(tiny_backbone, tmp_path):
    names = tuple(f"class number {number}" for number in range(MAX_CLASSES))
    detector = new_detector(tiny_backbone, head="linear", blocks=(1,), image_size=112, num_classes=MAX_CLASSES)
    save_detector(tmp_path / "a.pth", Checkpoint(detector, names, tuple(range(MAX_CLASSES))))
    assert load_detector(tmp_path / "a.pth").class_names == names


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    def full(content, file):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    before, checkpoint = saved.read_bytes(), load_detector(saved)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_detector(saved, checkpoint)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


def write_other_archive(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme.txt", "hello")


OTHERS = {
    "text": (lambda path, content: path.write_text("not a checkpoint"), "of another program"),
    "archive": (lambda path, content: write_other_archive(path), "of another program"),
    "list": (lambda path, content: torch.save([content], path), "of another kind"),
    "bare weights": (lambda path, content: torch.save(content["model"], path), "of another kind"),
    "newer": (lambda path, content: torch.save(content | {"format_version": 99}, path), "this version reads 1"),
}


@pytest.mark.parametrize(("write", "said"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(saved, content, write, said):
    write(saved, content)
    assert said in refusal(saved)


LENGTHS = {"nothing": 0, "1 byte": 1, "4 bytes": 4, "a header": 64, "a tenth": 0.1, "half": 0.5, "most": 0.99}
LENGTHS |= {"all but the last 98": -98, "all but the last 22": -22, "all but the last": -1}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_file_cut_short_is_called_damaged(saved, length):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: round(length * len(whole)) if isinstance(length, float) else length])
    assert "damaged" in refusal(saved)


def flipped(whole: bytes, place: int, bit: int = 0) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_a_flipped_bit_changes_nothing_or_is_called_damage(file, saved):
    whole, good, draw = file.read_bytes(), load_detector(file), random.Random(0)
    with zipfile.ZipFile(file) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
    within = []
    for part in draw.sample(parts, 30):
        header = sum(struct.unpack_from("<HH", whole, part.header_offset + 26))
        within.append(part.header_offset + 30 + header + draw.randrange(part.file_size))
    for place in (*within, *draw.sample(range(len(whole)), 60), *range(len(whole) - 98, len(whole), 3)):
        saved.write_bytes(flipped(whole, place, draw.randrange(8)))
        try:
            assert same(load_detector(saved), good) and place not in within
        except InputError as error:
            assert "damaged" in str(error) or "larger than the file" in str(error)


class Calls:
    """Unpickled by calling `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "bare pickle": lambda path, content: path.write_bytes(pickle.dumps(Hostile())),
    "torch's old format": lambda path, content: torch.save(Hostile(), path, _use_new_zipfile_serialization=False),
    "nothing else": lambda path, content: torch.save(Hostile(), path),
    "a name": lambda path, content: torch.save(content | {"class_names": [*NAMES[1:], Hostile()]}, path),
    "a weight": lambda path, content: torch.save(content | {"model": content["model"] | {"x": Hostile()}}, path),
    "a key nobody reads": lambda path, content: torch.save(content | {"x": Hostile()}, path),
    "newer pickle": lambda path, content: repack(path, data_pkl=pickle.dumps(Hostile(), 4)),
    "module": lambda path, content: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path),
    "system": lambda path, content: repack(path, data_pkl=b"cos\nsystem\n(X\x0c\0\0\0touch hackedtR."),
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_hostile_pickle_has_no_effect(saved, content, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(saved, content)
    with torch.serialization.safe_globals([(eval, "builtins.eval")]):  # as if another package had let it through
        assert re.search("it holds (GLOBAL|FRAME)|of another program", refusal(saved))
    assert not (tmp_path / "hacked").exists()


def test_parts_that_only_another_reader_of_archives_sees_are_not_read(saved):
    """torch's reader takes upper for lower case."""
    saved.write_bytes(saved.read_bytes().replace(b"archive/data.pkl", b"archive/DATA.PKL"))
    assert torch.load(saved, weights_only=True)["epoch"] == 3
    assert "of another program" in refusal(saved)


def claims(content, **settings) -> dict:
    """A checkpoint of a detector of another shape, its weights one number each, said to be repeated."""
    config = content["model_config"] | settings
    with torch.device("meta"):
        shapes = build_detector(DetectorConfig(**config)).state_dict()
    return content | {"model_config": config, "model": {k: torch.zeros(1).expand(t.shape) for k, t in shapes.items()}}


def nested(levels: int, width: int):
    value = 0
    for _ in range(levels):
        value = [value] * width
    return value


def itself() -> list:
    value = []
    value.append(value)
    return value


HUGE = {
    "model_type": "dinov2",
    "hidden_size": 8192,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "mlp_ratio": 16,
}
TUPLES = b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."
BOMBS = {  # what they hold, and what is said of them
    "huge architecture": (
        lambda c: c | {"model_config": c["model_config"] | {"backbone": HUGE, "blocks": (64,)}},
        "is missing",
    ),
    "huge weights of one number": (lambda c: claims(c, backbone=HUGE, blocks=(64,)), "as many numbers as it claims"),
    "array": (lambda c: c | {"metrics": {"a": Calls(bytearray, 2 << 30)}}, "bytearray'"),
    "tensor": (lambda c: c | {"metrics": {"a": Calls(torch.Tensor, 2 << 30)}}, "Tensor'"),
    "lists of lists": (lambda c: c | {"metrics": {"a": nested(7, 50)}}, "names and settings are more"),
    "deep lists": (lambda c: c | {"metrics": {"a": nested(100, 1)}}, "names and settings are more"),
    "a list in itself": (lambda c: c | {"metrics": {"a": itself()}}, "names and settings are more"),
    "repeated text": (lambda c: c | {"train_config": {"a": ["x" * 10_000] * 10_000}}, "names and settings are more"),
    "unpacked": (None, "larger than the file"),
    "tuples": (TUPLES, "holds more than"),
    "instructions": (b"\x80\x02](" + b"}" * (MAX_INSTRUCTIONS + 1) + b"e.", "holds more than"),
}


@pytest.mark.skipif(not FORGET_PEAK.exists(), reason="memory is only measured on Linux")
@pytest.mark.parametrize(("bomb", "said"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_takes_little_memory_and_time(saved, content, bomb, said):
    if bomb is None:
        repack(saved, zipfile.ZIP_DEFLATED, data_0=bytes(300 << 20))
    elif isinstance(bomb, bytes):
        repack(saved, data_pkl=bomb)
    else:
        torch.save(bomb(content), saved)
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as peak:
        assert said in refusal(saved)
    assert saved.stat().st_size < 5e6 and peak.megabytes < before.megabytes + 150


NO_NUMBER = (math.nan, math.inf, "1", None, True, [1], {})
SETTINGS = {
    "head": ("round", "Linear", "", 3, None, ["linear"]),
    "image_size": (0, -112, 100, 14 * 1000, 10**30, 112.0, *NO_NUMBER),
    "num_classes": (0, -10, MAX_CLASSES + 1, 10.0, *NO_NUMBER),
    "blocks": ((), (0,), (2, 2), (4, 2), (2, 5), (-1,), (2.0, 4), (True, 4), (2, "4"), [2, 4], "24", 3, None, (None,)),
    "dropout": (-0.1, 1.1, *NO_NUMBER),
    "backbone": ({}, {"hidden_size": 48}, ["model_type"], "model_type", None),
}
BACKBONE = {
    "model_type": ("bert", "", 3, None, ["dinov2"]),
    "hidden_size": (0, 47, -48, 10**6, 48.0, *NO_NUMBER),
    "num_hidden_layers": (0, -4, 10**6, 4.0, *NO_NUMBER),
    "num_attention_heads": (0, 5, -3, 3.0, *NO_NUMBER),
    "mlp_ratio": (0, 10**9, 2.5, *NO_NUMBER),
    "hidden_act": ("eval", "", 3, None),
    "layer_norm_eps": (0.0, -1e-6, 1.0, *NO_NUMBER),
    "image_size": (0, 10**6, 70.0, [70, 70], *NO_NUMBER),
    "patch_size": (0, -14, 10**6, [14, 14], *NO_NUMBER),
    "num_channels": (1, 4, *NO_NUMBER),
    "qkv_bias": (1, "yes", None),
    "use_swiglu_ffn": (0, "no"),
    "num_register_tokens": (-1, 10**9, *NO_NUMBER),
    "_attn_implementation": ("eager",),
    "quantization_config": ({"quant_method": "x"},),
}
PLAIN = "names and settings must be plain"
VALUES = {  # what is said of it, and the values
    "format_version": ("format", (0, 2, "1", 1.0, True, None, [1], torch.ones(2))),
    "model_config": (f"model_config|{PLAIN}", (None, [], {}, {"wings": 2}, {1: 2})),
    "class_names": ("class.names?", (None, (), "abcdefghij", NAMES, list(NAMES[:9]), [*NAMES, "k"])),
    "category_ids": ("category.ids", (None, IDS, list(IDS[:9]), [*IDS, 0])),
    "train_config": (f"train_config|{PLAIN}", (None, [], {1: 2}, {"a": torch.ones(2)}, {"a": {("b",): 1}})),
    "metrics": (f"metrics|{PLAIN}", (None, [], {"AP50": torch.ones(())})),
    "epoch": ("epoch", (-1, 1.0, "1", None, True)),
    "model": ("model|weights", (None, [], {}, {"x": 1})),
}
TEXTS = ("a\nb", "\x1b[2J", "\0", "\x9b", "\u2028", "\ud800", "x" * 1001, 3, None)
CASES = [("model_config", key, f"^a detector's .*{key}|^a backbone's", values) for key, values in SETTINGS.items()]
CASES += [("backbone", key, f"^a backbone's .*{key}", values) for key, values in BACKBONE.items()]
CASES += [("content", key, *case) for key, case in VALUES.items()]
CASES += [("content", "class_names", "class name", [[*NAMES[:9], text] for text in TEXTS])]
CASES += [("content", "category_ids", "category ids", [[*IDS[:9], i] for i in (10, 2**63, -(2**64), 1.5, *NO_NUMBER)])]


@pytest.mark.parametrize(("part", "key", "said", "values"), CASES, ids=[f"{part}-{key}" for part, key, *_ in CASES])
def test_a_wrong_value_is_refused_in_one_line(saved, content, part, key, said, values):
    config = content["model_config"]
    for value in values:
        wrong = {"content": {key: value}, "model_config": {"model_config": config | {key: value}}}
        wrong["backbone"] = {"model_config": config | {"backbone": config["backbone"] | {key: value}}}
        torch.save(content | wrong[part], saved)
        assert re.search(said, refusal(saved)), value


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_hold_no_tensors(saved, content, key):
    for value in (torch.ones(2), (torch.ones(2),), {"model_type": torch.ones(2)}):
        torch.save(content | {"model_config": content["model_config"] | {key: value}}, saved)
        assert PLAIN in refusal(saved)


CONTRADICTIONS = [
    {"num_classes": 11},
    {"head": "pyramid"},
    {"head": "multi-layer"},
    {"blocks": (2,)},
    {"blocks": (1, 3)},
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=str)
def test_settings_that_do_not_go_with_the_weights(saved, content, change):
    torch.save(content | {"model_config": content["model_config"] | change}, saved)
    assert "weights do not fit" in refusal(saved)


WEIGHTS = {  # what becomes of a weight (10 + 1, 96), and what is said of it
    "lost": (lambda w: None, "is missing"),
    "no tensor": (lambda w: [0.0], "shape"),
    "another shape": (lambda w: w[:5].clone(), "shape (11, 96)"),
    "turned": (lambda w: w.T.contiguous().T, "as many numbers as it claims"),
    "part of another": (lambda w: torch.zeros(99, 96)[:11], "as many numbers as it claims"),
    "half precision": (lambda w: w.half(), "HalfStorage"),
    "nan": (lambda w: torch.full_like(w, math.nan), "infinite or none"),
    "one infinite number": (lambda w: w.clone().index_fill_(1, torch.tensor(3), -math.inf), "infinite or none"),
}


@pytest.mark.parametrize(("change", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_the_detectors(saved, content, change, said):
    weights, name = content["model"], "head.classify.weight"
    changed = {**weights, name: change(weights[name])}
    torch.save(content | {"model": {k: v for k, v in changed.items() if v is not None}}, saved)
    assert said in refusal(saved)


def test_weights_too_many_or_shared(saved, content):
    torch.save(content | {"model": content["model"] | {"x": torch.zeros(1)}}, saved)
    assert "too many" in refusal(saved)
    twin = content["model"]["backbone.vit.encoder.layer.0.norm1.weight"]
    torch.save(content | {"model": content["model"] | {"backbone.vit.encoder.layer.1.norm1.weight": twin}}, saved)
    assert "one and the same" in refusal(saved)


UNREADABLE = [{"class_names": NAMES[:9]}, {"class_names": ("a\nb", *NAMES[1:])}, {"epoch": -1}, {"metrics": {"a": {1}}}]


@pytest.mark.parametrize("change", UNREADABLE, ids=str)
def test_what_could_not_be_read_again_is_not_written(file, change):
    with pytest.raises(InputError):
        replace(load_detector(file), **change)


def begin(path, data) -> Checkpoint:
    return improved_dino_detector.first_detector(improved_dino_detector.Settings(start_from=str(path)), data)


def test_training_starts_from_good_checkpoints_alone(file, saved, content, demo_val):
    known = replace(load_detector(file), class_names=demo_val.class_names)
    save_detector(saved, known)
    assert same(replace(begin(saved, demo_val), train_config=known.train_config, epoch=3), known)
    whole = saved.read_bytes()
    other = content | {"model_config": content["model_config"] | {"head": "pyramid"}}
    for spoil in (
        lambda: saved.write_bytes(whole[:-1]),
        lambda: saved.write_bytes(flipped(whole, len(whole) // 2)),
        lambda: torch.save(Hostile(), saved),
        lambda: torch.save(other, saved),
        lambda: save_detector(saved, replace(known, class_names=NAMES)),
    ):
        spoil()
        with pytest.raises(InputError, match=str(saved)) as caught:
            begin(saved, demo_val)
        assert str(caught.value).isprintable()
