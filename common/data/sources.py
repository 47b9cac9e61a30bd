"""What `--data` names -> `DetectionData`.

`--data` takes a folder in COCO's or Roboflow's layout, a YOLO or Pascal VOC data set, a hub data set (by id, or a local
copy of one as parquet files), `coco-official`, or `demo`. Images from a hub are written once to the cache as an
ordinary COCO-format folder, so that the next run starts at once.

The images are the first of each split, those of a list of ids, or a random sample.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.cli import flag
from common.console import InputError
from common.data.box_format import LAYOUTS
from common.data.demo import make_demo
from common.data.hub import hub_split
from common.data.memory import DetectionData
from common.data.official import official_ids, official_split
from common.data.readers import Layout, choose_split, find_yaml, is_voc, read_voc, read_yolo
from common.data.table import coco_data, load_coco, without_unreadable
from common.files import cache_folder
from common.hub import HUB_ID

BOX_FORMATS = ("auto", *LAYOUTS)
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # the first that a data set has
DEMO_SEED = 0


@dataclass(frozen=True)
class DataFlags:
    """Images and annotations.

    The data of a resumed run are compared by their fingerprint, so that the flags themselves may change.
    """

    data: str = flag(
        "detection-datasets/coco",
        "folder of labelled images, hub data set id, coco-official, or demo",
    )
    val_json: str = flag("", "validation annotations, where the folder has no known layout")
    val_images_dir: str = flag("", "the folder of their images")
    val_images: int = flag(500, "validation images, the first of the file; 0 = all", at_least=0)
    image_ids: str = flag("", "file of the images to take, a line each: train or val, and the id")
    sample_seed: int = flag(-1, "draw the images at random with this seed; -1 = take the first", at_least=-1)
    box_format: str = flag(
        "auto",
        "boxes of COCO files (auto = xywh unless certainly another) and hub data (auto = what fits best)",
        choices=BOX_FORMATS,
    )
    strict: bool = flag(False, "stop where data would have to be repaired or left out")

    def explicit_files(self, split: str) -> tuple[str, str]:
        """Annotation file and image folder that the flags name for a split; empty where they name none."""
        return getattr(self, f"{split}_json", ""), getattr(self, f"{split}_images_dir", "")


@dataclass(frozen=True)
class TrainDataFlags(DataFlags):
    """Training images and annotations."""

    train_json: str = flag("", "training annotations, where the folder has no known layout")
    train_images_dir: str = flag("", "the folder of their images")
    train_images: int = flag(1000, "training images, the first of the file; 0 = all", at_least=0)


def load_train_and_val(flags: TrainDataFlags) -> tuple[DetectionData, DetectionData]:
    """The training and the validation images; prints which classes one of the two lacks.

    Raises:
        InputError: what `load_split` and `check_objects` raise.
    """
    train, val = load_split(flags, "train"), load_split(flags, "val")
    check_objects(train, val, strict=flags.strict)
    return train, val


def load_split(flags: DataFlags, split: str) -> DetectionData:
    """The usable images of a `split`, "train" or "val": the first `--train-images` or `--val-images` of it (0 = all).

    With `--sample-seed`, a random sample of as many images in the order of the data set, the same in every run and
    drawn separately for each split; `hub.hub_split` says how a hub data set is sampled. What was repaired or left out
    is printed.

    Raises:
        InputError: no such data, or not readable (see `table.load_coco`); with `--strict`, anything that would
            have to be repaired or left out.
    """
    data = without_unreadable(_read(flags, split, getattr(flags, f"{split}_images")))
    if flags.strict and data.notes:
        raise InputError(f"{data.source}: {'; '.join(data.notes)} (refused by --strict)")
    for note in data.notes:
        print(f"{data.source}: {note}", flush=True)
    return data


def _read(flags: DataFlags, split: str, limit: int) -> DetectionData:
    """The requested images of the split, from any source."""
    seed = flags.sample_seed if limit else -1
    ids = read_image_ids(Path(flags.image_ids), split) if flags.image_ids else []
    explicit = any(flags.explicit_files(split))
    if flags.data == "coco-official" and not explicit:
        ids = ids or (official_ids(split) if seed >= 0 else [])
        return load_coco(*official_split(split, limit, _drawn(ids, split, limit, seed)))
    if _is_hub(flags.data) and not explicit and not ids:
        return _read_hub(flags, split, limit, seed)
    if ids or seed >= 0:
        data = _read_in_order(flags, split, 0)
        return _select(data, _drawn(ids or [image.id for image in data.images], split, limit, seed))
    return _read_in_order(flags, split, limit)


def _read_in_order(flags: DataFlags, split: str, limit: int) -> DetectionData:
    """The first `limit` images of the split (0 = all)."""
    folder = Path(flags.data)
    if any(flags.explicit_files(split)):
        return _load_located(flags, split, limit)
    if _is_hub(flags.data):
        return _read_hub(flags, split, limit, -1)
    if described := find_yaml(folder):
        return _upright_data(read_yolo(described, SPLITS[split], limit), str(described))
    if folder.is_dir() and is_voc(folder):
        return _upright_data(read_voc(folder, SPLITS[split], limit), str(folder))
    return _load_located(flags, split, limit)


def _upright_data(layout: Layout, source: str) -> DetectionData:
    content, folder, notes = layout
    data = coco_data(content, folder, source, upright=True)
    return replace(data, notes=(*notes, *data.notes))


def _load_located(flags: DataFlags, split: str, limit: int) -> DetectionData:
    """The first `limit` images of a COCO file, whose boxes have one format in both splits."""
    json_path, folder, notes = _locate(flags, split)
    other = "val" if split == "train" else "train"
    other_file = None
    if any(flags.explicit_files(split)) == any(flags.explicit_files(other)):
        with suppress(InputError):  # no such split
            other_file, *_ = _locate(flags, other)
    data = load_coco(json_path, folder, limit, flags.box_format, other_file)
    return replace(data, notes=(*notes, *data.notes))


def _read_hub(flags: DataFlags, split: str, limit: int, seed: int) -> DetectionData:
    json_path, folder, notes = hub_split(flags.data, split, SPLITS[split], limit, seed, flags.box_format)
    data = load_coco(json_path, folder, box_format="xywh")
    return replace(data, notes=(*notes, *data.notes))


def _drawn(items: Sequence[int], split: str, limit: int, seed: int) -> list[int]:
    """`limit` of the items (0 = all): the first ones, or with a seed >= 0 random ones in their order."""
    if seed < 0 or not limit:
        return list(items)[: limit or None]
    places = np.random.default_rng([seed, list(SPLITS).index(split)]).permutation(len(items))[:limit]
    return [items[place] for place in sorted(places)]


def read_image_ids(path: Path, split: str) -> list[int]:
    """The ids of a split's images in a file with lines such as "train 9" and "val 285"; # begins a comment.

    Raises:
        InputError: no such file, a line of another form, or no image of that split.
    """
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the image ids in {path}: {error}") from error
    for number, words in enumerate(lines, 1):
        if words and (len(words) != 2 or words[0] not in SPLITS or not words[1].isdecimal()):
            raise InputError(f"{path}, line {number}: expected train or val and an image id, such as: train 9")
    ids = [int(words[1]) for words in lines if words and words[0] == split]
    if not ids:
        raise InputError(f"{path} names no {split} images")
    return ids


def _select(data: DetectionData, ids: list[int]) -> DetectionData:
    index_of = {image.id: index for index, image in enumerate(data.images)}
    missing = [number for number in ids if number not in index_of]
    if missing:
        raise InputError(f"{data.source} lacks {len(missing)} of the {len(ids)} requested images, such as {missing[0]}")
    return data.select(np.array([index_of[number] for number in ids]))


def _is_hub(data: str) -> bool:
    """Whether this is a local copy of a hub data set, or has the form of a hub id and is not a folder."""
    folder = Path(data)
    return any(folder.glob("data/*.parquet")) or (not folder.exists() and re.fullmatch(HUB_ID, data) is not None)


def _locate(flags: DataFlags, split: str) -> tuple[Path, Path, tuple[str, ...]]:
    """Annotation file and image folder of a split, and notes; the demo is generated if it is not in the cache."""
    json_path, images = flags.explicit_files(split)
    if bool(json_path) != bool(images):
        raise InputError(f"--{split}-json and --{split}-images-dir go together; give both or neither")
    if json_path:
        return Path(json_path), Path(images), ()
    if flags.data == "demo":
        return _find_split(_demo_folder(), split)
    folder = Path(flags.data)
    if folder.is_dir():
        return _find_split(folder, split)
    raise InputError(
        f"no data {flags.data!r}: not a folder here, not a hub id such as detection-datasets/coco, "
        "and neither coco-official nor demo"
    )


def _find_split(folder: Path, split: str) -> tuple[Path, Path, tuple[str, ...]]:
    """Annotation file and image folder of a split, and notes: COCO's layout, else Roboflow's."""
    existing: dict[str, tuple[Path, Path]] = {}
    for name in SPLITS[split]:
        roboflow = folder / name / "_annotations.coco.json"
        if roboflow.is_file():
            existing[name] = roboflow, roboflow.parent
        for year in ("", "2014", "2017"):
            annotations, images = folder / "annotations" / f"instances_{name}{year}.json", f"{name}{year}"
            if annotations.is_file():
                inside = folder / "images" / images
                existing[name] = annotations, inside if inside.is_dir() else folder / images
    chosen, notes = choose_split(SPLITS[split], existing)
    if chosen is None:
        expected = f"annotations/instances_{split}2017.json with the images in {split}2017/, or Roboflow's {split}/"
        raise InputError(f"no {split} split in {folder}: expected {expected}")
    return *existing[chosen], notes


def _demo_folder() -> Path:
    folder = cache_folder(f"demo-seed{DEMO_SEED}")
    if not folder.is_dir():
        print(f"generating the demo's scenes in {folder}", flush=True)
        make_demo(folder, seed=DEMO_SEED)
    return folder


def check_objects(train: DetectionData, val: DetectionData, *, strict: bool = False) -> None:
    """Print which classes one of the two splits lacks, and a warning where there is no object to validate on.

    Raises:
        InputError: no object to train on, or no class in common; with `strict`, no object to validate on.
    """
    if train.crowd.all():
        raise InputError(f"{train.source}: {_without_objects(train)} training images; there is nothing to learn")
    if val.crowd.all():
        advice = "check where their labels are, or take more with --val-images"
        problem = f"{val.source}: {_without_objects(val)} validation images, so that mAP cannot be computed; {advice}"
        if strict:
            raise InputError(f"{problem} (refused by --strict)")
        print(f"warning: {problem}. The last epoch will be kept, not the best", flush=True)
    for one, other in ((train, val), (val, train)):
        missing = [name for name in one.class_names if name not in other.class_names]
        if len(missing) == len(one.class_names):
            names = f"{train.class_names[0]}, … and {val.class_names[0]}, …"
            raise InputError(f"{train.source} and {val.source} have no class in common: {names}")
        if missing:
            print(f"{other.source} lacks {len(missing)} classes of {one.source}: {', '.join(missing[:3])}", flush=True)


def _without_objects(data: DetectionData) -> str:
    boxes = f"all {len(data.crowd)} boxes are crowds (iscrowd=1, in VOC difficult)" if len(data.crowd) else "no box"
    return f"{boxes} on the {len(data)}"
