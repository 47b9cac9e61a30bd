"""Images: finding files, their sizes and EXIF orientation, decoding, and scaling for a detector."""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from common.console import InputError, last_line
from common.types import InputSize

URL_TIMEOUT_S = 30
ROUNDING = 1e-4  # by which floating-point pixels may exceed 0..1, where their type is not coarser
FEW = 1e-3  # the share of broken pixels that may be bright in a nearly black image
DECODING = f"{Image.__version__} {sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"  # changes where pixels may
ORIENTATION = 0x0112  # EXIF's tag: 1 upright, 2 to 8 how to turn or mirror the stored pixels, 5 to 8 by a quarter
# Formats that Pillow recognises and others decode, and files of image editors and icons beside the images.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF", "PSD", "ICO", "CUR", "ICNS"}
OTHER_SUFFIXES = set(".heic .heif .hif .jxl .exr .hdr .svg .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split())
OTHER_FORMAT = "left out {} files of an image format that Pillow does not read"
Source = Path | BinaryIO | Image.Image
# What Pillow's decoders raise at damaged files, beside struct.error.
DECODING_ERRORS = (OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, RuntimeError)


class ImageFault(InputError):
    """An image that cannot be used; `sentence` counts such images, with {} for their number."""

    def __init__(self, message: str, sentence: str = "left out {} images that cannot be read"):
        super().__init__(message)
        self.sentence = sentence


def find_images(folder: Path, subfolders: bool = False) -> tuple[list[Path], list[Path]]:
    """The image files of a folder that Pillow reads, by their suffix, in the order of their paths; and the others.

    Symbolic links are followed, hidden files and subfolders are left out.
    """
    files, visited = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))] if subfolders else []
        if (real := os.path.realpath(place)) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        files += [Path(place, name) for name in names if not name.startswith(".")]
    images = sorted(file for file in files if file.suffix.lower() in image_suffixes())
    return images, sorted(file for file in files if file.suffix.lower() in OTHER_SUFFIXES - image_suffixes())


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of the formats that Pillow reads, each with its dot."""
    Image.init()
    formats = Image.OPEN.keys() - NOT_READ
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


class Header(NamedTuple):
    """What an image file says before it is decoded: (width, height) as stored, and turned upright by `orientation`."""

    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int  # 1 to 8, EXIF's
    has_pages: bool  # or frames, of which the first is decoded


def read_header(path: Path) -> Header:
    """Raises ImageFault as `open_image` does."""
    with _faults_of(path), Image.open(path) as image:
        return _header(image)


def open_image(file: Source, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file, or PIL's image of it, to RGB: its first page, with white where it is transparent.

    Cameras store a rotation beside the pixels (EXIF), and annotation tools differ in whether they apply it. The
    annotated `size` (width, height) tells which; where it does not, `upright` does. None: the image is turned upright.

    Raises ImageFault: no such file, not an image, damaged, too large to decode, of another size than `size`, of more
    than 8 bits a channel of which the upper half is not used, or white on transparent.
    """
    path = "given as a PIL image" if isinstance(file, Image.Image) else file
    with _faults_of(path):
        image = file if isinstance(file, Image.Image) else Image.open(file)
        stored, turned, orientation, _ = _header(image)
        as_stored = size == stored and not (upright and stored == turned)
        is_deep = ";16" in str(getattr(image, "tile", ""))
        image.load()
        if image.format == "TIFF" and as_stored:  # Pillow has turned it upright: undo that
            image.getexif()[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
        if image.format == "TIFF" or not as_stored:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image, is_deep)
    if size is not None and image.size != size:
        found, annotated = ("x".join(map(str, pair)) for pair in (image.size, size))
        message = f"{path} is {found} pixels, but its annotation says {annotated}"
        raise ImageFault(message, "left out {} images of another size than annotated")
    return image


@contextmanager
def _faults_of(name: object) -> Iterator[None]:
    """Raises ImageFault for what the decoders raise, with their error as its cause."""
    try:
        yield
    except ImageFault as fault:
        raise ImageFault(f"{name}: {fault}", fault.sentence) from fault
    except FileNotFoundError as error:
        raise ImageFault(f"no such image: {name}") from error
    except Image.DecompressionBombError as error:
        message = f"{name} is too large to decode, scale it down: {str(error).partition(',')[0]}"
        raise ImageFault(message, "left out {} images that are too large to decode, scale them down") from error
    except (*DECODING_ERRORS, struct.error) as error:
        raise ImageFault(f"cannot read the image {name}: {last_line(error)}") from error


def _header(image: Image.Image) -> Header:
    """Of an image that is not loaded."""
    has_exif = image.format != "PNG" or "exif" in image.info  # Pillow would decode the image in search of it
    orientation = image.getexif().get(ORIENTATION, 1) if has_exif else 1
    orientation = orientation if orientation in range(1, 9) else 1
    turned = image.size[::-1] if orientation >= 5 else image.size
    has_pages = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photograph and its preview
    stored, upright = (turned, image.size) if image.format == "TIFF" else (image.size, turned)
    return Header(stored, upright, orientation, has_pages)


def _to_rgb(image: Image.Image, is_deep: bool) -> Image.Image:
    """8 bits a channel; `is_deep`: the file has 16, of which Pillow keeps the upper 8."""
    if image.mode == "F" or image.mode.startswith("I"):
        is_deep, values = True, np.asarray(image) / 257
        values = values if image.mode != "F" and values.min() >= 0 and values.max() <= 255 else values * 0
        image = Image.fromarray(values.round().astype(np.uint8))
    if is_deep:
        levels = np.reshape(image.convert("RGB").histogram(), (3, 256)).sum(0)
        if not levels[128:].any() or levels[17:].sum() < FEW * levels.sum():  # 12 bits in 16, say, nearly black
            message = "its pixels have more than 8 bits and do not fill the range of 16: write it with 8 bits a channel"
            raise ImageFault(message, "left out {} images of more than 8 bits that do not fill 16: write them with 8")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if shown.getextrema() == ((255, 255),) * 4 != image.getextrema():
        counted = "left out {} images that are white or transparent everywhere: write them on another background"
        raise ImageFault("it is white or transparent everywhere: write it on another background", counted)
    return shown.convert("RGB")


def read_pixels(image: Source | str | bytes | np.ndarray | Tensor) -> Tensor:
    """The pixels (3, H, W) uint8 RGB of an image in any of the forms that Python programs have them in.

    Args:
        image: a file, its content, an http(s) URL or a PIL image, which are turned upright by their EXIF orientation;
            an array (H, W, 3) uint8 RGB; a tensor (3, H, W) RGB, uint8 or floating-point in 0..1.

    Raises InputError: a file or URL that cannot be read, an array or tensor of another shape or type, or an image
    without pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"an array must be (H, W, 3) uint8 RGB, and this is {image.shape} {image.dtype}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if isinstance(image, Tensor):
        return _tensor_pixels(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        try:
            response = requests.get(image, timeout=URL_TIMEOUT_S)
            response.raise_for_status()
        except requests.RequestException as error:
            raise InputError(f"cannot fetch the image {image}: {last_line(error):.200}") from error
        image = response.content
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, str | Path | Image.Image) and not hasattr(image, "read"):
        raise InputError(f"an image must be a path, URL, file, PIL image, array or tensor, not {type(image).__name__}")
    return F.pil_to_tensor(open_image(Path(image) if isinstance(image, str) else image))


def _tensor_pixels(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise InputError(f"a tensor must be (3, H, W) RGB, and this is {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point():
        raise InputError(f"a tensor must be uint8, or floating-point in 0..1, and this is {image.dtype}")
    low, high = image.min().item(), image.max().item()
    slack = max(ROUNDING, torch.finfo(image.dtype).eps)
    if not -slack <= low <= high <= 1 + slack:
        raise InputError(f"a floating-point tensor must be in 0..1, and this ranges from {low:.6g} to {high:.6g}")
    return (image.cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)


def scaled(image: Tensor, size: InputSize) -> tuple[Tensor, tuple[float, float]]:
    """An image (3, H, W) uint8 at the size of a detector's input, and the (x, y) scales."""
    sides, scale = size.fit((image.shape[-2], image.shape[-1]))
    return F.resize(image, list(sides), antialias=True), scale
