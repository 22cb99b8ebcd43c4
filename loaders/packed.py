"""Packed data: an image tree in a few large files, tar shards that WebDataset tools and DALI's own reader understand.

A folder with `shard-000000.tar`, ..., for each a `.idx` in the format of DALI's `wds2idx`, and `mealfast-pack.npz`,
written last: where each image lies and how large it is. Images are read in any order through memory maps, so that the
views are those of the tree.
"""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path

import numpy as np

from . import index_store
from .batch import DataError
from .index_store import Stored

INDEX = "mealfast-pack.npz"
UNFINISHED = "mealfast-pack.unfinished"  # stands in the folder while it is written


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06}.tar"


@dataclasses.dataclass(frozen=True)
class PackedFiles:
    """The shards' memory maps, and which image lies where."""

    maps: list[np.ndarray]  # uint8 [bytes of the shard] each
    shards: np.ndarray  # int32 [N], position in `maps`
    offsets: np.ndarray  # int64 [N], bytes

    def encoded(self, i: int, size: int) -> np.ndarray:
        """uint8 [size]: image `i`."""
        offset = int(self.offsets[i])
        return self.maps[self.shards[i]][offset : offset + size]

    def select(self, rows: list[int]) -> PackedFiles:
        """The same files with these images only, in this order."""
        return dataclasses.replace(self, shards=self.shards[rows], offsets=self.offsets[rows])


def open_pack(root: Path) -> tuple[Stored, PackedFiles]:
    """The index of a packed folder and its files. Raises DataError where they do not belong together."""
    stored = index_store.load(root / INDEX)
    if stored is None:
        raise DataError(f"{root / INDEX}: is damaged or of another version; pack the images again")
    usable = np.array([not reason for reason in stored.reasons], bool)
    shards, ends = stored.shards[usable], stored.offsets[usable] + stored.bytes[usable]
    if min(shards.min(initial=0), stored.offsets.min(initial=0), stored.bytes[usable].min(initial=0)) < 0:
        raise DataError(f"{root / INDEX}: is damaged (negative places); pack the images again")
    if shards.max(initial=0) > len(shards):  # checked before as many files are looked for
        raise DataError(f"{root / INDEX}: is damaged (numbers of shards); pack the images again")
    maps = []
    for number in range(int(shards.max(initial=-1)) + 1):
        path = root / shard_name(number)
        needed = int(ends[shards == number].max(initial=0))
        try:
            with open(path, "rb") as file:
                maps.append(np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); pack the images again") from None
        if len(maps[-1]) < needed:
            raise DataError(f"{path}: holds {len(maps[-1])} bytes of {needed}; copy or pack it again")
    return stored, PackedFiles(maps, stored.shards, stored.offsets)
