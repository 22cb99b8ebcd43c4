"""Packed data: an image tree in a few large files, tar shards that WebDataset tools and DALI's own reader understand.

A folder with `shard-000000.tar`, ..., for each a `.idx` in the format of DALI's `wds2idx`, and `mealfast-pack.npz`,
written last: where each image lies and how large it is. Images are read in any order, so that the views are those of
the tree. They are read by `pread`, not through memory maps: a shard that shrinks or a disk that fails is an error then,
and not the signal SIGBUS, which ends the process.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import index_store
from .batch import DataError
from .index_store import Stored
from .open_files import open_regular

INDEX = "mealfast-pack.npz"
UNFINISHED = "mealfast-pack.unfinished"  # stands in the folder while it is written
_OPEN = 256  # shards at a time: a process may have 1024 files open by default


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06}.tar"


class _Shard:
    """An open shard, closed when no one holds it any more: not while another thread reads it."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(os.fsencode(path))
        self.descriptor = self._file.fileno()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


@dataclasses.dataclass(frozen=True)
class PackedFiles:
    """The shards, and which image lies where."""

    shards: np.ndarray  # int32 [N], the number of the shard
    offsets: np.ndarray  # int64 [N], bytes
    path: Callable[[int], Path]  # of a shard by its number
    _open: Callable[[int], _Shard]

    @classmethod
    def below(cls, root: Path, shards: np.ndarray, offsets: np.ndarray) -> PackedFiles:
        """The shards in the folder `root`; each is opened when it is first read."""

        def path(number: int) -> Path:
            return root / shard_name(number)

        return cls(shards, offsets, path, lru_cache(_OPEN)(lambda number: _Shard(path(number))))

    def encoded(self, i: int, size: int) -> np.ndarray:
        """uint8 [size]: image `i`, a copy. Raises OSError where its shard cannot be read or ends before it."""
        number, offset = int(self.shards[i]), int(self.offsets[i])
        data = np.empty(size, np.uint8)
        done = 0
        try:
            shard = self._open(number)
            while done < size:
                count = os.preadv(shard.descriptor, [data.data[done:]], offset + done)
                if count == 0:
                    raise OSError(f"the file ends {size - done} bytes too early")
                done += count
        except OSError as error:
            raise OSError(f"{shard_name(number)}: {error.strerror or error}") from None
        return data

    def select(self, rows: Sequence[int]) -> PackedFiles:
        """The same files with these images only, in this order."""
        return dataclasses.replace(self, shards=self.shards[rows], offsets=self.offsets[rows])


def open_pack(root: Path) -> tuple[Stored, PackedFiles]:
    """The index of a packed folder and its files. Raises DataError where they do not belong together."""
    stored = index_store.load(root / INDEX)
    if stored is None:
        raise DataError(f"{root / INDEX}: is damaged or of another version; pack the images again")
    usable = np.array([not reason for reason in stored.reasons], bool)
    shards, ends = stored.shards[usable], stored.offsets[usable] + stored.bytes[usable]
    if min(column.min(initial=0) for column in (shards, stored.offsets, stored.bytes[usable], ends)) < 0:
        raise DataError(f"{root / INDEX}: is damaged (negative places); pack the images again")
    if shards.max(initial=0) > len(shards):  # checked before as many files are looked for
        raise DataError(f"{root / INDEX}: is damaged (numbers of shards); pack the images again")
    for number in range(int(shards.max(initial=-1)) + 1):
        path = root / shard_name(number)
        needed = int(ends[shards == number].max(initial=0))
        try:
            with open_regular(os.fsencode(path)) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); pack the images again") from None
        if size < needed:
            raise DataError(f"{path}: holds {size} bytes of {needed}; copy or pack it again")
    return stored, PackedFiles.below(root, stored.shards, stored.offsets)
