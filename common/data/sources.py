"""What `--data` names -> `DetectionData`: one reader recognises it, fills a table, and N usable images are taken."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from common.cli import flag
from common.console import InputError, first_few
from common.data import readers
from common.data.checks import check_images, sketches_of
from common.data.copies import find_copies
from common.data.demo import read_demo
from common.data.hold_out import choose_held_out
from common.data.hub import is_hub_data, read_hub
from common.data.memory import DetectionData
from common.data.official import read_official
from common.data.readers import Request
from common.data.table import LAYOUTS, Faults, Table

log = logging.getLogger(__name__)
TEST_NOTE = "used the test split for validation, as there is no val, valid, validation or dev"
COMPARED = 5000  # training images, which an evaluation decodes where no training did
NO_OBJECT = "of its {} boxes none is an object (crowds, in VOC difficult, are not)"


@dataclass(frozen=True)
class Reader:
    """One form of data sets."""

    form: str  # as messages and docs name it
    recognises: Callable[[str], bool]  # given --data, of which it opens no file
    read: Callable[[Request], Table]
    ranks: bool = True  # False: N images are the first N of its own order


READERS = (
    Reader("demo", lambda data: data == "demo", read_demo),
    Reader("coco-official", lambda data: data == "coco-official", read_official, ranks=False),
    Reader("COCO", lambda data: bool(readers.coco_files(Path(data))), readers.read_coco),
    Reader("YOLO", lambda data: readers.yaml_of(data) is not None, readers.read_yolo),
    Reader("YOLO with a list of classes", lambda data: bool(readers.class_lists(data)), readers.read_yolo_folder),
    Reader("Pascal VOC", lambda data: bool(readers.voc_parts(Path(data))), readers.read_voc),
    Reader("hub data set", is_hub_data, read_hub, ranks=False),
)


@dataclass(frozen=True)
class DataFlags:
    """Images and annotations."""

    data: str = flag("detection-datasets/coco", "folder, hub data set id, coco-official, or demo")
    val_json: str = flag("", "validation annotations, where the folder has no known layout")
    val_images_dir: str = flag("", "the folder of their images")
    val_images: int = flag(500, "validation images; 0 = all", at_least=0)
    image_ids: str = flag("", "file of the images to take, a line each: train or val, and the id")
    sample_seed: int = flag(0, "of the sample where not all images are taken; -1 = the first ones", at_least=-1)
    box_format: str = flag("", "how the boxes are written, where not as their form says", choices=LAYOUTS)
    hold_out: float = flag(
        0.2, "share of the images to validate on, where the data have no validation part", at_least=0.01, at_most=0.9
    )
    strict: bool = flag(False, "stop where data would have to be left out or are doubtful")

    def files(self, split: str) -> tuple[str, str]:
        """Annotation file and image folder that the flags name for a split; empty where they name none."""
        return getattr(self, f"{split}_json", ""), getattr(self, f"{split}_images_dir", "")


@dataclass(frozen=True)
class TrainDataFlags(DataFlags):
    """Training images and annotations."""

    train_json: str = flag("", "training annotations, where the folder has no known layout")
    train_images_dir: str = flag("", "the folder of their images")
    train_images: int = flag(1000, "training images; 0 = all", at_least=0)


def is_fetched(flags: DataFlags) -> bool:
    """Whether the training images come over the network, which are those that have an order of their own."""
    return not _reader(flags, "train")[0].ranks


def load_train_and_val(flags: TrainDataFlags) -> tuple[DetectionData, DetectionData]:
    """The training and the validation images. Raises InputError: what `load_split` and `check_classes` raise."""
    if any(flags.files("train")) != any(flags.files("val")):
        raise InputError("--train-json and --val-json go together: give the files of both parts, or of none")
    train = load_split(flags, "train")
    val = load_split(flags, "val", told=[(train.source, note) for note in train.notes])
    check_classes(train, val, strict=flags.strict)
    return train, val


def load_split(flags: DataFlags, split: str, told: Sequence[tuple[str, str]] = ()) -> DetectionData:
    """N usable images of a `split`, "train", "val" or "test": `--train-images` or `--val-images` (0 = all).

    They are the first usable ones of a `ranking`, so that more images contain fewer, and added ones move none; or those
    of `--image-ids`. What was left out or is doubtful is logged, but for the sources and notes that were `told`, as of
    a whole data set with its training part.

    Raises InputError: no such data, or in another form; with `--strict`, anything left out or doubtful.
    """
    data, total = _read_split(flags, split)
    if len(data) < total:
        part = split.replace("test", "val")
        log.info(f"{data.source}: {len(data):,} of {total:,} images (--{part}-images 0 takes all)")
    _tell(data.source, [note for note in data.notes if (data.source, note) not in told], flags.strict)
    return data


def _tell(source: str, notes: Sequence[str], strict: bool) -> None:
    if strict and notes:
        raise InputError(f"{source}: {'; '.join(notes)} (refused by --strict)")
    for note in notes:
        log.warning(f"{source}: {note}")


def _read_split(flags: DataFlags, split: str) -> tuple[DetectionData, int]:
    """The images as in `load_split`, and of how many they are taken."""
    reader, request = _reader(flags, split)
    table = reader.read(request)
    table.given = flags.box_format
    if split == "val" and table.split.casefold() == "test":
        table.faults.add(TEST_NOTE)
    data = table.check()
    if table.whole and not request.chosen:
        whole, held_out = data, choose_held_out(data, flags.hold_out)
        data = whole.select(np.nonzero(held_out if split == "val" else ~held_out)[0])
        if split == "val":
            what = f"{len(data):,} of its {len(whole):,} images are held out (--hold-out {flags.hold_out:g})"
            log.info(f"{data.source} has no validation part: {what}, fingerprint {data.fingerprint()}")
    count = len(request.chosen) or request.limit or len(data)
    if request.chosen:
        order = _listed(data, request.chosen)
    else:
        order = ranking(data, split, flags.sample_seed if reader.ranks and count < len(data) else -1)
    taken = _take(data, order, count, in_order=bool(request.chosen))
    if split != "train" and taken.crowd.all():
        problem = f"{NO_OBJECT.format(len(taken.crowd))}, so that mAP cannot be computed; take more images"
        taken = replace(taken, notes=(*taken.notes, problem))
    return taken, len(data) if count < len(order) else 0


def _reader(flags: DataFlags, split: str) -> tuple[Reader, Request]:
    """The only reader that recognises the data, and what it is asked for."""
    part = split.replace("test", "val")  # which has the flags of validation
    files, limit, place = flags.files(part), getattr(flags, f"{part}_images"), Path(flags.data)
    if bool(files[0]) != bool(files[1]):
        raise InputError(f"--{part}-json and --{part}-images-dir go together: give both or neither")
    found = [r for r in READERS if (r.read is readers.read_coco if files[0] else r.recognises(flags.data))]
    forms = [reader.form for reader in found or READERS]
    if not found:
        deeper = ((p, r) for p in sorted(place.glob("*/")) for r in READERS if r.recognises(str(p)))
        given = next((f"its folder {p.name} is {r.form}: give that" for p, r in deeper), readers.describe_folder(place))
        raise InputError(f"--data {place} ({given}) is in none of the forms {', '.join(forms)}")
    if len(found) > 1:
        raise InputError(f"--data {place} is {' and '.join(forms)}: name a data.yaml there, or give --train-json")
    if not found[0].ranks and flags.sample_seed > 0:
        raise InputError(f"--sample-seed has no effect on {forms[0]}, whose images are taken in its own order")
    chosen = read_chosen(Path(flags.image_ids), split) if flags.image_ids else ()
    if 0 < limit < len(chosen):
        raise InputError(f"{flags.image_ids} names {len(chosen)} {split} images: give --{part}-images 0 with it")
    return found[0], Request(flags.data, split, files, limit, chosen)


def read_chosen(path: Path, split: str) -> tuple[str, ...]:
    """The ids or names of a split's images in a file with lines such as "train 9" and "val b.jpg"; # begins a comment.

    Raises InputError: no such file, a line of another form, an image named twice, or no image of that split.
    """
    lines = [line.partition("#")[0].split(maxsplit=1) for line in readers.read_lines(path)]
    for words in filter(None, lines):
        if len(words) < 2 or words[0] not in readers.SPLITS:
            raise InputError(f"{path}: the line {' '.join(words)!r} is no train or val with an image's id or name")
    chosen = [words[1].strip() for words in lines if words and words[0] == split]
    if len(set(chosen)) < max(1, len(chosen)):
        what = "names an image twice" if chosen else f"names no {split} images"
        raise InputError(f"{path} {what}: list each once")
    return tuple(chosen)


def ranking(data: DetectionData, split: str, seed: int) -> np.ndarray:
    """(P,) int64 indices of the images in the order of a hash of seed, split and file name; -1 = as they are."""
    if seed < 0:
        return np.arange(len(data))
    keys = (f"{seed}/{split}/{image.path.name}" for image in data.images)
    hashes = [blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys]
    return np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")


def _listed(data: DetectionData, chosen: tuple[str, ...]) -> np.ndarray:
    """The indices of the images with these names, each of one image, or these ids, unless ids are positions."""
    index_of = {str(image.id): index for index, image in enumerate(data.images)} if data.own_ids else {}
    names = Counter(image.path.name for image in data.images)
    index_of |= {image.path.name: index for index, image in enumerate(data.images) if names[image.path.name] == 1}
    if missing := [key for key in chosen if key not in index_of]:
        advice = "" if data.own_ids else f": they have no ids, give names such as {data.images[0].path.name}"
        some = f"{len(missing)} of the {len(chosen)} requested images ({first_few(missing)})"
        raise InputError(f"{data.source} lacks {some}{advice}")
    return np.array([index_of[key] for key in chosen])


def _take(data: DetectionData, order: np.ndarray, count: int, in_order: bool = True) -> DetectionData:
    """The first `count` images of an order that can be used: in this order, or in that of the data set."""
    good, faults, tried = list[int](), Faults(), 0
    while tried < len(order) and len(good) < count:
        part = order[tried : tried + count - len(good)].tolist()
        tried += len(part)
        checks = check_images([data.images[index] for index in part], data.source)
        for index, (fault, doubts, _) in zip(part, checks, strict=True):
            for sentence in filter(None, (fault, *doubts)):
                faults.add(sentence, data.images[index].path.name)
            good += [index] * (not fault)
    notes = (*data.notes, *faults.notes())
    if not good:
        raise InputError(f"{data.source}: no image can be used: {'; '.join(notes)}")
    return replace(data.select(np.array(good if in_order else sorted(good))), notes=notes)


def check_classes(train: DetectionData, val: DetectionData, *, strict: bool = False) -> None:
    """Log the classes without an object to learn from, those of validation alone, and copies of training images.

    Raises InputError: no object to train on, images in both parts, or no class in common; with `strict`, a warning.
    """
    if train.crowd.all():
        raise InputError(f"{train.source}: {NO_OBJECT.format(len(train.crowd))}; there is nothing to learn")
    train_files, val_files = ({str(image.path.resolve()) for image in data.images} for data in (train, val))
    if both := sorted(train_files & val_files):
        what = f"{len(both)} of the {len(val)} validation images are training images"
        raise InputError(f"{what}: give others ({first_few(both, 200)})")
    if not set(train.class_names) & set(val.class_names):
        names = f"{train.class_names[0]}, … and {val.class_names[0]}, …"
        raise InputError(f"{train.source} and {val.source} have no class in common: {names}")
    doubts = list[str]()
    if unknown := [name for name in val.class_names if name not in train.class_names]:
        doubts.append(f"{len(unknown)} classes are not among those of {train.source} ({first_few(unknown)})")
    _tell_copies(train, val, strict, doubts)
    if unseen := [name for name, count in zip(train.class_names, train.class_counts(), strict=True) if not count]:
        advice = "take others with --train-images 0 or another --sample-seed"
        log.warning(f"{train.source}: no training image shows {len(unseen)} classes ({first_few(unseen)}): {advice}")


def _tell_copies(train: DetectionData, val: DetectionData, strict: bool, doubts: Sequence[str] = ()) -> int:
    """Log other doubts, and how many validation images are near-copies of training images, which is returned."""
    copies = [val.images[index].path.name for index, _ in find_copies(sketches_of(val), sketches_of(train))]
    some = [f"{len(copies)} images are copies of training images ({first_few(copies, 200)})"] * bool(copies)
    _tell(val.source, [*doubts, *some], strict)
    return len(copies)


def count_copies(flags: DataFlags, data: DetectionData) -> int | None:
    """How many of the images that are evaluated are near-copies of training images, of at most `COMPARED`.

    None where there are no training images, or they would have to be fetched. Raises InputError: any, with `--strict`.
    """
    given = {field.name: getattr(flags, field.name) for field in fields(DataFlags)}
    training = TrainDataFlags(**given, train_images=COMPARED)
    if flags.val_json or is_fetched(training):
        return None
    try:
        train = _read_split(training, "train")[0]
    except InputError:
        return None
    return _tell_copies(train, data, flags.strict)


def unlabelled_images(paths: Sequence[Path]) -> DetectionData:
    """The images of files and folders, numbered in the order given, without any classes and ground truth.

    What is left out is logged. Raises InputError: no such path, or none of the images can be read.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise InputError(f"no such image: {first_few(missing, 200)}")
    table = Table(", ".join(map(str, paths)), Path(), {1: "any"}, "xywh", upright=True)
    files = [file for path in paths for file in (readers.images_of(table, path) if path.is_dir() else [path])]
    for number, file in enumerate(files, 1):
        table.add_image(number, str(file))
    data = table.check()
    data = _take(data, np.arange(len(data)), len(data))
    for note in data.notes:
        log.warning(note)
    return replace(data, category_ids=(), class_names=())
