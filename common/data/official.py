"""Official COCO 2017: the annotation archive once, and of the 123,000 images only those that are requested.

Everything is kept in the cache folder. A file gets its name only when it is whole, so an interrupted fetch goes on with
the files that are missing. `COCO_URL` names a mirror.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common.console import InputError, progress_bar
from common.data.table import read_json
from common.files import atomic_write, cache_folder, remove_leftovers
from common.images import open_image

HOST = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
PARTS = ("train2017", "val2017")
CONNECTIONS = 16  # at the same time
TRIES = 4  # requests for a file, and as many for one that arrives damaged
BACKOFF = 0.5  # seconds between two requests, doubled each time
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses after which the request is repeated
TIMEOUT = 20  # seconds without a byte
CHUNK_BYTES = 1 << 20
ABANDONED = 3600  # seconds after which the part of an archive is one that a killed run left behind


def official_split(split: str, limit: int, image_ids: Sequence[int] = ()) -> tuple[Path, Path]:
    """Annotation file and image folder of a split of official COCO; what the cache lacks of them is fetched.

    Args:
        split: "train" or "val".
        limit: its first `limit` images in the order of its file; 0 for all.
        image_ids: these images instead, of either split, in this order.

    Raises:
        InputError: COCO can't be reached, a file is damaged TRIES times, or COCO has no image of one of the ids.
    """
    folder = cache_folder("coco-official")
    name = (
        hashlib.sha256(repr(tuple(image_ids)).encode()).hexdigest()[:16] if image_ids else f"{split}-{limit or 'all'}"
    )
    subset = folder / "subsets" / f"{name}.json"
    if not subset.is_file():
        _fetch_annotations(folder)
        _write_subset(subset, folder, PARTS if image_ids else (f"{split}2017",), limit, image_ids)
    names = [image["file_name"] for image in json.loads(subset.read_text())["images"]]
    _fetch_images(folder, [name for name in names if not (folder / name).is_file()])
    return subset, folder


def official_ids(split: str) -> list[int]:
    """The ids of all images of "train" or "val", in the order of its file; raises what `official_split` does."""
    folder = cache_folder("coco-official")
    listed = folder / "subsets" / f"{split}-ids.json"  # the annotations are large, and slow to read
    if not listed.is_file():
        _fetch_annotations(folder)
        content = read_json(folder / "annotations" / f"instances_{split}2017.json")
        with atomic_write(listed, "w") as file:
            json.dump([image["id"] for image in content["images"]], file)
    return json.loads(listed.read_text())


def _write_subset(subset: Path, folder: Path, parts: Sequence[str], limit: int, image_ids: Sequence[int]) -> None:
    images: dict[int, dict] = {}
    annotations, categories = [], []
    for part in parts:
        content = read_json(folder / "annotations" / f"instances_{part}.json")
        wanted = set(image_ids) or {image["id"] for image in content["images"][: limit or None]}
        chosen = {image["id"]: image for image in content["images"] if image["id"] in wanted}
        images |= {
            key: image | {"file_name": _checked(f"{part}/{image['file_name']}")} for key, image in chosen.items()
        }
        annotations += [a for a in content["annotations"] if a["image_id"] in chosen]
        categories = content["categories"]
    unknown_ids = [key for key in image_ids if key not in images]
    if unknown_ids:
        raise InputError(f"COCO 2017 has no image {unknown_ids[0]}, nor of {len(unknown_ids) - 1} more of these ids")
    ordered = [images[key] for key in (image_ids or images)]
    with atomic_write(subset, "w") as file:
        json.dump({"images": ordered, "annotations": annotations, "categories": categories}, file)


def _checked(name: str) -> str:
    """An image's path in the cache and on the server; no other may be requested or written."""
    if not re.fullmatch(r"(train|val)2017/\w+\.jpg", name):
        raise InputError(f"the annotations name an image {name!r}, and COCO's have other names")
    return name


def _fetch_annotations(folder: Path) -> None:
    """Both splits' instances files, from the archive, which is fetched first and removed afterwards."""
    files = [f"annotations/instances_{part}.json" for part in PARTS]
    if all((folder / name).is_file() for name in files):
        return
    archive = folder / Path(ARCHIVE).name
    remove_leftovers(archive.parent, ABANDONED)
    if not archive.is_file():
        with _session() as session:
            _fetch(session, ARCHIVE, archive, zipfile.is_zipfile)
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in files:
                with packed.open(name) as source, atomic_write(folder / name) as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        archive.unlink()
        raise InputError(f"the annotation archive from {_host()} was damaged and is removed: run this again") from error
    archive.unlink()


def _fetch_images(folder: Path, names: Sequence[str]) -> None:
    if not names:
        return
    failures: list[str] = []

    def fetch(name: str) -> None:
        try:
            _fetch(session, name, folder / name, _is_image)
        except InputError as error:
            failures.append(str(error))

    print(f"fetching {len(names)} images of COCO into {folder}", flush=True)
    bar = progress_bar(len(names), "fetching images")
    with bar, _session() as session, ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(fetch, names):
            bar.update()
    if failures:
        counted = f"{len(failures)} of {len(names)} images could not be fetched"
        raise InputError(f"{counted}; run this again to go on: {failures[0]}")


def _host() -> str:
    return os.environ.get("COCO_URL", HOST).rstrip("/")


def _session() -> requests.Session:
    """A client that repeats requests which get no answer, or one of the statuses BUSY."""
    retry = Retry(total=TRIES - 1, backoff_factor=BACKOFF, status_forcelist=BUSY, raise_on_status=False)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=CONNECTIONS))
    return session


class _Damaged(Exception):
    """A file arrived incomplete, or is not what it should be."""


def _fetch(session: requests.Session, name: str, path: Path, is_whole: Callable[[Path], bool]) -> None:
    """Fetch the file `name` of the server to `path`, anew where it arrives damaged.

    Raises InputError: there is no such file or no answer, or the file is damaged TRIES times.
    """
    url = f"{_host()}/{name}"
    reason: object = ""
    for _ in range(TRIES):
        try:
            with session.get(url, stream=True, timeout=TIMEOUT) as answer:
                if not answer.ok:
                    reason = f"the server says {answer.status_code}"
                    break
                with atomic_write(path) as file:
                    _receive(answer, file, is_whole)
            return
        except _Damaged as damage:
            reason = damage
        except requests.RequestException as error:
            reason = getattr(error.args[0], "reason", error) if error.args else type(error).__name__
            break
    raise InputError(f"cannot fetch {url}: {reason}")


def _receive(answer: requests.Response, file: IO, is_whole: Callable[[Path], bool]) -> None:
    """Write the answer's content to the file and check it: by `is_whole`, and by the ETag where that is an MD5 digest.

    Raises _Damaged.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        for chunk in answer.iter_content(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
    except requests.RequestException as error:
        raise _Damaged("the connection broke off") from error
    file.flush()
    tag = re.fullmatch('"([0-9a-f]{32})"', answer.headers.get("ETag", ""))
    if not is_whole(Path(file.name)) or (tag and tag[1] != digest.hexdigest()):
        raise _Damaged("it arrived damaged")


def _is_image(path: Path) -> bool:
    try:
        open_image(path)
    except InputError:
        return False
    return True
