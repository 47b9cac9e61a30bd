"""Data and weights from unknown sources run no code, and nothing is written outside the output folder."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Hostile, data_flags
from transformers import Dinov2Backbone, Dinov2Config

from common.console import InputError
from common.data.sources import load_split
from common.evaluate.evaluation import unique_names
from common.files import atomic_write
from common.model.backbone import load_backbone


def test_torch_load_runs_nothing():
    files = [file for pattern in ("*.py", "common/**/*.py", "dev/*.py") for file in ROOT.glob(pattern)]
    calls = [call for file in files for call in re.findall(r"torch\.load\([^)]*\)", file.read_text())]
    assert calls and all("weights_only=True" in call for call in calls)


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A folder with a DINOv2 whose weights are a pickle, which creates a file when it is executed."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "vit"
    Dinov2Backbone(Dinov2Config(**TINY, patch_size=14)).save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    return folder


@pytest.mark.parametrize("listed", ["", "pytorch_model.bin", "other.safetensors"])
def test_backbones_are_read_only_from_safetensors(backbone, listed):
    if listed:
        index = {"metadata": {}, "weight_map": {"embeddings.cls_token": listed}}
        (backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"no model\.safetensors") as caught:
        load_backbone(backbone, (1,))
    assert str(caught.value).isprintable()
    (backbone / "other.safetensors").rename(backbone / "model.safetensors")
    assert load_backbone(backbone, (1,)).channels == 48 and not Path("hacked").exists()


SETTINGS = {"model_type": ["dinov2"], "hidden_size": 10**9, "patch_size": [14, 14], "hidden_act": "\x1b[2J"}
SETTINGS |= {"num_hidden_layers": "12", "num_attention_heads": 0, "mlp_ratio": None, "image_size": -1}
CONFIGS = [json.dumps({key: value}) for key, value in SETTINGS.items()]
CONFIGS += ["[" * 100_000, "{", "[]", '{"model_type": "bert"}', '{"hidden_size": 50}']


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{config:.40}" for config in CONFIGS])
def test_invalid_settings_of_a_backbone_are_refused(backbone, config):
    file = backbone / "config.json"
    whole = json.dumps(json.loads(file.read_text()) | json.loads(config)) if config.endswith("}") else config
    file.write_text(whole)
    (backbone / "other.safetensors").rename(backbone / "model.safetensors")
    with pytest.raises(InputError, match=r"not of a DINOv2|cannot load the backbone|lacks") as caught:
        load_backbone(backbone, (1,))
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
DOCUMENTS = {
    "billion laughs": f"<!DOCTYPE x [{ENTITIES}]>NAME&a11;",
    "another file": '<!DOCTYPE x [<!ENTITY a SYSTEM "FILE">]>NAME&a;',
}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_xml_entities_are_refused(document, demo, tmp_path):
    (tmp_path / "secret.txt").write_text("SECRET")
    part = tmp_path / "data" / "val"
    part.mkdir(parents=True)
    shutil.copy(demo / "val2017" / "000001.jpg", part / "a.jpg")
    begin, name = document.replace("FILE", (tmp_path / "secret.txt").as_uri()).split("NAME")
    body = f"<annotation><filename>a.jpg</filename><object><name>{name}</name></object></annotation>"
    (part / "a.xml").write_text(begin + body)
    with pytest.raises(InputError, match=r"cannot read .*a\.xml") as caught:
        load_split(data_flags(str(tmp_path / "data")), "val")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("call", ["!!python/object/apply:os.system ['touch hacked']", "!!python/name:os.system ''"])
def test_yaml_runs_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(f"val: images\nnames:\n- cat\n- {call}")
    with pytest.raises(InputError, match="could not determine a constructor"):
        load_split(data_flags(str(tmp_path)), "val")
    assert not (tmp_path / "hacked").exists()
