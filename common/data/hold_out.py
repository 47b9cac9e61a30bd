"""A hold-out that stays: which images of a data set without a validation part are for validation.

An image's side follows from its own group, images of one scene, so that images which are added later move none.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from common.console import InputError
from common.data.copies import find_copies

RANDOM_PARTS = re.compile(r"^[0-9a-f]{8}(-|__)|_[A-Za-z]{3,4}\.rf\.\w+$")  # Label Studio's and Roboflow's
LAST_NUMBER = re.compile(r"([0-9]+)(?=[^0-9]*$)")
SERIES, BLOCK = 40, 20  # names that differ in their last number alone, and numbers in a block of a longer series
GOLDEN = 0x9E3779B97F4A7C15  # of 2**64: multiples are spread evenly (Fibonacci hashing, Knuth, volume 3, 6.4)
LEAST = 0.1  # of the images must be in groups that may be held out
Group = tuple[str, int]  # name of a series, and a block of it, -1 for the whole


@lru_cache(maxsize=1)  # the training part asks, and then the validation part
def choose_held_out(paths: tuple[Path, ...], sketches: bytes, share: float) -> np.ndarray:
    """(P,) bool: the images that are held out, at least one, of these files and their `make_sketch`.

    A group is a series of names of at most SERIES images, or a block of a longer one; those with near-copies of each
    other are one. Groups whose hash is below the share are held out, where there is none the first one, and never one
    with more than half of the images. Where nearly all are in such a one, blocks are taken, or names, or folders, at
    last blocks and names in spite of near-copies. Raises InputError: all images are in one group by all these rules.
    """
    stems = [RANDOM_PARTS.sub("", path.stem) for path in paths]
    numbered = [(LAST_NUMBER.sub("#", stem), int((LAST_NUMBER.search(stem) or [-1])[0])) for stem in stems]
    counts, content = Counter(name for name, _ in numbered), np.frombuffer(sketches, np.uint8).reshape(len(paths), -1)
    copies = [(i, int(j)) for i, found in find_copies(content, content) for j in found if j < i]
    series = [(name, number // BLOCK if counts[name] > SERIES else -1) for name, number in numbered]
    blocks, folders = [(name, number // BLOCK) for name, number in numbered], [(str(path.parent), -1) for path in paths]
    ways = [*((groups, copies) for groups in (series, blocks, numbered, folders)), (blocks, []), (numbered, [])]
    for way in ways:
        sizes = Counter(groups := _join(*way))
        free = [group for group in sorted(sizes) if sizes[group] <= len(paths) / 2]
        if sum(sizes[group] for group in free) >= len(paths) * LEAST:
            break
    else:
        raise InputError(f"of {len(paths)} images none can be held out for validation: give others beside {paths[0]}")
    chosen = {group for group in free if _fraction(*group) < share}
    chosen = chosen if 0 < len(chosen) < len(sizes) else set(free[:1])
    return np.array([group in chosen for group in groups])


def _fraction(name: str, block: int) -> float:
    """0..1, the hash of a group."""
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) if block < 0 else block * GOLDEN % 2**64) / 2**64


def _join(groups: Sequence[Group], copies: Sequence[tuple[int, int]]) -> list[Group]:
    """The group of each image, where those that have copies of each other are called as the first of them."""
    first = {group: group for group in groups}

    def find(group: Group) -> Group:
        while first[group] != group:
            group = first[group]
        return group

    for pair in {(groups[i], groups[j]) for i, j in copies}:
        low, high = sorted(map(find, pair))
        first[high] = low
    return [find(group) for group in groups]
