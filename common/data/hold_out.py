"""Groups of images of one scene: which are held out for validation where the data have none, and folds of them.

An image's side follows from its own group, so that images which are added later move none.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from common.console import InputError
from common.data.checks import sketches_of
from common.data.copies import SKETCH_BYTES, find_copies
from common.data.memory import DetectionData

RANDOM_PARTS = re.compile(r"^[0-9a-f]{8}(-|__)|_[A-Za-z]{3,4}\.rf\.\w+$")  # Label Studio's and Roboflow's
LAST_NUMBER = re.compile(r"([0-9]+)(?=[^0-9]*$)")
SERIES, BLOCK = 40, 20  # names that differ in their last number alone, and numbers in a block of a longer series
GOLDEN = 0x9E3779B97F4A7C15  # of 2**64: multiples are spread evenly (Fibonacci hashing, Knuth, volume 3, 6.4)
MOST = 0.9  # of the images may be in one group, where a finer cut makes smaller ones
Group = tuple[str, int]  # name of a series, and a number or block in it, -1 for the whole


def group_images(data: DetectionData, least: int = 2, *, copies: bool = True) -> list[Group]:
    """The group of each of P images, of which there should be `least` or more; near-copies are in one (or not).

    Groups are series of names of at most SERIES images and blocks of longer ones; or, where these are too few, or one
    has nearly all images, blocks; or names in their folders. The last cut is taken whatever it makes.
    """
    stems = [RANDOM_PARTS.sub("", image.path.stem) for image in data.images]
    names, numbers = [LAST_NUMBER.sub("#", s) for s in stems], [int((LAST_NUMBER.search(s) or [-1])[0]) for s in stems]
    counts, blocks = Counter(names), [number // BLOCK for number in numbers]
    alone = [f"{image.path.parent.name}/{name}" for image, name in zip(data.images, names, strict=True)]
    series = [block if counts[name] > SERIES else -1 for name, block in zip(names, blocks, strict=True)]
    pairs = _pairs_of_copies(sketches_of(data).tobytes()) if copies else ()
    for cut in ((names, series), (names, blocks), (alone, numbers)):
        groups = _join(list(zip(*cut, strict=True)), pairs)
        sizes = Counter(groups).values()
        if len(sizes) >= least and max(sizes) <= MOST * len(data):
            break
    return groups


def choose_held_out(data: DetectionData, share: float) -> np.ndarray:
    """(P,) bool: the images that are held out, at least one and not all.

    Groups whose hash is below the share are, where there is none the first one, and never one with more than half of
    the images. Near-copies are apart where nearly all are copies of each other. Raises InputError: they are one group.
    """
    for copies in (True, False):
        sizes = Counter(groups := group_images(data, copies=copies))
        if max(sizes.values()) <= MOST * len(data):
            break
    free = sorted(group for group in sizes if sizes[group] <= len(data) / 2)
    if not free:
        where = data.images[0].path
        raise InputError(f"of {len(data)} images none can be held out for validation: give others beside {where}")
    chosen = {group for group in free if _fraction(*group) < share}
    chosen = chosen if 0 < len(chosen) < len(sizes) else set(free[:1])
    return np.array([group in chosen for group in groups])


def assign_folds(data: DetectionData, folds: int) -> np.ndarray:
    """(P,) int64 in 0..folds-1: the fold of each image, groups and near-copies together, of about as many images each.

    Raises InputError: there are fewer groups than folds.
    """
    sizes = Counter(groups := group_images(data, folds))
    if len(sizes) < folds:
        what = f"its {len(data)} images are {len(sizes)} groups of near-copies or of one name"
        raise InputError(f"{data.source}: {what}, too few for {folds} folds: ask for fewer, or add other images")
    fold_of, filled = dict[Group, int](), [0] * folds
    for group, size in sizes.most_common():
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += size
    return np.array([fold_of[group] for group in groups])


def _fraction(name: str, block: int) -> float:
    """0..1, the hash of a group."""
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) if block < 0 else block * GOLDEN % 2**64) / 2**64


@lru_cache(maxsize=1)  # the training part asks, and then the validation part
def _pairs_of_copies(sketches: bytes) -> list[tuple[int, int]]:
    content = np.frombuffer(sketches, np.uint8).reshape(-1, SKETCH_BYTES)
    return [(i, int(j)) for i, found in find_copies(content, content) for j in found if j < i]


def _join(groups: Sequence[Group], copies: Iterable[tuple[int, int]]) -> list[Group]:
    """The group of each image, where those that have copies of each other are called as the first of them."""
    first = {group: group for group in groups}

    def find(group: Group) -> Group:
        while first[group] != group:
            first[group] = group = first[first[group]]
        return group

    for pair in {(groups[i], groups[j]) for i, j in copies}:
        low, high = sorted(map(find, pair))
        first[high] = low
    return [find(group) for group in groups]
