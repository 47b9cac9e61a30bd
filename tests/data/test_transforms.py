"""Scaling, augmentation, batches."""

from dataclasses import replace

import pytest
import torch
from helpers import annotation, data_flags, load_coco, target_of

from common.console import InputError
from common.data.dataset import DetectionDataset, collate
from common.data.sources import load_split
from common.data.transforms import AugmentationFlags, ScaleTransform, TrainTransform, scaled_target
from common.model.postprocess import detections_of
from common.types import ImageMeta, InputSize, Targets


def painted(width=300, height=200, box=(60, 40, 180, 120)):
    """A black image with a red rectangle, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, box[1] : box[3], box[0] : box[2]] = 255
    target = replace(target_of([box], labels=[4]), meta=ImageMeta(1, None, (height, width)))
    return image, target


def red_box(image):
    red, green, blue = image.float()
    rows, columns = torch.nonzero(red - torch.maximum(green, blue) > 60, as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


SIDES = {(480, 640): (168, 224), (500, 333): (224, 154), (30, 1000): (56, 224), (9, 9): (224, 224)}


@pytest.mark.parametrize(("size", "sides"), SIDES.items())
def test_scaling_carries_the_box_along_and_detections_are_scaled_back(size, sides):
    """Both sides become multiples of the patch, without padding, and each has a scale of its own."""
    height, width = size
    box = (width // 5, height // 5, width // 2, height // 2)
    image, target = ScaleTransform(InputSize(224, 14))(*painted(width, height, box))
    assert image.shape == (3, *sides) and image.dtype == torch.uint8
    assert target.meta.scale == (sides[1] / width, sides[0] / height)
    assert red_box(image) == pytest.approx(target.boxes[0].tolist(), abs=max(1, *target.meta.scale) / 2 + 0.5)
    boxes = torch.tensor([[0.0, 0.0, width, height], box])
    moved = scaled_target(replace(target_of(boxes.tolist()), meta=ImageMeta(1, None, size)), InputSize(224, 14))
    assert moved.boxes[0].tolist() == pytest.approx([0, 0, *reversed(sides)], abs=1e-3)
    (found,) = detections_of(moved.boxes[None], torch.ones(1, 2), torch.zeros(1, 2).long(), [moved.meta])
    assert torch.allclose(found.boxes, boxes, atol=1e-3)


@pytest.mark.parametrize("crop_size", [140, 112])
def test_augmentation_carries_the_box_along(crop_size):
    transform, seen = TrainTransform(140, crop_size), set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = transform(*painted())
        assert image.shape == (3, crop_size, crop_size) and image.dtype == torch.uint8
        assert len(target.boxes) == len(target.labels) == len(target.crowd)
        if len(target.boxes):
            assert red_box(image) == pytest.approx(target.boxes[0].tolist(), abs=2)
            seen.add(tuple(target.boxes[0].round().tolist()))
    assert len(seen) > 30


def test_each_augmentation_varies_one_thing(monkeypatch):
    """A box to the left in one colour: where it lies, how wide it is and its colour show what was varied."""
    still = AugmentationFlags(no_mirror=True, scales=(1.0, 1.0))
    varied = {"mirror": replace(still, no_mirror=False), "scale": replace(still, scales=(0.75, 1.33))}
    varied |= {"color": still, "nothing": still}
    seen: dict[str, list[set]] = {}
    for name, flags in varied.items():
        places, widths, colors = set(), set(), set()
        monkeypatch.setattr("common.data.transforms.COLOR_JITTER", 0.3 if name == "color" else 0.0)
        for seed in range(20):
            torch.manual_seed(seed)
            image, target = TrainTransform(140, flags=flags)(*painted(box=(0, 0, 40, 40)))
            x1, y1, x2, y2 = target.boxes[0].round().int().tolist()
            places.add(x1 > 50)
            widths.add(x2 - x1)
            colors.add(tuple(image[:, (y1 + y2) // 2, (x1 + x2) // 2].tolist()))
        seen[name] = [places, widths, colors]
    counts = {name: [len(values) > 1 for values in sets] for name, sets in seen.items()}
    assert counts["nothing"] == [False, False, False]
    assert counts["mirror"][0] and not counts["mirror"][2]
    assert counts["scale"][1] and counts["color"] == [False, False, True]
    with pytest.raises(InputError, match="--scales 2 1: give the lowest and the highest"):
        AugmentationFlags(scales=(2, 1)).check_augmentation()


def test_a_smaller_crop_shows_objects_at_the_same_scale():
    widths = []
    for crop_size in (140, 56):
        torch.manual_seed(0)
        transform = TrainTransform(140, crop_size, flags=AugmentationFlags(scales=(1.0, 1.0)))
        found = [transform(*painted(box=(60, 40, 120, 80)))[1].boxes for _ in range(20)]
        widths.append(max((boxes[:, 2] - boxes[:, 0]).max() for boxes in found if len(boxes)))
    assert widths[0] == pytest.approx(widths[1], abs=0.5)


def test_augmentation_depends_on_seed_epoch_and_image_alone(demo):
    data = load_split(data_flags(str(demo)), "train")
    first, second = (DetectionDataset(data, TrainTransform(56), seed=3) for _ in range(2))
    _ = torch.rand(7), first[0]
    assert torch.equal(first[5][0], second[5][0])
    second.set_epoch(1)
    assert not torch.equal(first[5][0], second[5][0])


@pytest.mark.parametrize("size", [(20000, 40), (10, 6000), (60000, 1), (1, 9000), (1, 1)])
def test_elongated_images_keep_their_shorter_side(size):
    width, height = size
    image, box = torch.full((3, height, width), 200, dtype=torch.uint8), torch.tensor([[0.0, 0.0, width, height]])
    target = replace(target_of(box.tolist(), labels=[4]), meta=ImageMeta(1, None, (height, width)))
    scaled, moved = ScaleTransform(InputSize(112, 14))(image, target)
    sides = [112 if side == max(size) else 56 for side in size]
    assert moved.boxes[0].tolist() == pytest.approx([0, 0, *sides])
    assert scaled.shape == (3, *reversed(sides)) and (scaled == 200).all()
    for transform in (TrainTransform(56), TrainTransform(448, 56)):
        for seed in range(10):
            torch.manual_seed(seed)
            augmented, moved = transform(image, target)
            assert augmented.shape == (3, 56, 56) and moved.boxes.isfinite().all()
            assert len(moved.boxes) == len(moved.labels) == len(moved.crowd)


def test_collate_keeps_bytes_pads_targets_and_stacks_what_has_one_shape(coco_file):
    data = load_coco(*coco_file([annotation()]))
    samples = [DetectionDataset(data, ScaleTransform(InputSize(112, 14)))[i] for i in range(2)]
    wide, samples[1] = (samples[0][0].mT, samples[0][1]), (torch.zeros_like(samples[0][0]), samples[1][1])
    batch, other = collate([samples[0], wide, samples[1]])
    assert batch.inputs.shape == (2, 3, 70, 112) and batch.inputs.dtype == torch.uint8
    assert batch.targets.objects.tolist() == [[True], [False]] and batch.targets.crowds.shape == (2, 0, 4)
    assert [meta.image_id for meta in batch.meta] == [11, 5]
    assert other.inputs.shape == (1, 3, 112, 70) and [meta.image_id for meta in other.meta] == [11]


def test_targets_are_padded_to_the_largest_number_of_objects_and_of_crowds():
    crowd = target_of([[9, 9, 20, 20], [0, 0, 5, 5]], labels=[2, 7], crowd=[True, False])
    targets = Targets.pad([target_of([[1, 2, 3, 4], [5, 6, 7, 8]], labels=[3, 0]), crowd, target_of([])])
    assert targets.labels.tolist() == [[3, 0], [7, -1], [-1, -1]]
    assert targets.boxes[1].tolist() == [[0, 0, 5, 5], [0, 0, 0, 0]]
    assert targets.crowds.tolist() == [[[0, 0, 0, 0]], [[9, 9, 20, 20]], [[0, 0, 0, 0]]]
    none = Targets.pad([target_of([]), target_of([])])
    assert none.labels.tolist() == [[-1], [-1]] and none.boxes.shape == (2, 1, 4)
