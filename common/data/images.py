"""Image files: decoding, orientation, sizes."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from common.console import InputError, WrongSizeError

ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height change places
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to RGB.

    Cameras store the rotation beside the pixels (EXIF). With `size` = (width, height) given, the image is turned
    only where that makes it match, since annotation tools disagree on it; without, it is always turned upright.

    Raises:
        InputError: no such file, not an image, damaged, or of another size than `size`.
    """
    try:
        image: Image.Image = Image.open(path)
        if size is None or image.size != size:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, of which Pillow would cut off all that is bright
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        if image.mode == "F":
            raise ValueError("its pixels are fractions, whose range is unknown")
        image = image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"no such image: {path}") from error
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error
    if size is not None and image.size != size:
        found, said = "x".join(map(str, image.size)), "x".join(map(str, size))
        raise WrongSizeError(f"{path} is {found} pixels, but its annotation says {said}; mend the annotation file")
    return image


def read_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image file turned upright, from its first bytes alone; None where they tell nothing."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return None
