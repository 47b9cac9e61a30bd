"""Bad days: memory or disk that run out, numbers that are none, signals during validation."""

import json
import multiprocessing
import resource
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import comprehensive_validation
import finetune_dino2_simple
from common import cli
from common.console import InputError, install_handlers
from common.evaluate.results import read_results
from common.model.assignment import ASSIGNMENTS
from common.model.checkpoint import Checkpoint, load_detector, save_detector
from common.model.detector import HEADS, new_detector
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, LossConfig, detection_loss
from common.model.postprocess import postprocess
from common.train import state
from common.types import Batch, Letterbox, Target


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def settings_of(demo, tiny_backbone, **options):
    chosen = {"blocks": (2, 4), "image_size": 56, "batch_size": 4, "workers": 0, "epochs": 2, "precision": "fp32"}
    paths = {"output": "out.pth", "run_dir": "run"}
    return finetune_dino2_simple.Settings(str(demo), backbone=(str(tiny_backbone),), **paths, **chosen | options)


def limited(limits, settings, out):
    """In a process of its own, below some limits (bytes beyond what it uses now, or in all): train."""
    sys.stdout = sys.stderr = Path(out).open("a")  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    torch.set_num_threads(1)  # each thread would reserve an arena of its own
    for name, size in limits.items():
        size += used if name == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, name), (size, size))
    install_handlers()
    try:
        finetune_dino2_simple.main(settings)
    except InputError as error:
        sys.exit(f"one line: {error}")


def train_below(limits, settings):
    """Exit status and output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_dino2_simple", "common.evaluate.coco_metrics"])
    Path("output.txt").unlink(missing_ok=True)
    process = context.Process(target=limited, args=(limits, settings, "output.txt"))
    process.start()
    process.join()
    return process.exitcode, Path("output.txt").read_text()


def test_out_of_memory_tells_the_batch_size_that_fits(demo, tiny_backbone):
    settings = settings_of(demo, tiny_backbone, image_size=672, batch_size=12, epochs=1)
    limits = {"RLIMIT_AS": 500 << 20}
    status, text = train_below(limits, settings)
    assert status == 1 and "Traceback" not in text, text[-2000:]
    line = text.strip().splitlines()[-1]
    assert "out of memory at a step of 12 images" in line
    fits = int(line.partition("take --batch-size ")[2].partition(";")[0])
    status, text = train_below(limits, replace(settings, batch_size=fits, resume=True))
    assert status == 0 and load_detector("out.pth").epoch == 1, text


@pytest.mark.parametrize("images", [0, 1, 4])
def test_what_a_failed_step_computed_is_let_go_before_fewer_images_are_tried(images, detector, monkeypatch):
    computed, tried = [], []

    def step():
        activations = torch.ones(9)
        computed.append(weakref.ref(activations))

        def failing_layer():  # torch's modules run in such functions, whose frames hold them, and they their variables
            activations.add_(1)
            raise torch.OutOfMemoryError

        failing_layer()

    def fits(batch, *_):
        tried.append(len(batch.targets))
        return computed[0]() is None

    monkeypatch.setattr(state, "_fits", fits)
    target = Target(*(torch.zeros(0, *shape) for shape in ((4,), (), ())), 1, None)
    batch = Batch(torch.zeros(images, 3, 112, 112), [target] * images) if images else None
    said = {0: "before the first step", 1: "not even one fits", 4: "of 4 images; 2 fit: take --batch-size 2;"}
    with pytest.raises(InputError, match=said[images]), state.memory_explained(Mock(batch=batch), LossConfig()):
        step()
    assert tried == ([2] if images == 4 else [])


def test_a_full_disk_ends_in_one_line_and_loses_nothing(demo, tiny_backbone):
    settings = settings_of(demo, tiny_backbone, epochs=1)
    assert train_below({}, settings)[0] == 0
    before = {p: p.read_bytes() for p in (*Path("run").iterdir(), Path("out.pth"))}
    size = (Path("run") / "last.pth").stat().st_size
    for allowed in (5000, size - 1, size + 100_000):  # no weights, all but a checkpoint's end, all but the state
        status, text = train_below({"RLIMIT_FSIZE": allowed}, replace(settings, epochs=2, resume=True))
        line = text.strip().splitlines()[-1]
        assert status == 1 and line.startswith("one line: cannot write run/") and "too large" in line, text[-2000:]
        for path, content in before.items():
            if path.suffix == ".pth" and path.stem not in ("last", "best"):
                assert path.read_bytes() == content
        assert not [p.name for p in Path("run").iterdir() if p.name.startswith(".")]
    assert train_below({}, replace(settings, epochs=2, resume=True))[0] == 0
    assert load_detector("run/last.pth").epoch == 2


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_numbers_that_are_none_stop_the_run_before_they_reach_the_weights(kind, demo, tiny_backbone, monkeypatch):
    seen = []

    def spoiled(out, targets, *options):
        losses = detection_loss(out, targets, *options)
        seen.append([target.image_id for target in targets])
        if len(seen) == 2:
            if kind == "loss":
                return losses | {"box": losses["box"] * torch.nan}
            out.boxes.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    monkeypatch.setattr(finetune_dino2_simple, "detection_loss", spoiled)
    with pytest.raises(InputError, match=f"epoch 1, step 2, on the images {', '.join(map(str, seen[1:]))}"):
        finetune_dino2_simple.main(settings_of(demo, tiny_backbone))
    report = json.loads(Path("run/not_finite_0.json").read_text())
    assert report["image_ids"] == seen[1] and report["step"] == 2
    state = torch.load("run/state.pth", weights_only=True)["progress"]
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_degenerate_boxes_give_finite_losses_and_gradients(head, assignment, tiny_backbone):
    torch.manual_seed(0)
    detector = new_detector(tiny_backbone, head=head, blocks=(2, 4), image_size=112, num_classes=3)
    boxes = [
        [0, 0, 112, 112],
        [5, 5, 5, 5],
        [20, 20, 20, 60],
        [80, 80, 60, 60],
        [-1e4, -1e4, 1e5, 1e5],
        [300, 300, 310, 310],
    ]
    target = Target(torch.tensor(boxes).float(), torch.arange(6) % 3, torch.zeros(6, dtype=torch.bool), 1, None)
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool), 2, None)
    for scores in SCORE_LOSSES:
        for kind in BOX_LOSSES:
            detector.zero_grad()
            config = LossConfig(assignment, scores, kind)
            losses = detection_loss(detector(torch.rand(2, 3, 112, 112)), [target, nothing], config)
            sum(losses.values()).backward()
            assert all(torch.isfinite(value) for value in losses.values()), (scores, kind, losses)
            assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_infinite_predictions_are_no_detections(detector):
    target = Target(*(torch.zeros(0, *s) for s in ((4,), (), ())), 1, Letterbox.fit((112, 112), 112))
    with torch.no_grad():
        out = detector(torch.full((1, 3, 112, 112), torch.nan))
    (found,) = postprocess(out, [target])
    assert torch.isfinite(found.boxes).all() and torch.isfinite(found.scores).all()


def test_fp16_without_a_gpu_is_refused(demo, tiny_backbone):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        finetune_dino2_simple.main(settings_of(demo, tiny_backbone, precision="fp16"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_validation_keeps_what_is_done(number, demo, tiny_backbone, monkeypatch, capsys):
    torch.manual_seed(0)
    for name in ("a", "b", "c"):
        model = new_detector(tiny_backbone, head="linear", blocks=(2, 4), image_size=56, num_classes=10)
        classes = [f"class {i}" for i in range(9)] + ["disc"]
        save_detector(f"{name}.pth", Checkpoint(model, tuple(classes), tuple(range(1, 11))))
    flags = ["--data", str(demo), "--models", "a.pth", "b.pth", "c.pth", "--workers", "0", "--batch-size", "2"]
    validate = comprehensive_validation

    def judge(*more):
        monkeypatch.setattr(sys, "argv", ["comprehensive_validation.py", *flags, *more])
        cli.run(validate.main, validate.Settings, "")

    judge("--output", "whole.json")
    whole = read_results("whole.json")
    judge()
    before = Path("validation_results.json").read_bytes()
    batches = iter(range(100))
    original = postprocess

    def counting(*arguments):
        if next(batches) == 3 + 18 + 4 + 1:  # the second batch of the second model; each is also timed
            signal.raise_signal(number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("common.evaluate.detect.postprocess", counting)
        with pytest.raises(SystemExit) as ended:
            judge()
    assert ended.value.code == 128 + number
    assert "1 of 3 models are done; go on with --resume" in capsys.readouterr().err
    assert Path("validation_results.json").read_bytes() == before
    seen = []
    find = validate.find
    monkeypatch.setattr(validate, "find", lambda path, *rest: seen.append(path) or find(path, *rest))
    judge("--resume")
    assert seen == ["b.pth", "c.pth"] and not Path("validation_results.partial.json").exists()
    resumed = read_results("validation_results.json")
    for one, other in zip(resumed.models, whole.models, strict=True):
        assert (one.detection, one.primary, one.intervals) == (other.detection, other.primary, other.intervals)
    assert len(resumed.comparisons) == 3
