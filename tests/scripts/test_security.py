"""Data and weights from unknown sources run no code, and nothing is written outside the output folder."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, Hostile, data_flags

from common.console import InputError
from common.data.sources import load_split
from common.evaluate.evaluation import unique_names
from common.files import atomic_write
from common.model.backbone import load_backbone


@pytest.fixture(autouse=True)
def nothing_is_run(own_folder):
    yield
    assert not Path("hacked").exists()


def test_torch_load_runs_nothing():
    files = [file for pattern in ("*.py", "common/**/*.py", "dev/*.py") for file in ROOT.glob(pattern)]
    calls = [call for file in files for call in re.findall(r"torch\.load\([^)]*\)", file.read_text())]
    assert calls and all("weights_only=True" in call for call in calls)


def test_backbones_are_read_only_from_safetensors(tiny_backbone):
    """Not from a pickle, which creates a file when it is executed."""
    shutil.copytree(tiny_backbone, "vit")
    weights = Path("vit/model.safetensors").rename("vit/other.safetensors")
    Path("vit/pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    for listed in ("", "pytorch_model.bin", "other.safetensors"):
        if listed:
            index = {"metadata": {}, "weight_map": {"embeddings.cls_token": listed}}
            Path("vit/model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"no model\.safetensors") as caught:
            load_backbone(Path("vit"), (1,))
        assert str(caught.value).isprintable()
    weights.rename("vit/model.safetensors")
    assert load_backbone(Path("vit"), (1,)).channels == 48


SETTINGS = {"model_type": ["dinov2"], "hidden_size": 10**9, "patch_size": [14, 14], "hidden_act": "\x1b[2J"}
SETTINGS |= {"num_hidden_layers": "12", "num_attention_heads": 0, "mlp_ratio": None, "image_size": -1}
CONFIGS = [json.dumps({key: value}) for key, value in SETTINGS.items()]
CONFIGS += ["[" * 100_000, "{", "[]", '{"model_type": "bert"}', '{"hidden_size": 50}']


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{config:.40}" for config in CONFIGS])
def test_invalid_settings_of_a_backbone_are_refused(config, tiny_backbone):
    shutil.copytree(tiny_backbone, "vit")
    file = Path("vit/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(config)) if config.endswith("}") else config)
    with pytest.raises(InputError, match=r"not of a DINOv2|cannot load the backbone|lacks") as caught:
        load_backbone(Path("vit"), (1,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../../etc/a.jpg", "/etc/a.jpg", "a/../../b.jpg", "....jpg", "..", "\\..\\a.jpg"])
def test_names_made_of_paths_stay_in_their_folder(path, tmp_path):
    folder = tmp_path / "out" / "model"
    for name in unique_names([path, f"/b/{path}", f"c/{path}"]):
        written = Path(folder, f"{name}.jpg")
        assert written.resolve().parent == folder.resolve()
        with atomic_write(written) as file:
            file.write(b"")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


ENTITIES = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "lol"}">' for i in range(12))
VOC = "<annotation><filename>a.jpg</filename><object><name>&{};</name></object></annotation>"
YAML = "val: images\nnames:\n- cat\n- !!python/"
DOCUMENTS = {  # a data set's file, its content, what is said
    "billion laughs": ("val/a.xml", f"<!DOCTYPE x [{ENTITIES}]>{VOC.format('a11')}", r"cannot read .*a\.xml"),
    "another file": (
        "val/a.xml",
        f'<!DOCTYPE x [<!ENTITY b SYSTEM "FILE">]>{VOC.format("b")}',
        r"cannot read .*a\.xml",
    ),
    "call": ("data.yaml", f"{YAML}object/apply:os.system ['touch hacked']", "could not determine a constructor"),
    "name": ("data.yaml", f"{YAML}name:os.system ''", "could not determine a constructor"),
}


@pytest.mark.parametrize(("file", "text", "message"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_xml_entities_and_python_in_yaml_are_refused(file, text, message, demo, tmp_path):
    Path("secret.txt").write_text("SECRET")
    Path("data/val").mkdir(parents=True)
    shutil.copy(demo / "val2017" / "000001.jpg", "data/val/a.jpg")
    Path("data", file).write_text(text.replace("FILE", (tmp_path / "secret.txt").as_uri()))
    with pytest.raises(InputError, match=message) as caught:
        load_split(data_flags("data"), "val")
    assert "SECRET" not in str(caught.value)
