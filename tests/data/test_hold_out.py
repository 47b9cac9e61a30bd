"""Where there is no validation part a share of the images is held out, and stays so; near-copies are found."""

import io
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import data_flags, random_image
from PIL import Image, ImageOps

from common.console import InputError
from common.data.copies import SKETCH_BYTES, find_copies, make_sketch
from common.data.demo import make_demo
from common.data.hold_out import assign_folds, choose_held_out, group_images
from common.data.memory import DetectionData, ImageFile
from common.data.sources import DataFlags, count_copies, load_split, load_train_and_val


def named(names):
    """A data set of images of these names, which are no files: none resembles another."""
    images = tuple(ImageFile(number, Path(name), 20, 20) for number, name in enumerate(names))
    nothing = np.zeros((0, 4)), *np.zeros((3, 0), int), np.zeros(len(images) + 1, int)
    return DetectionData(images, (1,), ("a",), *nothing, source="named")


def held_out(names, share=0.2):
    chosen = choose_held_out(named(names), share)
    return {name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen}


@pytest.fixture
def alike(monkeypatch):
    """Call it with lists of indices: of `named` images those become copies of each other."""

    def make(*groups):
        def sketches(data):
            found = np.random.default_rng(0).integers(0, 256, (len(data), SKETCH_BYTES), np.uint8)
            for group in groups:
                found[group] = found[group[0]]
            return found

        monkeypatch.setattr("common.data.hold_out.sketches_of", sketches)

    return make


NUMBERS = np.random.default_rng(1).permutation(600_000)[:200].tolist()
SERIES = {  # names of 200 images, in the order in which they come
    "cameras": [f"IMG_{number:04d}.jpg" for number in range(1, 201)],
    "COCO's": [f"{number:012d}.jpg" for number in NUMBERS],
    "Label Studio's": [f"{7919 * number:08x}-frame_{number:06d}.png" for number in range(200)],
    "words": [f"{number * 7919:x}x.jpg" for number in range(200)],
}


@pytest.mark.parametrize("series", SERIES)
def test_added_images_move_none_and_the_share_is_about_as_asked(series):
    names = SERIES[series]
    first, more = held_out(names[:50]), held_out(names[:70])
    assert first and first == more & set(names[:50])
    assert 20 <= len(held_out(names)) <= 60 and 60 <= len(held_out(names, 0.5)) <= 140


@pytest.mark.parametrize("form", ["{}.jpg", "{hash:08x}-{}.jpg", "{hash:08x}__{}.jpg", "{}_jpg.rf.{hash:032x}.jpg"])
def test_frames_of_a_scene_are_on_one_side_whatever_label_studio_and_roboflow_add(form):
    frames = [form.format(f"a_{number:04d}", hash=7919 * number) for number in range(1, 41)]
    for share, others in itertools.product((0.2, 0.4, 0.6, 0.8), (SERIES["cameras"], SERIES["words"][:10])):
        assert len(held_out([*frames, *others], share) & set(frames)) in (0, 40)
    assert 0 < len(held_out(frames)) < 40  # where there is no other image


def test_versions_of_an_image_and_near_copies_stay_together(alike):
    names = [f"{stem}_jpg.rf.{version}.jpg" for stem in "abcdefghij" for version in "012"]
    assert {name[0] for name in held_out(names)}.isdisjoint({n[0] for n in {*names} - held_out(names)})
    names = SERIES["words"]
    chosen = held_out(names)
    apart = [(name, other) for name in sorted(chosen)[:9] for other in sorted({*names} - chosen)[:3]]
    for pair in apart:
        alike([names.index(name) for name in pair])
        assert len(held_out(names) & set(pair)) in (0, 2)
    alike(range(200))
    assert 20 <= len(held_out(names)) <= 60  # there is no other way
    alike()
    for few in (["x.png", "x.jpg"], ["x.png"]):
        with pytest.raises(InputError, match="none can be held out"):
            held_out(few)


@pytest.mark.parametrize("series", SERIES)
def test_folds_are_of_whole_groups_with_their_copies_and_of_about_as_many_images(series, alike):
    copies = [[3, 70, 150], [31, 32], [110, 190]]
    alike(*copies)
    data = named(SERIES[series])
    folds, groups = assign_folds(data, 5), group_images(data, 5)
    assert len(set(zip(groups, folds.tolist(), strict=True))) == len(set(groups))
    assert all(len(set(folds[group])) == 1 for group in copies)
    assert np.bincount(folds).min() >= 20 and len(np.bincount(folds)) == 5


def test_folds_are_cut_finer_where_groups_are_few_but_copies_are_never_apart(alike):
    frames = named(f"frame_{number:06d}.png" for number in range(30))
    assert np.bincount(assign_folds(frames, 5)).tolist() == [6] * 5
    alike(range(27))
    with pytest.raises(InputError, match=r"named: its 30 images are 4 groups .* too few for 5 folds: ask for fewer"):
        assign_folds(frames, 5)
    assert sorted(np.bincount(assign_folds(frames, 4))) == [1, 1, 1, 27]


def yolo(root, parts):
    for part, images in parts.items():
        for name, image in images.items():
            (root / part).mkdir(parents=True, exist_ok=True)
            image.save(root / part / name)
            (root / part / name).with_suffix(".txt").write_text("0 .5 .5 .5 .5")
    (root / "data.yaml").write_text("".join(f"{part}: {part}\n" for part in parts) + "names: [a]")
    return root


def test_training_and_evaluation_find_the_same_images(tmp_path, caplog):
    root = yolo(tmp_path, {"train": {f"{i:02d}.png": random_image(20, 20, i) for i in range(50)}})
    caplog.set_level("INFO")
    (root / "train" / "07.txt").unlink()
    train, val = load_train_and_val(data_flags(root))
    assert len(train) + len(val) == 50 and not {i.path for i in train.images} & {i.path for i in val.images}
    assert caplog.text.count(f"has no validation part: {len(val)} of its 50 images are held out (--hold-out 0.2)") == 1
    assert caplog.text.count("took 1 images without a label file") == 1  # of the whole set, not once for each part
    flags = DataFlags(str(root), val_images=0)
    assert load_split(flags, "val").fingerprint() == val.fingerprint() and count_copies(flags, val) == 0
    assert len(load_split(data_flags(root, hold_out=0.6), "val")) > len(val)


def encoded(image, quality):
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(file)


CHANGES = {
    "encoded": lambda image: encoded(image, 60),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "lighter": lambda image: image.point(lambda value: min(255, value + 10)),
    "mirrored": lambda image: encoded(ImageOps.mirror(image), 90),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    make_demo(folder := tmp_path_factory.mktemp("scenes") / "demo", train=40, val=0, seed=3)
    return {file.name: Image.open(file).convert("RGB") for file in sorted(folder.rglob("*.jpg"))}


def sketches_of(images):
    return np.frombuffer(b"".join(map(make_sketch, images)), np.uint8).reshape(-1, SKETCH_BYTES)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_no_others(scenes, change):
    own, changed = sketches_of(scenes.values()), sketches_of(map(CHANGES[change], scenes.values()))
    found = {index: others.tolist() for index, others in find_copies(changed, own)}
    assert all(others == [index] for index, others in found.items()) and len(found) >= 38
    assert {index: others.tolist() for index, others in find_copies(own, own)} == {i: [i] for i in range(40)}


def test_copies_of_training_images_are_named_counted_and_refused_by_strict(scenes, tmp_path, caplog):
    images = list(scenes.values())
    parts = {
        "train": dict(zip("abcdef", images, strict=False)),
        "val": {"x": images[9], "y": CHANGES["half"](images[2])},
    }
    root = yolo(tmp_path, {part: {f"{k}.png": image for k, image in found.items()} for part, found in parts.items()})
    load_train_and_val(data_flags(root))
    assert "1 images are copies of training images (y.png)" in caplog.text
    flags = DataFlags(str(root), val_images=0)
    assert count_copies(flags, load_split(flags, "val")) == 1
    for load in (load_train_and_val, lambda strict: count_copies(strict, load_split(flags, "val"))):
        with pytest.raises(InputError, match=r"1 images are copies .*refused by --strict"):
            load(data_flags(root, strict=True))


def test_sixteen_thousand_images_are_compared_with_four_thousand_in_seconds():
    sketches, start = np.random.default_rng(0).bytes(20_000 * SKETCH_BYTES), time.process_time()
    whole = np.frombuffer(sketches, np.uint8).reshape(-1, SKETCH_BYTES)
    assert not list(find_copies(whole[:4000], whole[4000:])) and time.process_time() - start < 5


@pytest.mark.real
def test_real_images_have_no_false_copies(assets):
    images = [Image.open(file).convert("RGB") for file in sorted((assets / "coco-subset").rglob("*.jpg"))]
    start = time.process_time()
    own = sketches_of(images)
    assert time.process_time() - start < 0.002 * len(images)
    assert {index: others.tolist() for index, others in find_copies(own, own)} == {i: [i] for i in range(len(own))}
