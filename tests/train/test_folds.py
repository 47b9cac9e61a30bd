"""Folds: no head detects images that it has seen, also after a stop; their operating point is the final detector's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import stop_at_step, tiny_settings

import improved_dino_detector as improved
from common.console import InputError
from common.evaluate.results import read_results
from common.model.checkpoint import load_checkpoint
from common.train.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]


def test_each_image_is_detected_by_a_head_that_has_not_seen_it(demo, tiny_backbone, monkeypatch):
    options = {"folds": 2, "epochs_frozen": 2, "stop_after": "frozen", "output": "out.pth", "run_dir": "run"}
    settings = tiny_settings(improved, demo, tiny_backbone, precision="fp32", train_images=0, **options)
    trained, detected, train_stage, detect = {}, [], improved.train_stage, Run.detect

    def train(stage, start, data, *others):
        trained[stage.name] = {image.id for image in data.images}
        train_stage(stage, start, data, *others)

    def detect_on(run, checkpoint, data):
        detected.append({image.id for image in data.images})
        return detect(run, checkpoint, data)

    monkeypatch.setattr(improved, "train_stage", train)
    monkeypatch.setattr(Run, "detect", detect_on)
    improved.main(settings)
    first, second, everything = (trained[name] for name in ("fold_1", "fold_2", "frozen"))
    assert detected[:2] == [second, first] and first | second == everything and not first & second
    results, last = read_results("run/folds.json"), load_checkpoint("out.pth")
    assert results.dataset.images == 12 and results.dataset.split == "train" and results.models[0].intervals
    assert last.metrics["operating_point"] == results.models[0].diagnosis.operating_point.score
    doubts = json.loads(Path("run/labels_to_check.json").read_text())
    assert [d["doubt"] for d in doubts] == sorted((d["doubt"] for d in doubts), reverse=True) != []
    assert doubts[0]["file"] in Path("run/folds.html").read_text()

    shutil.rmtree("run")
    stop_at_step(improved, settings, 4)  # in the second epoch of the second fold
    improved.main(replace(settings, resume=True))
    again = read_results("run/folds.json")
    assert again.models[0].detection == results.models[0].detection
    pairs = zip(
        load_checkpoint("out.pth").detector.state_dict().values(), last.detector.state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [{"folds": 1}, {"folds": 3, "epochs_frozen": 0}])
def test_folds_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match="--folds needs at least 2, and --epochs-frozen"):
        improved.Settings(**options)
