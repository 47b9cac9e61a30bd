"""Near-copies: images that show the same picture, encoded, scaled, lightened or mirrored anew."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

ROWS, COLUMNS, SIDE = 8, 9, 32  # of the grey image for the hash, and of the one for the correlation
SKETCH_BYTES = ROWS * COLUMNS + SIDE * SIDE
REDUCED_PX = 64  # of the shorter side at least, from which both are scaled: faster than from all pixels
BITS, CORRELATION = 10, 0.96  # re-encoded copies correlate by .98 or more, other images by .953 at most
PLAIN = 20  # grey levels from the darkest to the brightest pixel, up to which noise decides the bits of the hash
ROUNDING = 0.5  # mean square, grey levels: of plain images little more is left to correlate
CHUNK = 256  # images that are compared with all others at a time


def make_sketch(image: Image.Image) -> bytes:
    """The image in grey, scaled to (8, 9) and to (32, 32), of one byte a pixel."""
    small = image.reduce(max(1, min(image.size) // REDUCED_PX)).convert("L")
    scaled = (small.resize(size, Image.Resampling.LANCZOS) for size in ((COLUMNS, ROWS), (SIDE, SIDE)))
    return b"".join(grey.tobytes() for grey in scaled)


def find_copies(sketches: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The index of each of P images that has near-copies among Q others, and their indices (C,) int64.

    Difference hashes of 64 bits find candidates, as they are and mirrored. Of drawn images they find false ones, too:
    the correlation of the larger grey images decides, and of plain images alone.

    Args: sketches (P, 1096) and others (Q, 1096) uint8, of `make_sketch`.
    """
    small, other_small = (part[:, : ROWS * COLUMNS].reshape(-1, ROWS, COLUMNS) for part in (sketches, others))
    large, other_large = (part[:, ROWS * COLUMNS :].reshape(-1, SIDE, SIDE) for part in (sketches, others))
    plain, other_plain = (np.ptp(part, (1, 2)) <= PLAIN for part in (large, other_large))
    hashes, other_hashes = (_hash(small), _hash(small[:, :, ::-1])), _hash(other_small)
    for start in range(0, len(sketches), CHUNK):
        near = plain[start : start + CHUNK, None] & other_plain
        for part in hashes:
            near |= np.bitwise_count(part[start : start + CHUNK, None] ^ other_hashes) <= BITS
        for row in np.nonzero(near.any(1))[0]:
            candidates = np.nonzero(near[row])[0]
            views = np.stack([large[start + row], large[start + row, :, ::-1]])
            if (alike := _are_alike(other_large[candidates], views)).any():
                yield int(start + row), candidates[alike]


def _hash(grey: np.ndarray) -> np.ndarray:
    """(P,) uint64: a bit for each pixel of (P, 8, 9) that is brighter than its right neighbour."""
    bits = grey[:, :, :-1] > grey[:, :, 1:]
    return np.packbits(bits.reshape(-1, 64), axis=1).view(np.uint64)[:, 0]


def _are_alike(images: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(C,) bool: which images (C, 32, 32) correlate with one of the views (2, 32, 32), or differ by rounding alone."""
    flat = [grey.reshape(len(grey), -1).astype(np.float32) for grey in (images, views)]
    a, b = (values - values.mean(1, keepdims=True) for values in flat)
    product, norms = a @ b.T, [(values**2).sum(1) for values in (a, b)]
    alike = product > CORRELATION * np.sqrt(np.outer(*norms))
    return (alike | (np.add.outer(*norms) - 2 * product < ROUNDING * a.shape[1])).any(1)
