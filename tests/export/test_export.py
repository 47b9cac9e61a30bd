"""Exported detectors: the same detections without the checkpoint, evaluated like any other model, refused when damaged.

And folders for the hub, with their model card.
"""

import itertools
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from helpers import ROOT, encoded
from torchvision.ops import clip_boxes_to_image

import comprehensive_validation
from common.console import InputError
from common.evaluate.results import read_results
from common.export import __main__ as export
from common.export.runtime import exported_file
from common.files import PROGRAM
from common.images import read_pixels, scaled
from common.model import load_detector
from common.model.checkpoint import Checkpoint, save_detector
from common.model.detector import new_detector
from common.model.postprocess import detections_of, fuse_predictions, select_detections
from common.types import ImageMeta, InputSize

pytestmark = pytest.mark.slow  # an export takes ten seconds
NAME = "improved_dino2_detector"  # in docs/deployment.md
FORMATS = {"onnx": f"{NAME}.onnx", "openvino": f"{NAME}_openvino_model"}
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
    save_detector(folder / f"{NAME}.pth", checkpoint)
    for form in FORMATS:
        export.main(export.Settings(str(folder / f"{NAME}.pth"), form))
    return folder


@by_form
def test_it_computes_what_torch_computes_in_fp32_and_describes_itself(folder, form):
    original, exported = load_detector(folder / f"{NAME}.pth", "cpu"), load_detector(folder / FORMATS[form])
    assert exported.class_names == original.class_names and exported.category_ids == original.category_ids
    assert exported.min_score == 0.02 and exported.conditions().items() >= original.conditions().items()
    for sides in ((112, 112), (84, 112), (112, 56)):
        inputs = torch.randint(0, 256, (3, 3, *sides), dtype=torch.uint8)
        with torch.no_grad():
            expected, scores, labels = select_detections(*fuse_predictions(original.checkpoint.detector(inputs)))
        boxes, ours, our_labels = exported.run(inputs)
        assert torch.allclose(ours, scores, atol=1e-4) and scores.max() > 0.05
        for i in range(3):
            same_label = our_labels[i][:, None] == labels[i]
            distance = (boxes[i][:, None] - clip_boxes_to_image(expected[i], sides)).abs().amax(2) + 1e6 * ~same_label
            assert (distance.amin(1)[ours[i] > scores[i].median()] < 0.1).all()  # equal scores may change places


@pytest.mark.parametrize("name", [f"{NAME}.pth", *FORMATS.values()])
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
    options = {"format": form, "int8": True, "calibration": str(demo / "train2017"), "calibration_images": 4}
    output = export.main(export.Settings(shutil.copy(folder / f"{NAME}.pth", tmp_path / "detector.pth"), **options))
    assert output == tmp_path / f"detector_int8{export.ENDS[form]}"
    quantized, exact = load_detector(output), load_detector(folder / FORMATS[form])
    assert quantized.precision == "int8" and quantized.conditions()["calibration_images"] == 4
    inputs = scaled(read_pixels(demo_val.images[0].path), exact.input_size)[0][None]
    difference = (quantized.run(inputs)[1] - exact.run(inputs)[1])[:, :20].abs().mean()
    assert 0 < difference < 0.05  # random weights lose more than trained ones
    sizes = [d.file.with_suffix(".bin" if form == "openvino" else ".onnx").stat().st_size for d in (quantized, exact)]
    assert sizes[0] < 0.6 * sizes[1]


def test_calibration_images_are_spread_over_the_folder(demo):
    files = sorted((demo / "train2017").iterdir())
    settings = export.Settings(calibration=str(demo / "train2017"), calibration_images=len(files) * 2 // 3)
    batches = itertools.chain(*export.calibration_loader(settings, InputSize(56, 14)))
    used = sorted(files.index(batch.meta[0].path) for batch in batches)
    assert len(used) == len(files) * 2 // 3 and used[:4] == [0, 1, 3, 4] and used[-1] >= len(files) - 3


@pytest.mark.parametrize(
    ("checkpoint", "options", "output"),
    [
        ("runs/best-1.5.pth", {"format": "openvino"}, "runs/best-1.5_openvino_model"),
        ("a.pth", {"output": "b.ONNX"}, "b.ONNX"),
        ("a.pth", {"output": "b.xml", "format": "openvino"}, "b_openvino_model"),
        ("hub:user/name-1.5", {"output": "b_hub/", "format": "hub"}, "b_hub"),
    ],
)
def test_names_of_exports(checkpoint, options, output):
    assert export.output_of(export.Settings(checkpoint, **options)) == Path(output)


def test_flags_that_do_not_belong_together_and_missing_packages_are_refused(folder, demo, tmp_path, monkeypatch):
    def refused(message, checkpoint=f"{NAME}.pth", **options):
        with pytest.raises(InputError, match=message):
            export.main(export.Settings(str(folder / checkpoint), **options))

    no = str(tmp_path / "no")
    refused("--int8 and --calibration go together", output=no, int8=True)
    refused("--int8 and --calibration go together", output=no, calibration=str(demo))
    refused("--int8 is for", output=no, int8=True, calibration=str(demo), format="hub")
    refused("none is listed", output=no, int8=True, calibration=str(tmp_path))
    refused("give its name with --output", checkpoint="a-folder-1.5")
    refused("give its name with --output", output="..")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused("pip install openvino nncf", checkpoint="none", format="openvino", int8=True, calibration="images")
    with pytest.raises(InputError, match="pip install openvino"):
        load_detector(folder / FORMATS["openvino"])


@pytest.mark.parametrize("name", [*FORMATS, "config.json", "model.safetensors"])
def test_its_own_export_is_replaced_and_another_programs_is_not(folder, name, tmp_path):
    form = name if name in FORMATS else "hub"
    settings = export.Settings(str(folder / f"{NAME}.pth"), form, str(tmp_path / f"best{export.ENDS[form]}"))
    output = export.main(settings)
    file = output / name if form == "hub" else exported_file(output)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(InputError, match="cannot write"):
            export.main(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and load_detector(output) and not list(output.parent.glob("**/tmp*"))
    export.main(settings)
    file.write_bytes(b"another trainer's")
    with pytest.raises(InputError, match="was not written by this program"):
        export.main(settings)
    assert file.read_bytes() == b"another trainer's"


def test_a_folder_for_the_hub_is_a_detector_with_a_card(folder, demo_val, tmp_path):
    source = str(folder / f"{NAME}.pth")
    output = export.main(export.Settings(source, "hub", str(tmp_path / "mine")))
    assert {file.name for file in output.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    original = load_detector(source, "cpu")
    for detector in (load_detector(output, "cpu"), type(original).from_pretrained(output, device="cpu")):
        assert torch.equal(*(each.predict(demo_val.images[0].path).scores for each in (detector, original)))
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
    models = tuple(str(folder / name) for name in (f"{NAME}.pth", *FORMATS.values()))
    settings = comprehensive_validation.Settings(data=str(demo), models=models, workers=0, precision="fp32")
    comprehensive_validation.main(settings)
    torch_record, *records = read_results("validation_results.json").models
    assert [record.conditions["runtime"] for record in records] == ["ONNX Runtime", "OpenVINO"]
    for record in records:
        assert record.cost.precision == "fp32" and record.cost.ms_per_image > 0
        assert pytest.approx(torch_record.detection.AP50, abs=1e-3) == record.detection.AP50
        assert record.conditions["seed"] == torch_record.conditions["seed"] == 3


def test_damaged_and_foreign_files_are_refused_in_one_line(folder, tmp_path):
    def refused(message, change=None, opset=18):
        model = onnx.load(folder / FORMATS["onnx"])
        (entry,) = [p for p in model.metadata_props if p.key == PROGRAM]
        entry.value = entry.value if change is None else json.dumps(json.loads(entry.value) | change)
        model.opset_import[0].version = opset
        onnx.save(model, tmp_path / "a.onnx")
        with pytest.raises(InputError, match=message) as caught:
            load_detector(tmp_path / "a.onnx")
        assert str(caught.value).isprintable()

    refused("is not of format_version 2", {"format_version": 9})
    refused("class_names must be", {"class_names": None})
    refused("export its checkpoint again", {"category_ids": [1]})
    refused("ONNX Runtime cannot read", opset=99)
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes((tmp_path / "a.onnx").read_bytes().replace(PROGRAM.encode(), b"another-program!"))
    assert not any(exported_file(path) for path in (foreign, tmp_path, tmp_path / "none.onnx", "yolov8n.pt"))


def test_an_openvino_folder_may_be_renamed_and_its_file_named(folder, tmp_path):
    renamed = shutil.copytree(folder / FORMATS["openvino"], tmp_path / "v2")
    file = renamed / f"{NAME}.xml"
    (renamed / "another.xml").write_text("<net/>")
    assert load_detector(renamed).file == load_detector(file).file == file
    shutil.copy(file, renamed / "second.xml")
    with pytest.raises(InputError, match=r"holds several detectors: name one of .*second.xml"):
        load_detector(renamed)
    (renamed / "second.xml").unlink()
    file.write_text(file.read_text()[:300])
    with pytest.raises(InputError, match="OpenVINO cannot read"):
        load_detector(renamed)


def test_signals_are_handled_after_two_detectors_have_come_and_gone(folder):
    program = """import signal, sys; from common.model import load_detector
signal.signal(signal.SIGINT, lambda *_: print("handled"))
first, second = (load_detector(sys.argv[1]) for _ in range(2))
del first
del second
signal.raise_signal(signal.SIGINT)"""
    command = [sys.executable, "-c", program, folder / FORMATS["openvino"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "handled\n", done.stderr


def test_python_of_the_page_finds_what_predict_finds(folder, demo_val, monkeypatch, capsys):
    """Every block of docs/deployment.md, those that use a runtime alone on a turned image, one of its sides rounded."""
    monkeypatch.chdir(folder)
    for name in ("street.png", "cat.png"):
        Path(name).write_bytes(
            encoded(demo_val.images[0].open().resize((377, 157)), 6, ".png")
        )  # as a camera held upright
    page = (ROOT / "docs" / "deployment.md").read_text().replace(".jpg", ".png")
    variables: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, variables)
        if "scores" in variables:
            expected, scale = scaled(read_pixels("street.png"), InputSize(112, 14))
            assert np.abs(variables["inputs"][0] * 255 - expected.numpy()).mean() < 1
            pixels = (torch.from_numpy(variables["inputs"]) * 255).round().byte()
            outputs = load_detector(FORMATS["onnx"]).run(pixels)
            (found,) = detections_of(*outputs, [ImageMeta(0, None, (157, 377), scale)])
            inside = (variables["boxes"][:, 2:] > variables["boxes"][:, :2]).all(1)
            assert np.allclose(variables["boxes"][inside][:3], found.boxes[:3], atol=0.1)
            assert np.allclose(variables["scores"][inside][:3], found.scores[:3], atol=1e-3)
    assert "compiled" in variables and capsys.readouterr().out.count("[") > 0
