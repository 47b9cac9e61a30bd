"""Official COCO 2017: the annotation archive once, and of the 123,000 images only those that are requested.

Files get their names in the cache when they are whole, so an interrupted fetch goes on with those that are missing.
`COCO_URL` names a mirror.
"""

import io
import logging
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import requests

from common.console import InputError, last_line, progress_bar, to_one_line
from common.data.checks import check_images
from common.data.hub import locked
from common.data.memory import ImageFile
from common.data.readers import Request, add_coco, find_split
from common.data.table import Table
from common.files import atomic_folder, atomic_write, cache_folder
from common.images import ImageFault, open_image

log = logging.getLogger(__name__)
HOST = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
PARTS = ("train2017", "val2017")
CONNECTIONS = 10  # at the same time
ATTEMPTS = 5  # requests for a file that does not arrive whole
BACKOFF_S = 0.5  # between two of them, doubled each time
MISSING = (401, 403, 404)  # answers that are final
TIMEOUT_S = 20  # without a byte


def read_official(request: Request) -> Table:
    """A split of official COCO, and the other where it lacks an image of --image-ids. The wanted images are fetched.

    Raises InputError: COCO can't be reached, or a file is damaged ATTEMPTS times.
    """
    find_split(request.split, ("train", "val"), "coco-official")
    folder, chosen = cache_folder("coco-official"), set(request.chosen)
    if not (folder / "annotations").is_dir():
        with locked(folder):
            _fetch_annotations(folder / "annotations")
    table = Table("coco-official", folder, {}, "xywh")
    for part in sorted(PARTS, key=lambda part: not part.startswith(request.split)):  # its own first
        if not table.images or not {int(key) for key in chosen if key.isdecimal()} <= table.places.keys():
            add_coco(table, folder / "annotations" / f"instances_{part}.json", prefix=part)
    images = [ImageFile(number, folder / name, w, h) for number, name, w, h in table.images]
    wanted = [image for image in images if not chosen or chosen & {str(image.id), image.path.name}]
    fetch_images(wanted[: request.limit or None])
    return table


def fetch_images(images: Sequence[ImageFile]) -> None:
    """Fetch the images that the cache lacks, or has damaged. Raises InputError where some could not be fetched."""
    checks = check_images(images, "coco-official")
    faulty = [image.path for image, check in zip(images, checks, strict=True) if check.fault]
    if not faulty:
        return
    log.info(f"fetching {len(faulty)} images of COCO into {faulty[0].parent.parent}")
    bar, pool = progress_bar(len(faulty), "fetching images"), ThreadPoolExecutor(CONNECTIONS)
    failures = list[str]()
    with bar, requests.Session() as session, pool:
        for failure in pool.map(lambda path: _fetch_image(session, path), faulty):
            failures += [failure] * bool(failure)
            bar.update()
    if failures:
        what = f"{len(failures)} of {len(faulty)} images could not be fetched"
        raise InputError(f"{what}; run this again to go on: {failures[0]}")


def _fetch_image(session: requests.Session, path: Path) -> str:
    """What went wrong, if anything."""
    try:
        content = _fetch(session, f"{path.parent.name}/{path.name}", open_image)
        with atomic_write(path) as file:
            file.write(content)
    except InputError as error:
        return str(error)
    return ""


def _fetch_annotations(folder: Path) -> None:
    """Both splits' instances files, from the archive."""
    if folder.is_dir():  # another process fetched them in the meantime
        return
    with requests.Session() as session:
        archive = zipfile.ZipFile(io.BytesIO(_fetch(session, ARCHIVE, zipfile.ZipFile)))
    with archive, atomic_folder(folder) as made:
        for part in PARTS:
            try:
                (made / f"instances_{part}.json").write_bytes(archive.read(f"annotations/instances_{part}.json"))
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise InputError(f"COCO's annotation archive is damaged: {last_line(error)}; run this again") from error


def _fetch(session: requests.Session, name: str, check: Callable[[BinaryIO], object]) -> bytes:
    """The file `name` of the server, requested anew where it does not arrive, or `check` finds it damaged.

    Raises InputError: there is no such file, or none of ATTEMPTS succeeds.
    """
    url, reason = f"{os.environ.get('COCO_URL', HOST).rstrip('/')}/{name}", ""
    for attempt in range(ATTEMPTS):
        time.sleep(BACKOFF_S * 2 ** (attempt - 1) if attempt else 0)
        try:
            answer = session.get(url, timeout=TIMEOUT_S)  # urllib3 compares the content with its announced length
            answer.raise_for_status()
            check(io.BytesIO(answer.content))
            return answer.content
        except (requests.RequestException, ImageFault, zipfile.BadZipFile) as error:
            reason = to_one_line(error, 200)
            if getattr(getattr(error, "response", None), "status_code", 0) in MISSING:
                break
    raise InputError(f"cannot fetch {url}: {reason}")
