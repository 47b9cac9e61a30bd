"""Hub data sets: the requested images are streamed into the cache, which grows, and are read from there.

A data set needs the columns `image` and `objects`, the latter with `bbox` and a category for each box, as a list of
dictionaries or a dictionary of lists. `detection-datasets/coco` has xyxy boxes, categories 0..79, no crowd flags and no
images without objects, so official AP can't be computed from it.

A split's folder in the cache holds the images; `rows.jsonl`, with a line for each row of the stream, written after the
row's image; and `stream.json`, what the rows have in common.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import datasets
import filelock
import fsspec
import huggingface_hub
import numpy as np

from common.console import InputError, progress_bar, to_one_line
from common.data.readers import NO_BOX, UNNAMED, Request, as_float, find_split
from common.data.table import LAYOUTS, Table, inside, to_xywh
from common.files import atomic_write, cache_folder
from common.images import ImageFault, open_image, read_header

log = logging.getLogger(__name__)
HUB_ID = r"\w[\w.-]*/[\w.-]+"
XYXY = "detection-datasets/"  # whose boxes are xyxy; others' are as --box-format says
CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
COCO = (80, "person", "bicycle", "hair drier", "toothbrush")  # its classes: their number, the first and the last two
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
HUB_TIMEOUT_S = 5  # for the hub's first answer


def is_hub_data(data: str) -> bool:
    """Whether this is a local copy of a hub data set, or has the form of a hub id and is not a folder."""
    return any(Path(data).glob("data/*.parquet")) or (not Path(data).exists() and bool(re.fullmatch(HUB_ID, data)))


def read_hub(request: Request) -> Table:
    """The first usable rows of a hub data set's split; what the cache has needs no network.

    A run that was interrupted, or wants more images, goes on behind the last row; of the parquet file that it stopped
    in or had just finished, the earlier rows are read again, but not written.

    Raises:
        InputError: the hub can't be reached, no such data set or split, columns that are not a detection set's, a
            stream that breaks off, or a layout of the boxes that is not known.
    """
    name, limit = request.data, 0 if request.chosen else request.limit
    folder = _data_set_folder(name) / request.split
    if not _has_enough(*_read_cache(folder, limit), limit):
        try:
            with locked(folder):
                _fetch(folder, request, limit)
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror or error}") from error
    header, rows = _read_cache(folder, limit)
    return _table(request, folder / "images", header, rows)


def _table(request: Request, folder: Path, header: dict, rows: list[dict]) -> Table:
    values, classes = _classes(header["names"], rows)
    name, layout = f"{request.data}, {request.split}", "xyxy" * request.data.startswith(XYXY)
    own = header["has_ids"]
    table = Table(name, folder, classes, layout, request.layout, header.get("split", ""), own_ids=own)
    for number, row in enumerate(rows, 1):
        if "fault" in row:
            table.faults.add(row["fault"], f"row {number}")
            continue
        table.add_image(row["id"], row["file_name"], (row["width"], row["height"]))
        for box, category, area, crowd in row["objects"]:
            numbers = map(as_float, box) if isinstance(box, list) and len(box) == 4 else NO_BOX
            table.add(row["id"], values.get(category, UNNAMED), *numbers, bool(crowd), as_float(area or 0))
    if not layout and not request.layout:
        _refuse_unknown_layout(table)
    return table


def _refuse_unknown_layout(table: Table) -> None:
    rows, sizes = np.array(table.objects).reshape(-1, 8), np.array([image[2:] for image in table.images])
    fit = {name: int(inside(to_xywh(rows[:, 2:6], name), sizes[rows[:, 0].astype(int)]).sum()) for name in LAYOUTS}
    counts = ", ".join(f"--box-format {name} ({count} fit their images)" for name, count in fit.items())
    raise InputError(f"{table.source}: say how its {len(rows)} boxes are written, after a look at some: {counts}")


def _data_set_folder(name: str) -> Path:
    """One for each hub data set, and for each state of a local data set's files."""
    if not Path(name).is_dir():
        return cache_folder("hub", name.replace("/", "--"))
    files = sorted(Path(name).resolve().rglob("*.parquet"))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return cache_folder("hub", f"{Path(name).resolve().name}-{sha256(repr(states).encode()).hexdigest()[:16]}")


def _read_cache(folder: Path, limit: int = 0) -> tuple[dict, list[dict]]:
    """The header, with the `state` of the stream behind the last row, and all rows or `limit` usable ones."""
    if not (folder / "stream.json").is_file():
        return {}, []
    header, rows, usable = json.loads((folder / "stream.json").read_text()), [], 0
    with (folder / "rows.jsonl").open("rb") as file:
        for line in file:
            with suppress(ValueError):  # a killed run leaves half a line
                rows.append(json.loads(line))
                header["state"] = rows[-1].pop("state", None)
                usable += "fault" not in rows[-1]
            if 0 < limit == usable:
                break
    return header, rows


def _has_enough(header: dict, rows: list[dict], limit: int) -> bool:
    usable = sum("fault" not in row for row in rows)
    return 0 < limit <= usable or len(rows) == header.get("total")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several processes one fetches, while the others wait."""
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


def _fetch(folder: Path, request: Request, limit: int) -> None:
    """Go on behind the last row of the cache: first each row's image is written, then its line."""
    name = request.data
    header, rows = _read_cache(folder)
    if _has_enough(header, rows, limit):  # another process fetched them in the meantime
        return
    stream, found = _open(request, header.get("revision"), len(rows))
    state, header = header.pop("state", None), header or found
    missing = limit - sum("fault" not in row for row in rows) if limit else None
    log.info(f"fetching {missing or 'all'} images of {name} into {folder} ({len(rows)} are there; a new run goes on)")
    with (folder / "rows.jsonl").open("a") as file, progress_bar(missing, "fetching images") as bar:
        file.write("\n")  # ends the half line of a killed run
        _write_json(header, folder / "stream.json")
        used_ids = {row.get("id") for row in rows}
        for row, content in _new_rows(stream, state, len(rows), name):
            entry = write_row(row, content, folder / "images", len(rows) + 1, header, used_ids)
            used_ids.add(entry.get("id"))
            rows.append(entry)
            file.write(json.dumps(entry | {"state": stream.state_dict()}) + "\n")
            file.flush()
            bar.update("fault" not in entry)
            if limit and _has_enough({}, rows, limit):
                return
    _write_json(header | {"total": len(rows)}, folder / "stream.json")


def _write_json(content: dict, path: Path) -> None:
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def _open(request: Request, revision: str | None, existing: int) -> tuple[datasets.IterableDataset, dict]:
    """The split's rows, of a hub's data set in this revision, and what the rows have in common.

    Raises InputError as `read_hub` does.
    """
    name = request.data
    try:
        if not Path(name).is_dir():  # one short request first: the data library would retry for half a minute
            hub = huggingface_hub.HfApi()
            revision = hub.dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha
        splits = datasets.load_dataset(name, streaming=True, revision=revision)
    except Exception as error:  # both libraries pass on what their HTTP client, file systems and formats raise
        advice = "give a COCO-format folder, or demo"
        if existing:
            advice = f"{existing} of its images are in the cache: request no more"
        reason = "cannot be read" if Path(name).is_dir() else "is not a folder here and cannot be fetched from the hub"
        raise InputError(
            f"data {name} {reason}; {advice} ({to_one_line(f'{type(error).__name__} {error}', 200)})"
        ) from error
    split = find_split(request.split, splits, f"data {name}")
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
    return splits[split].cast_column("image", datasets.Image(decode=False)), header | {"split": split}


def _new_rows(
    stream: datasets.IterableDataset, state: dict | None, existing: int, name: str
) -> Iterator[tuple[dict, bytes]]:
    """The rows of the stream behind this state, with their image files; raises InputError where it breaks off."""
    count = existing
    try:
        if state:
            stream.load_state_dict(state)
        for row in stream:
            yield row, _image_content(row["image"] or {}, name)
            count += 1
    except Exception as error:  # of a network, an archive, a damaged file: they share no base class
        kept = f"the stream broke off after {count} rows; they are kept, and running this again goes on behind them"
        raise InputError(f"data {name}: {kept} ({_in_one_line(error)})") from error


def _in_one_line(error: Exception) -> str:
    return to_one_line(f"{type(error).__name__} {error}", 200)


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


def write_row(row: dict, content: bytes, folder: Path, number: int, header: dict, used_ids: set) -> dict:
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
    size = row.get("width") or 0, row.get("height") or 0
    try:
        path = folder / f"{image_id:012d}{Path(row['image']['path'] or '').suffix or '.jpg'}"
        with atomic_write(path) as file:
            file.write(content)
        size = size if min(size) > 0 else read_header(path).upright
        open_image(path, size)
    except ImageFault as fault:
        return {"fault": fault.sentence}
    objects = list(zip(*(column if len(column) == count else [None] * count for column in columns), strict=True))
    return {"id": image_id, "file_name": path.name, "width": size[0], "height": size[1], "objects": objects}


def _column(objects: list | dict | None, name: str) -> list:
    """One property of all objects of a row, which are a list of dictionaries or a dictionary of lists."""
    if isinstance(objects, list):
        return [(thing or {}).get(name) for thing in objects]
    return (objects or {}).get(name) or []


def _classes(names: list[str] | None, rows: list[dict]) -> tuple[dict[int | str, int], dict[int, str]]:
    """The category id of each value in the rows, and the classes by id: COCO's own ids where they are COCO's."""
    listed = {value for row in rows for _, value, *_ in row.get("objects", ())} - {None}
    values = range(len(names)) if names else sorted(listed)
    names = names or [f"class {value}" if isinstance(value, int) else value for value in values]
    ids = COCO_IDS if (len(names), *names[:2], *names[-2:]) == COCO else range(1, len(names) + 1)
    return dict(zip(values, ids, strict=True)), dict(zip(ids, names, strict=True))
