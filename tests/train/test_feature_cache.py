"""The feature cache: its content and names, how it is built, and training on it."""

import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import load_coco, tiny_settings

import improved_dino_detector
from common.console import InputError
from common.data.dataset import DetectionDataset, collate
from common.data.transforms import ScaleTransform, mirror_drawn, mirror_target
from common.train import feature_cache
from common.train.feature_cache import CachedDataset, cached_features, shard_paths
from common.types import InputSize

SIZE = InputSize(112, 14)


class MirrorTransform(ScaleTransform):
    """Scaling, and every second image mirrored."""

    def forward(self, image, target):
        image, target = super().forward(image, target)
        return (image.flip(-1), mirror_target(target, image.shape[2])) if mirror_drawn() else (image, target)


@pytest.fixture(autouse=True)
def folder(own_folder):
    return own_folder / "cache" / "features"


def cached(detector, data, views=2, precision="no"):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return cached_features(detector, data, views=views, batch_size=4, workers=0, accelerator=accelerator)


def test_cached_samples_equal_those_of_the_images(detector, demo_val):
    """The same views in the same epochs, the same boxes, and features that agree to float16's precision."""
    from_disk = CachedDataset(demo_val, cached(detector, demo_val), SIZE, mirror=True, seed=3)
    plain = DetectionDataset(demo_val, MirrorTransform(SIZE), seed=3)
    mirrored = 0
    for epoch in (1, 2):
        from_disk.set_epoch(epoch)
        plain.set_epoch(epoch)
        batches = [collate([dataset[i] for i in range(6)]) for dataset in (from_disk, plain)]
        assert len(batches[0]) == len(batches[1]) > 1, "images of one shape"
        for from_cache, from_images in zip(*batches, strict=True):
            with torch.no_grad():
                features = detector.backbone(from_images.inputs)
                ours, theirs = detector.head(from_cache.inputs), detector(from_images.inputs)
            assert torch.allclose(from_cache.inputs.float(), features, atol=5e-3, rtol=1e-3)
            assert torch.allclose(ours.boxes, theirs.boxes, atol=0.1)
            assert all(map(torch.equal, from_cache.targets, from_images.targets))
            assert from_cache.meta == from_images.meta
            mirrored += sum(meta.scale is None for meta in from_cache.meta)
    assert 0 < mirrored < 12


def test_bf16_features_are_cached_without_loss(detector, demo_val):
    """The head then sees the same bits with the cache and without."""
    features = cached(detector, demo_val, views=1, precision="bf16")
    image = DetectionDataset(demo_val, ScaleTransform(SIZE))[0][0][None]
    with torch.no_grad(), Accelerator(cpu=True).autocast():
        plain, read = detector(image), detector.head(features[0])
    assert features[0].dtype == torch.bfloat16
    assert torch.equal(plain.boxes, read.boxes) and torch.equal(plain.class_logits, read.class_logits)


def test_an_interrupted_build_computes_only_missing_shards(detector, demo_val, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 2)
    paths, seen, forward = shard_paths(detector, demo_val, 2, "fp32"), [], detector.backbone.forward
    monkeypatch.setattr(detector.backbone, "forward", lambda images: seen.append(len(images)) or forward(images))
    cached(detector, demo_val.select(np.arange(4)))
    assert [path.is_file() for path in paths] == [True, True, False] and sum(seen) == 4 * 2
    whole = cached(detector, demo_val)
    grids = [[side // 14 for side in SIZE.fit(image.meta.size)[0]] for image in demo_val.images]
    assert [tuple(f.shape) for f in whole] == [(2, *grid, 2 * 48) for grid in grids] and sum(seen) == 6 * 2
    old, young = (folder / f".{paths[1].name}.{number}.tmp" for number in (1, 2))
    for file in (old, young):
        file.touch()
    os.utime(old, (0, 0))
    paths[1].unlink()
    assert all(map(torch.equal, cached(detector, demo_val), whole)) and sum(seen) == 8 * 2
    assert set(folder.iterdir()) == {*paths, young}  # another process may be writing the young one
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged; delete it"):
        cached(detector, demo_val)


def test_the_name_changes_with_everything_that_changes_the_features(detector, demo_val, build, coco_file, monkeypatch):
    def names(changed=detector, data=demo_val, views=2, precision="fp32"):
        return shard_paths(changed, data, views, precision)

    assert names(build("pyramid")) == names()  # another head, the same backbone
    tuned, wider = build(), build()
    with torch.no_grad():
        tuned.backbone.vit.layernorm.bias[0] += 1e-3
    wider.config.backbone["layer_norm_eps"] = 1e-3  # with which the same weights give other features
    detectors = [tuned, wider, build(blocks=(1, 4)), build(image_size=126)]
    own = load_coco(*coco_file([]))
    others = [
        names(),
        names(data=demo_val.select(np.arange(5))),
        names(views=1),
        names(precision="bf16"),
        names(data=own),
    ]
    others += map(names, detectors)
    file = own.images[0].path
    status = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"-")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same length and time
    others.append(names(data=own))
    monkeypatch.setattr("common.data.memory.DECODING", "of another release")
    others.append(names())
    monkeypatch.setattr("torch.__version__", "another")
    others.append(names())
    assert len(set(map(tuple, others))) == len(others) == 12


def test_too_little_disk_space_is_an_error_before_the_cached(detector, demo_val, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match=r"needs .* GB .* free: .*--feature-cache 0"):
        cached(detector, demo_val)
    assert list(folder.iterdir()) == []


def test_a_cache_above_the_limit_is_not_built(demo, tiny_backbone, folder, capsys):
    limited = {"epochs_frozen": 1, "stop_after": "frozen", "feature_cache": 1e-5}
    improved_dino_detector.main(tiny_settings(improved_dino_detector, demo, tiny_backbone, **limited))
    assert "stage 1 runs without it, on crops" in capsys.readouterr().out and not folder.exists()
