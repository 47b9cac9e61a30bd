"""Exported detectors: the same detections without the checkpoint, evaluated like any other model, refused when damaged.

And folders for the hub, with their model card.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from helpers import ROOT

import comprehensive_validation
import validate_models
from common.console import InputError
from common.evaluate.results import read_results
from common.export import __main__ as export
from common.export.runtime import exported_file
from common.files import PROGRAM
from common.images import letterboxed, read_pixels
from common.model import load_detector
from common.model.checkpoint import Checkpoint, save_detector
from common.model.detector import new_detector
from common.model.postprocess import detections_of, fuse_predictions, select_detections
from common.types import ImageMeta

pytestmark = pytest.mark.slow  # an export takes ten seconds
NAME = "improved_dino2_detector"  # in docs/deployment.md
FORMATS = {"onnx": "detector.onnx", "openvino": "detector_openvino_model"}
by_form = pytest.mark.parametrize("form", FORMATS)


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
    metrics, training = {"operating_point": 0.02, "AP50": 0.25}, {"backbone": "models/tiny", "seed": 3}
    checkpoint = Checkpoint(detector, demo_val.class_names, demo_val.category_ids, training, metrics, epoch=4)
    save_detector(folder / "detector.pth", checkpoint)
    for form in FORMATS:
        export.main(export.Settings(str(folder / "detector.pth"), form))
    return folder


@by_form
def test_it_computes_what_torch_computes_in_fp32(folder, form):
    detector = load_detector(folder / "detector.pth", "cpu").checkpoint.detector
    inputs = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    with torch.no_grad():
        expected, scores, labels = select_detections(*fuse_predictions(detector(inputs)))
    boxes, ours, our_labels = load_detector(folder / FORMATS[form]).run(inputs)
    assert torch.allclose(ours, scores, atol=1e-4) and scores.max() > 0.05
    for i in range(3):
        same_label = our_labels[i][:, None] == labels[i]
        distance = (boxes[i][:, None] - expected[i].clamp(0, 112)).abs().amax(2) + 1e6 * ~same_label
        assert (distance.amin(1)[ours[i] > scores[i].median()] < 0.1).all()  # equal scores may change places


@by_form
def test_it_predicts_without_the_checkpoint(folder, form, demo_val, tmp_path):
    source = folder / FORMATS[form]
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    exported, original = load_detector(tmp_path / source.name), load_detector(folder / "detector.pth", device="cpu")
    assert exported.class_names == original.class_names and exported.category_ids == original.category_ids
    assert exported.min_score == 0.02 and exported.image_size == 112
    assert exported.conditions()["seed"] == 3 and exported.conditions()["epoch"] == 4
    found = exported.predict([image.path for image in demo_val.images])
    assert found[0].names and found[0].to_coco(1)[0]["category_id"] in demo_val.category_ids


@pytest.mark.parametrize("name", ["detector.pth", *FORMATS.values()])
def test_one_detector_in_four_threads_and_pickled_finds_what_it_finds_alone(folder, name, demo_val):
    detector, files = load_detector(folder / name, "cpu"), [image.path for image in demo_val.images]
    alone = {file: detector.predict(file, min_score=0) for file in files}
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda file: (file, detector.predict(file, min_score=0)), files * 6))
    answers.append((files[0], pickle.loads(pickle.dumps(detector)).predict(files[0], min_score=0)))  # noqa: S301
    for file, found in answers:
        assert torch.allclose(found.boxes, alone[file].boxes, atol=0.1), "another image's boxes"


@by_form
def test_8_bits_lose_little(folder, demo, demo_val, form, tmp_path):
    source = tmp_path / "detector.pth"
    shutil.copy(folder / "detector.pth", source)
    options = {"format": form, "int8": True, "calibration": str(demo / "train2017"), "calibration_images": 4}
    output = export.main(export.Settings(str(source), **options))
    assert output.name == f"detector_int8{export.ENDS[form]}"
    quantized, exact = load_detector(output), load_detector(folder / FORMATS[form])
    assert quantized.precision == "int8" and quantized.conditions()["calibration_images"] == 4
    inputs = torch.stack([letterboxed(read_pixels(i.path), 112)[0] for i in demo_val.images[:2]])
    scores, exact_scores = quantized.run(inputs)[1], exact.run(inputs)[1]
    assert not torch.equal(scores, exact_scores)
    assert (scores[:, :20] - exact_scores[:, :20]).abs().mean() < 0.05  # random weights lose more than trained ones
    sizes = [
        exported_file(path).with_suffix(".bin" if form == "openvino" else ".onnx") for path in (output, exact.file)
    ]
    assert sizes[0].stat().st_size < 0.6 * sizes[1].stat().st_size


def test_flags_that_do_not_belong_together_are_refused(folder, demo, tmp_path):
    for options, message in (
        ({"int8": True}, "--int8 and --calibration go together"),
        ({"calibration": str(demo)}, "--int8 and --calibration go together"),
        ({"int8": True, "calibration": str(tmp_path)}, "none is listed"),
        ({"int8": True, "calibration": str(demo), "format": "hub"}, "--int8 is for"),
    ):
        with pytest.raises(InputError, match=message):
            export.main(export.Settings(str(folder / "detector.pth"), output=str(tmp_path / "no"), **options))
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_at_once(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    settings = export.Settings("none.pth", "openvino", int8=True, calibration="images")
    with pytest.raises(InputError, match="pip install openvino nncf"):
        export.main(settings)
    with pytest.raises(InputError, match="pip install openvino"):
        load_detector(folder / FORMATS["openvino"])


@pytest.mark.parametrize(
    ("checkpoint", "options", "output"),
    [
        ("runs/best.pth", {}, "runs/best.onnx"),
        ("runs/best-1.5.pth", {"int8": True}, "runs/best-1.5_int8.onnx"),
        ("hub:user/name-1.5", {"format": "openvino"}, "name-1.5_openvino_model"),
        ("a.pth", {"output": "b.ONNX"}, "b.ONNX"),
        ("a.pth", {"output": "b.xml", "format": "openvino"}, "b_openvino_model"),
        ("a.pth", {"output": "b_hub/", "format": "hub"}, "b_hub"),
    ],
)
def test_names_of_exports(checkpoint, options, output):
    assert export.output_of(export.Settings(checkpoint, **options)) == Path(output)


def test_folders_are_named_by_themselves_also_as_dot(tmp_path, monkeypatch):
    Path(tmp_path, "det-1.6").mkdir()
    monkeypatch.chdir(tmp_path / "det-1.6")
    for checkpoint in (".", "../det-1.6", str(tmp_path / "det-1.6/")):
        assert export.output_of(export.Settings(checkpoint)) == tmp_path / "det-1.6.onnx"


@pytest.mark.parametrize("form", [*FORMATS, "hub"])
def test_its_own_export_is_replaced_and_another_programs_is_not(folder, form, tmp_path):
    settings = export.Settings(str(folder / "detector.pth"), form, str(tmp_path / f"best{export.ENDS[form]}"))
    if form == "openvino":
        shutil.copytree(folder / FORMATS[form], settings.output)
        Path(settings.output, "detector.xml").rename(Path(settings.output, "best.xml"))
    elif form == "onnx":
        shutil.copy(folder / FORMATS[form], settings.output)
    output = export.main(settings)
    file = output / "config.json" if form == "hub" else exported_file(output)
    file.write_bytes(b"another trainer's")
    with pytest.raises(InputError, match="was not written by this program"):
        export.main(settings)
    assert file.read_bytes() == b"another trainer's"


def test_a_folder_for_the_hub_is_a_detector_with_a_card(folder, demo_val, tmp_path):
    source = str(folder / "detector.pth")
    output = export.main(export.Settings(source, "hub", str(tmp_path / "mine")))
    assert {file.name for file in output.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    original = load_detector(source, "cpu").predict(demo_val.images[0].path)
    for detector in (load_detector(output, "cpu"), type(load_detector(source)).from_pretrained(output, device="cpu")):
        assert torch.equal(detector.predict(demo_val.images[0].path).scores, original.scores)
    card = (output / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "object-detection" and header["library_name"] == PROGRAM
    assert "base_model" not in header  # a local folder
    assert "    seed: 3\n" in card and "    AP50: 0.250\n" in card
    assert all(f"\n    {name}\n" in card for name in demo_val.class_names)  # a block of code: no name is markup
    (output / "README.md").write_text("written by hand")
    export.main(export.Settings(source, "hub", str(output)))
    assert (output / "README.md").read_text() == "written by hand"


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


def test_it_is_drawn_like_the_checkpoint(folder, demo_val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = tuple(str(folder / name) for name in ("detector.pth", FORMATS["onnx"]))
    images = (str(demo_val.images[0].path),)
    settings = validate_models.Settings(checkpoints=models, images=images, workers=0, precision="fp32", output="out")
    validate_models.main(settings)
    ours, exported = (json.loads(Path(f"out/{n}/detections.json").read_text()) for n in ("detector", "detector-2"))
    assert len(ours) == len(exported) > 0
    assert np.allclose([d["score"] for d in ours], [d["score"] for d in exported], atol=1e-4)


def test_damaged_and_foreign_files_are_refused_in_one_line(folder, tmp_path):
    def saved(name, change=None, opset=18):
        model = onnx.load(folder / "detector.onnx")
        (entry,) = [p for p in model.metadata_props if p.key == PROGRAM]
        entry.value = change(json.loads(entry.value)) if change else entry.value
        model.opset_import[0].version = opset
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    whole = (folder / "detector.onnx").read_bytes()
    (tmp_path / "short.onnx").write_bytes(whole[len(whole) // 2 :])
    cases = {
        "is not of format_version 1": saved(
            "version.onnx", lambda content: json.dumps(content | {"format_version": 9})
        ),
        "class_names must be": saved("names.onnx", lambda content: json.dumps(content | {"class_names": None})),
        "export its checkpoint again": saved("ids.onnx", lambda content: json.dumps(content | {"category_ids": [1]})),
        "cannot read.*Expecting": saved("text.onnx", lambda _: "{"),
        "cannot read": tmp_path / "short.onnx",
        "cannot read.*opset": saved("opset.onnx", opset=99),
    }
    for message, path in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_detector(path)
        assert str(caught.value).isprintable()
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(whole.replace(PROGRAM.encode(), b"another-program!"))
    assert not any(exported_file(path) for path in (foreign, tmp_path, tmp_path / "none.onnx", "yolov8n.pt"))


def test_an_openvino_folder_may_be_renamed_and_its_file_named(folder, tmp_path):
    renamed = tmp_path / "v2"
    shutil.copytree(folder / FORMATS["openvino"], renamed)
    file = renamed / "detector.xml"
    assert load_detector(renamed).file == load_detector(file).file == file
    file.write_text(file.read_text()[:300])
    with pytest.raises(InputError, match="OpenVINO cannot read"):
        load_detector(renamed)


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


def test_python_of_the_page_finds_what_predict_finds(folder, demo_val, tmp_path, monkeypatch, capsys):
    """Every block of docs/deployment.md, those that use a runtime alone on an image of whose sides one is rounded."""
    shutil.copy(folder / FORMATS["onnx"], tmp_path / f"{NAME}.onnx")
    shutil.copytree(folder / FORMATS["openvino"], tmp_path / f"{NAME}_openvino_model")
    for file in (tmp_path / f"{NAME}_openvino_model").iterdir():
        file.rename(file.with_stem(NAME))
    monkeypatch.chdir(tmp_path)
    for name in ("street.png", "cat.png"):
        demo_val.images[0].open().resize((377, 157)).save(name)
    page = (ROOT / "docs" / "deployment.md").read_text().replace(".jpg", ".png")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    variables: dict = {}
    assert len(blocks) == 3
    for block in blocks:
        exec(block, variables)
        if "scores" in variables:
            expected, scale = letterboxed(read_pixels("street.png"), 112)
            assert np.abs(variables["inputs"][0] * 255 - expected.numpy()).mean() < 1
            pixels = (torch.from_numpy(variables["inputs"]) * 255).round().byte()
            outputs = load_detector(folder / "detector.onnx").run(pixels)
            (found,) = detections_of(*outputs, [ImageMeta(0, None, (157, 377), scale)])
            inside = (variables["boxes"][:, 2:] > variables["boxes"][:, :2]).all(1)
            assert np.allclose(variables["boxes"][inside][:3], found.boxes[:3], atol=0.1)
            assert np.allclose(variables["scores"][inside][:3], found.scores[:3], atol=1e-3)
    assert capsys.readouterr().out.count("[") > 0
