"""Where the images come from: whatever `--data` names becomes a COCO-format folder on disk.

`--data` takes a folder in COCO's or Roboflow's layout, a YOLO or Pascal VOC data set, a hub data set (by id, or a local
copy of one as parquet files), `coco-official`, or `demo`. Images from a hub are written once to the cache as an
ordinary COCO-format folder, so every script sees one format and the next run starts at once.

Which of the images are taken is decided here too: the first, those of a list of ids, or a random sample.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.console import InputError
from common.data.annotations import coco_data, load_coco, without_unreadable
from common.data.coco import CocoData
from common.data.demo import make_demo
from common.data.formats import find_yaml, is_voc, read_voc, read_yolo
from common.data.hub import hub_split
from common.data.official import official_ids, official_split
from common.files import cache_folder

SPLITS = {"train": ("train",), "val": ("val", "validation", "test", "valid")}  # what layouts call the two parts
DEMO_SEED = 0


@dataclass(frozen=True)
class DataSource:
    """Which data: `data` as `--data` takes it, or explicit annotation files and image folders."""

    data: str
    train_json: str = ""
    train_images_dir: str = ""
    val_json: str = ""
    val_images_dir: str = ""
    image_ids: str = ""  # file of the images to take instead of the first
    sample_seed: int = -1  # of a random sample of the images, likewise; -1 for none
    box_format: str = "auto"  # of a hub data set: xyxy, xywh, or auto for the one that fits


def load_split(source: DataSource, split: str, limit: int = 0, strict: bool = False) -> CocoData:
    """The `split` ("train" or "val") of the data set, its first `limit` images (0 = all), those that can be used.

    With `source.sample_seed`, a random sample of `limit` images, in the order of the data set, and of a hub data set
    those that `hub.hub_split` tells of; the same in every run. The parts of a data set are drawn apart.
    What was repaired or left out is printed.

    Raises:
        InputError: nothing of the kind there, or not readable (see `annotations.load_coco`); with `strict`, anything
            that would have to be repaired or left out.
    """
    data = without_unreadable(_read(source, split, limit))
    if strict and data.notes:
        raise InputError(f"{data.source}: {'; '.join(data.notes)} (refused by --strict)")
    for note in data.notes:
        print(f"{data.source}: {note}", flush=True)
    return data


def _read(source: DataSource, split: str, limit: int) -> CocoData:
    """The split as it stands in its files, whatever their format."""
    folder = Path(source.data)
    explicit = getattr(source, f"{split}_json") or getattr(source, f"{split}_images_dir")
    seed, first = source.sample_seed, replace(source, image_ids="", sample_seed=-1)
    ids = read_image_ids(Path(source.image_ids), split) if source.image_ids else []
    if source.data == "coco-official" and not explicit:
        ids = ids or (official_ids(split) if seed >= 0 and limit else [])
        return load_coco(*official_split(split, limit, _drawn(ids, split, limit, seed)))
    if ids:
        return _select(_read(first, split, 0), _drawn(ids, split, limit, seed))
    if not explicit and _is_hub(source.data):
        *files, notes = hub_split(source.data, split, SPLITS[split], limit, seed, source.box_format)
        data = load_coco(*files)
        return replace(data, notes=(*notes, *data.notes))
    if seed >= 0:
        data = _read(first, split, 0)
        return data.select(np.array(_drawn(range(len(data)), split, limit, seed)))
    described = None if explicit else find_yaml(folder)
    if described:
        return coco_data(*read_yolo(described, SPLITS[split], limit), str(described))
    if not explicit and folder.is_dir() and is_voc(folder):
        return coco_data(*read_voc(folder, SPLITS[split], limit), str(folder))
    return load_coco(*_locate(source, split), limit)


def _drawn(items: Sequence[int], split: str, limit: int, seed: int) -> list[int]:
    """`limit` of the items (0 = all): the first, or those that a seed from 0 on draws, in the order of the items."""
    if seed < 0 or not limit:
        return list(items)[: limit or None]
    places = np.random.default_rng([seed, list(SPLITS).index(split)]).permutation(len(items))[:limit]
    return [items[place] for place in sorted(places)]


def read_image_ids(path: Path, split: str) -> list[int]:
    """The ids of a split's images in a file with lines such as "train 9" and "val 285"; # begins a remark.

    Raises:
        InputError: no such file, a line of another kind, or no image of that split.
    """
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the image ids in {path}: {error}") from error
    for number, words in enumerate(lines, 1):
        if words and (len(words) != 2 or words[0] not in SPLITS or not words[1].isdecimal()):
            raise InputError(f"{path}, line {number}: wanted are train or val and an image's id, such as: train 9")
    ids = [int(words[1]) for words in lines if words and words[0] == split]
    if not ids:
        raise InputError(f"{path} names no {split} images")
    return ids


def _select(data: CocoData, ids: list[int]) -> CocoData:
    place = {image.id: index for index, image in enumerate(data.images)}
    missing = [key for key in ids if key not in place]
    if missing:
        raise InputError(f"{data.source} lacks {len(missing)} of the {len(ids)} images asked for, {missing[0]} first")
    return data.select(np.array([place[key] for key in ids]))


def _is_hub(data: str) -> bool:
    """Is this a local copy of a hub data set, or else, no folder being there, the form of a hub id?"""
    folder = Path(data)
    return any(folder.glob("data/*.parquet")) or (
        not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", data) is not None
    )


def _locate(source: DataSource, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split; the demo's are drawn first where they are not on disk yet."""
    json_path, images = getattr(source, f"{split}_json"), getattr(source, f"{split}_images_dir")
    if bool(json_path) != bool(images):
        raise InputError(f"--{split}-json and --{split}-images-dir go together; give both or neither")
    if json_path:
        return Path(json_path), Path(images)
    if source.data == "demo":
        return _find_split(_demo_folder(), split)
    folder = Path(source.data)
    if folder.is_dir():
        return _find_split(folder, split)
    raise InputError(
        f"no data {source.data!r}: not a folder here, not a hub id such as detection-datasets/coco, "
        "and neither coco-official nor demo"
    )


def _find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split: COCO's layout, else Roboflow's."""
    for name in SPLITS[split]:
        for year in ("2017", "2014", ""):
            annotations = folder / "annotations" / f"instances_{name}{year}.json"
            if annotations.is_file():
                inside = folder / "images" / f"{name}{year}"
                return annotations, inside if inside.is_dir() else folder / f"{name}{year}"
        annotations = folder / name / "_annotations.coco.json"
        if annotations.is_file():
            return annotations, annotations.parent
    expected = f"annotations/instances_{split}2017.json with the images in {split}2017/, or Roboflow's {name}/"
    raise InputError(f"no {split} part in {folder}: expected {expected}")


def _demo_folder() -> Path:
    folder = cache_folder(f"demo-seed{DEMO_SEED}")
    if not folder.is_dir():
        print(f"drawing the demo's scenes into {folder}", flush=True)
        make_demo(folder, seed=DEMO_SEED)
    return folder


def check_objects(train: CocoData, val: CocoData) -> None:
    """Say which classes one of the two parts lacks.

    Raises:
        InputError: no object to learn from, or no class in common: nothing learned could be right.
    """
    if not (~train.crowd).any():
        raise InputError(f"{train.source}: no box on the {len(train)} training images; there is nothing to learn")
    for one, other in ((train, val), (val, train)):
        missing = [name for name in one.class_names if name not in other.class_names]
        if len(missing) == len(one.class_names):
            raise InputError(
                f"{train.source} and {val.source} have no class in common: {train.class_names[0]}, … and "
                f"{val.class_names[0]}, …"
            )
        if missing:
            print(f"{other.source} lacks {len(missing)} classes of {one.source}: {', '.join(missing[:3])}", flush=True)
