"""Detectors of transformers: their detections are those of transformers' own post-processing, in original pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

import comprehensive_validation
from common.console import InputError
from common.data.memory import DetectionData, ImageFile
from common.evaluate.others import run_transformers
from common.hub import hub_name
from common.types import convert_boxes

CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 64}
SHAPES = ((120, 80), (60, 100), (64, 64), (33, 97))  # width and height
TINY = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8]}


def detr(classes):
    backbone = ResNetConfig(**TINY, depths=[1, 1, 1, 1], out_features=["stage4"])
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7}
    config = DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes, **heads, **classes)
    return DetrForObjectDetection(config), DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})


def yolos(classes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = YolosConfig(image_size=[64, 64], num_detection_tokens=7, **sizes, **classes)
    return YolosForObjectDetection(config), YolosImageProcessor(size=SIZE)


def rt_detr(classes):
    stages = ["stage2", "stage3", "stage4"]
    backbone = RTDetrResNetConfig(**TINY, depths=[1, 1, 1, 1], layer_type="basic", out_features=stages)
    encoder = {"encoder_hidden_dim": 16, "encoder_in_channels": [8, 8, 8], "encoder_ffn_dim": 16}
    decoder = {"decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2, "num_queries": 20}
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "anchor_image_size": None}
    config = RTDetrConfig(backbone_config=backbone, **encoder, **decoder, **sizes, **classes)
    return RTDetrForObjectDetection(config), RTDetrImageProcessor(size=SIZE)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> DetectionData:
    """Four images of random pixels and different shapes, with two classes."""
    folder, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    images = []
    for number, (width, height) in enumerate(SHAPES):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(path)
        images.append(ImageFile(10 + number, path, width, height))
    nothing = {"labels": np.zeros(0, np.int64), "crowd": np.zeros(0, bool), "areas": np.zeros(0)}
    boxes, starts = np.zeros((0, 4)), np.zeros(len(SHAPES) + 1, np.int64)
    return DetectionData(tuple(images), (1, 2), ("cat", "dog"), boxes, **nothing, starts=starts, source=str(folder))


def saved(build, folder: Path, names) -> Path:
    torch.manual_seed(0)
    model, processor = build({"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def detections_on(run, index):
    """Boxes as xyxy, scores and labels on one image."""
    table = run.table.select(run.table.image == index)
    boxes = torch.from_numpy(convert_boxes(table.boxes, "xywh", "xyxy")).float()
    return boxes, torch.from_numpy(table.score).float(), torch.from_numpy(table.label)


@pytest.mark.parametrize("build", [detr, yolos, rt_detr])
def test_detections_are_those_of_its_own_post_processing(build, shapes, tmp_path):
    folder = saved(build, tmp_path / "model", ("cat", "N/A", "dog"))
    found = run_transformers(str(folder), shapes, 3, CPU)
    assert found.class_names == ("cat", "N/A", "dog") and found.cost.precision == "fp32"
    assert found.cost.ms_per_image > 0 and found.cost.parameters > 1000 and found.cost.batch_size == 3
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForObjectDetection, AutoImageProcessor))
    for index, (image, (width, height)) in enumerate(zip(shapes.images, SHAPES, strict=True)):
        boxes, scores, _ = detections_on(found, index)
        assert len(scores) > 5
        with torch.no_grad():
            out = model.eval()(**processor(images=image.open(), return_tensors="pt"))
        (own,) = processor.post_process_object_detection(out, threshold=0.001, target_sizes=[(height, width)])
        best = own["scores"].sort(descending=True, stable=True).indices[: len(scores)]
        assert torch.allclose(scores, own["scores"][best], atol=1e-4)
        distance = (boxes[:, None] - own["boxes"]).abs().amax(-1)
        distance[(scores[:, None] - own["scores"]).abs() > 1e-3] = torch.inf
        assert (distance.amin(1) < 0.1).all()


@pytest.mark.parametrize("build", [detr, yolos])
def test_a_known_box_lies_in_the_pixels_of_each_image(build, shapes, tmp_path):
    folder = saved(build, tmp_path / "model", ("cat", "dog"))
    weights = load_file(folder / "model.safetensors")
    for key, weight in weights.items():
        if "bbox_predictor.layers.2" in key or "class_labels_classifier" in key:
            weight.zero_()
        if "class_labels_classifier" in key and weight.shape == (3,):  # the bias of the last layer
            weight[1] = 9.0  # a dog, wherever it looks
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = run_transformers(str(folder), shapes, 4, CPU)
    for index, (width, height) in enumerate(SHAPES):
        boxes, scores, labels = detections_on(found, index)
        middle = torch.tensor([0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height])
        assert len(labels) == 7 and (labels == 1).all() and (scores > 0.99).all()
        assert torch.allclose(boxes, middle.expand(7, 4), atol=1e-3)


def test_it_is_one_row_of_the_evaluation(demo, demo_val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(rt_detr, tmp_path / "theirs", demo_val.class_names)
    models = ("theirs", "somebody/no-such-detector", "hub:somebody/no-such-one")
    settings = comprehensive_validation.Settings(str(demo), models=models, workers=0, batch_size=4)
    theirs, *missing = comprehensive_validation.main(settings).models
    assert theirs.name == "theirs" and theirs.detection.AP is not None and theirs.cost.ms_per_image > 0
    assert theirs.conditions["model_type"] == "rt_detr"
    assert all("is not in the cache and the hub can't be reached" in record.error for record in missing)


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert hub_name("PekingU/rtdetr_r50vd") == "hub:PekingU/rtdetr_r50vd"
    for name in ("runs/mine", "runs/mine.pt", "yolov8n.pt", "hub:a/b", "a/b/c"):
        assert hub_name(name) == name


GAP = {"id2label": {"0": "cat", "2": "dog", "3": "cow"}, "label2id": {"cat": 0, "dog": 2, "cow": 3}}
EDITS = {  # a file, what is changed in it, and words of the refusal
    "gaps": ("config.json", GAP, "numbered from 0, its id2label has 0, 2, 3"),
    "fixed padding": (
        "preprocessor_config.json",
        {"pad_size": {"height": 100, "width": 100}},
        r"pads images to .*100.*: give its detections with --from-detections",
    ),
    "no detector": ("config.json", {"model_type": "bert"}, "transformers loads no detector from it"),
    "an unknown type": ("config.json", {"model_type": "none"}, "transformers loads no detector from it"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_models_that_cannot_be_read_as_they_are_meant_are_refused(edit, shapes, tmp_path):
    name, change, words = EDITS[edit]
    file = saved(detr, tmp_path / "model", ("cat", "dog", "cow")) / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=words) as caught:
        run_transformers(str(tmp_path / "model"), shapes, 2, CPU)
    assert str(caught.value).isprintable()


def test_damaged_weights_are_refused_in_one_line(shapes, tmp_path):
    weights = saved(yolos, tmp_path / "model", ("cat", "dog")) / "model.safetensors"
    kept = {key: weight for key, weight in load_file(weights).items() if "bbox" not in key}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 6 weights, the first of them bbox_predictor"):
        run_transformers(str(tmp_path / "model"), shapes, 1, CPU)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match="transformers loads no detector from it") as caught:
        run_transformers(str(tmp_path / "model"), shapes, 1, CPU)
    assert str(caught.value).isprintable()
