"""How both looks are weighed: the fit, the images for it, and what a run does with it."""

import pytest
import torch
from helpers import tiny_settings

import improved_dino_detector as improved
from common.data.sources import load_split
from common.model import load_detector
from common.model.postprocess import Fusion
from common.train import calibration
from common.train.calibration import fit_fusion, split_calibration


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 0.8), (1.0, 3.0)])
def test_the_look_that_knows_is_taken_at_the_temperature_at_which_it_is_right_as_often_as_it_says(share, temperature):
    torch.manual_seed(0)
    truth, noise = torch.randn(4000, 5) * 2, torch.randn(4000, 5) * 2
    labels = truth.softmax(-1).multinomial(1)[:, 0]
    logits = [truth * temperature, noise] if share == 0 else [noise, truth * temperature]
    fusion = fit_fusion(torch.stack(logits).log_softmax(-1), labels)
    assert fusion.share == share
    assert fusion.temperature == pytest.approx(temperature, rel=0.12)


def test_images_to_fit_on_are_no_training_images_unless_they_show_too_few_objects(demo, monkeypatch):
    data = load_split(improved.Settings(str(demo), train_images=0), "train")
    assert split_calibration(data, 0.25) == (data, None)
    monkeypatch.setattr(calibration, "LEAST_OBJECTS", 5)
    trained, fitted = split_calibration(data, 0.25)
    ids = [{image.id for image in part.images} for part in (trained, fitted)]
    assert len(fitted) == 3 and not ids[0] & ids[1] and len(ids[0] | ids[1]) == len(data)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_detector_of_a_run_has_what_was_fitted(demo, tiny_backbone, monkeypatch):
    monkeypatch.setattr(calibration, "LEAST_OBJECTS", 1)
    monkeypatch.setattr(calibration, "POSITIVE_IOU", 0.05)  # of a detector that has learned little
    options = {"epochs_frozen": 1, "stop_after": "frozen", "output": "out.pth", "calibration": 0.25}
    improved.main(tiny_settings(improved, demo, tiny_backbone, **options))
    detector = load_detector("out.pth")
    assert detector.conditions()["fusion"] == list(detector.checkpoint.detector.config.fusion) != list(Fusion())
    assert detector.conditions()["train_images_used"] == 9
