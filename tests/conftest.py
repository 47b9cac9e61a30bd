"""Fixtures: a tiny DINOv2 and a few generated scenes; no network."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub library is imported, which these do
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch: as fast for models this small, and forked processes have no more

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, TINY, evaluated, load_coco, random_detections
from transformers import Dinov2Backbone, Dinov2Config

from common import console
from common.data.demo import make_demo
from common.data.memory import DetectionData
from common.evaluate.bootstrap import image_weights
from common.evaluate.evaluation import describe_data
from common.evaluate.results import Cost, ValidationRecord, ValidationResults, write_results
from common.model.detector import Detector, new_detector


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate fixes the precision once for a process; each test chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def own_signals():
    """`cli.run` shows messages and installs signal handlers for the rest of the process."""
    console.show_messages()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    console._received.clear()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real images and weights; tests that use them are skipped where they are absent."""
    folder = Path(os.environ.get("DETECTION_ASSETS", ROOT.parent / "shared"))
    if not (folder / "coco-subset").is_dir():
        pytest.skip(f"no real images in {folder} (DETECTION_ASSETS names their place)")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    """A folder with a DINOv2 of four small blocks and random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    Dinov2Backbone(Dinov2Config(**TINY, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Twelve training and six validation scenes in COCO's layout."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo(folder, train=12, val=6, seed=1)
    return folder


@pytest.fixture(scope="session")
def demo_val(demo) -> DetectionData:
    return load_coco(demo / "annotations" / "instances_val2017.json", demo / "val2017")


@pytest.fixture(scope="session")
def results_file(demo_val, tmp_path_factory) -> Path:
    """A results file of two models with numbers and one that could not be evaluated."""
    cost, weights = Cost(1000, 50.0, 20.0, 4, None, "CPU", "fp32"), image_weights(len(demo_val), 0)
    records = [ValidationRecord("third", "third.pth", error="no such file")]
    for seed, name in ((1, "second"), (0, "first")):
        record = evaluated(random_detections(demo_val, seed), demo_val, weights).record
        records.insert(0, replace(record, name=name, cost=cost))
    path = tmp_path_factory.mktemp("results") / "validation_results.json"
    write_results(path, ValidationResults({}, describe_data(demo_val, "demo"), records))
    return path


@pytest.fixture(scope="session")
def build(tiny_backbone):
    """Makes an untrained detector, by default of ten classes at 112 pixels, in evaluation mode."""

    def make(head="linear", **changes) -> Detector:
        torch.manual_seed(0)
        shape = {"blocks": (2, -1), "image_size": 112, "num_classes": 10}
        return new_detector(tiny_backbone, head=head, **shape | changes).eval()

    return make


@pytest.fixture
def detector(build) -> Detector:
    return build()


@pytest.fixture
def own_folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with a cache of its own."""
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coco_file(tmp_path):
    """Writes a COCO JSON beside two grey images (100 x 60 and 40 x 80) and returns (json path, images' folder)."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (100, 60), "grey").save(images / "a.png")
    Image.new("RGB", (40, 80), "grey").save(images / "b.png")

    def write(annotations, categories=((3, "cat"), (7, "dog")), parts=None):
        content = {
            "images": [
                {"id": 11, "file_name": "a.png", "width": 100, "height": 60},
                {"id": 5, "file_name": "b.png", "width": 40, "height": 80},
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in categories],
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content | (parts or {})))
        return path, images

    return write
