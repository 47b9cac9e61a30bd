"""docs/recipes.md: every recipe runs, with a real detector and stand-ins for the tools, which take what those take."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import requests
import torch
from helpers import ROOT, random_image
from PIL import Image
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

from common.model.checkpoint import Checkpoint, save_detector
from common.predict.__main__ import Settings, main

PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {part.splitlines()[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in PAGE.split("\n## ")}
NAMES = tuple(f"class {number}" for number in range(10))
WIDTH, HEIGHT = 80, 60


@pytest.fixture
def run(detector, own_folder, monkeypatch):
    """Runs the recipes of these titles, with stand-ins for some modules, and returns their variables."""
    Path("photos").mkdir()
    for name in ("street.jpg", "photos/a.jpg"):
        random_image(WIDTH, HEIGHT).save(name)
    point = {"operating_point": 0.0011}  # about half of its detections have this score
    save_detector("mine.pth", Checkpoint(detector, NAMES, tuple(range(1, 11)), {}, point))
    main(Settings(detector="mine.pth", sources=("photos",)))

    def execute(*titles, **modules):
        variables: dict = {}
        for name, content in modules.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
        for title in ("# Recipes for other tools", *titles):
            for code in RECIPES[title]:
                exec(code, variables)
        return variables

    return execute


def test_supervision_and_tracks_in_a_video(run):
    class Detections(SimpleNamespace):
        def __init__(self, xyxy, *, confidence, class_id, tracker_id=None, data):
            assert xyxy.shape == (*confidence.shape, 4) and class_id.dtype.kind == "i"
            assert [NAMES[label] for label in class_id] == data["class_name"].tolist()
            super().__init__(xyxy=xyxy, confidence=confidence, class_id=class_id, tracker_id=tracker_id, data=data)

        def __getitem__(self, rows):
            columns = {name: column[rows] for name, column in vars(self).items() if name != "data"}
            return Detections(**columns, data={name: column[rows] for name, column in self.data.items()})

    def tracker(track_activation_threshold, high_conf_det_threshold):
        assert track_activation_threshold == high_conf_det_threshold > 0
        return Mock(update=lambda found: Detections(**vars(found) | {"tracker_id": np.arange(len(found.xyxy)) - 1}))

    def slicer(callback, slice_wh, overlap_wh):
        return lambda image: [callback(image[:, :40]), callback(image[:, 40:])]

    draw, process_video, look = Mock(side_effect=lambda frame, *_: frame), Mock(), Mock(TRACK="by track")
    sv = {"Detections": Detections, "InferenceSlicer": slicer, "process_video": process_video, "ColorLookup": look}
    sv |= dict.fromkeys(("BoxAnnotator", "LabelAnnotator"), lambda color_lookup: Mock(annotate=draw))
    variables = run("supervision", "Video", supervision=sv, trackers={"ByteTrackTracker": tracker})
    detected, read = variables["detections"], variables["by_file"]["a.jpg"]
    assert len(detected.xyxy) > 5 and len(variables["small"]) == 2
    for name, error in (("xyxy", 0.01), ("confidence", 1e-4), ("class_id", 0)):
        assert np.allclose(vars(detected)[name], vars(read)[name], rtol=0, atol=error)
    frame, (source, target, callback) = np.asarray(Image.open("street.jpg"))[..., ::-1], process_video.call_args.args
    assert (source, target) == ("street.mp4", "tracked.mp4") and callback(frame, 0) is frame
    tracked, captions = draw.call_args.args[1:]
    assert len(tracked.xyxy) > len(detected.xyxy) and np.allclose(tracked.xyxy[0], detected.xyxy[1])
    assert captions[0] == f"{NAMES[tracked.class_id[0]]} 0" and len(captions) == len(tracked.xyxy)


def test_fiftyone_and_roboflow(run):
    types, dataset, launch, client = Mock(COCODetectionDataset="coco"), Mock(), Mock(), Mock()
    run("FiftyOne", fiftyone={"types": types, "Dataset": dataset, "launch_app": launch})
    given = dataset.from_dir.call_args.kwargs
    assert Path(given.pop("data_path"), "a.jpg").is_file() and Path(given.pop("labels_path")).is_file()
    assert given == {"dataset_type": "coco", "label_types": "detections", "label_field": "predictions"}
    launch.assert_called_once_with(dataset.from_dir.return_value)
    run("Labelling tools", roboflow={"Roboflow": client})
    upload = client.return_value.workspace.return_value.upload_dataset
    upload.assert_called_once_with("photos/", "my-project", is_prediction=True)


def test_http(run, monkeypatch):
    def serve(server):
        url = f"http://127.0.0.1:{server.server_port}"
        asked = ThreadPoolExecutor(1).map(lambda content: requests.post(url, content, timeout=10), contents)
        server.handle_request()
        server.handle_request()
        server.server_close()
        answers.extend(asked)

    answers, contents, bind = [], (Path("street.jpg").read_bytes(), b"no image"), HTTPServer.__init__
    monkeypatch.setattr(HTTPServer, "__init__", lambda server, address, kind: bind(server, (address[0], 0), kind))
    monkeypatch.setattr(HTTPServer, "serve_forever", serve)
    found = run("HTTP")["detector"].predict("street.jpg")
    assert answers[0].json() == [found.names, found.scores.tolist(), found.boxes.tolist()]
    assert answers[1].status_code == 400


def test_gradio(run):
    interface, image = Mock(), np.asarray(random_image(WIDTH, HEIGHT))
    run("gradio", gradio={"Interface": interface, "Image": lambda: "in", "AnnotatedImage": lambda: "out"})
    show, *ends = interface.call_args.args
    _, boxes = shown = show(image)
    assert ends == ["in", "out"] and shown[0] is image and re.fullmatch(r"class \d \d\.\d\d", boxes[0][1])
    assert all(type(side) is int for box, _ in boxes for side in box) and {box[2] for box, _ in boxes} >= {WIDTH}


def test_masks_of_a_small_sam_2(run, monkeypatch):
    hiera = {"model_type": "sam2_hiera_det_model", "image_size": [128, 128], "blocks_per_stage": [1, 1, 1, 1]}
    vision = {"backbone_config": hiera, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    config = Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": 128})
    images = Sam2ImageProcessor(size={"height": 128, "width": 128}, mask_size={"height": 32, "width": 32})
    monkeypatch.setattr(Sam2Model, "from_pretrained", lambda _: Sam2Model(config).eval())
    monkeypatch.setattr(Sam2Processor, "from_pretrained", lambda _: Sam2Processor(images))
    masks, boxes, prompts = map(run("Masks from SAM 2").get, ("masks", "boxes", "inputs"))
    assert masks.shape == (len(boxes), HEIGHT, WIDTH) and masks.dtype == torch.bool and len(boxes) > 5
    assert torch.allclose(prompts["input_boxes"][0] * torch.tensor([WIDTH, HEIGHT] * 2) / 128, boxes, atol=1e-3)
