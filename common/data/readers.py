"""COCO JSON, YOLO text files and Pascal VOC XML -> `Table`. Only the documented forms are read, others are refused."""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from xml.etree import ElementTree

import yaml

from common.console import InputError, to_one_line
from common.data.table import OPEN_ORIENTATION, Table
from common.images import OTHER_FORMAT, ImageFault, find_images, image_suffixes, read_header

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev", "test")}  # in any case, the first there is
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\[\]\s0-9eE+.,-]*\]')  # most of COCO's files, and not used
YEARS = ("2017", "2014", "")
YAML_NAMES = ("data.yaml", "dataset.yaml", "data.yml")
NO_BOX = (float("nan"),) * 4
OUTSIDE = 2.0  # a fraction of an image's side that no box or polygon reaches
UNNAMED = -1  # category id of what has no class


@dataclass(frozen=True)
class Request:
    """A split, "train" or "val", of what `--data` names.

    `files` are the annotation file and the images' folder that flags name; `limit` is the number of images, 0 = all;
    `chosen` are the ids or names of --image-ids; `layout` is that of --box-format.
    """

    data: str
    split: str
    files: tuple[str, str] = ("", "")
    limit: int = 0
    chosen: tuple[str, ...] = ()
    layout: str = ""


def find_split(split: str, names: Iterable[str], source: object) -> str:
    """The name that a data set gives to "train" or "val". Raises InputError where it has none."""
    spelled = {name.casefold(): name for name in names}
    for name in SPLITS[split]:
        if name in spelled:
            return spelled[name]
    raise InputError(f"{source} has no {split} split: it has {to_one_line(', '.join(sorted(spelled)) or 'none', 200)}")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises InputError: no such file, or another encoding."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it in that encoding") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_coco_folder(request: Request) -> Table:
    """annotations/instances_train2017.json with train2017/ or images/train2017/; also 2014, or without a year.

    Raises:
        InputError: no such split, or parts of different years, which share images.
    """
    if request.files[0]:
        return read_coco(Path(request.files[0]), Path(request.files[1]), request)
    folder, years = Path(request.data), dict[str, set[str]]()  # names of splits by their year
    for file in folder.glob("annotations/instances_*.json"):
        name = file.stem.removeprefix("instances_")
        year = next(year for year in YEARS if name.endswith(year))
        years.setdefault(year, set()).add(name.removesuffix(year))
    having = {s: [y for y in YEARS if not years.get(y, set()).isdisjoint(SPLITS[s])] for s in SPLITS}
    both = [year for year in having["train"] if year in having["val"]]
    if having["train"] and having["val"] and not both:
        raise InputError(f"{folder}: its parts are of different years, which share images: name both by --train-json …")
    year = next(iter(both or having[request.split]), "")
    split = find_split(request.split, years.get(year, ()), folder / "annotations")
    images = folder / "images" / f"{split}{year}"
    images = images if images.is_dir() else folder / f"{split}{year}"
    return read_coco(folder / "annotations" / f"instances_{split}{year}.json", images, request, split)


def read_roboflow(request: Request) -> Table:
    """train/_annotations.coco.json with the images beside it, and valid/."""
    files = {file.parent.name: file for file in Path(request.data).glob("*/_annotations.coco.json")}
    split = find_split(request.split, files, request.data)
    return read_coco(files[split], files[split].parent, request, split)


def read_json(path: Path) -> dict:
    """The content of an annotation file, without polygons. Raises InputError: no such file, or not JSON."""
    try:
        return json.loads(POLYGONS.sub(b'"segmentation":0', path.read_bytes()))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {to_one_line(error, 200)}") from error


def read_coco(path: Path, folder: Path, request: Request, split: str = "") -> Table:
    """An annotation file, of the images that are in the folder. Raises InputError as `add_coco` does."""
    if not folder.is_dir():
        raise InputError(f"{path} needs the images' folder {folder}, which does not exist")
    table = Table(str(path), folder, {}, "xywh", request.layout, split)
    add_coco(table, path)
    return table


def add_coco(table: Table, path: Path, prefix: str = "", local: bool = True) -> None:
    """Add the images and objects of an annotation file of COCO's instances form.

    Roboflow's first category is the group of all others, of supercategory "none" and without boxes: it is no class.

    Args:
        table: what they are added to.
        path: the file.
        prefix: in front of each `file_name`.
        local: leave out images that are not in the table's folder.

    Raises:
        InputError: the file has another form.
    """
    content = read_json(path)
    try:
        categories = {as_int(c["id"]): c for c in content["categories"]}
        if len(categories) < len(content["categories"]):
            raise ValueError("two categories share an id")
        used = {a["category_id"] for a in content["annotations"]}
        parents = {c.get("supercategory") for c in categories.values()}
        groups = {k for k, c in categories.items() if c.get("supercategory") == "none" and c["name"] in parents} - used
        table.classes |= {key: str(c["name"]) for key, c in categories.items() if key not in groups}
        for image in content["images"]:
            _add_coco_image(table, image, prefix, local)
        for a in content["annotations"]:
            box, crowd, area = a.get("bbox"), int(a.get("iscrowd") or 0), as_float(a.get("area") or 0)
            numbers = map(as_float, box) if isinstance(box, list) and len(box) == 4 else NO_BOX
            table.add(as_int(a["image_id"]), as_int(a["category_id"]), *numbers, crowd != 0, area)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        lacks = "an entry lacks " * isinstance(error, KeyError)
        raise InputError(f"{path} is not of COCO's instances form: {lacks}{to_one_line(error, 100)}") from error


def _add_coco_image(table: Table, entry: dict, prefix: str, local: bool) -> None:
    number, name = as_int(entry["id"]), str(entry["file_name"])
    size = as_int(entry.get("width") or 0), as_int(entry.get("height") or 0)
    if leads_out(name):
        return table.faults.add("left out {} images whose file names lead out of their folder", name)
    found = find_file(table.folder, name) if local else prefix + name
    if found is None:
        return table.faults.add("left out {} images that are not in the images' folder", name)
    if min(size) <= 0:
        try:
            size, upright, *_ = read_header(table.folder / found)
        except ImageFault as fault:
            return table.faults.add(fault.sentence, name)
        if size != upright:
            table.faults.add(OPEN_ORIENTATION, name)
    return table.add_image(number, found, size)


def as_int(value: object) -> int:
    """A whole number. Raises ValueError for any other value, text and bool included."""
    if type(value) is int and abs(value) < 2**63:  # nearly all of millions of values
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    raise ValueError(f"{to_one_line(repr(value))} is not a whole number of 64 bits")


def as_float(value: object) -> float:
    """A number, NaN for all that is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else float("nan")


def leads_out(name: str) -> bool:
    """Whether a file name, as a POSIX or a Windows path, leads out of its folder."""
    kinds = (PurePosixPath, PureWindowsPath) if re.search(r"\.\.|^/|\\|:", name) else ()  # hardly any
    return any(kind(name).is_absolute() or ".." in kind(name).parts for kind in kinds)


def find_file(folder: Path, name: str) -> str | None:
    """The name of a file as the file system spells it: macOS decomposes accents, other locales know no UTF-8."""
    if os.path.isfile(f"{folder}/{name}"):  # noqa: PTH113 (a Path for each of 118,287 images takes seconds)
        return name
    forms = (unicodedata.normalize(form, name).encode(errors="surrogatepass") for form in ("NFC", "NFD"))
    return next((spelled for spelled in map(os.fsdecode, forms) if os.path.isfile(f"{folder}/{spelled}")), None)  # noqa: PTH113


class _TextLoader(yaml.SafeLoader):
    """Reads all scalars as text: yes, no, on and off, which YAML makes booleans, may be names of classes."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the library declares it so)


def yaml_of(data: str) -> Path | None:
    """The YAML file of a YOLO data set: the path itself, or the one in the folder."""
    path = Path(data)
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    return next((path / name for name in YAML_NAMES if (path / name).is_file()), None)


def read_yolo(request: Request) -> Table:
    """`path`, `train`, `val` and `names` in a YAML file, and a text file for each image.

    A line holds a class number and then, as fractions of the image's sides, centre, width and height of a box, or the
    corners of a polygon, whose bounding box is taken. With `kpt_shape` in the YAML file, keypoints follow the box. The
    text file lies beside the image, the last `images` in its path replaced by `labels`; an image without one has no
    objects.

    Raises:
        InputError: not such a file, no images where it points, or a line of another form.
    """
    path = yaml_of(request.data) or Path(request.data)
    settings, names, keypoints = _read_yaml(path)
    split = find_split(request.split, settings, path)
    files, others = _yolo_images(settings[split], path, settings.get("path", ""))
    folder = Path(os.path.commonpath([file.parent for file in files]))
    table = Table(str(path), folder, names, "cxcywh", request.layout, split, upright=True, own_ids=False)
    table.normalised = True
    _note_files(table, files, others)
    used, corners, triangle = set[int](), 0, Path()
    for number, file in enumerate(files, 1):
        if not add_file(table, number, file, file.relative_to(folder).as_posix()):
            continue
        label = next((place for place in label_places(file) if place.is_file()), None)
        if label is None:
            table.faults.add("took {} images without a label file for images without objects", file.name)
            continue
        for line in read_lines(label):
            category, numbers = _read_label(line, keypoints, label)
            used.add(category)
            corners, triangle = max(corners, len(numbers) // 2), label if len(numbers) == 6 else triangle
            table.add(number, category, *_box_of(numbers), 0, 0)
    if not used and all(not place.is_file() for file in files for place in label_places(file)):
        raise InputError(f"{path}: no image of {split} has a label file, such as {label_places(files[0])[0]}")
    if corners == 3:
        raise InputError(f"{triangle}: its lines of 7 columns may be predictions, with confidence and track: keep 5")
    if used - names.keys() and 0 in names.keys() - used:
        raise InputError(f"{path}: the labels have the classes {min(used)} to {max(used)}: they must begin with 0")
    return table


def _read_yaml(path: Path) -> tuple[dict, dict[int, str], int]:
    """The settings that are not null, the names of the classes, and the number of columns of keypoints."""
    text = read_text(path)
    try:
        content = yaml.load(text, _TextLoader)  # noqa: S506 (it is a SafeLoader)
        names = content["names"]
        names = dict(enumerate(names)) if isinstance(names, list) else {int(k): v for k, v in names.items()}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("the names of its classes are no text")
        shape = content.get("kpt_shape") or (0, 0)
        return (
            {k: v for k, v in content.items() if v not in ("", "~", "null", [])},
            names,
            int(shape[0]) * int(shape[1]),
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        lacks = "it lacks " * isinstance(error, KeyError)
        raise InputError(f"{path} is not the YAML file of a YOLO data set: {lacks}{to_one_line(error, 200)}") from error


def _yolo_images(places: str | list, path: Path, root: str) -> tuple[list[Path], list[Path]]:
    """The images of folders, of text files with one image a line, or named one by one; and those of other formats."""
    base = path.absolute().parent / Path(root).expanduser()
    if not base.is_dir():
        raise InputError(f"{path} has path: {root}, which is no folder here: correct or remove that line")
    images, others = list[Path](), list[Path]()
    for place in places if isinstance(places, list) else [places]:
        target = _existing(base, str(place), path)
        if target.is_dir():
            found, skipped = find_images(target, subfolders=True)
            images, others = images + found, others + skipped
        elif target.suffix.lower() in image_suffixes():
            images.append(target)
        else:
            images += [_normal(target.parent, line) for line in read_lines(target)]
    if not images:
        raise InputError(f"{path} names {places}, where there are no images")
    if repeated := [image.name for image, count in Counter(images).items() if count > 1]:
        raise InputError(f"{path} names {places}, which lists {repeated[0]} more than once: list each once")
    return sorted(images), others


def _normal(folder: Path, name: str) -> Path:
    return Path(os.path.normpath(folder / name.replace("\\", "/")))


def _existing(base: Path, name: str, path: Path) -> Path:
    """The file or folder; Roboflow writes ../train/images, beside the YAML file or beside its folder."""
    places = dict.fromkeys((_normal(base, name.removeprefix("../")), _normal(base, name)))
    found = [place for place in places if place.exists()]
    if not found:
        raise InputError(f"{path} names the images {name}, which are not in {base}")
    if len(found) > 1:
        raise InputError(f"{path} names {name}, which may be {found[0]} or {found[1]}: write that path in full")
    return found[0]


def label_places(image: Path) -> list[Path]:
    """Where the label file of an image may be: `labels` in place of the last `images` in its path, or beside it."""
    beside = image.with_suffix(".txt")
    parts = [place for place, part in enumerate(image.parts[:-1]) if part.lower() == "images"]
    return [Path(*beside.parts[:place], "labels", *beside.parts[place + 1 :]) for place in parts[-1:]] + [beside]


def _read_label(line: str, keypoints: int, path: Path) -> tuple[int, list[float]]:
    """The class of a label line, and the numbers of its box (4) or polygon. Raises InputError for another line."""
    try:
        category, *numbers = map(float, line.split())
        count = len(numbers)
        if not category.is_integer():
            raise ValueError("its class is not a whole number")
        if not all(abs(number) < OUTSIDE for number in numbers):
            raise ValueError("its numbers are not fractions of the image's sides, 0..1")
        if count == 5:
            raise ValueError("its sixth column may be a confidence, so that these are predictions: remove it")
        if keypoints and count not in (4, 4 + keypoints):
            raise ValueError("it has not the columns of kpt_shape")
        if count < 4 or (count % 2 and not keypoints):
            raise ValueError("it is neither a box, nor a polygon, nor (with kpt_shape in the YAML file) a pose")
    except ValueError as error:
        raise InputError(f"{path}: the line {line[:60]!r} is no label: {error}") from error
    return int(category), numbers[:4] if keypoints else numbers


def _box_of(numbers: list[float]) -> list[float]:
    """Centre, width and height of a box or a polygon."""
    if len(numbers) == 4:
        return numbers
    left, top, right, bottom = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def add_file(table: Table, number: int, file: Path, name: str, size: tuple[int, int] = (0, 0)) -> bool:
    """Add an image, of the size that its header gives where none is known; False where it cannot be read."""
    try:
        table.add_image(number, name, size if min(size) > 0 else read_header(file).upright)
    except ImageFault as fault:
        table.faults.add(fault.sentence, name)
        return False
    return True


def _note_files(table: Table, images: list[Path], others: list[Path]) -> None:
    """Note files of formats that Pillow does not read, and images whose names differ in the suffix alone."""
    for file in others:
        table.faults.add(OTHER_FORMAT, file.name)
    stems = Counter(file.with_suffix("") for file in images)
    for file in images:
        if stems[file.with_suffix("")] > 1:
            table.faults.add("{} images share a label file with another of their name", file.name)


def voc_parts(folder: Path) -> dict[str, Path]:
    """The folders of splits that have XML files, by name."""
    names = {name for split in SPLITS.values() for name in split}
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    return {c.name: c for c in children if c.name.casefold() in names and any(c.glob("*.xml"))}


def is_voc_folder(folder: Path) -> bool:
    """Whether a folder has VOC's own layout, spelled so even where case makes no difference, or that of parts."""
    spelled = (folder / "ImageSets" / "Main").is_dir() and folder / "Annotations" in folder.iterdir()
    return spelled or bool(voc_parts(folder))


def read_voc(request: Request) -> Table:
    """Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt; or train/ with XML files beside the images.

    An XML file belongs to the image of the same name; an image without one has no objects. Corners count pixels from 1,
    and belong to the box (Everingham et al., IJCV 2010). Objects marked difficult become crowds, which training and
    evaluation ignore. Classes are those of all splits, in alphabetical order, numbered from 1.

    Raises:
        InputError: no such split, or an XML file that cannot be read.
    """
    folder, parts, sets = Path(request.data), voc_parts(Path(request.data)), Path(request.data, "ImageSets", "Main")
    if sets.is_dir():
        split = find_split(request.split, (file.stem for file in sets.glob("*.txt")), sets)
        labels, images, parts = folder / "Annotations", folder / "JPEGImages", {"": folder / "Annotations"}
    else:
        split = find_split(request.split, parts, folder)
        labels = images = parts[split]
    trees = {file: _read_xml(file) for part in parts.values() for file in sorted(part.rglob("*.xml"))}
    names = {name for _, objects in trees.values() for name, *_ in objects} - {""}
    classes = {name: number for number, name in enumerate(sorted(names), 1)}
    numbered = {number: name for name, number in classes.items()}
    table = Table(str(folder), images, numbered, "xyxy", request.layout, split, upright=True, own_ids=False)
    found, others = find_images(images, subfolders=True)
    _note_files(table, found, others)
    by_stem = {_stem(file, images): file for file in found}
    every = by_stem.keys() | {_stem(file, labels) for file in trees if file.is_relative_to(labels)}
    lines = read_lines(sets / f"{split}.txt") if sets.is_dir() else sorted(every)
    for number, line in enumerate(lines, 1):
        stem = re.sub(r"\s+-?[01]$", "", line.replace("\\", "/"))
        size, objects = trees.get(labels / f"{stem}.xml", ((0, 0), None))
        if stem not in by_stem:
            table.faults.add("left out {} entries without an image", stem)
        elif add_file(table, number, by_stem[stem], by_stem[stem].relative_to(images).as_posix(), size):
            if objects is None:
                table.faults.add("took {} images without an XML file for images without objects", by_stem[stem].name)
            for name, crowd, left, top, right, bottom in objects or ():
                table.add(number, classes.get(name, UNNAMED), left - 1, top - 1, right, bottom, crowd, 0)
    return table


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _read_xml(file: Path) -> tuple[tuple[int, int], list[tuple]]:
    """(width, height), zeros where it has none; and name, crowd, xmin, ymin, xmax, ymax of each box."""
    try:
        tree = ElementTree.parse(file).getroot()  # noqa: S314 (expat limits entities and opens no other file)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise InputError(f"cannot read {file} (is it UTF-8, or does it name its encoding?): {error}") from error
    objects = []
    for thing in tree.iter("object"):
        name, crowd = (thing.findtext("name") or "").strip(), (thing.findtext("difficult") or "").strip().lower()
        for box in thing.findall("bndbox") or [thing]:
            corners = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((name, crowd in ("1", "true"), *corners))
    width, height = (_number(tree, f"size/{side}") for side in ("width", "height"))
    return (int(width) if width > 0 else 0, int(height) if height > 0 else 0), objects


def _number(element: ElementTree.Element, name: str) -> float:
    try:
        return as_float(float(element.findtext(name) or "nan"))
    except ValueError:
        return float("nan")
