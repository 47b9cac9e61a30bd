"""Hub data sets: the requested images are streamed into the cache, which grows, and are read from there.

A data set needs the columns `image` and `objects`, the latter with `bbox` and a category for each box, as a list of
dictionaries or a dictionary of lists.

A split's folder in the cache holds the images and a journal: a line with what the rows have in common, a line for each
row, written after the row's image, with the state of the stream behind it, and an empty one at the end.
"""

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import datasets
import filelock
import fsspec
from huggingface_hub import HfApi

from common.console import InputError, progress_bar
from common.data.memory import ImageFile
from common.data.readers import Request, find_split, read_json_lines, reading
from common.data.table import NOTHING, Table
from common.files import atomic_write, cache_folder
from common.hub import HUB_ID, ask_hub, hub_errors
from common.images import ImageFault, open_image

log = logging.getLogger(__name__)
XYXY = "detection-datasets/"  # whose boxes are xyxy; others' are as --box-format says
CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
COCO = (80, ["person", "bicycle"], ["hair drier", "toothbrush"])  # its classes: their number, the first and the last
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
JOURNAL = "journal.jsonl"
HUB_TIMEOUT_S = 10  # for the hub's first answer


def is_hub_data(data: str) -> bool:
    """Whether this is a local copy of a hub data set, or has the form of a hub id and is not a folder."""
    return any(Path(data).glob("data/*.parquet")) or (not Path(data).exists() and bool(re.fullmatch(HUB_ID, data)))


def read_hub(request: Request) -> Table:
    """The first usable rows of a hub data set's split; what the cache has needs no network.

    COCO's classes get COCO's category ids. A run that was interrupted, or wants more images, goes on behind the last
    row.

    Raises InputError: the hub can't be reached, no such data set or split, columns that are not a detection set's, or a
    stream that breaks off.
    """
    data, limit = request.data, 0 if request.chosen else request.limit
    folder = _cache_of(data) / request.split
    lines = read_json_lines(folder / JOURNAL)
    if not _has_enough(lines, limit):
        with locked(folder):
            lines = _fetch(folder, request, limit)
    header, *rows = lines
    usable = list(accumulate("image" in row for row in rows))
    rows = rows[: bisect_left(usable, limit) + 1] if limit else rows
    with reading(folder / JOURNAL, "the rows of a detection set"):
        categories = sorted({thing["category"] for row in rows for thing in row.get("objects", ())} - {None})
        names, values = header["names"] or list(map(str, categories)), range(len(header["names"] or ())) or categories
        numbers = COCO_IDS if (len(names), names[:2], names[-2:]) == COCO else range(1, len(names) + 1)
        ids, classes = dict(zip(values, numbers, strict=True)), dict(zip(numbers, names, strict=True))
        layout, split, own_ids = "xyxy" * data.startswith(XYXY), header["split"], header["has_ids"]
        source = f"{data}@{header['revision'][:7]}" if header["revision"] else data
        table = Table(f"{source}, {request.split}", folder / "images", classes, layout, split, own_ids=own_ids)
        for number, row in enumerate(rows, 1):
            if "fault" in row:
                table.faults.add(row["fault"], f"row {number}")
            elif image := row.get("image"):
                table.add_image(image["id"], image["file_name"], (image["width"] or 0, image["height"] or 0))
                for thing in row["objects"]:
                    category, crowd = ids.get(thing["category"], NOTHING), int(thing["iscrowd"] or 0) != 0
                    table.add(image["id"], category, thing["bbox"], crowd, thing["area"] or 0)
    return table


def _cache_of(name: str) -> Path:
    """A folder for each hub data set, and for each state of a local data set's files."""
    if not Path(name).is_dir():
        return cache_folder("hub", name.replace("/", "--"))
    states = [ImageFile(0, file, 0, 0).state() for file in sorted(Path(name).resolve().rglob("*"))]
    return cache_folder("hub", f"{Path(name).resolve().name}-{sha256(repr(states).encode()).hexdigest()[:16]}")


def _has_enough(lines: list[dict], limit: int) -> bool:
    return {} in lines[-1:] or 0 < limit <= sum("image" in line for line in lines)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several processes one fetches into a folder, while the others wait; a killed one leaves no lock behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: filelock.BaseFileLock = filelock.FileLock(folder / "lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            log.info(f"waiting for another process, which fetches into {folder}")
            lock.acquire()
        except OSError:  # a file system without locks
            lock = filelock.SoftFileLock(folder / "lock.file")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error


def _fetch(folder: Path, request: Request, limit: int) -> list[dict]:
    """Go on behind the last line of the journal. Returns all lines. Raises InputError as `read_hub` does."""
    lines, name = read_json_lines(folder / JOURNAL), request.data
    if _has_enough(lines, limit):  # another process fetched them in the meantime
        return lines
    journals = [lines, *map(read_json_lines, folder.parent.glob(f"*/{JOURNAL}"))]
    revision = next((journal[0]["revision"] for journal in journals if journal), None)  # one for all splits
    stream, header = _open(request, revision, folder.parent)
    usable = sum("image" in line for line in lines)
    log.info(f"fetching {limit or 'all'} images of {name} into {folder} ({usable} are there)")
    with (folder / JOURNAL).open("a") as file, progress_bar(limit or None, "fetching images") as bar:

        def write(line: dict) -> None:
            lines.append(line)
            file.write(f"\n{json.dumps(line)}")  # on a line of its own, whatever a killed run has left
            file.flush()

        with hub_errors(f"the stream of data {name} broke off", f"datasets/{name}", "what came before is kept"):
            if not lines:
                write(header)
            elif state := lines[-1].get("state"):
                stream.load_state_dict(state)
            for row in stream:
                content = _image_content(row["image"] or {}, name)
                line = write_row(row, content, folder / "images", len(lines), header)
                write(line | {"state": stream.state_dict()})
                usable += "image" in line
                bar.update(usable - bar.n)
                if 0 < limit == usable:
                    return lines
            write({})
    return lines


def _open(request: Request, known: str | None, folder: Path) -> tuple[datasets.IterableDataset, dict]:
    """The split's rows, of a hub's data set in the known revision or its latest, and the journal's header.

    Raises InputError as `read_hub` does.
    """
    name, revision = request.data, known
    # Inside each are the tries of the hub's client, half a minute of them.
    vars(datasets.config).update(STREAMING_OPEN_MAX_RETRIES=1, STREAMING_READ_MAX_RETRIES=1)
    advice = f"give a folder or demo, request no more images than {folder} has, or delete it to begin anew"
    with hub_errors(f"cannot fetch the hub data set {name}", f"datasets/{name}", advice):
        if not Path(name).is_dir():  # one short request first: the data library would retry for half a minute
            revision = ask_hub(lambda: HfApi().dataset_info(name, revision=known, timeout=HUB_TIMEOUT_S)).sha
        splits = datasets.load_dataset(name, streaming=True, revision=revision)
    split = find_split(request.split, splits, f"data {name}", ": push one made by train_test_split")
    features = splits[split].features or {}
    objects = getattr(features.get("objects"), "feature", features.get("objects"))  # a list's elements
    objects = objects if isinstance(objects, dict) else {}
    category = next((column for column in CATEGORY_COLUMNS if column in objects), "")
    if "image" not in features or "bbox" not in objects or not category:
        columns = ", ".join([*features, *(f"objects.{column}" for column in objects)])
        raise InputError(f"data {name} is no detection set: image, objects.bbox and objects.category, but {columns}")
    names = getattr(getattr(objects[category], "feature", objects[category]), "names", None)
    has_ids = "int" in getattr(features.get("image_id"), "dtype", "")
    header = {"revision": revision, "split": split, "category": category, "names": names, "has_ids": has_ids}
    return splits[split].cast_column("image", datasets.Image(decode=False)), header


def _image_content(image: dict, name: str) -> bytes:
    """An image's file, from the row itself or from the path that it names; empty where there is neither.

    The path must lie in the data set (or in an archive there): a row may come from anybody, and name any file or page.
    """
    *archives, file = (image.get("path") or "").split("::")
    inside = file.startswith((f"hf://datasets/{name}@", f"{Path(name).resolve()}/")) and ".." not in file
    inside &= all(archive.startswith(("zip://", "tar://")) for archive in archives)
    if image.get("bytes") or not inside:
        return image.get("bytes") or b""
    with fsspec.open(image["path"], "rb") as opened:
        return opened.read()


def write_row(row: dict, content: bytes, folder: Path, number: int, header: dict) -> dict:
    """Write a row's image; returns the row's line, with a `fault` where the row can't be used."""
    things = row["objects"] or []
    try:
        if isinstance(things, dict):  # of lists, in place of a list of dictionaries
            things = [dict(zip(things, values, strict=True)) for values in zip(*things.values(), strict=True)]
        number = int(row["image_id"]) if header["has_ids"] else number
        path = folder / f"{number:012d}{Path((row['image'] or {}).get('path') or '').suffix or '.jpg'}"
        with atomic_write(path) as file:
            file.write(content)
        width, height = row.get("width"), row.get("height")
        open_image(path, (width, height) if width and height else None)
        image = {"id": number, "file_name": path.name, "width": width, "height": height}
        columns = {"bbox": "bbox", "category": header["category"], "area": "area", "iscrowd": "iscrowd"}
        return {"image": image, "objects": [{key: thing.get(columns[key]) for key in columns} for thing in things]}
    except ImageFault as fault:
        if getattr(fault.__cause__, "errno", None):  # of this machine, such as too many open files: it may pass
            raise
        return {"fault": fault.sentence}
    except (TypeError, ValueError):
        return {"fault": "left out {} rows without image_id, or with columns of other lengths in objects"}
