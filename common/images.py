"""Images: finding files in folders, sizes, EXIF orientation, decoding, and the letterbox."""

import io
import os
import struct
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import requests
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from common.console import InputError, WrongSizeError, last_line
from common.types import letterbox

FILL = (124, 116, 104)  # of the letterbox: ImageNet's mean colour, zero after the backbone's normalisation
URL_TIMEOUT = 30  # seconds

ORIENTATION = 0x0112  # EXIF's tag: 1 upright, 2 to 8 how to turn or mirror the stored pixels
UNDO = {  # the inverse of each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # Pillow recognises them, others decode them
OTHER_FORMATS = {
    *(".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".svg"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}
UNREADABLE_FORMAT, METADATA = "an image format that Pillow does not read", "macOS metadata, which are no images"

# What Pillow's decoders raise at damaged files.
DECODING_ERRORS = (
    *(OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, RuntimeError),
    struct.error,
)
# Pillow warns of damage that it can read past, and of images of half the size that it refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")


class TooLargeError(InputError):
    """An image has so many pixels that decoding it could fill the memory."""


def find_images(folder: Path, subfolders: bool = False) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files of a folder that Pillow reads, by their suffix, in the order of their paths.

    Symbolic links are followed, hidden subfolders are left out.

    Returns:
        The images; and the image files that are left out, with the reason.
    """
    images, skipped, visited = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX"))) if subfolders else []
        real = os.path.realpath(place)
        if real in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in OTHER_FORMATS:
                skipped.append((Path(place, name), UNREADABLE_FORMAT))
            elif suffix in image_suffixes():
                if name.startswith("._"):
                    skipped.append((Path(place, name), METADATA))
                else:
                    images.append(Path(place, name))
    return sorted(images), sorted(skipped)


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of the formats that Pillow reads, each with its dot."""
    Image.init()
    formats = Image.OPEN.keys() - NOT_DECODED
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def open_image(path: Path, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file to RGB.

    Cameras store the rotation beside the pixels (EXIF), and annotation tools differ in whether they apply it. The
    annotated `size` tells which, unless the rotation does not change it.

    Args:
        path: the file; of an animation the first frame is taken.
        size: the annotated (width, height). None turns the image upright.
        upright: turn the image upright where `size` does not tell.

    Raises:
        InputError: no such file, not an image, damaged, too large to decode, or of another size than `size`.
    """
    return _decode(path, size, upright)[0]


def read_pixels(image: Path | str | Image.Image | np.ndarray | Tensor) -> Tensor:
    """The pixels (3, H, W) uint8 RGB of an image in any of the forms that Python programs have them in.

    Args:
        image: a file, an http(s) URL or a PIL image, which are turned upright by their EXIF orientation; an array
            (H, W, 3) uint8 RGB; a tensor (3, H, W) RGB, uint8 or floating-point in 0..1.

    Raises:
        InputError: a file or URL that cannot be read, an array or tensor of another shape or type, or an image without
            pixels.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return F.pil_to_tensor(_fetch(image))
    if isinstance(image, str | Path):
        return F.pil_to_tensor(open_image(Path(image)))
    if isinstance(image, Image.Image):
        try:
            return F.pil_to_tensor(_to_rgb(ImageOps.exif_transpose(image)))
        except DECODING_ERRORS as error:  # Pillow decodes when the pixels are used
            raise InputError(f"cannot read the image: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"an array must be (H, W, 3) uint8 RGB, and this is {image.shape} {image.dtype}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise InputError(f"an image must be a path, URL, PIL image, array or tensor, not a {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise InputError(f"a tensor must be (3, H, W) RGB, and this is {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point() or not (image.min() >= 0 and image.max() <= 1):
        raise InputError(f"a tensor must be uint8, or floating-point in 0..1, and this is other {image.dtype}")
    return (image.cpu().float() * 255).round().to(torch.uint8)


def _fetch(url: str) -> Image.Image:
    try:
        response = requests.get(url, timeout=URL_TIMEOUT)
        response.raise_for_status()
    except requests.RequestException as error:
        raise InputError(f"cannot fetch the image {url}: {last_line(error):.200}") from error
    return _decode(io.BytesIO(response.content), None, upright=True, name=url)[0]


def letterboxed(image: Tensor, side: int) -> tuple[Tensor, tuple[float, float]]:
    """Scale an image to fit a square, in its upper-left corner, and pad.

    Args:
        image: (3, H, W) uint8.
        side: of the square, pixels.

    Returns:
        (3, side, side) uint8, and the (x, y) scales.
    """
    (height, width), scale = letterbox((image.shape[-2], image.shape[-1]), side)
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    canvas[:, :height, :width] = F.resize(image, [height, width], antialias=True)
    return canvas, scale


def has_open_orientation(path: Path, size: tuple[int, int]) -> bool:
    """Whether an image has an EXIF rotation of which the annotated `size` does not tell if it was applied.

    Raises InputError as `open_image` does, since it decodes the image.
    """
    return _decode(path, size, upright=False)[1]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, of which Pillow would cut off all that is bright
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "F":
        raise ValueError("its pixels are fractions, whose range is unknown")
    return image.convert("RGB")


def _decode(
    path: Path | io.BytesIO, size: tuple[int, int] | None, upright: bool, name: str = ""
) -> tuple[Image.Image, bool]:
    name = name or str(path)
    try:
        image: Image.Image = Image.open(path)
        orientation, stored, turned = _orientation(image)
        is_open = orientation != 1 and stored == turned == size
        if size == stored and not (is_open and upright):
            image.load()
            if image.format == "TIFF" and orientation in UNDO:  # which Pillow turns upright itself
                image = image.transpose(UNDO[orientation])
        else:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"no such image: {name}") from error
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
        raise TooLargeError(f"{name} is too large to decode, scale it down: {reason}") from error
    except DECODING_ERRORS as error:
        raise InputError(f"cannot read the image {name}: {error}") from error
    if size is not None and image.size != size:
        file_size, annotated = "x".join(map(str, image.size)), "x".join(map(str, size))
        raise WrongSizeError(f"{name} is {file_size} pixels, but its annotation says {annotated}")
    return image, is_open


def _orientation(image: Image.Image) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """EXIF orientation of an image that is not loaded, its (width, height) as stored, and upright."""
    orientation = image.getexif().get(ORIENTATION, 1)
    if orientation not in UNDO:
        return 1, image.size, image.size
    size, swapped = image.size, image.size[::-1]
    if orientation < 5:
        return orientation, size, size
    return (orientation, swapped, size) if image.format == "TIFF" else (orientation, size, swapped)


def read_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(width, height) of an image file as stored, and upright; None where the file cannot be read."""
    try:
        with Image.open(path) as image:
            return _orientation(image)[1:]
    except (*DECODING_ERRORS, Image.DecompressionBombError):
        return None


def read_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image file turned upright; None where the file cannot be read."""
    sizes = read_sizes(path)
    return sizes[1] if sizes else None
