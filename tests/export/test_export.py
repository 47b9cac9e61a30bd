"""Exported detectors: the same detections without the checkpoint, evaluated like any other model, refused when damaged.

And folders for the hub, with their model card.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from helpers import ROOT

import comprehensive_validation
import validate_models
from common import cli
from common.console import InputError
from common.evaluate.results import read_results
from common.export import __main__ as export
from common.export.runtime import METADATA, OPENVINO_FOLDER, is_exported, openvino_file
from common.images import letterboxed, read_pixels
from common.model import load_detector
from common.model.checkpoint import Checkpoint, save_detector
from common.model.detector import new_detector
from common.model.postprocess import fuse_predictions, select_detections

pytestmark = pytest.mark.slow  # an export takes ten seconds
NAME = "improved_dino2_detector"  # in docs/deployment.md
FORMATS = {"onnx": "detector.onnx", "openvino": f"detector{OPENVINO_FOLDER}"}


@pytest.fixture(scope="module")
def folder(tiny_backbone, demo_val, tmp_path_factory) -> Path:
    """A checkpoint and its exports. Its weights are random but large enough for scores that differ."""
    torch.manual_seed(0)
    options = {"blocks": (2, 4), "image_size": 112, "num_classes": 10, "second_look": 20}
    detector = new_detector(tiny_backbone, head="pyramid", **options).eval()
    for weight in detector.head.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("exported")
    metrics, training = {"operating_point": 0.02}, {"backbone": "tiny", "seed": 3}
    checkpoint = Checkpoint(detector, demo_val.class_names, demo_val.category_ids, training, metrics, epoch=4)
    save_detector(folder / "detector.pth", checkpoint)
    for form in FORMATS:
        export.main(export.Settings(str(folder / "detector.pth"), form))
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_detector(folder / "detector.pth").checkpoint


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("images", [1, 3])
def test_it_computes_what_torch_computes_in_fp32(folder, checkpoint, form, images):
    exported = load_detector(folder / FORMATS[form])
    inputs = torch.randint(0, 256, (images, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        expected, scores, labels = select_detections(*fuse_predictions(checkpoint.detector(inputs)))
    boxes, ours, our_labels = exported.run(inputs)
    assert torch.allclose(ours, scores, atol=1e-4) and scores.max() > 0.05
    for i in range(images):
        same_label = our_labels[i][:, None] == labels[i]
        distance = (boxes[i][:, None] - expected[i].clamp(0, 112)).abs().amax(2) + 1e6 * ~same_label
        assert (distance.amin(1)[ours[i] > scores[i].median()] < 0.1).all()  # equal scores may change places


@pytest.mark.parametrize("form", FORMATS)
def test_it_predicts_without_the_checkpoint(folder, checkpoint, form, demo_val, tmp_path):
    source = folder / FORMATS[form]
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    exported, files = load_detector(tmp_path / source.name), [image.path for image in demo_val.images]
    original = load_detector(folder / "detector.pth", device="cpu")
    assert exported.class_names == original.class_names and exported.category_ids == original.category_ids
    assert exported.min_score == 0.02 and exported.image_size == 112
    assert exported.training["backbone"] == "tiny" and exported.training["epoch"] == 4
    found = exported.predict(files)
    assert [len(d.scores) for d in exported.predict(files, batch_size=1)] == [len(d.scores) for d in found]
    assert found[0].names and found[0].to_coco(1)[0]["category_id"] in demo_val.category_ids


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


@pytest.mark.parametrize("form", FORMATS)
def test_8_bits_lose_little(folder, demo, demo_val, form, tmp_path):
    source = tmp_path / "detector.pth"
    shutil.copy(folder / "detector.pth", source)
    options = {"format": form, "int8": True, "calibration": str(demo), "calibration_images": 4}
    output = export.main(export.Settings(str(source), **options))
    assert output.name == f"detector_int8{export.ENDS[form]}"
    quantised, exact = load_detector(output), load_detector(folder / FORMATS[form])
    assert quantised.precision == "int8" and quantised.training["calibration_images"] == 4
    inputs = torch.stack([letterboxed(read_pixels(i.path), 112)[0] for i in demo_val.images[:2]])
    scores, exact_scores = quantised.run(inputs)[1], exact.run(inputs)[1]
    assert not torch.equal(scores, exact_scores)
    assert (scores[:, :20] - exact_scores[:, :20]).abs().mean() < 0.05  # random weights lose more than trained ones
    assert size_of(output) < 0.6 * size_of(folder / FORMATS[form])


def test_flags_that_do_not_belong_together_are_refused(folder, demo, tmp_path):
    source = str(folder / "detector.pth")
    for options, message in (
        ({"int8": True}, "--int8 and --calibration go together"),
        ({"calibration": str(demo)}, "--int8 and --calibration go together"),
        ({"int8": True, "calibration": str(tmp_path)}, r"\(empty\) is in none of the forms"),
        ({"int8": True, "calibration": str(demo), "format": "hub"}, "--int8 is for"),
        ({"results": "validation_results.json"}, "--results is for"),
    ):
        with pytest.raises(InputError, match=message):
            export.main(export.Settings(source, output=str(tmp_path / "no"), **options))
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_at_once(folder, demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    settings = export.Settings(str(folder / "detector.pth"), "openvino", int8=True, calibration=str(demo))
    monkeypatch.setattr(export, "load_checkpoint", None)
    with pytest.raises(InputError, match="pip install openvino nncf"):
        export.main(settings)


def test_a_folder_for_the_hub_is_a_detector_with_a_card(folder, demo, demo_val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(folder / "detector.pth")
    output = export.main(export.Settings(source, "hub", str(tmp_path / "mine")))
    assert output.name == "mine_hub" and sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    image = demo_val.images[0].path
    found, original = (load_detector(path, "cpu").predict(image) for path in (output, source))
    assert torch.equal(found.boxes, original.boxes) and torch.equal(found.scores, original.scores)
    settings = comprehensive_validation.Settings(
        data=str(demo), models=(str(output), source), workers=0, output="results.json"
    )
    records = comprehensive_validation.main(settings).models
    assert records[0].detection == records[1].detection
    card = (output / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "object-detection" and "hub:USER/mine" in card and "| seed | 3 |" in card
    assert "no intervals" not in card and all(name in card for name in demo_val.class_names)
    export.main(export.Settings(source, "hub", "mine", results="results.json"))
    low, high = records[0].intervals["AP50"]
    assert (
        f"| mAP@0.5 | {records[0].detection.AP50:.3f} [{low:.3f}, {high:.3f}] |"
        in Path("mine_hub/README.md").read_text()
    )
    checkpoint = load_detector(source).checkpoint
    other = replace(checkpoint, train_config=checkpoint.train_config | {"seed": 4})
    save_detector("other.pth", other)
    with pytest.raises(InputError, match="has no numbers of this checkpoint"):
        export.main(export.Settings("other.pth", "hub", results="results.json"))


def test_it_is_evaluated_and_timed_like_the_checkpoint(folder, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = tuple(str(folder / name) for name in ("detector.pth", *FORMATS.values()))
    settings = comprehensive_validation.Settings(data=str(demo), models=models, workers=0, precision="fp32")
    comprehensive_validation.main(settings)
    torch_record, *records = read_results("validation_results.json").models
    for record in records:
        assert not record.error and record.cost.precision == "fp32" and record.cost.ms_per_image > 0
        assert pytest.approx(torch_record.detection.AP50, abs=1e-3) == record.detection.AP50
        assert record.conditions["runtime"] in ("ONNX Runtime", "OpenVINO")
        assert record.conditions["seed"] == torch_record.conditions["seed"] == 3


def test_it_is_drawn_like_the_checkpoint(folder, demo_val, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = tuple(str(folder / name) for name in ("detector.pth", FORMATS["onnx"]))
    images = (str(demo_val.images[0].path),)
    settings = validate_models.Settings(checkpoints=models, images=images, workers=0, precision="fp32", output="out")
    validate_models.main(settings)
    assert "0.02 (detector), 0.02 (detector.onnx)" in capsys.readouterr().out
    ours, exported = (json.loads(Path(f"out/{n}/detections.json").read_text()) for n in ("detector", "detector.onnx"))
    assert len(ours) == len(exported) > 0
    assert np.allclose([d["score"] for d in ours], [d["score"] for d in exported], atol=1e-4)


def test_damaged_and_foreign_files_are_refused_in_one_line(folder, tmp_path):
    model = onnx.load(folder / "detector.onnx")

    def saved(name, change):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        (entry,) = [p for p in changed.metadata_props if p.key == METADATA]
        entry.value = change(json.loads(entry.value))
        onnx.save(changed, tmp_path / name)
        return tmp_path / name

    cases = {
        "version": saved("version.onnx", lambda content: json.dumps(content | {"format_version": 9})),
        "class_names": saved("names.onnx", lambda content: json.dumps(content | {"class_names": None})),
        "category ids": saved("ids.onnx", lambda content: json.dumps(content | {"category_ids": [1]})),
        "readable description": saved("text.onnx", lambda _: "{"),
        "cannot read": tmp_path / "short.onnx",
        "cannot read.*opset": tmp_path / "opset.onnx",
    }
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    newer.opset_import[0].version = 99
    onnx.save(newer, cases["cannot read.*opset"])
    whole = (folder / "detector.onnx").read_bytes()
    cases["cannot read"].write_bytes(whole[len(whole) // 2 :])
    for message, path in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_detector(path)
        assert str(caught.value).isprintable()
    foreign = onnx.ModelProto()
    foreign.CopyFrom(model)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert not is_exported(tmp_path / "foreign.onnx") and is_exported(folder / "detector.onnx")
    assert not is_exported(tmp_path) and not is_exported(tmp_path / "none.onnx") and not is_exported("yolov8n.pt")
    broken = tmp_path / f"broken{OPENVINO_FOLDER}"
    broken.mkdir()
    text = openvino_file(folder / FORMATS["openvino"]).read_text()
    openvino_file(broken).write_text(text[: len(text) // 2] + METADATA)
    with pytest.raises(InputError, match="OpenVINO cannot read"):
        load_detector(broken)


def test_signals_are_handled_after_two_detectors_have_come_and_gone(folder):
    lines = f"""
    import signal
    from common.model import load_detector
    signal.signal(signal.SIGINT, lambda *_: print("handled"))
    first, second = (load_detector({str(folder / FORMATS["openvino"])!r}) for _ in range(2))
    del first
    del second
    signal.raise_signal(signal.SIGINT)
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "handled\n", done.stderr


def test_the_command_line(folder, tmp_path, monkeypatch, capsys):
    def run(*words) -> int:
        monkeypatch.setattr("sys.argv", ["common.export", *map(str, words)])
        try:
            cli.run(export.main, export.Settings, "")
        except SystemExit as ended:
            return ended.code
        return 0

    source = folder / "detector.pth"
    for output, expected in (("a.onnx", "a.onnx"), ("b", "b.onnx")):
        assert run(source, "--output", tmp_path / output) == 0
        assert is_exported(tmp_path / expected) and expected in capsys.readouterr().out
    for words in ((tmp_path / "none.pth",), (source, "--format", "tflite"), (folder / "detector.onnx",)):
        assert run(*words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_python_of_the_page_runs(folder, demo_val, tmp_path, monkeypatch, capsys):
    """Every block of docs/deployment.md; those that use a runtime alone find what `predict` finds."""
    for form, name in FORMATS.items():
        export.main(export.Settings(str(folder / "detector.pth"), form, str(tmp_path / name.replace("detector", NAME))))
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("street.jpg", "cat.jpg"), demo_val.images, strict=False):
        image.open().save(name)
    page = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    variables: dict = {}
    assert len(blocks) == 3
    for block in blocks:
        exec(block, variables)
        if "scores" in variables:
            expected, _ = letterboxed(read_pixels("street.jpg"), 112)
            assert np.abs(variables["inputs"][0] * 255 - expected.numpy()).mean() < 1
            pixels = (torch.from_numpy(variables["inputs"]) * 255).round().byte()
            theirs = load_detector(folder / "detector.onnx").run(pixels)
            for ours, other in zip((variables["boxes"], variables["scores"]), theirs, strict=False):
                assert np.allclose(ours[0][:3], other[0][:3], atol=1e-2)
    assert capsys.readouterr().out.count("[") > 0
