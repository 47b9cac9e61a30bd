"""Hub data sets: stream only the pictures asked for, and keep them as an ordinary COCO-format folder.

Written for the schema of `detection-datasets/coco`: `image_id`, `image`, `objects.bbox`, `objects.category` (a list of
class labels), `objects.area`. Three traps of that data set are handled: its boxes are xyxy pixels and not COCO's xywh,
its categories are 0..79 and not COCO's ids, and it has no crowd flags and no pictures without objects, so official AP
can't be computed from it.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import InputError
from common.files import atomic_folder, cache_folder

COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COCO_IDS = {name: number for number, name in enumerate(COCO_NAMES, 1) if name}  # official ids, 80 of 1..90


def hub_folder(name: str, split: str, split_names: Iterable[str], limit: int) -> Path:
    """The COCO-format folder of a hub data set's split, made on the first call and reused afterwards.

    Args:
        name: hub id, or a local folder with the data set's parquet files.
        split: "train" or "val"; the folder is laid out for it.
        split_names: what the data set may call that split.
        limit: the first so many pictures; 0 for all.

    Raises:
        InputError: the hub can't be reached, no such data set or split, or columns that are not a detection set's.
    """
    slug = re.sub(r"[^A-Za-z0-9.-]+", "--", str(Path(name).resolve()) if Path(name).is_dir() else name).strip("-.")
    folder = cache_folder("hub", f"{slug}-{split}-{limit or 'all'}")
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as made:
        _write_split(_open_stream(name, split_names), made, split, limit)
    return folder


def _open_stream(name: str, split_names: Iterable[str]) -> datasets.IterableDataset:
    try:
        if not Path(name).is_dir():  # one quick question first: the data library would retry for half a minute
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(name, ".gitattributes", repo_type="dataset"), timeout=5
            )
        splits = datasets.load_dataset(name, streaming=True)
    except Exception as error:  # the hub library's network errors share no base class
        refused = isinstance(error, huggingface_hub.errors.HfHubHTTPError | datasets.exceptions.DatasetNotFoundError)
        reason = "the hub has no such data set, or wants a token for it" if refused else "the hub can't be reached"
        raise InputError(
            f"data {name}: no such folder here, and {reason} (give a COCO-format folder, or demo)"
        ) from error
    split = next((s for s in split_names if s in splits), None)
    if split is None:
        raise InputError(f"data {name} has the splits {', '.join(splits)}, none of {', '.join(split_names)}")
    return splits[split]


def _write_split(stream: datasets.IterableDataset, folder: Path, split: str, limit: int) -> None:
    names = _class_names(stream)
    ids = [COCO_IDS[name] for name in names] if set(names) == set(COCO_IDS) else list(range(1, len(names) + 1))
    pictures = folder / f"{split}2017"
    pictures.mkdir(parents=True)
    images, entries = [], []
    stream = stream.cast_column("image", datasets.Image(decode=False))  # the file as it is, not encoded anew
    for number, row in enumerate(tqdm(stream.take(limit) if limit else stream, total=limit or None, unit="picture")):
        image_id, content = int(row.get("image_id", number + 1)), row["image"]["bytes"]
        image = Image.open(io.BytesIO(content))
        file_name = f"{image_id:012d}.{(image.format or 'jpg').lower().replace('jpeg', 'jpg')}"
        (pictures / file_name).write_bytes(content)
        images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        objects = row["objects"]
        areas = objects.get("area") or [None] * len(objects["bbox"])
        entries += [(image_id, *rest) for rest in zip(objects["bbox"], objects["category"], areas, strict=True)]
    annotations = _annotations(entries, images, ids)
    categories = [{"id": i, "name": n} for i, n in zip(ids, names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir()
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _class_names(stream: datasets.IterableDataset) -> list[str]:
    try:
        return list(stream.features["objects"]["category"].feature.names)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError("this hub data set has no objects.category of class labels; is it a detection set?") from error


def _annotations(entries: list[tuple], images: list[dict], ids: list[int]) -> list[dict]:
    """Boxes as COCO's xywh. xyxy is told from xywh by which of the two keeps more boxes inside their pictures."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    boxes = np.array([entry[1] for entry in entries], np.float64).reshape(-1, 4)
    limits = np.array([sizes[entry[0]] for entry in entries], np.float64).reshape(-1, 2) + 1
    corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)).all(1).sum()
    extents = (boxes[:, :2] + boxes[:, 2:] <= limits).all(1).sum()
    if corners >= extents:
        boxes[:, 2:] -= boxes[:, :2]
    print(f"boxes read as {'xyxy' if corners >= extents else 'xywh'}: {max(corners, extents)} of {len(boxes)} fit so")
    annotations = []
    for number, ((image_id, _, category, area), box) in enumerate(zip(entries, boxes.tolist(), strict=True), 1):
        entry = {"id": number, "image_id": image_id, "category_id": ids[category], "bbox": box, "iscrowd": 0}
        annotations.append(entry | {"area": float(area if area is not None else box[2] * box[3])})
    return annotations
