"""COCO JSON, YOLO text files and Pascal VOC XML -> `Table`. Only the documented forms are read, others are refused."""

import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from string import digits
from typing import TypeVar
from xml.etree import ElementTree

import yaml

from common.console import InputError, first_few, to_one_line
from common.data.table import NOTHING, Table
from common.images import OTHER_FORMAT, find_images, image_suffixes

log = logging.getLogger(__name__)
# What data sets call them, in any case; the first there is.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev", "test"), "test": ("test",)}
NAMES = {name for names in SPLITS.values() for name in names}
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\[\]\s0-9eE+.,-]*\]')  # most of COCO's files, and not used
LEADS_OUT = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^\w:")  # a path, on some system
YAML_NAMES = ("data.yaml", "dataset.yaml", "data.yml")
ROBOFLOW = "_annotations.coco.json"
XML = "[!.]*.xml"
COCO_BEGINS = re.compile(
    rb'(?s)(?!.*"categories"\s*:\s*{)(\xef\xbb\xbf)?\s*{(\s*"(info|licenses)"|.*"(images|annotations|categories)"\s*:\s*\[)'
)
ORIGINAL_VOC = re.compile(r"(the )?(pascal )?voc", re.IGNORECASE)  # its <database>: corners count from 1
OTHER_EXPORTS = (  # what labelling tools write, too: files, how one of them begins, and what to do
    ("*.json", rb'(?s)\s*\[.*"coordinates"', "CreateML's JSON: export YOLO, COCO or Pascal VOC"),
    ("*.json", rb'(?s)\s*\[.*"(data|image)"', "Label Studio's own JSON: export YOLO, COCO or Pascal VOC, with images"),
    ("*.json", rb'[^\[]*"shapes"', "labelme's files: export COCO or Pascal VOC, by labelme2coco.py or labelme2voc.py"),
    ("annotations.xml", b"", "CVAT's own XML: export COCO 1.0, with images"),
    ("*.json", rb'(?s).*"categories"\s*:\s*{', "Datumaro's JSON: export COCO 1.0, with images"),
    ("*.json", rb'(?s)\s*{.*("regions"|"_via_)', "VIA's JSON: export COCO, with images"),
    ("*.csv", b"", "a table of boxes: export COCO or YOLO, with images"),
    ("*.txt", rb"\s*\d+(\s[\d.]+){4}", "YOLO's text files without classes: name those in classes.txt, a line each"),
    ("*.zip", b"", "an archive: unpack it"),
)
TextLoader = type("TextLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})  # a class may be called no or on
TRIANGLE = 6  # numbers of a polygon of three corners
OUTSIDE = 2.0  # a fraction of an image's side that no box or polygon reaches
READING_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# (width, height) in a label file, zeros where it has none; and of each object category id, box and crowd.
Part = TypeVar("Part")
Labels = tuple[tuple[int, int], list[tuple[float, list[float], bool]]]


@dataclass(frozen=True)
class Request:
    """The images that are wanted of what `--data` names."""

    data: str
    split: str  # "train", "val" or "test"
    files: tuple[str, str] = ("", "")  # annotation file and images' folder, where flags name them
    limit: int = 0  # number of images; 0 = all
    chosen: tuple[str, ...] = ()  # ids or names of --image-ids


@contextmanager
def reading(path: object, form: str) -> Iterator[None]:
    """Raises InputError for what goes wrong where a file of this form is read."""
    try:
        yield
    except (*READING_ERRORS, yaml.YAMLError, ElementTree.ParseError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path} as {form}: {to_one_line(reason, 200)}") from error


def find_split(split: str, names: Iterable[str], source: object, mend: str = "") -> str:
    """The name that a data set gives to a split. Raises InputError, with a mend, where it has none."""
    given = sorted(set(names))
    for name in SPLITS[split]:
        if len(found := [spelled for spelled in given if spelled.casefold() == name]) > 1:
            raise InputError(f"{source} has {' and '.join(found)}: rename or remove one")
        if found:
            return found[0]
    raise InputError(f"{source} has no {split} split: it has {to_one_line(', '.join(given) or 'none', 200)}{mend}")


def take_part(table: Table, split: str, parts: Mapping[str, Part]) -> Part:
    """What stands for the wanted part of a data set, of all its parts by name; the table notes which it is.

    Without a validation part the training part, or a single one, is the whole. Raises InputError as `find_split`.
    """
    table.whole = split != "test" and not {name.casefold() for name in parts} & set(SPLITS["val"])
    is_single = table.whole and len(parts) == 1
    wanted = "train" if table.whole else split
    table.split = next(iter(parts)) if is_single else find_split(wanted, parts, table.source, f": name one {wanted}")
    for name in sorted(parts.keys() - {table.split}) if table.whole else ():
        table.faults.add("{} parts are not used, as they are neither for training nor for validation", name)
    return parts[table.split]


def describe_folder(folder: Path) -> str:
    """What is in a folder that no reader recognises, or the export to choose where a tool's own files are there."""
    if not folder.is_dir():
        return "a file: unpack an archive, and give the folder" if folder.exists() else "no such folder"
    for pattern, begins, advice in OTHER_EXPORTS:
        if any(re.match(begins, _first_bytes(file)) for place in ("", "*/") for file in folder.glob(place + pattern)):
            return advice
    return first_few(sorted(file.name for file in folder.iterdir())) or "empty"


def _first_bytes(file: Path) -> bytes:
    with reading(file, "a file"), file.open("rb") as stream:
        return stream.read(1000)


def read_lines(path: Path, *, empty: bool = False) -> list[str]:
    """The lines of a UTF-8 file (that are not empty). Raises InputError: no such file, or another encoding."""
    with reading(path, "UTF-8 text"):
        lines = map(str.strip, path.read_bytes().decode("utf-8-sig").splitlines())
        return [line for line in lines if line or empty]


def read_json_lines(path: Path) -> list:
    """The values in the lines of a file that grows, if it can be read, but not those that a killed run left half."""
    values = []
    with suppress(OSError), path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                values.append(json.loads(line))
    return values


def coco_files(folder: Path) -> dict[str, Path]:
    """annotations/instances_train2017.json and train/_annotations.coco.json by part, or else any of COCO's form."""
    files = {file.parent.name: file for file in folder.glob(f"*/{ROBOFLOW}")}
    files |= {file.stem.removeprefix("instances_"): file for file in folder.glob("annotations/instances_*.json")}
    if len(files) < 2:
        others = [file for pattern in ("*.json", "annotations/*.json") for file in folder.glob(pattern)]
        others = [file for file in others if file.name != "notes.json" and COCO_BEGINS.match(_first_bytes(file))]
        files |= {file.stem.removeprefix("instances_"): file for file in others}
    return files


def read_coco(request: Request) -> Table:
    """The files of flags, or the `coco_files` of a folder, whose images are in train2017/ or images/train2017/.

    Images may also be in folders without the year, in images/, or beside the file. Raises InputError: no such split, or
    parts of several years, which share images.
    """
    table = Table(request.files[0] or request.data, Path(), {}, "xywh")
    if request.files[0]:
        add_coco(table, Path(request.files[0]), [Path(request.files[1])])
        return table
    folder, files = Path(request.data), coco_files(Path(request.data))
    years = {name: name.rstrip(digits) for name in files if name.rstrip(digits).casefold() in NAMES}
    if len({name.removeprefix(part) for name, part in years.items()}) > 1:
        raise InputError(f"{folder}: its parts are of different years, which share images: name both by --train-json …")
    name = take_part(table, request.split, {years.get(name, name): name for name in files})
    path, table.source = files[name], str(files[name])
    own = [place for place in (folder / "images" / name, folder / name) if place.is_dir() and place != path.parent]
    add_coco(table, path, own[:1] or (folder / "images", folder, path.parent))
    return table


def add_coco(table: Table, path: Path, places: Sequence[Path] = (), prefix: str = "") -> None:
    """Add the images and objects of an annotation file in COCO's instances form.

    Images that are in none of the places are left out, unless `prefix` names the folder to which they may be fetched
    later. Where there are several places, the base name counts of a path that leads out of them. Roboflow's first
    category groups all others, of supercategory "none" and without boxes: it is no class.

    Raises InputError: no such file, or one of another form; no such folder.
    """
    if not prefix and not any(place.is_dir() for place in places):
        raise InputError(f"{path} needs the images' folder {places[0]}, which does not exist")
    with reading(path, "JSON in COCO's instances form"):
        if (megabytes := path.stat().st_size / 1e6) > 50:  # it takes seconds
            log.info(f"reading {path} ({megabytes:.0f} MB)")
        content = json.loads(POLYGONS.sub(b'"segmentation":0', path.read_bytes()))
        categories = {as_int(c["id"]): c for c in content["categories"]}
        if len(categories) < len(content["categories"]):
            raise ValueError("two categories share an id")
        used = {a["category_id"] for a in content["annotations"]}
        parents = {c.get("supercategory") for c in categories.values()}
        parents |= {categories[0]["name"]} if path.name == ROBOFLOW and 0 in categories else set()
        groups = {k for k, c in categories.items() if c.get("supercategory") == "none" and c["name"] in parents} - used
        table.classes |= {key: str(c["name"]) for key, c in categories.items() if key not in groups}
        for image in content["images"]:
            name, width, height = str(image["file_name"]), image.get("width") or 0, image.get("height") or 0
            if len(places) > 1 and LEADS_OUT.search(name):
                name = PureWindowsPath(name).name
            found = f"{prefix}/{name}" if prefix else next(filter(None, (find_file(p / name) for p in places)), None)
            if LEADS_OUT.search(name):
                table.faults.add("left out {} images whose file names lead out of their folder", name)
            elif found is None:
                table.faults.add("left out {} images that are not in the images' folder", name)
            else:
                table.add_image(as_int(image["id"]), str(found), (as_int(width), as_int(height)))
        for a in content["annotations"]:
            crowd = int(a.get("iscrowd") or 0) != 0
            table.add(as_int(a["image_id"]), as_int(a["category_id"]), a.get("bbox"), crowd, a.get("area") or 0)


def as_int(value: object) -> int:
    """A whole number. Raises ValueError for any other value, text and bool included."""
    if type(value) is int and abs(value) < 2**63:  # nearly all of millions of values
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    raise ValueError(f"{to_one_line(repr(value))} is not a whole number of 64 bits")


def find_file(path: Path) -> Path | None:
    """A file as the file system spells it: macOS decomposes accents, other locales know no UTF-8, Windows writes \\."""
    if path.is_file():
        return path
    path = Path(str(path).replace("\\", "/"))
    for folder, name in ((path.parent, path.name), (Path(), str(path))):
        for form in (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
            if (place := folder / os.fsdecode(form.encode(errors="surrogatepass"))).is_file():
                return place
    return None


def yaml_of(data: str) -> Path | None:
    """The YAML file of a YOLO data set: the path itself, or the one in the folder."""
    path = Path(data)
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    return next((path / name for name in YAML_NAMES if (path / name).is_file()), None)


def images_of(table: Table, folder: Path) -> list[Path]:
    images, others = find_images(folder, subfolders=True)
    for file in others:
        table.faults.add(OTHER_FORMAT, file.name)
    return images


def add_labelled(
    table: Table, images: list[Path], places: Callable[[Path], list[Path]], read: Callable[[Path], Labels]
) -> None:
    """Add images in this order, and the objects of the first label file that there is in the places of each.

    An image without one has no objects. Raises InputError where all images lack it.
    """
    labels = [next(filter(None, map(find_file, places(image))), None) for image in images]
    if not any(labels) and any(image.is_file() for image in images):
        what = f"no image of {table.split or 'it'} has a label file"
        raise InputError(f"{table.source}: {what}, such as {places(images[0])[0]}")
    users = Counter(labels)
    for number, (image, label) in enumerate(zip(images, labels, strict=True), 1):
        size, objects = read(label) if label else ((0, 0), [])
        if label is None:
            table.faults.add("took {} images without a label file for images without objects", image.name)
        elif users[label] > 1:
            table.faults.add("{} images share a label file with another of their name", image.name)
        table.add_image(number, str(image), size)
        for category, box, crowd in objects:
            table.add(number, category, box, crowd)


def read_yolo(request: Request) -> Table:
    """`path`, `train`, `val` and `names` in a YAML file, and a text file for each image.

    A line holds a class number and then, as fractions of the image's sides, centre, width and height of a box, or the
    corners of a polygon, whose bounding box is taken. With `kpt_shape` in the YAML file, keypoints follow the box.

    Raises InputError: not such a file, no images where it points, or a line of another form.
    """
    path = yaml_of(request.data) or Path(request.data)
    with reading(path, "the YAML file, in UTF-8, of a YOLO data set"):
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), TextLoader)  # noqa: S506 (it is a SafeLoader)
        names = content["names"]
        names = dict(enumerate(names)) if isinstance(names, list) else {int(k): v for k, v in names.items()}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("the names of its classes are no text")
        if content.get("nc") not in (None, "", str(len(names))):
            raise ValueError(f"its nc is {content['nc']}, but it names {len(names)} classes")
        points, columns, *_ = map(int, content.get("kpt_shape") or (0, 0))
        base = path.absolute().parent / Path(os.path.expanduser(content.get("path", "")))  # noqa: PTH111 (of no such user it stays)
        parts = {name: value for name, value in content.items() if value and name.casefold() in NAMES}
        there = {name for name in parts if any(place.exists() for place in _places(base, parts[name]))}
    table = Table(str(path), Path(), names, "cxcywh", upright=True, own_ids=False)
    take_part(table, request.split, {name: parts[name] for name in parts if name in there or not there})
    for name in parts.keys() - there if table.whole else ():  # Roboflow's exports name all
        table.faults.add("of the parts that it names, {} do not exist", name)
    _add_yolo(table, _yolo_images(table, content, base), points * columns)
    return table


def class_lists(data: str) -> list[Path]:
    names = ("classes.txt", "obj.names", *["labels/classes.txt"] * (yaml_of(data) is None))
    return [Path(data, name) for name in names if Path(data, name).is_file()]


def read_yolo_folder(request: Request) -> Table:
    """Class names in classes.txt or obj.names, a line each, or with their numbers in notes.json, and text files.

    The images are in images/ or obj_train_data/, or beside the list. Raises InputError as `read_yolo` does.
    """
    folder, (path, *more) = Path(request.data), class_lists(request.data)
    if more:
        raise InputError(f"{folder} has {path.name} and {more[0].name}: rename or remove one")
    names = {number: line for number, line in enumerate(read_lines(path, empty=True)) if line}
    if (notes := folder / "notes.json").is_file():
        with reading(notes, "the classes of Label Studio"):  # whose classes.txt may be in another order
            names = {int(c["id"]): str(c["name"]) for c in json.loads(notes.read_bytes())["categories"]}
    parts = {place.name[4:-5]: place for place in folder.glob("obj_*_data")}
    parts |= {place.name: place for place in folder.glob("images/*/") if place.name.casefold() in NAMES}
    parts = parts or {"": folder / "images" if (folder / "images").is_dir() else folder}
    table = Table(str(folder), Path(), names, "cxcywh", upright=True, own_ids=False)
    _add_yolo(table, images_of(table, take_part(table, request.split, parts)))
    return table


def _add_yolo(table: Table, images: list[Path], keypoints: int = 0) -> None:
    """Add the images with the objects of their text files, which have so many numbers of keypoints behind a box."""
    counts = dict[int, Path]()

    def read(label: Path) -> Labels:
        lines = [_read_label(line, keypoints, label) for line in read_lines(label)]
        counts.update({count: label for *_, count in lines})
        return (0, 0), [(category, box, False) for category, box, _ in lines]

    add_labelled(table, images, label_places, read)
    for folder in dict.fromkeys(image.parent for image in images):
        for apart in label_places(folder / "classes.txt")[:-1]:  # beside images other texts may lie
            known = {apart.stem} | {_stem(file, folder) for file in folder.glob("*")}
            for stem in sorted({_stem(file, apart.parent) for file in apart.parent.glob("*.txt")} - known):
                table.faults.add("left out {} label files without an image", f"{stem}.txt")
    if max(counts, default=0) == TRIANGLE:
        raise InputError(f"{counts[TRIANGLE]} has lines of 7 columns, perhaps predictions (confidence, track): keep 5")


def _yolo_images(table: Table, content: dict, base: Path) -> list[Path]:
    """The images of folders, of text files with one image a line, or named one by one."""
    images, places = list[Path](), content[table.split]
    # Roboflow writes ../train/images, for a folder beside the YAML file; others mean one beside its folder
    outside = [text.removeprefix("../") for text in map(str, content.values()) if text.startswith("../")]
    is_inside = any(_normal(base, name).exists() for name in outside)
    for name in map(str, places if isinstance(places, list) else [places]):
        existing = [place for place in dict.fromkeys(_places(base, name)) if place.exists()]
        if len(existing) != 1 or (is_inside and existing[0] != _places(base, name)[0]):
            what = " or ".join(map(str, existing)) or f"nothing in {base}"
            raise InputError(f"{table.source} names the images {name}, which is {what}: write that path in full")
        (place,) = existing
        if place.is_dir():
            images += images_of(table, place)
        elif place.suffix.lower() in image_suffixes():
            images.append(place)
        else:
            images += [_listed(place.parent, line) for line in read_lines(place)]
    return sorted(images)


def _places(base: Path, names: object) -> list[Path]:
    """Where the places that a YAML file names may be: each first in the folder of the file, then where it leads."""
    given = map(str, names if isinstance(names, list) else [names])
    return [_normal(base, place) for name in given for place in (name.removeprefix("../"), name)]


def _listed(folder: Path, line: str) -> Path:
    """The image of a line, without its first folder where that does not exist: CVAT writes data/."""
    places = [_normal(folder, line), _normal(folder, re.sub(r"^[^/\\]+[/\\]", "", line))]
    return next(filter(None, map(find_file, places)), places[0])


def _normal(folder: Path, name: str) -> Path:
    return Path(os.path.normpath(folder / name.replace("\\", "/")))


def label_places(image: Path) -> list[Path]:
    """Where the label file of an image may be: `labels` in place of the last `images` in its path, or beside it."""
    beside = image.with_suffix(".txt")
    parts = [place for place, part in enumerate(image.parts[:-1]) if part.lower() == "images"]
    return [Path(*beside.parts[:place], "labels", *beside.parts[place + 1 :]) for place in parts[-1:]] + [beside]


def _read_label(line: str, keypoints: int, path: Path) -> tuple[int, list[float], int]:
    """The class in a line, and centre, width and height of its box or polygon, of so many numbers.

    Raises InputError for another line.
    """
    with reading(f"the line {line[:60]!r} of {path}", "a label"):
        words = line.split()
        if len(words) == 6 and words[5].isdecimal():  # CVAT's track; a confidence is no whole number
            words.pop()
        category, *numbers = map(float, words)
        count = len(numbers)
        if not category.is_integer():
            raise ValueError("its class is not a whole number")
        if not all(abs(number) < OUTSIDE for number in numbers):
            raise ValueError("its numbers are not fractions of the image's sides, 0..1")
        if count not in (4, 4 + keypoints) if keypoints else count < 4 or count % 2:
            raise ValueError("it has not the columns of a box (5; these may be predictions), a polygon or kpt_shape")
    if keypoints or count == 4:
        return int(category), numbers[:4], 4
    ranges = [(min(side), max(side)) for side in (numbers[::2], numbers[1::2])]
    return int(category), [(low + high) / 2 for low, high in ranges] + [high - low for low, high in ranges], count


def voc_parts(folder: Path) -> dict[str, Path]:
    """The folders of XML files by split, or "": Annotations, or those of the images."""
    inside = folder.iterdir() if folder.is_dir() else ()
    if own := [place for place in inside if place.name.lower() == "annotations" and any(place.rglob(XML))]:
        return {"": own[0]}
    files = [*folder.glob(XML), *folder.glob(f"*/{XML}")]  # macOS keeps attributes of a.xml in ._a.xml
    parts = {file.parent.name: file.parent for file in files if file.parent.name.casefold() in NAMES}
    images = {image.with_suffix("") for image in find_images(folder, subfolders=True)[0]} if files else ()
    return parts or ({"": folder} if any(file.with_suffix("") in images for file in files) else {})


def read_voc(request: Request) -> Table:
    """Annotations/*.xml, JPEGImages/ or images/, and ImageSets/Main/train.txt, if any; or XML files beside the images.

    An XML file belongs to the image of the same name. Objects marked difficult become crowds, which training and
    evaluation ignore. Classes are those of all splits, in alphabetical order, numbered from 1.

    Raises InputError: no such split, or an XML file of another form.
    """
    folder = Path(request.data)
    parts, lists = voc_parts(folder), {file.stem: file for file in folder.glob("ImageSets/Main/[!.]*.txt")}
    table = Table(str(folder), Path(), {}, "xyxy", upright=True, own_ids=False)
    part = take_part(table, request.split, lists or parts)
    labels = images = parts.get("", folder) if lists else part
    if labels.parent == folder and "" in parts:
        images = next(place for place in (folder / "JPEGImages", folder / "images", folder) if place.is_dir())
    content = {file: _read_xml(file) for place in parts.values() for file in place.rglob(XML)}
    names = {name for _, objects in content.values() for name, *_ in objects} - {""}
    table.classes = dict(enumerate(sorted(names), 1))
    numbers = {name: number for number, name in table.classes.items()}
    by_stem = dict[str, list[Path]]()
    for image in images_of(table, images):
        by_stem.setdefault(_stem(image, images), []).append(image)
    stems = sorted({_stem(file, labels) for file in content if file.is_relative_to(labels)} | by_stem.keys())
    if lists:
        stems = [unicodedata.normalize("NFC", line.replace("\\", "/")) for line in read_lines(part)]
    for stem in stems:
        if stem not in by_stem:
            table.faults.add("left out {} entries without an image", stem)

    def read(label: Path) -> Labels:
        size, objects = content.get(label) or _read_xml(label)
        return size, [(numbers.get(name, NOTHING), box, crowd) for name, box, crowd in objects]

    found = [image for stem in stems for image in by_stem.get(stem, ())]
    add_labelled(table, found, lambda image: [labels / f"{_stem(image, images)}.xml"], read)
    return table


def _stem(file: Path, folder: Path) -> str:
    return unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix())


def _read_xml(file: Path) -> tuple[tuple[int, int], list[tuple[str, list[float], bool]]]:
    """(width, height), zeros where it has none; and name, box xyxy from 0, and crowd, of each object.

    Only the original VOC counts pixels from 1, and its last one belongs to the box (Everingham et al., IJCV 2010).
    """
    objects = []
    with reading(file, "XML in UTF-8, or in the encoding that it names"):
        tree = ElementTree.parse(file).getroot()  # noqa: S314 (expat limits entities and opens no other file)
        for thing in tree.iter("object"):
            name = unicodedata.normalize("NFC", thing.findtext("name", "").strip())
            mark = thing.findtext("difficult", "").strip().lower() or "0"
            crowd = mark in ("true", "yes") or (mark not in ("false", "no", "unspecified") and float(mark) != 0)
            for box in thing.findall("bndbox") or [thing]:
                left, top, right, bottom = (float(box.findtext(c) or "nan") for c in ("xmin", "ymin", "xmax", "ymax"))
                objects.append((name, [left, top, right, bottom], crowd))
        corners = [number for _, box, _ in objects for number in box]
        if ORIGINAL_VOC.match(tree.findtext("source/database", "")) and all(c % 1 == 0 and c >= 1 for c in corners):
            objects = [(name, [left - 1, top - 1, *rest], crowd) for name, (left, top, *rest), crowd in objects]
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        return (width, height), objects
