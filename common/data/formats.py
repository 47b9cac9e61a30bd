"""Other layouts of labelled images, read as what a COCO file would say: YOLO's text files, Pascal VOC's XML.

Both give (content, folder): a dictionary with `images`, `annotations` and `categories`, and the folder that the file
names are relative to; `annotations.coco_data` checks them as it checks a file. What can't be read becomes an object
without a box, or an image without a size, and is counted there.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import yaml

from common.console import InputError
from common.data.images import IMAGE_SUFFIXES, read_size
from common.files import is_file

YAML_NAMES = ("data.yaml", "dataset.yaml", "data.yml")
VOC_SETS = ("ImageSets", "Main")


def find_yaml(folder: Path) -> Path | None:
    """The YAML file of a YOLO data set: the path itself, or the one in the folder."""
    if folder.suffix in (".yaml", ".yml"):
        return folder if folder.is_file() else None
    return next((folder / name for name in YAML_NAMES if (folder / name).is_file()), None)


def read_yolo(path: Path, split_names: Sequence[str], limit: int = 0) -> tuple[dict, Path]:
    """A split of a YOLO data set: `path`, `train`, `val` and `names` in a YAML file, a text file for each image.

    A line holds a class number and then, in shares of the image, centre, width and height of a box, or the corners
    of an outline, of which the box is taken. The text file lies beside the image, `images` in the last place of its
    path replaced by `labels`; an image without one has no objects. Class numbers become category ids.

    Args:
        path: the YAML file.
        split_names: what it may call the split.
        limit: the first so many images in the order of their names; 0 for all.

    Raises:
        InputError: not such a file, or no images where it points.
    """
    settings = _read_yaml(path)
    names = settings.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path} is not of a YOLO data set: it has no names of classes")
    split = next((name for name in split_names if settings.get(name)), None)
    if split is None:
        raise InputError(f"{path} names no {split_names[0]} images: it has {', '.join(map(str, settings))}")
    root = path.parent / str(settings.get("path") or "")
    root = root if root.is_dir() else path.parent
    files = _listed_images(settings[split], root, path)
    files = files[: limit or None]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    images, annotations = [], []
    for number, file in enumerate(files, 1):
        width, height = read_size(file) or (0, 0)
        name = file.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        labels = _labels_of(file)
        if is_file(labels):
            lines = labels.read_text(errors="replace").splitlines()
            annotations += [_yolo_object(line, number, width, height) for line in lines if line.strip()]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = [{"id": key, "name": name} for key, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, folder


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not of a YOLO data set: it names nothing")
    return content


def _listed_images(places: str | list, root: Path, path: Path) -> list[Path]:
    """The images of folders, or of text files with one image a line."""
    found: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        target = root / str(place)
        if not target.exists():  # exports are often written as if from one folder further down
            target = root / str(place).removeprefix("../")
        if target.is_dir():
            found += [p for p in target.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
        elif target.is_file():
            lines = target.read_text(errors="replace").splitlines()
            found += [target.parent / line.strip() for line in lines if line.strip()]
        else:
            raise InputError(f"{path} names the images {place}, which are not in {root}")
    if not found:
        raise InputError(f"{path} names {places}, where there are no images")
    return sorted(set(found))


def _labels_of(image: Path) -> Path:
    parts = list(image.with_suffix(".txt").parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts)


def _yolo_object(line: str, image: int, width: int, height: int) -> dict:
    """An annotation; without a box where the line can't be understood."""
    unread = {"image_id": image, "category_id": None, "iscrowd": 0, "area": None}
    try:
        category, *numbers = line.split()
        category, numbers = int(float(category)), [float(number) for number in numbers]
    except (ValueError, OverflowError):
        return unread
    if len(numbers) == 4:
        x, y, w, h = numbers
        x, y = x - w / 2, y - h / 2
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        x, y = min(numbers[::2]), min(numbers[1::2])
        w, h = max(numbers[::2]) - x, max(numbers[1::2]) - y
    else:
        return unread | {"category_id": category}
    box = [x * width, y * height, w * width, h * height]
    return unread | {"category_id": category, "bbox": box, "area": box[2] * box[3] or None}


def is_voc(folder: Path) -> bool:
    """Is this a Pascal VOC data set: Annotations and JPEGImages, or parts with XML files beside the images?"""
    return (folder / "Annotations").is_dir() or any(folder.glob("*/*.xml"))


def read_voc(folder: Path, split_names: Sequence[str], limit: int = 0) -> tuple[dict, Path]:
    """A split of a Pascal VOC data set, in its own layout or with a folder for each part.

    Its own: Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt and val.txt. Corners count pixels from 1, and
    belong to the box (Everingham et al., IJCV 2010). Objects marked difficult become crowds, which training and
    evaluation leave aside. Classes are those of all parts, in the order of the alphabet, numbered from 1.

    Raises:
        InputError: no such part, or an XML file that can't be read.
    """
    own_layout = (folder / "Annotations").is_dir()
    if own_layout:
        files = _voc_set(folder, split_names)
        folder_of_images, everything = folder / "JPEGImages", sorted((folder / "Annotations").glob("*.xml"))
    else:
        part = next((folder / name for name in split_names if any((folder / name).glob("*.xml"))), None)
        if part is None:
            raise InputError(f"no {split_names[0]} part in {folder}: no folder of that name has XML files")
        files, folder_of_images, everything = sorted(part.glob("*.xml")), part, sorted(folder.glob("*/*.xml"))
    names = sorted({_text(thing, "name") for file in everything for thing in _read_xml(file).iter("object")} - {""})
    number_of = {name: number for number, name in enumerate(names, 1)}
    if not names:
        raise InputError(f"{folder} has no objects in any of its {len(everything)} XML files")
    images, annotations = [], []
    for number, file in enumerate(files[:limit] if limit else files, 1):
        tree = _read_xml(file)
        named = folder_of_images / (Path(_text(tree, "filename")).name or f"{file.stem}.jpg")
        named = named if is_file(named) else _beside(folder_of_images, file.stem, named)
        width, height = read_size(named) or (0, 0)
        images.append({"id": number, "file_name": named.name, "width": width, "height": height})
        annotations += [_voc_object(thing, number, number_of) for thing in tree.iter("object")]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = [{"id": number, "name": name} for name, number in number_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, folder_of_images


def _voc_set(folder: Path, split_names: Sequence[str]) -> list[Path]:
    sets = folder.joinpath(*VOC_SETS)
    listed = next((sets / f"{name}.txt" for name in split_names if (sets / f"{name}.txt").is_file()), None)
    if listed is None:
        raise InputError(f"no {split_names[0]} part in {folder}: no {'/'.join(VOC_SETS)}/{split_names[0]}.txt")
    rows = [line.split() for line in listed.read_text(errors="replace").splitlines()]
    return [folder / "Annotations" / f"{Path(words[0]).name}.xml" for words in rows if words]


def _beside(folder: Path, stem: str, otherwise: Path) -> Path:
    """The image of that name with whatever ending; XML files often name one that has been renamed since."""
    return next((folder / f"{stem}{s}" for s in IMAGE_SUFFIXES if (folder / f"{stem}{s}").is_file()), otherwise)


def _read_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()  # noqa: S314 (expat limits entities and opens no other file)
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"cannot read {file}: {error}") from error


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _voc_object(thing: ElementTree.Element, image: int, number_of: dict[str, int]) -> dict:
    annotation = {"image_id": image, "category_id": number_of.get(_text(thing, "name"))}
    crowd = int(_text(thing, "difficult") == "1")
    try:
        left, top, right, bottom = (float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return annotation | {"iscrowd": crowd}
    width, height = right - left + 1, bottom - top + 1
    return annotation | {"bbox": [left - 1, top - 1, width, height], "area": width * height, "iscrowd": crowd}
