"""Faults: out of memory, a full disk, NaN and inf, degenerate boxes, signals during validation."""

import multiprocessing
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import arguments_of, target_of, tiny_settings

import comprehensive_validation
import finetune_dino2_simple
from common import cli
from common.console import InputError
from common.evaluate.detect import run_detector
from common.evaluate.results import read_results
from common.model.assignment import ASSIGNMENTS
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import HEADS, new_detector
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, DetectionLoss, LossConfig
from common.model.postprocess import fuse_predictions, postprocess
from common.types import Targets


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def settings_of(demo, tiny_backbone, **options):
    common = {"output": "out.pth", "run_dir": "run", "precision": "fp32", "epochs": 2}
    return tiny_settings(finetune_dino2_simple, demo, tiny_backbone, **common | options)


def limited(limits, settings, out):
    """Run in a new process: train below some limits in bytes (RLIMIT_AS: beyond the memory in use)."""
    sys.stdout = sys.stderr = Path(out).open("a")  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    torch.set_num_threads(1)  # each thread would reserve memory of its own
    for name, size in limits.items():
        size += used if name == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, name), (size, size))
    sys.argv = ["train.py", *arguments_of(settings)]
    cli.run(finetune_dino2_simple.main, type(settings), "")


def train_below(limits, settings):
    """Exit status and output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_dino2_simple", "common.evaluate.primary"])
    Path("output.txt").unlink(missing_ok=True)
    process = context.Process(target=limited, args=(limits, settings, "output.txt"))
    process.start()
    process.join()
    return process.exitcode, Path("output.txt").read_text()


@pytest.mark.slow
def test_out_of_memory_ends_in_one_line_and_keeps_the_state(demo, tiny_backbone):
    settings = settings_of(demo, tiny_backbone, image_size=672, batch_size=12, epochs=1)
    limits = {"RLIMIT_AS": 500 << 20}
    status, text = train_below(limits, settings)
    assert status == 2 and "Traceback" not in text, text[-2000:]
    line = text.strip().splitlines()[-1]
    assert "out of memory" in line and "--batch-size" in line
    status, text = train_below(limits, replace(settings, batch_size=1, resume=True))
    assert status == 0 and load_checkpoint("out.pth").epoch == 1, text


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_loses_nothing(demo, tiny_backbone):
    settings = settings_of(demo, tiny_backbone, epochs=1)
    assert train_below({}, settings)[0] == 0
    before = {p: p.read_bytes() for p in (*Path("run").iterdir(), Path("out.pth"))}
    size = (Path("run") / "last.pth").stat().st_size
    for allowed in (5000, size - 1, size + 100_000):  # no weights, all but a checkpoint's end, all but the state
        status, text = train_below({"RLIMIT_FSIZE": allowed}, replace(settings, epochs=2, resume=True))
        line = text.strip().splitlines()[-1]
        assert status == 2 and line.startswith("train.py: error: cannot write run/") and "too large" in line, text[
            -2000:
        ]
        for path, content in before.items():
            if path.suffix == ".pth" and path.stem not in ("last", "best"):
                assert path.read_bytes() == content
        assert not [p.name for p in Path("run").iterdir() if p.name.startswith(".")]
    assert train_below({}, replace(settings, epochs=2, resume=True))[0] == 0
    assert load_checkpoint("run/last.pth").epoch == 2


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_and_inf_stop_the_run_before_they_reach_the_weights(kind, demo, tiny_backbone, monkeypatch):
    seen = []

    def with_nan_or_inf(criterion, out, targets, *options):
        losses = forward(criterion, out, targets, *options)
        seen.append(targets)
        if len(seen) == 2:
            if kind == "loss":
                return losses | {"box": losses["box"] * torch.nan}
            out.boxes.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    forward = DetectionLoss.forward
    monkeypatch.setattr(DetectionLoss, "forward", with_nan_or_inf)
    with pytest.raises(InputError, match=r"epoch 1, step 2, on the images (\d+, ){3}\d+; lower the learning rate"):
        finetune_dino2_simple.main(settings_of(demo, tiny_backbone))
    assert not Path("run/state.pth").exists()  # of the first epoch nothing is kept


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
    targets = Targets.pad([target_of(boxes, labels=[0, 1, 2, 0, 1, 2]), target_of([])])
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for scores in SCORE_LOSSES:
        for kind in BOX_LOSSES:
            detector.zero_grad()
            config = LossConfig(assignment, scores, kind)
            losses = DetectionLoss(config)(detector(pixels), targets)
            sum(losses.values()).backward()
            assert all(torch.isfinite(value) for value in losses.values()), (scores, kind, losses)
            assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_nan_predictions_give_no_detections(detector):
    with torch.no_grad():
        out = detector.head(torch.full((1, 8, 8, 2 * 48), torch.nan))
    (detections,) = postprocess(*fuse_predictions(out), [target_of([]).meta])
    assert torch.isfinite(detections.boxes).all() and torch.isfinite(detections.scores).all()


def test_fp16_without_a_gpu_is_refused(demo, tiny_backbone):
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        finetune_dino2_simple.main(settings_of(demo, tiny_backbone, precision="fp16"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_validation_keeps_the_finished_models(number, demo, tiny_backbone, monkeypatch, capsys):
    torch.manual_seed(0)
    classes = (*(f"class {i}" for i in range(9)), "disc")
    for name in ("a", "b", "c"):
        model = new_detector(tiny_backbone, head="linear", blocks=(2, 4), image_size=56, num_classes=10)
        save_detector(f"{name}.pth", Checkpoint(model, classes, tuple(range(1, 11))))

    def validate(*flags):
        arguments = ["--data", str(demo), "--workers", "0", "--batch-size", "2", *flags]
        monkeypatch.setattr(sys, "argv", ["comprehensive_validation.py", *arguments])
        cli.run(comprehensive_validation.main, comprehensive_validation.Settings, "")
        return read_results("validation_results.json")

    models = ("--models", "a.pth", "b.pth", "c.pth")
    whole = validate(*models)
    before = Path("validation_results.json").read_bytes()
    models_run = iter(range(3))

    def stopped(*arguments):
        if next(models_run) == 1:  # the second model
            signal.raise_signal(number)
        return run_detector(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("common.evaluate.detect.run_detector", stopped)
        with pytest.raises(SystemExit) as ended:
            validate(*models)
    assert ended.value.code == 128 + number
    assert Path("validation_results.json").read_bytes() == before
    advice = capsys.readouterr().err.strip().splitlines()[-1]
    resumed = validate("--models", "b.pth", "c.pth", *advice[advice.index("--from-detections") :].split())
    assert [record.name for record in resumed.models] == ["b", "c", "a"]
    for one in resumed.models:
        (other,) = (record for record in whole.models if record.name == one.name)
        assert vars(one.primary) == pytest.approx(vars(other.primary))
        assert one.intervals["AP"] == pytest.approx(other.intervals["AP"])
        assert pytest.approx(other.detection.AP, abs=1e-6) == one.detection.AP
