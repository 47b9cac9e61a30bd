"""Official COCO 2017: the annotation archive once, and of the 123,000 images only those that are asked for.

Everything lands in the cache folder, file by file under its final name only when whole, so that an interrupted fetch
goes on where it stopped. `COCO_URL` names a mirror.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from common.console import InputError, progress_bar
from common.data.annotations import read_json
from common.files import atomic_write, cache_folder

HOST = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
PARTS = ("train2017", "val2017")
AT_ONCE = 16  # connections
TRIES = 4  # of each file, with pauses of PAUSE, 2 PAUSE, 4 PAUSE seconds
PAUSE = 0.5
PATIENCE = 20  # seconds without a byte
PIECE = 1 << 20  # bytes


def official_split(split: str, limit: int, image_ids: Sequence[int] = ()) -> tuple[Path, Path]:
    """Annotation file and image folder of a part of official COCO, fetched as far as they are not there yet.

    Args:
        split: "train" or "val".
        limit: its first so many images in the order of its file; 0 for all.
        image_ids: these images instead, of either part, in this order.

    Raises:
        InputError: COCO can't be reached, a file is damaged time and again, or an id that it does not have.
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
    strangers = [key for key in image_ids if key not in images]
    if strangers:
        raise InputError(
            f"COCO 2017 has no image {strangers[0]}, and {len(strangers) - 1} more of these ids not either"
        )
    ordered = [images[key] for key in (image_ids or images)]
    with atomic_write(subset, "w") as file:
        json.dump({"images": ordered, "annotations": annotations, "categories": categories}, file)


def _checked(name: str) -> str:
    """An image's place in the cache and on the server; nothing else may be asked for or written."""
    if not re.fullmatch(r"(train|val)2017/\w+\.jpg", name):
        raise InputError(f"the annotations name an image {name!r}, which is not how COCO's are called")
    return name


def _fetch_annotations(folder: Path) -> None:
    """Both parts' instances files, out of the archive, which is fetched first and removed afterwards."""
    files = [f"annotations/instances_{part}.json" for part in PARTS]
    if all((folder / name).is_file() for name in files):
        return
    archive = folder / Path(ARCHIVE).name
    _fetch(ARCHIVE, archive, zipfile.is_zipfile)
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in files:
                with packed.open(name) as source, atomic_write(folder / name) as file:
                    while piece := source.read(PIECE):
                        file.write(piece)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        archive.unlink()
        raise InputError(f"the annotation archive from {_host()} was damaged and is removed: run this again") from error
    archive.unlink()


def _fetch_images(folder: Path, names: Sequence[str]) -> None:
    if not names:
        return
    failed: dict[str, str] = {}

    def fetch(name: str) -> None:
        try:
            _fetch(name, folder / name, _is_image)
        except InputError as error:
            failed[name] = str(error)

    print(f"fetching {len(names)} images of COCO into {folder}", flush=True)
    with progress_bar(len(names), "fetching images") as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(fetch, names):
            bar.update()
    if failed:
        first = next(iter(failed.values()))
        raise InputError(f"{len(failed)} of {len(names)} images could not be fetched; run this again to go on: {first}")


def _host() -> str:
    return os.environ.get("COCO_URL", HOST).rstrip("/")


def _fetch(name: str, path: Path, whole: Callable[[Path], bool]) -> None:
    """Fetch a file; what came before a connection broke is kept and the rest asked for.

    Args:
        name: its place on the server.
        path: where it goes; until it is whole it is called like that with .partial.
        whole: is the file what it should be? If not, it is fetched anew.
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    reason = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            tag = _append(f"{_host()}/{name}", partial)
        except urllib.error.HTTPError as error:
            reason = f"the server says {error.code}"
            partial.unlink(missing_ok=True)
            if error.code in (403, 404, 410):
                break
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            continue
        if whole(partial) and _matches(partial, tag):
            partial.replace(path)
            return
        reason = "it came damaged"
        partial.unlink()
    raise InputError(f"cannot fetch {_host()}/{name}: {reason}")


def _matches(path: Path, tag: str) -> bool:
    """Is this the file that the server's ETag is of? COCO's is the MD5 digest; of others nothing can be said."""
    if not re.fullmatch(r'"[0-9a-f]{32}"', tag):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == tag.strip('"')


def _append(url: str, partial: Path) -> str:
    """Write the file, or what is missing of it, to the end of `partial`; returns its ETag."""
    done = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return ""
        raise
    with answer, partial.open("ab" if answer.status == 206 else "wb") as file:
        expected = answer.headers.get("Content-Length")
        received = 0
        while piece := answer.read(PIECE):
            file.write(piece)
            received += len(piece)
    if expected is not None and received < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - received)
    return answer.headers.get("ETag", "")


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
