"""Official COCO 2017: the annotation archive once, and of the 123,000 images only those that are requested.

Everything is kept in the cache folder. A file gets its name only when it is whole, so an interrupted fetch goes on with
the files that are missing. `COCO_URL` names a mirror.
"""

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common.console import InputError, progress_bar
from common.data.checks import check_images
from common.data.hub import locked
from common.data.memory import DetectionData
from common.data.readers import Request, add_coco
from common.data.table import Table
from common.files import atomic_write, cache_folder, remove_leftovers
from common.images import ImageFault, open_image

log = logging.getLogger(__name__)
HOST = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
PARTS = ("train2017", "val2017")
IMAGE_NAME = re.compile(r"(train|val)2017/\w+\.jpg")
CONNECTIONS = 16  # at the same time
ATTEMPTS = 4  # requests for a file, and as many for one that arrives damaged
BACKOFF_S = 0.5  # between two requests, doubled each time
LONGEST_WAIT_S = 60  # that a server may ask for
RETRY_STATUSES = (429, 500, 502, 503, 504)
TIMEOUT_S = 20  # without a byte
CHUNK_BYTES = 1 << 20
LEFTOVER_AGE_S = 3600  # after which the part of an archive is one that a killed run left behind


def read_official(request: Request) -> Table:
    """A split of official COCO, and the other where it lacks an image of --image-ids; `fetch_images` gets the images.

    Raises:
        InputError: COCO can't be reached, or a file is damaged ATTEMPTS times.
    """
    folder = cache_folder("coco-official")
    with locked(folder):
        _fetch_annotations(folder)
    table = Table("coco-official", folder, {}, "xywh", request.layout)
    for part in sorted(PARTS, key=lambda part: not part.startswith(request.split)):  # its own first
        if not table.images or not {int(key) for key in request.chosen if key.isdecimal()} <= table.places.keys():
            add_coco(table, folder / "annotations" / f"instances_{part}.json", f"{part}/", local=False)
    for _, name, _, _ in table.images:
        if not IMAGE_NAME.fullmatch(name):  # no other may be requested or written
            raise InputError(f"the annotations name an image {name!r}, and COCO's have other names")
    return table


def fetch_images(data: DetectionData) -> None:
    """Fetch the images that the cache lacks, or has damaged.

    Raises:
        InputError: some could not be fetched.
    """
    faulty = [image.path for image, found in zip(data.images, check_images(data), strict=True) if found.fault]
    if not faulty:
        return
    failures: list[str] = []

    def fetch(path: Path) -> None:
        try:
            _fetch(session, f"{path.parent.name}/{path.name}", path, _is_image)
        except InputError as error:
            failures.append(str(error))

    log.info(f"fetching {len(faulty)} images of COCO into {faulty[0].parent.parent}")
    bar = progress_bar(len(faulty), "fetching images")
    with bar, _session() as session, ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(fetch, faulty):
            bar.update()
    if failures:
        counted = f"{len(failures)} of {len(faulty)} images could not be fetched"
        raise InputError(f"{counted}; run this again to go on: {failures[0]}")


def _fetch_annotations(folder: Path) -> None:
    """Both splits' instances files, from the archive, which is fetched first and removed afterwards."""
    files = [f"annotations/instances_{part}.json" for part in PARTS]
    if all((folder / name).is_file() for name in files):
        return
    archive = folder / Path(ARCHIVE).name
    remove_leftovers(archive.parent, LEFTOVER_AGE_S)
    if not archive.is_file():
        with _session() as session:
            _fetch(session, ARCHIVE, archive, zipfile.is_zipfile)
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in files:
                with packed.open(name) as source, atomic_write(folder / name) as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        archive.unlink(missing_ok=True)
        raise InputError(f"the annotation archive from {_host()} was damaged and is removed: run this again") from error
    archive.unlink(missing_ok=True)


def _host() -> str:
    return os.environ.get("COCO_URL", HOST).rstrip("/")


def _session() -> requests.Session:
    """A client that repeats requests which get no answer, or one of RETRY_STATUSES."""
    retry = Retry(
        total=ATTEMPTS - 1,
        backoff_factor=BACKOFF_S,
        status_forcelist=RETRY_STATUSES,
        raise_on_status=False,
        retry_after_max=LONGEST_WAIT_S,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=CONNECTIONS))
    return session


class _Damaged(Exception):
    """A file arrived incomplete, or is not what it should be."""


def _fetch(session: requests.Session, name: str, path: Path, is_whole: Callable[[Path], bool]) -> None:
    """Fetch the file `name` of the server to `path`, anew where it arrives damaged.

    Raises InputError: there is no such file or no answer, or the file is damaged ATTEMPTS times.
    """
    url = f"{_host()}/{name}"
    reason: object = ""
    for _ in range(ATTEMPTS):
        try:
            with session.get(url, stream=True, timeout=TIMEOUT_S) as answer:
                if not answer.ok:
                    reason = f"the server says {answer.status_code}"
                    break
                save_body(answer, path, is_whole)
            return
        except _Damaged as damage:
            reason = damage
        except requests.RequestException as error:
            reason = getattr(error.args[0], "reason", error) if error.args else type(error).__name__
            break
    raise InputError(f"cannot fetch {url}: {reason}")


def save_body(answer: requests.Response, path: Path, is_whole: Callable[[Path], bool]) -> None:
    """Write the answer's content, which urllib3 compares with its announced length. Raises _Damaged."""
    with atomic_write(path) as file:
        try:
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
        except requests.RequestException as error:
            raise _Damaged("the connection broke off") from error
        file.flush()
        if not is_whole(Path(file.name)):
            raise _Damaged("it arrived damaged")


def _is_image(path: Path) -> bool:
    try:
        open_image(path)
    except ImageFault:
        return False
    return True
