"""COCO-format annotations -> a checked data set in memory, and from there to training samples.

COCO stores boxes as (left, top, width, height) in pixels of the original picture and numbers its categories with gaps
(80 ids between 1 and 90). Both stay in this file and in `metrics.py`; everything else sees xyxy boxes and labels
0..K-1. Decoded pictures are never kept: memory is the annotations' alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from common.boxes import xywh_to_xyxy
from common.errors import InputError
from common.types import Batch, Target

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture file: COCO id, where it lies, its size in pixels as the annotations give it."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class CocoData:
    """Pictures and the boxes on them, boxes in flat arrays ordered by picture.

    Shapes: boxes (A, 4) float64 COCO xywh original pixels, as the file has them; labels (A,) int64 in 0..K-1;
    crowd (A,) bool; areas (A,) float64 square pixels (COCO: of the mask, which is what it calls small or large);
    starts (P + 1,) int64: the boxes of picture i are starts[i] up to starts[i + 1].
    """

    pictures: tuple[Picture, ...]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    starts: np.ndarray
    source: str
    notes: tuple[str, ...] = ()  # what was left out or repaired, for people to read

    def __len__(self) -> int:
        return len(self.pictures)

    def first(self, count: int) -> "CocoData":
        """The first `count` pictures in file order; all of them where `count` is 0 or there are no more."""
        if count == 0 or count >= len(self):
            return self
        end = self.starts[count]
        kept = {k: getattr(self, k)[:end] for k in ("boxes", "labels", "crowd", "areas")}
        return replace(self, pictures=self.pictures[:count], starts=self.starts[: count + 1], **kept)

    def fingerprint(self) -> str:
        """Hex digest of picture ids, boxes, labels and classes: equal where the ground truth is equal."""
        digest = hashlib.sha256(repr((self.category_ids, self.class_names)).encode())
        for array in (np.array([p.id for p in self.pictures], np.int64), self.boxes, self.labels, self.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, pixels."""
        return self.pictures[index].height, self.pictures[index].width

    def target(self, index: int) -> Target:
        """What is known of picture `index`; boxes still in *original* pixels, for a transform to move."""
        return Target(*self.picture_boxes(index), self.pictures[index].id, letterbox=None)

    def picture_boxes(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4) float32 xyxy original pixels, labels (N,) and crowd (N,) of picture `index`."""
        part = slice(self.starts[index], self.starts[index + 1])
        boxes = xywh_to_xyxy(torch.from_numpy(self.boxes[part])).float()
        return boxes, torch.from_numpy(self.labels[part]), torch.from_numpy(self.crowd[part])


def load_coco(json_path: Path, pictures_folder: Path, limit: int = 0) -> CocoData:
    """Read and check one annotation file.

    Args:
        json_path: COCO instances JSON (`images`, `annotations`, `categories`).
        pictures_folder: the folder that the `file_name`s are relative to.
        limit: keep the first `limit` pictures; 0 keeps all.

    Returns:
        The data set; `notes` counts the annotations that were left out (no box, no area, unknown picture or category).

    Raises:
        InputError: no such file, not COCO, no pictures, or pictures that are not there.
    """
    content = _read_json(json_path)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    if len(label_of) < len(categories):
        raise InputError(f"{json_path}: two categories share an id; give each its own")
    pictures = tuple(
        Picture(int(i["id"]), pictures_folder / i["file_name"], int(i["width"]), int(i["height"]))
        for i in (content["images"][:limit] if limit else content["images"])
    )
    _check_files(pictures, json_path, pictures_folder)
    arrays, notes = _annotation_arrays(content["annotations"], pictures, content["images"], label_of)
    ids, names = tuple(label_of), tuple(str(c["name"]) for c in categories)
    return CocoData(pictures, ids, names, **arrays, source=str(json_path), notes=notes)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id",),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"{path} is not COCO: it has no list {part!r} (give the instances_*.json of a detection set)"
            )
        bad = next((e for e in entries if not isinstance(e, dict) or any(k not in e for k in keys)), None)
        if bad is not None:
            raise InputError(
                f"{path} is not COCO: an entry of {part!r} lacks one of {', '.join(keys)}: {str(bad)[:80]}"
            )
    for part in ("images", "categories"):
        if not content[part]:
            raise InputError(f"{path}: the list {part!r} is empty; there is nothing to work on")
    return content


def _check_files(pictures: Sequence[Picture], json_path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{json_path} needs the pictures' folder {folder}, which is not there")
    missing = [p.path.name for p in pictures if not p.path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pictures)} pictures of {json_path} are not in {folder}: {missing[0]}, …"
        )


def _annotation_arrays(annotations: list, pictures: Sequence[Picture], images: list, label_of: dict[int, int]):
    index_of = {picture.id: index for index, picture in enumerate(pictures)}
    if len(index_of) < len(pictures):
        raise InputError("two pictures share an id; each picture needs its own")
    known_ids = {image["id"] for image in images}
    dropped = dict.fromkeys(("without a box", "without area", "of an unknown picture", "of an unknown category"), 0)
    rows = []
    for annotation in annotations:
        box = annotation.get("bbox")
        if annotation["image_id"] not in known_ids:
            dropped["of an unknown picture"] += 1
        elif annotation["image_id"] not in index_of:
            continue  # its picture is beyond the limit
        elif annotation.get("category_id") not in label_of:
            dropped["of an unknown category"] += 1
        elif not isinstance(box, list) or len(box) != 4:
            dropped["without a box"] += 1
        elif not (box[2] > 0 and box[3] > 0):
            dropped["without area"] += 1
        else:
            area = annotation.get("area", box[2] * box[3])
            label, crowd = label_of[annotation["category_id"]], bool(annotation.get("iscrowd", 0))
            rows.append((index_of[annotation["image_id"]], label, crowd, area, *box))
    table = np.array(rows, np.float64).reshape(-1, 8)
    table = table[np.argsort(table[:, 0], kind="stable")]
    arrays = {
        "boxes": np.ascontiguousarray(table[:, 4:]),
        "labels": table[:, 1].astype(np.int64),
        "crowd": table[:, 2].astype(bool),
        "areas": np.ascontiguousarray(table[:, 3]),
        "starts": np.searchsorted(table[:, 0], np.arange(len(pictures) + 1)),
    }
    return arrays, tuple(f"left out {count} annotations {why}" for why, count in dropped.items() if count)


def pictures_alone(paths: Sequence[Path], class_names: Sequence[str], category_ids: Sequence[int]) -> CocoData:
    """A data set of picture files without any ground truth, numbered 1, 2, … in the order given.

    Args:
        paths: picture files, and folders whose pictures (not those of their subfolders) are taken in name order.

    Raises:
        InputError: a path that is not there, a folder without pictures, a file that is no picture.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in the folder {path}")
        files += found
    pictures = []
    for number, path in enumerate(files, 1):
        width, height = open_picture(path).size
        pictures.append(Picture(number, path, width, height))
    empty = {
        "boxes": np.zeros((0, 4)),
        "labels": np.zeros(0, np.int64),
        "crowd": np.zeros(0, bool),
        "areas": np.zeros(0),
    }
    starts = np.zeros(len(pictures) + 1, np.int64)
    source = ", ".join(map(str, paths))
    return CocoData(tuple(pictures), tuple(category_ids), tuple(class_names), **empty, starts=starts, source=source)


def open_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture file to RGB.

    Cameras store the rotation beside the pixels (EXIF). With `size` = (width, height) given, the picture is turned
    only where that makes it match, since annotation tools disagree on it; without, it is always turned upright.

    Raises:
        InputError: no such file, not a picture, damaged, or of another size than `size`.
    """
    try:
        image = Image.open(path)
        if size is None or image.size != size:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"no such picture: {path}") from error
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the picture {path}: {error}") from error
    if size is not None and image.size != size:
        found, said = "x".join(map(str, image.size)), "x".join(map(str, size))
        raise InputError(f"{path} is {found} pixels, but its annotation says {said}; mend the annotation file")
    return image


class DetectionDataset(Dataset):
    """Pictures and targets of a `CocoData`, decoded and transformed when asked for.

    Every item draws its randomness from (seed, epoch, index) alone, so the augmentation of a picture does not depend
    on the number of workers or processes, or on where a run was taken up again. Call `set_epoch` before each epoch.
    """

    def __init__(self, data: CocoData, transform: Callable[[Tensor, Target], tuple[Tensor, Target]], seed: int = 0):
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Picture (3, S, S) uint8 and its `Target`."""
        picture = self.data.pictures[index]
        image = F.pil_to_tensor(open_picture(picture.path, (picture.width, picture.height)))
        with sample_randomness(self.seed, self.epoch, index):
            return self.transform(image, self.data.target(index))


@contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Inside, torch's random numbers are those of this sample in this epoch; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((seed, epoch, index)))
        yield


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Stack (3, S, S) uint8 pictures into a `Batch` of floats in 0..1; cached features are stacked as they are."""
    images, targets = zip(*samples, strict=True)
    stacked = torch.stack(images)
    return Batch(stacked.float() / 255 if stacked.dtype == torch.uint8 else stacked, list(targets))
