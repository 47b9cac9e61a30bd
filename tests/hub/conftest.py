"""Fixtures: a hub on this machine with a small random DINOv2 and generated rows of COCO's schema, and its client."""

import datasets
import numpy as np
import pytest
import torch
from helpers import jpeg
from loopback import Loopback, Worker
from transformers import Dinov2Config, Dinov2Model

from common.data.hub import COCO

COCO_NAMES = [*COCO[1], *(f"thing {number}" for number in range(76)), *COCO[2]]
OBJECTS = {
    "bbox": datasets.List(datasets.Value("float64")),
    "category": datasets.ClassLabel(names=COCO_NAMES),
    "area": datasets.Value("float64"),
}
FEATURES = {name: datasets.Value("int64") for name in ("image_id", "width", "height")}
FEATURES |= {"image": datasets.Image(), "objects": {name: datasets.List(kind) for name, kind in OBJECTS.items()}}


def row(number):
    corners = np.random.default_rng(number).integers((0, 0), (20, 15), (2, 2))
    boxes = np.concatenate([corners, corners + 12], axis=1).tolist()
    objects = {"bbox": boxes, "category": [number % 80, 0], "area": [144.0, 144.0]}
    return {"image_id": number, "width": 40, "height": 30, "image": {"bytes": jpeg(number)}, "objects": objects}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=12, num_attention_heads=3, mlp_ratio=2, patch_size=14)
    Dinov2Model(config).save_pretrained(root / "models/facebook/dinov2-small")
    folder = root / "datasets/detection-datasets/coco/data"
    folder.mkdir(parents=True)
    for name, first in (("train-00000-of-00001", 1), ("val-00000-of-00001", 101)):
        file, rows = folder / f"{name}.parquet", [row(number) for number in range(first, first + 40)]
        datasets.Dataset.from_list(rows, datasets.Features(FEATURES)).to_parquet(file, batch_size=20)
    server = Loopback(root)
    yield server
    server.shutdown()


@pytest.fixture(scope="session")
def worker(hub, tmp_path_factory):
    client = Worker(hub.address, tmp_path_factory.mktemp("client"))
    yield client
    client.process.stdin.close()
    client.process.wait()
