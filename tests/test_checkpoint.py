"""Checkpoints: the same detections in another process, and nothing but plain tensors is ever read."""

import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common.checkpoint import Checkpoint, load_detector, save_detector
from common.errors import InputError

NAMES, IDS = tuple("abcdefghij"), tuple(range(10, 30, 2))

DETECT = """
import sys, torch
from common.checkpoint import load_detector
checkpoint = load_detector(sys.argv[1])
with torch.no_grad():
    out = checkpoint.detector(torch.load(sys.argv[2], weights_only=True))
torch.save([out.object_logits, out.class_logits, out.boxes], sys.argv[3])
"""


@pytest.fixture
def saved(detector, tmp_path):
    path = tmp_path / "detector.pth"
    save_detector(path, Checkpoint(detector, NAMES, IDS, {"lr": 1e-3, "blocks": (2, 4)}, {"AP50": None}, 3))
    return path


def test_reload_in_a_new_process_gives_identical_bits(detector, saved, tmp_path):
    images = torch.rand(2, 3, 112, 112)
    torch.save(images, tmp_path / "images.pt")
    files = [str(saved), str(tmp_path / "images.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", DETECT, *files], cwd=ROOT, check=True)
    with torch.no_grad():
        out = detector(images)
    for ours, theirs in zip((out.object_logits, out.class_logits, out.boxes), torch.load(files[2]), strict=True):
        assert torch.equal(ours, theirs)


def test_everything_comes_back(saved, detector):
    checkpoint = load_detector(saved)
    assert checkpoint.detector.config == detector.config and not checkpoint.detector.training
    assert (checkpoint.class_names, checkpoint.category_ids, checkpoint.epoch) == (NAMES, IDS, 3)
    assert checkpoint.train_config == {"lr": 1e-3, "blocks": (2, 4)} and checkpoint.metrics == {"AP50": None}
    assert torch.load(saved, weights_only=True)["format_version"] == 1


class Hostile:
    def __reduce__(self):
        return (eval, ("open('hacked', 'w')",))


def broken(kind, content, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "hostile":
        path.write_bytes(pickle.dumps(Hostile()))
    elif kind == "bare weights":
        torch.save(content["model"], path)
    elif kind == "other format":
        torch.save(content | {"format_version": 99}, path)
    elif kind == "lost weight":
        content["model"].popitem()
        torch.save(content, path)
    elif kind == "other classes":
        torch.save(content | {"class_names": ["a"]}, path)
    elif kind == "other shape":
        torch.save(content | {"model_config": content["model_config"] | {"num_classes": 3}}, path)
    elif kind == "unknown setting":
        torch.save(content | {"model_config": content["model_config"] | {"wings": 2}}, path)


@pytest.mark.parametrize(
    "kind",
    "truncated,text,hostile,bare weights,other format,lost weight,other classes,other shape,unknown setting".split(","),
)
def test_what_is_no_checkpoint_is_refused_in_one_line(saved, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken(kind, torch.load(saved, weights_only=True), saved)
    with pytest.raises(InputError, match=r"detector\.pth") as caught:
        load_detector(saved)
    assert "\n" not in str(caught.value) and not (tmp_path / "hacked").exists()


def test_a_failed_write_leaves_the_old_file(saved, detector):
    before = saved.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_detector(saved, Checkpoint(detector, NAMES, IDS, {"no plain type": lambda: 0}))
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]
