"""The same boxes, written in every layout, are read back as the same data set: sizes, frames, labels and splits."""

import json
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import yaml
from helpers import data_flags, encoded, random_image, turned_back
from PIL import Image

from common.console import InputError
from common.data.sources import TEST_NOTE, load_split
from common.types import convert_boxes

NAMES = ["cat", "dog", "traffic light"]


@dataclass
class Scene:
    """An upright image, its file's name and content, and its boxes (label, x1, y1, x2, y2) in upright pixels."""

    name: str
    image: Image.Image
    content: bytes
    boxes: list[tuple[int, ...]]


def size_tells(orientation, size):
    return orientation == 1 or (orientation >= 5 and size[0] != size[1])


def make_scenes(seed, count, orientation_of=lambda index, size: 1, suffixes=(".png", ".tif")):
    """Random pixels and boxes, every class at least once; some images have no box."""
    rng = np.random.default_rng(seed)
    scenes = []
    for index in range(count):
        width, height = rng.integers(8, 60, 2).tolist() if index % 3 else [int(rng.integers(8, 60))] * 2
        image, boxes = random_image(width, height, 100 * seed + index), []
        for number in range(rng.integers(0, 4) if index else 3):
            x1, y1 = rng.integers(0, width - 1), rng.integers(0, height - 1)
            x2, y2 = rng.integers(x1 + 1, width + 1), rng.integers(y1 + 1, height + 1)
            label = number if index == 0 else rng.integers(0, len(NAMES))
            boxes.append(tuple(map(int, (label, x1, y1, x2, y2))))
        suffix = suffixes[index % len(suffixes)]
        content = encoded(image, orientation_of(index, image.size), suffix)
        scenes.append(Scene(f"image {index:02d}.b{suffix}", image, content, boxes))
    return scenes


def write_images(folder, scenes):
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        (folder / scene.name).write_bytes(scene.content)


def coco_content(scenes):
    images, annotations = [], []
    for number, scene in enumerate(scenes, 7):
        images.append({"id": number, "file_name": scene.name, "width": scene.image.width, "height": scene.image.height})
        for label, x1, y1, x2, y2 in scene.boxes:
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 3 * label + 1, "iscrowd": 0}
            annotations.append(entry | {"bbox": box, "area": box[2] * box[3]})
    categories = [{"id": 3 * label + 1, "name": name} for label, name in enumerate(NAMES)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def write_coco(root, split, scenes):
    write_images(root / f"{split}2017", scenes)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(coco_content(scenes))


def write_roboflow(root, split, scenes):
    write_images(root / split, scenes)
    (root / split / "_annotations.coco.json").write_text(coco_content(scenes))


def write_yolo(root, split, scenes, polygons=False):
    write_images(root / "images" / split, scenes)
    (root / "labels" / split).mkdir(parents=True)
    for scene in scenes:
        lines = []
        for label, x1, y1, x2, y2 in scene.boxes:
            x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            numbers = [x1, y, x, y1, x2, y, x, y2] if polygons else [x, y, width, height]
            shares = np.array(numbers) / np.tile(scene.image.size, len(numbers) // 2)
            lines.append(" ".join(map(str, [label, *shares])) + "\n")
        (root / "labels" / split / scene.name).with_suffix(".txt").write_text("".join(lines))
    path = root / "data.yaml"
    settings = yaml.safe_load(path.read_text()) if path.exists() else {"names": NAMES}
    path.write_text(yaml.safe_dump(settings | {split: f"images/{split}"}))


def write_yolo_polygons(root, split, scenes):
    write_yolo(root, split, scenes, polygons=True)


def voc_xml(path, scene, size=None):
    width, height = size or scene.image.size
    things = ""
    for label, x1, y1, x2, y2 in scene.boxes:
        corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        things += f"<object><name>{NAMES[label]}</name><bndbox>{corners}</bndbox></object>"
    sides = f"<size><width>{width}</width><height>{height}</height></size>"
    path.write_text(f"<annotation><filename>stale.jpg</filename>{sides}{things}</annotation>")


def write_voc(root, split, scenes):
    write_images(root / "JPEGImages", scenes)
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    stems = [scene.name.rpartition(".")[0] for scene in scenes]
    for stem, scene in zip(stems, scenes, strict=True):
        voc_xml(root / "Annotations" / f"{stem}.xml", scene)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_voc_folders(root, split, scenes):
    write_images(root / split, scenes)
    for scene in scenes:
        voc_xml((root / split / scene.name).with_suffix(".xml"), scene)


def write_hub(root, split, scenes):
    rows = []
    for number, scene in enumerate(scenes, 7):
        objects = {"bbox": [list(map(float, box[1:])) for box in scene.boxes], "category": [b[0] for b in scene.boxes]}
        row = {"image": {"bytes": scene.content, "path": None}, "image_id": number, "objects": objects}
        rows.append(row | {"width": scene.image.width, "height": scene.image.height})
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float64"))), "category": datasets.List(CLASS)}
    whole = datasets.Value("int64")
    features = {"image": datasets.Image(), "image_id": whole, "objects": objects, "width": whole, "height": whole}
    (root / "data").mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")


CLASS = datasets.ClassLabel(names=NAMES)
FRAME_DEFINED = [write_yolo, write_yolo_polygons, write_voc, write_voc_folders]  # every orientation is understood
FRAME_BY_SIZE = [write_coco, write_roboflow, write_hub]
WRITERS = [*FRAME_BY_SIZE, *FRAME_DEFINED]


def check_same(data, scenes):
    assert data.notes == () and data.class_names == tuple(NAMES) and len(data) == len(scenes)
    for index, (file, scene) in enumerate(zip(data.images, scenes, strict=True)):
        part = slice(data.starts[index], data.starts[index + 1])
        expected = np.array(scene.boxes).reshape(-1, 5)
        assert np.allclose(convert_boxes(data.boxes[part], "xywh", "xyxy"), expected[:, 1:], rtol=0, atol=1e-9)
        assert data.labels[part].tolist() == expected[:, 0].tolist() and not data.crowd[part].any()
        assert np.allclose(data.areas[part], np.prod(expected[:, 3:] - expected[:, 1:3], axis=1))
        assert (file.width, file.height) == scene.image.size
        assert np.array_equal(np.asarray(file.open()), np.asarray(scene.image))


def flags_of(write, root, **flags):
    return data_flags(root, **flags, box_format="xyxy" if write is write_hub else "")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("write", WRITERS)
def test_the_same_boxes_in_every_layout(tmp_path, write, seed):
    def orientation_of(index, size):
        orientation = (index + seed) % 8 + 1
        return orientation if write in FRAME_DEFINED or size_tells(orientation, size) else 1

    scenes = make_scenes(seed, 24, orientation_of)
    write(tmp_path, "val", scenes)
    check_same(load_split(flags_of(write, tmp_path, strict=True), "val"), scenes)


def test_the_same_sample_is_taken_from_every_layout(tmp_path):
    scenes, taken = make_scenes(0, 12), set()
    for write in set(WRITERS) - {write_hub}:  # which keeps its own order
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__, "val", scenes)
        data = load_split(data_flags(tmp_path / write.__name__, 4), "val")
        taken.add(tuple(image.path.name for image in data.images))
    assert len(taken) == 1 and len(taken.pop()) == 4


@pytest.mark.parametrize("write", WRITERS)
def test_validation_split_comes_before_test(tmp_path, write, caplog):
    scenes = {name: make_scenes(seed, 2) for seed, name in enumerate(("test", "validation", "Valid", "val"))}
    for count in range(1, 5):
        root = tmp_path / str(count)
        root.mkdir()
        for name in list(scenes)[:count]:
            write(root, name, scenes[name] if write != write_voc else renamed(scenes[name], name))
        expected = list(scenes)[count - 1]
        check_same(load_split(flags_of(write, root, strict=True), "test"), scenes["test"])
        if expected != "test":
            check_same(load_split(flags_of(write, root, strict=True), "val"), scenes[expected])
            continue
        for _ in range(2):  # the second time, hub data come from the cache
            data = load_split(flags_of(write, root), "val")
            assert data.notes == (TEST_NOTE,) and TEST_NOTE in caplog.text
            caplog.clear()
            boxes = [box[1:] for scene in scenes["test"] for box in scene.boxes]
            assert np.allclose(convert_boxes(data.boxes, "xywh", "xyxy"), boxes)
        with pytest.raises(InputError, match="refused by --strict"):
            load_split(flags_of(write, root, strict=True), "val")


def renamed(scenes, prefix):
    """With names of their own, since VOC keeps the images of all splits in one folder."""
    return [Scene(f"{prefix} {scene.name}", scene.image, scene.content, scene.boxes) for scene in scenes]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("size", [(24, 16), (16, 16)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_frame_of_coco_images_is_as_stored_unless_the_size_tells(tmp_path, orientation, size, suffix):
    quarters = np.array([[0, 80], [160, 240]], np.uint8)
    upright = Image.fromarray(quarters).resize(size, Image.Resampling.NEAREST).convert("RGB")
    content = encoded(upright, orientation, suffix)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / f"a{suffix}").write_bytes(content)
    turned = orientation >= 5
    for annotated in (size, size[::-1], None):
        scene = Scene(f"a{suffix}", Image.new("L", annotated or size), content, [(0, 1, 2, 5, 7)])
        coco = json.loads(coco_content([scene]))
        if annotated is None:
            del coco["images"][0]["width"]
        (tmp_path / "valid" / "_annotations.coco.json").write_text(json.dumps(coco))
        if annotated == size[::-1] != size and not turned:
            with pytest.raises(InputError, match="of another size than annotated"):
                load_split(data_flags(tmp_path), "val")
            continue
        data = load_split(data_flags(tmp_path), "val")
        decided = size_tells(orientation, size) and (annotated is not None or orientation == 1)
        assert any("EXIF" in note for note in data.notes) == (not decided)
        is_upright = orientation == 1 or (decided and annotated == size)
        expected = upright if is_upright else turned_back(upright, orientation)
        pixels = np.asarray(data.images[0].open(), int)
        assert pixels.shape == (*expected.size[::-1], 3)
        difference = abs(pixels - np.asarray(expected, int)).mean()
        assert difference < 12  # of JPEG and WebP; any other frame differs by 40 or more


def test_size_in_voc_files_tells_the_frame_and_is_compared_with_the_image(tmp_path):
    sizes = {"stored": (24, 16), "upright": (16, 24), "zero": (0, 0), "other": (50, 40)}
    scenes = {}
    (tmp_path / "val").mkdir()
    for seed, (name, size) in enumerate(sizes.items()):
        image = random_image(16, 24, seed)
        scenes[name] = Scene(f"{name}.png", image, encoded(image, 6, ".png"), [(0, 1, 2, 6, 8)])
        write_images(tmp_path / "val", [scenes[name]])
        voc_xml(tmp_path / "val" / f"{name}.xml", scenes[name], size)
    data = load_split(data_flags(tmp_path), "val")
    assert data.notes == ("left out 1 images of another size than annotated (other.png)",)
    frames = {file.path.stem: file.open() for file in data.images}
    assert list(frames) == ["stored", "upright", "zero"]
    for name, frame in frames.items():
        image = scenes[name].image
        expected = turned_back(image, 6) if name == "stored" else image
        assert np.array_equal(np.asarray(frame), np.asarray(expected))
