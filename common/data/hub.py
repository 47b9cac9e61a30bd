"""Hub data sets: only the images asked for are streamed, into a COCO-format folder in the cache that grows.

A data set needs the columns `image` and `objects`, the latter with `bbox` and a category for each box. What hub data
sets differ in is understood: boxes xyxy or xywh, in pixels or in shares of the image; categories as class labels,
numbers or names; objects as a list or as a dictionary of lists; with `image_id`, `width`, `height`, `area`, `iscrowd`
or without. `detection-datasets/coco` has xyxy boxes, categories 0..79, no crowd flags and no images without objects,
so official AP can't be computed from it.

The folder holds the images, and `index.jsonl` with a line for each row of the stream, written after its image: what
a killed run leaves behind is whole and in the index, or is written anew. The COCO file is made from the index.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import numpy as np
from PIL import Image

from common.console import InputError, Interrupted, progress_bar
from common.data.annotations import Problems
from common.data.images import read_size
from common.files import atomic_write, cache_folder

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
HAND = 4  # row groups, usually of 100 rows, that are held in memory to be put in random order
READ_AHEAD = 1 << 16  # bytes beyond each row group; the hub library's 5 MB would double what is read of small ones
PATIENCE = 5  # seconds for the hub's first answer


@dataclass
class _Index:
    """What `index.jsonl` tells: of the data set, of each row, and whether there are more."""

    header: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    ended: bool = False

    def reaches(self, limit: int) -> bool:
        return bool(self.header) and (self.ended or 0 < limit <= len(self.rows))


def hub_split(
    name: str, split: str, split_names: Iterable[str], limit: int = 0, sample_seed: int = -1, box_format: str = "auto"
) -> tuple[Path, Path, tuple[str, ...]]:
    """Annotation file and image folder of a hub data set's split, and notes on rows that were left out.

    Rows in the cache are not asked for again: a run that was interrupted, or wants more, goes on behind them, and one
    that wants no more needs no network.

    A seed draws the rows at random, but not one by one, which would have most of the data set read for a thousand of
    them: row groups (usually 100 neighbouring rows) come in random order, and are shuffled HAND at a time. So each row
    is as likely as any other, but brings neighbours along. A larger limit draws what a smaller one does, and more.

    Args:
        name: hub id, or a local folder with the data set's parquet files.
        split: "train" or "val".
        split_names: what the data set may call that split.
        limit: so many rows; 0 for all.
        sample_seed: of the random order; -1 for the order of the files.
        box_format: "xyxy", "xywh", or "auto": the one that keeps more boxes inside their images, which is said.

    Raises:
        InputError: the hub can't be reached, no such data set or split, columns that are not a detection set's, or a
            stream that breaks off.
    """
    sample_seed = sample_seed if limit else -1  # all are all
    folder = cache_folder("hub", _folder_name(name, split, sample_seed))
    index = _read_index(folder, limit)
    if not index.reaches(limit):
        try:
            with _alone(folder):
                index = _fetch(folder, name, split, split_names, limit, sample_seed)
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
        except Interrupted as interrupted:
            interrupted.advice = f"the images so far are kept in {folder}; the same command goes on from there"
            raise
    rows, problems = index.rows[: limit or None], Problems()
    for number, row in enumerate(rows, 1):
        if "fault" in row:
            problems.add(row["fault"], f"row {number}")
    good = [row for row in rows if "fault" not in row]
    text = json.dumps(coco_of_rows(good, index.header["names"], box_format, f"{name}, {split}"))
    told = "" if box_format == "auto" else f"-{box_format}"
    path = folder / "annotations" / f"instances_{split}2017-{limit or 'all'}{told}.json"
    if not path.is_file() or path.read_text() != text:
        with atomic_write(path, "w") as file:
            file.write(text)
    return path, folder / f"{split}2017", problems.notes()


def _folder_name(name: str, split: str, sample_seed: int) -> str:
    """One for each data set, split and order, and for each state of a local data set's files."""
    order = f"{split}-sample{sample_seed}" if sample_seed >= 0 else split
    if not Path(name).is_dir():
        return f"{name.replace('/', '--')}-{order}"
    files = sorted(Path(name).resolve().rglob("*.parquet"))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(name).resolve().name).strip("-.")
    return f"{slug}-{sha256(repr(states).encode()).hexdigest()[:16]}-{order}"


def _read_index(folder: Path, limit: int = 0) -> _Index:
    """The index, or its first `limit` rows, without the half lines that killed runs leave."""
    index, path = _Index(), folder / "index.jsonl"
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            continue
        index.header = entry if "revision" in entry else index.header
        index.ended = entry.get("end") == len(index.rows)
        # Of processes that could not lock the folder, each may have written a row: its place tells.
        if entry.get("place", []) > (index.rows[-1]["place"] if index.rows else []):
            index.rows.append(entry)
        if 0 < limit == len(index.rows):
            break
    return index


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several processes one fetches while the others wait; where files can't be locked, each fetches for itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process, which fetches into {folder}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # some network file systems know no locks
                pass
        yield


def _fetch(folder: Path, name: str, split: str, split_names: Iterable[str], limit: int, sample_seed: int) -> _Index:
    """Go on behind the last row of the index: first each row's image, then its line."""
    index = _read_index(folder)
    if index.reaches(limit):  # another process did it
        return index
    stream, header = _open(name, split_names, index)
    index.header = index.header or header
    wanted, taken = max(limit - len(index.rows), 0), {row.get("id") for row in index.rows}
    rows = _rows(stream, sample_seed, index.rows[-1]["place"] if index.rows else [])
    print(f"fetching {wanted or 'all'} images of {name} into {folder} ({len(index.rows)} are there)", flush=True)
    with (folder / "index.jsonl").open("ab") as file, progress_bar(wanted or None, "fetching images") as bar:
        file.write(b"\n" + json.dumps(index.header).encode() + b"\n")  # the first \n ends a killed run's half line
        while not index.reaches(limit):
            try:
                place, row = next(rows, ([], {}))
                content = _content(row.get("image"), name)
            except Exception as error:  # of a network, of a damaged file: they share no base class
                reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
                raise InputError(
                    f"data {name}: the stream broke off after {len(index.rows)} rows; they are kept, and running this "
                    f"again goes on behind them ({reason})"
                ) from error
            if row:
                entry = _keep(row, content, folder / f"{split}2017", len(index.rows) + 1, index.header, taken)
                index.rows.append(entry | {"place": place})
                taken.add(entry.get("id"))
                bar.update()
            index.ended = not row
            file.write(json.dumps(index.rows[-1] if row else {"end": len(index.rows)}).encode() + b"\n")
            file.flush()
    return index


def _open(name: str, split_names: Iterable[str], index: _Index) -> tuple[datasets.IterableDataset, dict]:
    """The split's rows, and what the header of their index is to tell; of a hub, the version that the index began with.

    Raises InputError as `hub_split` does.
    """
    revision = index.header.get("revision")
    try:
        if not Path(name).is_dir():  # one quick question first: the data library would retry for half a minute
            revision = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=PATIENCE).sha
        options = {"hf": {"block_size": READ_AHEAD}}
        splits = datasets.load_dataset(name, streaming=True, revision=revision, storage_options=options)
    except Exception as error:  # the hub library's network errors share no base class
        refused = isinstance(error, huggingface_hub.errors.HfHubHTTPError | datasets.exceptions.DatasetNotFoundError)
        reason = "the hub has no such data set, or wants a token for it" if refused else "the hub can't be reached"
        there = f"{len(index.rows)} of its images are in the cache: ask for no more" if index.rows else ""
        raise InputError(
            f"data {name}: no such folder here, and {reason} ({there or 'give a COCO-format folder, or demo'})"
        ) from error
    split = next((s for s in split_names if s in splits), None)
    if split is None:
        raise InputError(f"data {name} has the splits {', '.join(splits)}, none of {', '.join(split_names)}")
    features = splits[split].features or {}
    objects = getattr(features.get("objects"), "feature", features.get("objects"))  # a list's elements
    objects = objects if isinstance(objects, dict) else {}
    category = next((column for column in CATEGORY_COLUMNS if column in objects), "")
    kind = getattr(objects.get(category), "feature", objects.get(category))
    if "image" not in features or "bbox" not in objects or not isinstance(kind, datasets.ClassLabel | datasets.Value):
        there = ", ".join([*features, *(f"objects.{column}" for column in objects)])
        raise InputError(f"data {name} is no detection set: image, objects.bbox and objects.category, but {there}")
    header = {
        "revision": revision,
        "category": category,
        "names": getattr(kind, "names", None),
        "numbered": "int" not in getattr(features.get("image_id"), "dtype", ""),
    }
    return splits[split].cast_column("image", datasets.Image(decode=False)), header  # the files as they are


def _rows(stream: datasets.IterableDataset, sample_seed: int, after: list[int]) -> Iterator[tuple[list[int], dict]]:
    """(place, row) of the rows behind the place `after`, in the order that `hub_split` tells of.

    A place is the part of the stream, the hand of row groups in it, and the count within the hand. No hand before it is
    read again; in file order a part is a file, and none is opened before its turn.
    """
    after = after or [0, 0, -1]
    parts, size = (1, HAND) if sample_seed >= 0 else (stream.num_shards, 1)
    for part in range(after[0], parts):
        groups = stream.shard(parts, part).reshard()
        order = np.arange(groups.num_shards)
        order = np.random.default_rng(sample_seed).permutation(order) if sample_seed >= 0 else order
        hands = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        for number in range(after[1] if part == after[0] else 0, len(hands)):
            rows = (row for group in hands[number] for row in groups.shard(len(order), group))
            if sample_seed >= 0:
                held = list(rows)
                rows = (held[i] for i in np.random.default_rng([sample_seed, number]).permutation(len(held)))
            for count, row in enumerate(rows):
                if [part, number, count] > after:
                    yield [part, number, count], row


def _content(image: dict | None, name: str) -> bytes:
    """An image's file, from the row itself or from the path that it names; empty where there is neither.

    The path must lie in the data set (or in an archive there): a row may come from anybody, and name any file or page.
    """
    image = image or {}
    if image.get("bytes") or not image.get("path"):
        return image.get("bytes") or b""
    *archives, file = image["path"].split("::")
    inside = file.startswith(f"hf://datasets/{name}@")
    if Path(name).is_dir():
        inside = Path(os.path.normpath(file)).is_relative_to(Path(name).resolve())
    if not inside or not all(archive.startswith(("zip://", "tar://")) for archive in archives):
        return b""
    with fsspec.open(image["path"], "rb") as opened:
        return opened.read()


def _keep(row: dict, content: bytes, folder: Path, number: int, header: dict, taken: set[int]) -> dict:
    """Write a row's image; returns what the index is to tell of the row, or as `fault` why it can't be used."""
    image_id = number if header["numbered"] else row["image_id"]
    columns = {"boxes": "bbox", "categories": header["category"], "areas": "area", "crowds": "iscrowd"}
    objects = {key: _column(row["objects"], name) for key, name in columns.items()}
    if not content or image_id is None:
        return {"fault": "left out {} rows without an image in the data set or without their image_id"}
    if image_id in taken:
        return {"fault": "left out {} rows with the image_id of an earlier one"}
    if len(objects["boxes"]) != len(objects["categories"]):
        return {"fault": "left out {} rows that have not as many boxes as categories"}
    path = folder / f"{image_id:012d}.{_suffix(content)}"
    with atomic_write(path) as file:
        file.write(content)
    size = row.get("width"), row.get("height")
    if not all(isinstance(side, int) and side > 0 for side in size):
        size = read_size(path) or (0, 0)
    return {"id": image_id, "file_name": path.name, "width": size[0], "height": size[1]} | objects


def _column(objects: list | dict | None, name: str) -> list:
    """One property of all objects of a row, which are a list of dictionaries or a dictionary of lists."""
    if isinstance(objects, list):
        return [(thing or {}).get(name) for thing in objects]
    return (objects or {}).get(name) or []


def _suffix(content: bytes) -> str:
    """What a file of this content is called; what is no image will be found out, and told of, where it is read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format.lower().replace("jpeg", "jpg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "jpg"


COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COCO_IDS = {name: number for number, name in enumerate(COCO_NAMES, 1) if name}  # official ids, 80 of 1..90


def coco_of_rows(rows: list[dict], names: list[str] | None, box_format: str, source: str) -> dict:
    """The COCO instances dictionary of rows of the index. What is guessed is printed, as of `source`."""
    boxes, in_shares = _boxes(rows, box_format, source)
    categories, id_of = _categories(rows, names, source)
    annotations = []
    for row in rows:
        count = len(row["boxes"])
        areas, crowds = (row[key] if len(row[key]) == count else [None] * count for key in ("areas", "crowds"))
        for category, area, crowd in zip(row["categories"], areas, crowds, strict=True):
            box = boxes[len(annotations)]
            if box and (area is None or in_shares):
                area = box[2] * box[3]
            entry = {"id": len(annotations) + 1, "image_id": row["id"], "category_id": id_of.get(category)}
            annotations.append(entry | {"bbox": box, "area": area, "iscrowd": int(bool(crowd))})
    images = [{key: row[key] for key in ("id", "file_name", "width", "height")} for row in rows]
    return {"images": images, "annotations": annotations, "categories": categories}


def _categories(rows: list[dict], names: list[str] | None, source: str) -> tuple[list[dict], dict]:
    """COCO's `categories`, and the id of each value in the rows. The ids are COCO's own where the names are COCO's."""
    values = range(len(names)) if names else sorted({v for row in rows for v in row["categories"]} - {None})
    if not names and values and isinstance(values[0], int):
        names = [f"class {value}" for value in values]
        print(f"{source}: its categories have numbers and no names: {', '.join(names[:3])}, …", flush=True)
    names = names or [str(value) for value in values]
    ids = [COCO_IDS[name] for name in names] if set(names) == set(COCO_IDS) else range(1, len(names) + 1)
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    return categories, dict(zip(values, ids, strict=True))


def _boxes(rows: list[dict], box_format: str, source: str) -> tuple[list[list[float] | None], bool]:
    """All boxes as COCO's xywh in pixels, None for what is no box; and whether they came in shares of images."""
    listed = [box if _is_box(box) else [np.nan] * 4 for row in rows for box in row["boxes"]]
    boxes = np.array(listed, np.float64).reshape(-1, 4)
    sizes = np.array([(row["width"], row["height"]) for row in rows for _ in row["boxes"]]).reshape(-1, 2)
    real = np.isfinite(boxes).all(1)
    in_shares = bool(real.any()) and boxes[real].max() <= 1 and sizes[real].max() > 2
    if in_shares:
        boxes *= np.tile(sizes, 2)
        print(f"{source}: no box reaches beyond 1; read as shares of their images", flush=True)
    fits = {
        "xyxy": ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1)).all(1).sum(),
        "xywh": (boxes[:, :2] + boxes[:, 2:] <= sizes + 1).all(1).sum(),
    }
    if box_format == "auto" and len(boxes):
        box_format, other = sorted(fits, key=fits.get, reverse=True)
        counts = f"{fits[box_format]} of {len(boxes)} fit so, {fits[other]} as {other}"
        print(f"{source}: boxes read as {box_format}: {counts} (--box-format decides)", flush=True)
    if box_format == "xyxy":
        boxes[:, 2:] -= boxes[:, :2]
    return [box if whole else None for box, whole in zip(boxes.tolist(), real, strict=True)], bool(in_shares)


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
