"""The feature cache: its content and names, how it is built, and training on it."""

import os

import pytest
import torch
from accelerate import Accelerator
from helpers import load_coco, tiny_settings

import improved_dino_detector
from common.console import InputError
from common.data.dataset import DetectionDataset, collate
from common.data.transforms import LetterboxTransform, mirror_drawn, mirror_target
from common.model.detector import new_detector
from common.train import feature_cache
from common.train.feature_cache import CachedDataset, cached_features, shard_paths


class MirrorTransform(LetterboxTransform):
    """The letterbox, and every second image mirrored."""

    def forward(self, image, target):
        image, target = super().forward(image, target)
        return (image.flip(-1), mirror_target(target, self.size)) if mirror_drawn() else (image, target)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def build(detector, data, accelerator, views=2):
    return cached_features(detector, data, views=views, batch_size=4, workers=0, accelerator=accelerator)


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def paths_of(detector, data, views=2, precision="fp32"):
    return shard_paths(detector, data, views, precision)


def test_cached_samples_equal_those_of_the_images(detector, demo_val, accelerator):
    """The same views in the same epochs, the same boxes, and features that agree to float16's precision."""
    cached = CachedDataset(demo_val, build(detector, demo_val, accelerator), 112, mirror=True, seed=3)
    plain = DetectionDataset(demo_val, MirrorTransform(112), seed=3)
    mirrored = 0
    for epoch in (1, 2):
        cached.set_epoch(epoch)
        plain.set_epoch(epoch)
        from_cache, from_images = (collate([dataset[i] for i in range(6)]) for dataset in (cached, plain))
        with torch.no_grad():
            features = detector.backbone(from_images.inputs)
            ours, theirs = detector.head(from_cache.inputs), detector(from_images.inputs)
        assert torch.allclose(from_cache.inputs.float(), features, atol=5e-3, rtol=1e-3)
        assert torch.allclose(ours.boxes, theirs.boxes, atol=0.1)
        assert all(map(torch.equal, from_cache.targets, from_images.targets)) and from_cache.meta == from_images.meta
        mirrored += sum(meta.scale is None for meta in from_cache.meta)
    assert 0 < mirrored < 12


def test_bf16_features_are_cached_without_loss(detector, demo_val):
    """The head then sees the same bits with the cache and without."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    features = build(detector, demo_val, accelerator, views=1)
    images = collate([DetectionDataset(demo_val, LetterboxTransform(112))[i] for i in range(4)]).inputs
    with torch.no_grad(), accelerator.autocast():
        plain, cached = detector(images), detector.head(features[0][:4, 0])
    assert features[0].dtype == torch.bfloat16
    assert torch.equal(plain.boxes, cached.boxes) and torch.equal(plain.class_logits, cached.class_logits)


def test_a_second_call_reads_the_cache_of_the_first(detector, demo_val, accelerator, own_cache, monkeypatch):
    first = build(detector, demo_val, accelerator)
    assert first[0].shape == (6, 2, 8, 8, 2 * 48) and [f.suffix for f in own_cache.iterdir()] == [".features"]
    monkeypatch.setattr(feature_cache, "make_eval_loader", None)
    assert equal(build(detector, demo_val, accelerator), first)


def test_an_interrupted_build_computes_only_missing_shards(detector, demo_val, accelerator, own_cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    whole = build(detector, demo_val, accelerator)
    assert [shard.shape[0] for shard in whole] == [4, 2]
    first, second = paths_of(detector, demo_val)
    content = second.read_bytes()
    second.unlink()
    seen = []
    forward = detector.backbone.forward
    monkeypatch.setattr(detector.backbone, "forward", lambda images: seen.append(len(images)) or forward(images))
    assert equal(build(detector, demo_val, accelerator), whole) and sum(seen) == 2 * 2
    assert second.read_bytes() == content and sorted(own_cache.iterdir()) == sorted([first, second])


def test_more_images_reuse_the_shards_of_fewer(detector, demo_val, accelerator, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 2)
    build(detector, demo_val.first(4), accelerator)
    assert [path.is_file() for path in paths_of(detector, demo_val)] == [True, True, False]


def test_old_temporary_files_of_killed_builds_are_removed(detector, demo_val, accelerator, own_cache):
    (path,) = paths_of(detector, demo_val)
    own_cache.mkdir(parents=True)
    old, young = (own_cache / f".{path.name}.{number}.tmp" for number in (1, 2))
    for leftover in (old, young):
        leftover.touch()
    os.utime(old, (0, 0))
    build(detector, demo_val, accelerator)
    assert sorted(own_cache.iterdir()) == sorted([path, young])  # another process may be writing the young one


def test_a_damaged_file_is_refused(detector, demo_val, accelerator, own_cache):
    build(detector, demo_val, accelerator)
    (path,) = own_cache.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged; delete it"):
        build(detector, demo_val, accelerator)


def test_the_name_changes_with_everything_that_changes_the_features(detector, demo_val, tiny_backbone):
    def name(detector=detector, data=demo_val, views=2, precision="fp32"):
        return paths_of(detector, data, views, precision)[0].name

    options = {"head": "linear", "num_classes": 10}
    others = [
        name(data=demo_val.first(5)),
        name(views=1),
        name(precision="bf16"),
        name(detector=new_detector(tiny_backbone, blocks=(1, 4), image_size=112, **options)),
        name(detector=new_detector(tiny_backbone, blocks=(2, 4), image_size=126, **options)),
    ]
    torch.manual_seed(1)
    same = new_detector(tiny_backbone, blocks=(2, 4), image_size=112, **options)
    assert name(detector=same) == name()  # another head, the same backbone
    with torch.no_grad():
        same.backbone.vit.layernorm.bias[0] += 1e-3
    others.append(name(detector=same))
    wider = new_detector(tiny_backbone, blocks=(2, 4), image_size=112, **options)
    wider.config.backbone["layer_norm_eps"] = 1e-3  # with which the same weights give other features
    others.append(name(detector=wider))
    assert len({name(), *others}) == 1 + len(others)


def test_a_changed_image_file_changes_the_name(detector, coco_file):
    path, images = coco_file([])
    data = load_coco(path, images)
    before = paths_of(detector, data)
    (images / "a.png").write_bytes((images / "a.png").read_bytes() + b" ")
    assert paths_of(detector, data) != before


def test_too_little_disk_space_is_an_error_before_the_build(detector, demo_val, accelerator, own_cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match=r"needs .* GB .* free: .*--feature-cache 0"):
        build(detector, demo_val, accelerator)
    assert list(own_cache.iterdir()) == []


def test_a_cache_above_the_limit_is_not_built(demo, tiny_backbone, tmp_path, own_cache, capsys):
    paths = {"output": str(tmp_path / "out.pth"), "run_dir": str(tmp_path / "run")}
    limited = {"epochs_frozen": 1, "stop_after": "frozen", "feature_cache": 1e-5}
    settings = tiny_settings(improved_dino_detector, demo, tiny_backbone, **paths, **limited)
    improved_dino_detector.main(settings)
    assert "stage 1 runs without it, on crops" in capsys.readouterr().out
    assert not own_cache.exists()
