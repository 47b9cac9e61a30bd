"""Helpers of several test modules: data sets in other formats, detections to evaluate, the reference evaluation."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.cli import flag_name
from common.console import Interrupted, raise_if_interrupted, raise_on_signals
from common.data.memory import DetectionData
from common.data.readers import Request, read_coco
from common.data.sources import TrainDataFlags
from common.evaluate.detections import DetectionTable, ModelRun, coco_detections, detection_table
from common.evaluate.evaluation import evaluate
from common.evaluate.results import (
    DataDescription,
    DetectionNumbers,
    PrimaryNumbers,
    ValidationRecord,
    ValidationResults,
)
from common.model.losses import LossConfig
from common.train.run import Run
from common.types import Detections, ImageMeta, Target, Targets

ROOT = Path(__file__).resolve().parent.parent


def arguments_of(settings) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in vars(settings).items():
        if isinstance(value, bool):
            words += [flag_name(name)] * value
        elif value != "" and value != ():
            words += [flag_name(name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


def tiny_settings(script, data, backbone, **options):
    """Settings with which a training script needs seconds on the demo's scenes; the options come on top."""
    sizes = {"blocks": (2, 4), "image_size": 56, "batch_size": 4, "workers": 0}
    return script.Settings(str(data), backbone=(str(backbone),), **sizes | options)


def stop_at_step(script, settings, step):
    """Train until a signal in one of the steps, which are counted over all epochs."""
    steps, check_finite = itertools.count(1), Run.check_finite

    def check(run, *arguments):
        check_finite(run, *arguments)
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)

    raise_on_signals()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(Run, "check_finite", check)
        script.main(settings)
    with pytest.raises(Interrupted):
        raise_if_interrupted()  # forgets it
    return stopped.value


def start_training(main, settings, processes=1):
    """Start processes that train together, copies of one that has imported what it takes and has done nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["improved_dino_detector", "helpers"])
    workers = []
    for rank in map(str, range(processes)):
        environment = launched | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        environment |= {"DETECTION_CACHE": os.environ["DETECTION_CACHE"]}
        workers.append(server.Process(target=_train, args=(main, settings, Path.cwd(), environment)))
        workers[-1].start()
    return workers


def _train(main, settings, folder, environment):
    signal.alarm(600)  # ends a process that hangs
    os.environ.update(environment)
    os.chdir(folder)
    main(settings)


SIMPLE_LOSS = LossConfig("center", "cross-entropy", "giou", 1.0)
TINY = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 70}


def load_coco(path, images) -> DetectionData:
    """The data set of an annotation file, its images not decoded."""
    return read_coco(Request("", "val", (str(path), str(images)))).check()


def data_flags(data="", limit=0, **flags) -> TrainDataFlags:
    """The flags that name a data set, of which the first `limit` images of each split are read, 0 = all."""
    return TrainDataFlags(str(data), train_images=limit, val_images=limit, **flags)


def truth_as_detections(data):
    """Every non-crowd box as a detection of score 1."""
    detections = []
    for index, image in enumerate(data.images):
        target, keep = data.target(index), ~data.target(index).crowd
        ones = torch.ones(int(keep.sum()))
        detections.append(Detections(image.id, target.boxes[keep], ones, target.labels[keep]))
    return detections


def random_detections(data, seed, count=30):
    """The true boxes with noise and some wrong labels, among random boxes; scores with ties."""
    rng, detections = np.random.default_rng(seed), []
    for index, image in enumerate(data.images):
        boxes, labels = data.target(index).boxes, data.target(index).labels
        noisy = boxes.numpy() + rng.normal(0, 6, boxes.shape)
        noisy[:, 2:] = np.maximum(noisy[:, 2:], noisy[:, :2] + 1)
        corner = rng.uniform(0, 200, (count, 2))
        boxes = np.concatenate([noisy, np.hstack([corner, corner + rng.uniform(5, 150, (count, 2))])])
        labels = np.concatenate([labels.numpy(), rng.integers(0, len(data.class_names), count)])
        wrong = rng.random(len(labels)) < 0.2
        labels[wrong] = rng.integers(0, len(data.class_names), wrong.sum())
        scores = rng.integers(1, 60, len(labels)) / 60
        tensors = torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), torch.from_numpy(labels)
        detections.append(Detections(image.id, *tensors))
    return detections


def evaluated(found, data, weights=None):
    """What `evaluate` makes of a table, or of the detections of all images."""
    table = found if isinstance(found, DetectionTable) else detection_table(found, data)
    return evaluate("m", "m.pth", ModelRun(table, data.class_names), data, weights)


def record_of(name, primary=None, cost=None, conditions=None, diagnosis=None, intervals=None, **detection):
    """A record with these numbers; all others do not exist."""
    numbers, columns = ({field.name: None for field in fields(kind)} for kind in (DetectionNumbers, PrimaryNumbers))
    numbers |= {"per_class": {}, "precision_at_recall": {"0.5": None, "0.75": None}} | detection
    parts = DetectionNumbers(**numbers), PrimaryNumbers(**columns | (primary or {})), cost, conditions or {}
    return ValidationRecord(name, f"{name}.pth", None, *parts, intervals, diagnosis)


def results_of(*records, source="demo", class_names=("a", "b"), comparisons=()):
    data = DataDescription(source, "val", 6, 30, len(class_names), list(class_names), "0")
    return ValidationResults({}, data, list(records), list(comparisons))


def crowded(data):
    """The same data with every fifth box a crowd."""
    return replace(data, crowd=np.arange(len(data.crowd)) % 5 == 0)


def coco_dict(data):
    """The ground truth as a COCO instances dictionary, annotation ids from 1 (an id of 0 would count as unmatched)."""
    columns = (data.image_of_box(), data.labels, data.boxes, data.areas, data.crowd)
    files, ids = data.images, data.category_ids
    annotations = [
        annotation(id=n, image_id=files[i].id, category_id=ids[k], bbox=b.tolist(), area=float(a), iscrowd=int(c))
        for n, (i, k, b, a, c) in enumerate(zip(*columns, strict=True), 1)
    ]
    images = [{"id": i.id, "file_name": i.path.name, "width": i.width, "height": i.height} for i in files]
    categories = [{"id": number, "name": name} for number, name in zip(ids, data.class_names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def pycocotools_stats(truth, detections):
    """COCO's twelve numbers, by pycocotools, from an instances dictionary and a list of COCO results."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def pycocotools_numbers(table, data):
    return pycocotools_stats(coco_dict(data), coco_detections(table, data, [""] * len(data)))


def pixels_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def target_of(boxes, labels=None, crowd=None, size=112):
    """The ground truth of one image, by default boxes of the class 0 that are no crowds."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64)
    crowd = torch.tensor(crowd if crowd is not None else [False] * len(boxes), dtype=torch.bool)
    return Target(boxes, labels, crowd, ImageMeta(1, None, (size, size), (1.0, 1.0)))


def random_targets(batch, seed, size):
    """Targets of 1 to 14 objects of ten classes, crowds among them."""
    generator, targets = torch.Generator().manual_seed(seed), []
    for _ in range(batch):
        count = int(torch.randint(1, 15, (), generator=generator))
        corners = torch.rand(count, 2, generator=generator) * size * 0.7
        boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * size * 0.3 + 3], dim=1)
        labels = torch.randint(0, 10, (count,), generator=generator)
        targets.append(target_of(boxes.tolist(), labels.tolist(), [False] * (count - 1) + [count > 8]))
    return Targets.pad(targets)


def annotation(**parts):
    """An annotation of the first image of the fixture `coco_file`."""
    return {"id": 1, "image_id": 11, "category_id": 3, "bbox": [10, 20, 30, 5], "area": 99.0, "iscrowd": 0} | parts


STORED = {  # how the pixels of an upright image are stored, by the EXIF standard
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned_back(image, orientation):
    """An upright image as a camera stores it that notes this EXIF orientation; Pillow turns it upright again."""
    return image.transpose(STORED[orientation]) if orientation in STORED else image


def encoded(image, orientation, suffix):
    """A file of the image as `turned_back`."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    turned_back(image, orientation).save(file, Image.registered_extensions()[suffix], exif=exif)
    return file.getvalue()


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


class Hostile:
    """Writes a file when pickle loads it."""

    def __reduce__(self):
        return (eval, ("open('hacked', 'w')",))


OFFICIAL_IDS = {"train": (9, 25, 30, 34, 36, 42), "val": (139, 285, 632)}


def jpeg(number):
    return encoded(random_image(40, 30, number), 1, ".jpg")


def official_instances(part):
    ids = OFFICIAL_IDS[part]
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30} for i in ids],
        "annotations": [annotation(id=i, image_id=i, category_id=18, bbox=[1, 2, 10, 9], area=90) for i in ids],
        "categories": [{"id": 18, "name": "dog"}],
    }


def official_archive(content=official_instances):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in OFFICIAL_IDS:
            packed.writestr(f"annotations/instances_{part}2017.json", json.dumps(content(part)))
    return file.getvalue()
