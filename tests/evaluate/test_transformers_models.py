"""Detectors of transformers: their detections are those of transformers' own post-processing, in original pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import random_image
from safetensors.torch import load_file, save_file

import comprehensive_validation
from common.console import InputError
from common.data.sources import unlabelled_images
from common.evaluate.others import run_transformers
from common.hub import hub_name
from common.types import convert_boxes

CPU = torch.device("cpu")
SHAPES = ((120, 80), (60, 100), (64, 64), (33, 97))  # width and height


def yolos(classes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.YolosConfig(image_size=[64, 64], num_detection_tokens=7, **sizes, **classes)
    return hf.YolosForObjectDetection(config), hf.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})


def rt_detr(classes):
    stages = ["stage2", "stage3", "stage4"]
    tiny = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    backbone = hf.RTDetrResNetConfig(**tiny, layer_type="basic", out_features=stages)
    encoder = {"encoder_hidden_dim": 16, "encoder_in_channels": [8, 8, 8], "encoder_ffn_dim": 16}
    decoder = {"decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2, "num_queries": 20}
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "anchor_image_size": None}
    config = hf.RTDetrConfig(backbone_config=backbone, **encoder, **decoder, **sizes, **classes)
    unused = {"do_pad": False, "pad_size": {"height": 9, "width": 9}}
    return hf.RTDetrForObjectDetection(config), hf.RTDetrImageProcessor(size={"height": 64, "width": 64}, **unused)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Four images of random pixels and different shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, size in enumerate(SHAPES):
        random_image(*size).save(folder / f"{number}.png")
    return unlabelled_images([folder])


def saved(build, folder: Path, names):
    """The folder, the model and its processor."""
    torch.manual_seed(0)
    model, processor = build({"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model.eval(), processor


@pytest.mark.parametrize("build", [yolos, rt_detr])
def test_detections_are_those_of_its_own_post_processing(build, shapes, tmp_path):
    folder, model, processor = saved(build, tmp_path / "model", ("cat", "N/A", "dog"))
    found = run_transformers(str(folder), shapes, 3, CPU)
    assert found.class_names == ("cat", "N/A", "dog") and found.cost.precision == "fp32"
    assert found.cost.ms_per_image > 0 and found.cost.parameters > 1000 and found.cost.batch_size == 3
    for index, (image, (width, height)) in enumerate(zip(shapes.images, SHAPES, strict=True)):
        with torch.no_grad():
            out = model(**processor(images=image.open(), return_tensors="pt"))
        (own,) = processor.post_process_object_detection(out, threshold=0.001, target_sizes=[(height, width)])
        best = own["scores"].sort(descending=True, stable=True).indices
        table = found.table.select(found.table.image == index)
        ours = {"boxes": convert_boxes(table.boxes, "xywh", "xyxy"), "scores": table.score, "labels": table.label}
        for name, values in ours.items():
            assert len(values) > 5 and np.allclose(values, own[name][best], atol=1e-3)


def test_it_is_one_row_of_the_evaluation(demo, demo_val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(rt_detr, tmp_path / "theirs", demo_val.class_names)
    models = ("theirs", "somebody/no-such-detector", "hub:somebody/no-such-one")
    settings = comprehensive_validation.Settings(str(demo), models=models, workers=0, batch_size=4)
    theirs, *missing = comprehensive_validation.main(settings).models
    assert theirs.name == "theirs" and theirs.detection.AP is not None and theirs.cost.ms_per_image > 0
    assert theirs.conditions["model_type"] == "rt_detr"
    assert all("is not in the cache: HF_HUB_OFFLINE is set" in record.error for record in missing)


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert hub_name("PekingU/rtdetr_r50vd") == "hub:PekingU/rtdetr_r50vd"
    for name in ("runs/mine", "runs/mine.pt", "yolov8n.pt", "hub:a/b", "a/b/c"):
        assert hub_name(name) == name


GAP = {"id2label": {"0": "cat", "2": "dog", "3": "cow"}, "label2id": {"cat": 0, "dog": 2, "cow": 3}}
PAD = {"pad_size": {"height": 9, "width": 9}}


def merged(file, change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def without_boxes(file):
    save_file({k: v for k, v in load_file(file).items() if "bbox" not in k}, file, metadata={"format": "pt"})


EDITS = {  # a file, what is done to it, and words of the refusal
    "gaps": ("config.json", lambda f: merged(f, GAP), "numbered from 0, its id2label has 0, 2, 3"),
    "fixed padding": ("preprocessor_config.json", lambda f: merged(f, PAD), "pads images to .*9.*: give its"),
    "no detector": ("config.json", lambda f: merged(f, {"model_type": "bert"}), "transformers loads no detector from"),
    "weights without boxes": ("model.safetensors", without_boxes, "lacks 6 weights, the first of them bbox_predictor"),
    "weights of pickle": ("model.safetensors", lambda f: f.rename(f.with_suffix(".bin")), "no .safetensors: convert"),
    "half a file": ("model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:500]), "loads no detector from it"),
}


@pytest.mark.parametrize(("name", "edit", "words"), EDITS.values(), ids=EDITS)
def test_models_that_cannot_be_read_as_they_are_meant_are_refused(name, edit, words, shapes, tmp_path):
    edit(saved(yolos, tmp_path / "model", ("cat", "dog", "cow"))[0] / name)
    with pytest.raises(InputError, match=words) as caught:
        run_transformers(str(tmp_path / "model"), shapes, 2, CPU)
    assert str(caught.value).isprintable()
