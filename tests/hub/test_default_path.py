"""The scripts without --data and --backbone, against a hub on this machine, by the real clients."""

import json
import shutil

import pytest
from loopback import Fault, etag

pytestmark = pytest.mark.slow
SIZES = "--train-images 8 --val-images 4 --image-size 56 --batch-size 4 --workers 0".split()
DATA, BACKBONE = "/datasets/detection-datasets/coco", "/facebook/dinov2-small"
SIMPLE = ("finetune_dino2_simple.py", *SIZES, "--epochs", 1)


@pytest.fixture
def client(worker, hub):
    """With an empty home."""
    for entry in worker.folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    hub.order()
    return worker


def test_the_five_scripts_fetch_each_file_once_and_then_need_no_hub(client, hub):
    models = ("dino2_detector.pth", "improved_dino2_detector.pth")
    commands = [
        SIMPLE,
        ("improved_dino_detector.py", *SIZES, "--epochs-frozen", 1, "--epochs-unfrozen", 1, "--crop-size", 56),
        ("validate_models.py", "--val-images", 4, "--workers", 0, "--checkpoints", *models, "--output", "images"),
        ("comprehensive_validation.py", "--val-images", 4, "--workers", 0, "--models", *models),
        ("plot_results.py",),
    ]
    for command in commands:
        status, printed, _ = client.run(*command)
        assert status == 0, printed
    weights = etag(hub.root / f"models{BACKBONE}/model.safetensors")
    for part in ("config.json", weights):
        assert sum(line.startswith("GET") and part in line for line in hub.log) == 1, part
    results = json.loads((client.folder / "validation_results.json").read_text())
    assert f"coco@{hub.commit(DATA[1:])[:7]}" in results["dataset"]["source"]
    assert f"coco@{hub.commit(DATA[1:])[:7]}, train" in results["models"][0]["conditions"]["train_source"]
    assert (client.folder / "model_comparison_charts.png").is_file()
    folder = hub.root / "models/somebody/mine_hub"
    status, printed, _ = client.run("common/export/__main__.py", models[0], "--format", "hub", "--output", folder)
    assert status == 0, printed
    status, printed, _ = client.run(*commands[2][:5], "--checkpoints", "hub:somebody/mine_hub", "--output", "other")
    assert status == 0 and (client.folder / "other/contact_sheet.jpg").is_file(), printed
    hub.order()
    status, printed, _ = client.run(*SIMPLE, "--run-dir", "again", offline=True)
    assert status == 0 and hub.log == [], printed


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            Fault("gated", f"*{BACKBONE}*"),
            "it is gated: accept its terms at {address}/facebook/dinov2-small and log in",
        ),
        (Fault("foreign", f"*{BACKBONE}/*"), "{address} does not answer as a hub: check HF_ENDPOINT and the proxy"),
        (
            Fault("missing", f"*{BACKBONE}*"),
            "backbone facebook/dinov2-small is not in the cache: the hub has nothing of",
        ),
        (Fault("gated", f"*/api{DATA}*"), "accept its terms at {address}/datasets/detection-datasets/coco and log in"),
        (
            Fault("missing", f"*/api{DATA}*"),
            "cannot fetch the hub data set detection-datasets/coco: the hub has nothing",
        ),
        (Fault("busy", f"*/api{DATA}*", wait=61), "the hub answers with the status 429: run the same command later"),
        (Fault("break", "GET /cdn/*"), "the connection broke off: the same command goes on"),
    ],
    ids=lambda value: "-".join(value[:2]).replace("/", "_") if isinstance(value, Fault) else "",
)
def test_a_failure_is_told_by_its_cause_and_its_mend(client, hub, fault, message):
    hub.order(fault)
    status, printed, seconds = client.run(*SIMPLE)
    *_, line = printed.splitlines()
    assert status == 2 and message.format(address=hub.address) in line and "…" not in line, printed
    assert "Retry" not in printed and seconds < 120
    hub.order()
    assert client.run(*SIMPLE)[0] == 0


@pytest.mark.parametrize("on", [f"GET /api{DATA}", f"GET /api/models{BACKBONE}/*", "GET /cdn/*"])
@pytest.mark.parametrize("kind", ["busy", "late", "break"])
def test_a_passing_failure_is_waited_for(client, hub, kind, on):
    hub.order(Fault(kind, on, times=1, wait=11.0 if kind == "late" else 2.0))
    status, printed, _ = client.run(*SIMPLE)
    assert status == 0 and "Retry" not in printed and ("trying again" in printed or kind != "busy"), printed


def test_both_splits_are_of_one_revision(client, hub):
    assert client.run(*SIMPLE)[0] == 0
    first = (client.folder / "cache/hub/detection-datasets--coco/train/journal.jsonl").read_text()
    hub.move()
    status, printed, _ = client.run(*SIMPLE, "--val-images", 8)
    assert status == 2 and "the hub no longer has its revision" in printed and "delete it to begin anew" in printed
    assert (client.folder / "cache/hub/detection-datasets--coco/train/journal.jsonl").read_text() == first
