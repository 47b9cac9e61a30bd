"""Detect the objects in as many images as there are, and write them for other tools.

  python -m common.predict improved_dino2_detector.pth photos/            -> found/detections.jsonl, found/coco.json
  python -m common.predict detector.onnx day1/ names.txt --output found --formats coco yolo csv
  python -m common.predict detector.pth photos/ --formats label-studio --url-prefix "/data/local-files/?d=photos/"

SOURCES are image files, folders with all that is below them, and text files that name an image a line. The first line
of detections.jsonl describes the detector; then each image has one: its name below the folder, width, height, boxes
(xyxy pixels of the upright image), scores and classes, or `error` where it cannot be read. The same command goes on
where it was stopped, and takes in images that have been added.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common import cli
from common.cli import flag
from common.console import InputError, first_few, progress_bar
from common.data.readers import read_lines
from common.files import atomic_write, is_same_file
from common.images import OTHER_FORMAT, OTHER_SUFFIXES, find_images, image_suffixes, read_pixels
from common.model import TrainedDetector, load_detector
from common.predict.formats import FORMATS, LabelStudioFlags, check_stems
from common.predict.journal import Journal, state_of
from common.runtime import PRECISIONS, check_single_process


@dataclass(frozen=True)
class Settings(LabelStudioFlags):
    detector: str = flag("improved_dino2_detector.pth", "a checkpoint, or an export of one", positional=True)
    sources: tuple[str, ...] = flag((), "images, folders with their subfolders, text files of names", positional=True)
    output: str = flag("found", "the folder to write")
    formats: tuple[str, ...] = flag(("coco",), "what to write beside detections.jsonl", choices=tuple(FORMATS))
    min_score: float = flag(-1.0, "keep detections from this score on; below 0 = the operating point", at_most=1)
    batch_size: int = flag(8, "images at once", at_least=1)
    workers: int = flag(2, "threads that decode images", at_least=1)
    precision: str = flag("auto", "arithmetic of a checkpoint; auto = the fastest of this hardware", choices=PRECISIONS)


def find_sources(sources: Iterable[str]) -> dict[str, Path]:
    """The image files by their names below the folder, or beside the file, that was given; in the order of names.

    Raises InputError: a source that does not exist or has no images, or two images of one name.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        folder, files, others = source.parent, [source], list[Path]()
        if source.is_dir():
            folder, (files, others) = source, find_images(source, subfolders=True)
        elif source.suffix.lower() in OTHER_SUFFIXES:
            raise InputError(f"{source} is of a format that Pillow does not read")
        elif source.suffix.lower() not in image_suffixes():
            files = [folder / line for line in read_lines(source)]
        if not files or not source.exists():
            raise InputError(f"{source} has no images" if source.exists() else f"no such image or folder: {source}")
        if others:
            print(f"{source}: {OTHER_FORMAT.format(len(others))} ({first_few(others, 200)})")
        for file in files:
            name = Path(os.path.relpath(file, folder)).as_posix()
            if name != name.encode(errors="replace").decode():
                raise InputError(f"{file} has a name that is not UTF-8: rename it")
            if name.startswith("../"):
                raise InputError(f"{source} names {file}, not below its folder: write the list above its images")
            if (other := found.setdefault(name, file)) != file and not is_same_file(other, file):
                raise InputError(f"{other} and {file} would both be {name}: name the folder above both")
    return dict(sorted(found.items()))


def decoded(path: Path) -> Tensor | InputError:
    """The pixels of an image, or why there are none."""
    if path.exists() and not path.is_file():
        return InputError(f"{path} is no regular file")
    try:
        return read_pixels(path)
    except InputError as error:
        return error


def decoded_batches(
    files: dict[str, Path], names: Sequence[str], batch_size: int, workers: int
) -> Iterator[dict[str, Tensor | InputError]]:
    """Batches of images by their names; while one is in use the next is decoded."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: dict = {}
        for first in range(0, len(names) + batch_size, batch_size):
            now = names[first : first + batch_size]
            batch, ahead = ahead, {name: pool.submit(decoded, files[name]) for name in now}
            if batch:
                yield {name: image.result() for name, image in batch.items()}


def rows_of(
    detector: TrainedDetector, files: dict[str, Path], images: dict[str, Tensor | InputError], min_score: float
) -> Iterator[dict]:
    """The lines of a batch."""
    pixels = [image for image in images.values() if isinstance(image, Tensor)]
    found: Any = detector.predict(pixels, min_score, batch_size=len(images))
    for name, image in images.items():
        row: dict = {"file": name, "state": state_of(files[name])}
        if isinstance(image, InputError):
            yield row | {"error": str(image)}
        else:
            detections, (_, height, width) = found.pop(0), image.shape
            boxes = [[round(side, 2) for side in box] for box in detections.boxes.tolist()]
            scores = [round(score, 4) for score in detections.scores.tolist()]
            row |= {"width": width, "height": height, "boxes": boxes, "scores": scores}
            yield row | {"classes": detections.names}


def main(settings: Settings) -> Path:
    """Detect the objects in all images that the journal lacks, write the formats, and return the journal's path."""
    check_single_process()
    files = find_sources(settings.sources)
    if "yolo" in settings.formats:
        check_stems(files)
    detector = load_detector(settings.detector, precision=settings.precision)
    min_score = detector.min_score if settings.min_score < 0 else settings.min_score
    with Journal(Path(settings.output), settings.detector, detector, min_score, settings.batch_size) as journal:
        missing = journal.missing(files)
        if len(missing) < len(files):
            print(f"going on: {len(files) - len(missing)} of {len(files)} images are in {journal.path}")
        with progress_bar(len(missing), "detecting") as bar:
            for images in decoded_batches(files, missing, settings.batch_size, settings.workers):
                journal.append(rows_of(detector, files, images, min_score))
                bar.update(len(images))
        journal.sort()
        errors = sum(line.is_error for line in journal.lines.values())
        objects = f"{sum(len(row.get('boxes', ())) for row in journal.rows())} objects in {len(files) - errors} images"
        print(f"{journal.path}: {objects}, score {min_score:.2f} or more; {errors} images cannot be read")
        if errors == len(files):
            raise InputError(f"no image could be read: {next(journal.rows())['error']}")
        for name in dict.fromkeys(settings.formats):
            path, write = journal.path.with_name(FORMATS[name][0]), FORMATS[name][1]
            with atomic_write(path, "w") as file:
                write(journal, file, settings)
            print(f"written: {path}")
    return journal.path


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
