"""Hub data sets: only the requested images are streamed, into a COCO-format folder in the cache that grows.

A data set needs the columns `image` and `objects`, the latter with `bbox` and a category for each box. What hub data
sets differ in is understood: boxes xyxy, xywh or cxcywh, in pixels or normalised; categories as class labels, numbers
or names; objects as a list or as a dictionary of lists; with `image_id`, `width`, `height`, `area`, `iscrowd` or
without. `detection-datasets/coco` has xyxy boxes, categories 0..79, no crowd flags and no images without objects, so
official AP can't be computed from it.

A split's folder in the cache holds the images; `rows.jsonl`, with a line for each row of the stream, written after the
row's image; and `stream.json`, their header: what the rows have in common. The COCO file is made from these two.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import filelock
import fsspec
import huggingface_hub
import numpy as np
from PIL import Image

from common.console import InputError, Interrupted, progress_bar
from common.data.box_format import are_normalised, fits, to_xywh
from common.data.readers import choose_split
from common.data.table import Problems
from common.files import atomic_write, cache_folder
from common.images import read_size

CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
SHUFFLE_BUFFER = 1000  # rows in memory that a sample is drawn from; with images of COCO, half a GB
HUB_TIMEOUT = 5  # seconds for the hub's first answer


def hub_split(
    name: str, split: str, split_names: Sequence[str], limit: int = 0, sample_seed: int = -1, box_format: str = "auto"
) -> tuple[Path, Path, tuple[str, ...]]:
    """Annotation file and image folder of a hub data set's split, and notes on rows that were left out.

    What the cache has needs no network. A run that was interrupted, or wants more images, goes on behind the last row;
    of the parquet file that it stopped in or had just finished, the earlier rows are read again, but not written.

    A random sample draws row groups (usually 100 neighbouring rows), whose rows are shuffled in a buffer: drawing each
    row from anywhere would read most of the data set for a thousand of them. Each row is as likely as any other, but
    brings neighbours along, and up to SHUFFLE_BUFFER rows are read beyond those requested. A larger sample contains the
    smaller one of the same seed; going on with it reads all of it again, but writes only the new images.

    Args:
        name: hub id, or a local folder with the data set's parquet files, which is read anew when they change.
        split: "train" or "val".
        split_names: what the data set may call that split.
        limit: number of rows; 0 for all.
        sample_seed: of the random sample, the same in every run; -1 for the first rows.
        box_format: "xyxy", "xywh", "cxcywh", or "auto": the one that keeps most boxes inside their images, for all
            splits alike.

    Raises:
        InputError: the hub can't be reached, no such data set or split, columns that are not a detection set's, or a
            stream that breaks off.
    """
    sample_seed = sample_seed if limit else -1  # all rows are no sample
    folder = _data_set_folder(name) / (f"{split}-sample{sample_seed}" if sample_seed >= 0 else split)
    if not _is_satisfied(*_read_cache(folder, limit), limit):
        try:
            with _locked(folder):
                _fetch(folder, name, split_names, limit, sample_seed)
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
        except Interrupted as interrupted:
            interrupted.add_note(f"the images so far are kept in {folder}; the same command goes on from there")
            raise
    header, rows = _read_cache(folder, limit)
    problems = Problems()
    for number, row in enumerate(rows, 1):
        if "fault" in row:
            problems.add(row["fault"], f"row {number}")
    good = [row for row in rows if "fault" not in row]
    content = _coco_content(good, header["names"], box_format, folder.parent / "boxes.json", f"{name}, {split}")
    path, text = folder / f"instances-{limit or 'all'}-{box_format}.json", json.dumps(content)
    if not path.is_file() or path.read_text() != text:
        with atomic_write(path, "w") as file:
            file.write(text)
    return path, folder / "images", (*header.get("notes", ()), *problems.notes())


def _data_set_folder(name: str) -> Path:
    """One for each hub data set, and for each state of a local data set's files."""
    if not Path(name).is_dir():
        return cache_folder("hub", name.replace("/", "--"))
    files = sorted(Path(name).resolve().rglob("*.parquet"))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return cache_folder("hub", f"{Path(name).resolve().name}-{sha256(repr(states).encode()).hexdigest()[:16]}")


def _read_cache(folder: Path, limit: int = 0) -> tuple[dict, list[dict]]:
    """The header, with the `state` of the stream behind the last row, and all rows or the first `limit`."""
    if not (folder / "stream.json").is_file():
        return {}, []
    header, rows = json.loads((folder / "stream.json").read_text()), []
    with (folder / "rows.jsonl").open("rb") as file:
        for line in file:
            with suppress(ValueError):  # a killed run leaves half a line
                rows.append(json.loads(line))
                header["state"] = rows[-1].pop("state", None)
            if 0 < limit == len(rows):
                break
    return header, rows


def _is_satisfied(header: dict, rows: list[dict], limit: int) -> bool:
    return len(rows) >= min(limit or math.inf, header.get("total", math.inf))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of several processes one fetches, while the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        acquired = lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"waiting for another process, which fetches into {folder}", flush=True)
        acquired = lock.acquire()
    with acquired:
        yield


def _fetch(folder: Path, name: str, split_names: Sequence[str], limit: int, sample_seed: int) -> None:
    """Go on behind the last row of the cache: first each row's image is written, then its line."""
    header, rows = _read_cache(folder)
    if _is_satisfied(header, rows, limit):  # another process fetched them in the meantime
        return
    stream, found = _open(name, split_names, header.get("revision"), len(rows))
    state, header = header.pop("state", None), header or found
    missing = limit - len(rows) if limit else None
    print(f"fetching {missing or 'all'} images of {name} into {folder} ({len(rows)} are there)", flush=True)
    with (folder / "rows.jsonl").open("a") as file, progress_bar(missing, "fetching images") as bar:
        file.write("\n")  # ends the half line of a killed run
        _write_json(header, folder / "stream.json")
        used_ids = {row.get("id") for row in rows}
        for row, content in islice(_missing_rows(stream, rows, state, sample_seed, name), missing):
            entry = _store_row(row, content, folder / "images", len(rows) + 1, header, used_ids)
            used_ids.add(entry.get("id"))
            rows.append(entry)
            file.write(json.dumps(entry | {"state": stream.state_dict()}) + "\n")
            file.flush()
            bar.update()
    if not limit or len(rows) < limit:
        _write_json(header | {"total": len(rows)}, folder / "stream.json")


def _write_json(content: dict, path: Path) -> None:
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def _open(
    name: str, split_names: Sequence[str], revision: str | None, existing: int
) -> tuple[datasets.IterableDataset, dict]:
    """The split's rows, of a hub's data set in this revision, and what the rows have in common.

    Raises InputError as `hub_split` does.
    """
    try:
        if not Path(name).is_dir():  # one short request first: the data library would retry for half a minute
            hub = huggingface_hub.HfApi()
            revision = hub.dataset_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
        splits = datasets.load_dataset(name, streaming=True, revision=revision)
    except Exception as error:  # both libraries pass on what their HTTP client, file systems and formats raise
        advice = "give a COCO-format folder, or demo"
        if existing:
            advice = f"{existing} of its images are in the cache: request no more"
        reason = "cannot be read" if Path(name).is_dir() else "is not a folder here and cannot be fetched from the hub"
        raise InputError(f"data {name} {reason}; {advice} ({_in_one_line(error)})") from error
    split, notes = choose_split(split_names, splits)
    if split is None:
        raise InputError(f"data {name} has the splits {', '.join(splits)}, none of {', '.join(split_names)}")
    features = splits[split].features or {}
    objects = getattr(features.get("objects"), "feature", features.get("objects"))  # a list's elements
    objects = objects if isinstance(objects, dict) else {}
    category = next((column for column in CATEGORY_COLUMNS if column in objects), "")
    kind = getattr(objects.get(category), "feature", objects.get(category))
    if "image" not in features or "bbox" not in objects or not isinstance(kind, datasets.ClassLabel | datasets.Value):
        columns = ", ".join([*features, *(f"objects.{column}" for column in objects)])
        raise InputError(f"data {name} is no detection set: image, objects.bbox and objects.category, but {columns}")
    has_ids = "int" in getattr(features.get("image_id"), "dtype", "")
    header = {"revision": revision, "category": category, "names": getattr(kind, "names", None), "has_ids": has_ids}
    header["notes"] = notes
    return splits[split].cast_column("image", datasets.Image(decode=False)), header


def _shuffled(stream: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """The rows in a random order. With more row groups at a time, more would be read before the first row."""
    return stream.reshard().shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)


def _missing_rows(
    stream: datasets.IterableDataset, rows: list[dict], state: dict | None, sample_seed: int, name: str
) -> Iterator[tuple[dict, bytes]]:
    """The rows of the stream behind `rows`, with their image files. Raises InputError where the stream breaks off."""
    try:
        if state and sample_seed < 0:
            stream.load_state_dict(state)
        for row in _shuffled(stream, sample_seed).skip(len(rows)) if sample_seed >= 0 else stream:
            yield row, _image_content(row["image"] or {}, name)
    except Exception as error:  # of a network, an archive, a damaged file: they share no base class
        kept = f"the stream broke off after {len(rows)} rows; they are kept, and running this again goes on behind them"
        raise InputError(f"data {name}: {kept} ({_in_one_line(error)})") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def _image_content(image: dict, name: str) -> bytes:
    """An image's file, from the row itself or from the path that it names; empty where there is neither.

    The path must lie in the data set (or in an archive there): a row may come from anybody, and name any file or page.
    """
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


def _store_row(row: dict, content: bytes, folder: Path, number: int, header: dict, used_ids: set) -> dict:
    """Write a row's image; returns the row's line, with a `fault` where the row can't be used."""
    image_id = row["image_id"] if header["has_ids"] else number
    columns = [_column(row["objects"], name) for name in ("bbox", header["category"], "area", "iscrowd")]
    count = len(columns[0])
    if not content or image_id is None:
        return {"fault": "left out {} rows without an image in the data set or without their image_id"}
    if image_id in used_ids:
        return {"fault": "left out {} rows with the image_id of an earlier one"}
    if len(columns[1]) != count:
        return {"fault": "left out {} rows that have not as many boxes as categories"}
    path = folder / f"{image_id:012d}.{_suffix(content)}"
    with atomic_write(path) as file:
        file.write(content)
    size = row.get("width"), row.get("height")
    if not all(isinstance(side, int) and side > 0 for side in size):
        size = read_size(path) or (0, 0)
    objects = list(zip(*(column if len(column) == count else [None] * count for column in columns), strict=True))
    return {"id": image_id, "file_name": path.name, "width": size[0], "height": size[1], "objects": objects}


def _column(objects: list | dict | None, name: str) -> list:
    """One property of all objects of a row, which are a list of dictionaries or a dictionary of lists."""
    if isinstance(objects, list):
        return [(thing or {}).get(name) for thing in objects]
    return (objects or {}).get(name) or []


def _suffix(content: bytes) -> str:
    """The suffix for a file of this content; what is no image is found out, and counted, where it is read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return (image.format or "jpg").lower().replace("jpeg", "jpg")
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


def _coco_content(rows: list[dict], names: list[str] | None, box_format: str, decision: Path, source: str) -> dict:
    """The COCO instances dictionary of rows of the cache. What is guessed is printed, as of `source`."""
    boxes, normalised = _boxes(rows, box_format, decision, source)
    categories, id_of = _categories(rows, names, source)
    objects = [(row["id"], *values) for row in rows for values in row["objects"]]
    annotations = []
    for number, (image_id, _, category, area, crowd) in enumerate(objects):
        box = boxes[number]
        if box and (area is None or normalised):
            area = box[2] * box[3]
        entry = {"id": number + 1, "image_id": image_id, "category_id": id_of.get(category), "bbox": box}
        annotations.append(entry | {"area": area, "iscrowd": int(bool(crowd))})
    images = [{key: row[key] for key in ("id", "file_name", "width", "height")} for row in rows]
    return {"images": images, "annotations": annotations, "categories": categories}


def _categories(rows: list[dict], names: list[str] | None, source: str) -> tuple[list[dict], dict]:
    """COCO's `categories`, and the id of each value in the rows. The ids are COCO's own where the names are COCO's."""
    values = range(len(names)) if names else sorted({v for row in rows for _, v, *_ in row["objects"]} - {None})
    if not names and values and isinstance(values[0], int):
        names = [f"class {value}" for value in values]
        print(f"{source}: its categories have numbers and no names: {', '.join(names[:3])}, …", flush=True)
    names = names or [str(value) for value in values]
    ids = [COCO_IDS[name] for name in names] if set(names) == set(COCO_IDS) else range(1, len(names) + 1)
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    return categories, dict(zip(values, ids, strict=True))


def _boxes(rows: list[dict], box_format: str, decision: Path, source: str) -> tuple[list[list[float] | None], bool]:
    """All boxes as COCO's xywh in pixels, None for what is no box; and whether they were normalised.

    The file `decision` tells which they are. Where there is none yet, the boxes do, and it is written for the other
    splits of the data set and for later runs, unless xyxy and xywh fit equally well.
    """
    listed = [box if _is_box(box) else [np.nan] * 4 for row in rows for box, *_ in row["objects"]]
    boxes = np.array(listed, np.float64).reshape(-1, 4)
    sizes = np.array([(row["width"], row["height"]) for row in rows for _ in row["objects"]]).reshape(-1, 2)
    finite = np.isfinite(boxes.sum(1))
    decided = json.loads(decision.read_text()) if decision.is_file() else {}
    normalised = decided.get("normalised", are_normalised(boxes, sizes))
    if normalised:
        boxes *= np.tile(sizes, 2)
        print(f"{source}: boxes read as normalised coordinates", flush=True)
    fitting = {layout: int(fits(boxes, sizes, layout).sum()) for layout in ("xyxy", "xywh", "cxcywh")}
    if box_format == "auto":
        best = max(fitting, key=fitting.__getitem__)
        box_format = decided.get("format", best)
        counts = ", ".join(f"{count} of {len(boxes)} fit as {layout}" for layout, count in fitting.items())
        print(f"{source}: boxes read as {box_format}: {counts} (--box-format overrides)", flush=True)
        if not decided and (best == "cxcywh" or fitting["xyxy"] != fitting["xywh"]):
            _write_json({"format": box_format, "normalised": normalised}, decision)
    boxes = to_xywh(boxes, box_format)
    return [box if whole else None for box, whole in zip(boxes.tolist(), finite.tolist(), strict=True)], normalised


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
