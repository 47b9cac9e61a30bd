"""COCO files for a trial of --start-from: a detector that lacks some classes, then few images of these classes.

  python -m dev.new_classes --data COCO --output trial

base.json and base_val.json, for the detector to start from, have the images that show none of the classes. The others
have the images that show one, with the boxes of these classes alone: few.json the first 40 training images, pick.json
the next 24, which choose the epoch, and test.json all that remain. Image names are relative to DATA.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import flag
from common.data.readers import read_json
from common.files import atomic_write

FEW, PICK = 40, 24  # images


@dataclass(frozen=True)
class Settings:
    data: str = flag("", "COCO-format folder: annotations/instances_*2017.json, *2017/")
    classes: tuple[str, ...] = flag(("motorcycle", "airplane", "bus", "cat", "dog", "toilet"), "that base.json lacks")
    output: str = flag("trial", "folder to write")


def read(settings: Settings, split: str) -> dict:
    """The annotations of "train" or "val", with image names relative to the folder of the data."""
    content = read_json(Path(settings.data, "annotations", f"instances_{split}2017.json"))
    for image in content["images"]:
        image["file_name"] = f"{split}2017/{Path(image['file_name']).name}"
    return content


def part(images: Iterable[dict], annotations: list[dict], categories: list[dict]) -> dict:
    """A COCO file of these images and categories."""
    images, wanted = list(images), {category["id"] for category in categories}
    shown = {image["id"] for image in images}
    kept = [a for a in annotations if a["image_id"] in shown and a["category_id"] in wanted]
    numbered = [annotation | {"id": i} for i, annotation in enumerate(kept, start=1)]
    return {"images": images, "annotations": numbered, "categories": categories}


def main(settings: Settings) -> None:
    """Write the five files, and print how many images and boxes each has."""
    train, val = read(settings, "train"), read(settings, "val")
    new = [category for category in train["categories"] if category["name"] in settings.classes]
    old = [category for category in train["categories"] if category not in new]
    ids, boxes = {category["id"] for category in new}, train["annotations"] + val["annotations"]
    showing = {annotation["image_id"] for annotation in boxes if annotation["category_id"] in ids}
    train_new, val_new = ([i for i in split["images"] if i["id"] in showing] for split in (train, val))
    parts = {
        "base": part((i for i in train["images"] if i["id"] not in showing), boxes, old),
        "base_val": part((i for i in val["images"] if i["id"] not in showing), boxes, old),
        "few": part(train_new[:FEW], boxes, new),
        "pick": part(train_new[FEW : FEW + PICK], boxes, new),
        "test": part(train_new[FEW + PICK :] + val_new, boxes, new),
    }
    for name, content in parts.items():
        with atomic_write(Path(settings.output, f"{name}.json")) as file:
            file.write(json.dumps(content).encode())
        print(f"{name}.json: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
