"""Other layouts of labelled images, read as the content of a COCO file: YOLO's text files, Pascal VOC's XML.

Both readers return (content, folder, notes): a dictionary with `images`, `annotations` and `categories`, the folder
that the file names are relative to, and what was left out or is doubtful. `table.coco_data` checks the content
as it checks a file. Boxes are on the images turned upright, unless a size in a VOC file says otherwise.
"""

import codecs
import math
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree

import yaml

from common.console import InputError
from common.data.table import Problems
from common.images import find_images, read_size

YAML_NAMES = ("data.yaml", "dataset.yaml", "data.yml")
NULLS = ("", "~", "null", "Null", "NULL")  # of YAML
VOC_SETS = ("ImageSets", "Main")
TEST_NOTE = "found no validation split and used the test split in its place"
OUTSIDE = 2.0  # normalised; a box or polygon that reaches so far is in other units
POSE_ADVICE = " (keypoints need kpt_shape in the YAML file)"
NO_LABEL_FILES = {"classes", "notes"}  # text files that annotation tools write beside the labels
NO_LABELS = "took {} images without a label file for images without objects"

Layout = tuple[dict, Path, tuple[str, ...]]  # content, folder, notes


def choose_split(names: Sequence[str], existing: Collection[str]) -> tuple[str | None, tuple[str, ...]]:
    """The first of the names that exists, None if there is none, and a note if it is "test"."""
    name = next((name for name in names if name in existing), None)
    return name, (TEST_NOTE,) if name == "test" else ()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 or UTF-16 text file that are not empty, with any line ends, without a byte order mark.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def find_yaml(folder: Path) -> Path | None:
    """The YAML file of a YOLO data set: the path itself, or the one in the folder."""
    if folder.suffix.lower() in (".yaml", ".yml"):
        return folder if folder.is_file() else None
    return next((folder / name for name in YAML_NAMES if (folder / name).is_file()), None)


def read_yolo(path: Path, split_names: Sequence[str], limit: int = 0) -> Layout:
    """A split of a YOLO data set: `path`, `train`, `val` and `names` in a YAML file, a text file for each image.

    A line holds a class number and then, in normalised coordinates, centre, width and height of a box, or the corners
    of a polygon, whose bounding box is taken. With `kpt_shape` in the YAML file, keypoints follow the box. The text
    file lies beside the image, the last `images` in its path replaced by `labels`; an image without one has no
    objects. Class numbers become category ids.

    Args:
        path: the YAML file.
        split_names: what it may call the split.
        limit: the first images in the order of their names; 0 for all.

    Raises:
        InputError: not such a file, no images where it points, or no label file for any image.
    """
    problems = Problems()
    settings = _read_yaml(path)
    names = _class_names(settings.get("names"), path)
    keypoints = _keypoint_columns(settings.get("kpt_shape"), path)
    split, notes = choose_split(split_names, settings)
    if split is None:
        raise InputError(f"{path} names no {split_names[0]} images: it has {', '.join(map(str, settings))}")
    base = path.absolute().parent
    root = base / settings.get("path", "")
    files = _listed_images(settings[split], root if root.is_dir() else base, path, problems)
    labels = _label_files(files, problems)
    files = files[: limit or None]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    images, annotations = [], []
    for number, file in enumerate(files, 1):
        width, height = read_size(file) or (0, 0)
        name = file.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        if file not in labels:
            problems.add(NO_LABELS, name)
            continue
        for line in read_lines(labels[file]):
            category, box, problem = _yolo_box(line, keypoints)
            if problem:
                problems.add(problem, labels[file].name)
            if box:
                x, y, w, h = box
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                annotations.append(_annotation(number, category, box))
    return _content(images, annotations, names), folder, (*notes, *problems.notes())


def _annotation(image: int, category: int | None, box: list[float] | None, crowd: int = 0) -> dict:
    area = (box[2] * box[3] or None) if box else None
    return {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}


def _content(images: list[dict], annotations: list[dict], names: dict[int, str]) -> dict:
    """A COCO dictionary, the annotations numbered from 1."""
    annotations = [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)]
    categories = [{"id": number, "name": name} for number, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


class _TextLoader(yaml.SafeLoader):
    """Reads all scalars as text: yes, no, on and off, which YAML makes booleans, may be names of classes."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the library declares it so)


def _read_yaml(path: Path) -> dict:
    """The settings that are not null, as text, lists and dictionaries."""
    try:
        content = yaml.load(path.read_bytes(), _TextLoader)  # noqa: S506 (it is a SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not of a YOLO data set: it names nothing")
    return {key: value for key, value in content.items() if value and value not in NULLS}


def _class_names(names: object, path: Path) -> dict[int, str]:
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered or not all(isinstance(n, str) for n in numbered.values()):
        raise InputError(f"{path} is not of a YOLO data set: it has no names of classes")
    try:
        return {int(number): name for number, name in numbered.items()}
    except ValueError as error:
        raise InputError(f"{path}: the classes under names are not numbered: {error}") from error


def _keypoint_columns(shape: object, path: Path) -> int:
    """The number of columns that `kpt_shape` (keypoints, numbers of each) adds to a line."""
    try:
        return math.prod(map(int, shape)) if isinstance(shape, list) else 0
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: kpt_shape is not a list of whole numbers: {shape}") from error


def _listed_images(places: str | list, root: Path, path: Path, problems: Problems) -> list[Path]:
    """The images of folders, or of text files with one image a line."""
    images: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        target = _existing(root, str(place))
        if target.is_dir():
            found, skipped = find_images(target, subfolders=True)
            images += found
            for file, reason in skipped:
                problems.add(f"left out {{}} files of {reason}", file.name)
        elif target.is_file():
            images += [_existing(target.parent, line) for line in read_lines(target)]
        else:
            raise InputError(f"{path} names the images {place}, which are not in {root}")
    if not images:
        left_out = "".join(f"; {note}" for note in problems.notes())
        raise InputError(f"{path} names {places}, where there are no images{left_out}")
    return sorted(set(images))


def _existing(root: Path, name: str) -> Path:
    """The file or folder in `root`; exports often begin with a needless ../, or have the separators of Windows."""
    forward = name.replace("\\", "/")
    for variant in (name, name.removeprefix("../"), forward, forward.removeprefix("../")):
        for path in (Path(os.path.normpath(root / variant)), root / variant):  # these differ where links are followed
            try:
                if path.exists():
                    return path
            except OSError:  # a name that the file system cannot hold
                continue
    return root / name


def _label_files(images: Sequence[Path], problems: Problems) -> dict[Path, Path]:
    """The label file of each image that has one.

    Raises:
        InputError: no image has one.
    """
    by_folder: dict[Path, list[Path]] = {}
    for image in images:
        by_folder.setdefault(image.parent, []).append(image)
    labels: dict[Path, Path] = {}
    for folder, inside in by_folder.items():
        candidates = [(place, _files_by_stem(place, ".txt")) for place in _label_folders(folder)]
        place, texts = next((c for c in candidates if c[1]), (folder, {}))
        labels |= {image: texts[image.stem] for image in inside if image.stem in texts}
        without_image = texts.keys() - {image.stem for image in inside} - NO_LABEL_FILES if place != folder else set()
        if without_image:  # or the image is one that a list does not name
            without_image -= {file.stem for file in find_images(folder)[0]}
        for stem in sorted(without_image):
            problems.add("found no image for {} label files", texts[stem].name)
    if not labels:
        expected = _label_folders(images[0].parent)[0] / f"{images[0].stem}.txt"
        raise InputError(f"none of the {len(images)} images has a label file: there is no {expected}")
    return labels


def _label_folders(images: Path) -> list[Path]:
    """Where the labels of a folder of images may be: `labels` in place of `images`, in any case, or beside them."""
    places = [place for place, part in enumerate(images.parts) if part.lower() == "images"]
    if not places:
        return [images]
    parent, below = Path(*images.parts[: places[-1]]), images.parts[places[-1] + 1 :]
    folders = [parent]
    for name in ("labels", *below):
        children = [
            child for folder in folders for child in sorted(folder.iterdir()) if child.name.lower() == name.lower()
        ]
        folders = [child for child in children if child.is_dir()]
    return [parent.joinpath("labels", *below), *folders, images]


def _files_by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder with that suffix, in small or capital letters, by their names without it."""
    if not folder.is_dir():
        return {}
    files = sorted(f for f in folder.iterdir() if f.name.lower().endswith(suffix) and not f.name.startswith("._"))
    return {file.stem: file for file in files}


def _yolo_box(line: str, keypoints: int) -> tuple[int, list[float] | None, str]:
    """Class and box (centre, width, height) of a line; what is wrong with the line, "" where nothing is."""
    columns = _columns(line)
    try:
        category, *numbers = map(float, columns)
    except ValueError:
        return 0, None, "left out {} label lines with columns that are not numbers"
    if not category.is_integer():
        return 0, None, "left out {} label lines whose class is not a whole number"
    note = ""
    if keypoints and len(numbers) != 4:
        if len(numbers) != 4 + keypoints:
            return 0, None, "left out {} label lines that do not have the columns of kpt_shape"
        numbers = numbers[:4]
    elif len(numbers) == 5:
        note = "ignored the sixth column of {} label lines, a confidence"
        if not 0 <= numbers.pop() <= 1:
            return 0, None, "left out {} label lines with a sixth column that is not a confidence in 0..1"
    if len(numbers) < 4 or len(numbers) % 2:
        return 0, None, f"left out {{}} label lines whose columns are neither a box nor a polygon{POSE_ADVICE}"
    if max(map(abs, numbers)) >= OUTSIDE:
        return 0, None, f"left out {{}} label lines with coordinates that are not normalised to 0..1{POSE_ADVICE}"
    if len(numbers) > 4:
        left, top, right, bottom = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
        numbers = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return int(category), numbers, note


def _columns(line: str) -> list[str]:
    """The columns of a label line, separated by spaces, commas or semicolons; numbers may have decimal commas."""
    if "," not in line and ";" not in line:
        return line.split()
    if "." not in line and len(re.findall(r"\d,\d", line)) > 1 and len(line.split()) > 4:
        line = line.replace(",", ".")
    return re.split(r"[\s,;]+", line.strip(" \t,;"))


def is_voc(folder: Path) -> bool:
    """Whether this is a Pascal VOC data set: Annotations and JPEGImages, or splits with XML files beside the images."""
    return (folder / "Annotations").is_dir() or any(_files_by_stem(split, ".xml") for split in folder.iterdir())


def read_voc(folder: Path, split_names: Sequence[str], limit: int = 0) -> Layout:
    """A split of a Pascal VOC data set, in VOC's own layout or with a folder for each split.

    VOC's own: Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt and val.txt. An XML file belongs to the image
    of the same name, and only where there is none to the one that its <filename> names. An image without an XML file
    has no objects. Corners count pixels from 1, and belong to the box (Everingham et al., IJCV 2010). Objects marked
    difficult become crowds, which training and evaluation ignore. Classes are those of all splits, in alphabetical
    order, numbered from 1.

    Raises:
        InputError: no such split, no XML file with an image, or an XML file that cannot be read.
    """
    problems = Problems()
    if (folder / "Annotations").is_dir():
        files, image_folder = _files_by_stem(folder / "Annotations", ".xml"), folder / "JPEGImages"
        everything = list(files.values())
        listed, notes = _voc_set(folder, split_names)
    else:
        by_split = {child.name: _files_by_stem(child, ".xml") for child in sorted(folder.iterdir())}
        split, notes = choose_split(split_names, [name for name, texts in by_split.items() if texts])
        if split is None:
            raise InputError(f"no {split_names[0]} split in {folder}: no folder of that name has XML files")
        files, image_folder, listed = by_split[split], folder / split, None
        everything = [file for texts in by_split.values() for file in texts.values()]
    names = sorted({_text(thing, "name") for file in everything for thing in _read_xml(file).iter("object")} - {""})
    number_of = {name: number for number, name in enumerate(names, 1)}
    if not names:
        raise InputError(f"{folder} has no objects in any of its {len(everything)} XML files")
    images, annotations = [], []
    pairs = _voc_pairs(files, image_folder, listed, problems)
    for number, (image, file) in enumerate(pairs[: limit or None], 1):
        tree = _read_xml(file) if file else None
        if tree is None:
            problems.add("took {} images without an XML file for images without objects", image.name)
        width, height = _voc_size(tree) or read_size(image) or (0, 0)
        images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        annotations += [
            _voc_object(thing, number, number_of) for thing in (() if tree is None else tree.iter("object"))
        ]
    categories = {number: name for name, number in number_of.items()}
    return _content(images, annotations, categories), image_folder, (*notes, *problems.notes())


def _voc_set(folder: Path, split_names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The lines of the list of a split's images, and notes."""
    sets = folder.joinpath(*VOC_SETS)
    split, notes = choose_split(split_names, [name for name in split_names if (sets / f"{name}.txt").is_file()])
    if split is None:
        raise InputError(f"no {split_names[0]} split in {folder}: no {'/'.join(VOC_SETS)}/{split_names[0]}.txt")
    return read_lines(sets / f"{split}.txt"), notes


def _voc_pairs(
    files: dict[str, Path], folder: Path, listed: list[str] | None, problems: Problems
) -> list[tuple[Path, Path | None]]:
    """The images of a split, each with its XML file or None.

    Args:
        files: all XML files by their stems.
        folder: the folder of the images.
        listed: lines that name the images of the split; None takes all.

    Raises:
        InputError: no XML file has an image.
    """
    found, skipped = find_images(folder)
    for image, reason in skipped if listed is None else ():
        problems.add(f"left out {{}} files of {reason}", image.name)
    by_stem: dict[str, list[Path]] = {}
    for image in found:
        by_stem.setdefault(image.stem, []).append(image)
    known = files.keys() | by_stem.keys()
    stems = sorted(files) if listed is None else [_listed_stem(line, known) for line in listed]
    pairs: dict[Path, Path | None] = {}
    for stem in stems:
        file = files.get(stem)
        match = _voc_image(stem, file, by_stem, files)
        if match is None:
            problems.add(f"left out {{}} entries without an image in {folder}", stem)
        elif match in pairs:
            problems.add("left out {} entries whose image an earlier one has", stem)
        else:
            pairs[match] = file
    if listed is None:
        pairs |= {image: None for image in found if image not in pairs and image.stem not in files}
    if not any(pairs.values()):
        reasons = "; ".join(problems.notes()) or "the split is empty"
        raise InputError(f"{folder}: no XML file has an image: {reasons}")
    return sorted(pairs.items()) if listed is None else list(pairs.items())


def _voc_image(stem: str, file: Path | None, by_stem: dict[str, list[Path]], files: dict[str, Path]) -> Path | None:
    """The image with the stem of an XML file, else the one that its <filename> names and that has no XML file."""
    named = _base_name(_text(_read_xml(file), "filename")) if file and len(by_stem.get(stem, ())) != 1 else ""
    images = by_stem.get(stem) or ([] if Path(named).stem in files else by_stem.get(Path(named).stem, []))
    return next((image for image in images if image.name == named), images[0] if images else None)


def _listed_stem(line: str, stems: Collection[str]) -> str:
    """The stem that a line of ImageSets names: all of it, or without a suffix or a last column of -1, 0 or 1."""
    names = [_base_name(line), _base_name(re.sub(r"\s+-?[01]$", "", line))]
    return next((stem for name in names for stem in (name, Path(name).stem) if stem in stems), names[1])


def _base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _read_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()  # noqa: S314 (expat limits entities and opens no other file)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(f"cannot read {file}: {error}") from error


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _voc_size(tree: ElementTree.Element | None) -> tuple[int, int] | None:
    """The (width, height) that an XML file gives, if it does."""
    if tree is None:
        return None
    try:
        width, height = (int(float(_text(tree, f"size/{side}"))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _voc_object(thing: ElementTree.Element, image: int, number_of: dict[str, int]) -> dict:
    category, crowd = number_of.get(_text(thing, "name")), int(_text(thing, "difficult") == "1")
    try:
        left, top, right, bottom = (float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return _annotation(image, category, None, crowd)
    return _annotation(image, category, [left - 1, top - 1, right - left + 1, bottom - top + 1], crowd)
