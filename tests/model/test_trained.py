"""`load_detector` and `predict`: every form of an image, and the same detections as in the evaluation."""

import functools
import http.server
import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.console import InputError
from common.evaluate.detect import run_detector
from common.evaluate.detections import detection_table
from common.model import load_detector
from common.model.checkpoint import DEFAULT_MIN_SCORE, Checkpoint, load_checkpoint, save_detector


@pytest.fixture(scope="module")
def file(build, demo_val, tmp_path_factory) -> Path:
    """A detector with a second look; its scores are low, as it is not trained."""
    path, ids = tmp_path_factory.mktemp("trained") / "detector.pth", tuple(range(10, 30, 2))
    save_detector(path, Checkpoint(build("pyramid", second_look=20), demo_val.class_names, ids))
    return path


@pytest.fixture(scope="module")
def trained(file):
    return load_detector(file, device="cpu")


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("boxes", "scores", "labels"))


def test_predictions_on_files_are_those_of_the_evaluation_to_the_bit(file, trained, demo_val):
    evaluated = run_detector(load_detector(file), demo_val, 1, workers=0, title="", timed=False).table
    files = [image.path for image in demo_val.images]
    predicted = trained.predict(files, min_score=0.0, batch_size=1)
    assert all(len(d.scores) > 0 for d in predicted)
    found = [replace(d, image_id=image.id) for d, image in zip(predicted, demo_val.images, strict=True)]
    for name, column in vars(detection_table(found, demo_val)).items():
        assert np.array_equal(column, getattr(evaluated, name))
    for together, alone in zip(predicted, (trained.predict(file, 0.0) for file in files), strict=True):
        assert torch.allclose(together.scores, alone.scores, atol=1e-4)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Print nothing."""


def test_every_form_of_an_image_gives_the_same_detections(trained, demo_val, tmp_path):
    path = demo_val.images[0].path
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(path.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{path.name}"
    forms = [str(path), url, image, pixels, pixels[:, ::-1][:, ::-1], tensor, tensor.double() / 255, turned]
    uploads = [path.read_bytes(), io.BytesIO(path.read_bytes()), path.open("rb")]
    expected = trained.predict(path, 0.0)
    alone = [trained.predict(form, 0.0) for form in [image, *uploads]]
    for detections in [*trained.predict([*forms, *uploads], 0.0, batch_size=1), *alone]:
        assert same(detections, expected)
    with pytest.raises(InputError, match=r"cannot fetch.*404"):
        trained.predict(url + ".none")
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="cannot fetch"):
        trained.predict(url)


def test_detections_have_names_and_become_coco_results(trained, demo_val):
    detections = trained.predict(demo_val.images[0].path, min_score=0.0)
    assert detections.names == [demo_val.class_names[label] for label in detections.labels]
    first, (x1, y1, x2, y2) = json.loads(json.dumps(detections.to_coco(np.int64(77))))[0], detections.boxes[0].tolist()
    assert first["image_id"] == 77 and first["category_id"] == 10 + 2 * int(detections.labels[0])
    assert first["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1]) and first["score"] == detections.scores[0]


def test_the_operating_point_is_the_default_threshold(trained, file, demo_val, tmp_path):
    path = demo_val.images[0].path
    everything = trained.predict(path, 0.0)
    middle = everything.scores.median().item()
    save_detector(tmp_path / "point.pth", replace(load_checkpoint(file), metrics={"operating_point": middle}))
    shown = load_detector(tmp_path / "point.pth").predict(path)
    assert same(shown, everything.at_least(middle)) and 0 < len(shown.scores) < len(everything.scores)
    assert trained.min_score == DEFAULT_MIN_SCORE


NO_IMAGES = [
    (None, "not NoneType"),
    (b"no image", "cannot read the image"),
    ("no/such.jpg", "no such image"),
    (np.zeros((4, 4, 3)), "uint8 RGB"),
    (np.zeros((0, 4, 3), np.uint8), "uint8 RGB"),
    (torch.zeros(4, 4, 3), r"\(3, H, W\)"),
    (torch.full((3, 4, 4), 200.0), r"0\.\.1"),
    (torch.full((3, 4, 4), torch.nan), r"0\.\.1"),
    (Image.new("F", (4, 4)), "more than 8 bits"),
]


@pytest.mark.parametrize(("image", "message"), NO_IMAGES, ids=[message for _, message in NO_IMAGES])
def test_what_is_no_image_is_refused_in_one_line(trained, image, message):
    for images, match in ((image, message), ([torch.zeros(3, 9, 9), image], f"image 1 of the list: .*{message}")):
        with pytest.raises(InputError, match=match) as caught:
            trained.predict(images)
        assert "\n" not in str(caught.value)


def test_extreme_shapes_are_images_and_wrong_options_are_refused(trained, file):
    assert trained.predict([]) == []
    for shape in ((3, 1, 1), (3, 2000, 3), (3, 5, 900)):
        detections = trained.predict(torch.rand(shape), 0.0)
        assert detections.boxes.numel() == 0 or detections.boxes[:, 2:].max() <= max(shape)
    for options in ({"batch_size": 0}, {"min_score": 25.0}, {"min_score": float("nan")}):
        with pytest.raises(InputError, match="batch_size must be at least 1, min_score from 0 to 1"):
            trained.predict(torch.rand(3, 9, 9), **options)
    with pytest.raises(InputError, match="no device nowhere"):
        load_detector(file, device="nowhere")
